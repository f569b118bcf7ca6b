"""Datasets of images and labels, map-style and streamed, which skip unreadable files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from lit_tokenformer.data.corrupt import TooManyCorruptSamples, check_share
from lit_tokenformer.data.images.transforms import ImageTransform
from lit_tokenformer.data.resumable import seeded

UNREADABLE = -100
"""Label of an unreadable image that keeps its place in a batch (prediction only)."""


class Samples(Protocol):
    """Labelled images that can be read by index."""

    labels: np.ndarray  # (N,) int64

    def read(self, index: int) -> Image.Image:
        """The image, RGB. May raise whatever the decoder raises."""

    def name(self, index: int) -> str:
        """The file's path where there is one, else the index as text."""


class ImageReader:
    """Reads images and keeps count of the unreadable ones, over all worker processes of this process.

    An unreadable image is named in a warning once and counted once. The run stops when there are more of them than
    ``max_corrupt_share`` times the number of images, and more than ``ALLOWED_CORRUPT``; with a share of 0 it stops at
    the first. All images of the data set are the measure, not those read so far: that way a few bad files in the first
    batches of a good data set do not end a run, and a data set of which nothing can be read still ends it within
    seconds.

    Args:
        samples: The images.
        max_corrupt_share: Share of unreadable images, from 0 to 1.
    """

    def __init__(self, samples: Samples, max_corrupt_share: float) -> None:
        self.samples = samples
        self.max_corrupt_share = max_corrupt_share
        self._corrupt = torch.zeros(len(samples.labels), dtype=torch.bool).share_memory_()  # seen by all workers

    def __len__(self) -> int:
        return len(self._corrupt)

    def read(self, index: int) -> Image.Image | None:
        """The image, or None where it cannot be read.

        Raises:
            ValueError: If too many images are unreadable.
        """
        if self._corrupt[index]:
            return None
        try:
            return self.samples.read(index)
        except Exception as error:  # whatever a decoder makes of broken bytes
            self._corrupt[index] = True
            warnings.warn(f"unreadable image left out: {self.samples.name(index)} ({error})", stacklevel=2)
        bad = self.corrupt_indices
        check_share(len(bad), len(self), self.max_corrupt_share, [self.samples.name(i) for i in bad[:3]])
        if len(bad) == len(self):
            raise TooManyCorruptSamples(
                f"data.max_corrupt_share: none of {len(self)} images can be read; the first: {self.samples.name(0)}"
            )
        return None

    @property
    def corrupt_indices(self) -> list[int]:
        """The unreadable images found so far."""
        return self._corrupt.nonzero().flatten().tolist()


class TrainImages(Dataset):
    """Training samples under keys ``(epoch, pass, index)``: the augmentation is seeded by the key and by nothing else.

    An unreadable image is replaced by the next readable one, so that batches keep their size.

    Args:
        reader: Reads the images.
        transform: From an RGB image to a tensor (3, H, W); may be random.
        seed: The run's seed, >= 0.
    """

    def __init__(self, reader: ImageReader, transform: ImageTransform, seed: int) -> None:
        self.reader = reader
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, key: tuple[int, int, int] | int) -> tuple[torch.Tensor, int]:
        # A bare index comes from Lightning's own sampler (overfit_batches).
        epoch, repeat, wanted = key if isinstance(key, tuple) else (0, 0, key)
        index = wanted
        while (image := self.reader.read(index)) is None:
            index = (index + 1) % len(self)
        with seeded(self.seed, epoch, repeat, wanted):
            return self.transform(image), int(self.reader.samples.labels[index])


class EvalImages(Dataset):
    """Evaluation samples; an unreadable image is None and ``collate_readable`` leaves it out, so no other image is
    counted for it. The index behind the last image is None too.

    Args:
        reader: Reads the images.
        transform: From an RGB image to a tensor (3, H, W), fixed.
        keep_places: Put a black image with the label -100 in an unreadable image's place instead (prediction, where the
            n-th output belongs to the n-th file).
    """

    def __init__(self, reader: ImageReader, transform: ImageTransform, keep_places: bool = False) -> None:
        self.reader = reader
        self.transform = transform
        self.keep_places = keep_places

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | None:
        image = self.reader.read(index) if index < len(self) else None
        if image is not None:
            return self.transform(image), int(self.reader.samples.labels[index])
        return (self.transform(Image.new("RGB", (32, 32))), UNREADABLE) if self.keep_places else None


def collate_readable(samples: list[tuple[torch.Tensor, int] | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch ``(image (B, 3, H, W), label (B,))`` of the samples that are not None.

    Raises:
        ValueError: If none is left.
    """
    readable = [sample for sample in samples if sample is not None]
    if not readable:
        raise TooManyCorruptSamples(
            f"data.eval_batch_size: all {len(samples)} images of an evaluation batch are unreadable; "
            "remove them, or take larger batches"
        )
    return tuple(default_collate(readable))  # type: ignore[return-value]


class StreamImages(IterableDataset):
    """Samples of a Hugging Face stream; rank and worker see their own shards.

    An unreadable training image is replaced by the next readable one, an unreadable evaluation image is left out. Each
    worker process counts for itself, against the images it has read itself.

    Args:
        stream: A ``datasets.IterableDataset`` whose image column is not decoded (``{"bytes", "path"}``), or any
            iterable with such rows.
        columns: Names of the image column and of the label column.
        decode: From the image column's value to an RGB image.
        transform: From an RGB image to a tensor (3, H, W).
        max_corrupt_share: Share of unreadable images, from 0 to 1.
        batch_size: Samples in a batch; needed to skip whole batches.
        seed: The run's seed, or None for evaluation (no augmentation, no replacement).
        rank: This process among those that see different data.
    """

    def __init__(
        self,
        stream: Any,
        columns: tuple[str, str],
        decode: Callable[[Any], Image.Image],
        transform: ImageTransform,
        max_corrupt_share: float,
        batch_size: int,
        seed: int | None = None,
        rank: int = 0,
    ) -> None:
        self.stream = stream
        self.columns = columns
        self.decode = decode
        self.transform = transform
        self.max_corrupt_share = max_corrupt_share
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.epoch = 0
        self.skip_batches = 0
        """Batches of each worker that are handed out empty, without decoding, because the loader throws them away."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        worker = get_worker_info()
        worker_id = worker.id if worker is not None else 0
        self.stream.set_epoch(self.epoch)
        skip = self.skip_batches * self.batch_size
        position, missing, corrupt = 0, 0, []
        for read, row in enumerate(self.stream, start=1):
            if position < skip:
                position += 1
                yield torch.zeros(0), 0
                continue
            value, label = (row[column] for column in self.columns)
            try:
                image = self.decode(value)
            except Exception as error:  # whatever a decoder makes of broken bytes
                name = value.get("path") or f"sample {read} of the stream"
                warnings.warn(f"unreadable image left out: {name} ({error})", stacklevel=2)
                corrupt.append(name)
                check_share(len(corrupt), read, self.max_corrupt_share, corrupt[:3])
                missing += 1
                continue
            if self.seed is None:
                yield self.transform(image), label
                continue
            for _ in range(missing + 1):  # stands in for the unreadable ones before it, each time augmented anew
                with seeded(self.seed, self.epoch, self.rank, worker_id, position):
                    yield_value = self.transform(image)
                position += 1
                yield yield_value, label
            missing = 0

"""Map-style and iterable datasets of images and labels that skip unreadable files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from lit_tokenformer.data.corrupt import TooManyCorruptSamples, check_share
from lit_tokenformer.data.images.folders import find_images
from lit_tokenformer.data.images.samples import UNLABELED, Samples
from lit_tokenformer.data.images.transforms import Augmentation, ImageTransform, eval_transform
from lit_tokenformer.data.resumable import seeded
from lit_tokenformer.errors import UserError

UNREADABLE = -100
"""Label of an unreadable image that is kept in its batch (prediction only)."""


@dataclass(eq=False, repr=False)
class ImageReader:
    """Image reader that counts unreadable images over all worker processes of this process.

    An unreadable image is reported in a warning once and counted once. The run stops when their number exceeds both
    ``max_corrupt_share`` times the number of images and ``ALLOWED_CORRUPT``; with a share of 0 it stops at the first.
    The share is of all images of the data set, not of those read so far. A few bad files in the first batches thus do
    not end a run, and a fully unreadable data set still ends it within seconds.
    """

    samples: Samples
    max_corrupt_share: float
    """Tolerated share of unreadable images, from 0 to 1."""

    def __post_init__(self) -> None:
        self._corrupt = torch.zeros(len(self.samples.labels), dtype=torch.bool).share_memory_()  # shared by all workers

    def __len__(self) -> int:
        return len(self._corrupt)

    def read(self, index: int) -> Image.Image | None:
        """Read an image; None if it is unreadable, and a ``ValueError`` if too many are."""
        if self._corrupt[index]:
            return None
        try:
            return self.samples.read(index)
        except Exception as error:  # damaged bytes raise any exception in a decoder
            self._corrupt[index] = True
            unreadable = f"{self.samples.name(index)} ({error})"
        warnings.warn(f"unreadable image skipped: {unreadable}", stacklevel=2)
        bad = self.corrupt_indices
        check_share(len(bad), len(self), self.max_corrupt_share, [self.samples.name(i) for i in bad[:3]])
        if len(bad) == len(self):
            raise TooManyCorruptSamples(
                f"data.max_corrupt_share: none of {len(self)} images can be read; the last: {unreadable}"
            )
        return None

    @property
    def corrupt_indices(self) -> list[int]:
        """Indices of the unreadable images found so far."""
        return self._corrupt.nonzero().flatten().tolist()


@dataclass(eq=False, repr=False)
class TrainImages(Dataset):
    """Training images under keys ``(epoch, pass, index)``, with augmentation seeded by run seed and key only.

    An unreadable image is replaced by the next readable one, so that batches keep their size.
    """

    reader: ImageReader
    transform: ImageTransform
    seed: int
    """Seed of the run, >= 0."""

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


@dataclass(eq=False, repr=False)
class EvalImages(Dataset):
    """Evaluation images. An unreadable image is None and dropped by ``collate_readable``; so is the index N."""

    reader: ImageReader
    transform: ImageTransform
    keep_places: bool = False
    """Replace an unreadable image by a black one with label -100 instead (prediction, where the n-th output belongs to
    the n-th file)."""

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | None:
        image = self.reader.read(index) if index < len(self) else None
        if image is not None:
            return self.transform(image), int(self.reader.samples.labels[index])
        return (self.transform(Image.new("RGB", (32, 32))), UNREADABLE) if self.keep_places else None


def collate_readable(samples: list[tuple[torch.Tensor, int] | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Collate the samples that are not None, at least one, to a batch ``(image (B, 3, H, W), label (B,))``."""
    readable = [sample for sample in samples if sample is not None]
    if not readable:
        raise TooManyCorruptSamples(
            f"data.eval_batch_size: all {len(samples)} images of an evaluation batch are unreadable; "
            "remove them or increase the batch size"
        )
    return tuple(default_collate(readable))  # type: ignore[return-value]


def prediction_loader(
    paths: Any, image_data: Mapping[str, Any], batch_size: int = 32, num_workers: int = 0
) -> tuple[DataLoader, Samples]:
    """Create a loader of images, folders or tar files, in order, with the transform of ``ImageDataModule.image_data``.

    Returns:
        Loader, whose labels are -100 for unreadable images, and the images with their names.
    """
    try:
        look = Augmentation(interpolation=image_data["interpolation"], crop_pct=image_data["crop_pct"])
        size, mean, std = (image_data[name] for name in ("image_size", "mean", "std"))
        transform = eval_transform(look, size if isinstance(size, int) else tuple(size), tuple(mean), tuple(std))
        transform(Image.new("RGB", (8, 8)))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"ckpt_path: the image transform of the checkpoint is damaged: {error}") from None
    samples = find_images(paths, "images")
    images = EvalImages(ImageReader(samples, max_corrupt_share=1.0), transform, keep_places=True)
    return DataLoader(images, batch_size, num_workers=num_workers, collate_fn=collate_readable), samples


@dataclass(eq=False, repr=False)
class StreamImages(IterableDataset):
    """Images of a Hugging Face stream, sharded over ranks and workers.

    An unreadable training image is replaced by the next readable one; an unreadable evaluation image is skipped. The
    share of unreadable images is counted per worker, over the images it has read.
    """

    stream: Any
    """``datasets.IterableDataset`` with an undecoded image column (``{"bytes", "path"}``), or any iterable of rows."""
    columns: tuple[str, str]
    """Names of the image and label columns."""
    decode: Callable[[Any], Image.Image]
    """Decoder from a value of the image column to an RGB image."""
    transform: ImageTransform
    max_corrupt_share: float
    batch_size: int
    seed: int | None = None
    """Seed of the run, or None for evaluation (no augmentation, no replacement)."""
    rank: int = 0
    """Rank of this process among the data-parallel ones."""
    labeled: bool = True
    """Whether a sample without a label counts as unreadable."""
    epoch: int = 0
    skip_batches: int = 0
    """Number of batches per worker that are yielded empty, without decoding, since the loader discards them."""

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
                if self.labeled and label in (None, UNLABELED):
                    raise UserError("no label")
            except Exception as error:  # damaged bytes raise any exception in a decoder
                name = (value or {}).get("path") or f"sample {read} of the stream"
                warnings.warn(f"unreadable image skipped: {name} ({error})", stacklevel=2)
                corrupt.append(f"{name} ({error})")
                check_share(len(corrupt), read, self.max_corrupt_share, corrupt[:3])
                missing += 1
                continue
            if self.seed is None:
                yield self.transform(image), UNLABELED if label is None else label
                continue
            for _ in range(missing + 1):  # replaces the unreadable ones before it, with a new augmentation each time
                with seeded(self.seed, self.epoch, self.rank, worker_id, position):
                    yield_value = self.transform(image)
                position += 1
                yield yield_value, label
            missing = 0

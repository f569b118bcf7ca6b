"""Loading that can be resumed bit for bit: every random choice follows from (seed, epoch, sample), none from who loads
it or when.

Lightning's protocol for stateful loaders is ``state_dict`` / ``load_state_dict`` on the loader
(``lightning/pytorch/loops/fit_loop.py``). Three habits of Lightning shape this file: it creates the first iterator
before it tells the sampler the epoch (so iterators here start lazily), it restores the loader only where an epoch was
left unfinished (so the epoch is always read anew), and it fetches one batch ahead where the length is unknown (so a
state counts the batches trained on, not those handed out).
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, default_collate, get_worker_info

from lit_tokenformer.data.augmentation import ImageTransform
from lit_tokenformer.errors import UserError

UNREADABLE = -100
"""Label of an unreadable image that keeps its place in a batch (prediction only)."""

ALLOWED_CORRUPT = 3
"""So many unreadable images never stop a run, however few images there are (unless the allowed share is 0)."""


class Samples(Protocol):
    """Labelled images that can be read by index."""

    labels: np.ndarray  # (N,) int64

    def read(self, index: int) -> Image.Image:
        """The image, RGB. May raise whatever the decoder raises."""

    def name(self, index: int) -> str:
        """The file's path where there is one, else the index as text."""


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seeds the global CPU generators of Python, NumPy and torch from some integers, and puts them back afterwards.

    Args:
        entropy: Integers >= 0; the same ones give the same random numbers.
    """
    states = None
    if get_worker_info() is None:  # in a loader's worker nothing else draws, and this costs 0.2 ms
        states = random.getstate(), np.random.get_state(legacy=False), torch.default_generator.get_state()
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed would reach the accelerators too
    try:
        yield
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.default_generator.set_state(states[2])


class TooManyCorruptSamples(UserError):
    """More samples are unreadable than the setting ``data.max_corrupt_share`` allows."""


def check_share(corrupt: int, size: int, max_share: float, names: list[str], unit: str = "images") -> None:
    """Refuses too many unreadable samples.

    Args:
        corrupt: Unreadable samples.
        size: Samples they are a share of.
        max_share: The setting ``data.max_corrupt_share``.
        names: The first of them.
        unit: What the samples are.

    Raises:
        TooManyCorruptSamples: If they are more than that share, and more than ``ALLOWED_CORRUPT``.
    """
    allowed = max(ALLOWED_CORRUPT, max_share * size) if max_share > 0 else 0
    if corrupt > allowed:
        raise TooManyCorruptSamples(
            f"data.max_corrupt_share: {corrupt} of {size} {unit} cannot be read, a share of {max_share:g} is allowed; "
            f"the first: {', '.join(names)}"
        )


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


class EpochSampler(DistributedSampler):
    """Shuffled keys ``(epoch, pass, index)`` of this process's share of the samples; a pass can be entered in its
    middle.

    Being a ``DistributedSampler``, Lightning leaves it alone and tells it the epoch. Samples that do not fill all
    processes are left out of the epoch (others in each). ``pass`` counts the times the same epoch is gone through: a
    ``CombinedLoader`` begins a short loader again before the epoch is over, and its second pass differs from the first.

    Args:
        dataset: The samples.
        seed: The run's seed, >= 0.
        num_replicas: Processes that see different data.
        rank: This process among them.
    """

    def __init__(self, dataset: Dataset, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed, drop_last=True)
        self.repeat = 0
        self.start = 0

    def order(self, repeat: int) -> list[int]:
        """Indices of this process's samples in one pass of the epoch."""
        generator = torch.Generator()
        generator.manual_seed(int(np.random.SeedSequence((self.seed, self.epoch, repeat)).generate_state(1)[0]))
        order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
        return order[self.rank : self.total_size : self.num_replicas].tolist()

    def __iter__(self) -> Iterator[tuple[int, int, int]]:  # type: ignore[override]
        for index in self.order(self.repeat)[self.start :]:
            yield self.epoch, self.repeat, index


class FitProgress:
    """How far Lightning's fit loop is: the one place here that knows its counters.

    Args:
        trainer: The trainer whose fit loop takes the batches.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._loop: Any = trainer.fit_loop

    @property
    def epoch(self) -> int:
        """The zero-based epoch, as Lightning tells it to samplers."""
        return self._loop.epoch_progress.current.processed

    @property
    def batches_trained(self) -> int:
        """Batches trained on, over all epochs."""
        return self._loop.epoch_loop.batch_progress.total.processed


class CountingLoader(DataLoader):
    """A DataLoader that knows how many of the batches it handed out were trained on.

    Its constructor is the DataLoader's, so that Lightning can build it again with another sampler (overfit_batches).
    """

    progress: FitProgress | None = None
    """How far the fit is; None counts every batch as trained on once it is handed out."""

    _epoch: int | None = None
    _batches = 0  # handed out in this epoch
    _restored = False  # by load_state_dict, and not yet gone on from
    _origin = 0  # _batches - progress.batches_trained when nothing was on its way

    def _enter(self, epoch: int, batches: int) -> None:
        self._epoch, self._batches, self._restored = epoch, batches, False
        self._origin = batches - self.progress.batches_trained if self.progress is not None else 0

    def _batches_trained(self) -> int:
        if self.progress is None or self._restored:
            return self._batches
        return min(self._batches, self._origin + self.progress.batches_trained)

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the batches of it that were trained on."""
        return {"epoch": self._epoch or 0, "batches": self._batches_trained()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state at the next iteration, if Lightning's epoch is still the state's by then."""
        self._epoch, self._batches, self._restored = state_dict["epoch"], state_dict["batches"], True


class ResumableLoader(CountingLoader):
    """A loader over ``TrainImages`` and ``EpochSampler`` that goes on where its state says; nothing skipped is
    loaded."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Runs at the first batch, not at iter(): Lightning tells the sampler its epoch in between.
        epoch = getattr(self.sampler, "epoch", 0)
        if epoch != self._epoch:
            self._enter(epoch, 0)
        else:  # a restored position, the next pass of the same epoch, or a pass that was left early and begins again
            whole = 0 if self._restored else self._batches % len(self)
            if self._restored or whole:
                self._enter(epoch, self._batches - whole)
        repeat, start = divmod(self._batches, len(self))
        self.sampler.repeat, self.sampler.start = repeat, start * (self.batch_size or 1)  # type: ignore[attr-defined]
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the batches of it that were trained on, and how many samples all processes take at once."""
        return super().state_dict() | {"length": len(self), "global_batch_size": self._global_batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state at the next iteration, if Lightning's epoch is still the state's by then.

        The number of processes may be another one, if all of them together take as many samples at once. Between two
        epochs the batches may be of another size too.

        Raises:
            ValueError: If the state is of the middle of an epoch, and of batches of another size.
        """
        size = self._global_batch_size
        saved = state_dict.get("global_batch_size", size)
        passes, middle = divmod(state_dict["batches"], state_dict.get("length", len(self)))
        if saved != size and middle:
            raise UserError(
                f"data.batch_size: the checkpoint is of the middle of an epoch with batches of {saved} samples of all "
                f"processes, and can be gone on from with these only; got {size}"
            )
        super().load_state_dict(state_dict if middle else {**state_dict, "batches": passes * len(self)})

    @property
    def _global_batch_size(self) -> int:
        return (self.batch_size or 1) * getattr(self.sampler, "num_replicas", 1)

    def samples(self, batch: int) -> list[int]:
        """Indices of the samples in the n-th batch of the present epoch, counted over all its passes."""
        repeat, number = divmod(batch, len(self))
        size = self.batch_size or 1
        return self.sampler.order(repeat)[number * size :][:size]  # type: ignore[attr-defined]

"""Bitwise resumable data loading: every random choice is a function of (seed, epoch, sample).

Lightning's protocol for stateful loaders is ``state_dict`` / ``load_state_dict`` on the loader
(``lightning/pytorch/loops/fit_loop.py``). Three properties of Lightning shape this file:

- It creates the first iterator before it sets the sampler's epoch, so iterators here start lazily.
- It restores the loader only for an unfinished epoch, so the epoch is always read again.
- It prefetches one batch where the length is unknown, so a state counts batches trained on, not batches fetched.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from lit_tokenformer.data.settings import LoaderSettings, check_whole
from lit_tokenformer.errors import UserError


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed the global CPU generators of Python, NumPy and torch by integers >= 0, and restore them on exit."""
    states = None
    if get_worker_info() is None:  # a loader's worker has no other consumer, and this costs 0.2 ms
        states = random.getstate(), np.random.get_state(legacy=False), torch.default_generator.get_state()
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed would seed the accelerators too
    try:
        yield
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.default_generator.set_state(states[2])


class EpochSampler(DistributedSampler):
    """Distributed sampler of shuffled keys ``(epoch, pass, index)``, resumable in the middle of a pass.

    Lightning keeps a ``DistributedSampler`` and sets its epoch. Samples that do not fill all processes are dropped,
    different ones in each epoch. ``pass`` counts the iterations within an epoch: a ``CombinedLoader`` restarts a short
    loader before the epoch ends, with another order in each pass.
    """

    def __init__(self, dataset: Dataset, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed, drop_last=True)
        self.repeat = 0
        self.start = 0

    def order(self, repeat: int) -> list[int]:
        """Compute the indices of this process in one pass of the epoch."""
        generator = torch.Generator()
        generator.manual_seed(int(np.random.SeedSequence((self.seed, self.epoch, repeat)).generate_state(1)[0]))
        order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
        return order[self.rank : self.total_size : self.num_replicas].tolist()

    def __iter__(self) -> Iterator[tuple[int, int, int]]:  # type: ignore[override]
        for index in self.order(self.repeat)[self.start :]:
            yield self.epoch, self.repeat, index


class CountingLoader(DataLoader):
    """DataLoader that counts the yielded batches that were trained on.

    Its constructor is the DataLoader's, so that Lightning can rebuild it with another sampler (overfit_batches).
    """

    fit_loop: Any = None
    """Lightning's loop that consumes the batches; None counts every yielded batch as trained on."""

    _epoch: int | None = None
    _batches = 0  # yielded in this epoch
    _restored = False  # by load_state_dict, and not yet resumed from
    _origin = 0  # _batches - _total_trained when no batch was prefetched
    _loaded: dict[str, Any] = {}

    def _enter(self, epoch: int, batches: int) -> None:
        self._epoch, self._batches, self._restored = epoch, batches, False
        self._origin = batches - self._total_trained

    @property
    def _total_trained(self) -> int:
        """Number of batches trained on in all epochs of the fit."""
        return self.fit_loop.epoch_loop.batch_progress.total.processed if self.fit_loop is not None else 0

    def _batches_trained(self) -> int:
        if self.fit_loop is None or self._restored:
            return self._batches
        return min(self._batches, self._origin + self._total_trained)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and its number of batches trained on."""
        return {"epoch": self._epoch or 0, "batches": self._batches_trained()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a state at the next iteration, if that iteration is of the state's epoch."""
        self._loaded = state_dict
        self._epoch, self._batches, self._restored = state_dict["epoch"], state_dict["batches"], True


class ResumableLoader(CountingLoader):
    """Resumable loader over a map-style dataset and an ``EpochSampler``; skipped samples are not loaded."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Runs at the first batch, not at iter(): Lightning sets the sampler's epoch in between.
        epoch = getattr(self.sampler, "epoch", 0)
        if epoch != self._epoch:
            self._enter(epoch, 0)
        else:  # a restored position, the next pass of the same epoch, or a restart of an unfinished pass
            whole = 0 if self._restored else self._batches % len(self)
            if self._restored or whole:
                self._enter(epoch, self._batches - whole)
        repeat, start = divmod(self._batches, len(self))
        self.sampler.repeat, self.sampler.start = repeat, start * (self.batch_size or 1)  # type: ignore[attr-defined]
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, its number of batches trained on, and the global batch size."""
        return super().state_dict() | {"length": len(self), "global_batch_size": self._global_batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a state.

        The number of processes may differ if the global batch size is the same. Between two epochs the batch size may
        differ too.

        Raises:
            ValueError: If the state is in the middle of an epoch with another global batch size.
        """
        size = self._global_batch_size
        saved = state_dict.get("global_batch_size", size)
        passes, middle = divmod(state_dict["batches"], state_dict.get("length", len(self)))
        if saved != size and middle:
            raise UserError(
                "data.batch_size: the checkpoint is in the middle of an epoch and resumes with the same global batch "
                f"size only (got {size}, expected {saved} samples over all processes)"
            )
        super().load_state_dict(state_dict if middle else {**state_dict, "batches": passes * len(self)})

    @property
    def _global_batch_size(self) -> int:
        return (self.batch_size or 1) * getattr(self.sampler, "num_replicas", 1)

    def samples(self, batch: int) -> list[int]:
        """Return the sample indices of the n-th batch of the current epoch, counted over all its passes."""
        repeat, number = divmod(batch, len(self))
        size = self.batch_size or 1
        return self.sampler.order(repeat)[number * size :][:size]  # type: ignore[attr-defined]


class ResumableStreamLoader(CountingLoader):
    """Resumable loader over ``StreamImages``.

    Skipped samples are read, but neither decoded nor augmented. An exact resume requires the same number of workers
    and processes, which determine the assignment of shards. Without ``fit_loop`` every iteration is the next epoch.
    """

    rank, replicas = 0, 1
    made_with: dict[str, Any] = {}
    """Settings that the position depends on, by name."""

    _finished = False

    def set_place(self, rank: int, replicas: int, **settings: Any) -> None:
        """Set the data-parallel rank and world size, and the data settings that the position depends on."""
        self.rank, self.replicas = rank, replicas
        self.made_with = {
            "data.num_workers": self.num_workers,
            "trainer.devices (processes in all)": replicas,
            **{f"data.{name}": value for name, value in settings.items()},
        }

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.fit_loop is not None:
            epoch = self.fit_loop.epoch_progress.current.processed  # as Lightning passes it to samplers
        elif self._epoch is None or (self._restored and not self._finished):
            epoch = self._epoch or 0
        else:
            epoch = self._epoch + 1
        skip = 0
        if self._restored and epoch == self._epoch:
            epoch, skip = (epoch + 1, 0) if self._finished else (epoch, self._batches)
        self._enter(epoch, skip)
        self._finished = False
        for batch in self._read(epoch, skip):
            self._batches += 1
            yield batch
        self._finished = True

    def _read(self, epoch: int, skip: int) -> Iterator[Any]:
        """Yield the batches of an epoch after the first ``skip``."""
        stream: Any = self.dataset
        # Workers take turns, so the first skip // workers batches of each precede the position to resume from,
        # regardless of the shards' sizes.
        stream.epoch, stream.skip_batches = epoch, skip // max(1, self.num_workers)
        for number, batch in enumerate(super().__iter__()):
            if number >= skip:
                if not self._all_have_a_batch(True):
                    break
                yield batch
        else:
            self._all_have_a_batch(False)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, its number of batches trained on, whether it is finished, and ``made_with``."""
        state = super().state_dict()
        finished = self._finished and state["batches"] == self._batches
        return state | {"finished": finished, "made_with": self.made_with}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a state; raise a ``ValueError`` for one in the middle of an epoch with other settings."""
        if state_dict["batches"] and not state_dict["finished"]:
            made_with = state_dict.get("made_with", {})
            for name, value in self.made_with.items():
                if (saved := made_with.get(name, value)) != value:
                    raise UserError(
                        f"{name}: the stream position in the checkpoint depends on it (got {value}, expected {saved})"
                    )
        super().load_state_dict(state_dict)
        self._finished = state_dict["finished"]

    def _all_have_a_batch(self, here: bool) -> bool:
        """Return whether every process has a batch; the first exhausted one ends the epoch of all to avoid a hang."""
        if self.replicas == 1 or not dist.is_initialized():
            return here
        flag = torch.tensor([int(here)])
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self._processes)
        return bool(flag)

    @cached_property
    def _processes(self) -> Any:
        """Gloo group of all processes, so that no step waits for the accelerator."""
        return dist.new_group(backend="gloo")


_LOADER = LoaderSettings(batch_size=32)
LoaderT = TypeVar("LoaderT", bound=DataLoader)


class ResumableDataModule(LightningDataModule):
    """Data module with its training position in the checkpoint.

    ``seed`` is that of the sample order and augmentation, by default that of ``seed_everything``, else 0;
    ``num_workers`` is used if ``loader`` has none.
    """

    loader_defaults = _LOADER
    """Default of ``loader``, whose batch size is used if another ``loader`` has none."""

    def __init__(
        self, seed: int | None = None, num_workers: int | None = None, loader: LoaderSettings = _LOADER
    ) -> None:
        super().__init__()
        check_whole(seed=(seed, 0))
        self.seed = seed
        self.batch_size = loader.batch_size or self.loader_defaults.batch_size or 1
        self.eval_batch_size = loader.eval_batch_size or self.batch_size
        self.num_workers = num_workers if loader.num_workers is None else loader.num_workers
        self.pin_memory = torch.cuda.is_available() if loader.pin_memory is None else loader.pin_memory
        self._train_loader: ResumableLoader | ResumableStreamLoader | None = None
        self._resume_from: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_train_loader": None}  # a process with a copy creates its own loader

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the training loader.

        Lightning restores this before it creates loaders. The state of the loaders themselves is lost if a schedule
        has requested the number of steps before.
        """
        return self._train_loader.state_dict() if self._train_loader is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the state that the next training loader resumes from."""
        self._resume_from = state_dict
        if self._train_loader is not None and self.trainer is not None:
            self.trainer.fit_loop._combined_loader = None  # a strategy that restores late requests the loader again

    def _create_loader(self, kind: type[LoaderT], dataset: Dataset, **settings: Any) -> LoaderT:
        """Create a loader; by default with the training batch size and persistent worker processes."""
        settings = {"batch_size": self.batch_size, "num_workers": self._workers} | settings
        settings = {"persistent_workers": settings["num_workers"] > 0} | settings
        # with its own generator: a loader draws a seed for its workers
        return kind(dataset, pin_memory=self.pin_memory, generator=torch.Generator(), **settings)

    def _resumed(self, loader: ResumableLoader | ResumableStreamLoader) -> DataLoader:
        """Restore the checkpoint's position in the training loader and register it."""
        loader.fit_loop = self.trainer.fit_loop if self.trainer is not None else None
        if self._resume_from:
            loader.load_state_dict(self._resume_from)
            self._resume_from = {}
        self._train_loader = loader
        return loader

    def train_samples(self, batch: int) -> list[int] | None:
        """Return the sample indices of the n-th training batch (from 0) of the current epoch; None for a stream."""
        loader = self._train_loader
        return loader.samples(batch) if isinstance(loader, ResumableLoader) else None

    def _check_batch_size(self, count: int, examples: str, cure: str = "") -> None:
        if count < self.batch_size:
            most = f"expected at most {count} (the training {examples} of a process)"
            raise UserError(f"data.batch_size: {most}, got {self.batch_size}{cure}")

    @property
    def data_settings(self) -> dict[str, Any]:
        """Settings that determine the samples of a fit and their order, as plain values by name."""
        return {"batch_size": self.batch_size, "seed": self._seed}

    @property
    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    @property
    def _place(self) -> tuple[int, int]:
        """Data-parallel rank and world size."""
        place = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (place["rank"], place["num_replicas"]) if place else (0, 1)

    _needs_workers = True

    @property
    def _workers(self) -> int:
        """Setting, else the available cores per training process, at most 8, and 0 for a single core."""
        if self.num_workers is not None or not self._needs_workers:
            return self.num_workers or 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = cores // (self.trainer.num_devices if self.trainer is not None else 1)
        return 0 if share < 2 else min(share, 8)


def no_test_split() -> UserError:
    """Build the error for data without a test split, whose scores would be those of the validation split."""
    return UserError("test: the data have no test split, and its scores would equal those of `validate`; use that")

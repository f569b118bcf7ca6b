"""Loading that can be resumed bit for bit: every random choice follows from (seed, epoch, sample), none from who loads
it or when.

Lightning's protocol for stateful loaders is ``state_dict`` / ``load_state_dict`` on the loader
(``lightning/pytorch/loops/fit_loop.py``). Three habits of Lightning shape this file: it creates the first iterator
before it tells the sampler the epoch (so iterators here start lazily), it restores the loader only where an epoch was
left unfinished (so the epoch is always read anew), and it fetches one batch ahead where the length is unknown (so a
state counts the batches trained on, not those handed out).
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from lit_tokenformer.errors import UserError


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


class ResumableStreamLoader(CountingLoader):
    """A loader over ``StreamImages`` that goes on where its state says.

    Skipped samples are read, but neither decoded nor augmented. An exact resume needs the number of workers and of
    processes the state was saved with: they decide who reads which shard. Without ``progress`` every iteration is the
    next epoch.
    """

    rank = 0
    """This process among those that see different data."""
    replicas = 1
    """Their number."""
    made_with: dict[str, Any] = {}
    """The settings a place depends on, by name."""

    _finished = False
    _group: Any = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.progress is not None:
            epoch = self.progress.epoch
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
        """The batches of an epoch that come after the first ``skip``."""
        stream: Any = self.dataset
        # Workers take turns, so the first skip // workers batches of each lie before the point to go on from, whatever
        # the shards' sizes.
        stream.epoch, stream.skip_batches = epoch, skip // max(1, self.num_workers)
        for number, batch in enumerate(super().__iter__()):
            if number >= skip:
                if not self._all_have_a_batch(True):
                    break
                yield batch
        else:
            self._all_have_a_batch(False)

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the batches of it that were trained on, whether the epoch is over, and what the place depends
        on."""
        state = super().state_dict()
        finished = self._finished and state["batches"] == self._batches
        return state | {"finished": finished, "made_with": self.made_with}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state at the next iteration, if Lightning's epoch is still the state's by then.

        Raises:
            ValueError: If the state is of the middle of an epoch, and was saved with other settings.
        """
        if state_dict["batches"] and not state_dict["finished"]:
            made_with = state_dict.get("made_with", {})
            for name, value in self.made_with.items():
                if (saved := made_with.get(name, value)) != value:
                    raise UserError(
                        f"{name}: the stream's place was saved with {saved}, and can be found with it only; got {value}"
                    )
        super().load_state_dict(state_dict)
        self._finished = state_dict["finished"]

    def _all_have_a_batch(self, here: bool) -> bool:
        """A process whose shards are at their end ends the epoch of all, or the others would wait for it forever."""
        if self.replicas == 1 or not dist.is_initialized():
            return here
        flag = torch.tensor([int(here)])
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self._processes())
        return bool(flag)

    def _processes(self) -> Any:
        """All processes, connected on the CPU: no step waits for the accelerator because of this."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        return self._group


class ResumableDataModule(LightningDataModule):
    """A data module whose training loader is part of the checkpoint.

    Args:
        seed: Seed of order and augmentation, 0 or more. None: that of ``seed_everything``, else 0.
        num_workers: Loading processes for each training process.
    """

    batch_size: int

    def __init__(self, seed: int | None, num_workers: int | None) -> None:
        super().__init__()
        self.seed = seed
        self.num_workers = num_workers
        self._train_loader: ResumableLoader | ResumableStreamLoader | None = None
        self._resume_from: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_train_loader": None}  # a process that gets a copy makes a loader of its own

    def state_dict(self) -> dict[str, Any]:
        """Where the training loader stands. Lightning restores this before it asks for loaders; what it restores of the
        loaders themselves is lost where a schedule has asked for the number of steps before."""
        return self._train_loader.state_dict() if self._train_loader is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lets the next training loader go on where another one stood."""
        self._resume_from = state_dict
        if self._train_loader is not None and self.trainer is not None:
            self.trainer.fit_loop._combined_loader = None  # of a strategy that restores late: it is asked for again

    def _resumed(self, loader: ResumableLoader | ResumableStreamLoader) -> ResumableLoader | ResumableStreamLoader:
        """The training loader, which goes on where the checkpoint's stood."""
        loader.progress = FitProgress(self.trainer) if self.trainer is not None else None
        if self._resume_from:
            loader.load_state_dict(self._resume_from)
            self._resume_from = {}
        self._train_loader = loader
        return loader

    def train_samples(self, batch: int) -> list[int] | None:
        """Indices of the samples in the n-th training batch of the present epoch; None where they have none (a stream).

        Args:
            batch: The number of the batch in its epoch, from zero.
        """
        loader = self._train_loader
        return loader.samples(batch) if isinstance(loader, ResumableLoader) else None

    @property
    def data_settings(self) -> dict[str, Any]:
        """Settings that decide which samples a fit sees and in what order, as plain values by name."""
        return {"batch_size": self.batch_size, "seed": self._seed}

    @property
    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    @property
    def _place(self) -> tuple[int, int]:
        """This process among those that see different data, and their number."""
        place = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (place["rank"], place["num_replicas"]) if place else (0, 1)

    @property
    def _spare_workers(self) -> int:
        """Loading processes that this machine has cores for: none where there is but one for each training process."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = cores // (self.trainer.num_devices if self.trainer is not None else 1)
        return 0 if share < 2 else min(share, 8)


def no_test_split() -> UserError:
    """Build the error for data without a test split, whose scores would be those of the validation split."""
    return UserError("test: the data have no test split, so scores would be those of `validate`; use that")

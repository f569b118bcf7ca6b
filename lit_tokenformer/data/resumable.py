"""What the data modules share: their place among processes, and a training loader that goes on where it stood."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import LightningDataModule

from lit_tokenformer.data.loading import FitProgress, ResumableLoader
from lit_tokenformer.data.stream_loading import ResumableStreamLoader
from lit_tokenformer.errors import UserError


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

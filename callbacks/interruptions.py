"""Checkpoint of a fit that a signal interrupts."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

NOTHING, STOP, REQUEUE = 0, 1, 2
"""What a signal asked for; more counts."""


class PreemptionCheckpoint(Callback):
    """Saves a checkpoint and ends the fit when the process gets SIGTERM or SIGUSR1.

    The optimizer step under way is finished first, in all processes, so a fit goes on from the checkpoint bit for bit;
    a validation under way is begun anew (where its length is not known, as of a stream, it is finished first). The
    checkpoint replaces ``last.ckpt`` in the folder of the checkpoints, where ``--ckpt_path last`` finds it. Under
    SLURM, the signal that asks for a requeue writes ``hpc_ckpt_N.ckpt`` and requeues the job, as Lightning does;
    Lightning alone would do so in the middle of a step.

    The fit ends with ``SIGTERMException``.

    Note:
        Put it behind :class:`~callbacks.GrowingEMA`, which takes the average out of the model first if a validation is
        interrupted. The command line adds it to every fit.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PreemptionCheckpoint()], logger=False)
    """

    def __init__(self) -> None:
        self._asked = NOTHING
        self._requeue_signal: signal.Signals | None = None
        self._folder = Path()
        self._shared_batches = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._asked = NOTHING
            self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"  # asks all processes

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._agree(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _validates_in_fit(trainer):
            return
        fetcher: Any = trainer.fit_loop.epoch_loop.val_loop._data_fetcher
        known = all(sized_len(loader) is not None for loader in fetcher.combined_loader.flattened)
        batches = torch.tensor(fetcher.length if known else 0, device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            batches = trainer.strategy.reduce(batches, reduce_op="min")
        self._shared_batches = int(batches)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # In its last batch a process does not leave the validation, so nothing is asked where one may be at it.
        done = trainer.fit_loop.epoch_loop.val_loop.batch_progress.current.ready
        if _validates_in_fit(trainer) and done < self._shared_batches:
            self._agree(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _validates_in_fit(trainer):
            self._agree(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, SIGTERMException) or trainer.sanity_checking:
            return
        if trainer.validating:  # it is begun anew, or the scores of its first batches would be missing
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset_on_run()
            progress.increment_ready()
            progress.increment_started()
        if self._asked == REQUEUE:
            trainer._signal_connector._slurm_sigusr_handler_fn(self._requeue_signal, None)  # type: ignore[arg-type]
            return
        folders = [one.dirpath for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        path = Path(folders[0] if folders and folders[0] else self._folder) / "last.ckpt"
        trainer.save_checkpoint(path)
        unsaved = getattr(trainer.strategy.checkpoint_io, "unsaved", None)
        result = f"saved {path}" if unsaved is None else "nothing was saved"
        rank_zero_info(f"Interrupted at epoch {trainer.current_epoch}, step {trainer.global_step}: {result}")

    def _listen(self, trainer: Trainer) -> None:
        """Takes the signals over from Lightning, which acts on them in the midst of a step, and in one process only.

        Lightning puts back what was there before the fit.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        environment = trainer._accelerator_connector.cluster_environment
        numbers = {signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)}
        self._requeue_signal = None
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            self._requeue_signal = environment.requeue_signal
            numbers.add(environment.requeue_signal)
        for number in numbers:
            now = signal.getsignal(number)
            if number == signal.SIGTERM or now == signal.SIG_DFL or isinstance(now, _HandlersCompose):  # none of a user
                signal.signal(number, self._take)

    def _take(self, number: int, _: Any) -> None:
        self._asked = max(self._asked, REQUEUE if number == self._requeue_signal else STOP)

    def _agree(self, trainer: Trainer) -> None:
        """Lets every process end at this batch if one of them got a signal, but not with a gradient pending."""
        if trainer.fit_loop._should_accumulate():
            return
        if trainer.world_size > 1:
            asked = torch.tensor(self._asked, device=trainer.strategy.root_device)
            self._asked = int(trainer.strategy.reduce(asked, reduce_op="max"))
        if self._asked:
            trainer._signal_connector.received_sigterm = True  # the loops end with a SIGTERMException


def _validates_in_fit(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

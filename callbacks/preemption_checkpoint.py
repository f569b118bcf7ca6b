"""Checkpoints for exact resume: at the end of a fit and after a signal, never of a non-finite state."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_tokenformer.checkpoints.checkpoint_io import WholeCheckpointIO
from lit_tokenformer.distributed import GrowingModelParallelStrategy
from lit_tokenformer.distributed.checkpoint import NON_FINITE
from lit_tokenformer.growth.shards import like, local

NOTHING, STOP, REQUEUE = 0, 1, 2
"""Requests of a signal; the highest one wins."""

_OF_TERMINALS = {getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)}
_OF_SCHEDULERS = {getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)}
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)

_PENDING = "pending_gradients"
"""Checkpoint key: gradients of an incomplete optimizer step, for each process."""


class PreemptionCheckpoint(Callback):
    """Save ``last.ckpt`` at the normal end of a fit and after SIGTERM, SIGINT (Ctrl-C), SIGHUP or SIGUSR1.

    After a signal, all processes first finish the current optimizer step, so resuming from the checkpoint is bit-exact.
    An interrupted validation is repeated. A validation of unknown length, such as one over a stream, is finished first.
    A second Ctrl-C ends the process immediately. The checkpoint replaces ``last.ckpt`` in the checkpoint folder, where
    ``--ckpt_path last`` finds it. Under SLURM, the requeue signal writes ``hpc_ckpt_N.ckpt`` and requeues the job, as
    in Lightning but between optimizer steps. The fit ends with ``SIGTERMException``. Nothing is saved under
    ``fast_dev_run``, or at the normal end with ``enable_checkpointing: false``.

    With ``accumulate_grad_batches``, a checkpoint saved between two micro-batches of an optimizer step contains the
    accumulated gradients (the size of the trainable parameters per process), so any checkpoint resumes exactly.

    A checkpoint is skipped while a weight or an optimizer state is NaN or infinite: a warning names the parameter, and
    earlier checkpoints are kept. The check is one pass over weights and optimizer state, without a copy. With a
    ``CheckpointIO`` other than ``WholeCheckpointIO``, or a strategy that writes its own checkpoints (FSDP1, DeepSpeed),
    the fit ends with ``FloatingPointError``. Checkpoints saved with ``save_weights_only`` are not checked, because
    Lightning calls no callback for them.

    Attributes:
        status: Exit status of a command that ends by the signal: 130 after Ctrl-C, 129 after SIGHUP, otherwise 143.

    Note:
        Place this callback after :class:`~callbacks.GrowingEMA`, which swaps the average out of the model first if a
        validation is interrupted, and after ``GradientAccumulationScheduler``. The command line adds it to every fit.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PreemptionCheckpoint()], logger=False)
    """

    def __init__(self) -> None:
        self.status = 128 + signal.SIGTERM
        self._asked = NOTHING
        self._requeue_signal: signal.Signals | None = None
        self._folder = ""
        self._shared_batches = 0
        self._group: Any = None
        self._gradients: list[dict[str, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._asked, self._gradients, self._group = NOTHING, [], None
            root = trainer.log_dir or trainer.default_root_dir  # collective
            self._folder = os.path.join(root, "checkpoints")
            _warn_if_only_best(trainer)
            for callback in _saving(trainer) if trainer.fast_dev_run else ():  # type: ignore[attr-defined]
                callback.save_last = False  # the only checkpoint that Lightning saves then

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._connect(trainer)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):  # not called when a fit resumes within an epoch
                callback.on_train_epoch_start(trainer)
        if self._gradients:
            _restore(self._gradients, trainer, pl_module)
            self._gradients = []

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
        # A process cannot leave validation in its last batch, so skip the collective where one may be at it.
        done = trainer.fit_loop.epoch_loop.val_loop.batch_progress.current.ready
        if _validates_in_fit(trainer) and done < self._shared_batches:
            self._agree(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _validates_in_fit(trainer):
            self._agree(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.checkpoint_callbacks:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, SIGTERMException) or trainer.sanity_checking:
            return
        if trainer.validating:  # restart it, otherwise the scores of its first batches would be missing
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset_on_run()
            progress.increment_ready()
            progress.increment_started()
        if self._asked == REQUEUE:
            trainer._signal_connector._slurm_sigusr_handler_fn(self._requeue_signal, None)  # type: ignore[arg-type]
            return
        path = self._save(trainer)
        result = f"saved {path}" if path else "no checkpoint saved"
        rank_zero_info(f"Interrupted at epoch {trainer.current_epoch}, step {trainer.global_step}: {result}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        name = _non_finite(trainer)
        if not trainer.strategy.reduce_boolean_decision(name is None):
            checkpoint[NON_FINITE] = name or "weights"  # non-finite in another process
            if not _rejects_non_finite(trainer.strategy):
                raise FloatingPointError(f"non-finite {checkpoint[NON_FINITE]} at step {trainer.global_step}")
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if trainer.fit_loop._should_accumulate():
            checkpoint[_PENDING] = _gradients(trainer, pl_module)
        # Lightning counts the last epoch of a fit as complete, even if max_steps or early stopping cut it short
        within = not trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        for counts in progress.values():
            before = max(0, counts["ready"] - 1)
            counts["completed"] = min(counts["completed"], before)  # as in a checkpoint at the end of any epoch
            counts["processed"] = min(counts["processed"], before) if within else counts["processed"]
        checkpoint["epoch"] = progress["current"]["completed"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._gradients = checkpoint.pop(_PENDING, [])

    def _save(self, trainer: Trainer) -> str | None:
        """Save the current state as ``last.ckpt``; return its path, or ``None`` if it was not saved."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        saving = _saving(trainer)
        folder = next((str(one.dirpath) for one in saving if one.dirpath), self._folder)
        last = [one for one in saving if one.save_last]
        path = next((one.last_model_path for one in last if one.last_model_path), os.path.join(folder, "last.ckpt"))
        for callback in last:  # otherwise it would write a second one
            callback.last_model_path = path
        trainer.save_checkpoint(path, weights_only=False)
        return None if getattr(trainer.strategy.checkpoint_io, "unsaved", None) else path

    def _connect(self, trainer: Trainer) -> None:
        """Create a CPU process group for signals: a collective on the device would wait for its queue at each step."""
        if self._group is None and trainer.world_size > 1 and torch.distributed.get_backend() != "gloo":
            self._group = torch.distributed.new_group(backend="gloo")

    def _listen(self, trainer: Trainer) -> None:
        """Replace Lightning's signal handlers, which act within a step and in one process only.

        Lightning restores the handlers from before the fit.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        environment = trainer._accelerator_connector.cluster_environment
        numbers = _OF_TERMINALS | _OF_SCHEDULERS
        self._requeue_signal = None
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            self._requeue_signal = environment.requeue_signal
            numbers.add(environment.requeue_signal)
        for number in numbers:
            now = signal.getsignal(number)
            # keep handlers of the user and ignored signals, as under nohup
            if number == signal.SIGTERM or now in _DEFAULTS or isinstance(now, _HandlersCompose):
                signal.signal(number, self._take)

    def _take(self, number: int, _: Any) -> None:
        if number in _OF_TERMINALS:
            self.status = 128 + number
        self._asked = max(self._asked, REQUEUE if number == self._requeue_signal else STOP)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one ends the process unconditionally

    def _agree(self, trainer: Trainer) -> None:
        """Stop all processes at this batch if one of them received a signal, unless a gradient is pending."""
        if trainer.fit_loop._should_accumulate():
            return
        if trainer.world_size > 1:
            asked = torch.tensor(self._asked)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, self._group)
            self._asked = int(asked)
        if self._asked:
            trainer._signal_connector.received_sigterm = True  # the loops end with a SIGTERMException


def _saving(trainer: Trainer) -> list[ModelCheckpoint]:
    return [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]


def _rejects_non_finite(strategy: Strategy) -> bool:
    """Return whether the writer of a checkpoint checks the key ``NON_FINITE``."""
    by_io = type(strategy).save_checkpoint is Strategy.save_checkpoint
    growing = isinstance(strategy, GrowingModelParallelStrategy)
    return (by_io or growing) and isinstance(strategy.checkpoint_io, WholeCheckpointIO)


@torch.no_grad()
def _non_finite(trainer: Trainer) -> str | None:
    """Find the first parameter with a non-finite value, moving average or optimizer state.

    Buffers may be infinite. The host synchronizes with the device once, unless a non-finite value is found.
    """
    averages = [one._average_model for one in trainer.callbacks if isinstance(one, WeightAveraging)]  # type: ignore
    states = {parameter: state for one in trainer.optimizers for parameter, state in one.state.items()}
    found: dict[str, Tensor] = {}
    for module in (trainer.lightning_module, *averages):
        for name, parameter in module.named_parameters() if module is not None else ():
            tensors = [parameter, *states.get(parameter, {}).values()]
            numbers = [local(one) for one in tensors if isinstance(one, Tensor)]
            found[name] = torch.stack([one.isfinite().all().to(parameter.device) for one in numbers]).all()
    if not found or torch.stack([*found.values()]).all():
        return None
    return next(name for name, finite in found.items() if not finite)


def _validates_in_fit(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _warn_if_only_best(trainer: Trainer) -> None:
    """Warn if every ``ModelCheckpoint`` saves improved scores only, which then applies to ``save_last`` too."""
    saving = _saving(trainer)
    if not trainer.fast_dev_run and saving and all(one.monitor and one.save_top_k != -1 for one in saving):  # type: ignore[attr-defined]
        rank_zero_warn(
            f"trainer.callbacks: checkpoints are saved only when {saving[0].monitor!r} improves (save_last too); to "
            "resume from the newest state after SIGKILL or a power failure, add a ModelCheckpoint with filename: last, "
            "enable_version_counter: false and no monitor"
        )


def _pending(module: Any) -> dict[str, Tensor | None]:
    """Collect gradients by parameter name, and other task state of an incomplete optimizer step."""
    own = {name: parameter.grad for name, parameter in module.named_parameters()}
    return own | (module.pending_state() if hasattr(module, "pending_state") else {})


def _gradients(trainer: Trainer, module: LightningModule) -> list[dict[str, Tensor]]:
    """Gather the pending state of each process by name on rank 0, one tensor at a time."""
    found: list[dict[str, Tensor]] = [{} for _ in range(trainer.world_size)]
    for name, tensor in _pending(module).items():
        own = None if tensor is None else local(tensor).to("cpu", copy=True)
        everyone: list[Tensor | None] = [own]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            torch.distributed.gather_object(own, everyone if trainer.is_global_zero else None)
        for gradients, gradient in zip(found, everyone, strict=True):
            if gradient is not None:
                gradients[name] = gradient
    return found


def _restore(gradients: list[dict[str, Tensor]], trainer: Trainer, module: LightningModule) -> None:
    """Restore pending gradients, or drop them if the number of processes or the sizes changed."""
    parameters, known = dict(module.named_parameters()), _pending(module)
    own = gradients[trainer.global_rank] if len(gradients) == trainer.world_size else {"": torch.empty(0)}

    def fits(name: str, tensor: Tensor) -> bool:
        parameter = parameters.get(name.rpartition(".gradients.")[2])  # also for a task's own gradients
        return name in known and (parameter is None or tensor.shape == local(parameter).shape)

    if not all(fits(name, tensor) for name, tensor in own.items()):
        rank_zero_warn(
            "ckpt_path: dropping the accumulated gradients: the checkpoint was saved within an optimizer step, with a "
            "different number of processes or other sizes"
        )
        return
    for name in own.keys() & parameters.keys():
        parameters[name].grad = like(parameters[name].detach(), own[name].to(parameters[name].device))
    if others := {name: tensor for name, tensor in own.items() if name not in parameters}:
        module.load_pending_state(others)  # type: ignore[operator]

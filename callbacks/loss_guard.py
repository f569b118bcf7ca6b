"""Guard against non-finite losses and gradients: stop the fit and report the batch, or roll back and skip it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from callbacks.parameter_growth import ParameterGrowthCallback
from callbacks.training_monitor import norms_by_age, rows_by_age
from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.growth.shards import gather, is_elsewhere, local, num_owners, sum_over_model

_SHARDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
_SHOWN = 64
"""Maximum number of reported samples per batch."""

_MOST_PENDING = 50
"""Maximum number of steps whose verdicts the host has not read."""


class NonFiniteLoss(RuntimeError):
    """Error for a batch whose loss or gradient is NaN or infinite."""


class LossGuard(Callback):
    """Detect a NaN or infinite loss or gradient before the optimizer applies it.

    All processes decide together, even if only one is affected. The report contains epoch, step, the batch and its
    samples (their indices, if the data module has ``train_samples(batch)``), and the norms of weights and gradients of
    three groups: parameter tokens appended by the latest growth, all other tokens, and all other parameters.

    Args:
        action: ``stop`` ends the fit with an error; earlier checkpoints remain intact. ``rollback`` restores weights,
            their moving average and optimizer state from a step with a finite loss, and continues with the next batch.
            The learning-rate schedule is not rolled back.
        every_n_steps: Optimizer steps between copies of that state, with ``rollback``; they are kept in CPU memory.
        max_rollbacks: Maximum number of rollbacks before the fit stops.

    Raises:
        ValueError: For settings out of range, and when a fit starts, for ``rollback`` under a strategy that shards the
            model.
        NonFiniteLoss: During a fit, depending on ``action``.

    Note:
        Under DDP the check costs one all-reduce of a scalar per optimizer step. On a GPU the host never waits for it
        in an ordinary step: from a non-finite step on, all gradients are zeroed on the device, and the fit stops or
        rolls back at the next log step or 50 steps later, whichever comes first, and before a validation, the end of an
        epoch, a copy for ``rollback`` or, with ``stop``, a checkpoint. A fused torch optimizer (``fused: true``) of
        unsharded parameters skips these steps on the device. Any other optimizer applies zero gradients, so momentum
        and weight decay still change the weights; ``rollback`` undoes that, and ``stop`` saves no checkpoint after it.
        Gradient overflows under a loss scale (16-bit precision) are left to the scaler.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LossGuard(action="rollback", every_n_steps=50)], logger=False)
    """

    def __init__(self, action: str = "stop", every_n_steps: int = 100, max_rollbacks: int = 3) -> None:
        if action not in ("stop", "rollback"):
            raise unknown_name("action", action, ("stop", "rollback"))
        for setting, value in (("every_n_steps", every_n_steps), ("max_rollbacks", max_rollbacks)):
            if value < 1:
                raise UserError(f"{setting}: expected at least 1, got {value}")
        self.action = action
        self.every_n_steps = every_n_steps
        self.max_rollbacks = max_rollbacks
        self.rollbacks = 0
        """Number of rollbacks so far."""
        self._batch = 0
        self._losses: list[tuple[int, Tensor]] = []
        self._pending: list[_Step] = []
        self._kept: _State | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"rollbacks": self.rollbacks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rollbacks = state_dict["rollbacks"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.action == "rollback" and isinstance(trainer.strategy, _SHARDING):
            strategy = type(trainer.strategy).__name__
            raise UserError(f"action: rollback needs an unsharded model in each process (got {strategy}); use stop")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses, self._pending, self._kept = [], [], None

    def on_parameter_growth(self, trainer: Trainer, pl_module: LightningModule, event: dict[str, Any]) -> None:
        """Drop the state from before a growth, whose shapes no longer fit.

        Args:
            trainer: The trainer.
            pl_module: The grown model.
            event: The growth.
        """
        self._kept = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch_idx

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append((self._batch, loss.detach()))
        if self.action == "rollback" and self._kept is None:
            self._kept = _State(trainer, pl_module)  # initially and after a growth, no state is verified yet

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        losses, self._losses = self._losses, []
        copies = self._kept is not None and trainer.global_step - self._kept.step >= self.every_n_steps
        if (copies or len(self._pending) >= _MOST_PENDING) and self._settle(trainer, pl_module):  # the steps before
            optimizer.zero_grad(set_to_none=True)  # stale gradients; the optimizer skips parameters without one
            return
        gradients = _gradients(trainer, optimizer)
        wrong = _in_any_process(trainer, _non_finite([loss for _, loss in losses], gradients, pl_module.device))
        lags = _lags(wrong)
        if lags:
            wrong = wrong if not self._pending else wrong | self._pending[-1].wrong  # the steps after a wrong one, too
            for gradient in gradients:
                gradient.masked_fill_(wrong, 0)
            if gradients and _skips_on_device(optimizer):
                optimizer.found_inf = wrong.float()
        self._pending.append(_Step(wrong, losses, trainer.current_epoch, trainer.global_step, lags))
        if not lags and self._settle(trainer, pl_module):
            optimizer.zero_grad(set_to_none=True)
        elif copies:
            self._kept = _State(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # the host waits for the device there anyway; a pending gradient would not fit the state of a rollback
        if trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate():
            self._settle(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.fit_loop._should_accumulate():
            self._settle(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer, pl_module)  # while the samples of its batches are known

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.action == "stop":  # a rollback waits for the next step: the checkpoint already holds its tensors
            self._settle(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release(trainer)
        self._settle(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release(trainer)
        self._pending = []

    def _release(self, trainer: Trainer) -> None:
        for optimizer in trainer.optimizers:
            vars(optimizer).pop("found_inf", None)

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Act on the pending verdicts, of which the first non-finite one counts; the host waits for the device.

        Returns:
            Whether the fit rolled back.

        Raises:
            NonFiniteLoss: If the step is non-finite and the fit does not roll back.
        """
        steps, self._pending = self._pending, []
        verdicts = torch.stack([step.wrong for step in steps]).tolist() if steps else []
        if True not in verdicts:
            return False
        found = _describe(trainer, pl_module, steps[verdicts.index(True)])
        if self.action == "stop" or self._kept is None or self.rollbacks >= self.max_rollbacks:
            spent = f"; stopped after {self.rollbacks} rollbacks" if self.rollbacks else ""
            raise NonFiniteLoss(f"{found}; gradient not applied{spent}")
        self.rollbacks += 1
        self._kept.restore(trainer)
        rank_zero_warn(
            f"{found}; rolled back to step {self._kept.step}, skipping these batches "
            f"(rollback {self.rollbacks} of {self.max_rollbacks})"
        )
        return True


class _Step(NamedTuple):
    """Optimizer step with its pending verdict.

    Args:
        wrong: Whether a loss or gradient of this step or of a pending one before is non-finite, () bool on the device.
        losses: Batch indices of the step, each with its loss.
        epoch: Its epoch.
        step: Its global step.
        lags: Whether the gradients already belong to a later step when the verdict is read.
    """

    wrong: Tensor
    losses: list[tuple[int, Tensor]]
    epoch: int
    step: int
    lags: bool


def _lags(verdict: Tensor) -> bool:
    """Return whether the host reads the verdict later, while the device continues."""
    return verdict.device.type != "cpu"


def _skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer skips a step if its attribute ``found_inf`` is 1, as set by loss scalers."""
    groups = optimizer.param_groups
    return all(one.get("fused") and not any(isinstance(p, DTensor) for p in one["params"]) for one in groups)


def _gradients(trainer: Any, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Collect the local shards of an optimizer's gradients; none if a loss scaler checks them."""
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return []
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    return [one._values() if one.is_sparse else one for one in found if one.numel()]


def _non_finite(losses: list[Tensor], gradients: list[Tensor], device: torch.device) -> Tensor:
    """Return whether any loss or gradient is non-finite, () bool on the device."""
    seen = [torch.zeros((), device=device), *losses]  # no loss if training_step returns None
    if gradients:
        seen.append(_norm(gradients))
    return ~torch.stack([one.to(device, torch.float32) for one in seen]).isfinite().all()


def _norm(gradients: list[Tensor]) -> Tensor:
    """Compute a norm that is finite if and only if all gradients are: maximum norm, or the faster L2 norm on CPU."""
    if not _lags(gradients[0]):
        norm = torch.nn.utils.get_total_norm(gradients)
        if norm.isfinite():
            return norm  # otherwise its squares may have overflowed
    return torch.nn.utils.get_total_norm(gradients, math.inf)


def _in_any_process(trainer: Trainer, wrong: Tensor) -> Tensor:
    """Reduce to true if any process is true, () bool on the device; unlike a strategy's ``reduce``, without a sync."""
    found = wrong.float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    else:
        found = trainer.strategy.reduce(found, reduce_op="max")  # type: ignore[assignment]
    return found > 0


class _State:
    """CPU copy of weights and buffers of a model and its moving averages, and of the optimizer state.

    Args:
        trainer: The trainer.
        pl_module: The model.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        averages = [one._average_model for one in trainer.callbacks if isinstance(one, WeightAveraging)]  # type: ignore
        modules = [pl_module, *(average for average in averages if average is not None)]
        self.step = trainer.global_step
        self._tensors = [
            (tensor, tensor.detach().to("cpu", copy=True))
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
        ]
        self._optimizers = [
            {parameter: {name: _copy(value) for name, value in state.items()} for parameter, state in one.state.items()}
            for one in trainer.optimizers
        ]

    @torch.no_grad()
    def restore(self, trainer: Trainer) -> None:
        """Restore the copied state.

        Args:
            trainer: The trainer.
        """
        for tensor, kept in self._tensors:
            tensor.copy_(kept)
        for optimizer, states in zip(trainer.optimizers, self._optimizers, strict=True):
            optimizer.state.clear()
            for parameter, state in states.items():
                optimizer.state[parameter] = {
                    name: value[0].to(value[1], copy=True) if isinstance(value, tuple) else value
                    for name, value in state.items()
                }


def _copy(value: Any) -> Any:
    """Copy a tensor to the CPU, paired with its device; return any other value unchanged."""
    return (value.detach().to("cpu", copy=True), value.device) if isinstance(value, Tensor) else value


def _describe(trainer: Trainer, pl_module: LightningModule, step: _Step) -> str:
    """Describe a non-finite step in one line, identical in every process."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    known = hasattr(datamodule, "train_samples") and not getattr(trainer, "overfit_batches", 0)
    own = [
        (
            bool(loss.isfinite()),
            f"process {trainer.global_rank}: loss {float(loss)} in batch {batch}"
            + (_samples(datamodule.train_samples(batch)) if known else ""),
        )
        for batch, loss in step.losses
    ]
    everyone: list[list[tuple[bool, str]]] = [own]
    if trainer.world_size > 1:
        everyone = [[] for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(everyone, own)
    batches = [one for process in everyone for one in process]
    wrong = [line for finite, line in batches if not finite]
    what, lines = ("loss", wrong) if wrong else ("gradient", [line for _, line in batches])
    kinds = ("weights",) if step.lags else ("weights", "gradients")
    norms = ", ".join(f"{name} {norm:.3g}" for name, norm in _norms(trainer, pl_module, kinds))
    return f"non-finite {what} at epoch {step.epoch}, step {step.step} ({'; '.join(lines)}); {norms}"


def _samples(found: Any) -> str:
    """Format the samples of a batch, or those of each task."""
    if isinstance(found, Mapping):
        return "".join(f", {name}{_samples(samples)}" for name, samples in found.items() if samples)
    if not found:
        return ""
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f" of samples {', '.join(map(str, found[:_SHOWN]))}{more}"


def _norms(trainer: Trainer, pl_module: LightningModule, kinds: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """Yield norms of weights or gradients: of old parameter tokens, of new ones after a growth, and of all others."""
    growths = [event for one in trainer.callbacks if isinstance(one, ParameterGrowthCallback) for event in one.events]  # type: ignore
    tokens = list(rows_by_age(pl_module, growths[-1] if growths else None))
    taken = {one.tensor for one in tokens}
    others = [parameter for parameter in pl_module.parameters() if parameter not in taken]
    for kind in kinds:
        rows = [(_part(kind, one.tensor), one) for one in tokens]
        present = [one._replace(tensor=tensor) for tensor, one in rows if tensor is not None]
        if present:
            old, appended = norms_by_age(present)
            yield f"norm of {kind} of old rows", float(old)
            if growths:
                yield f"of {kind} of new rows", float(appended)
        rest = [tensor for parameter in others if (tensor := _part(kind, parameter)) is not None]
        if rest:  # gather norms, not tensors: the unsharded model may not fit
            squares = [
                gather(local(one).float().sum() if is_elsewhere(one) else one.float().norm().square()) for one in rest
            ]
            yield f"of other {kind}", float(sum_over_model([*zip(map(num_owners, rest), squares, strict=True)]).sqrt())


def _part(kind: str, parameter: Tensor) -> Tensor | None:
    """Return a parameter or its gradient; a sharded parameter yields its local shard."""
    return parameter.detach() if kind == "weights" or is_elsewhere(parameter) else parameter.grad

"""Guard against non-finite losses and gradients: the fit stops and names the batch, or goes back without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from callbacks.parameter_growth import ParameterGrowthCallback
from callbacks.training_monitor import norms_by_age, rows_by_age
from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.growth.shards import gather, local

_DIVIDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
_SHOWN = 64
"""Samples of a batch that are named."""


class NonFiniteLoss(RuntimeError):
    """The loss of a batch, or a gradient of it, is NaN or infinite."""


class LossGuard(Callback):
    """Finds a loss or gradient that is NaN or infinite before the optimizer takes a step with it.

    All processes decide together, if it is that of one of them. Reported: epoch, step, the batch and its samples
    (their indices, where the data module has ``train_samples(batch)``), and the norms of weights and gradients of the
    parameter tokens that the latest growth appended, of the others, and of all other parameters.

    Args:
        action: ``stop`` ends the fit with an error; the checkpoints written before are whole and good. ``rollback``
            puts weights, their moving average and the optimizer's state back to where the loss was finite, and
            continues with the next batch; the schedule of the learning rate counts on.
        every_n_steps: Optimizer steps from one copy of that state to the next, with ``rollback``; it is kept in the
            memory of the CPU.
        max_rollbacks: So many times the fit goes back; then it stops.

    Raises:
        ValueError: For settings out of range, and when a fit starts, for ``rollback`` under a strategy that divides the
            model among processes.
        NonFiniteLoss: During a fit, as ``action`` says.

    Note:
        Under DDP this is one number for each optimizer step that all processes reduce. On a GPU the host does not wait
        for it: all gradients of a wrong step are set to zero on the device, and the fit stops or goes back before the
        next step, or before a checkpoint is saved. A fused optimizer of torch (``fused: true``) of parameters that are
        not sharded skips the step on the device. Any other takes it with gradients of zero, so momentum and weight
        decay still change the weights once; ``rollback`` undoes that, and ``stop`` saves no checkpoint after it.
        Gradients that overflow with a loss scale (16-bit precision) are left to the scaler.

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
        """How often the fit went back."""
        self._batch = 0
        self._losses: list[tuple[int, Tensor]] = []
        self._pending: _Step | None = None
        self._kept: _State | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"rollbacks": self.rollbacks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rollbacks = state_dict["rollbacks"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.action == "rollback" and isinstance(trainer.strategy, _DIVIDING):
            strategy = type(trainer.strategy).__name__
            raise UserError(f"action: rollback needs the whole model in each process, not {strategy}; use stop")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses, self._pending, self._kept = [], None, None

    def on_parameter_growth(self, trainer: Trainer, pl_module: LightningModule, event: dict[str, Any]) -> None:
        """Lets go of the state before a growth, which does not fit any more.

        Args:
            trainer: The trainer.
            pl_module: The model, grown already.
            event: What was done.
        """
        self._kept = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch_idx

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append((self._batch, loss.detach()))
        if self.action == "rollback" and self._kept is None:
            self._kept = _State(trainer, pl_module)  # at the start and after a growth there is none that is proven

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        losses, self._losses = self._losses, []
        if self._settle(trainer, pl_module):  # the step before
            optimizer.zero_grad(set_to_none=True)  # of weights that are gone; the optimizer skips what has no gradient
            return
        gradients = _gradients(trainer, optimizer)
        wrong = _in_any_process(trainer, _non_finite([loss for _, loss in losses], gradients, pl_module.device))
        lags = _lags(wrong)
        self._pending = _Step(_to_host(wrong), losses, trainer.current_epoch, trainer.global_step, lags)
        if lags:
            for gradient in gradients:
                gradient.masked_fill_(wrong, 0)
            if gradients and _skips_on_device(optimizer):
                optimizer.found_inf = wrong.float()
        elif self._settle(trainer, pl_module):
            optimizer.zero_grad(set_to_none=True)
            return
        if self._kept is not None and trainer.global_step - self._kept.step >= self.every_n_steps:
            self._kept = _State(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.action == "stop":  # a rollback waits for the next step: the checkpoint has taken its tensors already
            self._settle(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release(trainer)
        self._settle(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release(trainer)
        self._pending = None

    def _release(self, trainer: Trainer) -> None:
        for optimizer in trainer.optimizers:
            vars(optimizer).pop("found_inf", None)

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Act on the step whose verdict is pending.

        Returns:
            Whether the fit went back.

        Raises:
            NonFiniteLoss: If the step was wrong and the fit does not go back.
        """
        step, self._pending = self._pending, None
        if step is None or not step.wrong():
            return False
        found = _describe(trainer, pl_module, step)
        if self.action == "stop" or self._kept is None or self.rollbacks >= self.max_rollbacks:
            spent = f"; the fit went back {self.rollbacks} times already" if self.rollbacks else ""
            raise NonFiniteLoss(f"{found}; no optimizer step was taken with it{spent}")
        self.rollbacks += 1
        self._kept.restore(trainer)
        rank_zero_warn(
            f"{found}; back to the state of step {self._kept.step}, without these batches "
            f"({self.rollbacks} of {self.max_rollbacks} times)"
        )
        return True


class _Step(NamedTuple):
    """An optimizer step and what was found of it.

    Args:
        wrong: Wait for the device and get whether a loss or gradient was not finite.
        losses: Its batches by number, each with its loss.
        epoch: Its epoch.
        step: Its number.
        lags: Whether the gradients have become those of the next step when the verdict is read.
    """

    wrong: Callable[[], bool]
    losses: list[tuple[int, Tensor]]
    epoch: int
    step: int
    lags: bool


def _lags(verdict: Tensor) -> bool:
    """Whether the host reads the verdict of a step one step later, and the device runs on meanwhile."""
    return verdict.is_cuda


def _skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer takes no step where its attribute ``found_inf`` is 1, as loss scalers set it."""
    groups = optimizer.param_groups
    return all(one.get("fused") and not any(isinstance(p, DTensor) for p in one["params"]) for one in groups)


def _to_host(verdict: Tensor) -> Callable[[], bool]:
    """Start to copy a verdict, () bool, to the host; returns what waits for it."""
    if not verdict.is_cuda:
        return lambda: bool(verdict)
    copy = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(verdict, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(verdict.device))

    def wait() -> bool:
        copied.synchronize()
        return bool(copy)

    return wait


def _gradients(trainer: Any, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What this process holds of an optimizer's gradients; none where a scaler looks at them itself."""
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return []
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    return [one._values() if one.is_sparse else one for one in found if one.numel()]


def _non_finite(losses: list[Tensor], gradients: list[Tensor], device: torch.device) -> Tensor:
    """Whether any loss or gradient is not finite, () bool on the device."""
    seen = [torch.zeros((), device=device), *losses]  # training_step may return None, and there is no loss then
    if gradients:
        seen.append(_norm(gradients))
    return ~torch.stack([one.to(device, torch.float32) for one in seen]).isfinite().all()


def _norm(gradients: list[Tensor]) -> Tensor:
    """A norm that is finite if and only if all gradients are: the largest number, or the faster one on a CPU."""
    if not gradients[0].is_cuda:
        norm = torch.nn.utils.get_total_norm(gradients)
        if norm.isfinite():
            return norm  # else its squares may have overflowed
    return torch.nn.utils.get_total_norm(gradients, math.inf)


def _in_any_process(trainer: Trainer, wrong: Tensor) -> Tensor:
    """Whether it is so in any process, () bool on the device; unlike a strategy's ``reduce`` the host does not wait."""
    found = wrong.float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    else:
        found = trainer.strategy.reduce(found, reduce_op="max")  # type: ignore[assignment]
    return found > 0


class _State:
    """Weights and buffers of a model and of its moving averages, and the state of its optimizers, in the CPU's memory.

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
        """Puts everything back.

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
    """A copy in the CPU's memory with the device it came from; what is no tensor, as it is."""
    return (value.detach().to("cpu", copy=True), value.device) if isinstance(value, Tensor) else value


def _describe(trainer: Trainer, pl_module: LightningModule, step: _Step) -> str:
    """What was found, in one line, the same in every process."""
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
    """The samples of a batch, or those of each task."""
    if isinstance(found, Mapping):
        return "".join(f", {name}{_samples(samples)}" for name, samples in found.items() if samples)
    if not found:
        return ""
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f" of samples {', '.join(map(str, found[:_SHOWN]))}{more}"


def _norms(trainer: Trainer, pl_module: LightningModule, kinds: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """Norms of weights or gradients: of old parameter tokens, of new ones after a growth, and of everything else."""
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
        if rest:  # norms are brought together, not tensors: the whole model may not fit
            yield f"of other {kind}", float(torch.stack([gather(tensor.float().norm()) for tensor in rest]).norm())


def _part(kind: str, parameter: Tensor) -> Tensor | None:
    """A parameter or its gradient; of one that is divided among processes, the part of this one."""
    return parameter.detach() if kind == "weights" else parameter.grad

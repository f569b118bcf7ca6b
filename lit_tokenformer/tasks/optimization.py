"""Optimization of a task: learning-rate schedules, and gradients normalized over a whole global step."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.models.experts import finish_step, pending_load, restore_load

NEVER = sys.maxsize
"""Frequency at which Lightning never steps a scheduler; the task steps it after each validation."""


@dataclass(frozen=True)
class LRSchedule:
    """Learning-rate schedule with linear warm-up.

    Args:
        name: ``cosine``, ``constant``, or ``wsd`` (warm-up, stable, linear decay at the end).
        warmup: Length of the linear warm-up, in ``unit``.
        warmup_start: Factor on the learning rate at the first step of the warm-up.
        decay: Length of the decay of ``wsd``, in ``unit``.
        min_factor: Factor on the learning rate at the last step of ``cosine`` and ``wsd``.
        unit: Unit of ``warmup`` and ``decay``: ``epoch``, ``step`` (optimizer steps) or ``share`` (of all steps, or of
            those between two restarts).
        restarts: Optimizer steps at which the schedule restarts, including warm-up, in increasing order.
    """

    name: str = "cosine"
    warmup: float = 0.0
    warmup_start: float = 0.0
    decay: float = 0.0
    min_factor: float = 0.0
    unit: str = "epoch"
    restarts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for setting, value, choices in (
            ("schedule.name", self.name, ("cosine", "constant", "wsd")),
            ("schedule.unit", self.unit, ("epoch", "step", "share")),
        ):
            if value not in choices:
                raise unknown_name(setting, value, choices)
        for setting in ("warmup", "decay"):
            if not 0 <= getattr(self, setting) < math.inf:
                raise UserError(f"schedule.{setting}: expected at least 0, got {getattr(self, setting)}")
        for setting in ("warmup_start", "min_factor"):
            if not 0 <= getattr(self, setting) <= 1:
                raise UserError(f"schedule.{setting}: expected a factor in [0, 1], got {getattr(self, setting)}")
        if any(later <= earlier for earlier, later in itertools.pairwise((0, *self.restarts))):
            raise UserError(f"schedule.restarts: expected increasing steps above 0, got {list(self.restarts)}")

    def check_endless(self) -> None:
        """Raise a ``UserError`` if the schedule requires the length of the fit."""
        if self.name != "constant" or self.unit == "share":
            raise UserError(f"schedule.name: {self.name!r} needs a limit; set trainer.max_epochs or trainer.max_steps")

    def factor(self, step: int, total_steps: float, steps_per_epoch: float) -> float:
        """Compute the factor on the learning rate.

        Args:
            step: Zero-based optimizer step.
            total_steps: Optimizer steps of the whole fit.
            steps_per_epoch: Optimizer steps of one epoch.

        Example:
            >>> schedule = LRSchedule("cosine", warmup=2, unit="step")
            >>> [round(schedule.factor(step, 6, 3), 3) for step in range(7)]
            [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
        """
        begin = max((restart for restart in self.restarts if restart <= step), default=0)
        end = min((restart for restart in self.restarts if restart > step), default=total_steps)
        step, total_steps = step - begin, end - begin
        scale = {"epoch": steps_per_epoch, "step": 1, "share": total_steps}[self.unit]
        warmup, decay = self.warmup * scale, self.decay * scale
        if step < warmup:
            return self.warmup_start + (1 - self.warmup_start) * step / warmup
        if self.name == "constant":
            return 1.0
        start = warmup if self.name == "cosine" else max(warmup, total_steps - decay)
        progress = min(1.0, max(0.0, step - start) / max(1.0, total_steps - start))
        falling = (1 + math.cos(math.pi * progress)) / 2 if self.name == "cosine" else 1 - progress
        return self.min_factor + (1 - self.min_factor) * falling


@dataclass(frozen=True)
class LRSchedulerConfig:
    """Timing of a torch scheduler, as in Lightning's ``lr_scheduler_config``.

    Args:
        interval: ``step`` (optimizer steps) or ``epoch``. ``None`` means ``step`` for ``OneCycleLR``, for ``CyclicLR``
            and if only steps limit the fit, otherwise ``epoch``. A ``ReduceLROnPlateau`` on a validation metric steps
            after each validation.
        frequency: Intervals between two steps of the scheduler.
        monitor: Metric of a ``ReduceLROnPlateau``; ``None`` uses the scheduler's own ``monitor``.
    """

    interval: str | None = None
    frequency: int = 1
    monitor: str | None = None

    def __post_init__(self) -> None:
        if self.interval not in (None, "step", "epoch"):
            raise unknown_name("model.lr_scheduler_config.interval", self.interval, ("step", "epoch"))
        if self.frequency < 1:
            raise UserError(f"model.lr_scheduler_config.frequency: expected at least 1, got {self.frequency}")
        if self.frequency > 1 and self.interval is None:
            raise UserError("model.lr_scheduler_config.frequency: needs interval, step or epoch")

    def resolve(self, scheduler: Any, trainer: Trainer) -> dict[str, Any]:
        """Determine interval, frequency and monitor for a scheduler.

        Args:
            scheduler: A torch scheduler.
            trainer: The trainer, whose settings limit the fit.

        Raises:
            ValueError: For a ``ReduceLROnPlateau`` without a metric.
        """
        monitor = self.monitor or getattr(scheduler, "monitor", None)
        frequency, by_step = self.frequency, isinstance(scheduler, (OneCycleLR, CyclicLR)) or _ends_by_steps(trainer)
        if isinstance(scheduler, ReduceLROnPlateau):
            if monitor is None:
                raise UserError("model.lr_scheduler_config.monitor: ReduceLROnPlateau needs a metric, such as val/loss")
            by_step = False
            if self.interval is None and not monitor.startswith("train/"):
                frequency = NEVER
        interval = self.interval or ("step" if by_step else "epoch")
        return {"interval": interval, "frequency": frequency, "monitor": monitor}


def _ends_by_steps(trainer: Trainer) -> bool:
    """Return whether a fit has no epoch limit, or ends within its first epoch."""
    if trainer.max_steps < 0 or trainer.max_epochs == -1:
        return trainer.max_steps >= 0
    total = trainer.estimated_stepping_batches
    return total * trainer.accumulate_grad_batches < trainer.num_training_batches


class OptimizedTask(pl.LightningModule):
    """LightningModule that optimizes the mean of a loss over all items of a global step.

    Args:
        optimizer: Optimizer factory, called with parameter groups.
        schedule: Learning rate over the fit.
        lr_scheduler: Factory of a torch scheduler that replaces ``schedule``.
        lr_scheduler_config: Timing of ``lr_scheduler``.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        schedule: LRSchedule | dict[str, Any],
        lr_scheduler: LRSchedulerCallable | None,
        lr_scheduler_config: LRSchedulerConfig | dict[str, Any],
    ) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.schedule = LRSchedule(**schedule) if isinstance(schedule, dict) else schedule
        self.make_lr_scheduler = lr_scheduler
        given = lr_scheduler_config
        self.lr_scheduler_config = LRSchedulerConfig(**given) if isinstance(given, dict) else given
        self._learning_rate: float | None = None
        self._lengths: tuple[float, float] | None = None
        """Optimizer steps of the fit and of an epoch; ``None`` if ``schedule`` is unused."""
        self._counts: tuple[Tensor, Tensor] | None = None
        """Items of all processes in the first micro-batch of the global step, and in all micro-batches so far."""

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Build the optimizer over the current parameters."""
        raise NotImplementedError  # depends on the task's parameter groups

    @property
    def learning_rate(self) -> float | None:
        """Learning rate set by LearningRateFinder; ``None`` keeps the optimizer's own."""
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: float | None) -> None:
        self._learning_rate = rate
        if rate is None or self._trainer is None:
            return
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            for group in scheduler.optimizer.param_groups:
                wanted = rate * group.get("lr_scale", 1.0)
                group["lr"] *= wanted / group.get("initial_lr", group["lr"])
                group["initial_lr"] = wanted
            for one in (scheduler, *getattr(scheduler, "_schedulers", ())):
                one.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
                one._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.build_optimizer()
        if self.trainer.gradient_clip_val:
            # a fused optimizer unscales gradients after clipping, which Lightning rejects
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        if self.make_lr_scheduler is not None:
            scheduler = self.make_lr_scheduler(optimizer)
            config: Any = {"scheduler": scheduler, **self.lr_scheduler_config.resolve(scheduler, self.trainer)}
            return {"optimizer": optimizer, "lr_scheduler": config}
        total, per_epoch = self.measure_schedule()
        if math.isinf(total):
            self.schedule.check_endless()

        def factor(step: int) -> float:
            return self.schedule.factor(step, *(self._lengths or (total, per_epoch)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def update_schedule(self) -> None:
        """Apply changes that callbacks such as BatchSizeFinder and LearningRateFinder made before the first step."""
        if self._lengths is not None:
            self.measure_schedule()
        for config in self.trainer.lr_scheduler_configs if self.learning_rate is not None else ():
            scheduler: Any = config.scheduler
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate

    def measure_schedule(self) -> tuple[float, float]:
        """Measure the optimizer steps of the fit and of an epoch, used by the schedule from now on."""
        per_epoch = self._steps_per_epoch() if self.schedule.unit == "epoch" else 1
        self._lengths = self.trainer.estimated_stepping_batches, per_epoch
        return self._lengths

    def _steps_per_epoch(self) -> int:
        self.trainer.fit_loop.setup_data()  # not done yet in a fit limited by steps
        batches = self.trainer.num_training_batches
        if math.isinf(batches):
            raise UserError("schedule.unit: unknown epoch length of a stream; use 'step'")
        return math.ceil(batches / self.trainer.accumulate_grad_batches)

    def training_loss(self, batch: Any) -> tuple[Tensor, Tensor | int]:
        """Compute and log the mean loss of a training batch, (), and return it with its number of items."""
        raise NotImplementedError  # depends on the task's batch

    def total_loss(self, batch: Any) -> tuple[Tensor, Tensor | int]:
        """Compute the training loss of a batch including added terms, (), and its number of items."""
        return self.training_loss(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, count = self.total_loss(batch)
        share = self.share_of_step(count, batch_idx, loss)
        return loss if share is None else loss * share

    def share_of_step(self, count: Tensor | int, batch_idx: int, like: Tensor) -> Tensor | None:
        """Compute the weight of a micro-batch within its global step, the micro-batches of one optimizer step.

        Lightning and DDP average over micro-batches and processes, regardless of their numbers of items. These weights,
        combined with :meth:`step_factor`, yield the gradient of the mean over all items.

        Args:
            count: Items of the micro-batch.
            batch_idx: Zero-based index of the micro-batch in the epoch.
            like: A tensor with the weight's device and dtype.

        Returns:
            Items relative to the mean over all processes in the first micro-batch, (): 1 if all have the same number.
            ``None`` if a step has one micro-batch.
        """
        trainer = self._trainer
        if trainer is None or trainer.world_size * trainer.accumulate_grad_batches == 1:
            return None
        own = count if isinstance(count, Tensor) else torch.full((), count, device=like.device)
        every = own.clone()
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.all_reduce(every)
        if self._counts is None or batch_idx % trainer.accumulate_grad_batches == 0:
            self._counts = every.to(like.dtype).clamp_min(1), torch.zeros_like(every)
        first, before = self._counts
        self._counts = first, before + every
        return own * trainer.world_size / first

    def step_factor(self) -> Tensor | float:
        """Compute the gradient factor of a global step, which normalizes by items instead of micro-batches."""
        if self._counts is None:
            return 1.0
        first, total = self._counts
        return first * self.trainer.accumulate_grad_batches / total.clamp_min(1)

    def pending_state(self) -> dict[str, Tensor | None]:
        """Return the state of an incomplete optimizer step, except gradients; names are equal in all processes."""
        first, total = self._counts or (None, None)
        return {"counts.first": first, "counts.total": total, **pending_load(self)}

    def load_pending_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of :meth:`pending_state`, on any device."""
        if "counts.first" in state:
            self._counts = state["counts.first"].to(self.device), state["counts.total"].to(self.device)
        restore_load(self, state)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step the optimizer as Lightning does, with a gradient already normalized over the global step."""
        assert optimizer_closure is not None  # set under automatic optimization
        super().optimizer_step(epoch, batch_idx, optimizer, partial(self._complete_step, optimizer_closure))

    def run_last_micro_batch(self, closure: Callable[[], Any]) -> Any:
        """Run the forward and backward pass that completes a global step, and normalize the gradient."""
        result = closure()
        if self._counts is not None and self.trainer.accumulate_grad_batches > 1:
            factor = self.step_factor()
            for parameter in self.parameters():
                if parameter.grad is not None:
                    scale_(parameter.grad, factor)
        return result

    def _complete_step(self, closure: Callable[[], Any]) -> Any:
        result = self.run_last_micro_batch(closure)
        finish_step(self)
        return result

    def _step_after_validation(self) -> None:
        """Step the schedulers that monitor a validation metric, before their state is saved in a checkpoint."""
        for config in self.trainer.lr_scheduler_configs:
            if config.frequency != NEVER:
                continue
            scores = self.trainer.callback_metrics
            if config.monitor not in scores:
                raise UserError(
                    f"model.lr_scheduler_config.monitor: no metric {config.monitor!r} (logged: {', '.join(scores)})"
                )
            self.lr_scheduler_step(config.scheduler, scores[config.monitor])


def scale_(gradient: Tensor, factor: Tensor | float) -> None:
    """Multiply a gradient in place; a sharded one by its local shard."""
    (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(factor)

"""Closed-form learning-rate schedules, functions of the step index only, and timing of torch schedulers."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau

from lit_tokenformer.errors import UserError, unknown_name

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

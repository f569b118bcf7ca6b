"""Loss-based growth triggers, and the training-loss signal that they evaluate.

The slope rule follows Shen et al. 2022, "Staged Training for Transformer Language Models" (arXiv 2203.06211), who grow
where the loss of the larger model would decrease faster per FLOP. That slope is unknown within a run; the steepest
slope of the current model replaces it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import linear_regression
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer

from callbacks.training_monitor import num_samples
from lit_tokenformer.errors import UserError
from lit_tokenformer.registry import TRIGGERS


class Trigger(Protocol):
    """Rule evaluated on successive window losses, all at one size of the model."""

    def update(self, loss: float, compute: float) -> bool:
        """Return whether the model should grow now.

        Args:
            loss: Mean training loss of the latest window, in nats.
            compute: Training compute from the start of the fit to the end of this window; strictly increasing.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class Plateau:
    """Fire when the loss stops improving, by the rule of ``EarlyStopping``.

    Args:
        patience: Windows without improvement before the trigger fires.
        min_delta: Minimum decrease of the loss that counts as an improvement, in nats.

    Example:
        >>> plateau = Plateau(patience=2, min_delta=0.1)
        >>> [plateau.update(loss, compute) for compute, loss in enumerate([3.0, 2.0, 1.95, 1.92])]
        [False, False, False, True]
    """

    def __init__(self, patience: int, min_delta: float) -> None:
        self.patience = patience
        self.min_delta = min_delta
        self._best = math.inf
        self._waited = 0

    def update(self, loss: float, compute: float) -> bool:
        if loss < self._best - self.min_delta:
            self._best, self._waited = loss, 0
        else:
            self._waited += 1
        return self._waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best, self._waited = state_dict["best"], state_dict["waited"]


class Slope:
    """Fire when the loss decreases much more slowly with the logarithm of compute than at its steepest.

    Args:
        patience: Number of latest windows in the least-squares fit of a line.
        threshold: Share of the steepest slope so far at which the trigger fires. It also fires at a loss that never
            decreased.

    Raises:
        ValueError: For settings out of range.

    Example:
        >>> slope = Slope(patience=2, threshold=0.5)
        >>> [slope.update(loss, 2.0**window) for window, loss in enumerate([4.0, 3.0, 2.0, 1.4, 1.0])]
        [False, False, False, False, True]
    """

    def __init__(self, patience: int, threshold: float) -> None:
        if patience < 2:
            raise UserError(f"patience: expected at least 2 for trigger 'slope', got {patience}")
        if not 0 < threshold < 1:
            raise UserError(f"threshold: expected a number between 0 and 1, got {threshold}")
        self.patience = patience
        self.threshold = threshold
        self._losses: list[float] = []
        self._compute: list[float] = []
        self._steepest = -math.inf

    def update(self, loss: float, compute: float) -> bool:
        self._losses = [*self._losses, loss][-self.patience :]
        self._compute = [*self._compute, compute][-self.patience :]
        if len(self._losses) < self.patience:
            return False
        fall = -linear_regression([math.log(one) for one in self._compute], self._losses).slope
        self._steepest = max(self._steepest, fall)
        return fall <= self.threshold * self._steepest

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self._losses, "compute": self._compute, "steepest": self._steepest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses, self._compute = state_dict["losses"], state_dict["compute"]
        self._steepest = state_dict["steepest"]


@TRIGGERS.register("slope")
def _slope(patience: int, min_delta: float, threshold: float) -> Trigger:
    return Slope(patience, threshold)


@TRIGGERS.register("plateau")
def _plateau(patience: int, min_delta: float, threshold: float) -> Trigger:
    return Plateau(patience, min_delta)


class LossSignal:
    """Window means of the training loss for a trigger; all processes reach the same decision.

    Non-finite losses are ignored. Compute is measured in training FLOPs if the module reports them (see
    :class:`~callbacks.TrainingMonitor`), otherwise in optimizer steps.

    Args:
        make_trigger: Factory of a trigger in its initial state.
        window: Optimizer steps in a window.
        cooldown: Optimizer steps before the first window.
    """

    def __init__(self, make_trigger: Callable[[], Trigger], window: int, cooldown: int) -> None:
        self.fired = False
        self._make_trigger = make_trigger
        self._trigger = make_trigger()
        self._window = window
        self._cooldown = cooldown
        self._begins = math.inf  # first optimizer step of the window
        # sum and number of the losses in the window, and compute since the last window
        self._sums = torch.zeros(3, dtype=torch.float32)
        self._compute = 0.0  # until the end of the last window
        self._costs: dict[str, int] = {}
        self._step = 0

    def begin_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the model and start the cooldown, unless a resumed run has already started it."""
        self.measure(trainer, pl_module)
        self._sums = self._sums.to(trainer.strategy.root_device)
        self._step = trainer.global_step
        self._begins = min(self._begins, self._step + self._cooldown)

    def begin_size(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset everything except the compute after a growth."""
        self.measure(trainer, pl_module)
        self.fired, self._trigger = False, self._make_trigger()
        self._begins = trainer.global_step + self._cooldown
        self._sums = self._sums * self._sums.new_tensor([0, 0, 1])

    def add_batch(self, trainer: Trainer, outputs: Any, batch: Any) -> None:
        """Add a training batch to the window; the last one of a window updates the trigger.

        Args:
            trainer: The trainer.
            outputs: Output of ``training_step``, with the loss divided by the number of accumulated batches.
            batch: The batch.
        """
        flops = sum(cost * num_samples(batch[task] if task else batch) for task, cost in self._costs.items())
        spent = float(flops or trainer.global_step - self._step)
        loss = self._sums.new_full((), math.nan)
        if "loss" in (outputs or {}) and self._step >= self._begins:  # training_step may skip a batch
            loss = outputs["loss"].detach().to(loss) * trainer.accumulate_grad_batches
        known = loss.isfinite()
        # out of place: a checkpoint during validation leaves inference tensors
        self._sums = self._sums + torch.stack([loss.where(known, 0), known.to(loss), torch.full_like(loss, spent)])
        self._step = trainer.global_step
        if self._step < self._begins + self._window:
            return
        self.agree(trainer)
        total, count, compute = self._sums.tolist()
        self._sums = torch.zeros_like(self._sums)
        self._begins = self._step
        self._compute += compute
        if count and self._trigger.update(total / count, self._compute):
            self.fired = True

    def agree(self, trainer: Trainer) -> None:
        """Average the measurements since the last window over all processes."""
        self._sums = trainer.strategy.reduce(self._sums)  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        return {
            "fired": self.fired,
            "begins": self._begins,
            "sums": self._sums.tolist(),
            "compute": self._compute,
            "decision": self._trigger.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.fired = state_dict["fired"]
        self._begins = state_dict["begins"]
        self._sums = torch.tensor(state_dict["sums"], dtype=torch.float32)
        self._compute = state_dict["compute"]
        self._trigger.load_state_dict(state_dict["decision"])

    def measure(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure the training FLOPs of one sample per task at the current size, summed over all processes."""
        cost, costs = getattr(pl_module, "cost", None), getattr(pl_module, "costs", None)
        found = costs() if callable(costs) else {"": cost()} if callable(cost) else {}
        replicas = (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
        self._costs = {task: one.training_flops * replicas for task, one in found.items()}

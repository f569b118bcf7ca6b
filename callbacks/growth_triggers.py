"""Growth that waits for the training loss: what is measured of a fit, and the rules that decide by it.

The slope rule is after Shen et al. 2022, "Staged Training for Transformer Language Models" (arXiv 2203.06211), who grow
where the loss of the larger model would fall faster for each operation. That slope is not known inside a run; here the
model's own steepest one stands for it.
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
    """A rule that is told the loss of one window after the other, all of one size of the model."""

    def update(self, loss: float, compute: float) -> bool:
        """Whether the model should grow now.

        Args:
            loss: Mean of the training loss over the latest window, in nats.
            compute: What training cost up to the end of this window, since the fit began; greater than the last time.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class Plateau:
    """Fires when the loss does not improve any more, as ``EarlyStopping`` stops.

    Args:
        patience: Windows without improvement after which it fires.
        min_delta: Least fall of the loss that is an improvement, in nats.

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
    """Fires when the loss falls much more slowly with the logarithm of compute than it did.

    Args:
        patience: Latest windows through which a line is laid, by least squares.
        threshold: It fires at this share of the steepest such line so far, or at a loss that never fell.

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
    """Means of the training loss over windows of a fit, told to a trigger; all processes decide alike.

    Losses that are no number are left out. Compute is counted in training operations where the module tells them (see
    :class:`~callbacks.TrainingMonitor`), otherwise in optimizer steps.

    Args:
        make_trigger: Makes a trigger that was told nothing yet.
        window: Optimizer steps in a window.
        cooldown: Optimizer steps before the first window.
    """

    def __init__(self, make_trigger: Callable[[], Trigger], window: int, cooldown: int) -> None:
        self.fired = False
        self._make_trigger = make_trigger
        self._trigger = make_trigger()
        self._window = window
        self._cooldown = cooldown
        self._begins = math.inf  # the optimizer step at which the window begins
        # the sum of the losses of the window, how many they are, and the compute since the last window
        self._sums = torch.zeros(3, dtype=torch.float32)
        self._compute = 0.0  # up to the last window
        self._costs: dict[str, int] = {}
        self._step = 0

    def begin_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the model, and waits for the cool-down unless a resumed run did already."""
        self.measure(trainer, pl_module)
        self._sums = self._sums.to(trainer.strategy.root_device)
        self._step = trainer.global_step
        self._begins = min(self._begins, self._step + self._cooldown)

    def begin_size(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets everything but the compute, after a growth."""
        self.measure(trainer, pl_module)
        self.fired, self._trigger = False, self._make_trigger()
        self._begins = trainer.global_step + self._cooldown
        self._sums = self._sums * self._sums.new_tensor([0, 0, 1])

    def add_batch(self, trainer: Trainer, outputs: Any, batch: Any) -> None:
        """Counts a batch that was trained on; the last one of a window asks the trigger.

        Args:
            trainer: The trainer.
            outputs: What ``training_step`` gave, its loss divided by the batches that are accumulated.
            batch: The batch.
        """
        flops = sum(cost * num_samples(batch[task] if task else batch) for task, cost in self._costs.items())
        spent = float(flops or trainer.global_step - self._step)
        loss = self._sums.new_full((), math.nan)
        if "loss" in (outputs or {}) and self._step >= self._begins:  # training_step may leave a batch out
            loss = outputs["loss"].detach().to(loss) * trainer.accumulate_grad_batches
        known = loss.isfinite()
        # not in place: a checkpoint during a validation leaves tensors of the inference mode
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
        """Gives each process the mean of what all of them measured since the last window."""
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
        """What one sample of each task costs at the model's size, for all processes together."""
        cost, costs = getattr(pl_module, "cost", None), getattr(pl_module, "costs", None)
        found = costs() if callable(costs) else {"": cost()} if callable(cost) else {}
        replicas = (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
        self._costs = {task: one.training_flops * replicas for task, one in found.items()}

"""Adjusted optimizer steps after a growth: learning rate, update size, tau."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_tokenformer.growth import GrownTensor, Rows, growth_method
from lit_tokenformer.growth.shards import local
from lit_tokenformer.models.axes import find_axes

Event = Mapping[str, Any]
"""A growth as :class:`~callbacks.ParameterGrowthCallback` records it."""


@dataclass(frozen=True)
class StepSettings:
    """Settings of the steps after a growth; documented in :class:`~callbacks.ParameterGrowthCallback`."""

    tau_steps: int = 0
    ramp_steps: int = 0
    freeze_old_steps: int = 0
    old_updates: float = 0.0
    rewarm_steps: int = 0
    freeze_rest: bool = False
    new_updates: float = 1.0

    def __bool__(self) -> bool:
        durations = self.tau_steps, self.ramp_steps, self.freeze_old_steps, self.rewarm_steps
        return any(durations) or self.new_updates != 1

    def rewarm_factor(self, done: int) -> float:
        """Return the learning-rate factor of the next optimizer step, ``done`` steps after the latest growth."""
        return (done + 1) / self.rewarm_steps if done < self.rewarm_steps else 1.0

    def shares(self, done: int) -> tuple[float, float]:
        """Return the shares of their updates that new and old rows apply in the next step."""
        new = min(1.0, (done + 1) / self.ramp_steps) if self.ramp_steps else 1.0
        frozen = done < self.freeze_old_steps or self.freeze_old_steps < 0
        return self.new_updates * new, self.old_updates if frozen else 1.0


def add_step_hooks(
    settings: StepSettings,
    latest: Callable[[], Event | None],
    trainer: Trainer,
    pl_module: LightningModule,
    optimizer: torch.optim.Optimizer,
    place: int,
) -> list[Any]:
    """Adjust the steps of an optimizer after a growth.

    Args:
        settings: Adjustments and their durations.
        latest: Returns the latest growth, or ``None`` without one.
        trainer: The trainer, whose global step is counted.
        pl_module: The model.
        optimizer: One of its optimizers.
        place: Index in the trainer's callbacks at which adjusted learning rates become visible.

    Returns:
        The hooks, to be removed at the end of the fit.
    """
    rates: list[Any] = []
    held: list[tuple[Tensor, Tensor, Tensor]] = []  # local shards: current, before the step, share

    def factor() -> float:
        event = latest()
        return 1.0 if event is None else settings.rewarm_factor(trainer.global_step - event["step"])

    shown = ShownRates(factor, trainer, optimizer, place) if settings.rewarm_steps else None

    def before_step(*_: Any) -> None:
        if shown is not None:
            shown.restore()
        rates.clear()
        held.clear()
        event = latest()
        if event is None:
            return
        rates.extend(group["lr"] for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor()
        new, old = settings.shares(trainer.global_step - event["step"])
        if new != 1 or old < 1:
            owned = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            rest = owned if settings.freeze_rest else set()
            masks = {parameter: torch.zeros((), dtype=torch.bool, device=parameter.device) for parameter in rest}
            for parameter, is_new in {**masks, **new_entries(pl_module, event)}.items():
                if parameter in owned:
                    now = local(parameter)
                    held.append((now, now.clone(), torch.where(is_new, new, old).to(now)))

    def after_step(*_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        for now, previous, share in held:
            now.copy_(torch.where(share == 1, now, previous + share * (now - previous)))
        held.clear()
        event = latest()
        left = 0 if event is None else settings.tau_steps - (trainer.global_step - event["step"])
        for _name, part, axis in find_axes(pl_module) if left > 0 else ():
            if axis.tau is not None:
                axis.tau.mul_((math.sqrt(axis.size(part)) / axis.tau) ** (1 / left))

    hooks: list[Any] = [optimizer.register_step_pre_hook(before_step), optimizer.register_step_post_hook(after_step)]
    return hooks if shown is None else [*hooks, shown]


class ShownRates(Callback):
    """Expose the next step's learning rates, lowered by ``rewarm_steps``, to callbacks such as LearningRateMonitor.

    Parameter groups hold them only from the growth callback's ``on_train_batch_start`` to the backward pass, so neither
    a scheduler nor a checkpoint sees them.
    """

    def __init__(
        self, factor: Callable[[], float], trainer: Trainer, optimizer: torch.optim.Optimizer, place: int
    ) -> None:
        self.factor, self.trainer, self.optimizer = factor, trainer, optimizer
        self.rates: list[Any] = []
        callbacks: list[Any] = list(getattr(trainer, "callbacks", []))
        trainer.callbacks = [*callbacks[:place], self, *callbacks[place:]]  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Remove this callback from the trainer."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        self.trainer.callbacks = [one for one in callbacks if one is not self]  # type: ignore[attr-defined]

    def on_train_batch_start(self, *_: Any) -> None:
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor()

    def on_before_zero_grad(self, *_: Any) -> None:
        self.restore()

    def on_before_backward(self, *_: Any) -> None:
        self.restore()

    def on_train_batch_end(self, *_: Any) -> None:
        self.restore()  # after a training_step that returned None

    def restore(self) -> None:
        """Restore the scheduler's learning rates in the parameter groups, if they were replaced."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=False):
            group["lr"] = rate
        self.rates = []


def latest_rows(module: nn.Module, event: Event) -> Iterator[tuple[str, nn.Parameter, GrownTensor]]:
    """Yield the parameters enlarged by a growth, with their names and the origin of their rows.

    Args:
        module: The model, at the size after the growth.
        event: The growth; its row map is in ``rows``.
    """
    rows = event["rows"] if "rows" in event else _rows_of_earlier_release(module, event)
    parameters = dict(module.named_parameters())
    for name, (before, after, copies, dim, block) in rows.items():
        parameter = parameters.get(name)
        if parameter is not None and parameter.shape[dim] == after * block:
            yield name, parameter, GrownTensor(Rows(before, after, copies), dim, block)


def row_map(name: str, grown: GrownTensor) -> dict[str, list[int]]:
    """Build a parameter's entry in the row map of a growth, as plain numbers for a checkpoint."""
    rows = grown.rows
    return {name: [rows.before, rows.after, rows.copies, grown.dim, grown.block]}


def new_entries(module: nn.Module, event: Event) -> dict[nn.Parameter, Tensor]:
    """Build masks of the entries appended by a growth, broadcastable to the local shard of each parameter."""
    found: dict[nn.Parameter, Tensor] = {}
    for _, parameter, grown in latest_rows(module, event):
        mask = grown.new(parameter)
        found[parameter] = found[parameter] | mask if parameter in found else mask
    return found


def _rows_of_earlier_release(module: nn.Module, event: Event) -> dict[str, list[int]]:
    """Build the row map of a growth recorded without one, from totals and sizes of layers that had others."""
    found: dict[str, list[int]] = {}
    own = event.get("layers_before", {})
    for name, part, axis in find_axes(module):
        before, after = own.get(name, event["before"].get(axis.kind, 0)), event["after"].get(axis.kind, 0)
        if axis.tau is not None and before < after == axis.size(part):
            rows = growth_method(event["method"]).rows(before, after)
            for tensor in axis.tensors:
                found |= row_map(f"{name}.{tensor.name}".lstrip("."), GrownTensor(rows, tensor.dim, tensor.block))
    return found

"""What happens to single optimizer steps after a growth: learning rate, size of the updates, tau."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_tokenformer.growth import Rows, plan_rows
from lit_tokenformer.growth.shards import local, owned_rows
from lit_tokenformer.models import Pattention

if TYPE_CHECKING:
    from callbacks.parameter_growth import ParameterGrowthCallback


def add_step_hooks(
    growth: ParameterGrowthCallback, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
) -> list[Any]:
    """Lets an optimizer do what a growth callback says of the steps after its latest growth.

    Args:
        growth: The callback, with its settings and what it did so far.
        trainer: The trainer, whose steps are counted.
        pl_module: The model.
        optimizer: One of its optimizers.

    Returns:
        The hooks, to be removed when the fit ends.
    """
    rates: list[Any] = []
    held: list[tuple[Tensor, Tensor, Tensor]] = []  # what this process holds of each: now, before the step, and share

    shown = ShownRates(growth, trainer, optimizer) if growth.rewarm_steps else None

    def before_step(*_: Any) -> None:
        if shown is not None:
            shown.restore()
        rates.clear()
        held.clear()
        if not growth.events:
            return
        done = trainer.global_step - growth.events[-1]["step"]
        rates.extend(group["lr"] for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * _rewarm_factor(growth, trainer)
        new = min(1.0, (done + 1) / growth.ramp_steps) if growth.ramp_steps else 1.0
        frozen = done < growth.freeze_old_steps or growth.freeze_old_steps < 0
        if new < 1 or frozen:
            owned = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            for layer, rows in latest_rows(pl_module, growth.events[-1]):
                for parameter in (getattr(layer, part) for part in layer.PARTS):
                    if parameter in owned:
                        own = owned_rows(parameter, rows.after)
                        is_new = rows.new(parameter.device)[own.start : own.stop, None]
                        now = local(parameter)
                        share = torch.where(is_new, new, growth.old_updates if frozen else 1.0).to(now)
                        held.append((now, now.clone(), share))

    def after_step(*_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        for now, previous, share in held:
            now.copy_(torch.where(share == 1, now, previous + share * (now - previous)))
        held.clear()
        if growth.events:
            left = growth.tau_steps - (trainer.global_step - growth.events[-1]["step"])
            if left > 0:
                for layer in pl_module.modules():
                    if isinstance(layer, Pattention):
                        layer.tau.mul_((math.sqrt(layer.num_tokens) / layer.tau) ** (1 / left))

    hooks: list[Any] = [optimizer.register_step_pre_hook(before_step), optimizer.register_step_post_hook(after_step)]
    return hooks if shown is None else [*hooks, shown]


class ShownRates(Callback):
    """Show callbacks such as LearningRateMonitor the learning rates of the coming step, which ``rewarm_steps`` lowers.

    Parameter groups have them from the growth callback's ``on_train_batch_start`` to the backward pass alone, so that
    neither a scheduler nor a checkpoint sees them.
    """

    def __init__(self, growth: ParameterGrowthCallback, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        self.growth, self.trainer, self.optimizer = growth, trainer, optimizer
        self.rates: list[Any] = []
        callbacks: list[Any] = list(getattr(trainer, "callbacks", []))
        place = callbacks.index(growth) + 1 if growth in callbacks else len(callbacks)
        trainer.callbacks = [*callbacks[:place], self, *callbacks[place:]]  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Leave the trainer's callbacks."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        self.trainer.callbacks = [one for one in callbacks if one is not self]  # type: ignore[attr-defined]

    def on_train_batch_start(self, *_: Any) -> None:
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * _rewarm_factor(self.growth, self.trainer)

    def on_before_zero_grad(self, *_: Any) -> None:
        self.restore()

    def on_before_backward(self, *_: Any) -> None:
        self.restore()

    def on_train_batch_end(self, *_: Any) -> None:
        self.restore()  # after a training_step that returned None

    def restore(self) -> None:
        """Give parameter groups the rates of their scheduler; nothing, where they have them."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=False):
            group["lr"] = rate
        self.rates = []


def _rewarm_factor(growth: ParameterGrowthCallback, trainer: Trainer) -> float:
    """Factor on the learning rate of the coming optimizer step."""
    done = trainer.global_step - growth.events[-1]["step"] if growth.events else growth.rewarm_steps
    return (done + 1) / growth.rewarm_steps if done < growth.rewarm_steps else 1.0


def latest_rows(module: nn.Module, event: Mapping[str, Any]) -> Iterator[tuple[Pattention, Rows]]:
    """Find the layers that a growth enlarged, and where their rows come from.

    Args:
        module: The model, at the size after it.
        event: That growth: totals ``before`` and ``after``, the ``method``, and ``layers_before``, which are of layers
            that had other totals than the rest of their kind.
    """
    own = event.get("layers_before", {})
    for name, layer in module.named_modules():
        if isinstance(layer, Pattention) and layer.kind in event["after"]:
            before, after = own.get(name, event["before"][layer.kind]), event["after"][layer.kind]
            if before < after == layer.num_tokens:
                yield layer, plan_rows(before, after, event["method"], layer.score_norm)

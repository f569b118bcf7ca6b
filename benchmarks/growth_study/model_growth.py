"""Growths of the study that the trainer does not offer, and its measurements at each growth: blocks are stacked or
copied, and the linear twin is widened as in Net2Net. One device, no resume."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_tokenformer.models import Pattention, Tokenformer, param_tokens

Origins = dict[nn.Parameter, nn.Parameter]
"""New parameters, with the old ones that they copy."""


def stack(model: Tokenformer, depth: int) -> Origins:
    """Stack the whole model on itself (G_stack, arXiv 2405.15319, section 3). It changes the function."""
    blocks = list(model.blocks)
    return _put(model, [blocks[number % len(blocks)] for number in range(depth)])


def insert_copies(model: Tokenformer, depth: int) -> Origins:
    """Insert a copy of each block after it (interleaved stacking, MSG's order). It changes the function."""
    blocks, times = list(model.blocks), depth // len(model.blocks)
    return _put(model, [block for block in blocks for _ in range(times)])


def append_random(model: Tokenformer, depth: int) -> Origins:
    """Append blocks with the initialization of a new model. It changes the function."""
    fresh = Tokenformer(dataclasses.replace(model.config, depth=depth)).to(next(model.parameters()).device)
    return _put(model, [*model.blocks, *fresh.blocks[len(model.blocks) :]])


def _put(model: Tokenformer, order: list[nn.Module]) -> Origins:
    found: list[nn.Module] = []
    origins: Origins = {}
    for block in order:
        new = copy.deepcopy(block) if block in found else block
        if new is not block:
            origins |= dict(zip(new.parameters(), block.parameters(), strict=True))
        found.append(new)
    model.blocks = nn.ModuleList(found)
    model.config = dataclasses.replace(model.config, depth=len(found))
    return origins


def widen(model: Tokenformer, dim: int, noise: float = 0.5) -> Origins:
    """Double the width by copies of all channels whose outgoing weights are halved (Net2WiderNet, arXiv 1511.05641; for
    Transformers HyperCloning, arXiv 2409.12903). Noise that cancels, of ``noise`` standard deviations of each weight,
    breaks the symmetry. It keeps the function. The model has linear projections, norms without parameters inside the
    blocks, and a tied embedding.
    """
    config = dataclasses.replace(model.config, dim=dim, num_heads=2 * model.config.num_heads)
    if dim != 2 * model.config.dim:
        raise ValueError(f"dim: expected {2 * model.config.dim}, got {dim}")
    wide, old = Tokenformer(config), dict(model.named_parameters())
    for name, parameter in wide.named_parameters():
        source = old[name].data
        if name == "stem.embedding.weight":
            parameter.data = source.repeat(1, 2)
        elif source.ndim == 1:  # the final norm: the halves of the tied head add up
            parameter.data = source.repeat(2) / 2
        else:
            half = source.repeat(2, 1) / 2
            spread = noise * half.std() * torch.randn(half.shape)
            parameter.data = torch.cat([half + spread, half - spread], dim=1)
    for name in ("blocks", "stem", "norm", "head"):
        setattr(model, name, getattr(wide, name))
    model.config = config
    return {}


WAYS: dict[str, tuple[str, Callable[[Tokenformer, int], Origins]]] = {
    "stack": ("depth", stack),
    "insert_copies": ("depth", insert_copies),
    "append_random": ("depth", append_random),
    "widen": ("dim", widen),
}


class ModelGrowth(Callback):
    """Grow depth or width at optimizer steps of a running fit.

    Args:
        way: One of ``WAYS``.
        schedule: ``{step: depth or width}``.
        keep_state: Keep the optimizer state, copied for copies; else drop it, as published.
    """

    def __init__(self, way: str, schedule: dict[int, int], keep_state: bool = False) -> None:
        self.field, self.grow = WAYS[way]
        self.schedule = schedule
        self.keep_state = keep_state

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        size = self.schedule.get(trainer.global_step)
        backbone: Any = pl_module.backbone
        if size is None or getattr(backbone.config, self.field) == size:
            return
        (optimizer,) = trainer.optimizers
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(trainer.global_step)
        origins = self.grow(backbone, size)
        fresh: Any = pl_module.build_optimizer()  # type: ignore[operator]
        for group, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
            group["params"] = new["params"]
        if self.keep_state:
            for parameter, origin in origins.items():
                optimizer.state[parameter] = copy.deepcopy(optimizer.state[origin])
        else:
            optimizer.state.clear()
        tokens = param_tokens(pl_module)
        event = {"before": tokens, "after": tokens, "method": "split"}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "on_parameter_growth"):
                callback.on_parameter_growth(trainer, pl_module, event)
        for logger in trainer.loggers:
            logger.log_metrics({"growth/seconds": 0.0}, step=trainer.global_step)


class LearnedTau(Callback):
    """Make tau of every layer a parameter; a growth multiplies it by the square root of the copies."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for layer in pl_module.modules():
            if isinstance(layer, Pattention) and (tau := layer._buffers.pop("tau", None)) is not None:
                layer.register_parameter("tau", nn.Parameter(tau))


class RateAtGrowth(Callback):
    """Multiply the learning rate by ``factor`` at each of the steps, for the rest of the fit."""

    def __init__(self, steps: list[int], factor: float) -> None:
        self.steps, self.factor = steps, factor

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.steps:
            for config in trainer.lr_scheduler_configs:
                scheduler: Any = config.scheduler
                scheduler.base_lrs = [rate * self.factor for rate in scheduler.base_lrs]
                for group in scheduler.optimizer.param_groups:
                    group["lr"] *= self.factor


class LossAtGrowth(Callback):
    """Measure the validation loss right before and right after each growth, on some batches, without dropout.

    Place it before the callback that grows; ``growths.json`` in the trainer's ``default_root_dir`` gets an entry
    ``[step, before, after]`` for each.
    """

    def __init__(self, steps: list[int], batches: int = 4) -> None:
        self.steps, self.batches = steps, batches
        self.found: list[list[float]] = []
        self._before = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.steps:
            self._before = self._loss(trainer, pl_module)

    def on_parameter_growth(self, trainer: Trainer, pl_module: LightningModule, event: dict[str, Any]) -> None:
        """Measure again, and write both."""
        self.found.append([trainer.global_step, self._before, self._loss(trainer, pl_module)])
        file = Path(trainer.default_root_dir) / "growths.json"
        file.write_text(json.dumps(self.found), encoding="utf-8")

    @torch.no_grad()
    def _loss(self, trainer: Any, pl_module: LightningModule) -> float:
        pl_module.eval()
        total, count = 0.0, 0
        for number, batch in enumerate(trainer.datamodule.val_dataloader()):
            if number >= self.batches:
                break
            x, y = (batch[:, :-1].clamp_min(0), batch[:, 1:]) if isinstance(batch, Tensor) else batch[:2]
            logits = pl_module(x).flatten(0, -2).double()
            total += float(F.cross_entropy(logits, y.flatten(), ignore_index=-100, reduction="sum"))
            count += int(torch.ne(y, -100).sum())
        pl_module.train()
        return total / count

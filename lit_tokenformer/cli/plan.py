"""The ``plan`` command: cost of each stage of a fit, or a growth schedule for a compute budget."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer

from callbacks import ParameterGrowthCallback, PatchDropSchedule
from lit_tokenformer import models, tasks
from lit_tokenformer.cost import ModelCost, model_cost
from lit_tokenformer.errors import UserError
from lit_tokenformer.models.config import KINDS
from lit_tokenformer.planning import MEASURED, Growth, GrowthRule, Proposal, Scale, Size, Stage, plan_stages, propose
from lit_tokenformer.tasks.multitask import joint_cost


def plan(
    trainer: Trainer,
    model: tasks.LitTask,
    datamodule: LightningDataModule | None = None,
    budget: float | None = None,
    epochs: float | None = None,
) -> list[Stage]:
    """Report the compute, parameters and memory of each stage of a fit, or propose a schedule for a budget.

    Args:
        trainer: The trainer of the fit.
        model: The task at its initial size.
        datamodule: Data of the fit; only the number of training samples is read.
        budget: Compute budget of the fit in training FLOPs. Parameter tokens, the schedule of growth (of dropped
            patches for images) and the number of steps are chosen for it and printed as YAML; those of the config are
            ignored. Width, final depth, data and batch size are those of the config.
        epochs: Maximum number of epochs over the training data that the budget may take; defaults to 4 for text and 300
            for images.

    Returns:
        The printed stages.

    Raises:
        UserError: If the number of steps is unknown, the budget is too small, or a fit would reject the schedule.
    """
    if not isinstance(model, tasks.LitTask):
        raise UserError(f"model: no cost model for {type(model).__name__} (expected a task of lit_tokenformer)")
    samples = getattr(datamodule, "num_train_samples", None)
    batch = getattr(datamodule, "batch_size", 1)
    batches = {
        name: getattr(getattr(datamodule, name) if name else datamodule, "batch_size", 1) for name in model.backbones
    }
    per_step = {name: size * trainer.accumulate_grad_batches * trainer.world_size for name, size in batches.items()}
    per_epoch = None if samples is None else _steps_per_epoch(trainer, samples // (batch * trainer.world_size))
    checkpointing = any(backbone.grad_checkpointing for backbone in model.backbones.values())
    configs = {name: _present_config(backbone) for name, backbone in model.backbones.items()}
    rates = _patch_drop_rates(trainer, model, per_epoch)
    proposal: Proposal | None = None
    if epochs is not None and budget is None:
        raise UserError("epochs: needs budget; trainer.max_epochs sets the length of a fit")
    if epochs is not None and not 0 < epochs < math.inf:
        raise UserError(f"epochs: expected a positive number, got {epochs}")
    most = epochs or _most_epochs(model)
    if budget is None:
        total, growths = _length_and_growths(trainer, model, per_epoch)
    elif rates and not _all_images(model):
        raise UserError("budget: not supported with PatchDropSchedule; remove the callback to plan a budget")
    else:
        if epochs is not None and per_epoch is None:
            raise UserError("epochs: unknown epoch length of streamed data")
        max_steps = math.inf if per_epoch is None else int(most * per_epoch)
        proposal = _propose(model, budget, per_step, max_steps)
        first = proposal.sizes[0]
        tokens = {kind: first.get(kind, 1) for kind in KINDS}  # kinds that the model lacks are ignored
        configs = {name: replace(config, param_tokens=tokens, depth=first["depth"]) for name, config in configs.items()}
        if _all_images(model):
            configs = {name: replace(config, patch_drop_rate=proposal.rates[0]) for name, config in configs.items()}
        growths, rates, total = proposal.growths, proposal.drops, proposal.steps
    rates_of = {name: rates if config.stem == "patch" else {} for name, config in configs.items()}
    planned = [
        plan_stages(config, growths, total, per_step[name], rates_of[name], checkpointing)
        for name, config in configs.items()
    ]
    by_stage = [list(parts) for parts in zip(*planned, strict=True)]
    stages = [_together(model, parts) for parts in by_stage]
    memory = [_training_memory(stage, parts, batches.values()) for stage, parts in zip(stages, by_stage, strict=True)]
    scratch = 0
    for name, config in configs.items():
        rate = [config.patch_drop_rate, *rates_of[name].values()][-1]
        whole = model_cost(replace(config, patch_drop_rate=rate), stages[-1].tokens, checkpointing)
        scratch += whole.training_flops * per_step[name] * total

    samples_of = " and ".join(f"{count} {name}".strip() for name, count in per_step.items())
    title = f"{total} optimizer steps of {samples_of} samples"
    kinds = {"depth", *models.param_tokens(model), *(kind for _, _, size in growths for kind in size)}
    _print_table(title, stages, memory, kinds, per_epoch, total, scratch)
    if proposal is not None and budget is not None:
        measured, result = MEASURED["images" if _all_images(model) else "text"]
        size = proposal.sizes[-1]
        read = total * _step_data_tokens(model, per_step)
        scale = Scale(_parameters(model, size), read, None if per_epoch is None else total / per_epoch)
        print(f"\n# settings for the config: {scale}\n# rule measured at {measured}: {result}")
        print(proposal.settings(GrowthRule()), end="")
        if per_epoch is not None and total > (measured.epochs or 0) * per_epoch:
            spent = sum(stage.training_flops for stage in stages) / budget
            print(
                f"note: {total / per_epoch:.2g} epochs (limit: {most:g}, set by --epochs; the rule was measured on "
                f"{measured.epochs:g}) use {spent:.2g} of the budget",
                file=sys.stderr,
            )
    return stages


def _propose(model: tasks.LitTask, budget: float, per_step: Mapping[str, int], max_steps: float) -> Proposal:
    """Propose the schedule for a budget of training FLOPs."""
    backbones, images = model.backbones, _all_images(model)

    def flops(size: Size, patch_drop: float) -> float:
        total = 0
        for name, one in backbones.items():
            config = replace(one.config, patch_drop_rate=patch_drop) if images else one.config
            total += model_cost(config, size, one.grad_checkpointing).training_flops * per_step[name]
        return total

    size = models.model_size(model)
    return propose(
        {kind: size[kind] for kind in (*models.param_tokens(model), "depth")},  # heads and hidden units stay
        deepens=all(backbone.config.norm_position != "post" for backbone in backbones.values()),
        budget=budget,
        step_flops=flops,
        step_data_tokens=_step_data_tokens(model, per_step),
        parameters=lambda size: _parameters(model, size),
        max_steps=max_steps,
        pattern=max(backbone.config.pattern_length for backbone in backbones.values()),
        images=images,
    )


def _parameters(model: tasks.LitTask, size: Size) -> int:
    """Non-embedding parameters at a size."""
    first = _present_config(next(iter(model.backbones.values())))  # tasks share their blocks
    twice = {**size, "depth": 2 * size["depth"]}  # embedding and head are the same at any depth
    return model_cost(first, twice).parameters - model_cost(first, size).parameters


def _step_data_tokens(model: tasks.LitTask, per_step: Mapping[str, int]) -> int:
    """Data tokens per optimizer step."""
    return sum(one.config.num_data_tokens * per_step[name] for name, one in model.backbones.items())


def _all_images(model: tasks.LitTask) -> bool:
    return all(backbone.config.stem == "patch" for backbone in model.backbones.values())


def _most_epochs(model: tasks.LitTask) -> float:
    return GrowthRule.image_epochs if _all_images(model) else GrowthRule.epochs


def _print_table(
    title: str,
    stages: list[Stage],
    memory: list[int],
    kinds: set[str],
    per_epoch: int | None,
    total: int,
    scratch: int,
) -> None:
    """Print a row per stage, their sum, and the final size trained from scratch."""
    from rich.console import Console
    from rich.table import Table

    sum_flops = sum(stage.training_flops for stage in stages)
    gibibytes = [f"{size / 2**30:.2f}" for size in memory]
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("stage", "size", "steps", "epochs", "params", "FLOPs\n/sample", "memory\n(GiB)", "FLOPs", "share"):
        is_size = name == "size"
        width = 11 if is_size else None
        justify: Any = "left" if is_size else "right"
        table.add_column(name, justify=justify, no_wrap=not is_size, min_width=width, vertical="bottom")
    for number, stage in enumerate(stages):
        table.add_row(
            str(number),
            ", ".join(f"{kind} {n}" for kind, n in stage.tokens.items() if kind in kinds) or "-",
            f"{stage.steps}",
            "-" if per_epoch is None else f"{stage.steps / per_epoch:.3g}",
            _shown_parameters(stage.cost),
            f"{stage.cost.flops:.3g}",
            gibibytes[number],
            f"{stage.training_flops:.3g}",
            f"{stage.training_flops / sum_flops:.1%}",
        )
    last = stages[-1].cost
    table.add_row("all", "", str(total), "", "", "", "", f"{sum_flops:.3g}", "")
    name, size = "scratch", "the final size from the start"
    row = (_shown_parameters(last), f"{last.flops:.3g}", gibibytes[-1], f"{scratch:.3g}")
    table.add_row(name, size, str(total), "", *row, "")
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 150)
    console.print(table)
    console.print(f"FLOPs of all stages: {sum_flops / scratch:.1%} of scratch", highlight=False)


def _shown_parameters(cost: ModelCost) -> str:
    active = f"\n({_count(cost.active_parameters)} active)" if cost.inactive else ""
    return f"{_count(cost.parameters)}{active}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M" if parameters >= 1e6 else f"{parameters / 1e3:,.1f} k"


def _steps_per_epoch(trainer: Trainer, batches: int) -> int:
    """Optimizer steps per epoch, given the batches of each process."""
    limit: float = trainer.limit_train_batches  # type: ignore[attr-defined]
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return -(-batches // trainer.accumulate_grad_batches)


def _scale(callback: Any, per_epoch: int | None) -> int:
    """Optimizer steps per unit of a callback's schedule."""
    if callback.unit == "epoch" and per_epoch is None:
        raise UserError("schedule: unknown epoch length of streamed data (got unit epoch, expected step)")
    return per_epoch or 1 if callback.unit == "epoch" else 1


def _patch_drop_rates(trainer: Trainer, model: tasks.LitTask, per_epoch: int | None) -> dict[int, float]:
    """Patch drop rates by the step from which each applies."""
    rates: dict[int, float] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, PatchDropSchedule):
            callback.setup(trainer, model, "fit")  # rejects what a fit would
            scale = _scale(callback, per_epoch)
            rates |= {key * scale: rate for key, rate in callback.schedule.items()}
    return rates


def _length_and_growths(trainer: Trainer, model: tasks.LitTask, per_epoch: int | None) -> tuple[int, list[Growth]]:
    """Optimizer steps and growth schedule of the config."""
    total = trainer.max_steps if trainer.max_steps >= 0 else 0
    if per_epoch is not None and (trainer.max_epochs or 0) > 0:
        by_epochs = per_epoch * (trainer.max_epochs or 0)
        total = min(total, by_epochs) if total else by_epochs
    if not total:
        raise UserError("trainer.max_steps: the length of the fit is unknown (expected max_steps or max_epochs)")
    growths: list[Growth] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ParameterGrowthCallback):
            scale = _scale(callback, per_epoch)
            callback.setup(trainer, model, "fit")  # rejects what a fit would
            growths += [(k, k * scale, tokens) for k, tokens in callback.remaining_stages(model)]
            beyond = [key for key in callback.schedule if callback.unit == "step" and key >= total]
            if beyond:
                raise UserError(f"schedule: step {beyond[0]} is beyond the end of the fit ({total} optimizer steps)")
    return total, growths


def _present_config(model: models.Tokenformer) -> models.TokenformerConfig:
    """Architecture of a model at its current size, which ``init_from`` may have changed."""
    return model.config.at_size(model.size)


def _together(model: tasks.LitTask, parts: list[Stage]) -> Stage:
    """Stage of all tasks of a model; its cost is that of one sample per task, shared parameters counted once.

    Args:
        model: The task at its initial size.
        parts: The stage for each task.
    """
    initial = sum(parameter.numel() for parameter in model.parameters())
    grown = parts[0].cost.parameters - model_cost(_present_config(next(iter(model.backbones.values())))).parameters
    cost = joint_cost((part.cost for part in parts), initial + grown)
    return replace(parts[0], cost=cost, training_flops=sum(part.training_flops for part in parts))


def _training_memory(stage: Stage, parts: list[Stage], batches: Iterable[int]) -> int:
    """Training memory of a stage in bytes, with the batch size of each task."""
    kept = [
        part.cost.training_memory(batch) - part.cost.training_memory(0)
        for part, batch in zip(parts, batches, strict=True)
    ]
    return stage.cost.training_memory(0) + sum(kept)

"""What a fit would cost, stage by stage; and a schedule of growth for a budget of training operations."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import yaml
from lightning.pytorch import LightningDataModule

from callbacks import ParameterGrowthCallback, PatchDropSchedule
from lit_tokenformer import models, tasks
from lit_tokenformer.cost import Stage, model_cost, plan_stages
from lit_tokenformer.errors import UserError
from lit_tokenformer.models.config import KINDS
from lit_tokenformer.tasks.multitask import joint_cost
from lit_tokenformer.trainer import CheckpointingTrainer

FEW_EPOCHS = 1
"""How often data were read at most where the rule was measured."""


@dataclass(frozen=True)
class GrowthRule:
    """How a model grows on a budget, as ``benchmarks/growth`` measured it.

    Args:
        depth: Blocks at birth, as a share of the final ones.
        tokens: Parameter tokens of each stage as shares of the final ones, for models whose blocks cannot be inserted.
        at: Shares of the optimizer steps at which the stages after the first begin, where depth grows.
        tokens_at: The same where tokens grow.
        data_tokens_per_parameter: Data tokens that a fit should see for each parameter of the final size, embedding and
            head not counted; with fewer, a smaller size from scratch was better.
        decay: Share of the steps over which the learning rate falls at the end.
        epochs: Most passes over text; more are worth less and less (arXiv 2305.16264, section 6).
        image_epochs: Most passes over images, which are augmented; those of the published ImageNet recipe.
    """

    depth: float = 1 / 3
    tokens: tuple[float, ...] = (0.25, 0.5, 1.0)
    at: tuple[float, ...] = (0.3,)
    tokens_at: tuple[float, ...] = (0.1, 0.25)
    data_tokens_per_parameter: float = 60.0
    decay: float = 0.4
    epochs: float = 4.0
    image_epochs: float = 300.0


Size = dict[str, int]
"""Parameter tokens of each kind, and ``depth``."""


@dataclass(frozen=True)
class Proposal:
    """A schedule of growth.

    Args:
        sizes: The size at each stage.
        starts: The steps at which the stages after the first begin.
        steps: Optimizer steps of the fit.
    """

    sizes: list[Size]
    starts: list[int]
    steps: int

    def settings(self, rule: GrowthRule) -> str:
        """What to write into a config, in YAML."""
        changes = [
            {name: total for name, total in after.items() if before[name] != total}
            for before, after in itertools.pairwise(self.sizes)
        ]
        growth = {"unit": "step", "schedule": dict(zip(self.starts, changes, strict=True))}
        rate = {"name": "wsd", "warmup": 0.05, "decay": rule.decay, "unit": "share"}
        trainer = {
            "max_steps": self.steps,
            "max_epochs": -1,
            "callbacks": [{"class_path": "callbacks.ParameterGrowthCallback", "init_args": growth}],
        }
        birth = {"depth": self.sizes[0]["depth"], "param_tokens": _tokens(self.sizes[0])}
        return yaml.safe_dump(
            {"trainer": trainer, "model": {"init_args": {"overrides": birth, "schedule": rate}}}, sort_keys=False
        )


def propose(
    birth: Size,
    deepens: bool,
    budget: float,
    step_flops: Callable[[Size], float],
    step_data_tokens: int,
    parameters: Callable[[Size], int],
    rule: GrowthRule = GrowthRule(),
    max_steps: float = math.inf,
    pattern: int = 1,
) -> Proposal:
    """The most parameter tokens that a budget is enough for at a given depth, and the way to them.

    Args:
        birth: Depth at the end, and parameter tokens whose proportions the proposal keeps.
        deepens: Whether blocks can be inserted; else tokens grow.
        budget: Operations of all training steps.
        step_flops: Operations of an optimizer step at a size.
        step_data_tokens: Data tokens in an optimizer step.
        parameters: Parameters at a size, embedding and head not counted.
        rule: What was measured.
        max_steps: Most optimizer steps, by how often the data may be read.
        pattern: Blocks in a repeat of those that differ; depth grows by whole repeats.

    Raises:
        ValueError: If the model cannot grow, or if the budget is too small.

    Example:
        >>> size = {"qkv": 2, "ffn": 8, "depth": 6}
        >>> flops = lambda size: 100.0 * size["qkv"] * size["depth"]
        >>> found = propose(size, True, 1e8, flops, 10, lambda size: size["qkv"] * size["depth"], GrowthRule())
        >>> found.sizes, found.starts, found.steps
        ([{'qkv': 72, 'ffn': 288, 'depth': 2}, {'qkv': 72, 'ffn': 288, 'depth': 6}], [868], 2893)
    """
    unit = {kind: total // math.gcd(*_tokens(birth).values()) for kind, total in _tokens(birth).items()}
    if not unit:
        raise UserError("budget: the model has no Pattention layer whose tokens could be chosen (projection: linear)")
    if not 0 < budget < math.inf:
        raise UserError(f"budget: expected a number of operations above 0, got {budget}")
    depth = birth["depth"]
    first = pattern * max(1, round(rule.depth * depth / pattern))
    deepens = deepens and first < depth
    shares, at = (rule.tokens, rule.tokens_at) if not deepens else ((1.0, 1.0), rule.at)
    depths = [first, depth] if deepens else [depth] * len(shares)
    whole = round(1 / min(shares))  # multiples of this can be divided into the shares

    def at_size(size: int) -> Proposal:
        sizes = [
            {**{kind: round(share * size) * count for kind, count in unit.items()}, "depth": blocks}
            for share, blocks in zip(shares, depths, strict=True)
        ]
        lengths = [end - start for start, end in zip((0.0, *at), (*at, 1.0), strict=True)]
        steps = int(budget / sum(length * step_flops(one) for length, one in zip(lengths, sizes, strict=True)))
        steps = int(min(steps, max_steps))
        return Proposal(sizes, [round(share * steps) for share in at], steps)

    def is_enough(size: int) -> bool:
        found = at_size(size)
        rises = all(one < other for one, other in itertools.pairwise([0, *found.starts, found.steps]))
        seen = found.steps * step_data_tokens
        return rises and seen >= rule.data_tokens_per_parameter * parameters(found.sizes[-1])

    low, high = 0, 1
    while is_enough(high * whole):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_enough(middle * whole) else (low, middle)
    if not low:
        found = at_size(whole)
        told = ", ".join(f"{kind} {total}" for kind, total in found.sizes[-1].items())
        raise UserError(
            f"budget: {budget:.3g} operations are {found.steps} steps of the smallest schedule (at its end {told}"
            f"{', at most so many by the data' if found.steps == max_steps else ''}), less than "
            f"{rule.data_tokens_per_parameter:g} data tokens a parameter; give "
            f"{'more data' if found.steps == max_steps else 'more'}, or a smaller model"
        )
    rounded = low - low % 8 if low > 32 else low  # multiples of 8 are faster
    return at_size(rounded * whole)


def _tokens(size: Mapping[str, int]) -> dict[str, int]:
    return {kind: total for kind, total in size.items() if kind != "depth"}


class PlanningTrainer(CheckpointingTrainer):
    """Lightning's trainer, which can also say what a fit would cost."""

    def plan(
        self, model: tasks.LitTask, datamodule: LightningDataModule | None = None, budget: float | None = None
    ) -> list[Stage]:
        """Shows what each stage of a fit costs, before it is run; with a budget, of a schedule that is proposed for it.

        Args:
            model: The task, at the size it is born with.
            datamodule: Its data; what is read of them is the number of training samples.
            budget: Operations of all training steps together. Parameter tokens, growths and length of the fit are
                chosen for it and told as YAML; the config's own are left out. Width, depth at the end, data and batches
                are the config's.

        Returns:
            The stages, which are printed too.

        Raises:
            ValueError: If the number of steps cannot be told, the budget is too small, or a fit would refuse the
                schedule.
        """
        if not isinstance(model, tasks.LitTask):
            raise UserError(
                f"model: plan knows no cost of a {type(model).__name__} (expected a task of lit_tokenformer)"
            )
        from rich.console import Console
        from rich.table import Table

        samples = getattr(datamodule, "num_train_samples", None)
        batch = getattr(datamodule, "batch_size", 1)
        batches = {
            name: getattr(getattr(datamodule, name) if name else datamodule, "batch_size", 1)
            for name in model.backbones
        }
        per_step = {name: size * self.accumulate_grad_batches * self.world_size for name, size in batches.items()}
        per_epoch = None if samples is None else self._steps_per_epoch(samples // (batch * self.world_size))
        checkpointing = any(backbone.grad_checkpointing for backbone in model.backbones.values())
        born = models.param_tokens(model)
        configs = {name: _present_config(backbone) for name, backbone in model.backbones.items()}
        growths: list[tuple[int, int, dict[str, int]]] = []
        rates = self._patch_drop_rates(per_epoch, model)
        proposal: Proposal | None = None
        if budget is not None and rates:
            raise UserError("budget: no schedule is proposed beside a PatchDropSchedule; plan without it")
        if budget is not None:

            def flops(size: Size) -> float:
                costs = {
                    name: model_cost(backbone.config, size, backbone.grad_checkpointing)
                    for name, backbone in model.backbones.items()
                }
                return sum(cost.training_flops * per_step[name] for name, cost in costs.items())

            def parameters(size: Size) -> int:
                config = next(iter(configs.values()))  # tasks share their blocks
                twice = {**size, "depth": 2 * size["depth"]}  # embedding and head are the same at any depth
                return model_cost(config, twice).parameters - model_cost(config, size).parameters

            data_tokens = sum(config.num_data_tokens * per_step[name] for name, config in configs.items())
            pattern = max(config.pattern_length for config in configs.values())
            deepens = all(config.norm_position != "post" for config in configs.values())
            size = models.model_size(model)
            images = all(config.stem == "patch" for config in configs.values())
            epochs = GrowthRule.image_epochs if images else GrowthRule.epochs
            most = math.inf if per_epoch is None else epochs * per_epoch
            proposal = propose(size, deepens, budget, flops, data_tokens, parameters, max_steps=most, pattern=pattern)
            first = proposal.sizes[0]
            tokens = {kind: first.get(kind, 1) for kind in KINDS}  # a kind that it lacks means nothing
            configs = {
                name: dataclasses.replace(config, param_tokens=tokens, depth=first["depth"])
                for name, config in configs.items()
            }
            growths = [(step, step, size) for step, size in zip(proposal.starts, proposal.sizes[1:], strict=True)]
            total = proposal.steps
        else:
            total, growths = self._length_and_growths(per_epoch, model)
        planned = [
            plan_stages(
                config, growths, total, per_step[name], rates if config.stem == "patch" else None, checkpointing
            )
            for name, config in configs.items()
        ]
        by_stage = [list(parts) for parts in zip(*planned, strict=True)]
        stages = [_together(model, parts) for parts in by_stage]
        memory = [
            f"{_training_memory(stage, parts, batches.values()) / 2**30:.2f} GiB"
            for stage, parts in zip(stages, by_stage, strict=True)
        ]
        sum_flops = sum(stage.training_flops for stage in stages)
        scratch = 0
        for name, config in configs.items():
            rate = [config.patch_drop_rate, *(rates.values() if config.stem == "patch" else ())][-1]
            whole = model_cost(dataclasses.replace(config, patch_drop_rate=rate), stages[-1].tokens, checkpointing)
            scratch += whole.training_flops * per_step[name] * total

        told = " and ".join(f"{count} {name}".strip() for name, count in per_step.items())
        table = Table(title=f"{total} optimizer steps of {told} samples")
        for name in ("stage", "tokens", "steps", "epochs", "parameters", "FLOPs/sample", "memory", "FLOPs", "share"):
            table.add_column(name, justify="right")
        for number, stage in enumerate(stages):
            table.add_row(
                str(number),
                ", ".join(f"{kind} {n}" for kind, n in stage.tokens.items() if kind in (*born, "depth")) or "-",
                f"{stage.steps}",
                "-" if per_epoch is None else f"{stage.steps / per_epoch:.3g}",
                f"{stage.cost.parameters:,}",
                f"{stage.cost.flops:.3g}",
                memory[number],
                f"{stage.training_flops:.3g}",
                f"{stage.training_flops / sum_flops:.1%}",
            )
        last = stages[-1].cost
        table.add_section()
        table.add_row(
            "all", "", str(total), "", "", "", "", f"{sum_flops:.3g}", f"{sum_flops / scratch:.1%} of scratch"
        )
        table.add_row(
            "scratch",
            "the final size from the start",
            str(total),
            "",
            f"{last.parameters:,}",
            f"{last.flops:.3g}",
            memory[-1],
            f"{scratch:.3g}",
            "",
        )
        Console(width=None if sys.stdout.isatty() else 150).print(table)
        if proposal is not None and budget is not None:
            print(f"\n# what to write into the config\n{proposal.settings(GrowthRule())}", end="")
            if per_epoch is not None and total > FEW_EPOCHS * per_epoch:
                print(
                    f"note: {total / per_epoch:.2g} epochs (at most {epochs:g} are proposed; the rule was measured on "
                    f"{FEW_EPOCHS}) use {sum_flops / budget:.2g} of the budget",
                    file=sys.stderr,
                )
        return stages

    def _steps_per_epoch(self, batches: int) -> int:
        """Optimizer steps of an epoch of so many batches for each process."""
        limit: float = self.limit_train_batches  # type: ignore[attr-defined]
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return -(-batches // self.accumulate_grad_batches)

    def _patch_drop_rates(self, per_epoch: int | None, model: tasks.LitTask) -> dict[int, float]:
        """The steps from which another share of the patches is left out."""
        rates: dict[int, float] = {}
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PatchDropSchedule):
                callback.setup(self, model, "fit")  # refuses what a fit would
                if callback.unit == "epoch" and per_epoch is None:
                    raise UserError("schedule: epochs of a stream have no known length; use unit: step")
                scale = per_epoch or 1 if callback.unit == "epoch" else 1
                rates |= {key * scale: rate for key, rate in callback.schedule.items()}
        return rates

    def _length_and_growths(
        self, per_epoch: int | None, model: tasks.LitTask
    ) -> tuple[int, list[tuple[int, int, dict[str, int]]]]:
        """Optimizer steps and growths of the config."""
        total = self.max_steps if self.max_steps >= 0 else 0
        if per_epoch is not None and (self.max_epochs or 0) > 0:
            by_epochs = per_epoch * (self.max_epochs or 0)
            total = min(total, by_epochs) if total else by_epochs
        if not total:
            raise UserError("trainer.max_steps: the length of the fit is not known; set max_steps, or max_epochs")
        growths: list[tuple[int, int, dict[str, int]]] = []
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ParameterGrowthCallback):
                if callback.unit == "epoch" and per_epoch is None:
                    raise UserError("schedule: epochs of a stream have no known length; use unit: step")
                scale = per_epoch or 1 if callback.unit == "epoch" else 1
                callback.setup(self, model, "fit")  # refuses what a fit would
                growths += [(k, k * scale, tokens) for k, tokens in callback.remaining_stages(model)]
                beyond = [key for key in callback.schedule if callback.unit == "step" and key >= total]
                if beyond:
                    raise UserError(
                        f"schedule: step {beyond[0]} is beyond the end of the fit ({total} optimizer steps)"
                    )
        return total, growths


def _present_config(model: models.Tokenformer) -> models.TokenformerConfig:
    """The architecture of a model at its present size, which ``init_from`` may have set."""
    tokens = {**dict(model.config.tokens.items()), **model.param_tokens}
    return dataclasses.replace(model.config, param_tokens=tokens, depth=len(model.blocks))


def _together(model: tasks.LitTask, parts: list[Stage]) -> Stage:
    """One stage of all tasks of a model; its cost is of one sample of each, parameters that they share counted once.

    Args:
        model: The task at the size it is born with.
        parts: The stage, for each task.
    """
    born = sum(parameter.numel() for parameter in model.parameters())
    grown = parts[0].cost.parameters - model_cost(_present_config(next(iter(model.backbones.values())))).parameters
    cost = joint_cost((part.cost for part in parts), born + grown)
    return dataclasses.replace(parts[0], cost=cost, training_flops=sum(part.training_flops for part in parts))


def _training_memory(stage: Stage, parts: list[Stage], batches: Iterable[int]) -> int:
    """Bytes that a stage takes with a batch of this size for each task."""
    kept = [
        part.cost.training_memory(batch) - part.cost.training_memory(0)
        for part, batch in zip(parts, batches, strict=True)
    ]
    return stage.cost.training_memory(0) + sum(kept)

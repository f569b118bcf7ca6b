"""Growth plans: the cost of a fit stage by stage, and a growth schedule for a compute budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import yaml

from lit_tokenformer.cost import ModelCost, model_cost
from lit_tokenformer.errors import UserError
from lit_tokenformer.models import TokenformerConfig
from lit_tokenformer.models.config import KINDS

Growth = tuple[int, int, dict[str, int]]
"""Key in the schedule, the optimizer step at which it is due, and the totals of each kind."""


@dataclass(frozen=True)
class Stage:
    """The part of a training run between two growths.

    Args:
        start: The epoch or step at which it begins.
        steps: Optimizer steps in it.
        tokens: Parameter tokens of each kind.
        cost: What the model costs at this size, at the beginning of the stage.
        training_flops: Operations of all its steps together.
    """

    start: int
    steps: int
    tokens: dict[str, int]
    cost: ModelCost
    training_flops: int


def plan_stages(
    config: TokenformerConfig,
    growths: Sequence[Growth],
    total_steps: int,
    samples_per_step: int,
    patch_drop_rates: Mapping[int, float] | None = None,
    checkpointing: bool = False,
) -> list[Stage]:
    """Split a run into stages and compute what each costs.

    Args:
        config: The initial architecture.
        growths: The growths in order.
        total_steps: Optimizer steps of the whole run.
        samples_per_step: Samples in one optimizer step, over all processes.
        patch_drop_rates: Steps in rising order, from each of which another share of the patches is left out.
        checkpointing: Whether blocks are computed again in the backward pass.

    Returns:
        One stage more than there are growths; the last one's size is the final one.
    """
    named = {kind for _, _, size in growths for kind in size} - {"depth"}
    initial = {kind: total for kind, total in config.size.items() if kind in KINDS or kind in named}
    starts = [(0, 0, initial), *growths]
    ends = [min(step, total_steps) for _, step, _ in growths] + [total_steps]
    rates = {0: config.patch_drop_rate, **(patch_drop_rates or {})}
    stages = []
    for (key, first, tokens), last in zip(starts, ends, strict=True):
        end = max(first, last)

        def cost(step: int, tokens: dict[str, int] = tokens) -> ModelCost:
            rate = next(rate for begin, rate in reversed(rates.items()) if begin <= step)
            return model_cost(replace(config, patch_drop_rate=rate), tokens, checkpointing)

        marks = [first, *(step for step in rates if first < step < end), end]
        flops = sum(cost(begin).training_flops * (until - begin) for begin, until in itertools.pairwise(marks))
        stages.append(Stage(key, end - first, tokens, cost(first), flops * samples_per_step))
    return stages


FEW_EPOCHS = 1
"""How often data were read at most where the rule was measured."""


@dataclass(frozen=True)
class GrowthRule:
    """How a model grows on a budget, as ``benchmarks/growth_study`` measured it.

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

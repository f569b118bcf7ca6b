"""Growth plans: the cost of a fit by stage, and a growth schedule for a compute budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from lit_tokenformer.cost import ModelCost, model_cost
from lit_tokenformer.errors import UserError
from lit_tokenformer.models import TokenformerConfig
from lit_tokenformer.models.config import KINDS

Growth = tuple[int, int, dict[str, int]]
"""Key in the schedule, its optimizer step, and the totals by kind."""


@dataclass(frozen=True)
class Stage:
    """Stage of a training run between two growths.

    Args:
        start: First epoch or step.
        steps: Number of optimizer steps.
        tokens: Parameter tokens by kind.
        cost: Cost of the model at the start of the stage.
        training_flops: Training FLOPs of all steps.
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
    """Split a run into stages and compute the cost of each.

    Args:
        config: Initial architecture.
        growths: Growths in order.
        total_steps: Optimizer steps of the run.
        samples_per_step: Samples per optimizer step over all processes.
        patch_drop_rates: Patch drop rates by the step from which each applies, in ascending order.
        checkpointing: Recompute blocks in the backward pass (activation checkpointing).

    Returns:
        The initial stage, and one per growth.
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


@dataclass(frozen=True)
class Scale:
    """Scale of a run.

    Args:
        parameters: Non-embedding parameters of the final size.
        data_tokens: Data tokens read.
        epochs: Epochs over the training data; ``None`` if unknown.
    """

    parameters: int
    data_tokens: int
    epochs: float | None

    def __str__(self) -> str:
        epochs = "" if self.epochs is None else f", {self.epochs:.2g} epochs"
        parameters, read = self.parameters / 1e6, self.data_tokens / 1e6
        return f"{parameters:.3g} M non-embedding parameters, {read:.3g} M data tokens{epochs}"


MEASURED = {
    "text": (
        Scale(49_152, 2_870_784, 0.3),
        "at equal loss 0.80 to 0.97 of the FLOPs of training from scratch with AdamW, 1.0 with Muon",
    ),
    "images": (
        Scale(8_192, 7_370_752, 7.7),
        "0.51 (AdamW) to 0.69 (Muon) of the FLOPs of using all patches at equal loss",
    ),
}
"""Scale and result of ``benchmarks/growth_study`` and ``benchmarks/baselines``, in which the rule was measured."""


@dataclass(frozen=True)
class GrowthRule:
    """Schedule as a function of the compute budget, measured in ``benchmarks/growth_study`` and ``baselines``.

    Text grows. Images drop patches: growth saved nothing on them.

    Args:
        depth: Initial depth as a share of the final depth.
        tokens: Parameter tokens per stage as shares of the final ones, for models without inserted blocks.
        at: Shares of the optimizer steps at which depth grows.
        tokens_at: Shares of the optimizer steps at which tokens grow.
        data_tokens_per_parameter: Minimum number of data tokens per non-embedding parameter of the final size; below
            it, a smaller size from scratch was better.
        decay: Share of the steps over which the learning rate decays.
        patch_drop: Patch drop rate of images before the last stage.
        patches_at: Share of the steps from which all patches are used.
        epochs: Maximum number of epochs over text; more have diminishing returns (arXiv 2305.16264, section 6).
        image_epochs: Maximum number of epochs over augmented images, as in the published ImageNet recipe.
    """

    depth: float = 1 / 3
    tokens: tuple[float, ...] = (0.25, 0.5, 1.0)
    at: tuple[float, ...] = (0.3,)
    tokens_at: tuple[float, ...] = (0.1, 0.25)
    data_tokens_per_parameter: float = 60.0
    decay: float = 0.4
    patch_drop: float = 0.75
    patches_at: float = 0.65
    epochs: float = 4.0
    image_epochs: float = 300.0


Size = dict[str, int]
"""Parameter tokens by kind, and ``depth``."""


@dataclass(frozen=True)
class Proposal:
    """Proposed schedule of a fit.

    Args:
        sizes: Size of each stage.
        starts: First step of each stage after the first.
        steps: Optimizer steps of the fit.
        rates: Patch drop rate of each stage.
    """

    sizes: list[Size]
    starts: list[int]
    steps: int
    rates: list[float]

    @property
    def growths(self) -> list[Growth]:
        """Growths of parameter tokens and blocks."""
        changes = zip(self.starts, itertools.pairwise(self.sizes), strict=True)
        return [(start, start, after) for start, (before, after) in changes if before != after]

    @property
    def drops(self) -> dict[int, float]:
        """Patch drop rates by the step from which each applies, where they change."""
        changes = zip(self.starts, itertools.pairwise(self.rates), strict=True)
        return {start: after for start, (before, after) in changes if before != after}

    def settings(self, rule: GrowthRule) -> str:
        """Format the schedule as settings of a config, in YAML."""
        size, callbacks = self.sizes[0], []
        schedule = {}
        for step, _, after in self.growths:
            schedule[step] = {name: total for name, total in after.items() if size[name] != total}
            size = after
        if schedule:
            growth = {"unit": "step", "schedule": schedule}
            callbacks.append({"class_path": "callbacks.ParameterGrowthCallback", "init_args": growth})
        initial: dict[str, Any] = {"depth": self.sizes[0]["depth"], "param_tokens": _tokens(self.sizes[0])}
        if self.drops:
            dropping = {"unit": "step", "schedule": self.drops}
            callbacks.append({"class_path": "callbacks.PatchDropSchedule", "init_args": dropping})
            initial["patch_drop_rate"] = self.rates[0]
        rate = {"name": "wsd", "warmup": 0.05, "decay": rule.decay, "unit": "share"}
        trainer = {"max_steps": self.steps, "max_epochs": -1, "callbacks": callbacks}
        return yaml.safe_dump(
            {"trainer": trainer, "model": {"init_args": {"overrides": initial, "schedule": rate}}}, sort_keys=False
        )


def propose(
    target: Size,
    deepens: bool,
    budget: float,
    step_flops: Callable[[Size, float], float],
    step_data_tokens: int,
    parameters: Callable[[Size], int],
    rule: GrowthRule = GrowthRule(),
    max_steps: float = math.inf,
    pattern: int = 1,
    images: bool = False,
) -> Proposal:
    """Propose the largest number of parameter tokens within a compute budget, and the schedule of the fit.

    Args:
        target: Final depth, and parameter tokens; the proposal keeps the ratios between kinds.
        deepens: Grow depth by inserting blocks; otherwise grow tokens.
        budget: Compute budget in training FLOPs.
        step_flops: Training FLOPs per optimizer step at a size and a patch drop rate.
        step_data_tokens: Data tokens per optimizer step.
        parameters: Non-embedding parameters at a size.
        rule: Growth rule.
        max_steps: Maximum number of optimizer steps, from the limit on epochs.
        pattern: Blocks per repetition of the block pattern; depth grows by whole repetitions.
        images: Drop patches instead of growing.

    Returns:
        Stages and length of the fit.

    Raises:
        UserError: If the model cannot grow, or the budget is too small.

    Example:
        >>> size = {"qkv": 2, "ffn": 8, "depth": 6}
        >>> flops = lambda size, patch_drop: 100.0 * size["qkv"] * size["depth"]
        >>> found = propose(size, True, 1e8, flops, 10, lambda size: size["qkv"] * size["depth"], GrowthRule())
        >>> found.sizes, found.starts, found.steps
        ([{'qkv': 72, 'ffn': 288, 'depth': 2}, {'qkv': 72, 'ffn': 288, 'depth': 6}], [868], 2893)
    """
    unit = {kind: total // math.gcd(*_tokens(target).values()) for kind, total in _tokens(target).items()}
    if not unit:
        raise UserError("budget: the model has no Pattention layers (got projection linear, expected pattention)")
    if not 0 < budget < math.inf:
        raise UserError(f"budget: expected a positive number of FLOPs, got {budget}")
    depth = target["depth"]
    first = pattern * max(1, round(rule.depth * depth / pattern))
    deepens = deepens and first < depth and not images
    shares, at = ((1.0, 1.0), rule.at) if deepens else (rule.tokens, rule.tokens_at)
    if images:
        shares, at = (1.0, 1.0), (rule.patches_at,)
    depths = [first, depth] if deepens else [depth] * len(shares)
    rates = [rule.patch_drop, 0.0] if images else [0.0] * len(shares)
    whole = round(1 / min(shares))  # multiples of it divide exactly into the shares

    def at_size(size: int) -> Proposal:
        sizes = [
            {**{kind: round(share * size) * count for kind, count in unit.items()}, "depth": blocks}
            for share, blocks in zip(shares, depths, strict=True)
        ]
        lengths = [end - start for start, end in zip((0.0, *at), (*at, 1.0), strict=True)]
        mean = sum(length * step_flops(one, rate) for length, one, rate in zip(lengths, sizes, rates, strict=True))
        steps = int(min(int(budget / mean), max_steps))
        return Proposal(sizes, [round(share * steps) for share in at], steps, rates)

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
        final = ", ".join(f"{kind} {total}" for kind, total in found.sizes[-1].items())
        raise UserError(
            f"budget: {budget:.3g} FLOPs are {found.steps} steps of the smallest schedule (final size {final}"
            f"{', steps limited by the data' if found.steps == max_steps else ''}), fewer than "
            f"{rule.data_tokens_per_parameter:g} data tokens per parameter; "
            f"{'add data' if found.steps == max_steps else 'raise the budget'} or reduce the model"
        )
    rounded = low - low % 8 if low > 32 else low  # multiples of 8 are faster
    return at_size(rounded * whole)


def _tokens(size: Mapping[str, int]) -> dict[str, int]:
    return {kind: total for kind, total in size.items() if kind != "depth"}

"""A family of three sizes: a ladder of growths with annealed branches, and nested sizes, against training each size.

Every size is wanted at the loss of its own training from scratch, on a budget that suits it. A ladder trains the
smallest size at a constant learning rate, grows from the last checkpoint of this stable phase, and so on; every size is
annealed on a branch of its own. A run that is stable up to a step and then decays is the branch from a checkpoint at
that step, bit for bit, so each size is one run here, and the shared stable phases count once.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch

from benchmarks.growth_study.__main__ import Study
from benchmarks.growth_study.arms import Arm, Domain, depth_ladder, load_arms
from benchmarks.growth_study.outcome import Findings, Outcome, spread
from lit_tokenformer.cost import model_cost
from lit_tokenformer.models import Tokenformer, TokenformerConfig

BUDGETS = (0.25, 0.5, 1.0)
"""Budget of each size from scratch, as shares of C; each beats the other sizes on it."""
FURTHER = (0.4, 0.6)
"""Costs of each further size of a ladder, as shares of its cost from scratch."""
ANNEALED = 0.5
"""Share of the steps of a further size that belongs to its branch."""
OPTIMIZER: dict[str, Any] = {"class_path": "lit_tokenformer.optim.MuonWithAuxAdam"}
"""Optimizer of all arms, by the result of ``python -m benchmarks.baselines muon``."""
DECAY = 0.4
"""Share of the steps from scratch over which the learning rate decays, by the same result."""
NEW_ROWS = {"new_state": "reset_copies", "ramp_steps": 250, "new_updates": 1.3}
"""State and updates of new rows (SPARKLING, arXiv 2602.02472, Table 7)."""


@cache
def update_flops(config: TokenformerConfig) -> int:
    """FLOPs of an update by Muon: five Newton-Schulz steps of three products for each matrix of the blocks."""
    with torch.device("meta"):
        blocks = Tokenformer(config).blocks
    found = 0
    for parameter in blocks.parameters():
        if parameter.ndim == 2:
            few, many = sorted(parameter.shape)
            found += 5 * (4 * few**2 * many + 2 * few**3)
    return found


def tflops(one: Outcome, domain: Domain) -> float:
    """FLOPs of a run in TFLOP, those of Muon's updates included."""
    if not one.arm.optimizer:
        return one.tflops
    ends = [*one.arm.starts(domain), one.arm.steps(domain)]
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    updates = [update_flops(config) for config in one.arm.configs(domain)]
    return one.tflops + sum(count * each for count, each in zip(lengths, updates, strict=True)) / 1e12


def step_flops(arm: Arm, domain: Domain) -> list[int]:
    """FLOPs of an optimizer step of an arm at each stage, its updates included."""
    return [
        model_cost(config).training_flops * domain.batch_size + (update_flops(config) if arm.optimizer else 0)
        for config in arm.configs(domain)
    ]


@dataclass(frozen=True)
class Ladder:
    """Three sizes of one architecture.

    Args:
        name: What grows.
        domain: Data and budget C.
        scratch: The arm from scratch of each size, with its schedule and optimizer.
        growth: Settings of the growth callback.
    """

    name: str
    domain: Domain
    scratch: tuple[Arm, ...]
    growth: dict[str, Any]

    @cached_property
    def costs(self) -> list[float]:
        """FLOPs of an optimizer step at each size."""
        return [step_flops(arm, self.domain)[0] for arm in self.scratch]

    @property
    def separate(self) -> float:
        """FLOPs of all sizes from scratch."""
        return sum(arm.steps(self.domain) * cost for arm, cost in zip(self.scratch, self.costs, strict=True))

    def stages(self, further: float) -> list[tuple[int, int]]:
        """Steps of the stable phase and of the branch at each size."""
        found = []
        for number, arm in enumerate(self.scratch):
            length = arm.steps(self.domain) * (further if number else 1.0)
            branch = length * (ANNEALED if number else arm.schedule["decay"])
            found.append((round(length - branch), round(branch)))
        return found

    def flops(self, further: float) -> float:
        """FLOPs of the whole ladder; shared phases count once."""
        return sum(sum(steps) * cost for steps, cost in zip(self.stages(further), self.costs, strict=True))

    def arms(self, further: float, lr: float) -> list[Arm]:
        """Build the run that ends at each size after the first."""
        stages = self.stages(further)
        warmup = round(0.05 * sum(stages[0]))
        found = []
        for last in range(1, len(stages)):
            lengths = [stable for stable, _ in stages[: last + 1]]
            branch = stages[last][1]
            total = sum(lengths) + branch
            starts = [sum(lengths[:number]) for number in range(1, last + 1)]
            arm = replace(
                self.scratch[last],
                name=f"{self.name}, further sizes at {further:.0%}, size {last + 1}",
                sizes=tuple(size.sizes[0] for size in self.scratch[: last + 1]),
                at=tuple(start / total for start in starts),
                growth=self.growth,
                schedule={"warmup": warmup, "decay": branch, "unit": "step"},
                length=total,
                lr=lr,
            )
            assert arm.starts(self.domain) == starts
            found.append(arm)
        return found

    def nested(self, lr: float) -> Arm:
        """Build the fit of nested sizes with the steps of the final size from scratch."""
        nesting = {"sizes": self.nested_shares, "distill": 0.0, "sort": False}
        callback = {"class_path": "callbacks.NestedSizes", "init_args": nesting}
        return replace(self.scratch[-1], name=f"{self.name}, nested sizes", callbacks=(callback,), lr=lr)

    @property
    def nested_shares(self) -> list[float]:
        """Parameter tokens of the smaller sizes, as shares of those of the final size."""
        *others, final = (arm.sizes[0]["param_tokens"] for arm in self.scratch)
        return [count / final for count in others]

    @property
    def nested_flops(self) -> float:
        """FLOPs of :meth:`nested`: each step trains the final size and one of the others in turn."""
        *others, final = self.costs
        return self.scratch[-1].steps(self.domain) * (final + statistics.mean(others))


def ladders(domain: Domain) -> list[Ladder]:
    """Build the ladders of a domain: hidden units of the linear twin, blocks where there are three sizes of depth, and
    parameter tokens, which come last."""
    controls = [one for one in load_arms(domain)["controls"] if not one.at]

    def build(name: str, sizes: Sequence[dict[str, Any]], growth: dict[str, Any], twin: bool = False) -> Ladder:
        first = next(one for one in controls if one.twin == twin)
        control = replace(first, schedule={"decay": DECAY}, optimizer=OPTIMIZER)
        scratch = [
            replace(control, name=f"from scratch, {label(size, domain)}", sizes=(size,), share=share)
            for size, share in zip(sizes, BUDGETS, strict=True)
        ]
        return Ladder(name, domain, tuple(scratch), growth)

    ratios = [{"mlp_ratio": share * domain.twin_base["mlp_ratio"]} for share in (0.25, 0.5, 1)]
    tokens = [{"param_tokens": count} for count in domain.ladder]
    found = [build("hidden units", ratios, NEW_ROWS, twin=True)]
    if domain.base["depth"] == len(BUDGETS):
        blocks = [*depth_ladder(domain, 1, 2), tokens[-1]]
        found.append(build("blocks", blocks, {"new_state": "reset_copies"}))
    return [*found, build("tokens", tokens, NEW_ROWS)]


def as_nested(arm: Arm, domain: Domain, final: Arm) -> Arm:
    """Give a smaller size the steps of the final size, which are those of the nested sizes."""
    return replace(arm, name=f"{arm.name}, as many steps as nested", length=final.steps(domain))


def label(size: Mapping[str, Any], domain: Domain) -> str:
    """Name a size."""
    if "mlp_ratio" in size:
        return f"{size['mlp_ratio'] * {**domain.base, **domain.twin_base}['dim']:.0f} hidden units"
    blocks = f", {size['depth']} block" + "s" * (size["depth"] > 1) if "depth" in size else ""
    return f"{size['param_tokens']} tokens{blocks}"


def family(study: Study) -> Iterator[None]:
    """Train all sizes from scratch, by the ladders and nested; yields after each phase."""
    seeds = study.options.seeds
    *others, tokens = ladders(study.domain)
    if study.options.reduced:
        rate = study.domain.rates[0]
        scratch = [replace(arm, lr=rate) for arm in tokens.scratch]
        study.train("final", [*scratch, *tokens.arms(FURTHER[0], rate)], seeds)
        return
    for ladder in (*others, tokens):
        scratch = study.halved(study.with_rates(ladder.scratch))
        study.train("final", scratch, seeds)
        yield
        rates = sorted({arm.lr for arm in scratch} | {min(arm.lr for arm in scratch) / 2})
        tried = study.train("learning rate", [ladder.arms(FURTHER[0], rate)[-1] for rate in rates], seeds[:1])
        lr = min(tried, key=lambda one: one.loss).arm.lr
        yield
        for further in FURTHER:
            study.train("final", ladder.arms(further, lr), seeds)
            yield
    (nested,) = study.halved([tokens.nested(2 * scratch[-1].lr)])
    study.train("final", [nested, *(as_nested(arm, study.domain, scratch[-1]) for arm in scratch[:-1])], seeds)


def report(found: Findings) -> tuple[list[dict[str, Any]], str]:
    """Build a row for each way to a family: FLOPs and losses relative to training each size from scratch; and notes."""
    rows: list[dict[str, Any]] = []
    for ladder in ladders(found.domain):
        scratch = [[one.loss for one in found.of(arm.name, share=arm.share)] for arm in ladder.scratch]
        if not all(scratch):
            continue
        ways = {f"{ladder.name}: each size from scratch": (1.0, dict(enumerate(scratch, 1)))}
        points = []
        for further in FURTHER:
            arms = [found.of(arm.name) for arm in ladder.arms(further, 0.0)]
            if all(arms):
                excess = [above([one.loss for one in ours], each) for ours, each in zip(arms, scratch[1:], strict=True)]
                share = ladder.flops(further) / ladder.separate
                ways[f"{ladder.name}: ladder, further sizes at {further:.0%}"] = share, dict(enumerate(excess, 2))
                points.append((share, max(map(statistics.mean, excess))))
        nested = found.of(f"{ladder.name}, nested sizes")
        if nested:
            shares = (*ladder.nested_shares, 1.0)
            losses_at = [[loss_at(one, share) for one in nested] for share in shares]
            excess = [above(ours, each) for ours, each in zip(losses_at, scratch, strict=True)]
            share = ladder.nested_flops / ladder.separate
            ways[f"{ladder.name}: nested sizes"] = share, dict(enumerate(excess, 1))
            alone = [found.of(as_nested(arm, found.domain, ladder.scratch[-1]).name) for arm in ladder.scratch[:-1]]
            others = [*([one.loss for one in runs] for runs in alone), scratch[-1]]
            excess = [above(ours, each) for ours, each in zip(losses_at, others, strict=True)]
            ways[f"{ladder.name}: nested sizes, above each size on as many steps"] = share, dict(enumerate(excess, 1))
        for name, (share, losses) in ways.items():
            texts = {f"size {number}": spread(losses.get(number, []), 4) for number in (1, 2, 3)}
            rows.append({"family": name, "FLOPs": f"{share:.2f}", **texts})
        if len(points) > 1:
            name = f"{ladder.name}: ladder, every size at its loss"
            rows.append({**dict.fromkeys(rows[0], "-"), "family": name, "FLOPs": crossing(points)})
    return rows, (
        "FLOPs: all stages and updates, relative to training each size. Losses: nats; of a ladder or nested sizes, the "
        "difference from training that size from scratch, by seed. Every size at its loss: the FLOPs at which the mean "
        "difference of the worst size is 0, interpolated.\n"
    )


def above(losses: Sequence[float], others: Sequence[float]) -> list[float]:
    """Subtract the losses of other runs with the same seeds."""
    return [one - other for one, other in zip(losses, others, strict=False)]


def crossing(points: Sequence[tuple[float, float]]) -> str:
    """Find the share of the FLOPs at which the worst size reaches its loss, from pairs of share and excess loss."""
    (first, high), (last, low) = points[0], points[-1]
    if high <= 0:
        return f"<= {first:.2f}"
    if low > 0:
        return f"> {last:.2f}"
    return f"{first + (last - first) * high / (high - low):.2f}"


def loss_at(one: Outcome, share: float) -> float:
    """Final validation loss of a nested size, or of the whole model."""
    return one.loss if share == 1 else one.nested[f"{share:g}"]

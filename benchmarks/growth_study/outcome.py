"""Results of the study: rows, the cost of equal loss, tables."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.growth_study.arms import Arm, Domain, family_steps


@dataclass
class Outcome:
    """One fit.

    Args:
        domain: Name of the domain.
        phase: Phase of the study.
        arm: Its arm.
        seed: Seed of weights, order of the data and new rows.
        result: ``Fit.result``.
        folder: Folder of the fit.
    """

    domain: str
    phase: str
    arm: Arm
    seed: int
    result: dict[str, Any]
    folder: Path

    @property
    def loss(self) -> float | None:
        """Final validation loss in nats; None if it failed."""
        return self.result.get("loss")

    @property
    def tflops(self) -> float:
        """FLOPs of all training steps, in TFLOP."""
        return float(self.result["curve"]["tflops"][-1])

    @cached_property
    def jumps(self) -> list[tuple[float, float, float]]:
        """Growths in TFLOP, with the validation loss right before and right after."""
        if "trigger" in self.arm.growth:
            return []  # the steps were unknown
        file = self.folder / "growths.json"
        lines = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        places = self.result["curve"]["growths"] if self.loss is not None else []
        pairs = zip(places, lines, strict=False)
        return [(place, before, after) for place, (_, before, after) in pairs]

    def loss_before(self, place: float) -> float | None:
        """Last validation loss within 1 % before ``place`` (TFLOP); None without one."""
        curve = self.result["curve"]
        pairs = zip(curve["tflops"], curve["losses"], strict=True)
        return next((loss for spent, loss in reversed(list(pairs)) if 0.99 * place < spent <= place), None)

    def row(self) -> dict[str, Any]:
        """Row of the CSV."""
        done = self.loss is not None
        return {
            "domain": self.domain,
            "phase": self.phase,
            "arm": self.arm.name,
            "seed": self.seed,
            "share_of_budget": self.arm.share,
            "lr": self.arm.lr * self.arm.rate_factor,
            "steps": self.result.get("steps"),
            "parameters": self.result.get("parameters"),
            "tflop": self.tflops if done else None,
            "loss": self.loss,
            "score": self.result.get("score"),
            "score_name": self.result.get("score_name"),
            "largest_jump": max((abs(after - before) for _, before, after in self.jumps), default=None),
            "train_seconds": self.result.get("seconds"),
            "failed": self.result.get("failed"),
        }


Curve = list[tuple[float, float]]
"""Pairs of compute in TFLOP and final loss of a run of that length, from short to long."""


class Findings:
    """Outcomes of a domain, by arm.

    Args:
        domain: The domain.
        outcomes: All fits.
    """

    def __init__(self, domain: Domain, outcomes: Sequence[Outcome]) -> None:
        self.domain = domain
        self.outcomes = [one for one in outcomes if one.loss is not None]
        self.final = f"from scratch, {domain.ladder[-1]} tokens"

    def of(self, name: str, phases: Iterable[str] = ("final",), share: float | None = None) -> list[Outcome]:
        """Outcomes of an arm."""
        wanted = tuple(phases)
        return [
            one
            for one in self.outcomes
            if one.arm.name == name and one.phase in wanted and (share is None or one.arm.share == share)
        ]

    def names(self, phase: str) -> list[str]:
        """Arms of a phase in their order."""
        return list(dict.fromkeys(one.arm.name for one in self.outcomes if one.phase == phase))

    def curve(self, name: str) -> Curve:
        """Final losses of an arm by length: mean over seeds; the best rate where none was chosen for a length."""
        pairs = []
        for share in sorted({one.arm.share for one in self.of(name, ("learning rate", "final"))}):
            tried = self.of(name, ("learning rate",), share)
            runs = self.of(name, share=share) or [min(tried, key=lambda one: float(one.loss))]  # type: ignore[arg-type]
            pairs.append((statistics.mean(one.tflops for one in runs), mean_loss(runs)))
        return pairs

    @property
    def control(self) -> list[Outcome]:
        """The final size from scratch on C."""
        return self.of(self.final)

    def ladder(self) -> dict[str, Curve]:
        """The curve of each size from scratch."""
        names = [*(f"from scratch, {n} tokens" for n in self.domain.ladder), "from scratch, 1 block"]
        return {name: curve for name in names if (curve := self.curve(name))}

    def ratio(self, one: Outcome) -> float | None:
        """FLOPs over those of the final size from scratch at equal loss."""
        needed = compute_for(self.curve(self.final), float(one.loss))  # type: ignore[arg-type]
        return None if needed is None else one.tflops / needed


def compute_for(curve: Curve, loss: float) -> float | None:
    """Compute at which a curve reaches a loss, by linear interpolation in log compute; None where it does not fall."""
    for number in range(len(curve) - 1):
        (first, high), (last, low) = curve[number], curve[number + 1]
        if loss >= low or number == len(curve) - 2:
            if high <= low:
                return None
            return math.exp(math.log(first) + (high - loss) / (high - low) * math.log(last / first))
    return None


def cheapest_schedule(curves: Sequence[Curve], target: float) -> float | None:
    """Compute to a loss, if a grown model is worth as much as one from scratch of its size with the same loss.

    Each curve is of one size, the smallest first. A size takes the loss from one value to another for the difference of
    what it needs for both from scratch; the cheapest places to change to the next size are found on a grid.
    """
    start = max(curve[0][1] for curve in curves)
    grid = np.linspace(start, target, 400)
    costs = np.array([[compute_for(curve, loss) or math.inf for loss in grid] for curve in curves])  # (sizes, losses)
    if not np.isfinite(costs).all():
        return None
    best = costs[0]
    for own in costs[1:]:
        best = np.minimum(np.minimum.accumulate(best - own) + own, own)  # changed to at the best loss so far, or alone
    return float(best[-1])


def loss_at(curve: Curve, tflops: float) -> float:
    """Loss of a curve at a compute, by linear interpolation in log compute."""
    places, losses = zip(*curve, strict=True)
    return float(np.interp(math.log(tflops), np.log(places), losses))


def mean_loss(outcomes: Sequence[Outcome]) -> float:
    """Mean of the losses."""
    return statistics.mean(float(one.loss) for one in outcomes)  # type: ignore[arg-type]


def cost_of_loss(by_cost: Mapping[float, Sequence[Outcome]], target: float) -> str:
    """Cost of a loss by the curve of the means, with the sample standard deviation of the curves shifted by each seed.

    Args:
        by_cost: Runs of each length.
        target: The loss. If the mean of the longest runs does not reach it, the text says so.
    """
    curve = [(cost, mean_loss(runs)) for cost, runs in sorted(by_cost.items())]
    longest, least = curve[-1]
    if least > target:
        return f"more than {longest:g}"
    found = compute_for(curve, target)
    if found is None:
        return "-"
    offsets: dict[int, list[float]] = {}
    for cost, mean in curve:
        for one in by_cost[cost]:
            offsets.setdefault(one.seed, []).append(float(one.loss) - mean)  # type: ignore[arg-type]
    shifted = (compute_for(curve, target - statistics.mean(each)) for each in offsets.values())
    others = [one for one in shifted if one is not None]
    deviation = f" ± {statistics.stdev(others):.2f}" if len(others) > 1 else ""
    return f"{found:.2f}{deviation}"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Format a Markdown table."""
    body = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return [body[0], "|---" + "|---:" * (len(head) - 1) + "|", *body[1:], ""]


def report(found: Findings) -> str:
    """Format all tables of a domain."""
    domain = found.domain
    lines = ["## Which size is right for which budget", ""]
    ladder = found.ladder()
    whole = max(place for curve in ladder.values() for place, _ in curve)
    heads = sorted({round(place / whole, 2) for curve in ladder.values() for place, _ in curve})
    by_share = {
        name: {round(place / whole, 2): f"{loss:.4f}" for place, loss in curve} for name, curve in ladder.items()
    }
    lines += table(
        ["from scratch", *(f"{share:g} C" for share in heads)],
        [
            [name.removeprefix("from scratch, "), *(losses.get(share, "-") for share in heads)]
            for name, losses in by_share.items()
        ],
    )
    scratch = found.control
    target = mean_loss(scratch)
    cost = statistics.mean(one.tflops for one in scratch)
    lines += [f"C = {cost:.3g} TFLOP. Validation loss in nats at the end of runs of that length.", ""]
    tokens = [ladder[name] for name in ladder if name.endswith("tokens")]
    depths = [ladder[name] for name in ("from scratch, 1 block", found.final) if name in ladder]
    for what, curves in (("tokens", tokens), ("depth", depths)):
        bound = cheapest_schedule(curves, target) if len(curves) > 1 else None
        if bound is not None:
            lines += [
                "If a grown model were worth what one from scratch of its size with the same loss is, the "
                f"cheapest growth in {what} to the final size's loss at C would cost {bound / cost:.2f} C.",
                "",
            ]

    lines += ["## (a) One model is wanted", ""]
    rows = []
    for name in found.names("final"):
        for share in sorted({one.arm.share for one in found.of(name)}):
            runs = found.of(name, share=share)
            losses = [float(one.loss) for one in runs]  # type: ignore[arg-type]
            tflops = runs[0].tflops
            best = min(loss_at(curve, tflops) for curve in ladder.values() if curve)
            ratios = [ratio for one in runs if (ratio := found.ratio(one)) is not None]
            jump = max((abs(after - before) for one in runs for _, before, after in one.jumps), default=None)
            rows.append(
                [
                    name,
                    f"{tflops / cost:.2f} C",
                    spread(losses, 4),
                    f"{statistics.mean(losses) - best:+.4f}",
                    spread(ratios, 2),
                    "-" if jump is None else f"{jump:.1e}",
                    f"{runs[0].arm.lr * runs[0].arm.rate_factor:g}",
                    str(len(runs)),
                ]
            )
    head = [
        "arm",
        "FLOPs",
        "validation loss",
        "beside the best size",
        "ratio",
        "jump at growth",
        "learning rate",
        "seeds",
    ]
    lines += table(head, rows)
    lines += [
        "Beside the best size: the loss less that of the best size from scratch on the same FLOPs. Ratio: FLOPs over "
        "those that the final size from scratch needs for the same loss (all stages counted).",
        "",
    ]
    for name in found.names("final"):
        runs = found.of(name)
        if not name.startswith("grown") or len({one.arm.share for one in runs}) < 2:
            continue
        by_share = {one.arm.share: found.of(name, share=one.arm.share) for one in runs}
        lines += [
            f"**{name.capitalize()}, at the loss of the final size from scratch on C ({target:.4f}): "
            f"{cost_of_loss(by_share, target)} of C.**",
            "",
        ]

    lines += search_table(found, cost)
    if not found.names("family"):
        return "\n".join(lines)
    lines += ["## (b) The smaller size exists already", ""]
    rows = []
    for small, large in family_steps(domain):
        best: dict[float, list[Outcome]] = {}
        for name in found.names("family"):
            if not name.startswith(f"family: {small} to {large} at "):
                continue
            runs = found.of(name, ("family",))
            share = round((runs[0].tflops - runs[0].jumps[0][0]) / cost, 2)
            losses = [float(one.loss) for one in runs]  # type: ignore[arg-type]
            best[share] = min(best.get(share, runs), runs, key=mean_loss)
            begun = spread([loss for one in runs if (loss := one.loss_before(one.jumps[0][0])) is not None], 4)
            rows.append([name.removeprefix("family: "), f"{share:.2f}", spread(losses, 4), begun, str(len(runs))])
        rows.append([f"{small} to {large}, at equal loss", cost_of_loss(best, target), f"{target:.4f}", "", ""])
    head = ["further size", "its cost / from scratch", "validation loss", "the smaller one", "seeds"]
    lines += table(head, rows)
    lines += [
        f"The smaller size is trained to its end on as many tokens or images as the final one from scratch, which has "
        f"{target:.4f}. What it cost is not counted.",
        "",
    ]
    return "\n".join(lines)


def search_table(found: Findings, cost: float) -> list[str]:
    """Format the policies of the search relative to the first of them; empty without a search.

    Args:
        found: The outcomes.
        cost: C in TFLOP.
    """
    outcomes = [found.of(name, ("search",))[0] for name in found.names("search")]
    rows = []
    for one in outcomes:
        ratio = found.ratio(one)
        difference = float(one.loss) - float(outcomes[0].loss)  # type: ignore[arg-type]
        jump = max((abs(after - before) for _, before, after in one.jumps), default=0.0)
        rows.append(
            [
                one.arm.name.removeprefix("grown: "),
                f"{one.tflops / cost:.2f} C",
                f"{one.loss:.4f}",
                f"{difference:+.4f}",
                "-" if ratio is None else f"{ratio:.2f}",
                f"{jump:.1e}",
            ]
        )
    head = ["policy", "FLOPs", "validation loss", "to the first", "ratio", "largest jump"]
    return ["## The search", "", *table(head, rows)] if rows else []

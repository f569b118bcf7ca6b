"""Results of the study: rows, the cost of equal loss, tables."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.growth_study.arms import Arm, Domain, family_steps
from lit_tokenformer.comparison.fits import Run
from lit_tokenformer.comparison.results import table


@dataclass
class Outcome:
    """One fit of an arm; ``result`` is its ``Fit.result``, and the seed that of weights, data order and new rows."""

    domain: str
    phase: str
    arm: Arm
    seed: int
    result: dict[str, Any]
    folder: Path

    @property
    def loss(self) -> float:
        """Final validation loss in nats; infinite if it failed."""
        return float(self.result.get("loss", math.inf))

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
        places = self.result["curve"]["growths"] if "curve" in self.result else []
        return [(place, before, after) for place, (_, before, after) in zip(places, lines, strict=False)]

    @property
    def largest_jump(self) -> float | None:
        """Largest change of the validation loss at a growth."""
        if "largest_jump" in self.result:
            return self.result["largest_jump"]
        return max((abs(after - before) for _, before, after in self.jumps), default=None)

    @cached_property
    def nested(self) -> dict[str, float]:
        """Final validation loss of each nested size, by its share of the units."""
        if "nested" in self.result or "curve" not in self.result:
            return self.result.get("nested", {})
        logged = Run(str(self.folder / "lightning_logs" / "version_0"))
        tags = [tag for tag in logged.tags if tag.startswith("val/loss@")]
        return {tag.removeprefix("val/loss@"): float(logged.series(tag)[1][-1]) for tag in tags}

    def loss_before(self, place: float) -> float | None:
        """Last validation loss within 1 % before ``place`` (TFLOP); None without one."""
        curve = self.result["curve"]
        pairs = zip(curve["tflops"], curve["losses"], strict=True)
        return next((loss for spent, loss in reversed(list(pairs)) if 0.99 * place < spent <= place), None)

    def row(self) -> dict[str, Any]:
        """Row of the CSV."""
        measured = self.result
        return {
            "domain": self.domain,
            "phase": self.phase,
            "arm": self.arm.name,
            "seed": self.seed,
            "share_of_budget": self.arm.share,
            "lr": self.arm.lr * self.arm.rate_factor,
            "steps": measured.get("steps"),
            "parameters": measured.get("parameters"),
            "tflop": self.tflops if "curve" in measured else None,
            **{name: measured.get(name) for name in ("loss", "score", "score_name")},
            "largest_jump": self.largest_jump,
            "nested": json.dumps(self.nested) if self.nested else None,
            "train_seconds": measured.get("seconds"),
            "failed": measured.get("failed"),
        }


@dataclass
class Recorded:
    """A finished fit in a table of an earlier run, without the curve.

    Args:
        row: Its row of the CSV, as :meth:`Outcome.row` builds it.
    """

    row: Mapping[str, str]
    folder = Path()

    @property
    def result(self) -> dict[str, Any]:
        """The final values, in the form of ``Fit.result``."""
        row = self.row
        known: dict[str, Any] = {"failed": row["failed"] or None, "seconds": float(row["train_seconds"])}
        known |= {name: int(row[name]) for name in ("steps", "parameters")}
        if row["failed"]:
            return known
        return known | {
            "loss": float(row["loss"]),
            "score": float(row["score"]),
            "score_name": row["score_name"],
            "largest_jump": float(row["largest_jump"]) if row["largest_jump"] else None,
            "nested": json.loads(row.get("nested") or "{}"),
            "curve": {"tflops": [float(row["tflop"])], "losses": [float(row["loss"])], "growths": []},
        }


Curve = list[tuple[float, float]]
"""Pairs of compute in TFLOP and final loss of a run of that length, from short to long."""


class Findings:
    """Outcomes of a domain, by arm."""

    def __init__(self, domain: Domain, outcomes: Sequence[Outcome]) -> None:
        self.domain = domain
        self.outcomes = [one for one in outcomes if math.isfinite(one.loss)]
        self.final = f"from scratch, {domain.ladder[-1]} tokens"

    def of(self, name: str, phases: tuple[str, ...] = ("final",), share: float | None = None) -> list[Outcome]:
        """Outcomes of an arm."""
        return [
            one
            for one in self.outcomes
            if one.arm.name == name and one.phase in phases and (share is None or one.arm.share == share)
        ]

    def names(self, phase: str) -> list[str]:
        """Arms of a phase in their order."""
        return list(dict.fromkeys(one.arm.name for one in self.outcomes if one.phase == phase))

    def curve(self, name: str) -> Curve:
        """Final losses of an arm by length: mean over seeds; the best rate where none was chosen for a length."""
        pairs = []
        for share in sorted({one.arm.share for one in self.of(name, ("learning rate", "final"))}):
            tried = self.of(name, ("learning rate",), share)
            runs = self.of(name, share=share) or [min(tried, key=lambda one: one.loss)]
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
        needed = compute_for(self.curve(self.final), one.loss)
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

    Each curve is of one size, the smallest first. The cheapest places to change to the next size are found on a grid.
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
    return statistics.mean(one.loss for one in outcomes)


def cost_of_loss(by_cost: Mapping[float, Sequence[Outcome]], target: float) -> str:
    """Cost of a loss by the curve of the means, with the sample standard deviation of the curves shifted by each seed.

    If the mean of the longest runs does not reach the loss, the text says so.
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
            offsets.setdefault(one.seed, []).append(one.loss - mean)
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


def report(found: Findings) -> str:
    """Format all tables of a domain."""
    ladder, target = found.ladder(), mean_loss(found.control)
    cost = statistics.mean(one.tflops for one in found.control)
    parts = [
        "## Which size is right for which budget\n",
        sizes_table(ladder),
        f"C = {cost:.3g} TFLOP. Validation loss in nats at the end of runs of that length.\n",
    ]
    tokens = [ladder[name] for name in ladder if name.endswith("tokens")]
    depths = [ladder[name] for name in ("from scratch, 1 block", found.final) if name in ladder]
    for what, curves in (("tokens", tokens), ("depth", depths)):
        if len(curves) > 1 and (bound := cheapest_schedule(curves, target)) is not None:
            parts.append(
                "If a grown model were worth what one from scratch of its size with the same loss is, the "
                f"cheapest growth in {what} to the final size's loss at C would cost {bound / cost:.2f} C.\n"
            )
    parts += [
        "## (a) One model is wanted\n",
        arms_table(found, cost),
        "To the best size: the loss less that of the best size from scratch on the same FLOPs. Ratio: FLOPs over "
        "those that the final size from scratch needs for the same loss (all stages counted).\n",
    ]
    for name in found.names("final"):
        shares = {one.arm.share for one in found.of(name)}
        if name.startswith("grown") and len(shares) > 1:
            by_share = {share: found.of(name, share=share) for share in shares}
            parts.append(
                f"**{name.capitalize()}, at the loss of the final size from scratch on C ({target:.4f}): "
                f"{cost_of_loss(by_share, target)} of C.**\n"
            )
    if found.names("search"):
        parts += ["## The search\n", search_table(found, cost)]
    if found.names("family"):
        parts += [
            "## (b) The smaller size exists already\n",
            family_table(found, cost, target),
            "The smaller size is trained to its end on as many tokens or images as the final one from scratch, which "
            f"has {target:.4f}. What it cost is not counted.\n",
        ]
    return "\n".join(parts)


def sizes_table(ladder: dict[str, Curve]) -> str:
    """Format the final losses of each size from scratch by the length of the run."""
    whole = max(place for curve in ladder.values() for place, _ in curve)
    losses = {name: {round(place / whole, 2): loss for place, loss in curve} for name, curve in ladder.items()}
    shares = sorted({share for of_size in losses.values() for share in of_size})
    rows = []
    for name, of_size in losses.items():
        cells = {f"{share:g} C": f"{of_size[share]:.4f}" if share in of_size else "-" for share in shares}
        rows.append({"from scratch": name.removeprefix("from scratch, "), **cells})
    return table(rows)


def arms_table(found: Findings, cost: float) -> str:
    """Format the final runs of each arm at each share of the budget C (``cost``, in TFLOP)."""
    rows = []
    for name in found.names("final"):
        for share in sorted({one.arm.share for one in found.of(name)}):
            runs = found.of(name, share=share)
            best = min(loss_at(curve, runs[0].tflops) for curve in found.ladder().values())
            jump = max((one.largest_jump for one in runs if one.largest_jump is not None), default=None)
            rows.append(
                {
                    "arm": name,
                    "FLOPs": f"{runs[0].tflops / cost:.2f} C",
                    "validation loss": spread([one.loss for one in runs], 4),
                    "to the best size": f"{mean_loss(runs) - best:+.4f}",
                    "ratio": spread([ratio for one in runs if (ratio := found.ratio(one)) is not None], 2),
                    "jump at growth": "-" if jump is None else f"{jump:.1e}",
                    "learning rate": f"{runs[0].arm.lr * runs[0].arm.rate_factor:g}",
                    "seeds": len(runs),
                }
            )
    return table(rows)


def family_table(found: Findings, cost: float, target: float) -> str:
    """Format the further sizes of a family, with their cost at the target loss."""
    rows: list[tuple[Any, ...]] = []
    for small, large in family_steps(found.domain):
        best: dict[float, list[Outcome]] = {}
        for name in found.names("family"):
            if not name.startswith(f"family: {small} to {large} at "):
                continue
            runs = found.of(name, ("family",))
            share = round((runs[0].tflops - runs[0].jumps[0][0]) / cost, 2)
            best[share] = min(best.get(share, runs), runs, key=mean_loss)
            begun = [loss for one in runs if (loss := one.loss_before(one.jumps[0][0])) is not None]
            losses = spread([one.loss for one in runs], 4)
            rows.append((name.removeprefix("family: "), f"{share:.2f}", losses, spread(begun, 4), len(runs)))
        rows.append((f"{small} to {large}, at equal loss", cost_of_loss(best, target), f"{target:.4f}", "", ""))
    head = ("further size", "its cost / from scratch", "validation loss", "the smaller one", "seeds")
    return table([dict(zip(head, row, strict=True)) for row in rows])


def search_table(found: Findings, cost: float) -> str:
    """Format the policies of the search relative to the first of them."""
    outcomes = [found.of(name, ("search",))[0] for name in found.names("search")]
    rows = []
    for one in outcomes:
        ratio = found.ratio(one)
        rows.append(
            {
                "policy": one.arm.name.removeprefix("grown: "),
                "FLOPs": f"{one.tflops / cost:.2f} C",
                "validation loss": f"{one.loss:.4f}",
                "to the first": f"{one.loss - outcomes[0].loss:+.4f}",
                "ratio": "-" if ratio is None else f"{ratio:.2f}",
                "largest jump": f"{one.largest_jump or 0:.1e}",
            }
        )
    return table(rows)

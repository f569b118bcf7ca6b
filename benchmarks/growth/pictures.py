"""Pictures of what came out of the study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from outcome import Findings, Outcome, mean_loss


def mean_curve(runs: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Operations, and the mean, lowest and highest loss over seeds along the runs.

    At a growth stand the losses before and after it. They are of fewer batches than the others, so what is drawn is the
    line between the validations around them, and the jump beyond it.
    """
    places: list[float] = []
    losses: list[list[float]] = []
    for number, one in enumerate(runs):
        logged = list(zip(one.result["curve"]["tflops"], one.result["curve"]["losses"], strict=True))
        points = list(logged)
        for place, before, after in one.jumps:
            between = float(np.interp(place, *zip(*logged, strict=True)))
            jump = max(0.0, after - before)
            points += [(place - 1e-9, between - jump / 2), (place + 1e-9, between + jump / 2)]
        points.sort()
        if number == 0:
            places = [place for place, _ in points]
        losses.append([loss for _, loss in points])
    values = np.array([one[: min(map(len, losses))] for one in losses])
    return np.array(places[: values.shape[1]]), values.mean(0), values.min(0), values.max(0)


def draw_runs(
    axis: Axes, runs: Sequence[Outcome], label: str, colour: str, style: str = "-", width: float = 1.8
) -> None:
    """One arm: mean over seeds, band from the lowest to the highest, growths as triangles."""
    if not runs:
        return
    compute, mean, low, high = mean_curve(runs)
    axis.plot(compute, mean, style, color=colour, linewidth=width, label=f"{label}: {mean[-1]:.3f}")
    axis.plot(compute[-1], mean[-1], "o", color=colour, markersize=5)
    axis.fill_between(compute, low, high, color=colour, alpha=0.15, linewidth=0)
    places = [place for place, _, _ in runs[0].jumps]
    axis.plot(places, np.interp(places, compute, mean), "^", color=colour, markeredgecolor="k", markersize=8, zorder=5)


def draw(found: Findings, path: Path, title: str) -> None:
    """The first picture: loss against cumulative training FLOPs."""
    figure = Figure(figsize=(9, 5.6))
    axis = figure.add_subplot()
    scratch = found.control
    grown = found.of("grown")
    shares = sorted({one.arm.share for one in grown})
    target = mean_loss(scratch)
    enough = [s for s in shares if mean_loss([one for one in grown if one.arm.share == s]) <= target]
    chosen = min(enough) if enough else max(shares, default=1.0)
    draw_runs(axis, scratch, "final size from scratch", "tab:orange")
    for tokens, colour in zip(reversed(found.domain.ladder[:-1]), ("tab:brown", "tab:pink"), strict=False):
        draw_runs(axis, found.of(f"from scratch, {tokens} tokens"), f"smaller size ({tokens} tokens)", colour, ":", 1.4)
    draw_runs(axis, found.of("from scratch, 1 block"), "smaller size (1 block)", "tab:olive", ":", 1.4)
    draw_runs(axis, found.of("transformer twin, from scratch"), "transformer twin", "tab:gray", "--", 1.2)
    draw_runs(axis, found.of("published growth"), "published growth", "tab:red", "-", 1.4)
    draw_runs(axis, [one for one in grown if one.arm.share == chosen], f"grown, {chosen:g} C", "tab:blue", "-", 2.4)
    short = [name for name in found.names("final") if name.endswith("of 16 patches first")]
    for name, colour in zip(short, ("tab:purple", "tab:green", "tab:cyan", "k"), strict=False):
        share = max(one.arm.share for one in found.of(name))
        draw_runs(axis, found.of(name, share=share), f"{name}, {share:g} C", colour, "-", 1.8)
    axis.axhline(target, color="tab:orange", linewidth=0.8, linestyle=":")
    lowest = min(float(np.min(line.get_ydata())) for line in axis.lines if len(np.atleast_1d(line.get_ydata())))
    start = scratch[0].result["curve"]["losses"][0]
    axis.set_ylim(lowest - 0.03 * (start - lowest), start + 0.35 * (start - lowest))
    axis.set(xlabel="cumulative training compute, all stages (TFLOP)", ylabel="validation loss (nats)", title=title)
    axis.plot([], [], "^", color="w", markeredgecolor="k", markersize=8, label="growth")
    axis.grid(alpha=0.25)
    axis.legend(loc="upper right", fontsize=9)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def draw_regime(found: Findings, path: Path) -> None:
    """Loss at the end of runs from scratch against their compute, for each size, and grown runs beside them."""
    figure = Figure(figsize=(7, 4.6))
    axis = figure.add_subplot()
    named = {
        **{name.removeprefix("from scratch, "): curve for name, curve in found.ladder().items()},
        "grown": found.curve("grown"),
    }
    for (name, curve), marker in zip(named.items(), "sDov^", strict=False):
        if curve:
            axis.plot(*zip(*curve, strict=True), marker=marker, label=name)
    axis.set_xscale("log")
    for setter in (axis.xaxis,):
        setter.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        setter.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        setter.set_minor_formatter(NullFormatter())
    axis.set(xlabel="training compute of the whole run (TFLOP)", ylabel="validation loss at its end (nats)")
    axis.grid(alpha=0.25)
    axis.legend(title="from scratch, or grown")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def draw_search(found: Findings, path: Path) -> None:
    """What each policy of the search costs beside the first."""
    names = found.names("search")
    if not names:
        return
    losses = {name.removeprefix("grown: "): float(found.of(name, ("search",))[0].loss) for name in names}  # type: ignore[arg-type]
    ordered = sorted(losses, key=lambda name: -losses[name])
    first = losses[names[0].removeprefix("grown: ")]
    figure = Figure(figsize=(7, 0.28 * len(ordered) + 1))
    axis = figure.add_subplot()
    colours = ["tab:green" if losses[name] < first else "tab:red" for name in ordered]
    axis.barh(ordered, [losses[name] - first for name in ordered], color=colours)
    axis.axvline(0, color="k", linewidth=0.8)
    axis.set_xlabel("validation loss at 0.65 C less that of the first policy (nats)")
    axis.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=120, bbox_inches="tight")

"""Pictures of the benchmarks; as a command, that of a single run.

    python -m benchmarks.plots LOG_DIR OUTPUT.png

The command draws scores and loss against training compute, with the growths, from the TensorBoard logs of a fit.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_tokenformer.comparison.fits import Run
from lit_tokenformer.comparison.picture import plain_numbers

if TYPE_CHECKING:
    from benchmarks.growth_study.outcome import Findings, Outcome

SCORES = {"val/acc1": ("validation accuracy (%)", 100), "val/bits_per_byte": ("validation bits per byte", 1)}


def run_picture(log_dir: str, output: str) -> None:
    """Draw one run: losses and score against compute, parameters below."""
    run = Run(log_dir)
    figure = Figure(figsize=(8, 6))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for tag, color in (("train/loss", "tab:gray"), ("val/loss", "tab:orange")):
        steps, values = run.series(tag)
        upper.plot(run.compute(steps), values, color=color, label=tag, linewidth=1.2)
    upper.set(yscale="log", ylabel="loss (nats)")
    right = upper.twinx()
    for tag, (label, scale) in SCORES.items():
        if tag in run.tags:
            steps, values = run.series(tag)
            right.plot(run.compute(steps), scale * values, color="tab:blue", label=tag)
            right.set_ylabel(label, color="tab:blue")
    steps, values = run.series("size/parameters")
    lower.step([0, *run.compute(steps[1:]), run.compute(steps[-1:])[0]], [*values, values[-1]], where="post", color="k")
    lower.set(xlabel="training compute (TFLOP)", ylabel="parameters")
    lower.set_ylim(bottom=0)
    for place in run.compute(run.growths()):
        for axis in (upper, lower):
            axis.axvline(place, color="tab:green", linestyle="--", linewidth=1)
    upper.plot([], [], color="tab:green", linestyle="--", label="growth")
    upper.legend(loc="center right")
    figure.tight_layout()
    figure.savefig(output, dpi=120)


def scaling_picture(
    found: Sequence[list[dict[str, Any]]], labels: Mapping[str, str], exponents: Sequence[float], file: Path
) -> None:
    """Draw ``speed.scaling``: time above and memory below, a column for each axis."""
    colors = {"layer": "tab:green", "training": "tab:blue", "decoding": "tab:orange"}
    names = {"layer": "one layer, forward + backward", "training": "training step", "decoding": "decoding one token"}
    figure = Figure(figsize=(4 * len(labels), 7.5))
    axes = figure.subplots(2, len(labels), sharex="col", sharey="row")
    for column, (axis, label) in enumerate(labels.items()):
        upper, lower = axes[:, column]
        for curve, exponent in zip(found, exponents, strict=True):
            if curve[0]["axis"] != axis:
                continue
            values = {name: np.array([row[name] for row in curve]) for name in curve[0]}
            kind, sizes, milliseconds = curve[0]["what"], values["size"], 1000 * values["seconds"]
            closed = values["operations"] * milliseconds[-1] / values["operations"][-1]
            solid: dict[str, Any] = {"color": colors[kind], "marker": "o", "markersize": 4}
            dashed: dict[str, Any] = {"color": colors[kind], "linestyle": "--", "linewidth": 1}
            upper.plot(sizes, milliseconds, label=names[kind], **solid)
            upper.plot(sizes, closed, **dashed)
            lower.plot(sizes, values["bytes"] / 1e6, **solid)
            lower.plot(sizes, values["closed_bytes"] / 1e6, **dashed)
            place = (sizes[-1], milliseconds[-1])
            offset: dict[str, Any] = {"xytext": (0, 6), "textcoords": "offset points", "ha": "right"}
            upper.annotate(f"{exponent:.2f}", place, color=colors[kind], **offset)
        upper.plot([], [], color="k", linestyle="--", linewidth=1, label="closed form")
        for one in (upper, lower):
            one.set_xscale("log", base=2)
            one.set_yscale("log")
            one.grid(alpha=0.3)
            one.margins(y=0.12)
        upper.legend(loc="upper left", fontsize=8)
        lower.set_xlabel(label)
    axes[0, 0].set_ylabel("time (ms); number: exponent of the upper half")
    axes[1, 0].set_ylabel("kept for backward, or cache (MB)")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def mean_curve(runs: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Compute, and the mean, lowest and highest loss over seeds along the runs.

    A growth adds the losses before and after it. They are of fewer batches than the validations, so the jump between
    them is drawn around the line between the validations.
    """
    places: list[float] = []
    losses: list[list[float]] = []
    for number, one in enumerate(runs):
        curve = one.result["curve"]
        points = list(zip(curve["tflops"], curve["losses"], strict=True))
        for place, before, after in one.jumps:
            between = float(np.interp(place, curve["tflops"], curve["losses"]))
            jump = max(0.0, after - before)
            points += [(place - 1e-9, between - jump / 2), (place + 1e-9, between + jump / 2)]
        points.sort()
        if number == 0:
            places = [place for place, _ in points]
        losses.append([loss for _, loss in points])
    values = np.array([one[: min(map(len, losses))] for one in losses])
    return np.array(places[: values.shape[1]]), values.mean(0), values.min(0), values.max(0)


def draw_runs(
    axis: Axes, runs: Sequence[Outcome], label: str, color: str, style: str = "-", width: float = 1.8
) -> None:
    """Draw one arm: mean over seeds, band of their range, growths as triangles."""
    if not runs:
        return
    compute, mean, low, high = mean_curve(runs)
    axis.plot(compute, mean, style, color=color, linewidth=width, label=f"{label}: {mean[-1]:.3f}")
    axis.plot(compute[-1], mean[-1], "o", color=color, markersize=5)
    axis.fill_between(compute, low, high, color=color, alpha=0.15, linewidth=0)
    places = [place for place, _, _ in runs[0].jumps]
    axis.plot(places, np.interp(places, compute, mean), "^", color=color, markeredgecolor="k", markersize=8, zorder=5)


def study_picture(found: Findings, path: Path, title: str) -> None:
    """Draw loss against cumulative training FLOPs."""
    figure = Figure(figsize=(9, 5.6))
    axis = figure.add_subplot()
    scratch = found.control
    grown = found.of("grown")
    shares = sorted({one.arm.share for one in grown})
    target = float(np.mean([one.loss for one in scratch]))
    enough = [s for s in shares if np.mean([one.loss for one in grown if one.arm.share == s]) <= target]
    chosen = min(enough) if enough else max(shares, default=1.0)
    draw_runs(axis, scratch, "final size from scratch", "tab:orange")
    for tokens, color in zip(reversed(found.domain.ladder[:-1]), ("tab:brown", "tab:pink"), strict=False):
        draw_runs(axis, found.of(f"from scratch, {tokens} tokens"), f"smaller size ({tokens} tokens)", color, ":", 1.4)
    draw_runs(axis, found.of("from scratch, 1 block"), "smaller size (1 block)", "tab:olive", ":", 1.4)
    draw_runs(axis, found.of("transformer twin, from scratch"), "transformer twin", "tab:gray", "--", 1.2)
    draw_runs(axis, found.of("published growth"), "published growth", "tab:red", "-", 1.4)
    draw_runs(axis, [one for one in grown if one.arm.share == chosen], f"grown, {chosen:g} C", "tab:blue", "-", 2.4)
    short = [name for name in found.names("final") if name.endswith("of 16 patches first")]
    for name, color in zip(short, ("tab:purple", "tab:green", "tab:cyan", "k"), strict=False):
        share = max(one.arm.share for one in found.of(name))
        draw_runs(axis, found.of(name, share=share), f"{name}, {share:g} C", color, "-", 1.8)
    axis.axhline(target, color="tab:orange", linewidth=0.8, linestyle=":")
    lowest = min(float(np.min(line.get_ydata())) for line in axis.lines if len(np.atleast_1d(line.get_ydata())))
    start = scratch[0].result["curve"]["losses"][0]
    axis.set_ylim(lowest - 0.03 * (start - lowest), start + 0.35 * (start - lowest))
    axis.set(xlabel="cumulative training compute, all stages (TFLOP)", ylabel="validation loss (nats)", title=title)
    axis.plot([], [], "^", color="w", markeredgecolor="k", markersize=8, label="growth")
    axis.grid(alpha=0.25)
    axis.legend(loc="upper right", fontsize=9)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def sizes_picture(found: Findings, path: Path) -> None:
    """Draw the final loss of runs from scratch against their compute, for each size, with grown runs."""
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
    plain_numbers(axis.xaxis)
    axis.set(xlabel="training compute of the whole run (TFLOP)", ylabel="validation loss at its end (nats)")
    axis.grid(alpha=0.25)
    axis.legend(title="from scratch, or grown")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def search_picture(found: Findings, path: Path) -> None:
    """Draw the loss of each policy of the search relative to the first."""
    names = found.names("search")
    if not names:
        return
    losses = {name.removeprefix("grown: "): found.of(name, ("search",))[0].loss for name in names}
    first = next(iter(losses.values()))
    more = dict(sorted(((name, loss - first) for name, loss in losses.items()), key=lambda item: -item[1]))
    figure = Figure(figsize=(7, 0.28 * len(more) + 1))
    axis = figure.add_subplot()
    axis.barh(list(more), list(more.values()), color=["tab:green" if one < 0 else "tab:red" for one in more.values()])
    axis.axvline(0, color="k", linewidth=0.8)
    axis.set_xlabel("validation loss at 0.65 C less that of the first policy (nats)")
    axis.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    run_picture(*sys.argv[1:])

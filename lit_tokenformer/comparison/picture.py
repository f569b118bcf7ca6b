"""Plot of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from sklearn.isotonic import isotonic_regression


def draw(curves: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """Plot validation loss against training compute: mean over seeds, shaded range, growths as triangles.

    Args:
        curves: Curves of each arm by seed, in the order of the table.
        output: Path of the image.
    """
    drawn = {label: found for label, found in curves.items() if found}
    if not drawn:
        return
    figure = Figure(figsize=(8, max(5.0, 1.5 + 0.42 * len(drawn))))
    axis = figure.add_subplot()
    ends: dict[str, tuple[float, float]] = {}
    for number, (label, found) in enumerate(drawn.items()):
        length = min(len(one["losses"]) for one in found)
        compute = np.array(found[0]["tflops"][:length])
        losses = np.array([one["losses"][:length] for one in found])  # (seeds, n)
        mean = losses.mean(axis=0)
        color = f"C{number % 10}"
        axis.plot(compute, mean, "o--" if number >= 10 else "o-", color=color, linewidth=1.8, markersize=3.5)
        axis.fill_between(compute, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.12, linewidth=0)
        places = found[0]["growths"]
        heights = np.interp(places, compute, mean)
        axis.plot(places, heights, "^", color=color, markeredgecolor="k", markersize=9, zorder=5)
        ends[label] = (float(compute[-1]), float(mean[-1]))
    if max(place for place, _ in ends.values()) > 8 * min(one[0]["tflops"][0] for one in drawn.values()):
        axis.set_xscale("log")
    if axis.dataLim.y1 > 2 * min(loss for _, loss in ends.values()):
        axis.set_yscale("log")
    for scale in (axis.xaxis, axis.yaxis):
        if scale.get_scale() == "log":
            plain_numbers(scale)
    axis.set(xlabel="training compute (TFLOP)", ylabel="validation loss (nats)")
    axis.grid(alpha=0.25)
    _label_ends(axis, ends)
    if any(one["growths"] for found in drawn.values() for one in found):
        axis.plot([], [], "^", color="w", markeredgecolor="k", markersize=9, label="growth")
        axis.legend(loc="upper right")
    figure.savefig(output, dpi=120, bbox_inches="tight")


def plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.set_minor_formatter(NullFormatter())


def _label_ends(axis: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """Write label and last loss of each curve right of the axes, with a line to its end."""
    axis.set_ylim(*axis.get_ylim())  # fix the limits
    to_share = axis.transData + axis.transAxes.inverted()
    heights = spread_out([to_share.transform(end)[1] for end in ends.values()], min(0.055, 1 / len(ends)))
    for number, ((label, end), height) in enumerate(zip(ends.items(), heights, strict=True)):
        color = f"C{number % 10}"
        line = {"arrowstyle": "-", "color": color, "linestyle": ":", "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 4}
        axis.annotate(
            f"{end[1]:.3f}  {label}",
            xy=end,
            xytext=(1.04, height),
            textcoords="axes fraction",
            color=color,
            va="center",
            weight="bold",
            annotation_clip=False,
            arrowprops=line,
        )


def spread_out(wanted: Sequence[float], gap: float) -> list[float]:
    """Space positions in [0, 1] at least ``gap`` apart, in order, with the least squared displacement.

    Example:
        >>> [round(place, 3) for place in spread_out([0.5, 0.5, 0.1], 0.2)]
        [0.4, 0.6, 0.1]
    """
    order = np.argsort(wanted, kind="stable")
    below = gap * np.arange(len(order))  # height of the labels below
    found = np.empty(len(order))
    found[order] = isotonic_regression(np.array(wanted)[order] - below, y_min=0, y_max=1 - below[-1]) + below
    return found.tolist()

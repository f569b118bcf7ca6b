"""Picture of one growth for the README: grown against from scratch, from the curves of the growth study.

    python -m benchmarks.growth_picture docs/images

Curves are means over three seeds; a monotone cubic in log compute connects the validations. The growth is where 30 % of
the optimizer steps end.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.interpolate import PchipInterpolator

CURVES = Path(__file__).parent / "growth_study" / "results" / "text_curves.csv"
GROWN, SCRATCH = ("grown", "0.85"), ("from scratch, 32 tokens", "1.0")
AT = 0.3
"""Share of the optimizer steps before the growth."""

THEMES = {
    "light": {"text": "#1f2328", "grid": "#d1d9e0", "grown": "#0a7f6f", "scratch": "#8a6d3b"},
    "dark": {"text": "#e6edf3", "grid": "#3d444d", "grown": "#3ddbc0", "scratch": "#d8b26a"},
}


def mean_curve(arm: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Read an arm of the study.

    Returns:
        TFLOP (P,), and mean validation loss over seeds in nats (P,).
    """
    with CURVES.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["arm"], row["share_of_budget"]) == arm]
    seeds = sorted({row["seed"] for row in rows})
    losses = np.array([[float(row["loss"]) for row in rows if row["seed"] == seed] for seed in seeds])
    return np.array([float(row["tflop"]) for row in rows if row["seed"] == seeds[0]]), losses.mean(axis=0)


def growth_place(tflop: np.ndarray) -> float:
    """Compute the FLOPs at the growth: the first interval is at the small size, the fourth at the large one."""
    small, large = tflop[0], tflop[3] - tflop[2]
    intervals = tflop[-1] / (AT * small + (1 - AT) * large)
    return float(AT * intervals * small)


def draw(theme: str, path: Path) -> None:
    """Draw the picture in one of the themes."""
    colors = THEMES[theme]
    figure = Figure(figsize=(8, 3.6))
    axis = figure.add_subplot()
    curves = {name: mean_curve(arm) for name, arm in (("scratch", SCRATCH), ("grown", GROWN))}
    for name, (tflop, loss) in curves.items():
        places = np.geomspace(tflop[0], tflop[-1], 300)
        smooth = PchipInterpolator(np.log(tflop), loss)(np.log(places))
        axis.plot(places, smooth, color=colors[name], linewidth=2.6, solid_capstyle="round")
        axis.plot(tflop[-1], loss[-1], "o", color=colors[name], markersize=7)
    (tflop, loss), (tflop_scratch, loss_scratch) = curves["grown"], curves["scratch"]
    place = growth_place(tflop)
    height = float(PchipInterpolator(np.log(tflop), loss)(np.log(place)))
    axis.plot(place, height, "^", color=colors["grown"], markersize=13, markeredgecolor=colors["text"], zorder=5)
    last, last_scratch = (tflop[-1], loss[-1]), (tflop_scratch[-1], loss_scratch[-1])
    for text, xy, offset, name, across, along in (
        (f"grown\n{loss[-1]:.3f} nats", last, (-8, -8), "grown", "right", "top"),
        (f"from scratch\n{loss_scratch[-1]:.3f} nats", last_scratch, (0, 10), "scratch", "center", "bottom"),
        (
            "the model grows: 1 block → 3 blocks\nsame output, same loss",
            (place, height),
            (16, 8),
            "grown",
            "left",
            "bottom",
        ),
    ):
        look: dict[str, Any] = {
            "color": colors[name],
            "ha": across,
            "va": along,
            "fontsize": 11.5,
            "fontweight": "bold",
        }
        axis.annotate(text, xy, offset, textcoords="offset points", **look)
    title = f"Lower loss with {1 - last[0] / last_scratch[0]:.0%} less training compute"
    axis.set_title(title, color=colors["text"], loc="left", fontweight="bold")
    axis.set(xlabel="training compute, all stages counted (TFLOP)", ylabel="validation loss (nats per byte)")
    axis.set_xlim(0.06, 1.32)
    axis.set_ylim(1.57, 2.36)
    axis.grid(color=colors["grid"], linewidth=0.7)
    save(figure, colors, path)


def save(figure: Figure, colors: Mapping[str, str], path: Path) -> None:
    """Color the axes of a picture in a theme, and write it."""
    (axis,) = figure.axes
    axis.tick_params(colors=colors["text"], length=0)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set_color(colors["text"])
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colors["grid"])
    figure.savefig(path, dpi=150, bbox_inches="tight", transparent=True, metadata={"Software": None})


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in THEMES:
        draw(name, folder / f"growth_{name}.png")

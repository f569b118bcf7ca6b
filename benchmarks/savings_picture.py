"""Picture of what saves training compute, from the tables in ``benchmarks/results/baselines``.

python -m benchmarks.savings_picture docs/images
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.growth_picture import THEMES

RESULTS = Path(__file__).parent / "results" / "baselines"
BARS = (
    (
        "text: Muon in place of AdamW",
        "muon",
        ("from scratch, 32 tokens, Muon", "1.13 C"),
        "ratio to from scratch, 32 tokens",
    ),
)
"""Label, study, first cells of the row, and column with the FLOPs relative to the control at equal loss."""


def value_of(study: str, cells: tuple[str, ...], column: str) -> tuple[float, float, str]:
    """Read a cell: mean, deviation (0 without one), and the text."""
    rows = json.loads((RESULTS / f"{study}.json").read_text(encoding="utf-8"))["table"]
    (text,) = (row[column] for row in rows if tuple(row.values())[: len(cells)] == cells)
    mean, *deviation = map(float, re.findall(r"\d+\.\d+", text))
    return mean, deviation[0] if deviation else 0.0, text


def draw(theme: str, path: Path) -> None:
    """Draw the picture in one of the themes."""
    colors = THEMES[theme]
    figure = Figure(figsize=(8, 0.55 * len(BARS) + 1.0))
    axis = figure.add_subplot()
    for place, (label, *source) in enumerate(reversed(BARS)):
        mean, deviation, text = value_of(*source)
        axis.barh(place, mean, height=0.62, color=colors["grown"], xerr=deviation or None, ecolor=colors["text"])
        axis.annotate(
            text,
            (max(mean + deviation, 0.0), place),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=colors["text"],
        )
        axis.annotate(
            label, (0, place), (-8, 0), textcoords="offset points", va="center", ha="right", color=colors["text"]
        )
    axis.axvline(1.0, color=colors["scratch"], linewidth=2)
    axis.annotate(
        "the control, from scratch",
        (1.0, len(BARS) - 0.45),
        (0, 4),
        textcoords="offset points",
        ha="center",
        color=colors["scratch"],
        fontweight="bold",
    )
    axis.set(xlabel="training FLOPs for the same validation loss, all stages counted", xlim=(0, 1.3), yticks=[])
    axis.set_ylim(-0.6, len(BARS) - 0.4)
    axis.tick_params(colors=colors["text"], length=0)
    axis.xaxis.label.set_color(colors["text"])
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colors["grid"])
    figure.savefig(path, dpi=150, bbox_inches="tight", transparent=True, metadata={"Software": None})


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in THEMES:
        draw(name, folder / f"savings_{name}.png")

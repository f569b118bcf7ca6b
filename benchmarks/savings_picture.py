"""Picture of what saves training compute, from the tables in ``benchmarks/results/baselines``.

python -m benchmarks.savings_picture docs/images
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.growth_picture import THEMES, save

RESULTS = Path(__file__).parent / "results" / "baselines"


class Bar(NamedTuple):
    """A bar: first cells of the row of a study, and the column with the FLOPs relative to the control."""

    label: str
    study: str
    cells: tuple[str, ...]
    column: str
    inverted: bool = False


ADAMW = "ratio to from scratch, 32 tokens"
MUON = "ratio to from scratch, 32 tokens, Muon"
IMAGES_MUON = "ratio to from scratch, 8 tokens, Muon"
BARS = (
    Bar(
        "text: Muon\nagainst AdamW, each with its best batch",
        "muon",
        ("from scratch, 32 tokens, batches of 6", "1.00 C"),
        MUON,
        inverted=True,
    ),
    Bar(
        "images: Muon\nagainst AdamW", "patches_muon", ("from scratch, 8 tokens", "1.00 C"), IMAGES_MUON, inverted=True
    ),
    Bar("text: growth from 1 block to 3\nagainst from scratch, both AdamW", "muon", ("grown", "0.85 C"), ADAMW),
    Bar("text: growth from 1 block to 3\nagainst from scratch, both Muon", "muon", ("grown, Muon", "0.96 C"), MUON),
    Bar(
        "images: a quarter of the patches for 65 % of the\nsteps, against all patches, both AdamW",
        "patches",
        ("4 of 16 patches for 65%", "0.55 C"),
        "ratio to from scratch, 8 tokens",
    ),
    Bar("the same, both Muon", "patches_muon", ("4 of 16 patches for 65%, Muon", "0.62 C"), IMAGES_MUON),
)


def value_of(bar: Bar) -> tuple[float, float]:
    """Read the mean and the deviation of a bar."""
    rows = json.loads((RESULTS / f"{bar.study}.json").read_text(encoding="utf-8"))["table"]
    (text,) = (row[bar.column] for row in rows if tuple(row.values())[: len(bar.cells)] == bar.cells)
    mean, deviation = map(float, re.findall(r"\d+\.\d+", text))
    return (1 / mean, deviation / mean**2) if bar.inverted else (mean, deviation)


def draw(theme: str, path: Path) -> None:
    """Draw the picture in one of the themes."""
    colors = THEMES[theme] | {"on": "#ffffff" if theme == "light" else "#0d1117"}
    figure = Figure(figsize=(7, 0.65 * len(BARS) + 1.0))
    axis = figure.add_subplot()
    for place, bar in enumerate(reversed(BARS)):
        mean, deviation = value_of(bar)
        axis.barh(place, mean, height=0.66, color=colors["grown"], xerr=deviation, ecolor=colors["text"])
        shared: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
        axis.annotate(f"{mean:.2f} ± {deviation:.2f}", (0, place), (8, 0), color=colors["on"], weight="bold", **shared)
        axis.annotate(bar.label, (0, place), (-8, 0), ha="right", color=colors["text"], **shared)
    axis.axvline(1.0, color=colors["scratch"], linewidth=2)
    axis.annotate(
        "the control",
        (1.0, len(BARS) - 0.45),
        (0, 4),
        textcoords="offset points",
        ha="center",
        color=colors["scratch"],
        fontweight="bold",
    )
    axis.set(xlabel="training FLOPs for the same validation loss, all stages counted", xlim=(0, 1.2), yticks=[])
    axis.set_ylim(-0.6, len(BARS) - 0.4)
    save(figure, colors, path)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in THEMES:
        draw(name, folder / f"savings_{name}.png")

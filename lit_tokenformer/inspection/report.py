"""Report on parameter tokens as one page: ``index.html`` without any other file, and ``tokens.csv``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lit_tokenformer.inspection.meaning import LENS_BLOCKS
from lit_tokenformer.inspection.prune import TOLERANCE
from lit_tokenformer.inspection.statistics import ACTIVE
from lit_tokenformer.inspection.tokens import ALIKE, RARE, LayerReport, TokenReport

PAGE, TABLE = "index.html", "tokens.csv"
"""Names of the two files of a report."""

_HEIGHT = 28
"""Height of a strip of bars, in units of its view box; a bar is one unit wide."""

_MOST_PAIRS = 10
"""Maximum number of pairs of keys alike per layer on the page; the table has the nearest key of every token."""


@dataclass(frozen=True)
class Source:
    """Origin of a report, for its head and its section on growth.

    Args:
        name: Name of the checkpoint.
        facts: Facts about model and data, as (name, value).
        stages: Sizes of the model as :class:`~callbacks.RunSummary` records them, the oldest first.
        earlier: Name of the checkpoint that movement is measured from; empty for none.
    """

    name: str
    facts: Sequence[tuple[str, str]] = ()
    stages: Sequence[Mapping[str, Any]] = field(default_factory=list)
    earlier: str = ""


def write_report(folder: Path, report: TokenReport, source: Source, top: int) -> None:
    """Write the page and the table of a report.

    Args:
        folder: Existing folder.
        report: The report.
        source: Its origin.
        top: Number of tokens per layer on the page.
    """
    (folder / PAGE).write_text(render(report, source, top), encoding="utf-8")
    (folder / TABLE).write_text(report.to_csv(), encoding="utf-8")


def render(report: TokenReport, source: Source, top: int) -> str:
    """Render the page; all text of the model and of the data is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    filters: dict[str, Any] = {"signed": _signed, "compact": _compact, "label": _label}
    environment.filters |= filters
    layers = [_layer(layer, report, top) for layer in report.layers]
    tokens = sum(map(len, report.layers))
    total = sum(float(layer.statistics.importance.clamp_min(0).sum()) for layer in report.layers)
    for view, layer in zip(layers, report.layers, strict=True):
        view["share"] = float(layer.statistics.importance.clamp_min(0).sum()) / max(total, 1e-30)
    alike = [(layer, pairs) for layer in report.layers if (pairs := layer.alike)]
    return environment.get_template("report.html").render(
        source=source,
        report=report,
        layers=layers,
        removed=[_removal(*one) for one in report.measured],
        scatter=_scatter(report),
        tokens=tokens,
        rare=sum(int(layer.rare.sum()) for layer in report.layers),
        dead=[(layer, layer.dead) for layer in report.layers if layer.dead],
        alike=[(layer, pairs[:_MOST_PAIRS]) for layer, pairs in alike],
        alike_count=sum(len(pairs) for _, pairs in alike),
        copies=sum(copy for _, pairs in alike for *_, copy in pairs),
        growths=_growths(report, source),
        limits={"active": ACTIVE, "rare": RARE, "dead": TOLERANCE, "alike": ALIKE, "blocks": LENS_BLOCKS},
    )


def _layer(layer: LayerReport, report: TokenReport, top: int) -> dict[str, Any]:
    """Describe a layer and its most important tokens."""
    one, use = layer.statistics, layer.statistics.use
    tokens = []
    for token in layer.important[:top]:
        moved = float(layer.moved[token])
        by_class = [] if one.by_class is None else (one.by_class[:, token] / one.by_class[:, token].max()).tolist()
        tokens.append(
            {
                "number": token,
                "importance": float(one.importance[token]),
                "removal": layer.removals.get(token),
                "use": float(use[token]),
                "active": float(one.active[token]),
                "growth": int(layer.origins.growth[token]),
                "original": int(layer.origins.original[token]),
                "moved": None if moved != moved else moved,
                "contexts": layer.contexts.get(token, []),
                "written": layer.written.get(token),
                "classes": list(zip(report.class_names, by_class, strict=False)),
            }
        )
    return {
        "report": layer,
        "tokens": tokens,
        "effective": one.effective,
        "rare": int(layer.rare.sum()),
        "bars": _bars(layer),
        "height": _HEIGHT,
    }


def _bars(layer: LayerReport) -> list[tuple[int, str]]:
    """Draw the use of each token as a bar: one SVG path for the tokens of each growth."""
    heights = layer.statistics.use / layer.statistics.use.max().clamp_min(1e-30) * _HEIGHT
    paths = []
    for growth in layer.origins.growth.unique().tolist():
        places = (layer.origins.growth == growth).nonzero()[:, 0].tolist()
        bars = (f"M{place} {_HEIGHT}v-{float(heights[place]):.1f}h1V{_HEIGHT}" for place in places)
        paths.append((max(growth, 0), "".join(bars)))
    return paths


def _removal(layer: str, token: int, importance: float, change: float) -> dict[str, Any]:
    return {"layer": layer, "token": token, "importance": importance, "change": change}


def _scatter(report: TokenReport) -> dict[str, Any] | None:
    """Place importance and measured removal in a square of 100 units with logarithmic axes."""
    points = [(importance, change) for *_, importance, change in report.measured if min(importance, change) > 0]
    if len(points) < 2:
        return None
    low, high = math.log(min(map(min, points))), math.log(max(map(max, points)))
    span = max(high - low, 1e-9)
    placed = [tuple(round((math.log(value) - low) / span * 100, 2) for value in point) for point in points]
    return {"points": [(x, 100 - y) for x, y in placed], "low": math.exp(low), "high": math.exp(high)}


def _growths(report: TokenReport, source: Source) -> list[dict[str, Any]]:
    """Describe each growth: sizes, cost, best scores before and after it, and the tokens that it added."""
    found = []
    for number, event in enumerate(report.events, start=1):
        masks = [(layer, layer.origins.growth == number) for layer in report.layers]
        added = sum(int(mask.sum()) for _, mask in masks)
        gained = sum(float(layer.statistics.importance[mask].sum()) for layer, mask in masks)
        uses = [layer.statistics.use[mask] / layer.statistics.use.mean() for layer, mask in masks if mask.any()]
        before, after = event.get("before", {}), event.get("after", {})
        found.append(
            {
                "number": number,
                "step": event.get("step"),
                "epoch": event.get("epoch"),
                "method": event.get("method"),
                "trigger": event.get("trigger"),
                "sizes": [(kind, before.get(kind), size) for kind, size in after.items() if size != before.get(kind)],
                "parameters": event.get("parameters"),
                "difference": event.get("output_difference"),
                "seconds": event.get("seconds"),
                "scores": _scores(event, source),
                "added": added,
                "importance": gained,
                "use": float(torch.cat(uses).mean()) if uses else None,
            }
        )
    return found


def _scores(event: Mapping[str, Any], source: Source) -> tuple[str, float | None, float | None] | None:
    """Find the best validation scores of the sizes before and after a growth, with their name."""
    for before, after in zip(source.stages, source.stages[1:], strict=False):
        if after.get("begins_at_step") == event.get("step"):
            best = [stage.get("best") or {} for stage in (before, after)]
            name = next((one["monitor"] for one in best if "monitor" in one), None)
            return None if name is None else (name, best[0].get("score"), best[1].get("score"))
    return None


def _signed(value: float | None) -> str:
    """Format a change of the loss, in units of 1e-4."""
    return "-" if value is None else f"{value * 1e4:+.2f}"


def _label(layer: str) -> str:
    """Shorten the name of a layer."""
    return layer.removeprefix("backbone.")


def _compact(value: Any) -> str:
    """Format a number with three digits; a dash for none."""
    if value is None or value != value:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"

"""What came out, for ``compare.py``: table, JSON and picture."""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from comparison_arms import Planned, Setting
from comparison_fits import Fit
from comparison_plan import reference_of, training_flops
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from sklearn.isotonic import isotonic_regression

from lit_tokenformer.cost import model_cost

ALIKE = 0.05
"""Sizes that differ by less are taken for the same."""


def row(setting: Setting, planned: Planned, results: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """An arm's row of the table, from what came out for each seed."""
    done = {seed: one for seed, one in results.items() if not one["failed"]}
    failed = {seed: one["failed"] for seed, one in results.items() if one["failed"]}
    samples = setting.samples_per_step * setting.sizes.get("context_length", 1)

    def over_seeds(name: str) -> list[float]:
        return [one[name] for one in done.values() if one[name] is not None]

    losses, scores = over_seeds("loss"), over_seeds("score")
    medians = {
        "throughput": [samples / seconds for seconds in over_seeds("step_seconds")],
        "train_seconds": over_seeds("seconds"),
        "peak_memory_mb": [peak / 1e6 for peak in over_seeds("peak_bytes")],
    }
    return {
        "label": planned.arm.label,
        "preset": planned.arm.preset,
        "parameters": planned.parameters,
        "non_embedding": planned.blocks,
        "differs": planned.differs,
        "forward_flops": model_cost(planned.config, planned.final_tokens).flops,
        "training_flops": training_flops(setting, planned, planned.steps) if planned.steps else None,
        "steps": planned.steps,
        "seen": planned.steps * samples,
        "loss": statistics.mean(losses) if losses else None,
        "loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
        "score": statistics.mean(scores) if scores else None,
        "score_std": statistics.stdev(scores) if len(scores) > 1 else None,
        "score_name": next((one["score_name"] for one in done.values()), None),
        **{name: statistics.median(values) if values else None for name, values in medians.items()},
        "lr": planned.lr,
        "seeds": list(done),
        "failed": list(failed),
        "notes": [*planned.notes, *(f"seed {seed} failed: {told}" for seed, told in failed.items())],
    }


def sort_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by loss, failed ones last; ``ties`` says whether the difference to the best is within the spread of seeds.

    That is the standard deviation of a difference of two single runs.
    """
    ordered = sorted(rows, key=lambda one: math.inf if one["loss"] is None else one["loss"])
    best = ordered[0]
    for one in ordered:
        known = None not in (one["loss"], one["loss_std"], best["loss_std"])
        one["ties"] = bool(
            one is not best and known and one["loss"] - best["loss"] <= math.hypot(one["loss_std"], best["loss_std"])
        )
    return ordered


def markdown(rows: list[dict[str, Any]], unit: str, reference: str, matched: str, jobs: int) -> str:
    """The table, and below it what a reader should know.

    Args:
        rows: In their order.
        unit: What is seen: tokens or images.
        reference: The label of the arm that sizes are compared with.
        matched: What is compared there: parameters or flops.
        jobs: Fits that ran side by side.
    """
    score = next((one["score_name"] for one in rows if one["score_name"]), None)
    cells = [_cells(one, unit, matched, score) for one in rows]
    lines = ["| " + " | ".join(cells[0]) + " |", "|---" + "|---:" * (len(cells[0]) - 1) + "|"]
    lines += ["| " + " | ".join(one.values()) + " |" for one in cells]
    lines += [
        "",
        "Sorted by the loss at the end of the fit: mean ± sample standard deviation over seeds. FLOPs: of one "
        f"sample's forward pass at the final size, and of all training steps. {unit}/s: the median step. Peak memory: "
        "what a training step takes beyond what was there before the model, weights and optimizer included.",
    ]
    if any(one["ties"] for one in rows):
        lines.append("\n≈ not told apart from the best: the difference is within the spread of the seeds.")
    if all(one["loss_std"] is None for one in rows):
        lines.append("\nOne seed each: no difference here is told apart from the spread of seeds.")
    off_rows = [f"{one['label']} {one['differs']:+.1%}" for one in rows if abs(one["differs"]) > ALIKE]
    if off_rows:
        name = {"parameters": "non-embedding parameters", "flops": "FLOPs of the blocks"}[matched]
        lines.append(f"\n† {name} differ by more than 5 % from those of {reference}: {', '.join(off_rows)}.")
    if jobs > 1:
        lines.append(f"\n{jobs} fits ran side by side, which costs throughput.")
    notes = [f"- {one['label']}: {note}" for one in rows for note in one["notes"]]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _cells(one: dict[str, Any], unit: str, matched: str, score: str | None) -> dict[str, str]:
    """A row's cells by the head of their columns."""
    off = " †" if abs(one["differs"]) > ALIKE else ""
    done = one["loss"] is not None
    loss = _spread(one["loss"], one["loss_std"], 4) + (" ≈" if one["ties"] else "")
    return {
        "arm": one["label"],
        "parameters": f"{one['parameters']:,}",
        "non-embedding": f"{one['non_embedding']:,}" + (off if matched == "parameters" else ""),
        "forward FLOPs": f"{one['forward_flops']:.3g}" + (off if matched == "flops" else ""),
        "training FLOPs": "-" if one["training_flops"] is None else f"{one['training_flops']:.3g}",
        f"{unit} seen": f"{one['seen']:,}",
        "validation loss": loss if done else "failed",
        **({score: _spread(one["score"], one["score_std"], 2 if "%" in score else 3)} if score else {}),
        f"{unit}/s": f"{one['throughput']:,.0f}" if done else "-",
        "peak memory": f"{one['peak_memory_mb']:,.0f} MB" if done else "-",
        "learning rate": "-" if one["lr"] is None else f"{one['lr']:g}",
        "seeds": " ".join(map(str, one["seeds"])) + "".join(f" ({seed} failed)" for seed in one["failed"]),
    }


def _spread(mean: float | None, std: float | None, digits: int) -> str:
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def draw(curves: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """Validation loss against training compute: mean over seeds, band from the lowest to the highest, growths as
    triangles. Labels stand to the right in the order of the losses at the end.

    Args:
        curves: For each arm in the order of the table, the curves of its seeds.
        output: The picture.
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
        colour = f"C{number % 10}"
        axis.plot(compute, mean, "o--" if number >= 10 else "o-", color=colour, linewidth=1.8, markersize=3.5)
        axis.fill_between(compute, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.12, linewidth=0)
        places = found[0]["growths"]
        heights = np.interp(places, compute, mean)
        axis.plot(places, heights, "^", color=colour, markeredgecolor="k", markersize=9, zorder=5)
        ends[label] = (float(compute[-1]), float(mean[-1]))
    if max(place for place, _ in ends.values()) > 8 * min(one[0]["tflops"][0] for one in drawn.values()):
        axis.set_xscale("log")
    if axis.dataLim.y1 > 2 * min(loss for _, loss in ends.values()):
        axis.set_yscale("log")
    for scale in (axis.xaxis, axis.yaxis):
        if scale.get_scale() == "log":
            scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
            scale.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            scale.set_minor_formatter(NullFormatter())
    axis.set(xlabel="training compute (TFLOP)", ylabel="validation loss (nats)")
    axis.grid(alpha=0.25)
    _label_ends(axis, ends)
    if any(one["growths"] for found in drawn.values() for one in found):
        axis.plot([], [], "^", color="w", markeredgecolor="k", markersize=9, label="growth")
        axis.legend(loc="upper right")
    figure.savefig(output, dpi=120, bbox_inches="tight")


def _label_ends(axis: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """Writes each curve's label and last loss to the right of all, joined to its end."""
    axis.set_ylim(*axis.get_ylim())  # they stay as they are
    to_share = axis.transData + axis.transAxes.inverted()
    heights = spread_out([to_share.transform(end)[1] for end in ends.values()], min(0.055, 1 / len(ends)))
    for number, ((label, end), height) in enumerate(zip(ends.items(), heights, strict=True)):
        colour = f"C{number % 10}"
        line = {"arrowstyle": "-", "color": colour, "linestyle": ":", "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 4}
        axis.annotate(
            f"{end[1]:.3f}  {label}",
            xy=end,
            xytext=(1.04, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            weight="bold",
            annotation_clip=False,
            arrowprops=line,
        )


def spread_out(wanted: Sequence[float], gap: float) -> list[float]:
    """The places nearest to the wanted ones, in their order, at least ``gap`` apart and from 0 to 1.

    Example:
        >>> [round(place, 3) for place in spread_out([0.5, 0.5, 0.1], 0.2)]
        [0.4, 0.6, 0.1]
    """
    order = np.argsort(wanted, kind="stable")
    below = gap * np.arange(len(order))  # what the places below take
    found = np.empty(len(order))
    found[order] = isotonic_regression(np.array(wanted)[order] - below, y_min=0, y_max=1 - below[-1]) + below
    return found.tolist()


def write(
    setting: Setting, planned: list[Planned], fits: dict[tuple[str, int], Fit], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Writes table and picture, and prints the table."""
    results = {key: fit.result for key, fit in fits.items()}
    of_arm: dict[str, dict[int, dict[str, Any]]] = {one.arm.label: {} for one in planned}
    for (label, seed), found in results.items():
        of_arm[label][seed] = found
    rows = sort_rows([row(setting, one, of_arm[one.arm.label]) for one in planned])
    unit = "tokens" if "context_length" in setting.sizes else "images"
    reference = reference_of([one.arm for one in planned], options.to).label
    table = markdown(rows, unit, reference, options.match or "parameters", options.jobs)
    curves = {
        one["label"]: [found["curve"] for found in of_arm[one["label"]].values() if not found["failed"]] for one in rows
    }
    base = re.sub(r"\.(md|csv|json|png)$", "", options.output)
    Path(base).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{base}.md").write_text(table, encoding="utf-8")
    with Path(f"{base}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [key for key in rows[0] if key != "notes"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(
            {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in one.items()}
            for one in rows
        )
    environments = [one["environment"] for one in results.values() if "environment" in one]
    summary = getattr(setting.data, "corpus_summary", None)
    everything = {
        "settings": vars(options),
        "config": setting.config,
        "data": summary() if summary else {"training images": setting.data.num_train_samples},
        "environments": [one for i, one in enumerate(environments) if one not in environments[:i]],
        "arms": [{**one, "runs": of_arm[one["label"]]} for one in rows],
    }
    Path(f"{base}.json").write_text(json.dumps(everything, indent=1), encoding="utf-8")
    draw(curves, Path(f"{base}.png"))
    print(f"\n{table}")
    return rows

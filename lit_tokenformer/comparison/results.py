"""Results of a comparison: table, CSV and JSON."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_tokenformer.comparison.arms import Planned
from lit_tokenformer.comparison.fits import Fit
from lit_tokenformer.comparison.plan import reference_of, training_flops
from lit_tokenformer.comparison.setting import Setting
from lit_tokenformer.cost import model_cost

NAME = "comparison"
"""Stem of the files in the output folder."""
ALIKE = 0.05
"""Relative tolerance within which sizes are equal."""


def row(setting: Setting, planned: Planned, results: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Build the table row of an arm from its results by seed."""
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
        "forward_flops": model_cost(planned.final).flops,
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
        "notes": [*planned.notes, *(f"seed {seed} failed: {reason}" for seed, reason in failed.items())],
    }


def sort_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort rows by loss, failed ones last, and mark ``ties`` with the best.

    A tie differs from the best by at most the standard deviation of the difference of two single runs.
    """
    ordered = sorted(rows, key=lambda one: math.inf if one["loss"] is None else one["loss"])
    best = ordered[0]
    for one in ordered:
        known = None not in (one["loss"], one["loss_std"], best["loss_std"])
        one["ties"] = bool(
            one is not best and known and one["loss"] - best["loss"] <= math.hypot(one["loss_std"], best["loss_std"])
        )
    return ordered


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows, each a mapping from column to cell, as a Markdown table with a final newline.

    Example:
        >>> print(table([{"arm": "a", "loss": 1.5}]), end="")
        | arm | loss |
        |---|---:|
        | a | 1.5 |
    """
    head = "|---" + "|---:" * (len(rows[0]) - 1) + "|"
    body = ["| " + " | ".join(map(str, cells)) + " |" for cells in (rows[0], *(row.values() for row in rows))]
    return "\n".join([body[0], head, *body[1:], ""])


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, each a mapping from column to value, as CSV."""
    with file.open("w", encoding="utf-8", newline="") as target:
        writer = csv.DictWriter(target, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: list[dict[str, Any]], unit: str, reference: str, matched: str, jobs: int) -> str:
    """Format the table and its footnotes.

    Args:
        rows: Sorted rows.
        unit: ``tokens`` or ``images``.
        reference: Label of the reference arm.
        matched: ``parameters`` or ``flops``.
        jobs: Number of parallel fits.
    """
    score = next((one["score_name"] for one in rows if one["score_name"]), None)
    cells = [_cells(one, unit, matched, score) for one in rows]
    lines = [
        table(cells),
        "Sorted by final validation loss: mean ± sample standard deviation over seeds. Forward FLOPs are per sample "
        f"at the final size; training FLOPs are those of all steps. {unit}/s is the median over steps. Peak memory is "
        "that of a training step, with weights and optimizer state, beyond the process before the model.",
    ]
    if any(one["ties"] for one in rows):
        lines.append("\n≈ tie with the best: the difference is within the standard deviation over seeds.")
    if all(one["loss_std"] is None for one in rows):
        lines.append("\nOne seed each: the variance over seeds is unknown, so no difference is significant.")
    off_rows = [f"{one['label']} {one['differs']:+.1%}" for one in rows if abs(one["differs"]) > ALIKE]
    if off_rows:
        name = {"parameters": "non-embedding parameters", "flops": "FLOPs of the blocks"}[matched]
        lines.append(f"\n† {name} differ by more than 5 % from those of {reference}: {', '.join(off_rows)}.")
    if jobs > 1:
        lines.append(f"\n{jobs} fits ran in parallel, which reduces throughput.")
    notes = [f"- {one['label']}: {note}" for one in rows for note in one["notes"]]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _cells(one: dict[str, Any], unit: str, matched: str, score: str | None) -> dict[str, str]:
    """Format the cells of a row, by column."""
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


def write(
    setting: Setting,
    planned: list[Planned],
    fits: dict[tuple[str, int], Fit],
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """Write table and plot into the output folder, and print the table.

    Args:
        setting: Data and budget.
        planned: Plans of all arms.
        fits: Fits by label and seed.
        settings: Options of the command.

    Returns:
        Sorted rows, best first.
    """
    results: dict[str, dict[int, dict[str, Any]]] = {one.arm.label: {} for one in planned}
    for (label, seed), fit in fits.items():
        results[label][seed] = fit.result
    rows = sort_rows([row(setting, one, results[one.arm.label]) for one in planned])
    unit = "tokens" if "context_length" in setting.sizes else "images"
    reference = reference_of([one.arm for one in planned], settings["reference"]).label
    text = markdown(rows, unit, reference, settings["match"] or "parameters", settings["jobs"])
    base = Path(settings["output"]) / NAME
    base.parent.mkdir(parents=True, exist_ok=True)
    base.with_suffix(".md").write_text(text, encoding="utf-8")
    columns = [
        {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in one.items()}
        for one in rows
    ]
    write_csv(base.with_suffix(".csv"), [{key: one[key] for key in one if key != "notes"} for one in columns])
    environments = [one["environment"] for own in results.values() for one in own.values() if "environment" in one]
    summary = getattr(setting.data, "corpus_summary", None)
    everything = {
        "settings": settings,
        "config": setting.config,
        "data": summary() if summary else {"training images": setting.data.num_train_samples},
        "environments": [one for i, one in enumerate(environments) if one not in environments[:i]],
        "arms": [{**one, "runs": results[one["label"]]} for one in rows],
    }
    base.with_suffix(".json").write_text(json.dumps(everything, indent=1, default=str) + "\n", encoding="utf-8")
    curves = {
        one["label"]: [run["curve"] for run in results[one["label"]].values() if not run["failed"]] for one in rows
    }
    print(f"\n{text}")
    try:
        from lit_tokenformer.comparison.picture import draw
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print(f"{base}.png: skipped, needs matplotlib (pip install matplotlib)")
    else:
        draw(curves, base.with_suffix(".png"))
    return rows

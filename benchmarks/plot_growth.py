"""Draws a run from its TensorBoard logs: scores and loss against training compute, with its growths.

    python benchmarks/plot_growth.py LOG_DIR OUTPUT.png

Needs matplotlib (``pip install -e '.[dev]'``).
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from runs import Run

SCORES = {"val/acc1": ("validation accuracy (%)", 100), "val/bits_per_byte": ("validation bits per byte", 1)}


def main(log_dir: str, output: str) -> None:
    """Reads the events in ``log_dir`` and writes a picture to ``output``."""
    run = Run(log_dir)
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[2, 1])
    for tag, colour in (("train/loss", "tab:gray"), ("val/loss", "tab:orange")):
        steps, values = run.series(tag)
        upper.plot(run.compute(steps), values, color=colour, label=tag, linewidth=1.2)
    upper.set_yscale("log")
    upper.set_ylabel("loss (nats)")
    right = upper.twinx()
    for tag, (label, scale) in SCORES.items():
        if tag in run.tags:
            steps, values = run.series(tag)
            right.plot(run.compute(steps), scale * values, color="tab:blue", label=tag)
            right.set_ylabel(label, color="tab:blue")
    steps, values = run.series("size/parameters")
    lower.step([0, *run.compute(steps[1:]), run.compute(steps[-1:])[0]], [*values, values[-1]], where="post", color="k")
    lower.set_ylabel("parameters")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("training compute (TFLOP)")
    for place in run.compute(run.growths()):
        for axis in (upper, lower):
            axis.axvline(place, color="tab:green", linestyle="--", linewidth=1)
    upper.plot([], [], color="tab:green", linestyle="--", label="growth")
    upper.legend(loc="center right")
    figure.tight_layout()
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])

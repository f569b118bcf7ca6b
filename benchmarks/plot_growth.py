"""Draws a run from its TensorBoard logs: validation accuracy and loss against training compute, with its growths.

    python benchmarks/plot_growth.py LOG_DIR OUTPUT.png

Needs matplotlib (``pip install -e '.[dev]'``).
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def main(log_dir: str, output: str) -> None:
    """Reads the events in ``log_dir`` and writes a picture to ``output``."""
    events = EventAccumulator(log_dir, size_guidance={"scalars": 0})
    events.Reload()

    def series(tag: str) -> tuple[list[int], list[float]]:
        scalars = events.Scalars(tag)
        return [scalar.step for scalar in scalars], [scalar.value for scalar in scalars]

    flop_steps, flops = series("compute/training_flops")

    def compute(step: int) -> float:
        return next((value for at, value in zip(flop_steps, flops, strict=True) if at >= step), flops[-1]) / 1e12

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[2, 1])
    for tag, colour in (("train/loss", "tab:gray"), ("val/loss", "tab:orange")):
        steps, values = series(tag)
        upper.plot([compute(step) for step in steps], values, color=colour, label=tag, linewidth=1.2)
    upper.set_yscale("log")
    upper.set_ylabel("loss (nats)")
    right = upper.twinx()
    steps, values = series("val/acc1")
    right.plot([compute(step) for step in steps], [100 * value for value in values], color="tab:blue", label="val/acc1")
    right.set_ylabel("validation accuracy (%)", color="tab:blue")
    steps, values = series("size/parameters")
    ends = [*(compute(step) for step in steps[1:]), flops[-1] / 1e12]
    lower.step(
        [compute(steps[0]) * 0, *ends], [value / 1e6 for value in (*values, values[-1])], where="post", color="k"
    )
    lower.set_ylabel("parameters (M)")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("training compute (TFLOP)")
    for step, _ in zip(*series("growth/output_difference"), strict=True):
        for axis in (upper, lower):
            axis.axvline(compute(step), color="tab:green", linestyle="--", linewidth=1)
    upper.plot([], [], color="tab:green", linestyle="--", label="growth")
    upper.legend(loc="center right")
    figure.tight_layout()
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])

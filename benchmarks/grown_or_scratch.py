"""Trains a config as it is and once more without growth, at its final size from the start, for as many steps; draws the
validation loss of both against training compute.

    python benchmarks/grown_or_scratch.py CONFIG OUTPUT.png [--logs FOLDER] [--draw-only]

CONFIG is a YAML file with one ParameterGrowthCallback. Needs matplotlib (``pip install -e '.[dev]'``).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import yaml

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from runs import Run

GROWTH = "callbacks.ParameterGrowthCallback"


def from_scratch(config: dict[str, Any]) -> dict[str, Any]:
    """The config without growth, born at the size where its schedule ends."""
    callbacks = config["trainer"]["callbacks"]
    (growth,) = (one for one in callbacks if one["class_path"] == GROWTH)
    callbacks.remove(growth)
    config["model"]["init_args"]["overrides"]["param_tokens"] = list(growth["init_args"]["schedule"].values())[-1]
    return config


def fit(config: dict[str, Any], folder: Path) -> None:
    """Trains in a process of its own."""
    folder.mkdir(parents=True)
    file = folder / "given.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "lit_tokenformer", "fit", "--config", str(file)]
    command += ["--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false"]
    subprocess.run(command, check=True)


def draw(folders: dict[str, Path], output: str) -> None:
    """Validation loss against compute, and against steps."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for (name, folder), colour in zip(folders.items(), ("tab:blue", "tab:orange"), strict=True):
        run = Run(str(folder / "lightning_logs" / "version_0"))
        steps, losses = run.series("val/loss")
        for axis, places, growths in (
            (axes[0], run.compute(steps), run.compute(run.growths())),
            (axes[1], steps, run.growths()),
        ):
            axis.plot(places, losses, marker=".", color=colour, label=name)
            for place in growths:
                axis.axvline(place, color=colour, linestyle="--", linewidth=1)
        print(f"{name}: validation loss {losses[-1]:.4f} nats after {run.compute(steps[-1:])[0]:.1f} TFLOP", end="")
        if "val/bits_per_byte" in run.tags:
            print(f", {run.series('val/bits_per_byte')[1][-1]:.3f} bits per byte", end="")
        print()
    axes[0].set_xlabel("training compute (TFLOP)")
    axes[1].set_xlabel("optimizer steps")
    axes[0].set_ylabel("validation loss (nats)")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(output, dpi=120)


def main(config: str, output: str, logs: str, draw_only: bool) -> None:
    """Runs both fits below ``logs`` unless they are there already, and draws them."""
    folders = {"grown": Path(logs) / "grown", "final size from the start": Path(logs) / "scratch"}
    if not draw_only:
        grown, scratch = (yaml.safe_load(Path(config).read_text(encoding="utf-8")) for _ in folders)
        for settings, folder in zip((grown, from_scratch(scratch)), folders.values(), strict=True):
            fit(settings, folder)
    draw(folders, output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("output")
    parser.add_argument("--logs", default="lightning_logs/grown_or_scratch")
    parser.add_argument("--draw-only", action="store_true")
    main(**vars(parser.parse_args()))

"""Trains a multi-task config jointly, and each of its tasks alone for as many steps on the same batches, with the same
optimizer and growth; prints what each scores.

    python benchmarks/joint_or_alone.py [CONFIG] [--seeds 0 1 2] [--logs FOLDER] [--show-only]

Only the task that ends an epoch may have fewer batches than the other one.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from runs import Run

from lit_tokenformer import tasks
from lit_tokenformer.models import preset_config

SCORES = {"LitImageClassifier": "acc1", "LitCausalLM": "bits_per_byte", "LitMaskedLM": "accuracy"}
"""Score that each task is judged by."""


def kind_of(task: dict[str, Any]) -> str:
    """Name of a task's class."""
    return str(task["class_path"]).rpartition(".")[2]


def alone(config: dict[str, Any], name: str, batches: int) -> dict[str, Any]:
    """The config of one of the tasks by itself.

    Args:
        config: Of all of them.
        name: The task.
        batches: Batches in an epoch of the joint fit.
    """
    config = copy.deepcopy(config)
    model = config["model"]["init_args"]
    task = model["tasks"][name]
    required = getattr(tasks, kind_of(task)).required_fields
    parts = {} if preset_config(model["preset"]).head == required["head"] else required
    own = task.get("init_args", {})
    overrides = {**parts, **model.get("overrides", {}), **own.get("overrides", {})}
    settings = {key: value for key, value in model.items() if key not in ("tasks", "loss_weights")}
    settings |= {**own, "overrides": overrides}
    config["model"] = {"class_path": kind_of(task), "init_args": settings}
    config["data"] = config["data"]["init_args"]["tasks"][name]
    trainer = config["trainer"]
    trainer["callbacks"] = [one for one in trainer["callbacks"] if not one["class_path"].endswith("ModelCheckpoint")]
    trainer["limit_train_batches"] = batches
    return config


def fit(config: dict[str, Any], folder: Path) -> None:
    """Trains in a process of its own, unless that was done before."""
    if (folder / "lightning_logs").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "given.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "lit_tokenformer", "fit", "--config", str(file)]
    command += ["--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false"]
    subprocess.run(command, check=True)


def last(folder: Path, score: str) -> tuple[float, int]:
    """The score at the end of a fit, and its optimizer steps."""
    run = Run(str(folder / "lightning_logs" / "version_0"))
    steps, values = run.series(f"val/{score}")
    return float(values[-1]), int(steps[-1]) + 1


def main(config: str, seeds: list[int], logs: str, show_only: bool) -> None:
    """Runs all fits below ``logs`` unless they are there already, and prints a table."""
    print("| seed | task | score | alone | joint | joint / alone | steps |\n|---|---|---|---|---|---|---|")
    for seed in seeds:
        given = {**yaml.safe_load(Path(config).read_text(encoding="utf-8")), "seed_everything": seed}
        folder = Path(logs) / f"seed{seed}"
        scores = {name: SCORES[kind_of(task)] for name, task in given["model"]["init_args"]["tasks"].items()}
        if not show_only:
            fit(given, folder / "joint")
        steps = last(folder / "joint", "loss")[1]
        batches = steps // given["trainer"]["max_epochs"]
        for name, score in scores.items():
            if not show_only:
                fit(alone(given, name, batches), folder / name)
            (single, taken), (joint, _) = last(folder / name, score), last(folder / "joint", f"{name}/{score}")
            if taken != steps:
                raise ValueError(f"data.{name}: an epoch of it is shorter than one of the joint fit")
            print(f"| {seed} | {name} | {score} | {single:.4f} | {joint:.4f} | {joint / single:.1%} | {steps} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="configs/multitask_small.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--logs", default="lightning_logs/joint_or_alone")
    parser.add_argument("--show-only", action="store_true")
    main(**vars(parser.parse_args()))

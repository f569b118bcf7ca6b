"""A multi-task config against each of its tasks alone, for as many steps on the same batches.

    python -m benchmarks.joint_or_alone [CONFIG] [--seeds 0 1 2] [--logs FOLDER]

Only the task that ends an epoch may have fewer batches than the other one. Finished fits in ``--logs`` are reused.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import yaml

from lit_tokenformer import tasks
from lit_tokenformer.comparison.fits import Fit, Runner
from lit_tokenformer.models import preset_config

SCORES = {"LitImageClassifier": "acc1", "LitCausalLM": "bits_per_byte", "LitMaskedLM": "accuracy"}
"""Score that each task is judged by."""


def kind_of(task: dict[str, Any]) -> str:
    """Name of a task's class."""
    return str(task["class_path"]).rpartition(".")[2]


def measured(config: dict[str, Any]) -> dict[str, Any]:
    """Replace checkpoints by the meter."""
    callbacks = config["trainer"]["callbacks"]
    kept = [one for one in callbacks if not one["class_path"].endswith("ModelCheckpoint")]
    config["trainer"]["callbacks"] = [*kept, {"class_path": "lit_tokenformer.comparison.meter.Meter"}]
    config["trainer"] |= {"enable_progress_bar": False}
    return config


def alone(config: dict[str, Any], name: str, batches: int) -> dict[str, Any]:
    """Build the config of one task by itself, with ``batches`` batches per epoch as in the joint fit."""
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
    config["trainer"]["limit_train_batches"] = batches
    return config


def last(fit: Fit, score: str) -> tuple[float, int]:
    """Final score of a fit, and its optimizer steps."""
    if fit.measured["failed"]:
        raise SystemExit(f"{fit.arm}: {fit.measured['failed']}; see {fit.folder}")
    steps, values = fit.curve.series(f"val/{score}")
    return float(values[-1]), int(steps[-1]) + 1


def main(config: str, seeds: list[int], logs: Path) -> None:
    """Run all fits, and print a table."""
    print("| seed | task | score | alone | joint | joint / alone | steps |\n|---|---|---|---|---|---|---|")
    with Runner(logs, 1, False) as runner:
        for seed in seeds:
            given = {**yaml.safe_load(Path(config).read_text(encoding="utf-8")), "seed_everything": seed}
            scores = {name: SCORES[kind_of(task)] for name, task in given["model"]["init_args"]["tasks"].items()}
            joint = runner.fit("joint", f"seed {seed}", measured(given))
            runner.run([joint])
            steps = last(joint, "loss")[1]
            batches = steps // given["trainer"]["max_epochs"]
            for name, score in scores.items():
                fit = runner.fit(name, f"seed {seed}", alone(given, name, batches))
                runner.run([fit])
                (single, taken), (both, _) = last(fit, score), last(joint, f"{name}/{score}")
                if taken != steps:
                    raise SystemExit(f"data.{name}: an epoch of it is shorter than one of the joint fit")
                print(f"| {seed} | {name} | {score} | {single:.4f} | {both:.4f} | {both / single:.1%} | {steps} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", nargs="?", default="configs/multitask_small.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--logs", type=Path, default=Path("lightning_logs/joint_or_alone"))
    main(**vars(parser.parse_args()))

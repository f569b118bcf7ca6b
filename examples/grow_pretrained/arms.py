"""Arms of the demonstration, equal in training FLOPs, and their results.

A base model that another library trained is imported, grown in a fit and exported; that library alone loads and
evaluates the export. The other arms continue the base model without growth, or train the large one from scratch.
"""

from __future__ import annotations

import copy
import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from lit_tokenformer.cli.main import main
from lit_tokenformer.cost import model_cost
from lit_tokenformer.models import preset_config


@dataclass(frozen=True)
class Demonstration:
    """A base model, its data, and the budgets.

    Args:
        train_base: ``(folder, seed, steps)``: train the base model with its own library, and save it in its format.
        score: ``(folder) -> scores``: load a folder with that library alone and evaluate it; ``loss`` is compared.
        format: Format of ``lit-tokenformer export``.
        settings: Config of ``lit-tokenformer fit``.
        preset: Architecture of the base model.
        fields: Its fields, other than those of the data.
        of_data: Fields that follow from the data.
        final: Fields of the large model that differ.
        batch: Samples in an optimizer step.
        base_steps: Optimizer steps of the base model.
        share: FLOPs of the further training, relative to those of the base model.
        rates: Learning rates of the arms that start from the base model; tried with the first seed.
        scratch_rates: Those of the arms from scratch; tried on the FLOPs of the further training.
        variants: Other settings of the grown arm, tried with the first seed: of the growth callback, ``schedule`` of
            the learning rate, or other ``sizes`` in the growth schedule with their ``final`` fields.
    """

    train_base: Callable[[Path, int, int], None]
    score: Callable[[Path], dict[str, float]]
    format: str
    settings: Mapping[str, Any]
    preset: str
    fields: Mapping[str, Any]
    of_data: Mapping[str, Any]
    final: Mapping[str, Any]
    batch: int
    base_steps: int
    share: float
    rates: tuple[float, ...]
    scratch_rates: tuple[float, ...]
    variants: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def step_flops(self, changed: Mapping[str, Any]) -> float:
        """Return the training FLOPs of an optimizer step of the base model with changed fields."""
        fields = {**self.fields, **self.of_data, **changed}
        return model_cost(preset_config(self.preset, **fields)).training_flops * self.batch

    @property
    def base_flops(self) -> float:
        return self.base_steps * self.step_flops({})


@dataclass(frozen=True)
class Arm:
    """A way to spend a budget.

    Args:
        from_base: Whether it starts from the base model.
        grows: Whether it grows; otherwise an arm from scratch has the final size.
        pays_base: Whether its budget includes the FLOPs of the base model.
    """

    from_base: bool
    grows: bool = False
    pays_base: bool = False


ARMS = {
    "grown": Arm(from_base=True, grows=True),
    "continued": Arm(from_base=True),
    "scratch, same FLOPs": Arm(from_base=False),
    "scratch, FLOPs of base and growth": Arm(from_base=False, pays_base=True),
}

AT = 0.05
"""Share of the optimizer steps before the growth."""


class Study:
    """Run the arms below a folder; fits found there are not repeated.

    Args:
        demonstration: What is trained.
        output: Folder of the fits.
    """

    def __init__(self, demonstration: Demonstration, output: Path) -> None:
        self.of, self.output = demonstration, output

    def base(self, seed: int) -> dict[str, float]:
        """Train and import the base model of a seed; return its scores."""
        folder = self.output / f"base-{seed}"
        result = folder / "result.json"
        if not result.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self.of.train_base(folder, seed, self.of.base_steps)
            if not (folder / "base.ckpt").exists():
                run("import", "--source", folder, "--output", folder / "base.ckpt")
            scores = {"flops": self.of.base_flops, "steps": self.of.base_steps, **self.of.score(folder)}
            result.write_text(json.dumps(scores))
        return json.loads(result.read_text())

    def fit(self, name: str, seed: int, lr: float, variant: str = "") -> dict[str, float]:
        """Run an arm: fit, export, evaluation by the other library."""
        words = (name, variant, f"lr {lr:g}", f"seed {seed}")
        folder = self.output / ", ".join(filter(None, words)).replace(" ", "_")
        result = folder / "result.json"
        if result.exists():
            return json.loads(result.read_text())
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted fit
        folder.mkdir(parents=True)
        config, flops = self.config(ARMS[name], seed, lr, folder, self.of.variants.get(variant, {}))
        (folder / "fit.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        start = ("--ckpt_path", self.output / f"base-{seed}" / "base.ckpt") if ARMS[name].from_base else ()
        run("fit", "--config", folder / "fit.yaml", *start)
        exported = folder / "exported"
        run("export", "--ckpt_path", folder / "last.ckpt", "--format", self.of.format, "--output", exported)
        scores = {"flops": flops, "steps": config["trainer"]["max_steps"], "lr": lr, **self.of.score(exported)}
        result.write_text(json.dumps(scores))
        return scores

    def config(
        self, arm: Arm, seed: int, lr: float, folder: Path, variant: Mapping[str, Any]
    ) -> tuple[dict[str, Any], float]:
        """Build the config of a fit, and compute its training FLOPs."""
        given = dict(variant)
        schedule, sizes = given.pop("schedule", {}), given.pop("sizes", {})
        small, large = (self.of.step_flops(fields) for fields in ({}, given.pop("final", self.of.final)))
        budget = self.of.base_flops * (self.of.share + arm.pays_base)
        per_step = AT * small + (1 - AT) * large if arm.grows else small if arm.from_base else large
        steps = round(budget / per_step)
        grown_at = max(1, round(AT * steps))
        config = copy.deepcopy(dict(self.of.settings))
        config["seed_everything"] = seed
        growth = next(one for one in config["trainer"]["callbacks"] if one["class_path"].endswith("GrowthCallback"))
        (stage,) = growth["init_args"]["schedule"].values()
        growth["init_args"] |= {"schedule": {grown_at: sizes or stage}, **given}
        last = {"dirpath": str(folder), "filename": "last", "every_n_train_steps": steps}
        checkpoint = {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {**last, "enable_version_counter": False},
        }
        config["trainer"] |= {
            "callbacks": [growth, checkpoint] if arm.grows else [checkpoint],
            "max_steps": steps,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
        }
        model = config["model"]["init_args"]
        model["optimizer"]["init_args"]["lr"] = lr
        model["schedule"] |= schedule
        if not arm.from_base:
            model |= {"preset": self.of.preset, "overrides": {**self.of.fields, **self.of.final}}
        spent = grown_at * small + (steps - grown_at) * large if arm.grows else steps * per_step
        return config, spent

    def run(self, seeds: int) -> dict[str, Any]:
        """Search the learning rates with the first seed, run the others, and try the variants; return all results."""
        found: dict[str, Any] = {"base": [self.base(0)]}
        search: dict[str, dict[str, float]] = {}
        best: dict[str, float] = {}
        for name, arm in ARMS.items():
            rates = self.of.rates if arm.from_base else self.of.scratch_rates
            if arm.pays_base:  # longer runs favor smaller rates
                rates = (best["scratch, same FLOPs"], best["scratch, same FLOPs"] / 2)
            scores = {lr: self.fit(name, 0, lr) for lr in rates}
            best[name] = min(scores, key=lambda lr: scores[lr]["loss"])
            found[name] = [scores[best[name]]]
            search |= {f"{name}, lr {lr:g}": one for lr, one in scores.items()}
        for seed in range(1, seeds):
            found["base"].append(self.base(seed))
            for name in ARMS:
                found[name].append(self.fit(name, seed, best[name]))
        for variant in self.of.variants:
            search[f"grown, lr {best['grown']:g}, {variant}"] = self.fit("grown", 0, best["grown"], variant)
        return {"arms": found, "search": search}


def run(*args: object) -> None:
    """Run a command of ``lit-tokenformer`` in this process, which saves the start of another one."""
    try:
        status: Any = main([str(arg) for arg in args])
    except SystemExit as stop:
        status = stop.code
    if status:
        raise SystemExit(status)


def table(results: Mapping[str, Any], scores: tuple[str, ...]) -> str:
    """Format the results: mean and sample standard deviation over the seeds."""
    columns = ("arm", "TFLOP", "steps", "learning rate", "parameters", *scores)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, runs in results["arms"].items():
        first = runs[0]
        rate = f"{first['lr']:g}" if "lr" in first else "-"
        values = [[one[score] for one in runs] for score in scores]
        cells = [f"{mean(one):.4f}" + (f" ± {stdev(one):.4f}" if len(one) > 1 else "") for one in values]
        row = (name, f"{first['flops'] / 1e12:.2f}", f"{first['steps']:,}", rate, f"{first['parameters']:,}", *cells)
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", f"Settings, first seed ({scores[0]}):", "", f"| arm | {scores[0]} |", "|---|---|"]
    lines += [f"| {name} | {one[scores[0]]:.4f} |" for name, one in results["search"].items()]
    return "\n".join(lines) + "\n"


def write(results: Mapping[str, Any], path: Path, scores: tuple[str, ...], versions: Mapping[str, str]) -> None:
    """Write results as JSON and as a table."""
    facts = {"python": platform.python_version(), **versions}
    path.with_suffix(".json").write_text(json.dumps({"versions": facts, **results}, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(results, scores))
    print(table(results, scores))

"""Does TokenFormer pay, on my data, against what else I could train? Trains any list of architectures on the same data
with the same optimizer, schedule and budget, with several seeds; writes a table (``OUTPUT.md``, ``.csv``, ``.json``)
and a picture of validation loss against training FLOPs (``OUTPUT.png``).

    python benchmarks/compare.py CONFIG OUTPUT --arms ARM [ARM ...] [--budget steps | flops | wall=SECONDS]
        [--match parameters | flops] [--to ARM] [--seeds 0 1 2] [--lrs RATE [RATE ...]] [--set KEY=VALUE ...]
        [--change KEY.KEY=VALUE ...]

CONFIG is any YAML of an image classifier, a causal or a masked language model, or the name of one that ships. Its model
is left out but for its overrides, which hold for all arms, as ``--set`` does. ``--change`` replaces
anything else in it, such as ``data.init_args.batch_size=4``. All is trained on one device.

An ARM is a preset and what replaces fields of its architecture, in quotes: ``'gpt2_small projection=pattention'``. Its
own words are ``label='a name'``, ``lr=1e-3`` and ``grow``: alone for the growth schedule of CONFIG, or
``grow={0.3: 64, 0.6: matched}``, totals of parameter tokens by the share of the steps (or by the step of CONFIG's own
length) where it grows to them; ``matched`` are those that ``--match`` finds.

``--match`` gives all arms with Pattention layers, unless they name ``param_tokens`` themselves, those at which their
blocks cost what the blocks of ``--to`` cost (default: the first arm). ``--budget steps=N`` trains all arms for N steps
(default: those of CONFIG); ``flops=F`` for as many steps as F training FLOPs allow (default: those of ``--to``);
``wall=S`` for as many as fit into S seconds by a short measurement at each size, validation not counted. Warm-up, decay
and growths keep their share of the run, so every schedule ends where the run does.

Each fit is a process of its own that runs the project's command line. One that is found in ``--logs`` with the same
settings is not repeated, so an interrupted comparison goes on where it stood. Needs matplotlib
(``pip install -e '.[dev]'``).
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import inspect
import json
import math
import os
import queue
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import yaml

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule
from matplotlib.ticker import FuncFormatter, LogFormatter
from runs import MEASURED, Run

from callbacks import ParameterGrowthCallback
from lit_tokenformer import tasks
from lit_tokenformer.cli import shipped_configs
from lit_tokenformer.compute import match_tokens, model_cost
from lit_tokenformer.models import TokenformerConfig, preset_config

ROOT = Path(__file__).resolve().parent.parent
HEADS = {"LitImageClassifier": "image", "LitCausalLM": "language", "LitMaskedLM": "masked_language"}
"""What a task's architecture has to end in."""
SCORES = {
    "val/acc1": ("accuracy (%)", 100.0),
    "val/bits_per_byte": ("bits per byte", 1.0),
    "val/accuracy": ("accuracy of masked tokens (%)", 100.0),
}
SIZES = ("num_classes", "image_size", "vocab_size", "context_length")
"""Fields of an architecture that follow from the data."""
LEFT_OUT = ("ParameterGrowthCallback", "TrainingMonitor", "ModelCheckpoint", "EarlyStopping", "PredictionWriter")
"""Callbacks of a config that are not taken over: the first two are set for each arm."""
WARMUP_STEPS = 12
Schedule = dict[float, Any]
"""Totals of parameter tokens by the share of the steps at which a model grows to them."""


# --- What is compared ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One row of the comparison, as the user writes it.

    Args:
        label: What it is called.
        preset: Its architecture.
        overrides: Fields of the architecture that replace the preset's.
        lr: Its learning rate; ``None`` takes the config's, or the one that is searched for.
        grow: Its growth schedule as written, ``True`` for the config's; ``None`` where it does not grow.
    """

    label: str
    preset: str
    overrides: dict[str, Any] = field(default_factory=dict)
    lr: float | None = None
    grow: Any = None


def parse_arm(text: str) -> Arm:
    """An arm from ``PRESET [KEY=VALUE ...]``.

    Example:
        >>> parse_arm("gpt2_small projection=pattention label='a name' lr=1e-3")
        Arm(label='a name', preset='gpt2_small', overrides={'projection': 'pattention'}, lr=0.001, grow=None)
    """
    words = re.findall(r"""(?:\{[^}]*(?:\{[^}]*\}[^}]*)*\}|"[^"]*"|'[^']*'|[^\s{"'])+""", text)
    if not words or "=" in words[0]:
        raise ValueError(f"--arms: expected 'PRESET KEY=VALUE ...', got {text!r}")
    given = parse_settings((word if word != "grow" else "grow=true" for word in words[1:]), f"arm {text!r}")
    label, rate, grow = given.pop("label", text), given.pop("lr", None), given.pop("grow", None)
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or rate <= 0):
        raise ValueError(f"arm {text!r}: lr: expected a positive number, got {rate!r}")
    if grow is not None and grow is not True and not (isinstance(grow, dict) and grow):
        raise ValueError(f"arm {text!r}: grow: expected {{share: tokens}}, or grow alone, got {grow!r}")
    return Arm(str(label), words[0], given, None if rate is None else float(rate), grow)


def parse_settings(words: Iterable[str], setting: str) -> dict[str, Any]:
    """A mapping from words ``KEY=VALUE``, values in YAML; braces need no space after a colon."""
    given = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not all(part.isidentifier() for part in key.split(".")):
            raise ValueError(f"{setting}: expected KEY=VALUE, got {word!r}")
        try:
            given[key] = _number(yaml.safe_load(re.sub(r":(?=\S)", ": ", value) if "{" in value else value))
        except yaml.YAMLError:
            raise ValueError(f"{setting}: cannot read the value of {word!r}") from None
    return given


def _number(value: Any) -> Any:
    """What YAML 1.1 takes for text, such as 1e-3, as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@dataclass
class Planned:
    """An arm, and what it comes to on the data.

    Args:
        arm: As the user wrote it.
        config: Its architecture at birth.
        growths: Totals of parameter tokens by share of the steps.
        parameters: Learned numbers at the end of the fit.
        blocks: Those without embedding and head.
        differs: How far it is from the reference in what is matched, as a share.
        steps: Optimizer steps; 0 where they could not be told.
        lr: Learning rate; ``None`` where none could be found.
        notes: What a reader should know of how these came about.
    """

    arm: Arm
    config: TokenformerConfig
    growths: Schedule = field(default_factory=dict)
    parameters: int = 0
    blocks: int = 0
    differs: float = 0.0
    steps: int = 0
    lr: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def final_tokens(self) -> dict[str, int]:
        """Totals of parameter tokens at the end."""
        return list(self.growths.values())[-1] if self.growths else dict(self.config.tokens.items())

    def schedule(self, steps: int) -> dict[int, dict[str, int]]:
        """The growths by step, in a run of so many steps."""
        found: dict[int, dict[str, int]] = {}
        for share, tokens in self.growths.items():
            found[max([1, round(share * steps), *(step + 1 for step in found)])] = tokens
        return found

    def stages(self, steps: int) -> list[tuple[int, dict[str, int]]]:
        """Steps at each size, and its totals."""
        schedule = {0: dict(self.config.tokens.items()), **self.schedule(steps)}
        ends = [*list(schedule)[1:], steps]
        return [
            (max(0, min(end, steps) - start), tokens)
            for (start, tokens), end in zip(schedule.items(), ends, strict=True)
        ]


# --- Settings that all arms share ------------------------------------------------------------------------------------


class Setting:
    """A config's data, budget and optimizer.

    Args:
        config: The YAML's content.
        common: Fields of the architecture for all arms.
        evaluations: Validations in a fit.
    """

    def __init__(self, config: dict[str, Any], common: dict[str, Any], evaluations: int) -> None:
        self.config = config
        self.evaluations = evaluations
        model = config.get("model") or {}
        self.task = str(model.get("class_path", "")).split(".")[-1]
        if self.task not in HEADS:
            raise ValueError(f"CONFIG: model.class_path: expected {' or '.join(HEADS)}, got {self.task or None!r}")
        self.model = {**(model.get("init_args") or {})}
        self.overrides = {**(self.model.pop("overrides", None) or {}), **common}
        self.model.pop("preset", None)
        self.data: Any = _built(LightningDataModule, "data", config.get("data") or {})
        names = inspect.signature(getattr(tasks, self.task)).parameters
        self.sizes = {
            name: getattr(self.data, name)
            for name in (*SIZES, "separator_id")
            if name in names and hasattr(self.data, name)
        }
        self.sizes |= {name: size for name, size in self.overrides.items() if name in SIZES}

    @cached_property
    def trainer(self) -> dict[str, Any]:
        return {**(self.config.get("trainer") or {})}

    @cached_property
    def samples_per_step(self) -> int:
        return int(self.data.batch_size) * int(self.trainer.get("accumulate_grad_batches") or 1)

    @cached_property
    def steps_per_epoch(self) -> int | None:
        samples = self.data.num_train_samples
        if samples is None:
            return None
        batches = samples // self.data.batch_size
        limit = self.trainer.get("limit_train_batches")
        if limit is not None:
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return max(1, -(-batches // int(self.trainer.get("accumulate_grad_batches") or 1)))

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of the config."""
        steps, epochs = self.trainer.get("max_steps") or -1, self.trainer.get("max_epochs") or -1
        ends = [steps] if steps > 0 else []
        if epochs > 0 and self.steps_per_epoch is not None:
            ends.append(epochs * self.steps_per_epoch)
        if not ends:
            raise ValueError(
                "CONFIG: trainer.max_steps: the length of the fit is not known; set it, whatever the budget"
            )
        return min(ends)

    def as_share(self, amount: float, unit: str) -> float:
        """A length in epochs or steps of the config, as a share of its steps."""
        if unit == "epoch" and self.steps_per_epoch is None:
            raise ValueError("CONFIG: epochs of a stream have no known length; give schedules in steps")
        return amount * ((self.steps_per_epoch or 1) if unit == "epoch" else 1) / self.steps

    @cached_property
    def lr_schedule(self) -> dict[str, Any]:
        """The config's schedule in shares of the run, so that it stretches with it."""
        given = {**(self.model.get("schedule") or {})}
        if given.get("restarts"):
            raise ValueError("CONFIG: model.schedule.restarts: expected none in a comparison")
        unit = given.get("unit", "epoch")
        for name in ("warmup", "decay"):
            if given.get(name) and unit != "share":
                given[name] = self.as_share(given[name], unit)
        return {**given, "unit": "share"} if given else given

    @cached_property
    def growth(self) -> dict[str, Any]:
        """How the config's growth callback is set up; empty where it has none."""
        found = [one for one in self._callbacks if _name(one) == "ParameterGrowthCallback"]
        return {**(found[0].get("init_args") or {})} if found else {}

    @property
    def _callbacks(self) -> list[dict[str, Any]]:
        given = self.trainer.get("callbacks") or []
        return given if isinstance(given, list) else [given]

    @property
    def lr(self) -> float | None:
        """The config's learning rate."""
        rate = ((self.model.get("optimizer") or {}).get("init_args") or {}).get("lr")
        return None if rate is None else float(rate)

    def architecture(self, arm: Arm, param_tokens: Any = None) -> TokenformerConfig:
        """The architecture of an arm on these data.

        Raises:
            ValueError: With the arm's label, if there is none, or if it does not fit the task.
        """
        where = f"arm {arm.label!r}: "
        for name in SIZES:
            if name in arm.overrides and name in self.sizes and arm.overrides[name] != self.sizes[name]:
                raise ValueError(
                    f"{where}{name}: {arm.overrides[name]}, the data have {self.sizes[name]}; arms cannot be compared "
                    "at different ones"
                )
        sizes = {name: size for name, size in self.sizes.items() if name in SIZES}
        tokens = {} if param_tokens is None else {"param_tokens": param_tokens}
        try:
            config = preset_config(arm.preset, **{**self.overrides, **sizes, **arm.overrides, **tokens})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}{error}") from None
        if config.head != HEADS[self.task] or (self.task == "LitCausalLM" and not config.causal):
            order = "causal" if config.causal else "not causal"
            raise ValueError(f"{where}it does not fit {self.task}; its head is {config.head!r}, and it is {order}")
        return config

    def module(self, config: dict[str, Any], arm: Arm) -> Any:
        """The task of a fit without weights, as the command line would build it."""
        model = copy.deepcopy(config["model"])
        model["class_path"] = f"lit_tokenformer.tasks.{self.task}"
        model["init_args"] |= self.sizes
        try:
            with torch.device("meta"):
                return _built(LightningModule, "model", model)
        except ValueError as error:
            raise ValueError(f"arm {arm.label!r}: {error}") from None

    def fit_config(
        self, planned: Planned, steps: int, seed: int, lr: float | None, tokens: dict[str, int] | None = None
    ) -> dict[str, Any]:
        """The YAML of one fit; with ``tokens`` it is born with these, does not grow and does not validate."""
        arm, trainer = planned.arm, self.trainer
        speed_only = tokens is not None
        callbacks = [one for one in self._callbacks if _name(one) not in LEFT_OUT]
        if planned.growths and not speed_only:
            growth = {**self.growth, "schedule": planned.schedule(steps), "unit": "step"}
            callbacks.append({"class_path": "callbacks.ParameterGrowthCallback", "init_args": growth})
        monitor = {"log_images": 0, "row_norms": False}  # what costs time is left out
        callbacks.append({"class_path": "callbacks.TrainingMonitor", "init_args": monitor})
        callbacks.append({"class_path": "runs.Meter"})
        for name in ("min_steps", "min_epochs", "max_time", "limit_train_batches"):
            trainer = {key: value for key, value in trainer.items() if key != name}
        trainer |= {
            "max_steps": steps,
            "max_epochs": -1,
            "devices": 1,
            "num_nodes": 1,
            "strategy": "auto",
            "logger": True,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": max(1, min(int(trainer.get("log_every_n_steps") or 50), steps // 20)),
            "check_val_every_n_epoch": None,
            "val_check_interval": max(1, round(steps / self.evaluations))
            * int(trainer.get("accumulate_grad_batches") or 1),
            "callbacks": callbacks,
        }
        if speed_only:
            trainer["limit_val_batches"] = 0
        model = copy.deepcopy(self.model)
        if self.lr_schedule:
            model["schedule"] = self.lr_schedule
        if lr is not None:
            if self.lr is None:
                raise ValueError(
                    "CONFIG: model.init_args.optimizer.init_args.lr: it must be there for a rate to be set"
                )
            model["optimizer"]["init_args"]["lr"] = lr
        overrides = {**self.overrides, **arm.overrides}
        if tokens or has_pattention(planned.config):
            overrides["param_tokens"] = tokens or dict(planned.config.tokens.items())
        model |= {"preset": arm.preset, "overrides": overrides}
        model_path = f"lit_tokenformer.tasks.{self.task}"
        return {
            "seed_everything": seed,
            "trainer": trainer,
            "model": {"class_path": model_path, "init_args": model},
            "data": self.config["data"],
        }


def _built(kind: type, name: str, given: dict[str, Any]) -> Any:
    """An object from its part of a config.

    Raises:
        ValueError: In one line.
    """
    parser: Any = ArgumentParser(exit_on_error=False)
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.49
    parser.add_subclass_arguments(kind, name)
    try:
        return build(parser.parse_object({name: given}))[name]
    except Exception as error:
        told = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"{name}: {told[-1] if told else type(error).__name__}") from None


def _name(callback: dict[str, Any]) -> str:
    return str(callback.get("class_path", "")).split(".")[-1]


def has_pattention(config: TokenformerConfig) -> bool:
    """Whether an architecture has layers whose tokens could be chosen."""
    return "pattention" in (config.projection, config.feed_forward)


# --- The plan --------------------------------------------------------------------------------------------------------


def plan_arms(setting: Setting, arms: Sequence[Arm], match: str | None, to: str | None) -> list[Planned]:
    """Architectures, parameter tokens and growths of all arms.

    Raises:
        ValueError: In one line that names the arm.
    """
    labels = [arm.label for arm in arms]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"arm {label!r}: there are two of this label; set another one by label=...")
    reference_arm = reference_of(arms, to)
    reference = setting.architecture(reference_arm)
    planned = [_planned(setting, arm, arm == reference_arm, reference, match) for arm in arms]
    if match and not any(has_pattention(one.config) for one in planned if one.arm != reference_arm):
        told = ", ".join(repr(label) for label in labels if label != reference_arm.label) or repr(labels[0])
        raise ValueError(f"--match: none of {told} has a Pattention layer whose tokens could be chosen")
    own = _matched(reference, dict(reference.tokens.items()), match or "parameters")
    for one in planned:
        one.differs = _matched(one.config, one.final_tokens, match or "parameters") / own - 1
        module = setting.module(setting.fit_config(one, 1, 0, one.arm.lr, one.final_tokens), one.arm)
        one.parameters = sum(parameter.numel() for parameter in module.parameters())
        one.blocks = _matched(one.config, one.final_tokens, "parameters")
    return planned


def reference_of(arms: Sequence[Arm], to: str | None) -> Arm:
    """The arm that the others are compared with: by its label, else any other architecture."""
    if to is None:
        return arms[0]
    return next((arm for arm in arms if to in (arm.label, arm.preset)), None) or parse_arm(to)


def _matched(config: TokenformerConfig, tokens: dict[str, int], by: str) -> int:
    """What a model has beside embedding and head: parameters, or operations for each sample."""
    name = {"parameters": "parameters", "flops": "flops"}[by]
    whole, half = (getattr(model_cost(replace(config, depth=n * config.depth), tokens), name) for n in (2, 1))
    return whole - half  # embedding and head cost the same at any depth


def _planned(
    setting: Setting, arm: Arm, is_reference: bool, reference: TokenformerConfig, match: str | None
) -> Planned:
    where = f"arm {arm.label!r}: "
    config = setting.architecture(arm)
    matched: dict[str, int] | None = None
    if match and not is_reference and has_pattention(config):
        try:
            matched = match_tokens(config, reference, match)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
    if not arm.grow:
        if matched and "param_tokens" not in arm.overrides:
            config = setting.architecture(arm, matched)
        return Planned(arm, config)
    if not has_pattention(config):
        raise ValueError(f"{where}grow: it has no Pattention layer that could grow; use projection=pattention")
    wanted: dict[Any, Any] = setting.growth.get("schedule") or {} if arm.grow is True else arm.grow
    unit = setting.growth.get("unit", "epoch") if arm.grow is True else "step"
    if not wanted:
        raise ValueError(f"{where}grow: CONFIG has no growth schedule; write grow={{0.3: TOKENS, ...}}")
    shares: Schedule = {}
    for key, tokens in wanted.items():
        if isinstance(key, bool) or not isinstance(key, (int, float)) or key <= 0:
            raise ValueError(f"{where}grow: expected a share of the steps or a step of the config, got {key!r}")
        if tokens == "matched" and matched is None:
            raise ValueError(f"{where}grow: 'matched' needs --match, and a reference that is another arm")
        share = key if isinstance(key, float) and key < 1 else setting.as_share(key, unit)
        if share >= 1 or share <= max(shares, default=0):
            raise ValueError(f"{where}grow: {key} is not before the end of the fit, or not after the growth before")
        shares[share] = matched if tokens == "matched" else tokens
    try:
        callback = ParameterGrowthCallback(
            **{**setting.growth, "schedule": dict(enumerate(shares.values())), "unit": "step"}
        )
        stages = [tokens for _, tokens in callback.stages(dict(config.tokens.items()))]
    except ValueError as error:
        told = re.sub(r"^schedule: step (\d+): ", lambda found: f"{list(wanted)[int(found[1])]}: ", str(error))
        raise ValueError(f"{where}grow: {told}") from None
    return Planned(arm, config, dict(zip(shares, stages, strict=True)))


def training_flops(setting: Setting, planned: Planned, steps: int) -> int:
    """Operations of a fit in closed form."""
    checkpointing = bool(setting.model.get("grad_checkpointing"))
    return sum(
        count * setting.samples_per_step * model_cost(planned.config, tokens, checkpointing).training_flops
        for count, tokens in planned.stages(steps)
    )


def steps_within(setting: Setting, planned: Planned, total: float) -> int:
    """The most optimizer steps whose operations are within a total.

    Raises:
        ValueError: If not even a few steps are.
    """
    steps = int(total // (training_flops(setting, planned, 10_000) / 10_000)) + 2
    while steps > 0 and training_flops(setting, planned, steps) > total:
        steps -= 1
    if steps < 2:
        raise ValueError(f"arm {planned.arm.label!r}: {total:.3g} FLOPs are less than two of its steps")
    return steps


# --- Fits ------------------------------------------------------------------------------------------------------------


@dataclass
class Fit:
    """One fit in a folder of its own, whose name follows from its settings.

    Args:
        arm: The label of its arm.
        what: What it is for.
        config: Its YAML.
        logs: Folder of all fits.
    """

    arm: str
    what: str
    config: dict[str, Any]
    logs: Path

    @cached_property
    def folder(self) -> Path:
        key = hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode()).hexdigest()[:10]
        return self.logs / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', self.arm)[:60]}-{key}"

    @property
    def measured(self) -> dict[str, Any]:
        """What it measured of itself; ``failed`` says what went wrong, if something did."""
        file = self.folder / MEASURED
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        output = self.folder / "output.txt"
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines() if output.exists() else []
        told = [line for line in lines if re.match(r"\S*(Error|Exception|error)\b", line)] or lines
        return {"failed": told[-1].strip()[:200] if told else "it was not run"}

    @cached_property
    def curve(self) -> Run:
        """Its logs."""
        return Run(str(self.folder / "lightning_logs" / "version_0"))

    def run(self, server: subprocess.Popen[str], progress: str) -> None:
        """Trains in a process of its own, a fork of ``runs.serve``."""
        assert server.stdin is not None and server.stdout is not None
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        text = yaml.safe_dump(self.config, sort_keys=False)
        (self.folder / "given.yaml").write_text(text, encoding="utf-8")
        begun = time.perf_counter()
        server.stdin.write(f"{self.folder.resolve()}\n")
        server.stdin.flush()
        if not server.stdout.readline():
            raise ValueError(f"the process that starts fits has ended: {server.wait()}")
        failed = f"; {self.measured['failed']}" if self.measured["failed"] else ""
        print(f"{progress} {self.arm}, {self.what}: {time.perf_counter() - begun:.0f} s{failed}", flush=True)


class Runner:
    """Runs fits side by side.

    Args:
        logs: Folder of all fits.
        jobs: Fits at a time.
        draw_only: Whether nothing is run, and only what is there already is read.
    """

    def __init__(self, logs: Path, jobs: int, draw_only: bool) -> None:
        self.logs, self.jobs, self.draw_only = logs, jobs, draw_only
        self._servers: queue.Queue[subprocess.Popen[str]] = queue.Queue()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: Any) -> None:
        while not self._servers.empty():
            self._servers.get().communicate()  # ends where its input ends

    def _start(self) -> None:
        places = [str(ROOT / "benchmarks"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        if self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        command = [sys.executable, "-c", "import runs; runs.serve()"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        for _ in range(self.jobs):
            self._servers.put(subprocess.Popen(command, env=environment, **pipes))

    def fit(self, planned: Planned, what: str, config: dict[str, Any]) -> Fit:
        """A fit that is not run yet."""
        return Fit(planned.arm.label, what, config, self.logs)

    def run(self, fits: Sequence[Fit]) -> None:
        """Runs those that have not been run."""
        if self.draw_only:
            return
        todo = [fit for fit in fits if not (fit.folder / MEASURED).exists()]
        if todo and self._servers.empty():
            self._start()

        def train(number: int) -> None:
            server = self._servers.get()
            try:
                todo[number].run(server, f"[{number + 1}/{len(todo)}]")
            finally:
                self._servers.put(server)

        with ThreadPoolExecutor(self.jobs) as pool:
            for _ in pool.map(train, range(len(todo))):
                pass


def set_steps(setting: Setting, planned: list[Planned], budget: str, to: str | None, runner: Runner) -> None:
    """Optimizer steps of all arms.

    Raises:
        ValueError: For a budget that is none, or too small for an arm.
    """
    kind, _, amount = budget.partition("=")
    value = _number(amount) if amount else None
    if kind not in ("steps", "flops", "wall") or isinstance(value, str) or (value is not None and value <= 0):
        raise ValueError(f"--budget: expected steps[=N], flops[=F] or wall=SECONDS, got {budget!r}")
    if kind == "steps":
        for one in planned:
            one.steps = int(value or setting.steps)
    elif kind == "flops":
        if value is None:
            arm = reference_of([one.arm for one in planned], to)
            reference = next((one for one in planned if one.arm == arm), Planned(arm, setting.architecture(arm)))
            value = training_flops(setting, reference, setting.steps)
        for one in planned:
            one.steps = steps_within(setting, one, value)
    else:
        if value is None:
            raise ValueError("--budget: wall needs seconds, such as wall=120")
        sizes = [(one, tokens) for one in planned for _, tokens in one.stages(10_000)]
        fits = [
            runner.fit(one, "speed", setting.fit_config(one, WARMUP_STEPS, 0, one.arm.lr, tokens))
            for one, tokens in sizes
        ]
        runner.run(fits)
        for one in planned:
            own = [fit.measured for (other, _), fit in zip(sizes, fits, strict=True) if other is one]
            failed = [measured["failed"] for measured in own if measured["failed"]]
            if failed:
                one.notes.append(f"its speed could not be measured: {failed[0]}")
                continue
            counts = [count for count, _ in one.stages(10_000)]
            mean = sum(n * measured["step_seconds"] for n, measured in zip(counts, own, strict=True)) / 10_000
            one.steps = max(2, int(value / mean))
            one.notes.append(f"{one.steps} steps of {mean:.3f} s by a measurement of {WARMUP_STEPS} steps at each size")


def set_rates(
    setting: Setting, planned: list[Planned], rates: Sequence[float], steps: int, seed: int, runner: Runner
) -> None:
    """The learning rate of each arm: its own, the best of a search of equal size for all others, or the config's."""
    for one in planned:
        one.lr = one.arm.lr or (setting.lr if not rates else None)
    searched = [one for one in planned if rates and one.arm.lr is None and one.steps]
    fits = {
        (one.arm.label, rate): runner.fit(one, f"rate {rate:g}", setting.fit_config(one, steps, seed, rate))
        for rate in rates
        for one in searched
    }
    runner.run(list(fits.values()))
    for one in searched:
        losses = {rate: result(fits[one.arm.label, rate]) for rate in rates}
        told = {rate: found["loss"] for rate, found in losses.items() if not found["failed"]}
        if not told:
            one.notes.append(f"no learning rate could be used: {losses[rates[0]]['failed']}")
            continue
        one.lr = min(told, key=lambda rate: told[rate])
        note = ", ".join(f"{rate:g}: {told[rate]:.4f}" if rate in told else f"{rate:g}: failed" for rate in rates)
        edge = " (the best is at the edge)" if len(rates) > 1 and one.lr in (min(rates), max(rates)) else ""
        one.notes.append(f"loss by learning rate after {steps} steps {note}{edge}")


# --- What came out ---------------------------------------------------------------------------------------------------


def result(fit: Fit) -> dict[str, Any]:
    """What came out of a fit: ``failed``, or losses with what they cost."""
    measured = fit.measured
    found: dict[str, Any] = {"folder": str(fit.folder), **measured}
    if measured["failed"]:
        return found
    logged, values = fit.curve.series("val/loss")
    steps, first = np.unique(logged, return_index=True)  # the first validation is logged twice, once as a result
    losses = values[first]
    if not len(losses) or not np.isfinite(losses[-1]):
        return {**found, "failed": "its validation loss is no number"}
    score = next((name for name in SCORES if name in fit.curve.tags), None)
    return found | {
        "loss": float(losses[-1]),
        "score": float(fit.curve.series(score)[1][-1]) * SCORES[score][1] if score else None,
        "score_name": SCORES[score][0] if score else None,
        "curve": {
            "steps": steps.tolist(),
            "tflops": fit.curve.compute(steps).tolist(),
            "losses": losses.tolist(),
            "growths": fit.curve.compute(fit.curve.growths()).tolist() if len(fit.curve.growths()) else [],
        },
    }


def row(setting: Setting, planned: Planned, results: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """An arm's row of the table, from what came out for each seed."""
    done = {seed: one for seed, one in results.items() if not one["failed"]}
    losses, scores = [one["loss"] for one in done.values()], [one["score"] for one in done.values()]
    data_tokens = setting.sizes.get("context_length", 1)
    medians = {
        "throughput": [setting.samples_per_step * data_tokens / one["step_seconds"] for one in done.values()],
        "train_seconds": [one["seconds"] for one in done.values()],
        "peak_memory_mb": [one["peak_bytes"] / 1e6 for one in done.values()],
    }
    notes = list(planned.notes)
    notes += [f"seed {seed} failed: {one['failed']}" for seed, one in results.items() if one["failed"]]
    return {
        "label": planned.arm.label,
        "preset": planned.arm.preset,
        "parameters": planned.parameters,
        "non_embedding": planned.blocks,
        "differs": planned.differs,
        "forward_flops": model_cost(planned.config, planned.final_tokens).flops,
        "training_flops": training_flops(setting, planned, planned.steps) if planned.steps else None,
        "steps": planned.steps,
        "seen": planned.steps * setting.samples_per_step * data_tokens,
        "loss": statistics.mean(losses) if losses else None,
        "loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
        "score": statistics.mean(scores) if scores and None not in scores else None,
        "score_std": statistics.stdev(scores) if len(scores) > 1 and None not in scores else None,
        "score_name": next((one["score_name"] for one in done.values()), None),
        **{name: statistics.median(values) if values else None for name, values in medians.items()},
        "lr": planned.lr,
        "seeds": list(done),
        "failed": [seed for seed, one in results.items() if one["failed"]],
        "notes": notes,
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
    head = ["arm", "parameters", "non-embedding", "forward FLOPs", "training FLOPs", f"{unit} seen", "validation loss"]
    head += [*([score] if score else []), f"{unit}/s", "peak memory", "learning rate", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for one in rows:
        off = " †" if abs(one["differs"]) > 0.05 else ""
        cells = [one["label"], f"{one['parameters']:,}", f"{one['non_embedding']:,}", f"{one['forward_flops']:.3g}"]
        cells[2 if matched == "parameters" else 3] += off
        cells += ["-" if one["training_flops"] is None else f"{one['training_flops']:.3g}", f"{one['seen']:,}"]
        cells.append(
            "failed"
            if one["loss"] is None
            else _spread(one["loss"], one["loss_std"], 4) + (" ≈" if one["ties"] else "")
        )
        cells += [_spread(one["score"], one["score_std"], 2 if "%" in score else 3)] if score else []
        cells += (
            [f"{one['throughput']:,.0f}", f"{one['peak_memory_mb']:,.0f} MB"] if one["loss"] is not None else ["-", "-"]
        )
        cells += ["-" if one["lr"] is None else f"{one['lr']:g}"]
        cells += [" ".join(map(str, one["seeds"])) + "".join(f" ({seed} failed)" for seed in one["failed"])]
        lines.append("| " + " | ".join(cells) + " |")
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
    name = {"parameters": "non-embedding parameters", "flops": "FLOPs of the blocks"}[matched]
    off_rows = [f"{one['label']} {one['differs']:+.1%}" for one in rows if abs(one["differs"]) > 0.05]
    if off_rows:
        lines.append(f"\n† {name} differ by more than 5 % from those of {reference}: {', '.join(off_rows)}.")
    if jobs > 1:
        lines.append(f"\n{jobs} fits ran side by side, which costs throughput.")
    notes = [f"- {one['label']}: {note}" for one in rows for note in one["notes"]]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _spread(mean: float | None, std: float | None, digits: int) -> str:
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" if std is None else f"{mean:.{digits}f} ± {std:.{digits}f}"


def draw(curves: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """Validation loss against training compute: mean over seeds, band from the lowest to the highest, growths as dots.

    Args:
        curves: For each arm in the order of the table, the curves of its seeds.
        output: The picture.
    """
    drawn = {label: found for label, found in curves.items() if found}
    if not drawn:
        return
    figure, axis = plt.subplots(figsize=(11, max(5.0, 1.5 + 0.42 * len(drawn))))
    ends: list[tuple[float, float, str, Any]] = []
    first: list[float] = []
    highest = 0.0
    for number, (label, found) in enumerate(drawn.items()):
        colour = plt.get_cmap("tab10")(number % 10)
        length = min(len(one["losses"]) for one in found)
        compute = np.array(found[0]["tflops"][:length])
        losses = np.array([one["losses"][:length] for one in found])  # (seeds, n)
        mean = losses.mean(axis=0)
        axis.plot(compute, mean, color=colour, linestyle="--" if number >= 10 else "-", linewidth=1.6)
        axis.fill_between(compute, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        for place in found[0]["growths"]:
            axis.plot(
                place, np.interp(place, compute, mean), "^", color=colour, markeredgecolor="k", markersize=8, zorder=5
            )
        ends.append((float(compute[-1]), float(mean[-1]), label, colour))
        first.append(float(compute[0]))
        highest = max(highest, float(losses.max()))
    if max(place for place, *_ in ends) > 8 * min(first):
        axis.set_xscale("log")
    if highest > 2 * min(loss for _, loss, *_ in ends):
        axis.set_yscale("log")
    for scale in (axis.xaxis, axis.yaxis):
        if scale.get_scale() == "log":
            scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
            scale.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axis.set_xlabel("training compute (TFLOP)")
    axis.set_ylabel("validation loss (nats)")
    axis.grid(alpha=0.25)
    figure.subplots_adjust(left=0.08, right=0.66, top=0.96, bottom=0.12)
    low, high = axis.get_ylim()
    to_share = axis.transData + axis.transAxes.inverted()
    wanted = [to_share.transform((place, loss))[1] for place, loss, *_ in ends]
    axis.set_ylim(low, high)
    gap = min(0.055, 1 / len(ends))
    for (place, loss, label, colour), height in zip(ends, spread_out(wanted, gap), strict=True):
        axis.annotate(
            f"{label}  {loss:.3f}",
            xy=(place, loss),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
    if any(one["growths"] for found in drawn.values() for one in found):
        axis.plot([], [], "^", color="w", markeredgecolor="k", markersize=8, label="growth")
        axis.legend(loc="upper right")
    figure.savefig(output, dpi=120)
    plt.close(figure)


def spread_out(wanted: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Places near the wanted ones, in their order, at least ``gap`` apart and from ``low`` to ``high``.

    Example:
        >>> spread_out([0.5, 0.5, 0.1], 0.25)
        [0.5, 0.75, 0.1]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    found = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        found[i] = max(wanted[i], found[order[rank - 1]] + gap if rank else low)
    ceiling = high
    for i in reversed(order):
        found[i] = min(found[i], ceiling)
        ceiling = found[i] - gap
    return found


# --- Command ---------------------------------------------------------------------------------------------------------


def told_plan(setting: Setting, planned: list[Planned]) -> str:
    """What will be trained, a line for each arm."""
    lines = []
    for one in planned:
        tokens = [dict(one.config.tokens.items()), *one.growths.values()] if has_pattention(one.config) else []
        sizes = " -> ".join("/".join(map(str, totals.values())) for totals in tokens)
        lines.append(
            f"{one.arm.label}: {one.parameters:,} parameters ({one.blocks:,} non-embedding, {one.differs:+.1%}), "
            + (f"tokens qkv/proj/ffn {sizes}, " if sizes else "")
            + (
                f"{one.steps} steps, {training_flops(setting, one, one.steps):.3g} FLOPs"
                if one.steps
                else "steps not known before its speed is measured"
            )
        )
    return "\n".join(lines)


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Plans, trains, and writes table and picture.

    Raises:
        ValueError: In one line, before anything is trained.
    """
    path = Path(options.config)
    path = path if path.exists() else shipped_configs().get(options.config, path)
    if not path.exists():
        raise ValueError(f"CONFIG: {options.config} is neither a file nor one of {', '.join(shipped_configs())}")
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in parse_settings(options.change, "--change").items():
        place, last = given, key.split(".")[-1]
        for part in key.split(".")[:-1]:
            place = place.setdefault(part, {})
        place[last] = value
    arms = [parse_arm(text) for text in options.arms]
    setting = Setting(given, parse_settings(options.set, "--set"), options.evaluations)
    planned = plan_arms(setting, arms, options.match, options.to)
    reading = options.draw_only or options.plan_only
    if not reading:
        setting.data.prepare_data()  # once, and not by several fits at a time
    with Runner(Path(options.logs), options.jobs, reading) as runner:
        set_steps(setting, planned, options.budget, options.to, runner)
        print(told_plan(setting, planned), flush=True)
        if options.plan_only:
            return []
        search = options.search_steps or max(2, max(one.steps for one in planned) // 4)
        set_rates(setting, planned, options.lrs, search, options.seeds[0], runner)
        ready = [one for one in planned if one.steps and (one.lr is not None or not options.lrs)]
        fits = {
            (one.arm.label, seed): runner.fit(one, f"seed {seed}", setting.fit_config(one, one.steps, seed, one.lr))
            for seed in options.seeds
            for one in ready
        }
        runner.run(list(fits.values()))
    return write(setting, planned, fits, options)


def write(
    setting: Setting, planned: list[Planned], fits: dict[tuple[str, int], Fit], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Writes table and picture, and prints the table."""
    results = {key: result(fit) for key, fit in fits.items()}
    of_arm = {
        one.arm.label: {
            seed: results[one.arm.label, seed] for seed in options.seeds if (one.arm.label, seed) in results
        }
        for one in planned
    }
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
        writer = csv.DictWriter(file, [key for key in rows[0] if key != "notes"])
        writer.writeheader()
        writer.writerows({key: _plain(value) for key, value in one.items() if key != "notes"} for one in rows)
    environments = [one["environment"] for one in results.values() if "environment" in one]
    summary = getattr(setting.data, "corpus_summary", None)
    found = {
        "settings": vars(options),
        "config": setting.config,
        "data": summary() if summary else {"training images": setting.data.num_train_samples},
        "environments": [one for i, one in enumerate(environments) if one not in environments[:i]],
        "arms": [{**one, "runs": of_arm[one["label"]]} for one in rows],
    }
    Path(f"{base}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    draw(curves, Path(f"{base}.png"))
    print(f"\n{table}")
    return rows


def _plain(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; 2 after an error in what the user gave, which is told in one line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("config")
    parser.add_argument("output", help="path of the results without an extension")
    parser.add_argument("--arms", nargs="+", required=True, help="presets with overrides")
    parser.add_argument("--budget", default="steps", help="steps[=N], flops[=F] or wall=SECONDS")
    parser.add_argument("--match", choices=("parameters", "flops"), help="what parameter tokens are chosen by")
    parser.add_argument("--to", help="label or preset that sizes and budget refer to; default: the first arm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lrs", type=float, nargs="+", default=[], help="learning rates that each arm tries")
    parser.add_argument("--search-steps", type=int, help="steps of each try; default: a quarter of the longest fit")
    parser.add_argument("--set", nargs="+", default=[], help="KEY=VALUE of the architecture, for all arms")
    parser.add_argument(
        "--change", nargs="+", default=[], help="KEY.KEY=VALUE of CONFIG, as data.init_args.batch_size=4"
    )
    parser.add_argument("--evaluations", type=int, default=10, help="validations in each fit")
    parser.add_argument("--logs", default="lightning_logs/compare", help="folder of the fits")
    parser.add_argument("--jobs", type=int, default=1, help="fits at a time")
    parser.add_argument("--plan-only", action="store_true", help="tell what would be trained, and stop")
    parser.add_argument("--draw-only", action="store_true", help="train nothing; table and picture of what is there")
    options = parser.parse_args(args)
    try:
        for name in ("evaluations", "jobs"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name}: expected at least 1, got {getattr(options, name)}")
        rows = compare(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(bool(rows) and all(one["loss"] is None for one in rows))


if __name__ == "__main__":
    sys.exit(main())

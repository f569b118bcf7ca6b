"""What is compared, for ``compare.py``: the arms as the user writes them, and the setting that they share."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule

from lit_tokenformer import tasks
from lit_tokenformer.models import TokenformerConfig, preset_config

HEADS = {"LitImageClassifier": "image", "LitCausalLM": "language", "LitMaskedLM": "masked_language"}
"""What a task's architecture has to end in."""
SIZES = ("num_classes", "image_size", "vocab_size", "context_length")
"""Fields of an architecture that follow from the data."""
LEFT_OUT = ("ParameterGrowthCallback", "TrainingMonitor", "ModelCheckpoint", "EarlyStopping", "PredictionWriter")
"""Callbacks of a config that are not taken over: the first two are set for each arm."""
LIMITS = ("min_steps", "min_epochs", "max_time", "limit_train_batches")
"""What else would set the length of a fit."""
Schedule = dict[float, Any]
"""Totals of parameter tokens by the share of the steps at which a model grows to them."""


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
            given[key] = number(yaml.safe_load(re.sub(r":(?=\S)", ": ", value) if "{" in value else value))
        except yaml.YAMLError:
            raise ValueError(f"{setting}: cannot read the value of {word!r}") from None
    return given


def number(value: Any) -> Any:
    """What YAML 1.1 takes for text, such as 1e-3, as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@contextmanager
def naming(arm: Arm) -> Iterator[None]:
    """Puts the arm before what a ``ValueError`` tells."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"arm {arm.label!r}: {error}") from None


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
        self.model = dict(model.get("init_args") or {})
        for key in ("preset", "match", "match_to"):  # the arms have their own
            self.model.pop(key, None)
        self.overrides = {**(self.model.pop("overrides", None) or {}), **common}
        self.trainer = dict(config.get("trainer") or {})
        callbacks = self.trainer.get("callbacks") or []
        self.callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        self.data: Any = _built(LightningDataModule, "data", config.get("data") or {})
        self.accumulated = int(self.trainer.get("accumulate_grad_batches") or 1)
        self.samples_per_step = int(self.data.batch_size) * self.accumulated
        names = inspect.signature(getattr(tasks, self.task)).parameters
        self.of_data = {
            name: getattr(self.data, name)
            for name in (*SIZES, "separator_id")
            if name in names and hasattr(self.data, name)
        }
        self.of_data |= {name: size for name, size in self.overrides.items() if name in SIZES}
        self.sizes = {name: size for name, size in self.of_data.items() if name in SIZES}

    @cached_property
    def steps_per_epoch(self) -> int | None:
        samples = self.data.num_train_samples
        if samples is None:
            return None
        batches = samples // self.data.batch_size
        limit = self.trainer.get("limit_train_batches")
        if limit is not None:
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return max(1, math.ceil(batches / self.accumulated))

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
        given = dict(self.model.get("schedule") or {})
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
        found = (one.get("init_args") for one in self.callbacks if _name(one) == "ParameterGrowthCallback")
        return dict(next(found, None) or {})

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
        tokens = {} if param_tokens is None else {"param_tokens": param_tokens}
        with naming(arm):
            for name, size in self.sizes.items():
                if arm.overrides.get(name, size) != size:
                    raise ValueError(
                        f"{name}: {arm.overrides[name]}, the data have {size}; "
                        "arms cannot be compared at different ones"
                    )
            config = preset_config(arm.preset, **{**self.overrides, **self.sizes, **arm.overrides, **tokens})
            if config.head != HEADS[self.task] or (self.task == "LitCausalLM" and not config.causal):
                order = "causal" if config.causal else "not causal"
                raise ValueError(f"it does not fit {self.task}; its head is {config.head!r}, and it is {order}")
        return config

    def module(self, planned: Planned) -> Any:
        """The task of an arm at its final size, without weights, as the command line would build it."""
        model = copy.deepcopy(self.fit_config(planned, 1, 0, planned.arm.lr, planned.final_tokens)["model"])
        model["init_args"] |= self.of_data
        with naming(planned.arm), torch.device("meta"):
            return _built(LightningModule, "model", model)

    def fit_config(
        self, planned: Planned, steps: int, seed: int, lr: float | None, tokens: dict[str, int] | None = None
    ) -> dict[str, Any]:
        """The YAML of one fit; with ``tokens`` it is born with these, does not grow and does not validate."""
        speed_only = tokens is not None
        callbacks = [one for one in self.callbacks if _name(one) not in LEFT_OUT]
        if planned.growths and not speed_only:
            growth = {**self.growth, "schedule": planned.schedule(steps), "unit": "step"}
            callbacks.append({"class_path": "callbacks.ParameterGrowthCallback", "init_args": growth})
        monitor = {"log_images": 0, "row_norms": False}  # what costs time is left out
        callbacks.append({"class_path": "callbacks.TrainingMonitor", "init_args": monitor})
        callbacks.append({"class_path": "runs.Meter"})
        trainer = {key: value for key, value in self.trainer.items() if key not in LIMITS} | {
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
            "log_every_n_steps": max(1, min(int(self.trainer.get("log_every_n_steps") or 50), steps // 20)),
            "check_val_every_n_epoch": None,
            "val_check_interval": max(1, round(steps / self.evaluations)) * self.accumulated,
            "callbacks": callbacks,
        }
        if speed_only:
            trainer["limit_val_batches"] = 0
        overrides = {**self.overrides, **planned.arm.overrides}
        if tokens or has_pattention(planned.config):
            overrides["param_tokens"] = tokens or dict(planned.config.tokens.items())
        model = {**copy.deepcopy(self.model), "preset": planned.arm.preset, "overrides": overrides}
        if self.lr_schedule:
            model["schedule"] = self.lr_schedule
        if lr is not None:
            if self.lr is None:
                raise ValueError(
                    "CONFIG: model.init_args.optimizer.init_args.lr: it must be there for a rate to be set"
                )
            model["optimizer"]["init_args"]["lr"] = lr
        return {
            "seed_everything": seed,
            "trainer": trainer,
            "model": {"class_path": f"lit_tokenformer.tasks.{self.task}", "init_args": model},
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

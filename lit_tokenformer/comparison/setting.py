"""Shared data, budget and optimizer of a comparison, and the config of each fit."""

from __future__ import annotations

import copy
import inspect
import math
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from lit_tokenformer import tasks
from lit_tokenformer.comparison.arms import Arm, Planned, by_step, has_pattention, naming, resized
from lit_tokenformer.data.settings import FlatNameParser
from lit_tokenformer.errors import UserError
from lit_tokenformer.models import TokenformerConfig, preset_config

HEADS = {"LitImageClassifier": "image", "LitCausalLM": "language", "LitMaskedLM": "masked_language"}
"""Head of the architecture by task."""
SIZES = ("num_classes", "image_size", "vocab_size", "context_length")
"""Architecture fields set by the data."""
PER_ARM = ("ParameterGrowthCallback", "PatchDropSchedule", "TrainingMonitor")
"""Callbacks that are set per arm."""
LEFT_OUT = (*PER_ARM, "ModelCheckpoint", "EarlyStopping", "PredictionWriter")
"""Callbacks of the config that are dropped."""
LIMITS = ("min_steps", "min_epochs", "max_time", "limit_train_batches")
"""Other trainer settings that limit the length of a fit."""


class Setting:
    """Data, budget and optimizer of a config.

    Args:
        config: Content of the YAML file.
        common: Architecture overrides for all arms.
        evaluations: Number of validations per fit.
    """

    def __init__(self, config: dict[str, Any], common: dict[str, Any], evaluations: int) -> None:
        for name in ("model", "trainer", "data"):
            if not isinstance(config.get(name) or {}, dict):
                raise UserError(f"config: {name}: expected settings by their names, got {config[name]!r}")
        self.config = config
        self.evaluations = evaluations
        model = config.get("model") or {}
        self.task = str(model.get("class_path", "")).split(".")[-1]
        if self.task not in HEADS:
            raise UserError(f"config: model.class_path: expected {' or '.join(HEADS)}, got {self.task or None!r}")
        self.model = dict(model.get("init_args") or {})
        for key in ("preset", "match", "match_to"):  # set per arm
            self.model.pop(key, None)
        self.overrides = {**(self.model.pop("overrides", None) or {}), **common}
        self.trainer = dict(config.get("trainer") or {})
        callbacks = self.trainer.get("callbacks") or []
        self.callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        self.data: Any = _built(LightningDataModule, "data", config.get("data") or {})
        if not hasattr(self.data, "batch_size") or not hasattr(self.data, "num_train_samples"):
            raise UserError(f"config: data: expected a data module of this project, got {type(self.data).__name__}")
        for name in ("max_steps", "max_epochs", "accumulate_grad_batches"):
            value = self.trainer.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise UserError(f"config: trainer.{name}: expected a whole number, got {value!r}")
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
            raise UserError("config: trainer.max_steps: required for any budget (expected max_steps or max_epochs)")
        return min(ends)

    def as_share(self, amount: float, unit: str) -> float:
        """Convert a length in epochs or steps of the config to a share of its steps."""
        if unit == "epoch" and self.steps_per_epoch is None:
            raise UserError("config: unknown epoch length of streamed data (got a schedule in epochs, expected steps)")
        return amount * ((self.steps_per_epoch or 1) if unit == "epoch" else 1) / self.steps

    @cached_property
    def lr_schedule(self) -> dict[str, Any]:
        """Learning-rate schedule of the config in shares of the run, which scale with the budget."""
        given = dict(self.model.get("schedule") or {})
        if given.get("restarts"):
            raise UserError("config: model.schedule.restarts: not supported in a comparison")
        unit = given.get("unit", "epoch")
        for name in ("warmup", "decay"):
            if given.get(name) and unit != "share":
                given[name] = self.as_share(given[name], unit)
        return {**given, "unit": "share"} if given else given

    @cached_property
    def growth(self) -> dict[str, Any]:
        """Settings of the growth callback of the config; empty without one."""
        return self._callback("ParameterGrowthCallback")

    @cached_property
    def patch_drop(self) -> dict[float, float]:
        """Patch drop rates of the config, by shares of its steps."""
        given = self._callback("PatchDropSchedule")
        unit = given.get("unit", "epoch")
        return {self.as_share(key, unit): rate for key, rate in (given.get("schedule") or {}).items()}

    def _callback(self, name: str) -> dict[str, Any]:
        """Return the settings of a callback of the config; empty without it."""
        found = (one.get("init_args") for one in self.callbacks if _name(one) == name)
        return dict(next(found, None) or {})

    @property
    def lr(self) -> float | None:
        """Learning rate of the config."""
        rate = ((self.model.get("optimizer") or {}).get("init_args") or {}).get("lr")
        return None if rate is None else float(rate)

    def architecture(self, arm: Arm, param_tokens: Any = None) -> TokenformerConfig:
        """Build the architecture of an arm for these data.

        Raises:
            UserError: If the preset is unknown or does not fit the task; names the arm.
        """
        tokens = {} if param_tokens is None else {"param_tokens": param_tokens}
        with naming(arm):
            for name, size in self.sizes.items():
                if arm.overrides.get(name, size) != size:
                    raise UserError(f"overrides.{name}: expected {size} as in the data, got {arm.overrides[name]}")
            config = preset_config(arm.preset, **{**self.overrides, **self.sizes, **arm.overrides, **tokens})
            if config.head != HEADS[self.task] or (self.task == "LitCausalLM" and not config.causal):
                order = "causal" if config.causal else "not causal"
                raise UserError(f"preset: expected one for {self.task}, got head {config.head!r}, {order}")
        return config

    def module(self, planned: Planned) -> Any:
        """Build the task of an arm at its final size on the meta device."""
        model = copy.deepcopy(self.fit_config(planned, 1, 0, planned.arm.lr, planned.final)["model"])
        model["init_args"] |= self.of_data
        with naming(planned.arm), torch.device("meta"):
            return _built(LightningModule, "model", model)

    def fit_config(
        self, planned: Planned, steps: int, seed: int, lr: float | None, at: TokenformerConfig | None = None
    ) -> dict[str, Any]:
        """Build the config of one fit; ``at`` sets its initial size, and disables growth and validation."""
        arm, speed_only = planned.arm, at is not None
        callbacks = [one for one in (*self.callbacks, *arm.callbacks) if _name(one) not in LEFT_OUT]
        if planned.growths and not speed_only:
            growth = {**self.growth, **arm.growth, "schedule": planned.schedule(steps), "unit": "step"}
            callbacks.append({"class_path": "callbacks.ParameterGrowthCallback", "init_args": growth})
        if planned.drops and not speed_only:
            rates = {"schedule": by_step(planned.drops, steps), "unit": "step"}
            callbacks.append({"class_path": "callbacks.PatchDropSchedule", "init_args": rates})
        trainer = {key: value for key, value in self.trainer.items() if key not in LIMITS}
        trainer |= measured_trainer(steps, max(1, round(steps / self.evaluations)) * self.accumulated, callbacks)
        trainer |= {"num_nodes": 1, "strategy": "auto"}
        trainer["log_every_n_steps"] = min(int(self.trainer.get("log_every_n_steps") or 50), max(1, steps // 20))
        if speed_only:
            trainer["limit_val_batches"] = 0
        overrides = {**self.overrides, **arm.overrides}
        if has_pattention(planned.config):
            overrides["param_tokens"] = dict(planned.config.tokens.items())
        if at is not None:
            overrides |= resized(at, planned.config)
            if has_pattention(at):
                overrides["param_tokens"] = dict(at.tokens.items())
        model = {**copy.deepcopy(self.model), "preset": arm.preset, "overrides": overrides}
        if self.lr_schedule or arm.schedule:
            model["schedule"] = {**self.lr_schedule, **arm.schedule, "unit": "share"}
        if arm.optimizer:
            given = copy.deepcopy(dict(arm.optimizer))
            rate = {} if self.lr is None else {"lr": self.lr}
            model["optimizer"] = {**given, "init_args": {**rate, **(given.get("init_args") or {})}}
        if lr is not None:
            if "lr" not in ((model.get("optimizer") or {}).get("init_args") or {}):
                raise UserError("config: model.init_args.optimizer.init_args.lr: required to set a learning rate")
            model["optimizer"]["init_args"]["lr"] = lr
        return {
            "seed_everything": seed,
            "trainer": trainer,
            "model": {"class_path": f"lit_tokenformer.tasks.{self.task}", "init_args": model},
            "data": self.config["data"],
        }


def measured_trainer(steps: int, interval: int, callbacks: list[dict[str, Any]]) -> dict[str, Any]:
    """Build the trainer settings of a self-measuring fit on one device, without checkpoints.

    Args:
        steps: Optimizer steps.
        interval: Training batches between validations.
        callbacks: Configs of callbacks; monitor and meter are appended.
    """
    monitor = {"log_images": 0, "row_norms": False}  # skip costly logging
    return {
        "max_steps": steps,
        "max_epochs": -1,
        "devices": 1,
        "logger": True,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "val_check_interval": interval,
        "callbacks": [
            *callbacks,
            {"class_path": "callbacks.TrainingMonitor", "init_args": monitor},
            {"class_path": "lit_tokenformer.comparison.meter.Meter"},
        ],
    }


def _built(kind: type, name: str, given: dict[str, Any]) -> Any:
    """Instantiate a part of a config.

    Raises:
        UserError: If it cannot be instantiated.
    """
    parser: Any = FlatNameParser(exit_on_error=False)
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.49
    parser.add_subclass_arguments(kind, name)
    try:
        return build(parser.parse_object({name: given}))[name]
    except Exception as error:
        causes = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{name}: {causes[-1] if causes else type(error).__name__}") from None


def _name(callback: dict[str, Any]) -> str:
    return str(callback.get("class_path", "")).split(".")[-1]

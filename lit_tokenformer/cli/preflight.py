"""Checks of settings before the work of a run: Lightning opens the log folder before it looks at data and schedules."""

from __future__ import annotations

import inspect
import math
import os
import re
import tempfile
from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from callbacks import ParameterGrowthCallback
from callbacks.growth_strategies import refuse_strategy
from lit_tokenformer.data import ImageDataModule, MultiTaskDataModule, TextDataModule
from lit_tokenformer.errors import UserError, raised_by_library, unknown_name
from lit_tokenformer.models import param_tokens
from lit_tokenformer.tasks import LitMultiTask, LitTask
from lit_tokenformer.tasks.schedule import LRSchedule

_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Variable that torchrun sets in the processes that it starts."""

_LEAST = {"accumulate_grad_batches": 1, "gradient_clip_val": 0, "num_nodes": 1}
"""Settings of the trainer that Lightning does not check, and their least values."""

_KNOWN_PACKAGES = {"lightning", "callbacks", "lit_tokenformer"}


class WarmupCheck(Callback):
    """Warns of a warm-up that is longer than the fit."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        short: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        if isinstance(pl_module, LitTask) and pl_module.make_lr_scheduler is None and not short:
            check_warmup(pl_module.schedule, trainer)


def replace_repeated(callbacks: Any) -> Any:
    """Let a callback take the place of an earlier one of the same state, which a trainer cannot hold twice.

    So ``--trainer.callbacks+=ParameterGrowthCallback`` with its options replaces the one of a config.

    Args:
        callbacks: The trainer's callbacks, if they are a list.
    """
    kept: list[Any] = []
    for callback in callbacks if isinstance(callbacks, list) else ():
        stateful = is_overridden("state_dict", instance=callback, parent=Callback)
        keys = [one.state_key if stateful else None for one in kept]
        if stateful and callback.state_key in keys:
            kept[keys.index(callback.state_key)] = callback
            rank_zero_info(f"trainer.callbacks: the last of several {type(callback).__name__} is used")
        else:
            kept.append(callback)
    return kept if isinstance(callbacks, list) else callbacks


def check_trainer_settings(settings: Mapping[str, Any]) -> None:
    """Refuses what a trainer would not.

    Args:
        settings: Its arguments.

    Raises:
        ValueError: For a number that is too small, and for a strategy under which a model is to grow and cannot.
    """
    for name, least in _LEAST.items():
        value = settings.get(name)
        if value is not None and not value >= least:
            raise UserError(f"trainer.{name}: expected at least {least}, got {value}")
    strategy = settings.get("strategy")
    callbacks = settings.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    grows = any(isinstance(callback, ParameterGrowthCallback) for callback in callbacks)
    if grows and isinstance(strategy, str) and strategy in StrategyRegistry:  # others are refused when the fit starts
        refuse_strategy(StrategyRegistry[strategy]["strategy"])


def check_optimizer(task: LitTask) -> None:
    """Makes a task's optimizer and its scheduler for a moment, to see that they can be.

    Raises:
        ValueError: If they cannot, or if a setting is no finite number.
    """
    setting = "model.optimizer"
    try:
        optimizer = task.build_optimizer()
        for name, value in optimizer.defaults.items():
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
                raise UserError(f"{name}: expected a finite number, got {value}")
        setting = "model.lr_scheduler"
        if task.make_lr_scheduler is not None:
            task.make_lr_scheduler(optimizer)
    except Exception as error:
        if isinstance(error, UserError) or raised_by_library(error):
            raise UserError(f"{setting}: {' '.join(str(error).split())}") from None
        raise


def check_end(task: LitTask, trainer: Trainer) -> None:
    """Refuse a schedule that needs an end in a fit that has none.

    Args:
        task: The task.
        trainer: The trainer that fits it.
    """
    endless = trainer.max_epochs == trainer.max_steps == -1
    if endless and task.make_lr_scheduler is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        task.schedule.check_endless()


def check_warmup(schedule: LRSchedule, trainer: Trainer) -> None:
    """Warns of a warm-up that does not end within the fit; one that is shortened to try something is not refused.

    Args:
        schedule: The schedule of a task.
        trainer: The trainer that fits it.
    """
    total = trainer.estimated_stepping_batches
    batches = trainer.num_training_batches
    if schedule.unit == "epoch" and math.isinf(batches):
        return  # a fit that is limited by steps knows its epochs later
    steps_of = {"step": 1.0, "share": total, "epoch": batches / trainer.accumulate_grad_batches}
    if schedule.warmup * steps_of[schedule.unit] > total:
        rank_zero_warn(
            f"schedule.warmup: {schedule.warmup:g} ({schedule.unit}) is longer than the fit of {total} optimizer "
            "steps; the learning rate will not reach its full size"
        )


def check_monitors(trainer: Trainer, task: LightningModule) -> None:
    """Refuse a callback that monitors a metric which the task does not log.

    Args:
        trainer: The trainer.
        task: The task; nothing is checked where it or a callback is a user's own, since it may log other metrics.

    Raises:
        UserError: For an unknown metric, with the nearest known one.
    """
    parts = [task, *trainer.callbacks]  # type: ignore[attr-defined]
    own = any(type(part).__module__.partition(".")[0] not in _KNOWN_PACKAGES for part in parts)
    if own or not isinstance(task, LitTask):
        return
    known = {*task.logged_metrics(), *(f"size/tokens_{kind}" for kind in param_tokens(task))}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if not isinstance(callback, (EarlyStopping, ModelCheckpoint)) or monitor is None:
            continue
        progress = {"epoch", "step"} if isinstance(callback, ModelCheckpoint) else set()
        if monitor not in known | progress and not monitor.startswith("lr-"):  # of a LearningRateMonitor
            raise unknown_name(f"trainer.callbacks: {type(callback).__name__}.monitor", monitor, known | progress)


def check_data_fit(task: LightningModule, datamodule: LightningDataModule | None) -> None:
    """Refuses data of another kind than a task takes.

    Args:
        task: The task.
        datamodule: Its data; only those of this project are looked at.

    Raises:
        ValueError: If the task needs classes or a vocabulary, and the data have none.
    """
    if isinstance(task, LitMultiTask) and isinstance(datamodule, MultiTaskDataModule):
        return  # which has given the sizes of each task's data
    needed = {"num_classes", "vocab_size"} & inspect.signature(type(task)).parameters.keys()
    if isinstance(datamodule, (ImageDataModule, TextDataModule, MultiTaskDataModule)):
        for name in sorted(needed):
            if not hasattr(type(datamodule), name):
                kind = type(datamodule).__name__
                raise UserError(f"data: {kind} has no {name}, which {type(task).__name__} needs; take another of both")


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuses variables of torchrun that do not fit each other; those of other launchers follow other rules.

    Args:
        environment: The variables.

    Raises:
        ValueError: If one is no number, if there are several processes and this one has no number, or one beyond them.
    """
    if _TORCHRUN not in environment:
        return
    numbers: dict[str, int] = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"):
        value = environment.get(name)
        if value is not None and not re.fullmatch(r"[0-9]+", value):
            raise UserError(f"{name}: expected a whole number of at least 0 in the environment, got {value!r}")
        if value is not None:
            numbers[name] = int(value)
    size = numbers.get("WORLD_SIZE", 1)
    if size > 1 and "RANK" not in numbers:
        raise UserError(f"RANK: not set in the environment, but torchrun started WORLD_SIZE={size} processes")
    if "WORLD_SIZE" in numbers and numbers.get("RANK", 0) >= size:
        raise UserError(f"RANK: expected less than WORLD_SIZE={size}, got {numbers['RANK']}")


def check_processes(environment: Mapping[str, str], trainer: Trainer) -> None:
    """Refuses a trainer that would have each process of torchrun train by itself.

    Args:
        environment: The variables.
        trainer: The trainer.

    Raises:
        ValueError: If torchrun started another number of processes than the trainer has.
    """
    started = int(environment.get("WORLD_SIZE", 1))
    if _TORCHRUN in environment and started != trainer.world_size:
        raise UserError(
            f"trainer.devices: the trainer has {trainer.world_size} processes, and torchrun started {started}; "
            "give trainer.devices for each node, and trainer.num_nodes"
        )


def check_writable(setting: str, folder: str) -> None:
    """Reject a folder that cannot be written; it is created, and URLs are not checked.

    Args:
        setting: The setting that names it.
        folder: A path.

    Raises:
        UserError: If it cannot be created, or its disk is full.
    """
    if not _is_local_file_protocol(folder):
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))  # a full disk still takes an empty file
    except OSError as error:
        raise UserError(f"{setting}: cannot write to {folder} ({error.strerror})") from None

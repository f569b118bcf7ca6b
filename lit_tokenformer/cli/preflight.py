"""Preflight checks of settings: Lightning creates the log folder before it validates data and schedules."""

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
from lit_tokenformer.data import (
    ImageDataModule,
    MultiTaskDataModule,
    TextDataModule,
    Tokenizer,
    VisionLanguageDataModule,
)
from lit_tokenformer.data.text.tokenizer import BYTES_VOCAB_SIZE, bpe_size
from lit_tokenformer.errors import UserError, raised_by_library, unknown_name
from lit_tokenformer.models import param_tokens
from lit_tokenformer.tasks import LitMultiTask, LitTask
from lit_tokenformer.tasks.optimization import LRSchedule

_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Environment variable that marks the processes of torchrun."""

_LEAST = {"accumulate_grad_batches": 1, "gradient_clip_val": 0, "num_nodes": 1}
"""Minimum values of trainer settings that Lightning does not validate."""

_KNOWN_PACKAGES = {"lightning", "callbacks", "lit_tokenformer"}


class WarmupCheck(Callback):
    """Warn if the warm-up is longer than the fit."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        short: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        if isinstance(pl_module, LitTask) and pl_module.make_lr_scheduler is None and not short:
            check_warmup(pl_module.schedule, trainer)


def replace_repeated(callbacks: Any) -> Any:
    """Replace a callback by a later one with the same state key, which Lightning accepts only once.

    Callbacks of this project without state are replaced by a later one of their class.
    ``--trainer.callbacks+=ParameterGrowthCallback`` with its options thus replaces the one of a config.

    Args:
        callbacks: The trainer's callbacks; anything but a list is returned unchanged.
    """
    kept: list[Any] = []
    for callback in callbacks if isinstance(callbacks, list) else ():
        key, keys = _identity(callback), [_identity(one) for one in kept]
        if key is not None and key in keys:
            kept[keys.index(key)] = callback
            rank_zero_info(f"trainer.callbacks: {type(callback).__name__} replaces an earlier one")
        else:
            kept.append(callback)
    return kept if isinstance(callbacks, list) else callbacks


def _identity(callback: Any) -> Any:
    """Return what a fit can have only one callback with; ``None`` if it can have any number of them."""
    if is_overridden("state_dict", instance=callback, parent=Callback):
        return callback.state_key
    return type(callback) if type(callback).__module__.split(".")[0] == "callbacks" else None


def check_trainer_settings(settings: Mapping[str, Any]) -> None:
    """Reject settings that Lightning accepts.

    Args:
        settings: Arguments of the trainer.

    Raises:
        UserError: If a number is too small, or the strategy does not support growth and the model grows.
    """
    for name, least in _LEAST.items():
        value = settings.get(name)
        if value is not None and not value >= least:
            raise UserError(f"trainer.{name}: expected at least {least}, got {value}")
    strategy = settings.get("strategy")
    callbacks = settings.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    grows = any(isinstance(callback, ParameterGrowthCallback) for callback in callbacks)
    if grows and isinstance(strategy, str) and strategy in StrategyRegistry:  # others are rejected when the fit starts
        refuse_strategy(StrategyRegistry[strategy]["strategy"])


def check_optimizer(task: LitTask) -> None:
    """Build the optimizer and the scheduler of a task to validate their settings.

    Raises:
        UserError: If one cannot be built, or a setting is non-finite.
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
    """Reject a learning-rate schedule that needs the length of the fit in an endless fit.

    Args:
        task: The task.
        trainer: The trainer that fits it.
    """
    endless = trainer.max_epochs == trainer.max_steps == -1
    if endless and task.make_lr_scheduler is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        task.schedule.check_endless()


def check_warmup(schedule: LRSchedule, trainer: Trainer) -> None:
    """Warn if the warm-up does not end within the fit; a warning, since a fit may be shortened for a trial.

    Args:
        schedule: The schedule of a task.
        trainer: The trainer that fits it.
    """
    total = trainer.estimated_stepping_batches
    batches = trainer.num_training_batches
    if schedule.unit == "epoch" and math.isinf(batches):
        return  # the epoch length of streamed data is unknown
    steps_of = {"step": 1.0, "share": total, "epoch": batches / trainer.accumulate_grad_batches}
    if schedule.warmup * steps_of[schedule.unit] > total:
        rank_zero_warn(
            f"schedule.warmup: {schedule.warmup:g} ({schedule.unit}) is longer than the fit of {total} optimizer "
            "steps; the learning rate does not reach its peak"
        )


def check_monitors(trainer: Trainer, task: LightningModule, datamodule: LightningDataModule | None) -> None:
    """Reject a callback with a monitored metric that the task does not log.

    Args:
        trainer: The trainer.
        task: The task. The check is skipped for a user's own task or callback, which may log other metrics.
        datamodule: Its data, on which some metrics depend.

    Raises:
        UserError: If a metric is unknown; suggests the nearest one.
    """
    parts = [task, *trainer.callbacks]  # type: ignore[attr-defined]
    own = any(type(part).__module__.partition(".")[0] not in _KNOWN_PACKAGES for part in parts)
    if own or not isinstance(task, LitTask):
        return
    known = {*task.logged_metrics(datamodule), *(f"size/tokens_{kind}" for kind in param_tokens(task))}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        known |= callback.logged_metrics(task) if hasattr(callback, "logged_metrics") else set()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if not isinstance(callback, (EarlyStopping, ModelCheckpoint)) or monitor is None:
            continue
        progress = {"epoch", "step"} if isinstance(callback, ModelCheckpoint) else set()
        if monitor not in known | progress and not monitor.startswith("lr-"):  # of a LearningRateMonitor
            raise unknown_name(f"trainer.callbacks: {type(callback).__name__}.monitor", monitor, known | progress)


def check_data_fit(task: LightningModule, datamodule: LightningDataModule | None) -> None:
    """Reject data of a kind that the task does not support.

    Args:
        task: The task.
        datamodule: Its data; a user's own data module is not checked.

    Raises:
        UserError: If the task needs classes or a vocabulary, and the data have none.
    """
    if isinstance(task, LitMultiTask) and isinstance(datamodule, MultiTaskDataModule):
        return  # each task gets the sizes of its own data
    needed = {"num_classes", "vocab_size"} & inspect.signature(type(task)).parameters.keys()
    if isinstance(datamodule, (ImageDataModule, TextDataModule, VisionLanguageDataModule, MultiTaskDataModule)):
        for name in sorted(needed):
            if not hasattr(type(datamodule), name):
                kind = type(datamodule).__name__
                raise UserError(f"data: {kind} has no {name} (expected data that fit {type(task).__name__})")


def use_saved_tokenizer(datamodule: LightningDataModule, checkpoint: Mapping[str, Any], asked: bool) -> None:
    """Give text data the tokenizer of a checkpoint, before they are used.

    It replaces ``bytes``, unless asked for, and ``bpe:N``, so that no vocabulary is trained on other documents. A file,
    a Hugging Face name and ``bpe:N`` of another size are kept; the task compares them with the checkpoint's tokenizer.

    Args:
        datamodule: The data; for several tasks, each gets the tokenizer of its own task.
        checkpoint: The checkpoint to evaluate.
        asked: Whether ``data.tokenizer`` is among the arguments of the command.
    """
    settings = checkpoint.get("hyper_parameters", {})
    for task, data in getattr(datamodule, "parts", {"": datamodule}).items():
        text = _part(checkpoint, "extras", task).get("tokenizer")
        if not isinstance(data, TextDataModule) or not isinstance(text, str):
            continue
        corpus, most = data.corpus, bpe_size(data.corpus.tokenizer_name)
        if most is None and (corpus.tokenizer_name != "bytes" or asked):
            continue
        sizes = _part(settings, "sizes", task)
        separator_id, vocab_size = (sizes.get(name, settings.get(name)) for name in ("separator_id", "vocab_size"))
        separator = corpus.separator or (separator_id if isinstance(separator_id, int) else None)
        tokenizer = Tokenizer.from_json(text, separator, "the tokenizer in the checkpoint")
        if most is None or BYTES_VOCAB_SIZE < tokenizer.size <= most + 1:
            claimed = any(vocab_size in weight.shape for weight in checkpoint["state_dict"].values())
            data.use_tokenizer(tokenizer, vocab_size if claimed else None)
            rank_zero_info(f"data.tokenizer: that of the checkpoint ({tokenizer.size} tokens)")


def _part(checkpoint: Mapping[str, Any], key: str, task: str) -> Mapping[str, Any]:
    """Return what belongs to one task of a checkpoint; all of it for a single task."""
    parts = checkpoint.get(key)
    part = parts.get(task, checkpoint) if isinstance(parts, Mapping) else checkpoint
    return part if isinstance(part, Mapping) else {}


def check_environment(environment: Mapping[str, str]) -> None:
    """Reject inconsistent environment variables of torchrun; those of other launchers are not checked.

    Args:
        environment: Environment variables.

    Raises:
        UserError: If one is not a number, or the rank is missing or not below the world size.
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
    """Reject a world size that differs from torchrun's, where each process would train by itself.

    Args:
        environment: Environment variables.
        trainer: The trainer.

    Raises:
        UserError: If torchrun started another number of processes than the trainer has.
    """
    started = int(environment.get("WORLD_SIZE", 1))
    if _TORCHRUN in environment and started != trainer.world_size:
        raise UserError(
            f"trainer.devices: the trainer has {trainer.world_size} processes, but torchrun started {started}; "
            "set trainer.devices per node and trainer.num_nodes"
        )


def check_writable(setting: str, folder: str) -> None:
    """Create a folder, and reject it if it is not writable; URLs are not checked.

    Args:
        setting: Name of the setting.
        folder: Path of the folder.

    Raises:
        UserError: If it cannot be created, or its disk is full.
    """
    if not _is_local_file_protocol(folder):
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))  # a full disk accepts an empty file
    except OSError as error:
        raise UserError(f"{setting}: cannot write to {folder} ({error.strerror})") from None

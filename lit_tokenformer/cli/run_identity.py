"""Run identity: the checkpoints that belong to an experiment, and the state that a new job restores from them.

``--ckpt_path last`` resumes the newest checkpoint of *this* experiment. An experiment is defined by the settings that
change its result. Each checkpoint contains them, and the log names those that differ. Settings that change with the
hardware (devices, strategy, workers, loggers, paths of callbacks) and the length of the fit do not define it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from enum import Enum
from pydoc import locate
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    Timer,
)
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks import LossGuard, RunSummary, TrainingMonitor
from lit_tokenformer.checkpoints.checkpoint_io import SavedCheckpoint, resumable_checkpoints
from lit_tokenformer.data.settings import FLAT_NAMES
from lit_tokenformer.errors import UserError
from lit_tokenformer.tasks.base import state_dict_problems

log = logging.getLogger(__name__)

RUN = "run"
"""Key of the run identity in a checkpoint."""

_TRAINER = (
    *("accumulate_grad_batches", "gradient_clip_algorithm", "gradient_clip_val", "limit_train_batches"),
    *("overfit_batches", "precision", "sync_batchnorm"),
)
"""Trainer settings that change the result of a fit."""

_NO_RESULT = {
    *("num_workers", "pin_memory", "prefetch_factor", "persistent_workers", "cache_dir", "download"),
    *("eval_batch_size", "predict_root", "compile", "grad_checkpointing"),
}
"""Model and data settings that change only speed, memory or evaluation."""

_PER_PROCESS = {"accumulate_grad_batches", "batch_size"}
"""Settings that keep the global batch size constant when the number of processes changes."""

_OBSERVERS = (
    *(BasePredictionWriter, Checkpoint, DeviceStatsMonitor, EarlyStopping, LearningRateMonitor, LossGuard),
    *(ModelSummary, ProgressBar, RunSummary, Timer, TrainingMonitor),
)
"""Callbacks that report, save or stop, and leave the result of a step unchanged."""


def defining_settings(config: Mapping[str, Any] | Namespace) -> dict[str, Any]:
    """Collect the settings that define an experiment, by their names on the command line.

    Args:
        config: The parsed configuration of ``fit``.

    Returns:
        JSON values; a class is its path, under the name of its setting.
    """
    trainer = config["trainer"]
    found = {name: config.get(name) for name in ("seed_everything", "init_from", "init_ema", "init_resize_vocab")}
    found |= {f"trainer.{name}": trainer.get(name) for name in _TRAINER}
    for part in ("model", "data"):
        pairs = ((_with_flat_name(name), value) for name, value in _flat(part, config.get(part)))
        found |= {name: value for name, value in pairs if _last(name) not in _NO_RESULT}
    given = trainer.get("callbacks") or []
    callbacks = [one for one in (given if isinstance(given, list) else [given]) if not _observes(one)]
    found["trainer.callbacks"] = [_last(str(one.get("class_path"))) for one in callbacks]
    for one in callbacks:
        found |= _flat(f"trainer.callbacks.{_last(str(one.get('class_path')))}", one)
    return json.loads(json.dumps(found, default=_plain))


def _observes(callback: Any) -> bool:
    path = callback.get("class_path")
    return path is None or issubclass(locate(path), _OBSERVERS)  # type: ignore[arg-type]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Flatten the settings below a name; a dictionary given by the user is one value."""
    if not isinstance(value, Namespace):
        yield name, value
        return
    inner = vars(value)
    yield name, inner.get("class_path", True)
    for key, one in inner.items():
        if key == "init_args":
            yield from (pair for pair in _flat(name, one) if pair[0] != name)
        elif key != "class_path":
            yield from _flat(f"{name}.{key}", one)


def _with_flat_name(name: str) -> str:
    """Replace a nested setting by its flat name, which earlier versions have in their checkpoints.

    Example:
        >>> _with_flat_name("data.image.loader.batch_size")
        'data.image.batch_size'
    """
    head, _, field = name.rpartition(".")
    head, _, group = head.rpartition(".")
    flat = next((flat for flat, nested in FLAT_NAMES.items() if nested == f"{group}.{field}"), None)
    return f"{head}.{flat}" if flat else name


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        return value.as_dict()
    if isinstance(value, (os.PathLike, Enum)):
        return str(value)
    return getattr(value, "__qualname__", type(value).__qualname__)  # its repr may contain an address


class RunIdentity(Callback):
    """Write the identity of a run into its checkpoints, and resume from the newest one with the same identity.

    Rank 0 selects the checkpoint and broadcasts its path. If no checkpoint has an identity, one with the
    hyper-parameters and tensor shapes of the model is accepted.

    Two callbacks do not restore their full state: ``max_time`` counts the time of the new job, and ``EarlyStopping``
    has the patience of the current settings. A fit that has ended is reported and not trained.

    Args:
        settings: Result of :func:`defining_settings`.
        name: Name of the run; replaces the settings as its identity.
        ckpt_path: ``last``, a path or ``None``, as set by the user.
    """

    def __init__(self, settings: dict[str, Any], name: str | None = None, ckpt_path: str | None = None) -> None:
        self.settings = settings
        self.name = name
        self.ckpt_path = ckpt_path
        self.needed: str | None = None
        """Problem that prevents a fresh start; raised unless a checkpoint can be resumed."""
        self._world_size = 1
        self._found: tuple[str | None, str] | None = None
        self._ended: list[str] = []
        self._resumed_at: tuple[str, int] | None = None

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """Describe how a checkpoint's identity differs from this run's.

        Args:
            saved: The identity in the checkpoint.

        Returns:
            One string per setting that differs. Settings that exist on one side only, from another version, are
            ignored.
        """
        if saved.get("name") != self.name:
            return [_differs("run_name", saved.get("name"), self.name)]
        return [] if self.name is not None else self._changed(saved)

    def _changed(self, saved: Mapping[str, Any]) -> list[str]:
        theirs = saved.get("settings")
        if not isinstance(theirs, Mapping):
            return ["its settings are damaged"]
        free = set() if saved.get("world_size") == self._world_size else _PER_PROCESS
        return [
            _differs(name, theirs[name], value)
            for name, value in self.settings.items()
            if name in theirs and theirs[name] != value and _last(name) not in free
        ]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._world_size = trainer.world_size
        connector = trainer._checkpoint_connector
        resume_start = connector.resume_start

        def resume_from_own(checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
            # without a path, Lightning resumes any checkpoint of SLURM or an OnExceptionCheckpoint in the folder
            if self.ckpt_path == "last" or (self.ckpt_path in (None, "hpc") and checkpoint_path is not None):
                checkpoint_path = self._choose(trainer, pl_module)
            resume_start(checkpoint_path, weights_only)

        connector.resume_start = resume_from_own  # type: ignore[method-assign]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[RUN] = {"name": self.name, "settings": self.settings, "world_size": self._world_size}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        states = checkpoint["callbacks"]
        step = checkpoint.get("global_step", 0)
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {})
        epochs = progress.get("current", {}).get("processed", 0)
        limit = trainer.fit_loop.max_epochs
        self._resumed_at = str(trainer.ckpt_path), step
        self._ended = []
        if limit is not None and 0 <= limit < epochs:
            raise UserError(f"trainer.max_epochs: {trainer.ckpt_path} has {epochs} epochs (got {limit}, expected more)")
        if limit == epochs:
            self._ended.append(f"trainer.max_epochs: {limit} reached; raise it to continue")
        if 0 <= trainer.max_steps <= step:
            self._ended.append(f"trainer.max_steps: {trainer.max_steps} reached; raise it to continue")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = states.get(callback.state_key)
            if isinstance(callback, Timer):
                states.pop(callback.state_key, None)
            elif isinstance(callback, EarlyStopping) and state:
                self._ended += _restore_early_stopping(callback, state, trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed_at is None or not self._ended or trainer.global_step != self._resumed_at[1]:
            return
        path, step = self._resumed_at
        if trainer.is_global_zero:
            log.warning(f"Nothing left to train after step {step} of {path}: {'; '.join(self._ended)}")

    def _choose(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Select the checkpoint to resume from on rank 0, and broadcast it."""
        fits = trainer.state.fn == TrainerFn.FITTING
        if fits and trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info("ckpt_path: ignored by fast_dev_run")
            return None
        path, report = trainer.strategy.broadcast(
            self._find(trainer, pl_module) if trainer.is_global_zero else (None, "")
        )
        if path is None and not fits:
            raise UserError(f"ckpt_path: no last checkpoint ({report})")
        if path is None and self.needed is not None:
            raise UserError(f"{self.needed}, and this run has no checkpoint ({report})")
        if path is not None:
            rank_zero_info(f"Resuming from {path} ({report})" if fits else f"Loading {path} ({report})")
        elif trainer.is_global_zero:
            log.warning(f"Starting fresh: {report}")
        return path

    def last(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Find the checkpoint ``last`` to evaluate before data are prepared; ``None`` if this process sees none.

        Raises:
            UserError: If there is none, and this process selects it.
        """
        path, report = self._find(trainer, pl_module)
        if path is None and trainer.is_global_zero:
            raise UserError(f"ckpt_path: no last checkpoint ({report})")
        return path

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> tuple[str | None, str]:
        """Find the newest intact checkpoint of this experiment, once, and describe it for the log."""
        if self._found is None:
            self._world_size = trainer.world_size
            self._found = self._search(trainer, pl_module)
        return self._found

    def _search(self, trainer: Trainer, pl_module: LightningModule) -> tuple[str | None, str]:
        roots, folders = _places(trainer)
        found = resumable_checkpoints(roots, folders)
        known = [one for one in found if isinstance(one.content.get(RUN), Mapping)]
        if known:
            unlike = [(one, self.differences(one.content[RUN])) for one in known]
        else:
            unlike = [(one, _model_differences(one, pl_module)) for one in found]
        for one, differences in unlike:
            if differences:
                continue
            report = f"epoch {one.content.get('epoch')}, step {one.step}"
            if self.name is not None and known and (changed := self._changed(one.content[RUN])):
                report += f", changed since: {_listed(changed)}"
            if not known:
                report += ", saved without a run identity: hyper-parameters and tensor shapes agree"
            return one.path, report
        others = [(one, differences) for one, differences in unlike if differences]
        if not others:
            places = [one for one in roots + folders if not any(one.startswith(f"{root}/") for root in roots)]
            return None, f"no checkpoint in {', '.join(dict.fromkeys(places))}"
        nearest, differences = min(others, key=lambda pair: len(pair[1]))  # of equal ones the newest
        return None, (
            f"none of {len(others)} checkpoints is of this experiment; the nearest, {nearest.path}, differs in "
            f"{_listed(differences)}; set ckpt_path to a file to resume from it"
        )


def _differs(name: str, theirs: Any, ours: Any) -> str:
    return f"{name} ({theirs!r:.60} there, {ours!r:.60} here)"


def _listed(differences: list[str]) -> str:
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return ", ".join(differences[:3]) + more


def _model_differences(saved: SavedCheckpoint, pl_module: LightningModule) -> list[str]:
    """Describe how the model of a checkpoint without an identity differs."""
    task = saved.content.get("task", type(pl_module).__name__)
    if task != type(pl_module).__name__:
        return [_differs("model", task, type(pl_module).__name__)]
    theirs = saved.content.get(pl_module.CHECKPOINT_HYPER_PARAMS_KEY) or {}
    ours = dict(pl_module.hparams)
    found = [
        _differs(f"model.{name}", theirs[name], value)
        for name, value in ours.items()
        if name in theirs and _json(theirs[name]) != _json(value)
    ]
    if not found and "grown_depth" not in saved.content:
        found = [*state_dict_problems(pl_module, saved.content["state_dict"])][:1]
    return found


def _json(value: Any) -> str:
    return json.dumps(value, default=_plain, sort_keys=True)


def _places(trainer: Any) -> tuple[list[str], list[str]]:
    """Root folders of runs, and checkpoint folders, from trainer, loggers and callbacks."""
    roots: list[Any] = [trainer.default_root_dir]
    for logger in trainer.loggers:
        roots += [logger.save_dir, getattr(logger, "root_dir", None)]
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    expanded = [[os.path.expanduser(str(place)) for place in places if place] for places in (roots, folders)]
    return [*dict.fromkeys(expanded[0])], [*dict.fromkeys(expanded[1])]


def _restore_early_stopping(callback: EarlyStopping, state: dict[str, Any], trainer: Trainer) -> list[str]:
    """Update the saved state to the current settings; a stopped fit stays stopped unless its patience was raised."""
    state["patience"] = callback.patience
    reason = state.get("stopping_reason")
    patient = reason == EarlyStoppingReason.PATIENCE_EXHAUSTED.value and state["wait_count"] < callback.patience
    if reason in (None, EarlyStoppingReason.NOT_STOPPED.value) or patient:
        state |= {"stopping_reason": EarlyStoppingReason.NOT_STOPPED.value, "stopping_reason_message": None}
        return []
    trainer.should_stop = True
    remedy = "raise its patience" if reason == EarlyStoppingReason.PATIENCE_EXHAUSTED.value else "remove the callback"
    cause = str(state.get("stopping_reason_message")).removesuffix(" Signaling Trainer to stop.").rstrip(".")
    return [f"EarlyStopping of {callback.monitor} ended it ({cause}); {remedy} to continue"]

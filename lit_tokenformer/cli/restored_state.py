"""Type checks of the training state that a fit restores from a checkpoint.

Lightning and torch restore values unchecked, so one of a wrong type fails later or inside their code. The state of a
user's own callbacks, optimizers and schedulers is not checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn

from callbacks import ParameterGrowthCallback, RunSummary, TrainingMonitor
from lit_tokenformer.checkpoints.load import state_errors
from lit_tokenformer.errors import UserError, is_user_code

_SCORE = torch.zeros(())
_GROWTH = {"before": {"": 0}, "after": {"": 0}, "layers_before": {"": 0}, "rows": {"": [0]}}
_STAGE = {
    **dict.fromkeys(("depth", "begins_at_step", "steps", "seconds", "flops_before", "training_flops"), 0),
    **dict.fromkeys(("parameters", "active_parameters"), 0),
    **{"tokens": {"": 0}, "units": {"": 0}, "best": {"path": "", "monitor": "", "score": 0.0}},
    "throughput": {"": 0},
}
_FILLED: dict[type[Callback], dict[str, Any]] = {
    ModelCheckpoint: {"best_model_score": _SCORE, "current_score": _SCORE, "best_k_models": {"": _SCORE}},
    ParameterGrowthCallback: {"events": [{"epoch": 0, "step": 0, **_GROWTH}]},
    RunSummary: {"stages": [_STAGE]},
    TrainingMonitor: {"growth": _GROWTH},
}
"""Typed examples of state that is None or empty at the start of a fit; the key '' matches any key."""


class CheckedRestore(_CheckpointConnector):
    """Restore a fit, and report values of a wrong type with the checkpoint and their key."""

    def restore_callbacks(self) -> None:
        saved = self._loaded_checkpoint.get("callbacks", {})
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if callback.state_key in saved and not is_user_code(callback):
                filled = (state for kind, state in _FILLED.items() if isinstance(callback, kind))
                present = {**callback.state_dict(), **next(filled, {})}
                self._check(f"callbacks: {callback.state_key}", saved[callback.state_key], present)
        if self.trainer.state.fn == TrainerFn.FITTING and self._loaded_checkpoint:
            fresh = _FitLoop(self.trainer)  # without data: loaders may start to read when asked for their state
            self._check("loops", self._loaded_checkpoint.get("loops"), {"fit_loop": fresh.state_dict()})
        with self._reported("callbacks"):
            super().restore_callbacks()

    def restore_loops(self) -> None:
        with self._reported("loops"):
            super().restore_loops()

    def restore_optimizers(self) -> None:
        states = self._loaded_checkpoint.get("optimizer_states", [])
        for number, (optimizer, saved) in enumerate(zip(self.trainer.optimizers, states, strict=False)):
            present = optimizer.state_dict()
            if not is_user_code(optimizer) and _same_settings(saved, present):
                self._check(f"optimizer_states: {number}", saved, present)
        with self._reported("optimizer_states"):
            super().restore_optimizers()

    def restore_lr_schedulers(self) -> None:
        states = self._loaded_checkpoint.get("lr_schedulers", [])
        for number, (config, saved) in enumerate(zip(self.trainer.lr_scheduler_configs, states, strict=False)):
            if not is_user_code(config.scheduler):
                self._check(f"lr_schedulers: {number}", saved, config.scheduler.state_dict())
        with self._reported("lr_schedulers"):
            super().restore_lr_schedulers()

    def _check(self, place: str, saved: Any, present: Any) -> None:
        if problem := next(_problems(saved, present, place), None):
            raise UserError(f"ckpt_path: {self._ckpt_path}: {problem}")

    @contextmanager
    def _reported(self, place: str) -> Iterator[None]:
        with state_errors(str(self._ckpt_path), place):
            yield


def check_restored_state(trainer: Trainer) -> None:
    """Enable type checks of the state that a trainer restores.

    Args:
        trainer: The trainer, before it starts; changed in place.
    """
    trainer._checkpoint_connector = CheckedRestore(trainer)


def _same_settings(saved: Any, present: dict[str, Any]) -> bool:
    """Check that a saved state has the settings of the optimizer's class; the task reports another class."""
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    if not isinstance(groups, list) or not groups or not isinstance(groups[0], dict):
        return True  # damaged
    return present["param_groups"][0].keys() <= groups[0].keys()


def _problems(saved: Any, present: Any, place: str) -> Iterator[str]:
    """Report values whose type differs from that of the current state; None matches any type."""
    if saved is None or present is None:
        return
    if isinstance(present, torch.Tensor):
        kinds: tuple[type, ...] = (torch.Tensor,)
    elif isinstance(present, (bool, int, float)):
        kinds = (int, float, torch.Tensor)
    elif isinstance(present, (list, tuple)):
        kinds = (list, tuple)
    else:
        kinds = (Mapping,) if isinstance(present, Mapping) else (type(present),)
    if not isinstance(saved, kinds):
        yield f"{place}: expected type {type(present).__name__}, got {type(saved).__name__}"
    elif isinstance(saved, Mapping):
        for key, value in saved.items():
            yield from _problems(value, present.get(key, present.get("")), f"{place}.{key}")
    elif isinstance(saved, (list, tuple)) and present:
        for number, value in enumerate(saved):
            yield from _problems(value, present[min(number, len(present) - 1)], f"{place}.{number}")

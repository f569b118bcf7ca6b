"""Metrics that callbacks monitor, checked before the first epoch."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lit_tokenformer.errors import unknown_name
from lit_tokenformer.models import param_tokens
from lit_tokenformer.tasks import LitTask

_KNOWN_PACKAGES = {"lightning", "callbacks", "lit_tokenformer"}


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

"""Lightning's trainer, which remembers what is on the disk when a checkpoint found no place there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_tokenformer.checkpoint_io import WholeCheckpointIO
from lit_tokenformer.models import param_tokens

_BEST = (
    *("best_k_models", "best_model_path", "best_model_score", "current_score"),
    *("kth_best_model_path", "kth_value", "last_model_path"),
)
"""What a ``ModelCheckpoint`` sets before it saves."""
_PATHS = ("best_model_path", "last_model_path")
"""What of it is still true when the model has grown; scores of another size are not for comparison."""


class CheckpointingTrainer(Trainer):
    """A trainer whose ``ModelCheckpoint`` callbacks know no checkpoint that a full disk kept from being saved.

    It needs :class:`~lit_tokenformer.checkpoint_io.WholeCheckpointIO` with ``on_full_disk: warn``, and does nothing
    with another one.
    """

    def save_checkpoint(
        self,
        filepath: str | Path,
        weights_only: bool | None = None,
        storage_options: Any | None = None,
    ) -> None:
        """Saves a checkpoint; to be called in every process.

        Args:
            filepath: The file.
            weights_only: Whether optimizer, schedule and callbacks are left out.
            storage_options: As Lightning's.
        """
        if self.fast_dev_run:  # type: ignore[attr-defined]
            return  # Lightning suppresses all checkpoints of it but the one at the end
        super().save_checkpoint(filepath, weights_only, storage_options)
        io = self.strategy.checkpoint_io
        if not isinstance(io, WholeCheckpointIO) or io.on_full_disk != "warn":
            return
        unsaved = self.strategy.broadcast(io.unsaved)  # only the first process writes
        size = param_tokens(self.lightning_module)
        before: dict[int, Any] = self.__dict__.setdefault("_before_save", {})
        for callback in self.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint):
                continue
            if unsaved is None:
                now = {name: getattr(callback, name) for name in _BEST}
                before[id(callback)] = size, {**now, "best_k_models": dict(callback.best_k_models)}
            elif unsaved in (callback.best_model_path, callback.last_model_path, *callback.best_k_models):
                size_then, known = before.get(id(callback), (None, {}))
                _forget(callback, known if size_then == size else {name: known[name] for name in _PATHS if known})


def _forget(callback: ModelCheckpoint, known: dict[str, Any]) -> None:
    """Puts back what a callback knew before; what is not known is as at the start."""
    nothing = {
        **{"best_k_models": {}, "best_model_path": "", "best_model_score": None, "current_score": None},
        **{"kth_best_model_path": "", "kth_value": torch.tensor(math.inf if callback.mode == "min" else -math.inf)},
        **{"last_model_path": ""},
    }
    for name, value in {**nothing, **known}.items():
        setattr(callback, name, dict(value) if name == "best_k_models" else value)

"""Lightning's trainer: a full disk does not end its fits, and weights that are not finite become no checkpoint."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_tokenformer.checkpoints.checkpoint_io import WholeCheckpointIO, is_disk_full
from lit_tokenformer.growth.shards import local
from lit_tokenformer.models import param_tokens

_BEST = (
    *("best_k_models", "best_model_path", "best_model_score", "current_score"),
    *("kth_best_model_path", "kth_value", "last_model_path"),
)
"""What a ``ModelCheckpoint`` sets before it saves."""
_PATHS = ("best_model_path", "last_model_path")
"""What of it is still true when the model has grown; scores of another size are not for comparison."""

_WRITING: dict[type[Logger], tuple[str, ...]] = {
    TensorBoardLogger: ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize"),
    CSVLogger: ("save",),  # keeps in memory what it could not write
}
"""Methods of loggers that write to the disk."""
_LOG_ROOM = 2**18
"""Bytes that must be free for a logger to write, so that a log never ends within a record."""


class CheckpointingTrainer(Trainer):
    """A trainer that saves finite states only, and whose ``ModelCheckpoint`` callbacks know only what was saved.

    A checkpoint is not saved where a weight or a number in the optimizer's state is NaN or infinite: the checkpoints
    before it are kept, and a warning says so. This costs one pass over weights and optimizer state for each checkpoint,
    without a copy of them.

    It needs :class:`~lit_tokenformer.checkpoints.checkpoint_io.WholeCheckpointIO`, and ``on_full_disk: warn`` for a
    fit that survives a full disk. With another ``CheckpointIO`` a state that is not finite ends the fit.
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

        Raises:
            FloatingPointError: For a state that is not finite, with a ``CheckpointIO`` of the user's.
        """
        if self.fast_dev_run:  # type: ignore[attr-defined]
            return  # Lightning suppresses all checkpoints of it but the one at the end
        io: Any = self.strategy.checkpoint_io
        ours = isinstance(io, WholeCheckpointIO)
        name = _not_finite(self)
        if self.strategy.reduce_boolean_decision(name is None):
            super().save_checkpoint(filepath, weights_only, storage_options)
        else:
            message = f"non-finite {name or 'weights'} at step {self.global_step}: {filepath} is not saved"
            if not ours:
                raise FloatingPointError(message)
            io.unsaved = str(filepath)
            rank_zero_warn(f"{message}, and the checkpoints before it are kept")
        if not ours:
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


@torch.no_grad()
def _not_finite(trainer: Trainer) -> str | None:
    """The first parameter with a number that is not finite, in itself, its averages or its optimizer state.

    Buffers may have some. The device is waited for once, unless there is one.
    """
    averages = [one._average_model for one in trainer.callbacks if isinstance(one, WeightAveraging)]  # type: ignore
    states = {parameter: state for one in trainer.optimizers for parameter, state in one.state.items()}
    found: dict[str, torch.Tensor] = {}
    for module in (trainer.lightning_module, *averages):
        for name, parameter in module.named_parameters() if module is not None else ():
            tensors = [parameter, *states.get(parameter, {}).values()]
            numbers = [local(one) for one in tensors if isinstance(one, torch.Tensor)]
            found[name] = torch.stack([one.isfinite().all().to(parameter.device) for one in numbers]).all()
    if not found or torch.stack([*found.values()]).all():
        return None
    return next(name for name, finite in found.items() if not finite)


def keep_logging(trainer: Trainer) -> None:
    """Lets a fit continue when the disk is full for its loggers.

    Args:
        trainer: Its TensorBoard and CSV loggers are changed in place.
    """
    for logger in trainer.loggers:
        for kind, methods in _WRITING.items():
            for name in methods if isinstance(logger, kind) else ():
                setattr(logger, name, partial(write_if_room, logger, partial(getattr(type(logger), name), logger)))


def write_if_room(logger: Any, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Calls a function that writes to a log; where the disk is full, that is lost, with a warning.

    Args:
        logger: What it writes for.
        write: The function.
        args: Its arguments.
        kwargs: Its arguments by name.
    """
    folder = logger.log_dir if isinstance(logger, (TensorBoardLogger, CSVLogger)) else None
    if folder is None or not Path(folder).is_dir() or shutil.disk_usage(folder).free >= _LOG_ROOM:
        try:
            return write(*args, **kwargs)
        except Exception as error:
            if not is_disk_full(error):
                raise
            if isinstance(logger, TensorBoardLogger):
                logger._experiment = None  # it repeats its error for ever; the next one writes a new file
    rank_zero_warn(f"no space left for the log in {folder}; the fit continues, and the log has a gap")

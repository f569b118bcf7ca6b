"""Safe loading and validation of Lightning checkpoints."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch

from lit_tokenformer.atomic_io import atomic_write
from lit_tokenformer.distributed.checkpoint import is_sharded, read_folder
from lit_tokenformer.errors import UserError, raised_by_user_code
from lit_tokenformer.tensor_files import load_pickle

KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("state_dict", "current_model_state", "hyper_parameters", "callbacks", "loops"), (dict,)),
    **dict.fromkeys(("optimizer_states", "lr_schedulers"), (list,)),
    **dict.fromkeys(("epoch", "global_step"), (int,)),
    "pytorch-lightning_version": (str,),
}
"""Types of the entries that Lightning writes to a checkpoint."""

ADAPTER = "adapter"
"""Key in a checkpoint of an adapter, whose ``state_dict`` has the adapter's tensors only."""

OWN_KINDS: dict[str, tuple[type, ...]] = {
    **{
        "tokenizer": (str, type(None)),
        "image_data": (dict, type(None)),
        "extras": (dict,),
        ADAPTER: (dict,),
        "grown_depth": (int,),
        "rng_states": (list,),
    }
}
"""Types of the entries added by the tasks of this project; other projects may use the same names."""

_COUNTS = {"ready", "started", "processed", "completed"}
_PROGRESS = {"total", "current", "batch_progress", "epoch_progress", "optimizer", "step", "zero_grad"}
"""Keys in the progress of Lightning's loops, whose types Lightning does not check."""


def read_checkpoint(path: str | os.PathLike[str], map_location: str = "cpu", optimizers: bool = True) -> dict[str, Any]:
    """Load a training checkpoint without executing code from it.

    Args:
        path: File, or folder of a sharded checkpoint.
        map_location: Device of the tensors; ``meta`` reads their shapes only.
        optimizers: Whether to load optimizer state into memory.

    Raises:
        ValueError: If the file is missing, incomplete, contains pickled code or is not a training checkpoint.
    """
    if not os.path.exists(path):
        last = max(Path("lightning_logs").glob("*/checkpoints/last.ckpt"), key=os.path.getmtime, default=None)
        raise UserError(f"ckpt_path: {path} is not a file" + (f"; the newest checkpoint is {last}" if last else ""))
    if is_sharded(path):
        checkpoint = read_folder(path, map_location, optimizers)
    else:
        checkpoint = load_pickle(path, "ckpt_path", map_location, mmap=not optimizers)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"ckpt_path: {path} is not a checkpoint of a fit: it has no state_dict")
    for key, kinds in (KINDS | OWN_KINDS if {"task", "param_tokens"} <= checkpoint.keys() else KINDS).items():
        if not isinstance(checkpoint.get(key, kinds[0]()), kinds):
            found = type(checkpoint[key]).__name__
            raise UserError(f"ckpt_path: {path}: {key}: expected type {kinds[0].__name__}, got {found}")
    for key, state in checkpoint.get("callbacks", {}).items():
        if not isinstance(state, dict):
            raise UserError(f"ckpt_path: {path}: callbacks: {key}: expected type dict, got {type(state).__name__}")
    if problem := next(_loop_problems(checkpoint.get("loops", {}), "loops"), None):
        raise UserError(f"ckpt_path: {path}: {problem}")
    for key in ("state_dict", "current_model_state"):
        if not all(isinstance(tensor, torch.Tensor) for tensor in checkpoint.get(key, {}).values()):
            raise UserError(f"ckpt_path: {path} is not a checkpoint of a fit: not all of its {key} is tensors")
    return checkpoint


def _loop_problems(state: Mapping[str, Any], place: str) -> Iterator[str]:
    """Yield a line for each value in the progress of loops with a type other than Lightning's."""
    for key, value in state.items():
        inner = f"{place}.{key}"
        kind = int if key in _COUNTS else dict if key in _PROGRESS else object
        if not isinstance(value, kind):
            yield f"{inner}: expected type {kind.__name__}, got {type(value).__name__}"
        if isinstance(value, dict):
            yield from _loop_problems(value, inner)


@contextmanager
def state_errors(ckpt_path: str | os.PathLike[str], place: str) -> Iterator[None]:
    """Convert errors caused by invalid checkpoint values to one line; errors in a user's own code are reraised.

    Args:
        ckpt_path: Checkpoint with the values.
        place: Location of the values in the checkpoint.

    Raises:
        UserError: For an error in this project or a library, with the callback's key where a callback raised it.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or raised_by_user_code(error):
            raise
        frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        keys = [f"{place}: {one.state_key}" for one in frames if isinstance(one, lightning.pytorch.Callback)]
        problem = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"ckpt_path: {ckpt_path}: {[place, *keys][-1]}: unexpected values ({problem})") from None


def write_checkpoint(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint atomically and create its folder.

    Raises:
        ValueError: If the checkpoint cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
        raise UserError(f"output: cannot write {path} ({str(error).splitlines()[0]})") from None

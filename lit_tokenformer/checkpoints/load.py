"""Checkpoints of a fit, read without executing anything that is in them."""

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
"""Types of what Lightning puts into a checkpoint."""

OWN_KINDS: dict[str, tuple[type, ...]] = {
    **{"tokenizer": (str, type(None)), "extras": (dict,), "grown_depth": (int,), "rng_states": (list,)}
}
"""Types of what the tasks of this project add to it; others may use the same names."""

_COUNTS = {"ready", "started", "processed", "completed"}
_PROGRESS = {"total", "current", "batch_progress", "epoch_progress", "optimizer", "step", "zero_grad"}
"""Names in the progress of Lightning's loops, which it reads without a look at their types."""


def read_checkpoint(path: str | os.PathLike[str], map_location: str = "cpu", optimizers: bool = True) -> dict[str, Any]:
    """A checkpoint of a fit; nothing in the file is executed.

    Args:
        path: The file, or the folder that several processes have written.
        map_location: Device of the tensors; ``meta`` reads their shapes only.
        optimizers: Whether optimizer state is read into memory too.

    Raises:
        ValueError: If the file is not there, is not whole, holds pickled code or is no checkpoint of a fit.
    """
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
    """Values in the progress of loops whose type is another than Lightning's."""
    for key, value in state.items():
        inner = f"{place}.{key}"
        kind = int if key in _COUNTS else dict if key in _PROGRESS else object
        if not isinstance(value, kind):
            yield f"{inner}: expected type {kind.__name__}, got {type(value).__name__}"
        if isinstance(value, dict):
            yield from _loop_problems(value, inner)


@contextmanager
def state_errors(ckpt_path: str | os.PathLike[str], place: str) -> Iterator[None]:
    """Turn whatever values of other types raise into one line; errors of a user's own code stay as they are.

    Args:
        ckpt_path: The checkpoint that has the values.
        place: Where they are in it.

    Raises:
        UserError: For an error in this project or a library; where a callback raised it, with its key.
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
    """Write a checkpoint atomically; its folder is created.

    Raises:
        ValueError: If it cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
        raise UserError(f"output: cannot write {path} ({str(error).splitlines()[0]})") from None

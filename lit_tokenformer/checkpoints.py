"""Checkpoints of a fit, read without executing anything that is in them."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch

from lit_tokenformer import tasks
from lit_tokenformer.atomic_io import atomic_write
from lit_tokenformer.errors import UserError, raised_by_user_code, unknown_name
from lit_tokenformer.interop.files import load_pickle
from lit_tokenformer.safety import MADE, check_class_paths, trusted_optimizer
from lit_tokenformer.sharded_checkpoints import is_sharded, read_folder

KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("state_dict", "current_model_state", "hyper_parameters", "callbacks", "loops"), (dict,)),
    **dict.fromkeys(("optimizer_states", "lr_schedulers"), (list,)),
    **dict.fromkeys(("epoch", "global_step"), (int,)),
    "pytorch-lightning_version": (str,),
}
"""Types of what Lightning puts into a checkpoint."""

OWN_KINDS: dict[str, tuple[type, ...]] = {"tokenizer": (str, type(None)), "grown_depth": (int,), "rng_states": (list,)}
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
    for key, kinds in (KINDS | OWN_KINDS if checkpoint.get("task") in tasks.__all__ else KINDS).items():
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


def fresh_checkpoint(task: tasks.LitTask, state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A checkpoint with which a fit begins at epoch 0 with a fresh optimizer.

    Args:
        task: The task, in any device; what it keeps beside its weights is kept.
        state_dict: Its weights.
    """
    checkpoint: dict[str, Any] = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": state_dict,
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        task.CHECKPOINT_HYPER_PARAMS_KEY: dict(task.hparams),
    }
    task.on_save_checkpoint(checkpoint)
    del checkpoint["rng_states"]  # a fit shall draw by its own seed
    return checkpoint


def rebuild_task(path: str | os.PathLike[str], checkpoint: dict[str, Any], device: str = "cpu") -> tasks.LitTask:
    """The task that a checkpoint belongs to, with its weights.

    It is made here and not by Lightning, whose parser makes classes of texts that look like a config. It is first made
    without memory, and its sizes are compared with the tensors in the checkpoint: a file of a few bytes may name any.
    Its optimizer is made when it is built, and only then has to be of a trusted package.

    Args:
        path: The file or folder.
        checkpoint: What :func:`read_checkpoint` gave for it; only the task's name is taken from there.
        device: Where the weights are put; ``meta`` gives their shapes only.

    Raises:
        ValueError: If the task is not one of ours, or the weights do not fit it.
    """
    known = {name: getattr(tasks, name) for name in tasks.__all__ if name.startswith("Lit") and name != "LitTask"}
    name = checkpoint.get("task")
    if name not in known:
        raise unknown_name("ckpt_path: task", name, known)
    arguments = checkpoint.get(tasks.LitTask.CHECKPOINT_HYPER_PARAMS_KEY, {})
    made = {key: arguments[key] for key in MADE if arguments.get(key) is not None}
    given = {key: value for key, value in arguments.items() if key not in MADE}
    check_class_paths(given, path)
    given = {key: given[key] for key in inspect.signature(known[name]).parameters if key in given}
    if "optimizer" in made:
        given["optimizer"] = trusted_optimizer(made["optimizer"], path)
    place = "meta" if device == "meta" else "cpu"
    saved = read_checkpoint(path, place, optimizers=False)
    try:
        _check_depth(given, checkpoint)
        for where in dict.fromkeys(("meta", device)):
            with torch.device(where):
                task = known[name](**given)
            if _numbers(task.state_dict()) > _numbers(saved["state_dict"]):
                raise ValueError("its arguments are of a larger model than its tensors")
            task.on_load_checkpoint(saved)
        task.load_state_dict(saved["state_dict"])
    except UserError:
        raise
    except Exception as error:  # arguments of other types, say
        raise UserError(f"ckpt_path: {path} does not make a {name}: {' '.join(str(error).split())}") from None
    task.hparams.update(made)  # as plain as they came
    return task


def _check_depth(arguments: Any, checkpoint: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for more blocks than there are tensors; each would be made, even without memory."""
    depths = [checkpoint.get("grown_depth", 0)]
    depths += [fields["depth"] for fields in arguments.values() if isinstance(fields, dict) and "depth" in fields]
    for depth in depths:
        if isinstance(depth, int) and depth > len(checkpoint["state_dict"]):
            raise ValueError(f"depth: {depth} blocks, with {len(checkpoint['state_dict'])} tensors in all")


def _numbers(state: Mapping[str, Any]) -> int:
    return sum(tensor.numel() for tensor in state.values())

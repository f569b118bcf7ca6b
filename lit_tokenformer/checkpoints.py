"""Checkpoints of a fit, read without executing anything that is in them."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import lightning
import torch

from lit_tokenformer import tasks
from lit_tokenformer.atomic_io import atomic_write
from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.interop.files import load_pickle
from lit_tokenformer.safety import check_class_paths, trusted_optimizer
from lit_tokenformer.sharded_checkpoints import is_sharded, read_folder


def read_checkpoint(path: str | os.PathLike[str], map_location: str = "cpu") -> dict[str, Any]:
    """A checkpoint of a fit; nothing in the file is executed.

    Args:
        path: The file, or the folder that several processes have written.
        map_location: Device of the tensors; ``meta`` reads their shapes only.

    Raises:
        ValueError: If the file is not there, is not whole, holds pickled code or is no checkpoint of a fit.
    """
    checkpoint = read_folder(path, map_location) if is_sharded(path) else load_pickle(path, "ckpt_path", map_location)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"ckpt_path: {path} is not a checkpoint of a fit: it has no state_dict")
    state = checkpoint["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"ckpt_path: {path} is not a checkpoint of a fit: not all of its state_dict is tensors")
    return checkpoint


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

    It is made here and not by Lightning, whose parser makes classes of texts that look like a config.

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
    if not isinstance(arguments, dict):
        raise UserError(f"ckpt_path: {path}: expected the task's arguments by name, got a {type(arguments).__name__}")
    check_class_paths(arguments, path)
    wanted = inspect.signature(known[name]).parameters.keys() - {"optimizer", "lr_scheduler"}
    given = {key: value for key, value in arguments.items() if key in wanted}
    made = {key: arguments[key] for key in ("optimizer", "lr_scheduler") if isinstance(arguments.get(key), dict)}
    if "optimizer" in made:
        given["optimizer"] = trusted_optimizer(made["optimizer"], path)
    place = "meta" if device == "meta" else "cpu"
    if is_sharded(path):
        saved = read_folder(path, place, optimizers=False)
    else:
        saved = load_pickle(path, "ckpt_path", place, mmap=True)
    try:
        with torch.device(device):
            task = known[name](**given)
        task.on_load_checkpoint(saved)
        task.load_state_dict(saved["state_dict"])
    except (TypeError, AttributeError, KeyError, RuntimeError) as error:  # arguments of other types, say
        raise UserError(f"ckpt_path: {path} does not make a {name}: {' '.join(str(error).split())}") from None
    task.hparams.update(made)  # as plain as they came
    return task

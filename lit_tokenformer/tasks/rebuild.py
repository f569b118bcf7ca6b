"""Conversion between tasks and checkpoints."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning
import torch

from lit_tokenformer import tasks
from lit_tokenformer.checkpoints.load import ADAPTER, read_checkpoint, state_errors
from lit_tokenformer.checkpoints.trust import MADE, check_class_paths, trusted_optimizer
from lit_tokenformer.errors import UserError
from lit_tokenformer.registry import TASKS


def fresh_checkpoint(task: tasks.LitTask, state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Build a checkpoint that starts a fit at epoch 0 with a fresh optimizer.

    Args:
        task: The task, on any device; its state other than the weights is kept.
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
    del checkpoint["rng_states"]  # a new fit uses its own seed
    return checkpoint


def rebuild_task(path: str | os.PathLike[str], checkpoint: dict[str, Any], device: str = "cpu") -> tasks.LitTask:
    """Rebuild the task of a checkpoint, with its weights.

    The task is not built by Lightning, whose parser instantiates classes from config-like strings. It is first built on
    the meta device, and its sizes are compared with the tensors in the checkpoint, because a file of a few bytes may
    claim any size. The optimizer is built later, and must come from a trusted package only then.

    Args:
        path: The file or folder.
        checkpoint: Result of :func:`read_checkpoint` for it; only the task's name is read from it.
        device: Device of the weights; ``meta`` for shapes only.

    Raises:
        ValueError: If the task is not registered, or the weights do not fit it.
    """
    if ADAPTER in checkpoint:
        raise UserError(
            f"ckpt_path: {path} is the checkpoint of an adapter, expected that of its base "
            f"({checkpoint[ADAPTER].get('base')}) and --adapter FOLDER"
        )
    name: Any = checkpoint.get("task")
    kind: Any = TASKS[name]
    arguments = checkpoint.get(tasks.LitTask.CHECKPOINT_HYPER_PARAMS_KEY, {})
    made = {key: arguments[key] for key in MADE if arguments.get(key) is not None}
    given = {key: value for key, value in arguments.items() if key not in MADE}
    if given.get("_class_path") == f"{kind.__module__}.{kind.__qualname__}":
        del given["_class_path"]  # of a plugin, imported by the user
    check_class_paths(given, path)
    given = {key: given[key] for key in _parameters(kind) if key in given}
    if "optimizer" in made:
        given["optimizer"] = trusted_optimizer(made["optimizer"], path)
    place = "meta" if device == "meta" else "cpu"
    saved = read_checkpoint(path, place, optimizers=False)
    try:
        _check_depth(given, checkpoint)
        for where in dict.fromkeys(("meta", device)):
            with torch.device(where):
                task = kind(**given)
            if _numbers(task.state_dict()) > _numbers(saved["state_dict"]):
                raise ValueError("its arguments describe a larger model than its tensors")
            task.on_load_checkpoint(saved)
        task.load_state_dict(saved["state_dict"])
    except UserError:
        raise
    except Exception as error:  # such as arguments of wrong types
        raise UserError(f"ckpt_path: cannot rebuild a {name} from {path}: {' '.join(str(error).split())}") from None
    task.hparams.update(made)  # as plain values
    return task


def change_checkpoint(
    path: str | os.PathLike[str],
    checkpoint: dict[str, Any],
    task: tasks.LitTask,
    change: Callable[[tasks.LitTask, Sequence[torch.optim.Optimizer]], Any],
) -> tasks.LitTask:
    """Apply a change of size to weights, moving average and optimizer state of a checkpoint, in place.

    Args:
        path: The file or folder.
        checkpoint: Result of :func:`read_checkpoint` for it.
        task: Result of :func:`rebuild_task` for it; changed in place.
        change: Changes a task and its optimizers. With a moving average, it is called for that first, without
            optimizers.

    Returns:
        The changed task, with the trained weights.

    Raises:
        UserError: If the optimizer state does not fit the task.
    """
    averaged = checkpoint.get("current_model_state") is not None  # then state_dict is the moving average
    if averaged:
        change(task, [])
        checkpoint["state_dict"] = task.state_dict()
        task = rebuild_task(path, checkpoint)
        task.load_state_dict(checkpoint["current_model_state"])
    optimizers = [task.build_optimizer() for _ in checkpoint.get("optimizer_states", [])]
    with state_errors(path, "optimizer_states"):
        for optimizer, state in zip(optimizers, checkpoint.get("optimizer_states", []), strict=True):
            optimizer.load_state_dict(state)
        change(task, optimizers)
    checkpoint["current_model_state" if averaged else "state_dict"] = task.state_dict()
    if "optimizer_states" in checkpoint:  # else a weights-only checkpoint stays one
        checkpoint["optimizer_states"] = [optimizer.state_dict() for optimizer in optimizers]
    task.save_size(checkpoint)
    return task


def _parameters(kind: type) -> set[str]:
    """Return the argument names of a class, including those passed on to its bases."""
    found: set[str] = set()
    for base in kind.__mro__:
        if "__init__" in vars(base):
            own = inspect.signature(base).parameters.values()
            found |= {one.name for one in own}
            if all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in own):
                break
    return found


def _check_depth(arguments: Any, checkpoint: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for more blocks than tensors; each block is instantiated, even on the meta device."""
    for depth in (checkpoint.get("grown_depth", 0), *_depths(arguments)):
        if isinstance(depth, int) and depth > len(checkpoint["state_dict"]):
            raise ValueError(f"depth: {depth} blocks, but only {len(checkpoint['state_dict'])} tensors")


def _depths(arguments: Any) -> Iterator[Any]:
    """Yield the numbers of modules: blocks, and experts of a block."""
    for name, value in arguments.items() if isinstance(arguments, dict) else ():
        yield from (value,) if name in ("depth", "experts", "shared_experts") else _depths(value)


def _numbers(state: Mapping[str, Any]) -> int:
    return sum(tensor.numel() for tensor in state.values())

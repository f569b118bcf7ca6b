"""Commands that are no method of a trainer: growing a checkpoint between two runs."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from lit_tokenformer import tasks
from lit_tokenformer.errors import unknown_name
from lit_tokenformer.growth import grow, grow_optimizer
from lit_tokenformer.models import Tokens, param_tokens


def read_checkpoint(path: str | os.PathLike[str], map_location: str = "cpu") -> dict[str, Any]:
    """A checkpoint of a fit; nothing in the file is executed.

    Args:
        path: The file.
        map_location: Device of the tensors; ``meta`` reads their shapes only.

    Raises:
        ValueError: If the file is not there, is not whole, holds pickled code or is no checkpoint of a fit.
    """
    if not Path(path).is_file():
        raise ValueError(f"ckpt_path: {path} is not a file")
    try:
        mapped = map_location == "meta" and zipfile.is_zipfile(path)
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), "")
        raise ValueError(f"ckpt_path: {path} holds pickled code or is damaged, and was not loaded {reason}") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"ckpt_path: {path} is truncated or damaged ({_first_line(error)})") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"ckpt_path: {path} is not a checkpoint of a fit: it has no state_dict")
    return checkpoint


def grow_checkpoint(
    ckpt_path: str,
    tokens: Tokens,
    output: str | None = None,
    method: str = "split",
    noise: float = 1.0,
    new_state: str = "mean",
    seed: int = 0,
) -> Path:
    """Makes a checkpoint larger between two runs, optimizer state and moving averages included.

    Args:
        ckpt_path: A checkpoint of a fit.
        tokens: Totals of parameter tokens: a number n (qkv n, proj n, ffn 4n) or ``{qkv: n, proj: n, ffn: m}``.
        output: Where the larger one is written; by default beside the first, with ``-grown`` in its name.
        method: How new rows are made: split, zero_keys or random.
        noise: Size of the differences between the copies of a split, in standard deviations of values at birth.
        new_state: Second moments of rows that are not copies: mean or zeros; reset drops the optimizer's state.
        seed: Seed of the new rows.

    Returns:
        The path of what was written.

    Raises:
        ValueError: If the checkpoint cannot be read, the tokens do not fit it, or the output exists already.
    """
    target = Path(output) if output else Path(ckpt_path).with_name(f"{Path(ckpt_path).stem}-grown.ckpt")
    if target.exists():
        raise ValueError(f"output: {target} exists already")
    checkpoint = read_checkpoint(ckpt_path)
    task = _rebuild(ckpt_path, checkpoint)
    before = param_tokens(task)
    settings: dict[str, Any] = {"method": method, "noise": noise, "seed": seed}

    averaged = checkpoint.get("current_model_state") is not None  # then state_dict holds the moving average
    if averaged:
        grow(task, tokens, **settings)
        checkpoint["state_dict"] = task.state_dict()
        task = _rebuild(ckpt_path, checkpoint)
        task.load_state_dict(checkpoint["current_model_state"])
    optimizers = [task.build_optimizer() for _ in checkpoint.get("optimizer_states", [])]
    for optimizer, state in zip(optimizers, checkpoint.get("optimizer_states", []), strict=True):
        optimizer.load_state_dict(state)
    grown = grow(task, tokens, **settings)
    for optimizer in optimizers:
        grow_optimizer(optimizer, grown, new_state)
    checkpoint["current_model_state" if averaged else "state_dict"] = task.state_dict()
    checkpoint["optimizer_states"] = [optimizer.state_dict() for optimizer in optimizers]
    checkpoint["param_tokens"] = param_tokens(task)
    event = {"step": checkpoint["global_step"], "epoch": checkpoint["epoch"], "before": before, **settings}
    for key, state in checkpoint.get("callbacks", {}).items():
        if key.startswith("ParameterGrowthCallback"):
            state["events"].append({**event, "after": param_tokens(task)})
        elif key.startswith("TrainingMonitor"):
            state["growth"] = {"before": before, "after": param_tokens(task), "method": method}

    unfinished = target.with_name(target.name + ".part")
    torch.save(checkpoint, unfinished)
    os.replace(unfinished, target)
    sizes = ", ".join(f"{kind} {before[kind]} -> {now}" for kind, now in param_tokens(task).items())
    print(f"{target}: {sizes} tokens")
    return target


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _rebuild(path: str, checkpoint: dict[str, Any]) -> tasks.LitTask:
    """The task that a checkpoint belongs to, with its weights."""
    known = {name: getattr(tasks, name) for name in tasks.__all__ if name.startswith("Lit")}
    name = checkpoint.get("task")
    if name not in known:
        raise unknown_name("ckpt_path: task", name, known)
    return known[name].load_from_checkpoint(path, map_location="cpu", weights_only=True)

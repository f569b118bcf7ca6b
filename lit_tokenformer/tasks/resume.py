"""Resume of a fit: random states, and differences from the settings of the checkpoint's fit."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lit_tokenformer.errors import UserError
from lit_tokenformer.models import Tokenformer

NEW_EXPERIMENT = "--init_from starts a new experiment from a checkpoint's weights"


def fit_settings(trainer: Any) -> dict[str, dict[str, Any]]:
    """Collect the settings of a fit that a resume ignores, or that change the meaning of its progress.

    Args:
        trainer: The trainer, with configured optimizers and schedulers, before any state is restored.

    Returns:
        Plain values by setting name, in the groups ``fixed`` (restored from the checkpoint) and ``data``.
    """
    fixed: dict[str, Any] = {}
    for optimizer in trainer.optimizers[:1]:
        fixed["model.optimizer"] = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        fixed |= {f"model.optimizer.{name}": value for name, value in optimizer.defaults.items()}
    for config in trainer.lr_scheduler_configs[:1]:
        if not isinstance(config.scheduler, LambdaLR):  # functions of the step are not restored
            named = inspect.signature(type(config.scheduler)).parameters
            state = config.scheduler.state_dict()
            fixed |= {f"model.lr_scheduler.{name}": state[name] for name in state if name in named}
    for model in trainer.lightning_module.modules():
        if isinstance(model, Tokenformer):  # tasks with shared blocks have equal sizes
            sizes = {**dict(model.config.tokens.items()), "depth": model.config.depth}
            fixed |= {f"model.overrides.{name}": value for name, value in sizes.items()}
    data = getattr(trainer.datamodule, "data_settings", {})
    groups = {"fixed": fixed, "data": {f"data.{name}": value for name, value in data.items()}}
    return {name: {key: value for key, value in group.items() if _is_plain(value)} for name, group in groups.items()}


def report_changes(trainer: Any, present: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Warn about settings that differ from those of the resumed fit, and about a changed learning-rate schedule.

    Args:
        trainer: The trainer, with all state restored.
        present: The settings of this fit, from :func:`fit_settings`.
        saved: The settings in the checkpoint; empty if it has none.

    Returns:
        The settings in effect from now on.

    Raises:
        UserError: If the optimizer class changed, because its state is incompatible.
    """
    given = {name: saved[name] for name in present if isinstance(saved.get(name), Mapping)}
    fixed, then = present["fixed"], dict(given.get("fixed", {}))
    for optimizer in trainer.optimizers[:1]:
        now = fixed["model.optimizer"]
        before = then.get("model.optimizer", now)
        restored = optimizer.param_groups[0].keys()  # the checkpoint's settings only
        added = {"differentiable"}  # to the defaults, by torch when it loads state
        if before != now or optimizer.defaults.keys() - restored - added:
            state = f"state of {before!r}" if before != now else "state of another optimizer"
            raise UserError(
                f"model.optimizer: the checkpoint has the {state}, expected that of {now}; {NEW_EXPERIMENT}"
            )
    if ineffective := [*_differences(fixed, then)]:
        rank_zero_warn(
            f"ckpt_path: settings ignored on resume in favor of the checkpoint's: {', '.join(ineffective)}"
            f"; {NEW_EXPERIMENT}"
        )
    if other_data := [*_differences(present["data"], given.get("data", {}))]:
        rank_zero_warn(
            f"ckpt_path: resuming with different data settings: {', '.join(other_data)}; optimizer, schedule, epoch "
            f"and best scores are those of the checkpoint's data; {NEW_EXPERIMENT}"
        )
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if isinstance(scheduler, LambdaLR):
            step, old = scheduler.last_epoch, scheduler.get_last_lr()[0]
            new = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step)
            if not math.isclose(old, new, rel_tol=1e-6, abs_tol=1e-12):
                rank_zero_warn(
                    f"ckpt_path: the learning-rate schedule changed: at step {step} the rate was {old:.3g} in the "
                    f"checkpoint's fit and is {new:.3g} now (trainer.max_epochs, trainer.max_steps, batch size or "
                    "model.schedule)"
                )
    return {"fixed": {**fixed, **then}, "data": dict(present["data"])}


def report_nothing_left(trainer: Any) -> None:
    """Warn if a resumed fit has already ended, and name the setting that continues it."""
    limits = {
        "max_steps": (trainer.max_steps, trainer.global_step),
        "max_epochs": (trainer.max_epochs, trainer.current_epoch),
    }
    for name, (limit, reached) in limits.items():
        if limit is not None and 0 <= limit <= reached:
            rank_zero_warn(
                f"ckpt_path: nothing left to train: the checkpoint is at the end of the fit (trainer.{name}={limit}); "
                f"raise trainer.{name} to continue it; {NEW_EXPERIMENT}"
            )
            return


def _differences(present: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
    for name, value in present.items():
        if name in saved and saved[name] != value:
            yield f"{name} {value!r} (checkpoint: {saved[name]!r})"


def _is_plain(value: Any) -> bool:
    """Return whether a value is a scalar, or a list or tuple of scalars, as allowed in any checkpoint."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    return all(part is None or isinstance(part, (bool, int, float, str)) for part in parts)


def rng_state() -> dict[str, Any]:
    """Return the state of all random generators used in training, in types that load with ``weights_only=True``."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [numpy_state[1].tolist(), *numpy_state[2:]],
    }


def set_rng_state(state: dict[str, Any], ckpt_path: str) -> None:
    """Restore the result of :func:`rng_state`.

    Args:
        state: The state.
        ckpt_path: Its checkpoint, for errors.

    Raises:
        UserError: If a value has another type.
    """
    try:
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        keys, *rest = state["numpy"]
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
    except Exception as error:  # wrong types raise no common class
        raise UserError(f"ckpt_path: {ckpt_path}: rng_states: unexpected values ({error})") from None


def redraw_iterators(loop: Any) -> None:
    """Draw the seeds of plain loaders again in the first epoch after a resume, from the restored random state.

    Lightning creates the iterators of that epoch before it restores the state. Loaders with a state of their own, which
    draw nothing from the global generators, keep theirs.

    Args:
        loop: The fit loop, at the start of an epoch.
    """
    loaders = loop._combined_loader.flattened
    plain = all(isinstance(one, DataLoader) and not hasattr(one, "load_state_dict") for one in loaders)
    if plain and getattr(loop, "is_resuming", False):
        iter(loop._data_fetcher)

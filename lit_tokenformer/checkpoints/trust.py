"""Allowlist of classes in untrusted checkpoints: this project's, and optimizers and schedules of torch and timm.

The hyperparameters of a checkpoint contain class paths. Lightning imports and calls them when it rebuilds a task.
:func:`~lit_tokenformer.tasks.rebuild.rebuild_task` builds the task from plain values instead.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from lit_tokenformer.errors import UserError

TRUSTED = ("lit_tokenformer", "callbacks", "torch.optim", "timm.optim")
"""Packages whose classes are allowed."""

ALSO_TRUSTED = ("lightning.pytorch.cli.ReduceLROnPlateau", "lightning.pytorch.cli.instantiate_module")
"""Names that Lightning itself writes to checkpoints; the rest of their package is not trusted."""

MADE = ("optimizer", "lr_scheduler")
"""Arguments of a task that are classes to instantiate, checked at instantiation."""

_MADE_BY_NAME = (*MADE, "class_path", "_class_path")
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def check_class_paths(arguments: Mapping[str, Any], path: object) -> None:
    """Reject arguments of a task with class paths outside the trusted packages.

    Args:
        arguments: Arguments stored in a checkpoint.
        path: Checkpoint, for the error.

    Raises:
        ValueError: If an argument names an untrusted class.
    """
    for name in _named(arguments):
        if not is_trusted_class(name):
            raise UserError(
                f"ckpt_path: {path} names {name!r}, which was not imported: expected classes of {', '.join(TRUSTED)}"
            )


def trusted_optimizer(spec: Any, path: object) -> Callable[[Any], torch.optim.Optimizer]:
    """Build a factory for the optimizer in a checkpoint. Settings are passed unchanged, without instantiating classes.

    Args:
        spec: ``class_path`` and ``init_args``.
        path: Checkpoint, for the error.

    Returns:
        Function from parameter groups to the optimizer. It raises a ``ValueError`` if the class is not an optimizer of
        a trusted package or rejects the settings.
    """

    def make(params: Any) -> torch.optim.Optimizer:
        check_class_paths({"optimizer": spec}, path)
        given = spec if isinstance(spec, Mapping) else {}
        name, settings = given.get("class_path"), given.get("init_args", {})
        if not isinstance(name, str) or not isinstance(settings, Mapping):
            raise UserError(f"ckpt_path: {path} names {name!r}, which was not imported: expected an optimizer")
        module, _, kind = name.rpartition(".")
        found = getattr(importlib.import_module(module), kind, None)
        if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
            raise UserError(f"ckpt_path: {path} names {name!r}: expected an optimizer")
        try:
            return found(params, **settings)
        except Exception as error:  # for example, settings of other types
            raise UserError(f"ckpt_path: {path}: invalid settings of {name} ({' '.join(str(error).split())})") from None

    return make


def is_trusted_class(name: str) -> bool:
    """Return whether a dotted name is a class defined in a trusted package.

    Args:
        name: Dotted name.

    Example:
        >>> is_trusted_class("torch.optim.AdamW"), is_trusted_class("subprocess.Popen")
        (True, False)
        >>> is_trusted_class("lit_tokenformer.cli.main.os.system")
        False
    """
    if name in ALSO_TRUSTED:
        return True
    module, _, kind = name.rpartition(".")
    if not _in_trusted(module):
        return False
    try:
        found = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError):
        return False
    return isinstance(found, type) and _in_trusted(found.__module__)


def _in_trusted(module: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in TRUSTED)


def _named(value: Any, key: object = None) -> Iterator[str]:
    """Yield every string in nested arguments that may name a class or a function."""
    if isinstance(value, Mapping):
        for inner, part in value.items():
            yield from _named(inner)
            yield from _named(part, inner)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for part in value:
            yield from _named(part)
    elif isinstance(value, str) and (key in _MADE_BY_NAME or _DOTTED.fullmatch(value)):
        yield value

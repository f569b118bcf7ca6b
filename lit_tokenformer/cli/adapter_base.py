"""Base of an adapter on the command line: ``fit --ckpt_path base.ckpt`` with an ``AdapterCallback``."""

from __future__ import annotations

from pydoc import locate
from typing import Any

from callbacks import AdapterCallback
from lit_tokenformer.checkpoints.checkpoint_io import read_shapes
from lit_tokenformer.checkpoints.load import ADAPTER
from lit_tokenformer.errors import UserError


def use_as_base(config: Any, fits: bool) -> None:
    """Make ``ckpt_path`` the base of an adapter, unless it is a checkpoint of the adapter, which knows its base.

    Args:
        config: Settings of the command; changed in place.
        fits: Whether the command is ``fit``; the others evaluate a checkpoint of the adapter, or a base alone.

    Raises:
        UserError: If an adapter has no base.
    """
    settings, path = _settings(config), config.get("ckpt_path")
    if settings is None or path in ("last", "hpc"):
        return
    saved = read_shapes(path).get(ADAPTER) if path is not None else None
    if saved is not None:
        settings["base"] = settings.get("base") or saved.get("base")
    elif not fits:
        settings["base"] = None
    elif path is not None:
        settings["base"], config["ckpt_path"] = path, None
    elif not (settings.get("base") or config.get("init_from") or config["trainer"]["fast_dev_run"]):
        raise UserError("base: expected the checkpoint of a trained model, such as --ckpt_path base.ckpt")


def base_of(config: Any) -> str | None:
    """Return the base of an adapter, whose tokenizer the data take; ``None`` without an adapter."""
    settings = _settings(config)
    return None if settings is None else settings.get("base")


def _settings(config: Any) -> Any:
    given = config["trainer"].get("callbacks") or []
    for callback in given if isinstance(given, list) else [given]:
        kind = locate(str(callback.get("class_path")))
        if isinstance(kind, type) and issubclass(kind, AdapterCallback):
            return callback["init_args"]
    return None

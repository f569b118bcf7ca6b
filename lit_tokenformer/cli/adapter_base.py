"""Base of an adapter on the command line: ``fit --ckpt_path base.ckpt`` with an ``AdapterCallback``."""

from __future__ import annotations

from pydoc import locate
from typing import Any

from callbacks import AdapterCallback
from lit_tokenformer.checkpoints.checkpoint_io import read_shapes
from lit_tokenformer.checkpoints.load import ADAPTER
from lit_tokenformer.errors import UserError


def use_as_base(config: Any) -> None:
    """Make ``ckpt_path`` the base of an adapter, unless it is a checkpoint of the adapter, which the fit resumes.

    Args:
        config: Settings of ``fit``; changed in place.

    Raises:
        UserError: If an adapter has no base.
    """
    settings, path = _settings(config), config.get("ckpt_path")
    if settings is None or path in ("last", "hpc"):
        return
    if path is not None and ADAPTER not in read_shapes(path):
        settings["base"], config["ckpt_path"] = path, None
    elif path is None and not (settings.get("base") or config.get("init_from") or config["trainer"]["fast_dev_run"]):
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

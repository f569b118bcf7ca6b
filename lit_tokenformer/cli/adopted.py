"""Architecture and tokenizer of a checkpoint in place of ``model.preset: checkpoint``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule

from lit_tokenformer.cli.preflight import use_saved_tokenizer
from lit_tokenformer.data import TextDataModule
from lit_tokenformer.errors import UserError
from lit_tokenformer.tasks import LitTask

PRESET = "checkpoint"
"""Value of ``model.preset``: the architecture of ``init_from`` or ``ckpt_path``."""

_OF_THE_MODEL = ("vocab_size", "context_length")
"""Arguments of a task that belong to the weights; the sizes of images and classes are those of the data."""

_ARGUMENTS = ("image_tokens", "image_classes")
"""Arguments of a task that belong to the weights, and are not fields of the architecture."""


def adopts(settings: Mapping[str, Any] | Namespace) -> bool:
    """Return whether the settings of a command refer to the architecture of a checkpoint."""
    return settings.get("model.init_args.preset") == PRESET


def adopt_architecture(settings: Namespace, checkpoint: Mapping[str, Any], path: object) -> None:
    """Replace ``preset: checkpoint`` by preset and overrides of a checkpoint; overrides in the settings have priority.

    Args:
        settings: Settings of a command, changed in place.
        checkpoint: The checkpoint; only its hyper-parameters are read.
        path: Its path; ``None`` if the command has none.

    Raises:
        UserError: Without a checkpoint, or if it has no architecture.
    """
    if not path:
        raise UserError(f"model.preset: {PRESET!r} needs init_from or ckpt_path (expected the path of a checkpoint)")
    saved = checkpoint.get(LitTask.CHECKPOINT_HYPER_PARAMS_KEY)
    try:
        LitTask.architectures(saved)  # type: ignore[arg-type]  # validates the values
        fields = {name: saved[name] for name in _OF_THE_MODEL if name in saved} | saved["overrides"]  # type: ignore
    except (ValueError, TypeError, AttributeError, KeyError):
        raise UserError(
            f"model.preset: no architecture in {path} (got a checkpoint of {checkpoint.get('task')!r}, expected one of "
            "a single task)"
        ) from None
    model = settings["model.init_args"]
    model["preset"] = saved["preset"]  # type: ignore[index]
    for name in _ARGUMENTS:
        if saved.get(name):  # type: ignore[union-attr]
            model[name] = saved[name]  # type: ignore[index]
    for name, value in fields.items():
        if model["overrides"].get(name) is None:
            model["overrides"][name] = value


def adopt_tokenizer(datamodule: LightningDataModule, checkpoint: Mapping[str, Any], asked: bool) -> None:
    """Give text data the tokenizer of a checkpoint whose architecture is adopted; see :func:`use_saved_tokenizer`.

    Raises:
        UserError: If neither the checkpoint nor the settings have one.
    """
    unset = isinstance(datamodule, TextDataModule) and datamodule.corpus.tokenizer_name == "bytes" and not asked
    if unset and not isinstance(checkpoint.get("tokenizer"), str):
        raise UserError("data.tokenizer: expected the tokenizer of the model, which the checkpoint does not contain")
    use_saved_tokenizer(datamodule, checkpoint, asked)

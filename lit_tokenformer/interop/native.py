"""Weights of any model of this project as safetensors, with the architecture in a ``config.json``.

The architecture is the initial one; on loading, the layers adopt the sizes of the tensors, as with a checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.interop.weight_format import (
    CONFIG_FILE,
    WEIGHTS,
    ReadModel,
    WeightFormat,
    cast,
    check_export,
    check_no_groups,
    find_weights,
    read_json,
    write_json,
)
from lit_tokenformer.models import Tokenformer, TokenformerConfig
from lit_tokenformer.models.hub import FORMAT, describe, with_tie, without_tie
from lit_tokenformer.registry import WEIGHT_FORMATS
from lit_tokenformer.tensor_files import reading_errors, write_tensors

NATIVE = FORMAT
"""Name of the format."""


def read_native(source: str | os.PathLike[str], config_json: str | os.PathLike[str] | None = None) -> ReadModel:
    """Load the architecture and the weights of an export.

    Args:
        source: Folder, or ``.safetensors`` file.
        config_json: Config of the architecture. Default: the ``config.json`` next to the weights.

    Raises:
        UserError: If a file cannot be read, if the config is invalid or has unknown fields, or if a tensor is missing,
            unexpected or misshapen.
    """
    weights = find_weights(source, sharded=False)
    path, given = _settings(weights, config_json)
    fields = given.get("config")
    if given.get("format") != NATIVE or not isinstance(fields, dict):
        raise UserError(f"config_json: {path}: expected format {NATIVE!r} with a config, got {given.get('format')!r}")
    with reading_errors("source", weights):
        state = safetensors.torch.load_file(weights)
    known = [field.name for field in dataclasses.fields(TokenformerConfig)]
    for name in fields:
        if name not in known:
            raise unknown_name(f"config_json: {path} (of version {given.get('version')}): config", name, known)
    try:
        config = TokenformerConfig(**fields)
        state = with_tie(config, state)
        for name, units in {"depth": "blocks", "experts": "experts", "shared_experts": "experts"}.items():
            if getattr(config, name) > len(state):
                raise UserError(f"{name}: {getattr(config, name)} {units}, but only {len(state)} tensors")
        with torch.device("meta"):
            Tokenformer(config).load_state_dict({name: tensor.to("meta") for name, tensor in state.items()})
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"source: {weights} does not fit {path}: {' '.join(str(error).split())}") from None
    return ReadModel(config, state)


def load_native(source: str | os.PathLike[str]) -> Tokenformer:
    """Load the model of an export, in torch's default dtype and evaluation mode.

    Args:
        source: Folder, or ``.safetensors`` file next to its ``config.json``.

    Raises:
        UserError: As :func:`read_native`.
    """
    found = read_native(source)
    model = Tokenformer(found.config)
    model.load_state_dict(found.state)
    return model.eval()


def write_native(
    folder: str | os.PathLike[str],
    config: TokenformerConfig,
    state: Mapping[str, Tensor],
    dtype: str | None = None,
    format: str = "safetensors",
) -> None:
    """Write the weights and ``config.json`` of any model.

    Args:
        folder: Empty output folder.
        config: Initial architecture.
        state: State dict of a :class:`~lit_tokenformer.models.Tokenformer` of this config, grown or not.
        dtype: Precision of the parameters: float32, float16 or bfloat16; ``None`` keeps that of ``state``. Buffers keep
            theirs.
        format: ``safetensors``.

    Raises:
        UserError: For another ``format``, an unknown ``dtype``, or values that overflow it. Nothing is written then.
    """
    check_export(format, dtype)
    check_no_groups(state)
    if format != "safetensors":
        raise UserError(f"format: only 'safetensors' for project {NATIVE!r} (got {format!r})")
    with torch.device("meta"):
        model = Tokenformer(config)
        model.load_state_dict({name: tensor.to("meta") for name, tensor in state.items()})
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors = {
        name: cast(tensor, name, dtype) if name in parameters else tensor
        for name, tensor in without_tie(config, state).items()
    }
    write_tensors(tensors, Path(folder) / WEIGHTS["safetensors"])
    write_json(Path(folder) / CONFIG_FILE, {"format": NATIVE, **describe(config, model.size)})


def _settings(weights: Path, config_json: str | os.PathLike[str] | None) -> tuple[Path, dict[str, Any]]:
    path = Path(config_json) if config_json else weights.with_name(CONFIG_FILE)
    return path, read_json(path)


def read_image_data(weights: Path, config_json: str | None = None) -> dict[str, Any] | None:
    """Load the class names and the evaluation transform of the training data; ``None`` if they are unknown."""
    found = _settings(weights, config_json)[1].get("image_data")
    return found if isinstance(found, dict) else None


def write_image_data(folder: Path, image_data: Mapping[str, Any]) -> None:
    """Add the class names and the evaluation transform of the training data to the ``config.json`` of an export."""
    path = folder / CONFIG_FILE
    write_json(path, {**read_json(path), "image_data": dict(image_data)})


WEIGHT_FORMATS.register(NATIVE)(
    WeightFormat(
        find_weights,
        read_native,
        write_native,
        recognizes=lambda config: config.get("format") == NATIVE,
        write_image_data=write_image_data,
        read_image_data=read_image_data,
        adopts_sizes=True,
    )
)

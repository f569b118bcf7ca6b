"""Files of tensors, whoever wrote them; nothing in them is executed."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lit_tokenformer.errors import UserError

NESTED = ("state_dict", "module", "model")
"""Keys under which trainers put the weights in a pickle."""


def load_pickle(path: str | os.PathLike[str], setting: str, map_location: str = "cpu", mmap: bool = False) -> Any:
    """What ``torch.save`` wrote; tensors and plain types only.

    Args:
        path: The file.
        setting: The setting that names the file, for the errors.
        map_location: Device of the tensors; ``meta`` reads their shapes only.
        mmap: Leave tensors on the disk until they are needed, where the file allows it.

    Raises:
        ValueError: If the file is not there, is not whole or holds pickled code.
    """
    if not Path(path).is_file():
        raise UserError(f"{setting}: {path} is not a file")
    try:
        mapped = (mmap or map_location == "meta") and zipfile.is_zipfile(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # the error says more
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), "")
        raise UserError(f"{setting}: {path} holds pickled code or is damaged, and was not loaded {reason}") from None
    except Exception as error:  # what a reader of pickles raises on a file that is none has no common class
        raise UserError(f"{setting}: {path} is truncated or damaged ({_first_line(error)})") from None


def read_tensors(path: str | os.PathLike[str], setting: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a pickled state dict, in the precision of the file.

    Args:
        path: The file; a pickle may hold the state dict under one of the keys in ``NESTED``.
        setting: The setting that names the file, for the errors.

    Raises:
        ValueError: As :func:`load_pickle`, or if something in it is no tensor of floating-point numbers.
    """
    if Path(path).suffix == ".safetensors":
        found: Any = _load_safetensors(path, setting)
    else:
        found = load_pickle(path, setting, mmap=True)
        for key in NESTED:
            if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
                found = found[key]
    if not isinstance(found, Mapping):
        raise UserError(f"{setting}: {path} holds a {type(found).__name__}, expected a state dict")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"{setting}: {path}: {name} is a {kind}, expected a tensor of floating-point numbers")
    return {str(name): _alone(tensor) for name, tensor in found.items()}


def write_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Writes ``.safetensors``, or a pickled state dict under any other name.

    Raises:
        ValueError: If it cannot be written.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        if Path(path).suffix == ".safetensors":
            safetensors.torch.save_file(whole, path, metadata={"format": "pt"})
        else:
            with open(path, "wb") as file:
                torch.save(whole, file)
    except (SafetensorError, RuntimeError, OSError) as error:  # the first two, as libraries report a full disk
        raise UserError(f"output: cannot write {path} ({_first_line(error)})") from None


def _load_safetensors(path: str | os.PathLike[str], setting: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise UserError(f"{setting}: {path} is not a file")
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{setting}: {path} is truncated or damaged ({_first_line(error)})") from None


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own: DeepSpeed's ``zero_to_fp32`` saves views into one vector of all weights."""
    tensor = tensor.detach()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

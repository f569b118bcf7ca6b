"""Weight formats: where they are found, what recognizes them, and the precision of exported tensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.models import TokenformerConfig
from lit_tokenformer.models.experts import saved_experts
from lit_tokenformer.models.token_groups import is_of_group
from lit_tokenformer.registry import WEIGHT_FORMATS, Registry

WEIGHTS = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
"""Name of the weights file in a folder, by format."""

CONFIG_FILE = "config.json"

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
_VOCABULARY = ["tokenizer*", "vocab.json", "merges.txt", "vocab.txt", "*.model"]
_SMALL_FILES = [CONFIG_FILE, "*.index.json", "special_tokens_map.json", "added_tokens.json", *_VOCABULARY]


class ReadModel(NamedTuple):
    """Model of another project.

    Args:
        config: Architecture.
        state: State dict that a :class:`~lit_tokenformer.models.Tokenformer` of this config loads strictly, in the
            precision of the files.
        notes: Remarks on what has been left out or newly initialized.
    """

    config: TokenformerConfig
    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()


class WeightFormat(NamedTuple):
    """Weight format of another project.

    Args:
        find: Weights file of a file or folder, ``(source) -> Path``.
        read: ``(weights, config_json) -> ReadModel``, or a pair of config and state dict; ``config_json`` may be
            ``None``.
        write: ``(folder, config, state dict, dtype, file format)``; with ``architectures``, also ``architecture``.
        recognizes: Whether a ``config.json`` is of this format.
        write_tokenizer: ``(folder, text of a tokenizer.json)``.
        architectures: Registry of the architectures of the format, if it has several.
        write_card: ``(folder, model, checkpoint)``: model card; ``None`` without one.
        write_image_data: ``(folder, image_data)``: class names and evaluation transform; ``None`` leaves them out.
        read_image_data: ``(weights, config_json) -> image_data``, or ``None`` if it is unknown.
        adopts_sizes: Whether ``write`` takes the initial architecture, because layers adopt the sizes of the weights;
            otherwise it takes the architecture at the current size.
    """

    find: Callable[[str], Path]
    read: Callable[[Path, str | None], Any]
    write: Callable[..., Any]
    recognizes: Callable[[Mapping[str, Any]], bool] = lambda config: False
    write_tokenizer: Callable[[Path, str], Any] = lambda folder, text: (folder / "tokenizer.json").write_text(
        text, encoding="utf-8"
    )
    architectures: Registry[Any] | None = None
    write_card: Callable[[Path, Any, Mapping[str, Any]], Any] | None = None
    write_image_data: Callable[[Path, Mapping[str, Any]], Any] | None = None
    read_image_data: Callable[[Path, str | None], dict[str, Any] | None] = lambda weights, config_json: None
    adopts_sizes: bool = False


def local_source(source: str) -> str:
    """Return the path of a file or folder, or download a Hugging Face repository to the cache.

    Args:
        source: Path, or name of a repository such as ``openai-community/gpt2``, with an optional ``@revision``.

    Raises:
        UserError: If it is neither, or cannot be downloaded.
    """
    if Path(source).exists() or not _HUB_NAME.fullmatch(source):
        return source
    name, _, revision = source.partition("@")
    try:
        for pattern in ("model*.safetensors", "pytorch_model*.bin"):
            folder = snapshot_download(name, revision=revision or None, allow_patterns=[*_SMALL_FILES, pattern])
            if any(Path(folder).glob(pattern)):
                break
        return folder
    except Exception as error:  # of the library, of the network, of the file system
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"source: {source} is neither a file nor a folder, and was not loaded from Hugging Face ({reason})"
        ) from None


def recognize(source: str, config_json: str | None) -> str:
    """Return the name of the weight format of a source; ``tokenformer`` if no ``config.json`` says otherwise."""
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    path = Path(config_json) if config_json else folder / CONFIG_FILE
    config = read_json(path) if path.is_file() else {}
    return next((name for name in WEIGHT_FORMATS if WEIGHT_FORMATS[name].recognizes(config)), "tokenformer")


def find_weights(source: str | os.PathLike[str], sharded: bool = True) -> Path:
    """Return the weights file of ``source``, a file or a folder; the index of sharded weights.

    Raises:
        UserError: If there is none.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"source: {path} is neither a file nor a folder")
    names = [one for name in WEIGHTS.values() for one in ((name, f"{name}.index.json") if sharded else (name,))]
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        raise UserError(f"source: no {' or '.join(names)} in {path}")
    return found[0]


def read_json(path: Path) -> dict[str, Any]:
    """Load a ``config.json``.

    Raises:
        UserError: If it cannot be read or is not an object.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"config_json: {path} is not a file")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config_json: cannot read {path} ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"config_json: {path} is not JSON ({error})") from None
    if not isinstance(given, dict):
        raise UserError(f"config_json: {path} is not an object (got {type(given).__name__}, expected keys and values)")
    return given


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file with indentation."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_export(format: str, dtype: str | None) -> None:
    """Raise a ``UserError`` for an unknown file format or precision of an export."""
    if format not in WEIGHTS:
        raise unknown_name("format", format, WEIGHTS)
    if dtype is not None and dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)


def check_no_groups(state: Mapping[str, Tensor]) -> None:
    """Raise a ``UserError`` for layers with several groups of parameter tokens, which no other project has."""
    if found := next((name for name in state if is_of_group(name)), None):
        raise UserError(
            f"state: {found} is of a group of parameter tokens, and the format has one group per layer; remove "
            "adapters with delete_adapter"
        )


def check_plain(state: Mapping[str, Tensor]) -> None:
    """Raise a ``UserError`` for layers that no other project has: groups of parameter tokens, and experts."""
    check_no_groups(state)
    if (experts := saved_experts(state)) > 1:
        raise UserError(f"state: the format has no experts (got {experts}); format 'lit_tokenformer' has")


def cast(tensor: Tensor, name: str, dtype: str | None) -> Tensor:
    """Convert a tensor to the dtype of an export; ``None`` keeps its own.

    Raises:
        UserError: If values overflow.
    """
    if dtype is None:
        return tensor
    converted = tensor.to(DTYPES[dtype])
    if converted.isinf().any():
        raise UserError(f"dtype: {name} overflows {dtype} (got values up to {tensor.abs().max():.3g})")
    return converted

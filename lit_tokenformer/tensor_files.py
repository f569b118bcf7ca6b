"""Safe loading of tensor files from untrusted sources.

torch's own ``weights_only`` accepts types that read files (``traceback.FrameSummary``) and records with wrong
checksums. Here a file is verified before torch reads it: every record against its checksum, every type against
``ALLOWED``.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_tokenformer.errors import UserError

NESTED = ("state_dict", "module", "model")
"""Keys under which trainers store the weights in a pickle."""

_DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
ALLOWED = {
    "torch": {*_DTYPES, "Size", "device", *(name for name in dir(torch) if name.endswith("Storage"))},
    "torch.storage": {"TypedStorage", "UntypedStorage"},
    "torch._utils": {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"},
    "torch.nn.parameter": {"Parameter"},
    "collections": {"Counter", "OrderedDict"},
    "_codecs": {"encode"},  # bytes
    "builtins": {"set"},
    "__builtin__": {"set"},
}
"""Types allowed in a pickle, by module; a subset of those that ``torch.load(weights_only=True)`` accepts."""

_EXTENDED = ("torch", "builtins", "traceback")
"""Packages of the types that torch itself adds to its safe globals; a user's own additions are honored."""

MAX_VALUES, MAX_NESTING = 4_000_000, 100
"""Maximum number of values in a file, counted once per reference, and maximum nesting depth."""


def load_pickle(path: str | os.PathLike[str], setting: str, map_location: str = "cpu", mmap: bool = False) -> Any:
    """Load a file written by ``torch.save``, tensors and plain types only.

    Args:
        path: File to load.
        setting: Setting that names the file, for errors.
        map_location: Device of the tensors; ``meta`` reads their shapes only.
        mmap: Memory-map the tensors where the file allows it.

    Raises:
        ValueError: If the file is missing, incomplete or contains pickled code.
    """
    if not Path(path).is_file():
        raise UserError(f"{setting}: {path} is not a file")
    with reading_errors(setting, path):
        facts = os.stat(path)
        zipped = _check_once(os.path.abspath(path), facts.st_ino, facts.st_size, facts.st_mtime_ns)
        mapped = (mmap or map_location == "meta") and zipped
        found = torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
        check_size(found)
        return found


@contextmanager
def reading_errors(setting: str, path: object) -> Iterator[None]:
    """Convert any exception raised on a damaged or malicious file to a one-line error.

    Args:
        setting: Setting that names the file, for errors.
        path: File being read.

    Raises:
        ValueError: For every exception.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # the error is more specific
            yield
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), error)
        message = f"{setting}: {path} holds pickled code or is damaged, and was not loaded ({reason})"
        raise UserError(message) from None
    except Exception as error:  # unpickling errors have no common base class
        raise UserError(f"{setting}: {path} is truncated or damaged ({_first_line(error)})") from None


@lru_cache(maxsize=64)
def _check_once(path: str, *identity: int) -> bool:
    """Verify a file unless it is unchanged since the last check, and return whether it is a zip archive."""
    with open(path, "rb") as file:
        return check_archive(file)


def check_archive(file: BinaryIO) -> bool:
    """Verify a file written by ``torch.save`` before torch reads it.

    Args:
        file: File, positioned at its start.

    Returns:
        Whether it is a zip archive. A pickle of torch before 1.6 has no checksums, so only its types are checked.

    Raises:
        pickle.UnpicklingError: If it references a type outside ``ALLOWED``.
        zipfile.BadZipFile: If a record is compressed or does not match its checksum.
    """
    zipped = file.read(4) == b"PK\3\4"  # as torch decides
    file.seek(0)
    if not zipped:
        for _ in range(5):  # magic number, version, system, objects, keys of the storages
            _check_types(file)
        return False
    archive = zipfile.ZipFile(file)
    records = [record.filename for record in archive.infolist()]
    if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
        raise zipfile.BadZipFile("its records are compressed, and torch reads them as if they were not")
    if len({name.lower() for name in records}) != len(records):
        raise zipfile.BadZipFile("two records have the same name")
    if torch.serialization.get_crc32_options() and (bad := archive.testzip()) is not None:
        raise zipfile.BadZipFile(f"record {bad} does not match its checksum")
    file.seek(0)
    reader: Any = torch._C.PyTorchFileReader(file)  # as torch.load: another parser might find another record
    if reader.has_record("byteorder") and reader.get_record("byteorder").decode() != sys.byteorder:
        raise zipfile.BadZipFile(f"its byte order is not {sys.byteorder} as on this machine")
    _check_types(io.BytesIO(reader.get_record("data.pkl")))
    return True


def _check_types(file: BinaryIO) -> None:
    added = torch.serialization.get_safe_globals()
    kinds = [kind[0] if isinstance(kind, tuple) else kind for kind in added]
    own = {f"{kind.__module__} {kind.__qualname__}" for kind in kinds if kind.__module__.split(".")[0] not in _EXTENDED}
    for opcode, name, _ in pickletools.genops(file):
        if opcode.name == "STACK_GLOBAL":  # of newer protocols, unsupported by torch's reader
            raise pickle.UnpicklingError("Unsupported pickle protocol")
        if opcode.name == "GLOBAL" and name not in own:
            module, _, kind = str(name).partition(" ")
            if kind not in ALLOWED.get(module, ()):
                raise pickle.UnpicklingError(f"Unsupported type {module}.{kind}")


def check_size(value: Any) -> None:
    """Reject values with unbounded nesting: 30 lists that each contain the previous one twice are 2^30 values.

    Args:
        value: Any unpickled value.

    Raises:
        ValueError: If there are more than ``MAX_VALUES`` values, or nesting exceeds ``MAX_NESTING``.
    """
    count, depth, level = 0, 0, [value]
    while level:
        count, depth = count + len(level), depth + 1
        if count > MAX_VALUES or depth > MAX_NESTING:
            raise ValueError(f"more than {MAX_VALUES} values, or nested deeper than {MAX_NESTING}")
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, (list, tuple, set)):
                inner += one
            if count + len(inner) > MAX_VALUES:
                break
        level = inner


def read_tensors(path: str | os.PathLike[str], setting: str) -> dict[str, Tensor]:
    """Load the tensors of a ``.safetensors`` file or a pickled state dict, in the precision of the file.

    Args:
        path: File to load; a pickle may store the state dict under one of the keys in ``NESTED``.
        setting: Setting that names the file, for errors.

    Raises:
        ValueError: As :func:`load_pickle`, or if an entry is not a floating-point tensor.
    """
    if Path(path).suffix == ".safetensors":
        found: Any = _load_safetensors(path, setting)
    else:
        found = load_pickle(path, setting, mmap=True)
        for key in NESTED:
            if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
                found = found[key]
    if not isinstance(found, Mapping):
        raise UserError(f"{setting}: {path} is not a state dict (got {type(found).__name__})")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"{setting}: {path}: {name} is not a floating-point tensor (got {kind})")
    return {str(name): _alone(tensor) for name, tensor in found.items()}


class TensorFiles:
    """Tensors of a weights file, or of the shards that an index names, loaded one at a time.

    Args:
        path: ``.safetensors`` file, pickled state dict, or ``.index.json`` of shards in its folder.
        setting: Setting that names the file, for errors.

    Attributes:
        shapes: Shape of each tensor, by name.

    Raises:
        ValueError: If a file is missing, incomplete or contains pickled code, or a tensor of the index is not in its
            shard.
    """

    def __init__(self, path: str | os.PathLike[str], setting: str) -> None:
        self.path, self._setting = Path(path), setting
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        self._pickled: dict[str, Any] = {}
        index = _read_index(self.path, setting) if self.path.suffix == ".json" else {}
        for file in dict.fromkeys(index.values()) if index else [self.path.name]:
            self._add(self.path.with_name(file))
        for name, file in index.items():
            if self._files.get(name) != self.path.with_name(file):
                raise UserError(f"{setting}: {name} is not in {file}, where {path} expects it")

    def _add(self, file: Path) -> None:
        if not file.is_file():
            raise UserError(f"{self._setting}: {file} is missing")
        if file.suffix == ".safetensors":
            with reading_errors(self._setting, file), safe_open(file, "pt") as found:
                shapes = {name: tuple(found.get_slice(name).get_shape()) for name in found.keys()}  # noqa: SIM118
        else:
            pickled = load_pickle(file, self._setting, mmap=True)
            if not isinstance(pickled, Mapping) or not all(isinstance(one, Tensor) for one in pickled.values()):
                raise UserError(f"{self._setting}: {file} is not a state dict")
            self._pickled |= pickled
            shapes = {name: tuple(tensor.shape) for name, tensor in pickled.items()}
        self.shapes |= shapes
        self._files |= dict.fromkeys(shapes, file)

    def __getitem__(self, name: str) -> Tensor:
        """Load a tensor in the precision of the file.

        Raises:
            ValueError: If the file is damaged, or the tensor is not of floating point.
        """
        file = self._files[name]
        if file.suffix == ".safetensors":  # reopened: the pages of earlier tensors are released
            with reading_errors(self._setting, file), safe_open(file, "pt") as found:
                tensor = found.get_tensor(name)
        else:
            tensor = _alone(self._pickled[name])
        if not tensor.is_floating_point():
            raise UserError(f"{self._setting}: {file}: {name} is not a floating-point tensor (got {tensor.dtype})")
        return tensor


def _read_index(path: Path, setting: str) -> dict[str, str]:
    """Return the shard of each tensor; shards are files in the folder of the index."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if index and all(isinstance(file, str) and file == Path(file).name for file in index.values()):
            return index
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    raise UserError(f"{setting}: {path} is not an index of shards (expected a weight_map of tensors and file names)")


def write_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write ``.safetensors``, or a pickled state dict under any other extension.

    Raises:
        OSError: If the file cannot be written.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        if Path(path).suffix == ".safetensors":
            safetensors.torch.save_file(whole, path, metadata={"format": "pt"})
        else:
            with open(path, "wb") as file:
                torch.save(whole, file)
    except (SafetensorError, RuntimeError) as error:  # torch wraps a full disk in an error of its own
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(_first_line(cause)) from error


def _load_safetensors(path: str | os.PathLike[str], setting: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise UserError(f"{setting}: {path} is not a file")
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{setting}: {path} is truncated or damaged ({_first_line(error)})") from None


def _alone(tensor: Tensor) -> Tensor:
    """Copy a tensor that is a view: DeepSpeed's ``zero_to_fp32`` saves views into one vector of all weights."""
    tensor = tensor.detach()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

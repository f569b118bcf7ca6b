"""Save and load checkpoints of sharded models.

Lightning writes one file (``save_distributed_checkpoint: false``) or a folder with the shards of all processes
(``torch.distributed.checkpoint``). Either can be loaded on any number of processes, sharded or not, with any number of
parameter tokens. torch's own reader unpickles the folder's index and small values unchecked; the reader here accepts
only the types that torch writes.
"""

from __future__ import annotations

import errno
import io
import math
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from lit_tokenformer.distributed.sharding import reshard
from lit_tokenformer.errors import UserError
from lit_tokenformer.growth.shards import ShardedParameters, is_elsewhere, like, local, owned_rows
from lit_tokenformer.models.axes import find_axes, refresh, resize, resized_shape
from lit_tokenformer.tensor_files import check_archive, check_size, load_pickle, reading_errors

try:
    import fcntl
except ImportError:  # not on Windows, where leftovers of killed processes are kept
    fcntl = None  # type: ignore[assignment]

INDEX, REST = ".metadata", "meta.pt"
"""Files of a folder: torch's index of tensors, and Lightning's remaining entries."""

NON_FINITE = "non_finite"
"""Key in a checkpoint that must not be saved: name of a parameter with non-finite values or optimizer state."""

_INDEX_TYPES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorStorageMetadata"),
        *("TensorProperties", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
    "builtins": {"getattr"},  # Python 3.11.0 to 3.11.3 pickle members of an enumeration with it
}
"""Types allowed in an index, by module."""


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a sharded checkpoint (a folder)."""
    return (Path(path) / REST).is_file()


def read_index(path: str | os.PathLike[str]) -> dict[str, Tensor | None]:
    """Load the index of a folder, by name: ``state_dict.NAME``, ``optimizer_0.state.NAME.exp_avg``, ...

    Args:
        path: Folder of the checkpoint.

    Returns:
        Tensors on the ``meta`` device (shape and dtype only); ``None`` for other values.

    Raises:
        ValueError: If the index is missing, damaged, or contains types other than torch's own records.
    """
    found = _Reader(path).read_metadata().state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in found.items()
    }


def read_folder(path: str | os.PathLike[str], map_location: str = "cpu", optimizers: bool = True) -> dict[str, Any]:
    """Load a folder in the format of a single-file checkpoint.

    Args:
        path: Folder of the checkpoint.
        map_location: Device of the tensors; ``meta`` reads their shapes only.
        optimizers: Whether to load optimizer state.

    Raises:
        ValueError: If the folder is incomplete, damaged or contains pickled code.
    """
    with reading_errors("ckpt_path", path):
        index = {
            name: entry for name, entry in read_index(path).items() if optimizers or name.startswith("state_dict.")
        }
        targets = {
            name: tensor if tensor is None else torch.empty_like(tensor, device="cpu") for name, tensor in index.items()
        }
        if map_location == "meta":
            targets = {name: None for name, tensor in index.items() if tensor is None}
        found: dict[str, Any] = {**index, **_read(path, targets)}
        rest = load_pickle(Path(path) / REST, "ckpt_path", map_location)
        return {**rest, "state_dict": _below(found, "state_dict."), "optimizer_states": _optimizers(found)}


def load_into(
    task: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    path: str | os.PathLike[str],
    trained_weights: Callable[[dict[str, Any]], None],
    problems: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any]:
    """Load a checkpoint into a sharded model; each process reads its own shards.

    The model is first resized to the checkpoint's numbers of parameter tokens. All processes must call this.

    Args:
        task: Model; parameters of another size are replaced.
        optimizers: Optimizers of the model; their state is replaced.
        path: File or folder.
        trained_weights: Function that replaces a checkpoint's ``state_dict`` with the weights to resume from.
        problems: Function that rejects weights of another architecture, given a mapping from names to values with a
            ``shape``.

    Returns:
        Remaining entries of the checkpoint; for a file, weights and optimizer state too.

    Raises:
        ValueError: If the checkpoint cannot be read, has another architecture, or its optimizer state does not match.
    """
    if is_sharded(path):
        index = read_index(path)
        weights = _below(index, "state_dict.")
        problems(weights)
        _resize(task, optimizers, weights)
        targets: dict[str, Any] = {f"state_dict.{name}": tensor for name, tensor in _own_tensors(task).items()}
        for number, optimizer in enumerate(optimizers):
            prefix = f"optimizer_{number}."
            state = _empty_state(task, optimizer, _below(index, prefix))
            targets |= {prefix + name: value for name, value in state.items()}
        found = _read(path, targets)
        for optimizer, state in zip(optimizers, _optimizers(found), strict=False):
            _take_state(task, optimizer, state)
        return load_pickle(Path(path) / REST, "ckpt_path")
    checkpoint = load_pickle(path, "ckpt_path", mmap=True)
    if optimizers:
        check_has_optimizers(checkpoint)
    trained_weights(checkpoint)
    weights = checkpoint["state_dict"]
    problems(weights)
    _resize(task, optimizers, weights)
    with torch.no_grad():
        for name, target in _own_tensors(task).items():
            local(target).copy_(_own_part(target, weights[name]))
    for optimizer, state in zip(optimizers, checkpoint.get("optimizer_states", []), strict=False):
        _take_state(task, optimizer, state)
    return checkpoint


def check_has_optimizers(checkpoint: Mapping[str, Any]) -> None:
    """Reject a weights-only checkpoint, which cannot be resumed.

    Raises:
        ValueError: If the optimizer state is missing; that of a fresh fit is an empty list.
    """
    if "optimizer_states" not in checkpoint:
        raise UserError(
            "ckpt_path: the checkpoint has weights only, and a fit resumes with optimizer state "
            "(expected ModelCheckpoint with save_weights_only: false); start a new fit from them with --init_from"
        )


def save_folder(
    strategy: Any, save: Callable[[dict[str, Any], Any], None], checkpoint: dict[str, Any], path: Any
) -> None:
    """Write a sharded checkpoint atomically; a previous one of that name is kept until then.

    Args:
        strategy: Lightning strategy; all its processes must call this.
        save: Function that writes a checkpoint to a path.
        checkpoint: Checkpoint to write.
        path: Folder to write.
    """
    target = Path(strategy.broadcast(path))
    unfinished, before = (target.with_name(target.name + end) for end in (".part", ".before"))
    io = strategy.checkpoint_io

    def prepare() -> None:
        clear_folders(target.parent)
        _remove(unfinished)
        if target.exists():
            _remove(before)

    def put_in_place() -> None:
        if target.is_symlink():
            target.unlink()
        elif target.exists():
            os.replace(target, before)
        os.replace(unfinished, target)
        _remove(before)

    failed = _failure(strategy, prepare, everywhere=False)
    with _lock(target.parent) if strategy.is_global_zero else nullcontext():
        failed = failed or _failure(strategy, lambda: save(checkpoint, unfinished))
        failed = failed or _failure(strategy, put_in_place, everywhere=False)
    warns = getattr(io, "on_full_disk", "stop") == "warn"
    if hasattr(io, "unsaved"):
        io.unsaved = str(path) if failed and warns else None
    if failed is None:
        return
    if strategy.is_global_zero:
        _remove(unfinished)
    if not (warns and any(words in failed for words in _FULL)):
        raise OSError(f"cannot save {target}: {failed}")
    if strategy.is_global_zero:
        warnings.warn(
            f"no space left to save {target}; the fit continues, and earlier checkpoints are kept", stacklevel=2
        )


_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def _failure(strategy: Any, work: Callable[[], None], everywhere: bool = True) -> str | None:
    """Run a function on all ranks or on rank zero, and share the error message of the first rank that fails."""
    problem: str | None = None
    if everywhere or strategy.is_global_zero:
        try:
            work()
        except (Exception, CheckpointException) as error:  # torch's own is not an Exception
            lines = [*(line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__]
            problem = lines[-2:][0]
    found: list[str | None] = [None] * strategy.world_size
    torch.distributed.all_gather_object(found, problem)
    return next((one for one in found if one is not None), None)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Lock a folder against other writers of sharded checkpoints, and yield whether the lock was acquired."""
    if fcntl is None or not folder.is_dir():
        yield False
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except OSError:  # some network file systems have no locks
        locked = False
    try:
        yield locked
    finally:
        os.close(opened)


def clear_folders(folder: Path) -> None:
    """Remove unfinished sharded checkpoints of killed processes."""
    left = [path for path in folder.glob("*.ckpt.part") if path.is_dir() and not path.is_symlink()]
    if left:
        with _lock(folder) as alone, suppress(OSError):
            for path in left if alone else ():
                shutil.rmtree(path)


def mend_folders(folder: Path) -> None:
    """Restore the names of checkpoints whose replacement was interrupted by a kill."""
    for before in folder.glob("*.before"):
        if not (target := before.with_name(before.name.removesuffix(".before"))).exists():
            with suppress(OSError):  # another process was faster
                os.replace(before, target)


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]  # the C one cannot be kept from modifying classes
    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_TYPES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        if name == "getattr":
            return _member
        return _path if module.startswith("pathlib") else super().find_class(module, name)

    def load_build(self) -> None:
        if callable(self.stack[-2]):  # type: ignore[attr-defined]
            raise pickle.UnpicklingError("it changes a class")
        super().load_build()  # type: ignore[misc]

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}  # type: ignore


def _member(kind: Any, name: str) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError("it names builtins.getattr")
    return kind[name]


def _path(*parts: str) -> str:
    return os.path.join(*parts)


class _Reader(FileSystemReader):
    """torch's reader with safe unpickling."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._folder = Path(path)
        self._checked: set[tuple[str, int]] = set()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = self._folder / INDEX
        if not file.is_file():
            raise UserError(f"ckpt_path: {file} is not a file")
        try:
            with open(file, "rb") as stream:
                found = _Unpickler(stream).load()
            files = {one.relative_path for one in found.storage_data.values()}
            found.storage_meta.load_id = self.load_id
            found.state_dict_metadata = dict(found.state_dict_metadata)
        except Exception as error:  # damaged bytes raise any exception in an unpickler
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"ckpt_path: {file} holds pickled code or is damaged, and was not loaded ({reason})"
            ) from None
        if not all(isinstance(one, str) and os.path.basename(one) == one for one in files):
            raise UserError(f"ckpt_path: {file} references files outside of its folder")
        for name in files:
            if not (self._folder / name).is_file():
                raise UserError(f"ckpt_path: {self._folder} is incomplete: {name} is missing")
        for name, entry in found.state_dict_metadata.items():
            try:
                whole = _is_whole(name, entry, found.storage_data)
            except Exception:  # a value of another type, at any depth of the entry
                whole = False
            if not whole:
                raise UserError(f"ckpt_path: {file}: {name} is incomplete")
        return found

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        found = io.BytesIO(super()._slice_file(file, sinfo).read())  # one chunk in memory
        if (place := (sinfo.relative_path, sinfo.offset)) not in self._checked:
            check_archive(found)
            found.seek(0)
            self._checked.add(place)
        return found


def _is_whole(name: str, entry: Any, stored: Mapping[Any, Any]) -> bool:
    """Return whether an entry of the index is complete: its chunks form a grid, and all bytes of each are stored.

    torch leaves memory uninitialized where a chunk is missing.
    """
    if not isinstance(entry, TensorStorageMetadata):
        return stored[MetadataIndex(name)].length > 0
    size: Any = tuple(entry.size)
    axes: list[int] = []
    boxes = {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks if math.prod(chunk.sizes)}
    for axis, length in enumerate(size):
        spans = sorted({(offsets[axis], offsets[axis] + sizes[axis]) for offsets, sizes in boxes})
        if [0, *(end for _, end in spans)] != [*(start for start, _ in spans), length] and math.prod(size):
            return False
        axes.append(len(spans))
    held = all(
        stored[MetadataIndex(name, offsets)].length >= math.prod(sizes) * entry.properties.dtype.itemsize
        for offsets, sizes in boxes
    )
    return held and len(boxes) == (math.prod(axes) if math.prod(size) else 0)


class _Planner(DefaultLoadPlanner):
    """torch's planner over flat names, with safe unpickling."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: Any, value: Any) -> None:
        self.state_dict[read_item.dest_index.fqn] = found = torch.load(value, weights_only=True)
        check_size(found)


def _read(path: str | os.PathLike[str], targets: dict[str, Any]) -> dict[str, Any]:
    """Load tensors in place, sharded or not; other values are added to the dictionary."""
    reader = _Reader(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(targets, storage_reader=reader, planner=_Planner(), no_dist=True)
    except (Exception, CheckpointException) as error:  # torch's own is not an Exception
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"ckpt_path: {path} is damaged or holds pickled code ({lines[-1]})") from None
    return targets


def _below(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _optimizers(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rebuild optimizer state dicts from flat names; parameters are identified by name."""
    found: list[dict[str, Any]] = []
    while entries := _below(values, f"optimizer_{len(found)}."):
        state: dict[str, dict[str, Any]] = {}
        for name, value in _below(entries, "state.").items():
            parameter, _, key = name.rpartition(".")
            state.setdefault(parameter, {})[key] = value
        groups: dict[int, dict[str, Any]] = {}
        for name, value in _below(entries, "param_groups.").items():
            number, _, key = name.partition(".")
            groups.setdefault(int(number), {})[key] = value
        found.append({"state": state, "param_groups": [groups[number] for number in sorted(groups)]})
    return found


def _own_tensors(task: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in the model's state dict as the modules hold them, sharded or not."""
    return {name: tensor.detach() for name, tensor in task.state_dict(keep_vars=True).items()}


def _names(task: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return the names of each parameter; a shared one has several."""
    found: dict[nn.Parameter, list[str]] = {}
    for name, parameter in task.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    return found


def _empty_state(task: nn.Module, optimizer: torch.optim.Optimizer, index: Mapping[str, Any]) -> dict[str, Any]:
    """Allocate an optimizer's state, by the flat names of a folder."""
    found: dict[str, Any] = {name: None for name in index if name.startswith("param_groups.")}
    state = _below(index, "state.")
    names = _names(task)
    for parameter in (one for group in optimizer.param_groups for one in group["params"]):
        for name in names[parameter]:
            for key, saved in _below(state, f"{name}.").items():
                value = saved if saved is None else torch.empty_like(saved, device="cpu")
                if saved is not None and saved.ndim and saved.shape == parameter.shape:
                    value = like(parameter.detach(), torch.empty_like(local(parameter), dtype=saved.dtype))
                found[f"state.{name}.{key}"] = value
    return found


def _take_state(task: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restore optimizer state from a checkpoint; each process keeps its own shards of full tensors."""
    groups = optimizer.param_groups
    counts = [[len(group["params"]) for group in one] for one in (saved["param_groups"], groups)]
    if counts[0] != counts[1]:
        raise UserError(f"optimizer state: parameter groups do not match (got {counts[0]}, expected {counts[1]})")
    names = _names(task)
    for old, group in zip(saved["param_groups"], groups, strict=True):
        by_name = {name: parameter for parameter in group["params"] for name in names[parameter]}
        for label, parameter in zip(old["params"], group["params"], strict=True):
            owner = by_name[label] if isinstance(label, str) else parameter
            values = saved["state"].get(label)
            if values and not is_elsewhere(owner):
                optimizer.state[owner] = {key: _fitted(key, value, owner, group) for key, value in values.items()}
        group.update({key: value for key, value in old.items() if key not in ("params", "param_names")})
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        hook(optimizer)


def _fitted(key: str, value: Any, parameter: nn.Parameter, group: Mapping[str, Any]) -> Any:
    """Convert a value of optimizer state to the dtype, device and sharding of its parameter."""
    if not isinstance(value, Tensor):
        return value
    if key == "step":  # as torch does
        on_device = group.get("capturable") or group.get("fused")
        return value.to(device=parameter.device, dtype=torch.float32) if on_device else value.clone()
    if value.ndim and value.shape == parameter.shape and not isinstance(value, DTensor):
        value = like(parameter.detach(), _own_part(parameter, value).to(parameter.device, copy=True))
    return value.to(device=parameter.device, dtype=parameter.dtype if value.is_floating_point() else None)


def _own_part(target: Tensor, whole: Tensor) -> Tensor:
    """Return the rows of a full tensor that this process holds of a sharded one."""
    if not isinstance(target, DTensor):
        return whole
    own = owned_rows(target, len(whole))
    return whole[own.start : own.stop]


@torch.no_grad()
def _resize(task: nn.Module, optimizers: list[torch.optim.Optimizer], weights: Mapping[str, Any]) -> None:
    """Resize the modules of a task to the sizes in a checkpoint; the values are uninitialized."""
    reshard(task)
    sharded = ShardedParameters(task)
    for name, part, axis in find_axes(task):
        for tensor in axis.tensors:
            saved = weights.get(f"{name}.{tensor.name}".lstrip("."))
            (owner, attribute), old = tensor.owner(part), tensor.of(part)
            if saved is None:
                continue  # a buffer that is not saved before its axis grows
            if attribute in owner._buffers:
                resize(part, tensor, saved.shape[tensor.dim])
                continue
            if old.shape[tensor.dim] == saved.shape[tensor.dim]:
                continue
            shape = resized_shape(old, tensor.dim, saved.shape[tensor.dim])
            rows = len(owned_rows(old, shape[0])) if isinstance(old, DTensor) else shape[0]
            new = sharded.replace(owner, attribute, local(old).new_empty(rows, *shape[1:]), shape)
            refresh(owner)
            for optimizer in optimizers:
                optimizer.state.pop(old, None)
                for group in optimizer.param_groups:
                    group["params"] = [new if one is old else one for one in group["params"]]

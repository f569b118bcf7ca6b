"""Atomic checkpoint I/O, and the search for the newest intact checkpoint."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fsspec.core import url_to_fs
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils._pytree import tree_leaves

from lit_tokenformer.atomic_io import atomic_write, clear_parts
from lit_tokenformer.checkpoints.load import read_checkpoint
from lit_tokenformer.distributed.checkpoint import NON_FINITE, clear_folders, mend_folders
from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.tensor_files import load_pickle

LAYOUTS = ("checkpoints/*.ckpt", "*/checkpoints/*.ckpt", "*/*/checkpoints/*.ckpt", "hpc_ckpt_*.ckpt")
"""Checkpoint paths of runs, relative to ``trainer.default_root_dir`` or the ``save_dir`` of a logger."""

_LARGE = {"callbacks", "loops", "lr_schedulers", "optimizer_states", "rng_states"}
"""Parts of a checkpoint that are dropped while the checkpoint to resume from is selected."""

_PLACES = ("checkpoints", "*/checkpoints", "*/*/checkpoints")
"""Checkpoint folders of loggers, relative to their own folder."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoint I/O with atomic writes and safe loading.

    A checkpoint is written to a temporary file, flushed to disk and renamed. A process killed at any moment leaves
    either the previous checkpoint of that name or the new one. Its unfinished file is removed when the next checkpoint
    is saved in that folder. Loading executes no code from the file. URLs such as ``s3://...`` are left to Lightning.

    Args:
        on_full_disk: ``warn`` continues training with a warning and keeps the existing checkpoints; ``stop`` ends the
            fit with an error.

    Raises:
        ValueError: For any other ``on_full_disk``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[WholeCheckpointIO(on_full_disk="stop")], logger=False)
    """

    def __init__(self, on_full_disk: str = "warn") -> None:
        if on_full_disk not in ("warn", "stop"):
            raise unknown_name("on_full_disk", on_full_disk, ("warn", "stop"))
        self.on_full_disk = on_full_disk
        self.unsaved: str | None = None
        """Latest checkpoint, if it could not be saved; the checkpoints that it would replace are kept then."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint; called on rank zero only.

        Args:
            checkpoint: Checkpoint collected by Lightning.
            path: File to write.
            storage_options: Unsupported, as in Lightning's own.

        Raises:
            OSError: If the file cannot be written; for a full disk only with ``on_full_disk: stop``.
        """
        self.unsaved = None
        if NON_FINITE in checkpoint:
            self.reject_non_finite(checkpoint, path)
            return
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            clear_parts(target.parent)
            with _whole(target) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as raised:
            error = _os_error(raised)
            if error is None:
                raise
            message = f"cannot save {target}: {error.strerror or error}"
            if error.errno not in _FULL:
                raise OSError(message) from error
            needed, free = _bytes(checkpoint) / 2**20, shutil.disk_usage(target.parent).free / 2**20
            message = f"no space left to save {target}: about {needed:,.1f} MiB needed, {free:,.1f} MiB free"
            if self.on_full_disk == "stop":
                raise OSError(f"{message}; earlier checkpoints are kept") from error
            self.unsaved = str(path)
            rank_zero_warn(f"{message}; the fit continues, and earlier checkpoints are kept")

    def reject_non_finite(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Report a checkpoint that is not saved because :class:`~callbacks.PreemptionCheckpoint` found it non-finite.

        Args:
            checkpoint: State collected by Lightning, with the key ``NON_FINITE``.
            path: File or folder.
        """
        self.unsaved = str(path)
        found = f"non-finite {checkpoint[NON_FINITE]} at step {checkpoint['global_step']}"
        rank_zero_warn(f"{found}: {path} is not saved, and earlier checkpoints are kept")

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load a checkpoint, tensors and plain types only.

        Args:
            path: File to load.
            map_location: Device of the tensors.
            weights_only: Ignored; always true.

        Raises:
            ValueError: If the file is missing, incomplete or contains pickled code.
        """
        if not _is_local_file_protocol(path):
            return _read_remote(str(path), map_location)
        if Path(path).name == ".temp.ckpt":  # weights only, passed back by the processes of Lightning's launcher
            return load_pickle(path, "ckpt_path", map_location)
        return read_checkpoint(path, map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, unless its replacement could not be saved.

        Args:
            path: File to remove.
        """
        if self.unsaved is None:
            super().remove_checkpoint(path)


def _read_remote(url: str, map_location: Any) -> dict[str, Any]:
    """Copy a checkpoint from an fsspec URL and verify it like a local one."""
    fs, plain = url_to_fs(url)
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "remote.ckpt")
        try:
            fs.get_file(plain, copy)
            return read_checkpoint(copy, map_location)
        except FileNotFoundError:
            raise UserError(f"ckpt_path: no such file: {url}") from None
        except UserError as error:
            raise UserError(str(error).replace(copy, url)) from None


class SavedCheckpoint(NamedTuple):
    """Checkpoint on disk.

    Args:
        path: File, folder or fsspec URL.
        content: Content without training state; tensors have shapes only.
        modified: Modification time in seconds since the epoch.
    """

    path: str
    content: dict[str, Any]
    modified: float

    @property
    def step(self) -> int:
        """Number of optimizer steps taken."""
        return self.content["global_step"]


def resumable_checkpoints(
    roots: Iterable[str | os.PathLike[str]], folders: Iterable[str | os.PathLike[str]] = ()
) -> list[SavedCheckpoint]:
    """Find the resumable checkpoints of all runs, sorted by optimizer steps, newest first; of equal ones ``last.ckpt``.

    Damaged checkpoints are reported and skipped. Those without optimizer state or at step 0 are ignored.

    Args:
        roots: Folders that contain runs in one of ``LAYOUTS``; paths or fsspec URLs.
        folders: Folders of checkpoints.
    """
    patterns = [(os.fspath(root), layout) for root in roots for layout in LAYOUTS]
    patterns += [(os.fspath(folder), "*.ckpt") for folder in folders]
    found: dict[str, SavedCheckpoint] = {}
    for folder, pattern in patterns:
        for path, modified in _matches(folder, pattern):
            if path in found:
                continue
            try:
                content = read_shapes(path)
            except ValueError as error:
                rank_zero_warn(f"{error}; skipped")
                continue
            step = content.get("global_step") if isinstance(content, dict) else None
            if isinstance(step, int) and step > 0 and {"state_dict", "optimizer_states"} <= content.keys():
                kept = {key: content[key] for key in content.keys() - _LARGE}
                found[path] = SavedCheckpoint(path, kept, modified)
    order = sorted(found.values(), key=lambda one: (one.step, one.modified, one.path.endswith("last.ckpt"), one.path))
    return order[::-1]


def last_checkpoint(folder: str | os.PathLike[str] | None) -> Path | None:
    """Find the newest intact checkpoint of all runs below a folder, regardless of their experiment.

    Args:
        folder: Setting ``trainer.default_root_dir``.
    """
    found = resumable_checkpoints([os.path.expanduser(folder or ".")])
    return Path(found[0].path) if found else None


def _matches(folder: str, pattern: str) -> Iterator[tuple[str, float]]:
    """Yield matching paths with their modification times."""
    if not _is_local_file_protocol(folder):
        fs, root = url_to_fs(folder)
        for path in fs.glob(f"{root}/{pattern}"):
            with suppress(NotImplementedError, FileNotFoundError):
                yield fs.unstrip_protocol(path), fs.modified(path).timestamp()
        return
    root = Path(folder)
    for place in {path.parent for path in root.glob(f"{pattern}.before")}:
        mend_folders(place)
    for match in root.glob(pattern):
        with suppress(OSError):  # a dangling link, or removed by its run at this moment
            yield str(match), match.stat().st_mtime


def read_shapes(path: str) -> Any:
    """Load a checkpoint with its tensors on the ``meta`` device, without executing code from it.

    Args:
        path: File, folder or fsspec URL.

    Raises:
        UserError: If it cannot be read.
    """
    if _is_local_file_protocol(path):
        return read_checkpoint(path, map_location="meta")
    fs, plain = url_to_fs(path)
    if not fs.exists(plain):
        raise UserError(f"ckpt_path: {path} is not a file")
    try:
        with fs.open(plain, "rb") as file:
            return torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # unpickling errors have no common base class
        raise UserError(f"ckpt_path: {path} is damaged or holds pickled code ({type(error).__name__})") from None


@contextmanager
def _whole(target: Path) -> Iterator[Any]:
    """Open a file that replaces ``target``, a file or a sharded checkpoint, once it is flushed to disk."""
    before = target.with_name(f"{target.name}.before")  # a name that mend_folders restores
    with atomic_write(target) as file:
        yield file
        if target.is_dir() and not target.is_symlink():  # a sharded checkpoint: a file cannot replace a folder
            file.flush()
            os.fsync(file.fileno())
            if before.is_dir():
                shutil.rmtree(before)
            os.replace(target, before)
    if before.is_dir():
        shutil.rmtree(before)


def clear_unfinished(*roots: str | os.PathLike[str]) -> None:
    """Remove unfinished checkpoints of killed processes; those still being written are kept.

    Args:
        roots: Folders of checkpoints or of runs.
    """
    for root in map(Path, roots):
        for folder in {root, *(place for pattern in _PLACES for place in root.glob(pattern))}:
            clear_parts(folder)
            clear_folders(folder)


def is_disk_full(raised: BaseException) -> bool:
    """Return whether an error or one of its causes is a full disk, an exceeded quota or a file size limit."""
    error = _os_error(raised)
    return error is not None and error.errno in _FULL


def _os_error(raised: BaseException) -> OSError | None:
    """Find the ``OSError`` behind an error; torch raises a ``RuntimeError`` when it closes an unwritten file."""
    found: BaseException | None = raised
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found


def _bytes(checkpoint: dict[str, Any]) -> int:
    """Estimate the size of the file in bytes."""
    storages = {
        leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
        for leaf in tree_leaves(checkpoint)
        if isinstance(leaf, torch.Tensor)
    }
    return sum(storages.values())

"""Checkpoints on disk: each is there whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils._pytree import tree_leaves

from lit_tokenformer.checkpoints import read_checkpoint
from lit_tokenformer.errors import unknown_name
from lit_tokenformer.sharded_checkpoints import clear_folders, mend_folders

try:
    import fcntl
except ImportError:  # not on Windows: what a killed process left there stays
    fcntl = None  # type: ignore[assignment]

LAST = ("*/version_*/checkpoints/last*.ckpt", "checkpoints/last*.ckpt", "hpc_ckpt_*.ckpt")
"""Where checkpoints to go on from are, below ``trainer.default_root_dir``."""

_PLACES = ("checkpoints", "*/checkpoints", "*/*/checkpoints")
"""Where loggers put checkpoints, below their folder."""

_UNFINISHED = ".lit-tokenformer-{}.part"
"""Name of a file that is being written: hidden, and without the checkpoint's name in it, since Lightning counts
``hpc_ckpt_N`` by what file names contain. Processes of several machines may write into one folder."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, makes sure that it is on the disk, and moves it there in one step.

    A process that is killed at any moment leaves the checkpoint that had the name before, or the new one. What it has
    left of an unfinished one is removed when the next checkpoint is saved in that folder. Nothing in a file is executed
    when it is loaded. Addresses such as ``s3://...`` are left to Lightning.

    Args:
        on_full_disk: ``warn`` goes on with the fit, keeps the checkpoints that are there and says so; ``stop`` ends the
            fit with an error.

    Raises:
        ValueError: For another word.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[WholeCheckpointIO(on_full_disk="stop")], logger=False)
    """

    def __init__(self, on_full_disk: str = "warn") -> None:
        if on_full_disk not in ("warn", "stop"):
            raise unknown_name("on_full_disk", on_full_disk, ("warn", "stop"))
        self.on_full_disk = on_full_disk
        self.unsaved: str | None = None
        """The latest checkpoint, if it found no place; nothing that it was to replace is removed then."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Saves a checkpoint; called in the first process only.

        Args:
            checkpoint: What Lightning collected.
            path: The file.
            storage_options: Not taken, as by Lightning's own.

        Raises:
            OSError: If it cannot be written; for a full disk only with ``on_full_disk: stop``.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        self.unsaved = None
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(target.parent)
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
                raise OSError(f"{message}; the checkpoints before it are kept") from error
            self.unsaved = str(path)
            rank_zero_warn(f"{message}; the fit goes on, and the checkpoints before it are kept")

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Loads a checkpoint, tensors and plain types only.

        Args:
            path: The file.
            map_location: Device of the tensors.
            weights_only: Taken for true, whatever it is.

        Raises:
            ValueError: If the file is not there, is not whole or holds pickled code.
        """
        if not _is_local_file_protocol(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(path, map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint, unless the one that was to replace it could not be saved.

        Args:
            path: The file.
        """
        if self.unsaved is None:
            super().remove_checkpoint(path)


def last_checkpoint(folder: str | os.PathLike[str] | None) -> Path | None:
    """The newest whole checkpoint to go on from, of all runs below a folder; damaged ones are told and passed over.

    Lightning itself looks only in the run that begins.

    Args:
        folder: The setting ``trainer.default_root_dir``.
    """
    root = Path(folder or ".")
    for place in {path.parent for pattern in LAST for path in root.glob(f"{pattern}.before")}:
        mend_folders(place)
    found = [path for pattern in LAST for path in root.glob(pattern) if path.exists()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            read_checkpoint(path, map_location="meta")
        except ValueError as error:
            rank_zero_warn(f"{error}; looking for the one before it")
        else:
            return path
    return None


@contextmanager
def _whole(target: Path) -> Iterator[Any]:
    """A file to write, which has its name when it is on the disk with all that was written."""
    part = target.with_name(_UNFINISHED.format(uuid.uuid4().hex))
    before = target.with_name(f"{target.name}.before")  # a name that mend_folders gives back
    try:
        with part.open("xb") as file:
            if fcntl is not None:
                with suppress(OSError):  # some network file systems have no locks
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if target.is_dir() and not target.is_symlink():  # a sharded checkpoint, which no file can replace
                if before.is_dir():
                    shutil.rmtree(before)
                os.replace(target, before)
            os.replace(part, target)
            if before.is_dir():
                shutil.rmtree(before)
        with suppress(OSError):  # some systems cannot open a folder
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        part.unlink(missing_ok=True)


def clear_unfinished(*roots: str | os.PathLike[str]) -> None:
    """Removes what killed processes left of checkpoints; what is being written is not touched.

    Args:
        roots: Folders of checkpoints, or of runs.
    """
    for root in map(Path, roots):
        for folder in {root, *(place for pattern in _PLACES for place in root.glob(pattern))}:
            _remove_unfinished(folder)
            clear_folders(folder)


def _remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left; a process that writes holds a lock on its file."""
    for part in folder.glob(_UNFINISHED.format("*")) if fcntl is not None else ():
        with suppress(OSError), part.open("r+b") as file:  # some network file systems lock only what is to be written
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def is_disk_full(raised: BaseException) -> bool:
    """Whether an error, or one that led to it, is that of a full disk, a quota or a file that may not grow."""
    error = _os_error(raised)
    return error is not None and error.errno in _FULL


def _os_error(raised: BaseException) -> OSError | None:
    """What the disk said; torch stumbles over the end of a file that was not written, and raises a RuntimeError."""
    found: BaseException | None = raised
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found


def _bytes(checkpoint: dict[str, Any]) -> int:
    """About how large the file would be."""
    storages = {
        leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
        for leaf in tree_leaves(checkpoint)
        if isinstance(leaf, torch.Tensor)
    }
    return sum(storages.values())

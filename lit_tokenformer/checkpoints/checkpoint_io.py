"""Checkpoints on disk: each is there whole or not at all, whatever happens while it is written."""

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
"""Where runs have their checkpoints, below ``trainer.default_root_dir`` or the ``save_dir`` of a logger."""

_LARGE = {"callbacks", "loops", "lr_schedulers", "optimizer_states", "rng_states"}
"""Parts of a checkpoint that are not kept while the checkpoint to resume from is chosen."""

_PLACES = ("checkpoints", "*/checkpoints", "*/*/checkpoints")
"""Where loggers put checkpoints, below their folder."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, makes sure that it is on the disk, and moves it there in one step.

    A process that is killed at any moment leaves the checkpoint that had the name before, or the new one. What it has
    left of an unfinished one is removed when the next checkpoint is saved in that folder. Nothing in a file is executed
    when it is loaded. Addresses such as ``s3://...`` are left to Lightning.

    Args:
        on_full_disk: ``warn`` continues the fit with a warning and keeps the checkpoints that exist; ``stop`` raises.

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
        """The latest checkpoint, if it was not saved; nothing that it was to replace is removed then."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Saves a checkpoint; called in the first process only.

        Args:
            checkpoint: What Lightning collected.
            path: The file.
            storage_options: Not taken, as by Lightning's own.

        Raises:
            OSError: If it cannot be written; for a full disk only with ``on_full_disk: stop``.
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
                raise OSError(f"{message}; the checkpoints before it are kept") from error
            self.unsaved = str(path)
            rank_zero_warn(f"{message}; the fit goes on, and the checkpoints before it are kept")

    def reject_non_finite(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Report a checkpoint that is not saved because of what :class:`~callbacks.PreemptionCheckpoint` found in it.

        Args:
            checkpoint: The state that Lightning collected, with the key ``NON_FINITE``.
            path: The file or folder.
        """
        self.unsaved = str(path)
        found = f"non-finite {checkpoint[NON_FINITE]} at step {checkpoint['global_step']}"
        rank_zero_warn(f"{found}: {path} is not saved, and the checkpoints before it are kept")

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
            return _read_remote(str(path), map_location)
        if Path(path).name == ".temp.ckpt":  # weights alone, which Lightning's launcher takes back from its processes
            return load_pickle(path, "ckpt_path", map_location)
        return read_checkpoint(path, map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint, unless the one that was to replace it could not be saved.

        Args:
            path: The file.
        """
        if self.unsaved is None:
            super().remove_checkpoint(path)


def _read_remote(url: str, map_location: Any) -> dict[str, Any]:
    """Copy a checkpoint from an fsspec URL, and verify it as any other."""
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
    """A checkpoint on disk.

    Args:
        path: The file, the folder or the fsspec URL.
        content: Its content without the state of training; tensors have shapes only.
        modified: When it was written, in seconds.
    """

    path: str
    content: dict[str, Any]
    modified: float

    @property
    def step(self) -> int:
        """Optimizer steps that it has taken."""
        return self.content["global_step"]


def resumable_checkpoints(
    roots: Iterable[str | os.PathLike[str]], folders: Iterable[str | os.PathLike[str]] = ()
) -> list[SavedCheckpoint]:
    """Find the checkpoints of all runs from which a fit can resume; the newest by optimizer steps is the first.

    Damaged ones are reported and skipped, those without an optimizer state or without a step are ignored.

    Args:
        roots: Folders below which runs have theirs, as in ``LAYOUTS``; paths or fsspec URLs.
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
    return sorted(found.values(), key=lambda one: (one.step, one.modified), reverse=True)


def last_checkpoint(folder: str | os.PathLike[str] | None) -> Path | None:
    """The newest intact checkpoint of all runs below a folder, whatever their experiment.

    Args:
        folder: The setting ``trainer.default_root_dir``.
    """
    found = resumable_checkpoints([os.path.expanduser(folder or ".")])
    return Path(found[0].path) if found else None


def _matches(folder: str, pattern: str) -> Iterator[tuple[str, float]]:
    """Paths that exist, and when each was written."""
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
        with suppress(OSError):  # a dangling link, or removed by its run in this moment
            yield str(match), match.stat().st_mtime


def read_shapes(path: str) -> Any:
    """A checkpoint without the numbers in its tensors; nothing in it is executed.

    Args:
        path: The file, the folder or the fsspec URL.

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
    except Exception as error:  # a reader of pickles raises errors of no common class
        raise UserError(f"ckpt_path: {path} is damaged or holds pickled code ({type(error).__name__})") from None


@contextmanager
def _whole(target: Path) -> Iterator[Any]:
    """A file that takes the place of ``target``, be it a sharded checkpoint, when it is on the disk."""
    before = target.with_name(f"{target.name}.before")  # a name that mend_folders gives back
    with atomic_write(target) as file:
        yield file
        if target.is_dir() and not target.is_symlink():  # a sharded checkpoint, which no file can replace
            file.flush()
            os.fsync(file.fileno())
            if before.is_dir():
                shutil.rmtree(before)
            os.replace(target, before)
    if before.is_dir():
        shutil.rmtree(before)


def clear_unfinished(*roots: str | os.PathLike[str]) -> None:
    """Removes what killed processes left of checkpoints; what is being written is not touched.

    Args:
        roots: Folders of checkpoints, or of runs.
    """
    for root in map(Path, roots):
        for folder in {root, *(place for pattern in _PLACES for place in root.glob(pattern))}:
            clear_parts(folder)
            clear_folders(folder)


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

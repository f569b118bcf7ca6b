"""Atomic writes of files and folders.

Each is created exclusively under an unpredictable name in the folder of its target, flushed to disk and renamed. A
symbolic link under the target's name is replaced, never followed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

UNFINISHED = ".lit-tokenformer-{}.part"
"""Name of an unfinished file or folder, locked by the process that writes it. It is hidden and omits the target's name,
since Lightning counts ``hpc_ckpt_N`` by substring."""


@contextmanager
def atomic_write(target: str | os.PathLike[str], replace: bool = True) -> Iterator[BinaryIO]:
    """Open a new file that replaces ``target`` when the block ends, and is removed if the block raises.

    Args:
        target: File to write, in an existing folder.
        replace: Replace an existing target; otherwise raise ``FileExistsError`` at the end of the block.

    Yields:
        The file, open for writing bytes.

    Raises:
        OSError: If it cannot be created, written or renamed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(f"{folder}/note.txt") as file:
        ...         _ = file.write(b"complete")
        ...     os.listdir(folder)
        ['note.txt']
    """
    part = _part_path(target)
    try:
        with part.open("xb") as file:
            if fcntl is not None:
                with suppress(OSError):  # some network file systems have no locks
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if replace:
                os.replace(part, target)
            else:
                _rename_new(part, target)
        _sync(Path(target).parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Create a new folder that is renamed to ``target`` when the block ends, and is removed if the block raises.

    Leftovers of killed processes with the same target are removed.

    Args:
        target: Folder that does not exist yet; its parents are created.

    Yields:
        The folder to write to.

    Raises:
        OSError: If it cannot be created or renamed.
    """
    parent = Path(target).parent
    parent.mkdir(parents=True, exist_ok=True)
    named = hashlib.sha256(Path(target).name.encode()).hexdigest()[:8]
    for left in parent.glob(UNFINISHED.format(f"{named}{'[0-9a-f]' * 24}")):
        with suppress(OSError), _locked(left):
            shutil.rmtree(left)
    part = parent / UNFINISHED.format(f"{named}{uuid.uuid4().hex[:24]}")
    part.mkdir()
    with ExitStack() as lock:
        with suppress(OSError):
            lock.enter_context(_locked(part))
        try:
            yield part
            for inner in [*part.rglob("*"), part]:
                _sync(inner)
            os.replace(part, target)
            _sync(parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder, with an ``OSError`` for a link, a folder locked by another process, or a system without locks."""
    if fcntl is None:
        raise OSError("no locks")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def clear_parts(folder: Path) -> None:
    """Remove unfinished files of killed processes; locked ones, still being written, are kept.

    Args:
        folder: Folder to clean.
    """
    for part in folder.glob(UNFINISHED.format("*")) if fcntl is not None else ():
        with suppress(OSError), part.open("r+b") as file:  # some network file systems lock only files open for writing
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def _rename_new(part: Path, target: str | os.PathLike[str]) -> None:
    """Rename a file unless the target exists."""
    try:
        os.link(part, target)  # unlike a rename, this never replaces
    except FileExistsError:
        raise
    except OSError:  # some file systems have no hard links
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target)) from None
        os.replace(part, target)


def _part_path(target: str | os.PathLike[str]) -> Path:
    return Path(target).with_name(UNFINISHED.format(uuid.uuid4().hex))


def _sync(path: Path) -> None:
    """Flush a file or the entries of a folder to the disk."""
    with suppress(OSError):  # some systems cannot open a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

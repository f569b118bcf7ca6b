"""Folder of a run: its location, files that no other run overwrites, loggers that survive a full disk."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_tokenformer.checkpoints.checkpoint_io import is_disk_full

_WRITING: dict[type[Logger], tuple[str, ...]] = {
    TensorBoardLogger: ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize"),
    CSVLogger: ("save",),  # keeps unwritten rows in memory
}
"""Methods of loggers that write to the disk."""
_LOG_SPACE = 2**18
"""Free bytes required for a logger to write, so that a log never ends within a record."""


def run_folder(trainer: Trainer) -> str:
    """Return the folder of a run, unique to it if its first logger has such a folder.

    Lightning's ``log_dir`` of W&B and MLflow is shared by all runs; their checkpoints are in ``save_dir/name/version``.
    All processes must call this.

    Args:
        trainer: Trainer with initialized loggers.

    Returns:
        Path or fsspec URL; ``default_root_dir`` without a logger.
    """
    logger = trainer.logger
    if logger is None or isinstance(logger, (TensorBoardLogger, CSVLogger)):
        return str(trainer.log_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    folder = os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
    return trainer.strategy.broadcast(folder)


def write_new(folder: str, name: str, text: str, replaces: Callable[[str], bool] = lambda _: False) -> str:
    """Write a file under the first free name (``config.yaml``, ``config-v1.yaml``, ...) or reuse an equal one.

    Args:
        folder: Path or fsspec URL; created if missing.
        name: File name.
        text: Content to write.
        replaces: Predicate on the content of an existing file; if true, that file is replaced.

    Returns:
        Path of the file.

    Raises:
        OSError: If the file cannot be written.
    """
    fs, root = url_to_fs(folder)
    fs.makedirs(root, exist_ok=True)
    stem, suffix = os.path.splitext(name)
    for number in itertools.count():
        path = f"{root}/{stem}{f'-v{number}' if number else ''}{suffix}"
        try:
            with fs.open(path, "xb") as file:
                file.write(text.encode())
            return path
        except OSError as error:
            if not isinstance(error, FileExistsError):  # for example, a full disk
                with contextlib.suppress(OSError):
                    fs.rm_file(path)
                raise
            found = fs.cat_file(path).decode(errors="replace") if fs.isfile(path) else ""
        if found == text:
            return path
        if replaces(found):
            fs.mv(write_new(folder, f"{uuid.uuid4().hex}.part", text), path)
            return path
    raise AssertionError  # unreachable


def unversioned_loggers(trainer: Trainer) -> list[Any]:
    """Return the loggers that derive their version from existing folders; call before their ``log_dir`` is read."""
    return [
        logger
        for logger in trainer.loggers
        if isinstance(logger, (TensorBoardLogger, CSVLogger)) and logger._version is None
    ]


def claim_log_folder(trainer: Trainer, loggers: list[Any]) -> None:
    """Create the log folder of a run; a run that starts at the same moment takes the next version.

    Args:
        trainer: Trainer before its loggers are initialized; only rank zero creates the folder.
        loggers: Loggers of the trainer whose version may change.
    """
    folder = loggers[0].log_dir if loggers else ""
    if not folder or not trainer.is_global_zero or not _is_local_file_protocol(folder):
        return
    shared = [logger for logger in loggers if logger.log_dir == folder]
    while True:
        try:
            os.makedirs(loggers[0].log_dir)
            return
        except FileExistsError:
            for logger in shared:
                logger._version += 1


def keep_logging(trainer: Trainer) -> None:
    """Continue a fit when the disk is full for its loggers.

    Args:
        trainer: Trainer whose TensorBoard and CSV loggers are modified in place.
    """
    for logger in trainer.loggers:
        for kind, methods in _WRITING.items():
            for name in methods if isinstance(logger, kind) else ():
                setattr(logger, name, partial(write_if_space, logger, partial(getattr(type(logger), name), logger)))


def write_if_space(logger: Any, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Call a function that writes to a log; on a full disk, warn and drop the record.

    Args:
        logger: Logger that is written to.
        write: Function that writes.
        args: Positional arguments of the function.
        kwargs: Keyword arguments of the function.
    """
    folder = logger.log_dir if isinstance(logger, (TensorBoardLogger, CSVLogger)) else None
    if folder is None or not Path(folder).is_dir() or shutil.disk_usage(folder).free >= _LOG_SPACE:
        try:
            return write(*args, **kwargs)
        except Exception as error:
            if not is_disk_full(error):
                raise
            if isinstance(logger, TensorBoardLogger):
                logger._experiment = None  # it repeats its error forever; the next one writes a new file
    rank_zero_warn(f"no space left for the log in {folder}; the fit continues, and the log has a gap")

"""Log of the error that ends a process."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import platform
import subprocess
import time
import traceback
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lit_tokenformer.checkpoints.run_folder import run_folder
from lit_tokenformer.errors import UserError, from_process


class ErrorLog(Callback):
    """Write the error that ends a process to ``errors/rank_N.log`` in the run folder, with time, epoch and step.

    Settings rejected before the first training step are not logged.

    If Lightning launched the other processes of this machine and the first process fails, it waits a few seconds for
    their errors and then kills the remaining ones, which would otherwise block until their timeout.

    Args:
        seconds: Time to wait for the other processes, in seconds.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ErrorLog()], logger=False)
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds = seconds
        self.path: Path | None = None
        """Log file of the error; ``None`` without an error."""
        self.trained = False
        """Whether a training step has completed; later errors rarely come from the settings."""
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = Path(run_folder(trainer)) / "errors"  # collective

    def on_train_batch_end(self, *_: Any) -> None:
        self.trained = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, (SIGTERMException, KeyboardInterrupt)):
            return
        if self.trained or not isinstance(from_process(exception), (UserError, MisconfigurationException)):
            run = trainer.log_dir if trainer.world_size == 1 else None  # collective, see setup
            folder = self._folder or Path(run or trainer.default_root_dir) / "errors"
            path = folder / f"rank_{trainer.global_rank}.log"
            with contextlib.suppress(OSError):  # a full disk, which may be the reported error itself
                folder.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(_report(trainer, exception))
                self.path = path
        if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
            atexit.register(_end, trainer.strategy.launcher.procs, self.seconds)  # after the error is printed


def _end(processes: list[subprocess.Popen], seconds: float) -> None:
    until = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _report(trainer: Trainer, exception: BaseException) -> str:
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    place = f"process {trainer.global_rank} of {trainer.world_size} on {platform.node()}"
    return (
        f"{now}, {place}, epoch {trainer.current_epoch}, step {trainer.global_step}\n"
        + "".join(traceback.format_exception(exception))
        + "\n"
    )

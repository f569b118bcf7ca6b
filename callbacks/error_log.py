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
    """Writes the error that ends a process to ``errors/rank_N.log`` in the run's folder, with time, epoch and step.

    Settings that are refused before the first training step are not logged.

    Where Lightning started the other processes of this machine, the first one waits for their errors for some seconds
    when it ends with one itself, and ends those that are still there: they would wait for it until their timeout.

    Args:
        seconds: How long the other processes are waited for.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ErrorLog()], logger=False)
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds = seconds
        self.path: Path | None = None
        """The file with the error; None while there is none."""
        self.trained = False
        """Whether a training step has ended, after which an error is hardly one in the settings."""
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = Path(run_folder(trainer)) / "errors"  # asks all processes

    def on_train_batch_end(self, *_: Any) -> None:
        self.trained = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, (SIGTERMException, KeyboardInterrupt)):
            return
        if self.trained or not isinstance(from_process(exception), (UserError, MisconfigurationException)):
            run = trainer.log_dir if trainer.world_size == 1 else None  # of several processes, setup asks all
            folder = self._folder or Path(run or trainer.default_root_dir) / "errors"
            path = folder / f"rank_{trainer.global_rank}.log"
            with contextlib.suppress(OSError):  # of a full disk, which may be the error that is to be told
                folder.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(_report(trainer, exception))
                self.path = path
        if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
            atexit.register(_end, trainer.strategy.launcher.procs, self.seconds)  # when the error is on the screen


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

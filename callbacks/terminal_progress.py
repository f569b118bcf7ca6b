"""Progress of a run: a bar in a terminal, lines of text elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console
from rich.file_proxy import FileProxy

from lit_tokenformer.errors import UserError

_LOGGERS = ("", "lightning", "lightning.pytorch", "lightning.fabric")
"""Loggers whose lines appear above the bar."""


class TerminalProgress(RichProgressBar):
    """Show a progress bar in a terminal, and print a line of progress every few seconds to a pipe or file.

    Log lines, warnings and tables appear above the bar. The bar counts the batches of an epoch, or those up to
    ``max_steps`` in the last one. The command line uses this bar unless another one is configured.

    A line reports the optimizer step, steps per second and remaining time at the rate since the line before (validation
    included), and the metrics of the progress bar.

    Args:
        seconds: Time between two lines, in seconds.
        refresh_rate: Redraws of the bar per second; 0 disables bar and lines.

    Raises:
        UserError: If ``seconds`` is not positive.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TerminalProgress(seconds=60)], logger=False)
    """

    def __init__(self, seconds: float = 30.0, refresh_rate: int = 10) -> None:
        if not seconds > 0:
            raise UserError(f"seconds: expected more than 0, got {seconds}")
        super().__init__(refresh_rate=refresh_rate)
        self.seconds = seconds
        self._batches = 0  # of the current epoch, done
        self._epoch = self._step = 0
        self._since = self._printed = 0.0
        self._redirected: list[tuple[logging.StreamHandler[Any], Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._printed = time.monotonic()

    @property
    def is_enabled(self) -> bool:
        """Return whether there is a bar."""
        return super().is_enabled and _draws()

    @property
    def total_train_batches(self) -> int | float:
        """Batches of the current epoch, up to the end of the fit."""
        trainer, total = self.trainer, self.trainer.num_training_batches
        if trainer.max_steps < 0:
            return total
        each = trainer.accumulate_grad_batches
        left = (trainer.max_steps - trainer.global_step) * each - self._batches % each
        return min(total, self._batches + max(0, left))

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_epochs != -1:
            return super()._get_train_description(current_epoch)
        return f"Epoch {current_epoch}".ljust(len(self.validation_description))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._step, self._since = trainer.global_step, time.monotonic()
        self._printed = self._since

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = 0
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches, self._epoch = batch_idx + 1, trainer.current_epoch
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._is_due():
            self._print_step(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_validation_batch_end(trainer, *args, **kwargs)
        self._print_batch(self.validation_description, trainer.num_val_batches, *args[2:])

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_test_batch_end(trainer, *args, **kwargs)
        self._print_batch(self.test_description, trainer.num_test_batches, *args[2:])

    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_predict_batch_end(trainer, *args, **kwargs)
        self._print_batch(self.predict_description, trainer.num_predict_batches, *args[2:])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_progress()  # reports of other callbacks follow
        if self._prints and trainer.global_step > self._step:
            self._print_step(trainer, pl_module)

    @property
    def _prints(self) -> bool:
        return super().is_enabled and not _draws()

    def _is_due(self) -> bool:
        return self._prints and time.monotonic() - self._printed >= self.seconds

    def _print_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now, step, total = time.monotonic(), trainer.global_step, trainer.estimated_stepping_batches
        rate = (step - self._step) / max(now - self._since, 1e-9)
        facts = [f"epoch {self._epoch}, step {step}" + (f" of {total}" if math.isfinite(total) else "")]
        if rate > 0:
            facts.append(f"{rate:.3g} steps/s")
            if step < total < math.inf:
                facts.append(f"ETA {timedelta(seconds=round((total - step) / rate))}")
        for name, value in self.get_metrics(trainer, pl_module).items():
            facts.append(f"{name} {value:.4g}" if isinstance(value, (int, float)) else f"{name} {value}")
        print(", ".join(facts), flush=True)
        self._step, self._since, self._printed = step, now, now

    def _print_batch(self, name: str, batches: list[Any], batch: Any, batch_idx: int, loader: int = 0) -> None:
        if self._is_due():
            print(f"{name}: batch {batch_idx + 1} of {batches[loader]}", flush=True)
            self._printed = time.monotonic()

    def _init_progress(self, trainer: Trainer) -> None:
        output = sys.stderr
        super()._init_progress(trainer)
        if not isinstance(sys.stderr, FileProxy) or sys.stderr is output:
            return  # no bar, or an earlier one
        if not output.isatty():
            sys.stderr = output  # Rich redirects it to the terminal even if it is a file
            return
        for handler in [handler for name in _LOGGERS for handler in logging.getLogger(name).handlers]:
            if isinstance(handler, logging.StreamHandler) and handler.stream is output:
                self._redirected.append((handler, handler.setStream(sys.stderr)))

    def _stop_progress(self) -> None:
        super()._stop_progress()
        for handler, output in self._redirected:
            handler.setStream(output)
        self._redirected.clear()


def _draws() -> bool:
    """Return whether the output can redraw a line."""
    console = get_console()
    return console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)

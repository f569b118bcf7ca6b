"""Progress bar whose metrics are read from the device at log steps only."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class LogStepProgressBar(RichProgressBar):
    """Advance at each batch, and update the metrics every ``log_every_n_steps``.

    Lightning's bars read metrics logged with ``prog_bar`` at each batch, and each reading waits for the device. The
    command line adds this bar to every fit without one.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LogStepProgressBar()], logger=False)
    """

    _shown: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._shown = None  # the first batch shows the loss at once

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        if self._shown is None or not trainer.training or trainer._logger_connector.should_update_logs:
            self._shown = super().get_metrics(trainer, pl_module)
        return self._shown

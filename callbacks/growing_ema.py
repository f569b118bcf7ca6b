"""An exponential moving average of the weights that grows with the model."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from lit_tokenformer.errors import UserError
from lit_tokenformer.growth import grow


class GrowingEMA(EMAWeightAveraging):
    """Keeps an exponential moving average of weights and buffers; validation and the end of a fit use the average.

    When :class:`~callbacks.ParameterGrowthCallback` grows the model, the average grows by the same new rows. A growth
    that keeps the model's function keeps the average's as well.

    Args:
        decay: Share of the average that stays at each update, once warmed up; 0.9999 is that of DeiT and MAE.
        warmup: Whether the n-th update keeps at most (1 + n) / (10 + n), so that the average of a short fit does not
            consist of the weights at birth.
        device: Where the average is stored; left out, where the model is.
        update_every_n_steps: Optimizer steps from one update to the next; 0 updates at the ends of epochs only.
        update_starting_at_step: Optimizer step of the first update.
        update_starting_at_epoch: Epoch from whose end on the average is also updated at each end of an epoch.

    Raises:
        ValueError: For settings out of range.

    Note:
        A checkpoint holds the averaged weights as its ``state_dict``, so that ``validate``, ``test`` and ``predict``
        use them, and the trained weights beside them; a fit that resumes from it goes on from both.
        The average has the precision of the weights: under ``bf16-true`` changes of a ten-thousandth are lost.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from callbacks import ParameterGrowthCallback
        >>> trainer = Trainer(callbacks=[ParameterGrowthCallback({10: 192}), GrowingEMA(decay=0.999)], logger=False)
    """

    def __init__(
        self,
        decay: float = 0.9999,
        warmup: bool = True,
        device: str | None = None,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
    ) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"decay: expected at least 0 and less than 1, got {decay}")
        for setting, value in (
            ("update_every_n_steps", update_every_n_steps),
            ("update_starting_at_step", update_starting_at_step or 0),
            ("update_starting_at_epoch", update_starting_at_epoch or 0),
        ):
            if value < 0:
                raise UserError(f"{setting}: expected at least 0, got {value}")
        if update_every_n_steps == 0 and update_starting_at_epoch is None:
            raise UserError("update_every_n_steps: 0 needs update_starting_at_epoch, or nothing would be averaged")
        super().__init__(
            device=device,
            decay=decay,
            update_every_n_steps=update_every_n_steps,
            update_starting_at_step=update_starting_at_step,
            update_starting_at_epoch=update_starting_at_epoch,
        )
        self.decay = decay
        self.warmup = warmup
        # Lightning's average of two equal numbers is not always that number; tau would drift
        self._kwargs = {"multi_avg_fn": partial(_moving_average, decay, warmup)}
        self._swapped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._average_model = None  # that of an earlier fit would be swapped in by a later validation
        self._swapped = False
        with warnings.catch_warnings():  # tasks divide themselves under one strategy only, and refuse an average there
            warnings.filterwarnings("ignore", ".*configure_model.*")
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The average was copied before Lightning gave the model its precision."""
        assert self._average_model is not None
        average = self._average_model.module.state_dict(keep_vars=True)
        for name, own in pl_module.state_dict().items():
            average[name].data = average[name].data.to(own.dtype)

    def on_parameter_growth(self, trainer: Trainer, pl_module: LightningModule, event: dict[str, Any]) -> None:
        """Grows the average as the model was grown; the generators are seeded, so the new rows are the same.

        Args:
            trainer: The trainer.
            pl_module: The model, grown already.
            event: What was done: ``after`` (totals), ``method``, ``noise`` and ``seed``.
        """
        assert self._average_model is not None
        average: Any = self._average_model.module
        grow(average, event["after"], event["method"], noise=event["noise"], seed=event["seed"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing yet: a checkpoint may still be saved, and it shall hold the trained weights too."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._copy_average_to_current(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._swapped:  # in the middle of a validation; a checkpoint saved now shall not mix up the two
            self._swap_models(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is not None:  # else the averaged weights are loaded already, and all that is needed
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _swap_models(self, pl_module: LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped


@torch.no_grad()
def _moving_average(
    decay: float, warmup: bool, average: list[Tensor], current: list[Tensor], num_averaged: Tensor | int
) -> None:
    """What ``AveragedModel`` calls with averaged and current tensors of one dtype."""
    if not average[0].is_floating_point():
        torch._foreach_copy_(average, current)
        return
    updates = int(num_averaged)
    kept = min(decay, (1 + updates) / (10 + updates)) if warmup else decay
    torch._foreach_lerp_(average, current, 1 - kept)  # exact where both are equal

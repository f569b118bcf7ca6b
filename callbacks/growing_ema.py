"""Exponential moving average of the weights that grows with the model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.core.mixins import HyperparametersMixin
from torch import Tensor

from lit_tokenformer.errors import UserError
from lit_tokenformer.growth import grow
from lit_tokenformer.growth.shrink import Order, reorder_units


class GrowingEMA(EMAWeightAveraging, HyperparametersMixin):
    """Exponential moving average of weights and buffers, used for validation and copied to the model after the fit.

    When :class:`~callbacks.ParameterGrowthCallback` grows the model, the average grows by the same new rows. A
    function-preserving growth preserves the function of the average as well.

    Args:
        decay: EMA decay after warm-up; 0.9999 is the value of DeiT and MAE.
        warmup: Whether to limit the decay of the n-th update to (1 + n) / (10 + n), so that the initial weights do not
            dominate the average of a short fit.
        device: Device of the average; the model's device by default.
        update_every_n_steps: Optimizer steps between updates; 0 updates at epoch ends only.
        update_starting_at_step: Optimizer step of the first update.
        update_starting_at_epoch: First epoch at whose end the average is also updated.

    Raises:
        ValueError: For settings out of range.

    Note:
        A checkpoint contains the averaged weights as its ``state_dict``, which ``validate``, ``test`` and ``predict``
        use, and the trained weights under a separate key. A resumed fit restores both. The average has the precision of
        the weights: under ``bf16-true`` relative changes of 1e-4 are lost.

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
        self.save_hyperparameters()
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
            raise UserError("update_every_n_steps: 0 needs update_starting_at_epoch, otherwise nothing is averaged")
        super().__init__(
            device=device,
            decay=decay,
            update_every_n_steps=update_every_n_steps,
            update_starting_at_step=update_starting_at_step,
            update_starting_at_epoch=update_starting_at_epoch,
        )
        self.decay = decay
        self.warmup = warmup
        # Lightning's average of two equal values is not exact, so tau would drift
        self._kwargs = {"multi_avg_fn": self._update}
        self._swapped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._average_model = None  # otherwise a later validation would swap in the average of an earlier fit
        self._swapped = False
        with warnings.catch_warnings():  # tasks shard under one strategy only, and reject weight averaging there
            warnings.filterwarnings("ignore", ".*configure_model.*")
            super().setup(trainer, pl_module, stage)
        average: Any = self._average_model
        if average is not None:
            average.n_averaged = average.n_averaged.cpu()  # on a device, each look at it would wait for the device

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cast the average to the model's precision, which Lightning sets after the average is copied."""
        assert self._average_model is not None
        average = self._average_model.module.state_dict(keep_vars=True)
        for name, own in pl_module.state_dict().items():
            average[name].data = average[name].data.to(own.dtype)

    def on_parameter_growth(self, trainer: Trainer, pl_module: LightningModule, event: dict[str, Any]) -> None:
        """Grow the average like the model; seeded generators yield the same new rows.

        Args:
            trainer: The trainer.
            pl_module: The grown model.
            event: The growth: ``after`` (totals), ``method``, ``noise`` and ``seed``.
        """
        assert self._average_model is not None
        average: Any = self._average_model.module
        grow(average, event["after"], event["method"], noise=event["noise"], seed=event["seed"])

    def on_unit_order(self, trainer: Trainer, pl_module: LightningModule, order: Order) -> None:
        """Reorder the units of the average like the model's; see :class:`~callbacks.NestedSizes`."""
        assert self._average_model is not None
        reorder_units(self._average_model.module, order)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Defer the swap to ``on_fit_end``: a checkpoint saved in between contains the trained weights too."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._copy_average_to_current(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._swapped:  # during validation; keep trained and averaged weights apart in the checkpoint
            self._swap_models(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is not None:  # otherwise the averaged weights suffice and are already loaded
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _swap_models(self, pl_module: LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped

    def _update(self, average: list[Tensor], current: list[Tensor], num_averaged: Tensor | int) -> None:
        assert self._average_model is not None
        _moving_average(self.decay, self.warmup, average, current, self._average_model.n_averaged)  # on the host


@torch.no_grad()
def _moving_average(
    decay: float, warmup: bool, average: list[Tensor], current: list[Tensor], num_averaged: Tensor | int
) -> None:
    """Update averaged tensors in place from current tensors of the same dtype, as ``AveragedModel`` expects."""
    if not average[0].is_floating_point():
        torch._foreach_copy_(average, current)
        return
    updates = int(num_averaged)
    kept = min(decay, (1 + updates) / (10 + updates)) if warmup else decay
    torch._foreach_lerp_(average, current, 1 - kept)  # exact where both are equal

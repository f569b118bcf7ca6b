"""Schedule of the patch drop rate during training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.mixins import HyperparametersMixin

from callbacks.schedules import Key, check_end, check_last_step, checked_keys, position
from lit_tokenformer.errors import UserError
from lit_tokenformer.models import Tokenformer


class PatchDropSchedule(HyperparametersMixin, Callback):
    """Schedule the share of image patches that training drops at random (arXiv 2212.00794, 2208.07220).

    The initial rate is ``patch_drop_rate`` of the architecture. The cost of a step decreases with the number of
    patches, and ``cost()`` of the task follows. Combined with growth, it keeps image sequences short while the model is
    small.

    Args:
        schedule: ``{epoch: rate}``, zero-indexed and in increasing order: the share of patches dropped from there on, 0
            for none.
        unit: Unit of the keys of ``schedule``: ``epoch``, or ``step`` (optimizer steps).

    Raises:
        ValueError: For keys out of order or rates outside [0, 1). When a fit starts, if no model has an image stem or
            if a key is beyond the end of the fit.

    Note:
        Other callbacks that define ``on_cost_change(trainer, pl_module)`` are called after each change.

    Example:
        >>> PatchDropSchedule({10: 0.25, 20: 0.0}).rate_at(15)
        0.25
    """

    def __init__(self, schedule: dict[Key, float], unit: str = "epoch") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.schedule: dict[int, float] = checked_keys(schedule, unit)
        for key, rate in self.schedule.items():
            if not 0 <= rate < 1:
                raise UserError(f"schedule: {unit} {key}: expected a rate in [0, 1), got {rate}")
        self.unit = unit
        self._initial = self._rate = 0.0

    def rate_at(self, position: int) -> float:
        """Return the rate at an epoch or optimizer step."""
        return next((rate for key, rate in reversed(self.schedule.items()) if position >= key), self._initial)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        rates = [model.config.patch_drop_rate for model in _models(pl_module)]
        if not rates:
            raise UserError("schedule: no model has an image stem (stem: patch), so no patches can be dropped")
        if len(set(rates)) > 1:
            raise UserError(f"schedule: expected one initial patch_drop_rate for all models, got {rates}")
        self._initial = self._rate = rates[0]
        check_end(self.schedule, self.unit, trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_last_step(self.schedule, self.unit, trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        rate = self.rate_at(position(trainer, self.unit))
        if rate == self._rate:
            return
        self._rate = rate
        for model in _models(pl_module):
            model.set_patch_drop_rate(rate)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "on_cost_change"):
                callback.on_cost_change(trainer, pl_module)


def _models(pl_module: LightningModule) -> Iterator[Tokenformer]:
    """Yield the models with an image stem."""
    for model in pl_module.modules():
        if isinstance(model, Tokenformer) and model.config.stem == "patch":
            yield model

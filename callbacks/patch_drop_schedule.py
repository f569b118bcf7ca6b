"""How much of each image a model trains on, as training goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.schedules import Key, check_end, check_last_step, checked_keys, position
from lit_tokenformer.errors import UserError
from lit_tokenformer.models import Tokenformer


class PatchDropSchedule(Callback):
    """Trains on random patches of each image at first, and on more of them later (arXiv 2212.00794, 2208.07220).

    The share that is left out at birth is ``patch_drop_rate`` of the architecture. What a step costs falls with the
    patches; ``cost()`` of the task follows. Beside a growth it is how images stay short while the model is small.

    Args:
        schedule: ``{epoch: rate}``, zero-indexed and in rising order: the share of the patches that is left out from
            there on, 0 for none.
        unit: What the keys of ``schedule`` count: ``epoch``, or ``step`` (optimizer steps).

    Raises:
        ValueError: For keys out of order or rates outside of [0, 1); and when a fit starts, if no model reads images or
            if a key is beyond its end.

    Note:
        Other callbacks that define ``on_cost_change(trainer, pl_module)`` are told of each change.

    Example:
        >>> PatchDropSchedule({10: 0.25, 20: 0.0}).rate_at(15)
        0.25
    """

    def __init__(self, schedule: dict[Key, float], unit: str = "epoch") -> None:
        self.schedule: dict[int, float] = checked_keys(schedule, unit)
        for key, rate in self.schedule.items():
            if not 0 <= rate < 1:
                raise UserError(f"schedule: {unit} {key}: expected a rate in [0, 1), got {rate}")
        self.unit = unit
        self._birth = self._rate = 0.0

    def rate_at(self, position: int) -> float:
        """The rate at an epoch or step."""
        return next((rate for key, rate in reversed(self.schedule.items()) if position >= key), self._birth)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        rates = [model.config.patch_drop_rate for model in _models(pl_module)]
        if not rates:
            raise UserError("schedule: no model reads images, so no patches can be left out")
        if len(set(rates)) > 1:
            raise UserError(f"schedule: the models begin with different patch_drop_rates ({rates})")
        self._birth = self._rate = rates[0]
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
    """Models that read images."""
    for model in pl_module.modules():
        if isinstance(model, Tokenformer) and model.config.stem == "patch":
            yield model

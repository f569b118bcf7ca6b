"""What callbacks with a schedule have in common: keys count epochs or optimizer steps, and all lie within the fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_tokenformer.errors import UserError, unknown_name

LIMITS = {"epoch": "max_epochs", "step": "max_steps"}
"""Units of the keys, with the trainer's setting that ends a fit."""


Key = int | str
"""Key of a schedule: an epoch or optimizer step, or its digits, as JSON has them.

Not ``int`` alone: jsonargparse casts such keys, and 1.5 would become 1.
"""


def checked_keys(schedule: Any, unit: str) -> dict[int, Any]:
    """Check that the keys of a schedule are epochs or steps in rising order.

    Args:
        schedule: What the user gave.
        unit: What its keys count.

    Returns:
        The schedule, its keys as whole numbers.

    Raises:
        UserError: For an unknown unit, and for keys that are no whole numbers of at least 0 or do not rise.
    """
    if unit not in LIMITS:
        raise unknown_name("unit", unit, tuple(LIMITS))
    if not isinstance(schedule, Mapping):
        raise UserError(f"schedule: expected a mapping by {unit}, got {schedule!r}")
    checked: dict[int, Any] = {}
    last = -1
    for given, value in schedule.items():
        key = int(given) if isinstance(given, str) and given.isdecimal() else given
        if isinstance(key, bool) or not isinstance(key, int) or key < 0:
            raise UserError(f"schedule: expected a whole number of at least 0 as {unit}, got {given!r}")
        if key <= last:
            raise UserError(f"schedule: {unit} {key} stands after {unit} {last}; keys must rise")
        checked[key] = value
        last = key
    return checked


def check_end(schedule: Mapping[int, Any], unit: str, trainer: Any) -> None:
    """Refuses keys beyond the fit's end, as far as the trainer's settings tell it.

    Raises:
        ValueError: If there are any, but for a ``fast_dev_run``, which ends early whatever is scheduled.
    """
    limit = getattr(trainer, LIMITS[unit])
    beyond = [key for key in schedule if limit is not None and 0 <= limit <= key]
    if beyond and not trainer.fast_dev_run:
        raise UserError(f"schedule: {unit} {beyond[0]} is beyond the end of the fit (trainer.{LIMITS[unit]}={limit})")


def check_last_step(schedule: Mapping[int, Any], unit: str, trainer: Any) -> None:
    """Refuses steps beyond the fit's end once its data tell how many there are.

    Raises:
        ValueError: If there are any, but for a ``fast_dev_run``.
    """
    if unit != "step" or trainer.fast_dev_run:
        return
    total = trainer.estimated_stepping_batches
    beyond = [key for key in schedule if key >= total]
    if beyond:
        raise UserError(f"schedule: step {beyond[0]} is beyond the end of the fit ({total} optimizer steps)")


def position(trainer: Any, unit: str) -> int:
    """The epoch or optimizer step that a fit has reached."""
    return int(trainer.current_epoch if unit == "epoch" else trainer.global_step)

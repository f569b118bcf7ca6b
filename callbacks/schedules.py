"""Validation of callback schedules: keys are epochs or optimizer steps within the fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_tokenformer.errors import UserError, unknown_name

LIMITS = {"epoch": "max_epochs", "step": "max_steps"}
"""Units of the keys, with the trainer setting that limits a fit."""


Key = int | str
"""Key of a schedule: an epoch or optimizer step, as an integer or a string of digits (JSON).

Not plain ``int``: jsonargparse casts such keys, so 1.5 would become 1.
"""


def checked_keys(schedule: Any, unit: str) -> dict[int, Any]:
    """Validate that the keys of a schedule are epochs or steps in increasing order.

    Args:
        schedule: The user's schedule.
        unit: Unit of its keys.

    Returns:
        The schedule with integer keys.

    Raises:
        UserError: For an unknown unit, and for keys that are not non-negative integers in increasing order.
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
            raise UserError(f"schedule: expected a non-negative integer as {unit}, got {given!r}")
        if key <= last:
            raise UserError(f"schedule: keys must increase (got {unit} {key} after {unit} {last})")
        checked[key] = value
        last = key
    return checked


def check_end(schedule: Mapping[int, Any], unit: str, trainer: Any) -> None:
    """Reject keys beyond the end of the fit, as far as the trainer's settings determine it.

    Raises:
        ValueError: If there are any, except under ``fast_dev_run``.
    """
    limit = getattr(trainer, LIMITS[unit])
    beyond = [key for key in schedule if limit is not None and 0 <= limit <= key]
    if beyond and not trainer.fast_dev_run:
        raise UserError(f"schedule: {unit} {beyond[0]} is beyond the end of the fit (trainer.{LIMITS[unit]}={limit})")


def check_last_step(schedule: Mapping[int, Any], unit: str, trainer: Any) -> None:
    """Reject steps beyond the end of the fit, once the data determine the number of steps.

    Raises:
        ValueError: If there are any, except under ``fast_dev_run``.
    """
    if unit != "step" or trainer.fast_dev_run:
        return
    total = trainer.estimated_stepping_batches
    beyond = [key for key in schedule if key >= total]
    if beyond:
        raise UserError(f"schedule: step {beyond[0]} is beyond the end of the fit ({total} optimizer steps)")


def position(trainer: Any, unit: str) -> int:
    """Return the current epoch or optimizer step of a fit."""
    return int(trainer.current_epoch if unit == "epoch" else trainer.global_step)

"""Validation of callback schedules: keys are epochs or optimizer steps within the fit."""

from __future__ import annotations

import re
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


def multiplied(
    schedule: Mapping[int, Any], initial: Mapping[str, int] | None, setting: str = "schedule"
) -> dict[int, Any]:
    """Replace multiples such as ``1.5x`` in a schedule by totals.

    Args:
        schedule: Sizes by key.
        initial: Size at which the fit begins; ``None``, as long as it is unknown, drops the multiples.
        setting: Name of the setting in errors.

    Raises:
        UserError: For text that is not a multiple of at least 1.

    Example:
        >>> multiplied({10: {"depth": "1.5x", "heads": 8}, 20: 64}, {"depth": 12, "heads": 4})
        {10: {'depth': 18, 'heads': 8}, 20: 64}
    """
    found: dict[int, Any] = {}
    for key, sizes in schedule.items():
        found[key] = sizes
        if not isinstance(sizes, Mapping):
            continue
        found[key] = dict(sizes)
        for kind, size in sizes.items():
            if not isinstance(size, str):
                continue
            if not re.fullmatch(r"[0-9]+(\.[0-9]+)?x", size) or float(size[:-1]) < 1:
                raise UserError(f"{setting} {key}: {kind}: expected a total or a multiple such as 2x, got {size!r}")
            if initial is None:
                del found[key][kind]
            elif kind in initial:  # otherwise the kind is rejected
                found[key][kind] = round(float(size[:-1]) * initial[kind])
    return found


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

"""Output of the command line: progress bar, model table, log lines."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch.callbacks import ModelSummary, ProgressBar

from callbacks import ModelTable, TerminalProgress

_ADVERTISEMENT = "💡 Tip"
"""Start of Lightning's log lines about services."""


def add_displays(config: dict[str, Any]) -> None:
    """Add progress bar and model table to the settings of a trainer that does not define its own.

    The bar is the first callback: when a fit ends, it stops before the others report.

    Args:
        config: Arguments of the trainer, changed in place.
    """
    if config.get("barebones"):
        return
    given = config.get("callbacks") or []
    callbacks = list(given) if isinstance(given, (list, tuple)) else [given]
    if config.get("enable_progress_bar") is not False and not _has(callbacks, ProgressBar):
        callbacks.insert(0, TerminalProgress())
    if config.get("enable_model_summary") is not False and not _has(callbacks, ModelSummary):
        callbacks.append(ModelTable())
        config["enable_model_summary"] = False  # replaced
    config["callbacks"] = callbacks


def _has(callbacks: list[Any], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def hide_advertisements() -> None:
    """Remove Lightning's advertisements from its log."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_ADVERTISEMENT)

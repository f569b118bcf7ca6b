"""Output of the command line: progress bar, model table, log lines."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelSummary, ProgressBar

import callbacks as own_callbacks
from callbacks import ModelTable, TerminalProgress

_ADVERTISEMENT = "💡 Tip"
"""Start of Lightning's log lines about services."""

_OWN = (str(Path(__file__).parents[1]), str(Path(own_callbacks.__file__).parent))
"""Folders of the modules of this project."""

_format_warning = warnings.formatwarning


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


def shorten_warnings() -> None:
    """Print warnings of this project without file and source line."""
    warnings.formatwarning = _short_warning


def _short_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if filename.startswith(_OWN) and issubclass(category, UserWarning):
        return f"warning: {message}\n"
    return _format_warning(message, category, filename, lineno, line)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_ADVERTISEMENT)

"""Settings that the data modules share, nested in YAML; their flat names are accepted too."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lit_tokenformer.errors import UserError

FLAT_NAMES = {
    **{name: f"loader.{name}" for name in ("batch_size", "eval_batch_size", "num_workers", "pin_memory")},
    **{f"hf_{name}": f"hub.{name}" for name in ("name", "config", "train_split", "val_split")},
    **{f"hf_{name}": f"hub.{name}" for name in ("image_column", "label_column")},
    **{name: f"hub.{name}" for name in ("streaming", "shuffle_buffer")},
}
"""Nested settings by their flat names: ``batch_size: 8`` is ``loader: {batch_size: 8}``."""


@dataclass(frozen=True)
class LoaderSettings:
    """Batches of a process."""

    batch_size: int | None = None
    """Training batch size per process. Default: 32; 16 for causal language modeling."""
    eval_batch_size: int | None = None
    """Batch size of validation, test and prediction per process. Default: batch_size."""
    num_workers: int | None = None
    """Number of worker processes per training process. Default: the available cores divided by the training processes
    on this machine, at most 8; 0 for a single core and for data in memory or in a memory map."""
    pin_memory: bool | None = None
    """Whether to copy batches into page-locked memory. Default: true with CUDA."""

    def __post_init__(self) -> None:
        check_whole(batch_size=(self.batch_size, 1), eval_batch_size=(self.eval_batch_size, 1))
        check_whole(num_workers=(self.num_workers, 0))


@dataclass(frozen=True)
class HubSettings:
    """Hugging Face data set (dataset: huggingface)."""

    name: str | None = None
    """Name of the data set on the hub or its folder, or a builder such as imagefolder, text, json and parquet."""
    config: str | None = None
    """Configuration of the data set."""
    train_split: str = "train"
    """Training split."""
    val_split: str | None = None
    """Validation split. Default: validation, valid, val or dev, if present."""
    streaming: bool = False
    """Whether to stream the data set, or files of text, instead of storing it."""
    shuffle_buffer: int = 1000
    """Shuffle buffer size of a stream, in images or documents, per worker."""

    def __post_init__(self) -> None:
        check_whole(shuffle_buffer=(self.shuffle_buffer, 1))


@dataclass(frozen=True)
class HubImageSettings(HubSettings):
    """Hugging Face data set of images (dataset: huggingface)."""

    image_column: str | None = None
    """Image column. Default: the only column of images."""
    label_column: str | None = None
    """Label column: class labels, integers or text. Default: the first column of class labels."""


def check_whole(**settings: tuple[int | None, int]) -> None:
    """Raise a ``UserError`` for a number that is too small; each setting is a value (None is valid) and its minimum."""
    for name, (value, low) in settings.items():
        if value is not None and value < low:
            raise UserError(f"data.{name}: expected a whole number of {low} or more, got {value}")


def check_share(below_one: bool = True, **settings: float) -> None:
    """Raise a ``UserError`` for a value that is not from 0 to 1, or that is 1 with ``below_one``."""
    for name, value in settings.items():
        if not 0 <= value <= 1 or (below_one and value == 1):
            raise UserError(f"data.{name}: expected a share from 0 to {'below ' * below_one}1, got {value}")


def flat_settings(hub: HubSettings) -> dict[str, Any]:
    """Return the location and splits of a data set by the flat names of the settings."""
    names = {flat: name.removeprefix("hub.") for flat, name in FLAT_NAMES.items() if flat != "shuffle_buffer"}
    return {flat: getattr(hub, name) for flat, name in names.items() if hasattr(hub, name)}


def accept_flat_names(init: Callable[..., None]) -> Callable[..., None]:
    """Accept nested settings by their flat names (``FLAT_NAMES``) in a constructor."""
    parameters = inspect.signature(init).parameters

    @wraps(init)
    def nested(self: Any, *args: Any, **kwargs: Any) -> None:
        for flat in [name for name in kwargs if name in FLAT_NAMES]:
            group, _, field = FLAT_NAMES[flat].partition(".")
            settings: Any = kwargs.get(group, parameters[group].default if group in parameters else None)
            if hasattr(settings, field):  # else it is an argument of a base class, or unexpected
                kwargs[group] = replace(settings, **{field: kwargs.pop(flat)})
        init(self, *args, **kwargs)

    return nested


class FlatNameParser(ArgumentParser):
    """Parser that accepts the flat names of a data module's nested settings."""

    def parse_args(self, args: Any = None, *others: Any, **settings: Any) -> Any:
        """Parse arguments; those of a data module include the flat names of its nested settings."""
        if isinstance(args, list):
            args = [re.sub(r"^--(\w+)(?==)", lambda name: f"--{self._nested(name[1])}", arg) for arg in args]
            if getattr(self, "_inner_parser", False):  # jsonargparse writes a null that it has parsed as None
                args = [re.sub("=None$", "=null", arg) for arg in args]
        return super().parse_args(args, *others, **settings)

    def parse_object(self, cfg_obj: Any, *others: Any, **settings: Any) -> Any:
        """Parse a mapping; that of a data module may contain the flat names of its nested settings."""
        if isinstance(cfg_obj, Namespace):
            for name in [key for key in vars(cfg_obj) if self._nested(key) != key]:
                cfg_obj[self._nested(name)] = cfg_obj.pop(name)
        return super().parse_object(cfg_obj, *others, **settings)

    def _nested(self, name: str) -> str:
        """Return the name of the nested setting with a flat name, or the name if it is that of an option."""
        actions: list[Any] = self._actions
        options = {action.dest for action in actions}
        nested = FLAT_NAMES.get(name, name)
        return nested if nested in options and name not in options else name

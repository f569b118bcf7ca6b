"""Image columns of Hugging Face data sets, checked before work starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_tokenformer.data.hub import first_line, load_hub_data, named_splits, own_folders
from lit_tokenformer.data.images.folders import SPLITS
from lit_tokenformer.data.images.samples import UNLABELED, HubSamples
from lit_tokenformer.errors import UserError

_NO_LABEL = (None, -1, "")
_LABELS = ("label", "labels", "class", "target")
"""Usual names of a column of class labels without class names."""


@dataclass
class HubStream:
    """Streamed split of a Hugging Face data set."""

    rows: Any
    columns: tuple[str, str]
    folders: tuple[str, ...] = ()
    """Allowed folders of the files that it references."""


def open_hub(settings: Any) -> tuple[list[str], dict[str, Any], int | None]:
    """Load the splits of a Hugging Face data set, for a ``SourceSettings``.

    Returns:
        Class names; the samples or streams of train and, if present, val and test; and the number of training images,
        None for a stream of unknown length.
    """
    import datasets  # takes a second

    try:
        loaded = load_hub_data(settings.hf_name, settings.hf_config, settings.root, streaming=settings.streaming)
    except (OSError, ValueError, RuntimeError) as error:  # not found, offline, wrong config: its first line is specific
        raise UserError(f"data.hf_name: cannot load {settings.hf_name!r}: {first_line(error)}") from error
    names = named_splits(loaded, settings, SPLITS["val"])
    train = loaded[names["train"]]
    columns = _image_column(settings.hf_image_column, train), _label_column(settings.hf_label_column, train)
    class_names = getattr(train.features[columns[1]], "names", None)
    if class_names is None and settings.streaming:
        raise UserError(f"data.hf_label_column: a stream needs class names, column {columns[1]!r} has none")
    if class_names is not None:
        values: list[Any] = list(range(len(class_names)))
    else:
        values = sorted({value for value in train[columns[1]] if value not in _NO_LABEL})
    folders = own_folders(settings.hf_name, settings.root)
    found: dict[str, Any] = {}
    for split, name in names.items():
        rows = loaded[name]
        if settings.streaming:
            found[split] = HubStream(rows.cast_column(columns[0], datasets.Image(decode=False)), columns, folders)
            continue
        images = rows.select_columns([columns[0]]).cast_column(columns[0], datasets.Image(decode=False))
        chunks = images.with_format("arrow")[:][columns[0]].chunks  # of {"bytes", "path"}; without a copy
        nulls = [[part.is_null().to_numpy(zero_copy_only=False) for part in chunk.flatten()] for chunk in chunks]
        empty = np.concatenate([np.zeros(0, dtype=bool), *map(np.logical_and.reduce, nulls)])
        _refuse("image", columns[0], name, np.flatnonzero(empty), [None] * len(empty))
        found[split] = HubSamples(images, _labels(rows, columns[1], values, split, name), folders)
    info = (train.info.splits or {}).get(names["train"]) if settings.streaming else None
    return [str(name) for name in class_names or values], found, info.num_examples if info else None


def _labels(rows: Any, column: str, values: list[Any], split: str, name: str) -> np.ndarray:
    """Return the number of each row's class, (N,) int64; all -1 for an unlabeled test split."""
    if split == "test" and column not in rows.column_names:
        return np.full(len(rows), UNLABELED)
    numbers = {value: number for number, value in enumerate(values)}
    found = rows.select_columns([column])[:][column]
    labels = np.array([numbers.get(value, UNLABELED) for value in found], dtype=np.int64)
    if not (split == "test" and all(value in _NO_LABEL for value in found)):
        _refuse("label", column, name, np.flatnonzero(labels == UNLABELED), found)
    return labels


def _refuse(what: str, column: str, split: str, rows: np.ndarray, values: Sequence[Any]) -> None:
    """Raise an error for rows with an unusable value."""
    if len(rows):
        raise UserError(
            f"data.hf_{what}_column: {split}, row {rows[0]}, column {column!r}: not a known {what} (got "
            f"{values[rows[0]]!r}); so have {len(rows)} of {len(values)} rows, remove them"
        )


def _image_column(name: str | None, rows: Any) -> str:
    found = _columns("image", name, rows, "images (Image)", lambda feature: type(feature).__name__ == "Image")
    if len(found) > 1:
        raise UserError(f"data.hf_image_column: expected one of several columns of images: {', '.join(found)}")
    return found[0]


def _label_column(name: str | None, rows: Any) -> str:
    """Return the given column, else the first one with class names, else the first one with a usual name."""
    found = _columns("label", name, rows, "class labels (ClassLabel, integers or text)", _is_label)
    named = [column for column in found if hasattr(rows.features[column], "names")]
    usual = [column for column in found if column in _LABELS or column == name]
    if not named + usual:
        raise UserError(f"data.hf_label_column: expected one of the columns {', '.join(found)}, got none")
    return (named + usual)[0]


def _is_label(feature: Any) -> bool:
    return hasattr(feature, "names") or getattr(feature, "dtype", "").startswith(
        ("int", "uint", "string", "large_string", "bool")
    )


def _columns(what: str, name: str | None, rows: Any, kind: str, is_kind: Callable[[Any], bool]) -> list[str]:
    """Return the columns of a kind, or the one with a name."""
    features = rows.features or {}
    listed = ", ".join(f"{column} ({_kind(feature)})" for column, feature in features.items()) or "none known"
    if name is not None and name not in features:
        raise UserError(f"data.hf_{what}_column: no column {name!r}; the columns are {listed}")
    found = [column for column in ([name] if name else features) if is_kind(features[column])]
    if not found:
        got = f", got {name!r}" if name else ""
        raise UserError(f"data.hf_{what}_column: expected a column of {kind}{got}; the columns are {listed}")
    return found


def _kind(feature: Any) -> str:
    kind = type(feature).__name__
    return feature.dtype if kind == "Value" else kind

"""Hugging Face data sets, restricted to local files in their own folders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from lit_tokenformer.errors import UserError


def load_hub_data(
    name: str,
    config: str | None = None,
    data_dir: str | None = None,
    data_files: Mapping[str, Sequence[str]] | None = None,
    streaming: bool = False,
) -> Any:
    """Load a data set with ``datasets.load_dataset`` after checking the files it would read.

    A data set lists its files in its ``README.md``, and the library accepts any path there. Those of ``data_files`` are
    the user's own.

    Raises:
        ValueError: If the data set itself references a file outside of its folders.
    """
    import datasets  # takes a second

    if not data_files:
        builder = datasets.load_dataset_builder(name, config, data_dir=data_dir)
        folders = own_folders(name, data_dir)
        for path in chain.from_iterable((builder.config.data_files or {}).values()):
            # the file of zip://inner::outer is the outer one
            protocol, separator, place = str(path).split("::")[-1].rpartition("://")
            if (not separator or protocol in ("file", "local")) and not is_within(place, folders):
                raise UserError(f"it references {place}, outside of its folders")
    return datasets.load_dataset(name, config, data_dir=data_dir, data_files=data_files, streaming=streaming)


def own_folders(name: str, data_dir: str | None) -> tuple[str, ...]:
    """Return the local folders that a data set may read, its own and the library's caches, with links resolved."""
    import datasets
    from huggingface_hub import constants

    caches = ("HF_DATASETS_CACHE", "HF_CACHE_HOME", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH")
    places = [data_dir, name, constants.HF_HUB_CACHE, *(getattr(datasets.config, cache) for cache in caches)]
    found = {os.path.realpath(os.path.expanduser(place)) for place in places if place}
    return tuple(sorted(place for place in found if os.path.isdir(place)))


def named_splits(loaded: Mapping[str, Any], settings: Any, usual: Sequence[str]) -> dict[Any, str]:
    """Find the names of train and, if present, val (by default one of ``usual``) and test; reject a missing one."""
    val = settings.hf_val_split or next((name for name in usual if name in loaded), None)
    names = {"train": settings.hf_train_split, "val": val, "test": "test" if "test" in loaded else None}
    for split, name in names.items():
        if name is not None and name not in loaded:
            has = f"no split {name!r} in {settings.hf_name}; it has {', '.join(loaded)}"
            raise UserError(f"data.hf_{split}_split: {has}")
    return {split: name for split, name in names.items() if name is not None}


def is_within(path: str, folders: tuple[str, ...]) -> bool:
    """Return whether a path is inside one of the resolved folders after following all links."""
    return any(Path(os.path.realpath(path)).is_relative_to(folder) for folder in folders)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, else its class name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

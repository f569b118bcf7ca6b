"""Validation data of a checkpoint, from the settings that the checkpoint records."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from lit_tokenformer.cli.preflight import use_saved_tokenizer
from lit_tokenformer.data import ImageDataModule, MaskedTextDataModule, TextDataModule
from lit_tokenformer.data.images.transforms import Augmentation
from lit_tokenformer.data.resumable import ResumableDataModule
from lit_tokenformer.data.settings import FLAT_NAMES
from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier, LitMaskedLM, LitTask

_DATA: dict[type[LitTask], type] = {
    LitImageClassifier: ImageDataModule,
    LitMaskedLM: MaskedTextDataModule,
    LitCausalLM: TextDataModule,
}
"""Data module of each task."""

_DATA_TOKENS = 2048
"""Data tokens of a batch."""


def evaluation_batches(
    task: Any, checkpoint: Mapping[str, Any], given: Mapping[str, Any] | None, count: int
) -> tuple[list[Any], str]:
    """Load batches of about 2,048 data tokens, evenly spaced over the validation split.

    Args:
        task: The task of a checkpoint.
        checkpoint: The checkpoint.
        given: Settings of the data module that replace those of the checkpoint.
        count: Maximum number of batches.

    Returns:
        The batches, on the device of the task, and the name of the data set.

    Raises:
        UserError: If the task has no data module, the checkpoint records no data set and none is given, or the data
            cannot be read.
    """
    if count < 1:
        raise UserError(f"batches: expected a whole number of at least 1, got {count}")
    kind = next((data for one, data in _DATA.items() if isinstance(task, one)), None)
    if kind is None:
        known = ", ".join(one.__name__ for one in _DATA)
        raise UserError(
            f"ckpt_path: unsupported task {type(task).__name__} (expected {known}); `lit-tokenformer split` writes one "
            "checkpoint per task"
        )
    accepted = _arguments(kind)
    for name in given or {}:
        if name not in accepted:
            raise unknown_name("data", name, accepted)
    saved = (checkpoint.get("fit_settings") or {}).get("data") or {}
    settings = {name.removeprefix("data."): value for name, value in saved.items()}
    settings = {name: value for name, value in settings.items() if name in accepted - {"batch_size"}}
    if "dataset" not in {*settings, *(given or {})}:
        raise UserError("data: the checkpoint records no data set (expected --data.dataset NAME)")
    if (given or {}).get("dataset", settings.get("dataset")) != settings.get("dataset"):
        settings = {name: settings[name] for name in ("block_size", "image_size", "in_chans") if name in settings}
    batch_size = max(1, _DATA_TOKENS // _length(task, settings))
    look = getattr(task, "image_data", None)
    if look:
        settings["augmentation"] = Augmentation(**{name: look[name] for name in ("crop_pct", "interpolation")})
    fixed = {"eval_batch_size": batch_size, "num_workers": 0, "pin_memory": False}
    try:
        data = kind(**{**settings, **fixed, **(given or {})})
    except TypeError as error:  # such as a number in place of a name
        raise UserError(f"data: {' '.join(str(error).split())}") from None
    use_saved_tokenizer(data, checkpoint, asked="tokenizer" in (given or {}))
    data.prepare_data()
    data.setup("validate")
    task.check_data(checkpoint, data)
    if isinstance(task, LitImageClassifier) and task.image_data is None:  # of an earlier release
        task.image_data = data.image_data
    loader = _spread(data.val_dataloader(), count)
    batches = [_moved(batch, task.device) for batch in islice(loader, count)]
    if not batches:
        raise UserError("data: the validation split is empty (expected at least one batch)")
    return batches, str(data.data_settings.get("dataset"))


def _length(task: Any, settings: Mapping[str, Any]) -> int:
    """Return the length of a sequence in data tokens."""
    config = task.backbone.config
    if settings.get("block_size"):
        return int(settings["block_size"])
    patches = getattr(getattr(task.backbone.stem, "patch_embed", None), "num_patches", None)
    return config.context_length if patches is None else config.num_prefix_tokens + patches


def _spread(loader: Any, count: int) -> Any:
    """Space the samples of a loader evenly, if their number is known; a folder of images is sorted by class."""
    samples, size = loader.dataset, loader.batch_size
    if size is None or not hasattr(samples, "__len__") or len(samples) <= count * size:
        return loader
    index = torch.linspace(0, len(samples) - 1, count * size).round().int().tolist()
    return DataLoader(Subset(samples, index), size, collate_fn=loader.collate_fn)


def _moved(batch: Any, device: torch.device) -> Any:
    return batch.to(device) if isinstance(batch, torch.Tensor) else tuple(part.to(device) for part in batch)


def _arguments(kind: type) -> set[str]:
    """Return the settings of a data module, the flat names of nested ones included."""
    own = [base for base in kind.__mro__ if issubclass(base, ResumableDataModule) and "__init__" in vars(base)]
    names = {name for base in own for name in inspect.signature(base).parameters}
    return (names | {*FLAT_NAMES}) - {"self", "settings", "args", "kwargs"}

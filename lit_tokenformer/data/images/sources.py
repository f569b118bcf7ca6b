"""Registry of image data sets.

Sources: scikit-learn's digits; torchvision's data sets by timm's ``create_dataset``; folders and tar files; TensorFlow
Datasets; any image data set of the Hugging Face ``datasets`` library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset

from lit_tokenformer.data.images.folders import open_folder
from lit_tokenformer.data.images.hub import HubStream, open_hub
from lit_tokenformer.data.images.samples import (
    UNLABELED,
    ArraySamples,
    FileSamples,
    Samples,
    SubsetSamples,
    TfdsSamples,
    decode_hub_image,
    decode_image,
)
from lit_tokenformer.data.images.transforms import Augmentation
from lit_tokenformer.errors import UserError
from lit_tokenformer.registry import IMAGE_SOURCES

__all__ = ["ArraySamples", "ImageSource", "Splits", "SubsetSamples", "decode_hub_image", "decode_image"]

_SPLIT_SEED = 0  # the same validation images for every seed of a run


@dataclass(frozen=True)
class SourceSettings:
    """Location and splits of the data; see ``ImageDataModule`` for each setting."""

    root: str | None = None
    download: bool = False
    val_fraction: float = 0.1
    hf_name: str | None = None
    hf_config: str | None = None
    hf_image_column: str | None = None
    hf_label_column: str | None = None
    hf_train_split: str = "train"
    hf_val_split: str | None = None
    streaming: bool = False
    follow_links: bool = False
    name: str = ""
    """Rest of a data set's name after the first slash, as ``kmnist`` of ``torch/kmnist``."""


@dataclass
class Splits:
    """Data set splits. A stream is a ``HubStream``; all other types support random access."""

    class_names: list[str]
    train: Samples | HubStream
    val: Samples | HubStream
    test: Samples | HubStream
    num_train: int | None


_PHOTOGRAPHS = Augmentation(crop="rrc", hflip=0.5, interpolation="bicubic", crop_pct=0.875)


@dataclass(frozen=True)
class ImageSource:
    """Entry of the registry of data sets."""

    open: Callable[[SourceSettings], Splits]
    image_size: int
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    augmentation: Augmentation = _PHOTOGRAPHS
    tiny: bool = False
    """Small images, for which worker processes cost more than they save."""


def find_source(dataset: str) -> tuple[ImageSource, str]:
    """Return the entry of a data set, NAME or ``ENTRY/REST`` as in timm's ``create_dataset``, and the rest."""
    if dataset in IMAGE_SOURCES:
        return IMAGE_SOURCES[dataset], ""
    entry, _, rest = dataset.partition("/")
    return IMAGE_SOURCES[rest if entry == "torch" and rest in IMAGE_SOURCES else entry], rest


def _folder(setting: str, path: str | None) -> Path:
    if not path:
        raise UserError(f"{setting}: expected a folder, got {path!r}")
    if not Path(path).is_dir():
        raise UserError(f"{setting}: {'not a folder' if Path(path).exists() else 'no such folder'}: {path}")
    return Path(path)


def _with_validation(
    settings: SourceSettings, class_names: list[str], train: Samples, val: Samples | None, test: Samples | None
) -> Splits:
    """Hold out a validation split of the training split if the source has none; test falls back to validation."""
    if val is None and settings.val_fraction == 0:
        if test is None or is_unlabeled(test):
            raise UserError(
                "data.val_fraction: expected more than 0, since the data set has neither a validation nor a test split "
                "with labels"
            )
        val = test
    if val is None:
        size = len(train.labels)
        held_out = round(size * settings.val_fraction)
        if not 0 < held_out < size:
            raise UserError(f"data.val_fraction: {settings.val_fraction} of {size} images leaves an empty split")
        order = np.random.default_rng(_SPLIT_SEED).permutation(size)
        train, val = SubsetSamples(train, np.sort(order[held_out:])), SubsetSamples(train, np.sort(order[:held_out]))
    return Splits(class_names, train, val, val if test is None else test, len(train.labels))


def is_unlabeled(samples: Any) -> bool:
    """Return whether no image of a split has a label."""
    labels = getattr(samples, "labels", None)
    return isinstance(labels, np.ndarray) and bool((labels == UNLABELED).all())


def _open_digits(settings: SourceSettings) -> Splits:
    from sklearn.datasets import load_digits  # takes a second, and only this entry needs it
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    train, val = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=_SPLIT_SEED)
    held_out = ArraySamples(images[val], labels[val])
    return Splits(
        [str(digit) for digit in range(10)], ArraySamples(images[train], labels[train]), held_out, held_out, len(train)
    )


def _open_torchvision(settings: SourceSettings, name: str = "") -> Splits:
    chosen = name or settings.name

    def load(split: str, **download: bool) -> Any:
        try:
            return create_dataset(f"torch/{chosen}", settings.root, split, **download)  # type: ignore[arg-type]
        except AssertionError as error:
            raise UserError(f"data.dataset: torch/{chosen}: {error}") from None

    if settings.download and settings.root:
        Path(settings.root).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(settings.root) / ".download.lock"):  # every process of a run calls this
            load("train", download=True), load("validation", download=True)
    root = _folder("data.root", settings.root)
    try:
        train, held_out = load("train"), load("validation")
    except RuntimeError as error:
        raise UserError(f"data.root: no complete {chosen} in {root}; data.download=true downloads it") from error
    names = list(getattr(train, "wnids", train.classes))  # ImageNet has two classes named crane
    val = _samples(held_out)
    has_val = not hasattr(train, "train")  # the small data sets have a test split only
    return _with_validation(settings, names, _samples(train), val if has_val else None, None if has_val else val)


def _samples(part: Any) -> Samples:
    """Return the images of a torchvision data set in memory, or of one in folders."""
    if hasattr(part, "data"):
        return ArraySamples(np.asarray(part.data), part.targets)
    return FileSamples([path for path, _ in part.samples], [label for _, label in part.samples])


def _open_folder(settings: SourceSettings) -> Splits:
    is_tar = settings.root is not None and settings.root.endswith(".tar") and Path(settings.root).is_file()
    root = Path(settings.root) if is_tar else _folder("data.root", settings.root)  # type: ignore[arg-type]
    tables = [f"metadata.{ending}" for ending in ("csv", "jsonl", "parquet")]  # of labels
    if any((place / table).is_file() for place in (root, *root.glob("*/")) for table in tables):
        return _open_hub(settings, name="imagefolder")
    class_names, found = open_folder(str(root), settings.follow_links)
    return _with_validation(settings, class_names, found["train"], found.get("val"), found.get("test"))


def _open_hub(settings: SourceSettings, name: str | None = None, streaming: bool = False) -> Splits:
    """Open a Hugging Face data set, by default the one named after the slash or in ``hf_name``."""
    name = name or settings.name or settings.hf_name
    settings = replace(settings, hf_name=name, streaming=streaming or settings.streaming)
    if not settings.hf_name:
        raise UserError(
            "data.hf_name: expected the name of a Hugging Face data set (or imagefolder, with data.root), got none"
        )
    if settings.root is not None:
        _folder("data.root", settings.root)
    class_names, found, num_train = open_hub(settings)
    train, val, test = found["train"], found.get("val"), found.get("test")
    if not settings.streaming:
        return _with_validation(settings, class_names, train, val, test)
    held_out = val or (test if settings.val_fraction == 0 else None)
    if held_out is None:
        raise UserError(
            f"data.hf_val_split: a stream cannot be split, name a split of {settings.hf_name} to validate on"
        )
    return Splits(class_names, train, held_out, test or held_out, num_train)


def _open_tfds(settings: SourceSettings) -> Splits:
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        needed = "pip install tensorflow-datasets array_record"
        raise UserError(f"data.dataset: tfds/{settings.name}: needs TensorFlow Datasets ({needed})") from None
    try:
        builder = tfds.builder(settings.name, data_dir=settings.root)
        if settings.download:
            builder.download_and_prepare(file_format="array_record")
        names = builder.info.features["label"].names
        decoders = {"image": tfds.decode.SkipDecoding()}
        found = {name: TfdsSamples(builder.as_data_source(name, decoders=decoders)) for name in builder.info.splits}
    except (AssertionError, AttributeError, LookupError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"data.dataset: tfds/{settings.name}: {' '.join(str(error).split())}") from error
    if "train" not in found:
        raise UserError(f"data.dataset: tfds/{settings.name}: no split 'train', it has {', '.join(found)}")
    return _with_validation(settings, names, found["train"], found.get("validation"), found.get("test"))


def _whole_image(shift: float, hflip: float) -> Augmentation:
    return Augmentation(crop="shift", shift=shift, hflip=hflip, interpolation="bilinear", crop_pct=1.0)


IMAGE_SOURCES.register("digits")(
    ImageSource(_open_digits, 8, (0.3053,) * 3, (0.3760,) * 3, _whole_image(shift=1 / 8, hflip=0.0), tiny=True)
)
for _name, _size, _mean, _std, _shift, _hflip in (
    ("mnist", 28, (0.1307,) * 3, (0.3081,) * 3, 1 / 14, 0.0),
    ("kmnist", 28, (0.1918,) * 3, (0.3483,) * 3, 1 / 14, 0.0),
    ("fashion_mnist", 28, (0.2860,) * 3, (0.3530,) * 3, 1 / 14, 0.5),
    ("cifar10", 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 1 / 8, 0.5),
    ("cifar100", 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 1 / 8, 0.5),
):
    IMAGE_SOURCES.register(_name)(
        ImageSource(partial(_open_torchvision, name=_name), _size, _mean, _std, _whole_image(_shift, _hflip))
    )
for _name, _open in (
    ("imagefolder", _open_folder),
    ("huggingface", _open_hub),
    # names of timm's create_dataset: torch/NAME, wds/NAME, tfds/NAME, hfds/NAME, hfids/NAME (a stream)
    ("torch", _open_torchvision),
    ("wds", _open_folder),
    ("tfds", _open_tfds),
    ("hfds", _open_hub),
    ("hfids", partial(_open_hub, streaming=True)),
):
    IMAGE_SOURCES.register(_name)(ImageSource(_open, 224))

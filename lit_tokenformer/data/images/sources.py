"""Registry of image data sets.

Sources: scikit-learn's digits; Fashion-MNIST (arXiv:1708.07747) and CIFAR from torchvision; folders in ImageNet layout
with torchvision's ``ImageFolder``; any image data set of the Hugging Face ``datasets`` library.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import datasets as tv
from torchvision.datasets.folder import IMG_EXTENSIONS

from lit_tokenformer.data.hub import is_within, load_hub_data, own_folders
from lit_tokenformer.data.images.datasets import Samples
from lit_tokenformer.data.images.transforms import Augmentation
from lit_tokenformer.errors import UserError
from lit_tokenformer.registry import IMAGE_SOURCES

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


class ArraySamples:
    """Images (N, H, W) or (N, H, W, 3) uint8 in memory."""

    def __init__(self, images: np.ndarray, labels: Sequence[int] | np.ndarray) -> None:
        self.images = images
        self.labels = np.asarray(labels, dtype=np.int64)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index]).convert("RGB")

    def name(self, index: int) -> str:
        return str(index)


class FileSamples:
    """Image files. Paths are stored in one array, shared by worker processes without copies."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int] | np.ndarray) -> None:
        self.paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.labels = np.asarray(labels, dtype=np.int64)

    def read(self, index: int) -> Image.Image:
        return decode_image(self.name(index))

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[index])


class HubSamples:
    """Split of a Hugging Face data set with an undecoded image column."""

    def __init__(self, rows: Any, columns: tuple[str, str], folders: tuple[str, ...] = ()) -> None:
        self.folders = folders
        self.images = rows.select_columns([columns[0]])
        self.column = columns[0]
        self.labels = np.asarray(rows.with_format("numpy")[columns[1]][:], dtype=np.int64)

    def read(self, index: int) -> Image.Image:
        return decode_hub_image(self.images[int(index)][self.column], self.folders)

    def name(self, index: int) -> str:
        return self.images[int(index)][self.column].get("path") or str(index)


class SubsetSamples:
    """Subset of samples, in the given order."""

    def __init__(self, samples: Samples, indices: np.ndarray) -> None:
        self.samples = samples
        self.indices = indices
        self.labels = samples.labels[indices]

    def read(self, index: int) -> Image.Image:
        return self.samples.read(self.indices[index])

    def name(self, index: int) -> str:
        return self.samples.name(self.indices[index])


@dataclass
class HubStream:
    """Streamed split of a Hugging Face data set."""

    rows: Any
    columns: tuple[str, str]
    folders: tuple[str, ...] = ()
    """Allowed folders of the files that it references."""


@cache
def raster_formats() -> tuple[str, ...]:
    """Return the accepted Pillow formats. Others run programs (EPS starts Ghostscript, regardless of the extension)."""
    Image.init()
    usual = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF", "JPEG2000", "AVIF")
    return tuple(name for name in usual if name in Image.OPEN)


def decode_image(source: str | io.BytesIO) -> Image.Image:
    """Decode an image file to RGB; gray images get three equal channels.

    Raises:
        ValueError: If the path is not a regular file: reading a pipe would block.
    """
    if isinstance(source, str) and not os.path.isfile(source):
        raise UserError(f"{source} is not a file")
    with Image.open(source, formats=raster_formats()) as image:
        if image.mode != "RGB":
            return image.convert("RGB")
        image.load()  # convert would copy it
        return image


def decode_hub_image(value: dict[str, Any], folders: tuple[str, ...] = ()) -> Image.Image:
    """Decode a value of a Hugging Face image column, ``{"bytes", "path"}``, to RGB.

    Args:
        value: Undecoded value; without bytes its path is opened.
        folders: Allowed folders of the resolved path; an untrusted data set could reference any file.

    Raises:
        ValueError: If the path is outside of the folders.
    """
    if value["bytes"] is not None:
        return decode_image(io.BytesIO(value["bytes"]))
    if not is_within(value["path"], folders):
        raise UserError(f"data.hf_name: the data set references {value['path']}, outside of its folders")
    return decode_image(value["path"])


def find_images(root: str) -> FileSamples:
    """Find all images in a folder, nested or flat, sorted by path, with the label -1.

    Raises:
        ValueError: If the folder does not exist or contains no image.
    """
    folder = _folder("data.predict_root", root)
    paths = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise UserError(f"data.predict_root: no images in {root}; known extensions: {', '.join(IMG_EXTENSIONS)}")
    return FileSamples(paths, np.full(len(paths), -1))


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
        val = test
        if val is None:
            raise UserError(
                "data.val_fraction: expected more than 0, since the data set has neither a validation nor a test split"
            )
    if val is None:
        size = len(train.labels)
        held_out = round(size * settings.val_fraction)
        if not 0 < held_out < size:
            raise UserError(f"data.val_fraction: {settings.val_fraction} of {size} images leaves an empty split")
        order = np.random.default_rng(_SPLIT_SEED).permutation(size)
        train, val = SubsetSamples(train, np.sort(order[held_out:])), SubsetSamples(train, np.sort(order[:held_out]))
    return Splits(class_names, train, val, val if test is None else test, len(train.labels))


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


def _open_torchvision(dataset: Callable[..., Any]) -> Callable[[SourceSettings], Splits]:
    def open_splits(settings: SourceSettings) -> Splits:
        if settings.download and settings.root:
            Path(settings.root).mkdir(parents=True, exist_ok=True)
            with FileLock(Path(settings.root) / ".download.lock"):  # every process of a run calls this
                dataset(settings.root, train=True, download=True)
        root = _folder("data.root", settings.root)
        try:
            train, test = (dataset(str(root), train=part) for part in (True, False))
        except RuntimeError as error:
            name = getattr(dataset, "__name__", "data set")
            raise UserError(f"data.root: no complete {name} in {root}; data.download=true downloads it") from error
        parts = [ArraySamples(np.asarray(part.data), part.targets) for part in (train, test)]
        return _with_validation(settings, list(train.classes), parts[0], None, parts[1])

    return open_splits


def _open_image_folder(settings: SourceSettings) -> Splits:
    root = _folder("data.root", settings.root)
    if not (root / "train").is_dir():
        raise UserError(
            f"data.root: no folder train in {root}; expected {root}/train/CLASS/IMAGE and {root}/val/CLASS/IMAGE"
        )
    found: dict[str, Samples] = {}
    class_names: list[str] = []
    for split in ("train", "val", "test"):
        if split != "train" and not (root / split).is_dir():
            continue
        try:
            folder = tv.ImageFolder(str(root / split), allow_empty=True)
        except FileNotFoundError as error:
            raise UserError(
                f"data.root: no class folders in {root / split}; expected {root / split}/CLASS/IMAGE"
            ) from error
        if split == "train":
            class_names = folder.classes
        elif folder.classes != class_names:
            odd = sorted(set(folder.classes) ^ set(class_names))
            raise UserError(
                f"data.root: train and {split} have different classes, {len(odd)} are in one of them only: {_few(odd)}"
            )
        if not folder.samples:
            raise UserError(f"data.root: no images in {root / split}; known extensions: {', '.join(IMG_EXTENSIONS)}")
        paths, labels = zip(*folder.samples, strict=True)
        found[split] = FileSamples(paths, labels)
    empty = sorted(set(range(len(class_names))) - set(found["train"].labels.tolist()))
    if empty:
        raise UserError(
            f"data.root: no training images for {len(empty)} classes: {_few([class_names[i] for i in empty])}"
        )
    return _with_validation(settings, class_names, found["train"], found.get("val"), found.get("test"))


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _open_hugging_face(settings: SourceSettings) -> Splits:
    import datasets  # takes a second, and only this entry needs it

    if not settings.hf_name:
        raise UserError(
            "data.hf_name: expected the name of a Hugging Face data set (or imagefolder, with data.root), got none"
        )
    if settings.root is not None:
        _folder("data.root", settings.root)
    try:
        loaded = load_hub_data(settings.hf_name, settings.hf_config, settings.root, streaming=settings.streaming)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # not found, offline, wrong config: the library's first line is specific
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"data.hf_name: cannot load {settings.hf_name!r}: {reason}") from error

    def split(setting: str, name: str) -> Any:
        if name not in loaded:
            raise UserError(f"data.{setting}: no split {name!r} in {settings.hf_name}; it has {', '.join(loaded)}")
        return loaded[name]

    train = split("hf_train_split", settings.hf_train_split)
    usual = next((name for name in ("validation", "valid", "val", "dev") if name in loaded), None)
    val_name = settings.hf_val_split or usual
    features = train.features or {}
    columns = (
        _column("hf_image_column", settings.hf_image_column, features, datasets.Image),
        _column("hf_label_column", settings.hf_label_column, features, datasets.ClassLabel),
    )
    class_names = list(features[columns[1]].names)
    wrap = HubStream if settings.streaming else HubSamples
    folders = own_folders(settings.hf_name, settings.root)

    def samples(rows: Any) -> Any:
        return wrap(rows.cast_column(columns[0], datasets.Image(decode=False)), columns, folders)

    val: Any = samples(split("hf_val_split", val_name)) if val_name is not None else None
    test: Any = samples(loaded["test"]) if "test" in loaded else None
    if not settings.streaming:
        return _with_validation(settings, class_names, samples(train), val, test)
    if val is None and (settings.val_fraction > 0 or test is None):
        raise UserError(
            "data.hf_val_split: a stream cannot be split, name a split to validate on; "
            f"{settings.hf_name} has {', '.join(loaded)}"
        )
    val = val or test
    known = (train.info.splits or {}).get(settings.hf_train_split)
    return Splits(class_names, samples(train), val, test or val, known.num_examples if known else None)


def _column(setting: str, name: str | None, features: dict[str, Any], kind: type) -> str:
    """Find the column with a name, or the first one of a type."""
    listed = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items()) or "none known"
    if name is not None and name not in features:
        raise UserError(f"data.{setting}: no column {name!r}; the columns are {listed}")
    for column in [name] if name is not None else list(features):
        if isinstance(features[column], kind):
            return column
    got = f", got {name!r}" if name else ""
    raise UserError(f"data.{setting}: expected a column of kind {kind.__name__}{got}; the columns are {listed}")


def _whole_image(shift: float, hflip: float) -> Augmentation:
    return Augmentation(crop="shift", shift=shift, hflip=hflip, interpolation="bilinear", crop_pct=1.0)


IMAGE_SOURCES.register("digits")(
    ImageSource(_open_digits, 8, (0.3053,) * 3, (0.3760,) * 3, _whole_image(shift=1 / 8, hflip=0.0), tiny=True)
)
IMAGE_SOURCES.register("fashion_mnist")(
    ImageSource(
        _open_torchvision(tv.FashionMNIST), 28, (0.2860,) * 3, (0.3530,) * 3, _whole_image(shift=1 / 14, hflip=0.5)
    )
)
_CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGE_SOURCES.register("cifar10")(ImageSource(_open_torchvision(tv.CIFAR10), 32, *_CIFAR10, _whole_image(1 / 8, 0.5)))
_CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
IMAGE_SOURCES.register("cifar100")(
    ImageSource(_open_torchvision(tv.CIFAR100), 32, *_CIFAR100, _whole_image(1 / 8, 0.5))
)
IMAGE_SOURCES.register("imagefolder")(ImageSource(_open_image_folder, 224))
IMAGE_SOURCES.register("huggingface")(ImageSource(_open_hugging_face, 224))

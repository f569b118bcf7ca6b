"""Labeled images with random access, and the decoder of image files."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from lit_tokenformer.data.hub import is_within
from lit_tokenformer.errors import UserError

UNLABELED = -1
"""Label of an image without one."""


class Samples(Protocol):
    """Labeled images with random access."""

    labels: np.ndarray  # (N,) int64

    def read(self, index: int) -> Image.Image:
        """Decode an image to RGB; errors of the decoder are raised unchanged."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return the file's path if there is one, else the index as text."""
        return str(index)


class ArraySamples(Samples):
    """Images (N, H, W) or (N, H, W, 3) uint8 in memory."""

    def __init__(self, images: np.ndarray, labels: Sequence[int] | np.ndarray) -> None:
        self.images = images
        self.labels = np.asarray(labels, dtype=np.int64)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index]).convert("RGB")


class FileSamples:
    """Image files, or members of tar files. Paths are stored in one array, shared by worker processes without copies.

    A file is opened for each read: processes share no file position.

    Args:
        paths: Path of each file; of a member the path of its tar file and its name, ``x.tar/cat/1.jpg``.
        labels: Label of each image.
        spans: Length of the tar file's path (0 for a file), offset and size in bytes of each image, (N, 3).
    """

    def __init__(
        self, paths: Sequence[str], labels: Sequence[int] | np.ndarray, spans: np.ndarray | None = None
    ) -> None:
        self.paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.spans = np.zeros((len(paths), 3), dtype=np.int64) if spans is None else spans

    def read(self, index: int) -> Image.Image:
        length, offset, size = self.spans[index].tolist()
        if not length:
            return decode_image(self.name(index))
        with open(self.paths[index][:length], "rb") as file:
            file.seek(offset)
            return decode_image(io.BytesIO(file.read(size)))

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[index])


@dataclass(eq=False, repr=False)
class HubSamples:
    """Column of undecoded images of a Hugging Face data set."""

    images: Any
    labels: np.ndarray
    folders: tuple[str, ...] = ()

    def read(self, index: int) -> Image.Image:
        return decode_hub_image(self._value(index), self.folders)

    def name(self, index: int) -> str:
        return (self._value(index) or {}).get("path") or str(index)

    def _value(self, index: int) -> Any:
        (value,) = self.images[int(index)].values()
        return value


class TfdsSamples(Samples):
    """Split of a TensorFlow data set of undecoded images (array_record). Labels are read with the images."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.labels: Any = _TfdsLabels(rows, range(len(rows)))

    def read(self, index: int) -> Image.Image:
        return decode_image(io.BytesIO(self.rows[int(index)]["image"]))


class _TfdsLabels:
    """Labels of a data source; a subset of them is read later too."""

    def __init__(self, rows: Any, indices: Sequence[int] | np.ndarray) -> None:
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, np.ndarray):
            return _TfdsLabels(self.rows, np.asarray(self.indices)[index])
        return int(self.rows[int(self.indices[index])]["label"])


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


@cache
def raster_formats() -> tuple[str, ...]:
    """Return the accepted Pillow formats. Others run programs (EPS starts Ghostscript, regardless of the extension)."""
    Image.init()
    usual = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF", "JPEG2000", "AVIF")
    return tuple(name for name in usual if name in Image.OPEN)


@cache
def image_extensions() -> frozenset[str]:
    """Return the lower-case extensions of the accepted formats."""
    formats = raster_formats()
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)


def decode_image(source: str | io.BytesIO) -> Image.Image:
    """Decode an image file to RGB, as a viewer shows it.

    Gray images get three equal channels, 16 bits are scaled to 8, transparent pixels are composited on white, the
    EXIF orientation is applied, and the first frame of an animation is read.

    Raises:
        ValueError: If the path is not a regular file (reading a pipe would block), for a TIFF file of several pages,
            and for pixels of unknown range.
    """
    if isinstance(source, str) and not os.path.isfile(source):
        raise UserError(f"{source} is not a file")
    with Image.open(source, formats=raster_formats()) as image:
        if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
            raise UserError(f"expected one image, got a TIFF file of {image.n_frames} pages")  # type: ignore[attr-defined]
        with suppress(Exception):  # damaged EXIF data raise any exception, with intact pixels
            ImageOps.exif_transpose(image, in_place=True)
        image.load()
        found: Image.Image = image
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            found = Image.fromarray(_to_8_bits(np.asarray(image), image.format))
        if found.has_transparency_data:
            found = found.convert("RGBA")
            found = Image.alpha_composite(Image.new("RGBA", found.size, "white"), found)
        return found if found.mode == "RGB" else found.convert("RGB")


def _to_8_bits(pixels: np.ndarray, format: str | None) -> np.ndarray:
    """Scale pixels (H, W) of 16 bits, or float pixels from 0 to 1, to uint8 from 0 to 255."""
    if pixels.dtype.kind == "f":
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # also for NaN
            raise UserError(f"expected float pixels from 0 to 1, got {pixels.min():g} to {pixels.max():g}")
        return np.round(pixels * 255).astype(np.uint8)
    if pixels.dtype.itemsize > 2 and format != "PPM":  # whose 16 bits Pillow reads as 32
        raise UserError("expected pixels of 8 or 16 bits, got 32-bit integers of unknown range")
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def decode_hub_image(value: dict[str, Any] | None, folders: tuple[str, ...] = ()) -> Image.Image:
    """Decode a value of a Hugging Face image column, ``{"bytes", "path"}``, to RGB.

    Without bytes its path is opened if it is within one of the folders; an untrusted data set could reference any file.
    """
    if value is None or (value["bytes"] is None and value["path"] is None):
        raise UserError("no image")
    if value["bytes"] is not None:
        return decode_image(io.BytesIO(value["bytes"]))
    if not is_within(value["path"], folders):
        raise UserError(f"data.hf_name: the data set references {value['path']}, outside of its folders")
    return decode_image(value["path"])

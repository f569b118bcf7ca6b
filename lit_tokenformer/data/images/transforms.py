"""Image transforms: timm's, and a random shift for tiny images.

Sources: timm's ``create_transform`` and ``Mixup``; RandAugment (arXiv:1909.13719), mixup (arXiv:1710.09412), CutMix
(arXiv:1905.04899), random erasing (arXiv:1708.04896). The shift by a padded crop is that of the CIFAR recipes
(arXiv:1512.03385, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from lit_tokenformer.errors import UserError, unknown_name

ImageTransform = Callable[[Image.Image], torch.Tensor]
Crop = Literal["rrc", "rkrc", "rkrr", "shift", "center"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "random"]
ErasingMode = Literal["const", "rand", "pixel"]


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images, and resizing of all images. None selects the default.

    The default of small data sets (digits, mnist, kmnist, fashion_mnist, cifar10, cifar100) is ``crop: shift`` and
    bilinear interpolation, and that of all others ``crop: rrc`` and bicubic interpolation.

    Raises:
        ValueError: If a value is out of range; the message begins with the setting.
    """

    crop: Crop | None = None
    """Training crop mode: rrc (random resized crop), rkrc or rkrr (timm's resize with kept aspect ratio), shift (whole
    image, shifted by a few pixels), center (whole image, not shifted)."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Random resize scale: minimum and maximum area as a share of the image (crop: rrc)."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Random resize aspect ratio: minimum and maximum width / height (crop: rrc)."""
    shift: float | None = None
    """Maximum shift to each side, as a share of the image size (crop: shift); 0.125 is 4 pixels of 32. Default: 2
    pixels for the data sets of 28, else 0.125."""
    hflip: float | None = None
    """Horizontal flip probability. Default: 0 for digits, mnist and kmnist, else 0.5."""
    color_jitter: float = 0.0
    """Color jitter factor of brightness, contrast and saturation. Ignored by timm with auto_augment."""
    auto_augment: str | None = None
    """Auto-augmentation policy of timm: rand-m9-mstd0.5-inc1 (RandAugment), original or v0 (AutoAugment),
    augmix-m3-w3, ..."""
    reprob: float = 0.0
    """Random erasing probability."""
    remode: ErasingMode = "pixel"
    """Random erasing mode: const (mean color), rand (one random color), pixel (random color per pixel)."""
    interpolation: Interpolation | None = None
    """Resize interpolation; random selects bilinear or bicubic per training image."""
    crop_pct: float | None = None
    """Evaluation crop size / resize size: 0.875 resizes the shorter side to 256 and center-crops 224. Default: 1, the
    scale of training; 0.875 for crop: rrc with its default scale, except for small data sets."""
    mixup: float = 0.0
    """Mixup alpha; 0 disables it. With cutmix too, each batch uses one of the two."""
    cutmix: float = 0.0
    """CutMix alpha; 0 disables it."""
    label_smoothing: float = 0.0
    """Label smoothing: share of each training label spread evenly over all classes."""

    def __post_init__(self) -> None:
        for name, choices in (("crop", Crop), ("interpolation", Interpolation), ("remode", ErasingMode)):
            value = getattr(self, name)
            if value is not None and value not in get_args(choices):
                raise unknown_name(f"data.augmentation.{name}", value, get_args(choices))
        for name, low, high, expected in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"data.augmentation.{name}: expected {expected}, got {value}")
        for name, high in (("scale", 1.0), ("ratio", float("inf"))):
            low_high = getattr(self, name)
            if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1] <= high:
                bound = "" if high == float("inf") else f" <= {high:g}"
                raise UserError(f"data.augmentation.{name}: expected 0 < smallest <= largest{bound}, got {low_high}")

    @property
    def mixes(self) -> bool:
        """Mixup or CutMix is enabled."""
        return self.mixup > 0 or self.cutmix > 0

    def completed(self, defaults: Augmentation) -> Augmentation:
        """Replace every None by the value of ``defaults``."""
        low = self.scale[0] if (self.crop or defaults.crop) == "rrc" else 1.0
        if (defaults.crop_pct or 1.0) ** 2 < low:  # evaluation would show less of an image than training ever does
            defaults = replace(defaults, crop_pct=1.0)
        if defaults.shift is None:
            defaults = replace(defaults, shift=0.125)
        missing = [field.name for field in fields(self) if getattr(self, field.name) is None]
        return replace(self, **{name: getattr(defaults, name) for name in missing})

    @property
    def areas(self) -> tuple[float, float, float]:
        """Share of an image's area that is visible: smallest and largest in training, and in evaluation."""
        low, high = self.scale if self.crop == "rrc" else (1.0, 1.0)
        return low, high, (self.crop_pct or 1.0) ** 2


_RANGES = (
    ("shift", 0, 0.5, "a share from 0 to 0.5"),
    ("hflip", 0, 1, "a probability from 0 to 1"),
    ("color_jitter", 0, 1, "a share from 0 to 1"),
    ("reprob", 0, 1, "a probability from 0 to 1"),
    ("crop_pct", 1e-9, 1, "a share above 0 and up to 1"),
    ("mixup", 0, float("inf"), "an alpha of 0 or more"),
    ("cutmix", 0, float("inf"), "an alpha of 0 or more"),
    ("label_smoothing", 0, 0.999, "a share from 0 to below 1"),
)


ImageSize = int | tuple[int, int]
"""Height = width, or (height, width), in pixels."""


def train_transform(
    augmentation: Augmentation, image_size: ImageSize, mean: tuple[float, ...], std: tuple[float, ...]
) -> ImageTransform:
    """Create the random training transform, which uses the global generators of Python, NumPy and torch.

    Args:
        augmentation: Complete augmentation (see ``Augmentation.completed``).
        image_size: Output image size.
        mean: Mean of each of C channels, in units of the full range (0 to 1); C is 3, or 1 for gray images.
        std: Standard deviation of each channel, in the same units.

    Returns:
        Function from an RGB image to a normalized float32 tensor (C, H, W).

    Raises:
        ValueError: If ``auto_augment`` is not a policy of timm.
    """
    own_crop = augmentation.crop in ("shift", "center")
    try:
        crop, color, finish = create_transform(
            image_size,
            is_training=True,
            separate=True,
            train_crop_mode=None if own_crop else augmentation.crop,
            scale=augmentation.scale,
            ratio=augmentation.ratio,
            hflip=augmentation.hflip or 0.0,
            color_jitter=augmentation.color_jitter or None,  # type: ignore[arg-type]
            auto_augment=augmentation.auto_augment,
            interpolation=augmentation.interpolation or "bilinear",
            re_prob=augmentation.reprob,
            re_mode=augmentation.remode,
            mean=mean,
            std=std,
        )
    except (AssertionError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"data.augmentation.auto_augment: not a policy of timm (got {augmentation.auto_augment!r})"
        ) from error
    if own_crop:
        whole: Any = eval_transform(replace(augmentation, crop_pct=1.0), image_size, (0.0,) * 3, (1.0,) * 3)
        height, width = pair(image_size)
        shift = (augmentation.shift or 0.0) if augmentation.crop == "shift" else 0.0
        shifted = transforms.RandomCrop((height, width), padding=(round(shift * width), round(shift * height)))
        flip = transforms.RandomHorizontalFlip(augmentation.hflip or 0.0)
        crop = transforms.Compose([*whole.transforms[:2], shifted, flip])
    for step in color.transforms:
        for operation in getattr(step, "ops", None) or [one for two in getattr(step, "policy", ()) for one in two]:
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
    erasing = [step for step in finish.transforms if isinstance(step, RandomErasing)]
    steps = [crop, color, transforms.Compose([_ToNormalized(mean, std), *erasing])]
    return transforms.Compose(_channels(mean) + steps)


class _ToNormalized:
    """Transform from an image of C channels to a normalized float32 tensor (C, H, W).

    Bitwise equal to timm's ``MaybeToTensor`` and ``Normalize``, with fewer copies.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image))
        pixels = pixels.reshape(*pixels.shape[:2], len(self.mean)).permute(2, 0, 1)  # (C, H, W)
        scaled = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        return scaled.sub_(self.mean).div_(self.std)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Posterize an image. timm may request 0 bits, which is black in older Pillow versions and an error in newer."""
    return posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def eval_transform(
    augmentation: Augmentation, image_size: ImageSize, mean: tuple[float, ...], std: tuple[float, ...]
) -> ImageTransform:
    """Create the deterministic evaluation transform: resize the shorter side, center-crop, normalize.

    Arguments and result are those of ``train_transform``; of the augmentation only ``interpolation`` and ``crop_pct``
    are used.
    """
    fixed = "bilinear" if augmentation.interpolation in (None, "random") else str(augmentation.interpolation)
    found = create_transform(image_size, interpolation=fixed, crop_pct=augmentation.crop_pct, mean=mean, std=std)
    return transforms.Compose(_channels(mean) + found.transforms)


def _channels(mean: tuple[float, ...]) -> list[Any]:
    return [transforms.Grayscale()] if len(mean) == 1 else []


def pair(image_size: ImageSize) -> tuple[int, int]:
    """Return height and width."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height, width


def describe(augmentation: Augmentation, image_size: ImageSize) -> tuple[str, str]:
    """Describe the transforms of training and evaluation in a few words.

    Example:
        >>> describe(Augmentation("rrc", hflip=0.5, interpolation="bicubic", crop_pct=0.875, mixup=0.8), 224)
        ('rrc, scale 0.08 to 1, hflip 0.5, mixup 0.8', 'bicubic resize to 256, center crop 224x224')
    """
    train = [str(augmentation.crop)]
    if augmentation.crop == "rrc":
        train.append(f"scale {augmentation.scale[0]:g} to {augmentation.scale[1]:g}")
    names = ("hflip", "color_jitter", "auto_augment", "reprob", "mixup", "cutmix", "label_smoothing")
    for name in ("shift", *names) if augmentation.crop == "shift" else names:
        if value := getattr(augmentation, name):
            train.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    height, width = pair(image_size)
    resized = int(min(height, width) / (augmentation.crop_pct or 1.0))
    return ", ".join(train), f"{augmentation.interpolation} resize to {resized}, center crop {height}x{width}"

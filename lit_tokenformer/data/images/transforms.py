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
    """Augmentation of training images, and resizing of all images. None selects the data set's default.

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
    """Maximum shift to each side, as a share of the image size (crop: shift); 0.125 is 4 pixels of 32."""
    hflip: float | None = None
    """Horizontal flip probability. Default: 0 for digits."""
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
    """Evaluation crop size / resize size: 0.875 resizes the shorter side to 256 and center-crops 224."""
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
        if self.crop_pct == 0:
            raise UserError("data.augmentation.crop_pct: expected a share above 0, got 0")

    @property
    def mixes(self) -> bool:
        """Mixup or CutMix is enabled."""
        return self.mixup > 0 or self.cutmix > 0

    def completed(self, defaults: Augmentation) -> Augmentation:
        """Replace every None by the value of ``defaults``."""
        missing = [field.name for field in fields(self) if getattr(self, field.name) is None]
        return replace(self, **{name: getattr(defaults, name) for name in missing})


_RANGES = (
    ("shift", 0, 0.5, "a share from 0 to 0.5"),
    ("hflip", 0, 1, "a probability from 0 to 1"),
    ("color_jitter", 0, 1, "a share from 0 to 1"),
    ("reprob", 0, 1, "a probability from 0 to 1"),
    ("crop_pct", 0, 1, "a share above 0 and up to 1"),
    ("mixup", 0, float("inf"), "an alpha of 0 or more"),
    ("cutmix", 0, float("inf"), "an alpha of 0 or more"),
    ("label_smoothing", 0, 0.999, "a share from 0 to below 1"),
)


def train_transform(
    augmentation: Augmentation, image_size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> ImageTransform:
    """Create the random training transform, which uses the global generators of Python, NumPy and torch.

    Args:
        augmentation: Complete augmentation (see ``Augmentation.completed``).
        image_size: Output image size (height = width) in pixels.
        mean: Mean of each channel, in units of the full range (0 to 1).
        std: Standard deviation of each channel, in the same units.

    Returns:
        Function from an RGB image to a normalized float32 tensor (3, H, W).

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
        padding = round((augmentation.shift or 0.0) * image_size) if augmentation.crop == "shift" else 0
        crop = transforms.Compose(
            [
                transforms.Resize(image_size, interpolation=transforms.InterpolationMode(_fixed(augmentation))),
                transforms.CenterCrop(image_size),
                transforms.RandomCrop(image_size, padding=padding),
                transforms.RandomHorizontalFlip(augmentation.hflip or 0.0),
            ]
        )
    for step in color.transforms:
        for operation in getattr(step, "ops", None) or [one for pair in getattr(step, "policy", ()) for one in pair]:
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
    erasing = [step for step in finish.transforms if isinstance(step, RandomErasing)]
    return transforms.Compose([crop, color, transforms.Compose([_ToNormalized(mean, std), *erasing])])


class _ToNormalized:
    """Transform from an RGB image to a normalized float32 tensor (3, H, W).

    Bitwise equal to timm's ``MaybeToTensor`` and ``Normalize``, with fewer copies.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W)
        scaled = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        return scaled.sub_(self.mean).div_(self.std)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Posterize an image. timm may request 0 bits, which is black in older Pillow versions and an error in newer."""
    return posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def eval_transform(
    augmentation: Augmentation, image_size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> ImageTransform:
    """Create the deterministic evaluation transform: resize the shorter side, center-crop, normalize.

    Args:
        augmentation: Complete augmentation; only ``interpolation`` and ``crop_pct`` are used.
        image_size: Output image size (height = width) in pixels.
        mean: Mean of each channel, in units of the full range (0 to 1).
        std: Standard deviation of each channel, in the same units.

    Returns:
        Function from an RGB image to a normalized float32 tensor (3, H, W).
    """
    return create_transform(
        image_size, interpolation=_fixed(augmentation), crop_pct=augmentation.crop_pct, mean=mean, std=std
    )


def _fixed(augmentation: Augmentation) -> str:
    return "bilinear" if augmentation.interpolation in (None, "random") else str(augmentation.interpolation)

"""What is done to images before the model sees them: timm's transforms, and a plain random shift for tiny images.

Sources: timm's ``create_transform`` and ``Mixup``; RandAugment (arXiv:1909.13719), mixup (arXiv:1710.09412), CutMix
(arXiv:1905.04899), random erasing (arXiv:1708.04896). The shift by a padded crop is the one of the CIFAR recipes
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
    """Augmentation of the training images, and the resize of all images. None means: what the data set's own row says.

    Raises:
        ValueError: If a value is out of range; the message names the setting.
    """

    crop: Crop | None = None
    """How a training image is cut: rrc (random area and ratio), rkrc or rkrr (timm's resize that keeps the ratio),
    shift (whole image, moved by a few pixels), center (whole image, not moved)."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of the cut, as a share of the image (crop: rrc)."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of the cut (crop: rrc)."""
    shift: float | None = None
    """Largest shift to each side, as a share of the image size (crop: shift); 0.125 is 4 pixels of 32."""
    hflip: float | None = None
    """Probability of a horizontal flip. Digits are not flipped unless asked."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation. timm leaves it out where auto_augment is set."""
    auto_augment: str | None = None
    """timm's policy, such as rand-m9-mstd0.5-inc1 (RandAugment), original or v0 (AutoAugment), augmix-m3-w3."""
    reprob: float = 0.0
    """Probability that a rectangle of the image is erased."""
    remode: ErasingMode = "pixel"
    """What is put in its place: const (the mean colour), rand (one random colour), pixel (a random colour for each
    pixel)."""
    interpolation: Interpolation | None = None
    """How images are resized; random picks bilinear or bicubic for each training image."""
    crop_pct: float | None = None
    """Evaluation: centre crop / resize, so 0.875 resizes the shorter side to 256 and cuts 224."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 turns it off. With cutmix on too, each batch gets one of both."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution; 0 turns it off."""
    label_smoothing: float = 0.0
    """Share of each training label that is spread evenly over all classes."""

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
        """Whether batches are mixed (mixup or CutMix)."""
        return self.mixup > 0 or self.cutmix > 0

    def completed(self, defaults: Augmentation) -> Augmentation:
        """This augmentation with every None replaced by the value of ``defaults``."""
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
    """The random transform of a training image; draws from the global generators of Python, NumPy and torch.

    Args:
        augmentation: A complete augmentation (see ``Augmentation.completed``).
        image_size: Height and width of the result, in pixels.
        mean: Mean of each channel, in units of the full range (0 to 1).
        std: Standard deviation of each channel, in the same units.

    Returns:
        A function from an RGB image to a float32 tensor (3, H, W), normalised.

    Raises:
        ValueError: If timm does not know the policy ``auto_augment``.
    """
    own_crop = augmentation.crop in ("shift", "center")
    try:
        cut, colour, finish = create_transform(
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
            f"data.augmentation.auto_augment: timm does not know the policy {augmentation.auto_augment!r}"
        ) from error
    if own_crop:
        padding = round((augmentation.shift or 0.0) * image_size) if augmentation.crop == "shift" else 0
        cut = transforms.Compose(
            [
                transforms.Resize(image_size, interpolation=transforms.InterpolationMode(_fixed(augmentation))),
                transforms.CenterCrop(image_size),
                transforms.RandomCrop(image_size, padding=padding),
                transforms.RandomHorizontalFlip(augmentation.hflip or 0.0),
            ]
        )
    for step in colour.transforms:
        for operation in getattr(step, "ops", None) or [one for pair in getattr(step, "policy", ()) for one in pair]:
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
    erasing = [step for step in finish.transforms if isinstance(step, RandomErasing)]
    return transforms.Compose([cut, colour, transforms.Compose([_Normalised(mean, std), *erasing])])


class _Normalised:
    """From an RGB image to a float32 tensor (3, H, W), normalised.

    It gives what timm's ``MaybeToTensor`` and ``Normalize`` give, to the last bit, with fewer copies.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W)
        scaled = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        return scaled.sub_(self.mean).div_(self.std)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keeps some bits of each colour. timm may ask for none, which is black in older Pillows, and an error in newer."""
    return posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def eval_transform(
    augmentation: Augmentation, image_size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> ImageTransform:
    """The fixed transform of an evaluation image: resize the shorter side, cut the centre, normalise.

    Args:
        augmentation: A complete augmentation; only ``interpolation`` and ``crop_pct`` matter here.
        image_size: Height and width of the result, in pixels.
        mean: Mean of each channel, in units of the full range (0 to 1).
        std: Standard deviation of each channel, in the same units.

    Returns:
        A function from an RGB image to a float32 tensor (3, H, W), normalised.
    """
    return create_transform(
        image_size, interpolation=_fixed(augmentation), crop_pct=augmentation.crop_pct, mean=mean, std=std
    )


def _fixed(augmentation: Augmentation) -> str:
    return "bilinear" if augmentation.interpolation in (None, "random") else str(augmentation.interpolation)

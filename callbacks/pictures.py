"""Pictures of predictions: images with their classes, confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid


@torch.no_grad()
def predict_examples(
    trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, count: int
) -> list[tuple[Tensor, int, int]]:
    """Predict the samples of a batch that belong in the image grid: image (C, H, W), class and predicted class.

    ``count`` samples are evenly spaced over the validation set, whose images may be sorted by class.
    """
    if type(pl_module).forward is LightningModule.forward:
        return []  # not defined
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not all(isinstance(one, Tensor) for one in batch[:2]):
        return []
    image, label = batch[:2]
    batches = trainer.num_val_batches[0]
    if image.ndim != 4 or label.ndim not in (1, 2) or (math.isinf(batches) and batch_idx > 0):
        return []
    places = [number * (1 if math.isinf(batches) else batches) / count for number in range(count)]
    chosen = sorted({int((place - batch_idx) * len(image)) for place in places if int(place) == batch_idx})
    if not chosen:
        return []
    with torch.compiler.set_stance("force_eager"):  # avoids a recompilation for this batch size
        logits = pl_module(image[chosen])
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        return []
    labels = label[chosen] if label.ndim == 1 else label[chosen].argmax(dim=1)
    return list(zip(image[chosen].float().cpu(), labels.tolist(), logits.argmax(dim=1).tolist(), strict=True))


def prediction_picture(examples: Sequence[tuple[Tensor, int, int]], datamodule: Any) -> Tensor:
    """Draw a grid of images with their predictions below, (3, height, width) uint8."""
    images = torch.stack([image for image, _, _ in examples])  # (B, C, H, W)
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    mean, std = getattr(datamodule, "mean", None), getattr(datamodule, "std", None)
    if mean is not None and std is not None:
        mean, std = (torch.as_tensor(one, dtype=torch.float32).reshape(1, -1, 1, 1) for one in (mean, std))
        images = images * std + mean
    else:
        images = (images - images.min()) / (images.max() - images.min()).clamp_min(1e-12)
    names = getattr(datamodule, "class_names", None) or ()
    tiles = [
        _tile(image, _class_name(names, label), _class_name(names, guess))
        for image, (_, label, guess) in zip(images.clamp(0, 1), examples, strict=True)
    ]
    return make_grid(tiles, nrow=math.ceil(math.sqrt(len(tiles))), padding=4, pad_value=255)


def _class_name(names: Sequence[str], label: int) -> str:
    return str(names[label]) if 0 <= label < len(names) else str(label)


def _tile(image: Tensor, name: str, guess: str) -> Tensor:
    """Draw one image (3, H, W) in [0, 1] above its prediction, framed in green or red, (3, height, width) uint8."""
    right, border, line = name == guess, 3, 18
    zoom = math.ceil(96 / min(image.shape[1:]))
    enlarged = to_pil_image(image.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2))
    color = (0, 128, 0) if right else (200, 0, 0)
    tile = Image.new("RGB", (enlarged.width + 2 * border, enlarged.height + 2 * border + 2 * line), "white")
    tile.paste(color, (0, 0, tile.width, enlarged.height + 2 * border))
    tile.paste(enlarged, (border, border))
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(15)
    for number, text in enumerate([guess] if right else [guess, f"not {name}"]):
        while draw.textlength(text, font) > tile.width and len(text) > 1:
            text = text[:-1]
        draw.text((border, enlarged.height + 2 * border + number * line), text, color, font)
    return pil_to_tensor(tile)


def confusion_picture(counts: Tensor, names: Sequence[str]) -> Tensor:
    """Draw a confusion matrix, one row per label, (3, height, width) uint8.

    Args:
        counts: Samples by label and predicted class, (C, C).
        names: Class names; numbers beyond them.
    """
    classes = len(counts)
    cell, font = (38 if classes <= 20 else 14), ImageFont.load_default(14 if classes <= 20 else 11)
    texts = [str(names[index]) if index < len(names) else str(index) for index in range(classes)]
    texts = [text if len(text) <= 14 else f"{text[:13]}." for text in texts]
    left = max(90, 32 + max(int(font.getlength(text)) for text in texts))
    picture = Image.new("RGB", (left + classes * cell + 8, left + classes * cell + 8), "white")
    draw = ImageDraw.Draw(picture)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    for row in range(classes):
        for column in range(classes):
            share = float(shares[row, column])
            x, y = left + column * cell, left + row * cell
            hue = (0, 128, 0) if row == column else (200, 0, 0)
            color = tuple(round(255 + share * (one - 255)) for one in hue)
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=color)
            if classes <= 20 and counts[row, column]:
                number = str(int(counts[row, column]))
                place = (x + (cell - font.getlength(number)) / 2, y + cell / 2 - 8)
                draw.text(place, number, "white" if share > 0.5 else "black", font)
        middle = left + row * cell + cell // 2 - 8
        draw.text((8, middle), texts[row], "black", font)
        if (width := font.getlength(texts[row])) <= cell - 4:
            draw.text((left + (row + 0.5) * cell - width / 2, left - 20), texts[row], "black", font)
            continue
        name = Image.new("RGB", (left - 28, 16), "white")
        ImageDraw.Draw(name).text((0, 0), texts[row], "black", font)
        picture.paste(name.rotate(90, expand=True), (middle, 24))
    draw.text((8, 4), "rows: labels", "black", font)
    return pil_to_tensor(picture)

"""Training images per second of our image pipeline, against torchvision's folder with timm's transforms.

The last line compares the same images in WebDataset shards of 100 with the folder, both read by ``ImageDataModule``.
Both read the same folder of JPEG files, which is made here (random structure and noise, about 500 x 375 pixels), with
the same train transforms of 224 pixels, batch size and workers. Ours is ``ImageDataModule``; theirs is torchvision's
``ImageFolder`` with ``timm.data.create_transform(is_training=True)``. Whole epochs take turns, after two that start the
workers and fill the page cache. The speeds differ by what each epoch happens to draw, by a percent or two.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks.speed.lines import Line
from benchmarks.speed.timing import arguments, main, median, ratio, take_turns
from lit_tokenformer.data import Augmentation, ImageDataModule

SIZE = 224
RECIPES = {
    "crop and flip": Augmentation(),
    "RandAugment and erasing": Augmentation(auto_augment="rand-m7-mstd0.5-inc1", reprob=0.25),
}
"""The default, and a strong one; at the usual magnitude of 9 timm may posterize to 0 bits, which Pillow 13 rejects."""


def measure(args: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Time whole epochs of both loaders in turn."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_images(root / "folder", args.images)
        make_shards(root / "folder", root / "shards")
        pairs: dict[tuple[str, str, str], Any] = {
            **{(name, "ImageFolder + timm", "folder"): (recipe, their_loader) for name, recipe in RECIPES.items()},
            ("crop and flip, tar shards", "folder", "shards"): (Augmentation(), our_loader),
        }
        for (name, baseline, place), (recipe, other) in pairs.items():
            loaders = {
                "ours": our_loader(str(root / place), recipe, args.batch_size, args.workers),
                "theirs": other(str(root / "folder"), recipe, args.batch_size, args.workers),
            }
            epochs = {who: partial(read_epoch, loader, args.device) for who, loader in loaders.items()}
            taken = take_turns(epochs, args.rounds, args.device)
            speeds = {who: [len(loaders[who]) * args.batch_size / passed for passed in taken[who]] for who in loaders}
            speed = median(speeds["ours"]), median(speeds["theirs"]), "images/s", ratio(*speeds.values())
            lines.append(Line(f"{name}, {args.workers} workers", baseline, *speed, ">= 1.0"))
    return lines, []


def make_images(folder: Path, number: int, seed: int = 0) -> None:
    """Write JPEG files of four classes to ``FOLDER/train/CLASS``, and one of each to ``FOLDER/val/CLASS``."""
    generator = np.random.default_rng(seed)
    for index in range(number + 4):
        split = "train" if index < number else "val"
        place = folder / split / f"class_{index % 4}"
        place.mkdir(parents=True, exist_ok=True)
        width, height = int(generator.integers(440, 561)), int(generator.integers(330, 421))
        pixels = np.zeros((height, width, 3))
        for cells in (4, 16, 64):  # structure, coarse to fine
            small = generator.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
            pixels += np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)) / 3
        pixels += generator.normal(0, 6, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{index}.jpg", quality=90)


def make_shards(folder: Path, shards: Path, size: int = 100) -> None:
    """Write the files of a folder as WebDataset shards, ``SPLIT-NUMBER.tar`` with ``KEY.jpg`` and ``KEY.cls``."""
    shards.mkdir()
    for split in ("train", "val"):
        files = sorted((folder / split).glob("*/*"), key=lambda file: int(file.stem))
        for number, start in enumerate(range(0, len(files), size)):
            with tarfile.open(shards / f"{split}-{number:04d}.tar", "w") as tar:
                for file in files[start : start + size]:
                    tar.add(file, file.name)
                    label = tarfile.TarInfo(f"{file.stem}.cls")
                    label.size = 1
                    tar.addfile(label, io.BytesIO(file.parent.name[-1:].encode()))


def our_loader(folder: str, recipe: Augmentation, batch_size: int, workers: int) -> DataLoader:
    """Training loader of a fit."""
    data = ImageDataModule("imagefolder", root=folder, batch_size=batch_size, num_workers=workers, augmentation=recipe)
    data.setup("fit")
    return data.train_dataloader()


def their_loader(folder: str, recipe: Augmentation, batch_size: int, workers: int) -> DataLoader:
    """Torchvision's folder and timm's transforms with the same settings, in torch's loader."""
    transform = create_transform(
        SIZE,
        is_training=True,
        scale=recipe.scale,
        ratio=recipe.ratio,
        hflip=0.5,
        color_jitter=None,  # type: ignore[arg-type]
        auto_augment=recipe.auto_augment,
        interpolation="bicubic",
        re_prob=recipe.reprob,
        re_mode=recipe.remode,
    )
    return DataLoader(
        ImageFolder(f"{folder}/train", transform),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),  # as ours
    )


def read_epoch(loader: DataLoader, device: str) -> None:
    """Read an epoch, each batch to the device."""
    sampler: Any = loader.sampler
    if hasattr(sampler, "set_epoch"):  # as Lightning does; every epoch has other crops
        sampler.set_epoch(sampler.epoch + 1)
    for image, _ in loader:
        image.to(device, non_blocking=True)


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=40)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    main("input", parser, measure)

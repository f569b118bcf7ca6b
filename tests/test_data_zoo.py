"""A zoo of odd files, folders and tables: each gives the right values, or one line that names file and reason."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before datasets is imported

import numpy as np
import pytest
from PIL import Image

from lit_tokenformer.data import ImageDataModule
from lit_tokenformer.data.images.samples import decode_image
from lit_tokenformer.errors import UserError

# --- Images ----------------------------------------------------------------------------------------------------------

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
"""Gray values from 0 to 252."""
RGB = np.stack([RAMP, 255 - RAMP, RAMP.T], axis=-1)


def gray(values: np.ndarray = RAMP) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, axis=2)


def alpha(mode: str = "RGBA") -> Image.Image:
    """A dark image, the upper half of which is transparent."""
    image = Image.new("RGBA", (8, 8), (10, 10, 10, 255))
    image.paste((10, 10, 10, 0), (0, 0, 8, 4))
    return image.convert(mode)


def on_white(color: int = 10) -> np.ndarray:
    expected = np.full((8, 8, 3), color, np.uint8)
    expected[:4] = 255
    return expected


def palette() -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 255, 0, 10, 10, 10])
    image.paste(0, (0, 0, 8, 4))
    image.info["transparency"] = 0
    return image


def transparent_colour() -> Image.Image:
    image = Image.new("RGB", (8, 8), (10, 10, 10))
    image.paste((1, 2, 3), (0, 0, 8, 4))
    return image


def saved(image: Image.Image | np.ndarray, format: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **settings)
    return file.getvalue()


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(RGB, "PNG", exif=exif)


def frames(format: str) -> bytes:
    images = [Image.fromarray(gray(values)) for values in (RAMP, 255 - RAMP)]
    return saved(
        images[0], format, save_all=True, append_images=images[1:], **({} if format == "TIFF" else {"duration": 9})
    )


SIXTEEN = RAMP.astype(np.uint16) * 257
"""The ramp in 16 bits; halves of a step round to the ramp."""
LAB = Image.merge("LAB", [Image.new("L", (8, 8), value) for value in (255, 128, 128)])
CMYK = Image.merge("CMYK", [Image.fromarray(255 - RGB[:, :, i]) for i in range(3)] + [Image.new("L", (8, 8), 0)])

PICTURES: dict[str, tuple[bytes, np.ndarray | str]] = {
    "rgb.png": (saved(RGB, "PNG"), RGB),
    "rgb.bmp": (saved(RGB, "BMP"), RGB),
    "rgb.tif": (saved(RGB, "TIFF"), RGB),
    "rgb.webp": (saved(RGB, "WEBP", lossless=True), RGB),
    "rgb.ppm": (saved(RGB, "PPM"), RGB),
    "rgb.jp2": (saved(RGB, "JPEG2000"), RGB),
    "png_named.jpg": (saved(RGB, "PNG"), RGB),
    "gray.png": (saved(RAMP, "PNG"), gray()),
    "gray.pgm": (saved(RAMP, "PPM"), gray()),
    "gray_alpha.png": (saved(alpha("LA"), "PNG"), on_white()),
    "bilevel.png": (saved(Image.fromarray(RAMP > 100), "PNG"), gray((RAMP > 100).astype(np.uint8) * 255)),
    "gray16.png": (saved(SIXTEEN, "PNG"), gray()),
    "gray16.tif": (saved(SIXTEEN, "TIFF"), gray()),
    "gray16.pgm": (saved(SIXTEEN, "PPM"), gray()),
    "gray16.jp2": (saved(SIXTEEN, "JPEG2000"), gray()),
    "gray16_rounds.png": (saved(np.full((8, 8), 257 * 7 + 200, np.uint16), "PNG"), np.full((8, 8, 3), 8, np.uint8)),
    "float.tif": (saved(RAMP.astype(np.float32) / 255, "TIFF"), gray()),
    "float_255.tif": (saved(RAMP.astype(np.float32), "TIFF"), "expected float pixels from 0 to 1, got 0 to 252"),
    "float_nan.tif": (saved(np.full((8, 8), np.nan, np.float32), "TIFF"), "expected float pixels from 0 to 1"),
    "int32.tif": (saved(RAMP.astype(np.int32), "TIFF"), "32-bit integers of unknown range"),
    "alpha.png": (saved(alpha(), "PNG"), on_white()),
    "alpha.webp": (saved(alpha(), "WEBP", lossless=True, exact=True), on_white()),
    "opaque.png": (saved(Image.fromarray(RGB).convert("RGBA"), "PNG"), RGB),
    "palette.png": (saved(palette(), "PNG"), on_white()),
    "palette.gif": (saved(palette(), "GIF"), on_white()),
    "palette_bytes.png": (saved(alpha().quantize(4), "PNG"), on_white()),
    "transparent_color.png": (saved(transparent_colour(), "PNG", transparency=(1, 2, 3)), on_white()),
    "cmyk.tif": (saved(CMYK, "TIFF"), RGB),
    "lab.tif": (saved(LAB, "TIFF"), np.full((8, 8, 3), 255, np.uint8)),
    "exif_3.png": (rotated(3), RGB[::-1, ::-1]),
    "exif_6.png": (rotated(6), np.rot90(RGB, -1)),
    "exif_8.png": (rotated(8), np.rot90(RGB)),
    "exif_2.png": (rotated(2), RGB[:, ::-1]),
    "animated.gif": (frames("GIF"), gray()),
    "animated.webp": (frames("WEBP"), gray()),
    "animated.png": (frames("PNG"), gray()),
    "pages.tif": (frames("TIFF"), "a TIFF file of 2 pages"),
    "truncated.png": (
        saved(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8), "PNG")[:2000],
        "truncated",
    ),
    "empty.png": (b"", "cannot identify"),
    "text.png": (b"no image at all", "cannot identify"),
    "program.jpg": (saved(RGB, "EPS"), "cannot identify"),
    "damaged_exif.png": (saved(RGB, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), RGB),
}


LOSSY = {"lab.tif": 1, "animated.webp": 40}
"""Largest difference of a pixel, other than 0."""


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name: str, tmp_path: Path) -> None:
    content, expected = PICTURES[name]
    (tmp_path / name).write_bytes(content)
    if isinstance(expected, np.ndarray):
        for source in (str(tmp_path / name), io.BytesIO(content)):
            pixels = np.asarray(decode_image(source))
            assert pixels.dtype == np.uint8 and pixels.shape == (8, 8, 3)
            assert np.abs(pixels.astype(int) - expected).max() <= LOSSY.get(name, 0)
        return
    data = ImageDataModule(predict_root=str(tmp_path), num_workers=0, max_corrupt_share=1)
    with pytest.warns(UserWarning, match="unreadable"), pytest.raises(UserError) as caught:
        list(data.predict_dataloader())
    assert re.search(f"none of 1 images.*{name} .*{expected}", str(caught.value)) and "\n" not in str(caught.value)


def draw(folder: Path, *names: str) -> None:
    """Write a picture under each name; all differ."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RGB).resize((4 + number, 4)).save(folder / name, "PNG")


def cats_and_dogs(train: str = "train", val: str = "val", number: int = 2) -> list[str]:
    return [f"{split}/{kind}/{i}.png" for split in (train, val) for kind in ("cat", "dog") for i in range(number)]


def pack(path: Path, *names: str, texts: dict[str, str] | None = None) -> None:
    """Write a tar file of pictures and texts; a name that ends with .tar is another one."""
    inner = path.with_suffix(".inner")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            if name.endswith(".tar"):
                pack(inner / name, "1.png", "2.png")
            else:
                draw(inner, name)
            tar.add(inner / name, name)
        for name, text in (texts or {}).items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    shutil.rmtree(inner, ignore_errors=True)


def shards(folder: Path, labels: list[str], ending: str = "cls") -> None:
    """Write WebDataset shards of two samples."""
    for split in ("train", "val"):
        for start in range(0, len(labels), 2):
            keys = {f"{start + i:04d}": label for i, label in enumerate(labels[start : start + 2])}
            texts = {f"{key}.{ending}": label for key, label in keys.items()}
            pack(folder / f"pets-{split}-{start:04d}.tar", *(f"{key}.png" for key in keys), texts=texts)


def link(folder: Path, name: str, target: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(target)


def outside(folder: Path) -> None:
    draw(folder, *cats_and_dogs())
    draw(folder.parent / "outside", "eel/1.png", "x.png")
    link(folder, "train/eel", "../../outside/eel")
    link(folder, "val/eel", "../../outside/eel")
    link(folder, "train/cat/x.png", "../../../outside/x.png")


def metadata(folder: Path, name: str, rows: dict[str, Any]) -> None:
    """Write pictures and a table of their labels for each split."""
    for split in ("train", "val"):
        draw(folder, *(f"{split}/{file}" for file in rows))
        lines = [json.dumps({"file_name": file, "label": label}) for file, label in rows.items()]
        if name.endswith(".csv"):
            lines = ["file_name,label", *(f"{file},{label}" for file, label in rows.items())]
        (folder / split / name).write_text("\n".join(lines) + "\n")


def columns(folder: Path, test: dict[str, Any] | None = None, kind: Any = None, **train: Any) -> None:
    """Write a Hugging Face data set in Parquet files; an image is its brightness, or None."""
    import datasets

    for split, table in {"train": train, "validation": train, "test": test}.items():
        features, rows = {}, {}
        for name, values in (table or {}).items():
            is_image = name.startswith("image")
            features[name] = datasets.Image() if is_image else kind or datasets.ClassLabel(names=["cat", "dog"])
            rows[name] = [
                {"bytes": saved(np.full((4, 4, 3), value, np.uint8), "PNG"), "path": None}
                if is_image and value
                else value
                for value in values
            ]
        if rows:
            found = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
            found.to_parquet(str(folder / f"{split}.parquet"))


def text_columns(folder: Path) -> None:
    import datasets

    columns(folder, kind=datasets.Value("string"), image=[1, 2, 3], label=["dog", "cat", "dog"])


PETS = (["cat", "dog"], 4, 4)
HUB: dict[str, Any] = {"dataset": "huggingface"}

FOLDERS: dict[str, tuple[Callable[[Path], Any], Any, dict[str, Any]]] = {
    # name: (make, (class names, training images, validation images) or an error, settings)
    "names_training": (lambda f: draw(f, *cats_and_dogs("training", "validation")), PETS, {}),
    "names_valid": (lambda f: draw(f, *cats_and_dogs("Train", "valid")), PETS, {}),
    "names_dev": (lambda f: draw(f, *cats_and_dogs("train", "dev")), PETS, {}),
    "no_splits": (
        lambda f: draw(f, "cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"),
        (["cat", "dog"], 3, 1),
        {"val_fraction": 0.25},
    ),
    "two_validation_splits": (
        lambda f: draw(f, *cats_and_dogs(), *cats_and_dogs("dev", "valid")),
        "several val splits: .*/dev.*/val",
        {},
    ),
    "no_training_split": (lambda f: draw(f, *cats_and_dogs("test", "val")), "no folder train in", {}),
    "other_classes": (lambda f: draw(f, *cats_and_dogs(), "val/eel/1.png"), "train and val have .* 1 are .*: eel", {}),
    "empty_class": (
        lambda f: (draw(f, *cats_and_dogs()), (f / "train/eel").mkdir(), (f / "val/eel").mkdir()),
        "no training images for 1 classes: eel",
        {},
    ),
    "hidden": (
        lambda f: draw(f, *cats_and_dogs(), "train/.cache/1.png", "train/__MACOSX/1.png", "train/cat/._0.png"),
        PETS,
        {"log": "1 hidden files, 2 hidden folders"},
    ),
    "extensions": (
        lambda f: (draw(f, *cats_and_dogs()), (f / "train/cat/notes.txt").touch(), draw(f, "val/dog/3.PNG")),
        (["cat", "dog"], 4, 5),
        {"log": "1 files with the extension .txt"},
    ),
    "beside_classes": (lambda f: draw(f, *cats_and_dogs(), "train/1.png"), PETS, {"log": "1 images without a class"}),
    "broken_link": (
        lambda f: (draw(f, *cats_and_dogs()), link(f, "train/cat/9.png", "none.png")),
        PETS,
        {"log": "1 broken links"},
    ),
    "outside_links": (outside, PETS, {"log": r"3 links out of data.root \(followed with data.follow_links: true\)"}),
    "followed_links": (outside, (["cat", "dog", "eel"], 6, 5), {"follow_links": True}),
    "loop": (
        lambda f: (draw(f, *cats_and_dogs()), link(f, "train/cat/loop", "..")),
        PETS,
        {"log": "1 links to a folder above"},
    ),
    "link_inside": (
        lambda f: (draw(f, *cats_and_dogs()), link(f, "train/dog/more", "../../val/dog")),
        (["cat", "dog"], 6, 4),
        {},
    ),
    "flat_test": (lambda f: draw(f, *cats_and_dogs(), "test/1.png", "test/2.png"), PETS, {"unlabeled": 2}),
    "tar_of_each_split": (
        lambda f: [
            pack(f / f"{split}.tar", "./cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png") for split in ("train", "val")
        ],
        PETS,
        {},
    ),
    "tar_of_each_class": (
        lambda f: [
            pack(f / split / f"{kind}.tar", "1.png", "2.png") for split in ("train", "val") for kind in ("cat", "dog")
        ],
        PETS,
        {},
    ),
    "tar_of_a_folder": (
        lambda f: (draw(f, *cats_and_dogs()), pack(f / "train.tar", "eel/1.png")),
        PETS,
        {"log": "1 tar files of a split with a folder"},
    ),
    "tars_in_a_tar": (
        lambda f: [pack(f / f"ILSVRC2012_img_{split}.tar", "cat.tar", "dog.tar") for split in ("train", "val")],
        PETS,
        {},
    ),
    "whole_data_set_in_a_tar": (
        lambda f: pack(f / "pets.tar", *(f"pets/{name}" for name in cats_and_dogs())),
        PETS,
        {"root": "pets.tar"},
    ),
    "hidden_in_a_tar": (
        lambda f: pack(f / "pets.tar", *cats_and_dogs(), "train/cat/._1.png"),
        PETS,
        {"root": "pets.tar", "log": "1 hidden files"},
    ),
    "shards": (lambda f: shards(f, ["10", "2", "2", "10"]), (["2", "10"], 4, 4), {"dataset": "wds/pets"}),
    "shards_that_repeat_keys": (
        lambda f: [
            pack(f / f"{split}-{shard}.tar", "0.png", "1.png", texts={"0.cls": f"{shard}0", "1.cls": f"{shard}1"})
            for split in ("train", "val")
            for shard in (1, 2)
        ],
        (["10", "11", "20", "21"], 4, 4),
        {"dataset": "wds/x"},
    ),
    "shards_of_text": (lambda f: shards(f, ["dog", "cat", "dog"]), (["cat", "dog"], 3, 3), {"dataset": "wds/pets"}),
    "shards_of_json": (
        lambda f: shards(f, ['{"label": 1}', '{"label": 0}'], "json"),
        (["0", "1"], 2, 2),
        {"dataset": "wds/pets"},
    ),
    "shards_without_a_label": (
        lambda f: shards(f, ["0", "-1", "1"]),
        (["0", "1"], 2, 2),
        {"dataset": "wds/", "log": "2 images without a class"},
    ),
    "compressed_tar": (
        lambda f: draw(f, "train/cat.tar.gz"),
        r"no class folders in .*left out: 1 compressed tar files \(without random access",
        {},
    ),
    "damaged_tar": (
        lambda f: (draw(f, *cats_and_dogs()), (f / "train/x.tar").write_bytes(b"x" * 600)),
        "x.tar: not an intact tar",
        {},
    ),
    "metadata_csv": (
        lambda f: metadata(f, "metadata.csv", {"1.png": "dog", "2.png": "cat"}),
        (["cat", "dog"], 2, 2),
        {},
    ),
    "metadata_jsonl": (lambda f: metadata(f, "metadata.jsonl", {"1.png": 7, "2.png": 10}), (["7", "10"], 2, 2), {}),
    "metadata_null": (
        lambda f: metadata(f, "metadata.jsonl", {"1.png": "dog", "2.png": None, "3.png": "cat"}),
        r"data.hf_label_column: train, row 1, column 'label': not a known label \(got None\); so have 1 of 3",
        {},
    ),
    "hub_null_image": (
        lambda f: columns(f, image=[1, None, 3], label=[0, 1, 0]),
        "data.hf_image_column: train, row 1, column 'image'",
        HUB,
    ),
    "hub_unlabeled": (
        lambda f: columns(f, image=[1, 2, 3], label=[0, 1, -1]),
        r"data.hf_label_column: train, row 2, .*\(got -1\)",
        HUB,
    ),
    "hub_null_label": (lambda f: columns(f, image=[1, 2], label=[None, 1]), r"train, row 0, .*\(got None\)", HUB),
    "hub_unlabeled_test": (
        lambda f: columns(f, {"image": [1, 2, 3], "label": [-1] * 3}, image=[1, 2], label=[0, 1]),
        (["cat", "dog"], 2, 2),
        {**HUB, "unlabeled": 3},
    ),
    "hub_partly_labeled_test": (
        lambda f: columns(f, {"image": [1, 2], "label": [-1, 0]}, image=[1, 2], label=[0, 1]),
        "test, row 0",
        HUB,
    ),
    "hub_two_images": (
        lambda f: columns(f, image=[1, 2], image_2=[3, 4], label=[0, 1]),
        "data.hf_image_column: expected one of several columns of images: image, image_2",
        HUB,
    ),
    "hub_chosen_image": (
        lambda f: columns(f, image=[1, 2], image_2=[3, 4], label=[0, 1]),
        (["cat", "dog"], 2, 2),
        {**HUB, "hf_image_column": "image_2", "first": 3},
    ),
    "hub_text_labels": (text_columns, (["cat", "dog"], 3, 3), HUB),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make, expected, settings = FOLDERS[name]
    settings = {"dataset": "imagefolder", "root": "", "image_size": 4, "batch_size": 2, "num_workers": 0, **settings}
    log, unlabeled, first = settings.pop("log", None), settings.pop("unlabeled", 0), settings.pop("first", None)
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    if settings["dataset"] == "huggingface":
        settings["hf_name"], settings["root"] = str(root), None
    else:
        settings["root"] = str(root / settings["root"])
    data = ImageDataModule(**settings)
    caplog.set_level("INFO")
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected) as caught:
            data.setup("fit")
        assert "\n" not in str(caught.value)
        return
    data.setup("fit")
    splits = data.splits
    assert (data.class_names, len(splits.train.labels), len(splits.val.labels)) == expected  # type: ignore[union-attr]
    assert {*splits.train.labels} == {*range(data.num_classes)}  # type: ignore[union-attr]
    for samples in (splits.train, splits.val, splits.test):
        pictures = [samples.read(index) for index in range(len(samples.labels))]  # type: ignore[union-attr]
        assert all(picture.mode == "RGB" and picture.height == 4 for picture in pictures)
    if first is not None:
        assert splits.train.read(0).getpixel((0, 0)) == (first,) * 3  # type: ignore[union-attr]
    told = [record.message for record in caplog.records if "left out" in record.message]
    assert len(told) == bool(log or name == "outside_links") and (log is None or re.search(log, told[0]))
    if unlabeled:
        assert sum(len(image) for image, _ in data.predict_dataloader()) == unlabeled
        with pytest.raises(UserError, match="^test: the test split has no labels"):
            data.test_dataloader()

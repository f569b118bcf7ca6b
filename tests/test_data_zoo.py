"""A zoo of odd files, folders and tables: each gives the right values, or one line that names file and reason."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
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
import tokenizers as hf
import torch
from PIL import Image

from lit_tokenformer.cli.generate import generate_text
from lit_tokenformer.data import ImageDataModule, TextDataModule, Tokenizer
from lit_tokenformer.data.images.samples import decode_image
from lit_tokenformer.errors import UserError
from lit_tokenformer.tasks import LitCausalLM
from lit_tokenformer.tasks.rebuild import fresh_checkpoint

# --- Images -----------------------------------------------------------------------------------------------------------

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


# --- Text -------------------------------------------------------------------------------------------------------------

Make = Callable[[Path], Any]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
ROWS = '{"text": "one"}\n{"text": "two"}\n'


def put(name: str, content: str | bytes) -> Make:
    """Write one file."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def table(name: str, **columns: Any) -> Make:
    """Write a Parquet file."""

    def make(folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), folder / name)

    return make


def typed(values: list[Any], *kind: str) -> Any:
    """Return an Arrow array of a type, such as ``large_string`` or ``dictionary int8 string``."""
    import pyarrow as pa

    outer, *inner = [getattr(pa, name) for name in kind]
    return pa.array(values, outer(*(one() for one in inner)))


def links(folder: Path) -> None:
    """Make a loop, a link to a folder outside, two links to one file, and a broken link."""
    outside = folder.parent / f"{folder.name}_outside"
    for place, text in ((folder / "a.txt", "one"), (outside / "c.txt", "three"), (folder / "b" / "b.txt", "two")):
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)
    (folder / "b" / "loop").symlink_to("..")
    (folder / "b" / "again").symlink_to("../b")
    (folder / "outside").symlink_to(outside)
    (folder / "same.txt").symlink_to("a.txt")
    (folder / "broken.txt").symlink_to("nowhere")


def hidden(folder: Path) -> None:
    for name in (".git/a.txt", ".b.txt", "c/.d/e.txt", "c/f.txt", "g.PNG", "c/h", "._i.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("one" if name == "c/f.txt" else "not read")


def both(*parts: Make) -> Make:
    return lambda folder: [part(folder) for part in parts]


TEXT_ZOO: dict[str, tuple[Make, dict[str, Any], list[str] | str]] = {
    # name: (files, settings, documents | message after "data.")
    "plain": (put("a.txt", "one\ntwo\n"), {}, ["one\ntwo\n"]),
    "line ends, NUL and spaces are text": (put("a.txt", "one\r\ntwo\x00\rend \n\n"), {}, ["one\r\ntwo\x00\rend \n\n"]),
    "white space only": (put("a.md", " \n\t"), {}, [" \n\t"]),
    "upper-case extension": (put("A.TXT", "one"), {}, ["one"]),
    "two extensions": (put("a.jsonl.txt", ROWS), {}, [ROWS]),
    "UTF-8 with a byte order mark": (put("a.txt", b"\xef\xbb\xbfone"), {}, ["one"]),
    "latin-1, unnamed": (
        put("a.txt", b"caf\xe9"),
        {},
        r"encoding_errors: .*a.txt is not UTF-8 \(.* byte 0xe9 in position 3.*\); set data.encoding, such as latin-1",
    ),
    "latin-1": (put("a.txt", b"caf\xe9"), {"encoding": "latin-1"}, ["café"]),
    "latin-1, replaced": (put("a.txt", b"caf\xe9"), {"encoding_errors": "replace"}, ["caf\ufffd"]),
    "UTF-16, unnamed": (put("a.txt", "one".encode("utf-16")), {}, r"encoding_errors: .*a.txt is not UTF-8 \(.* 0xff"),
    "UTF-16": (put("a.txt", "one\r\né".encode("utf-16")), {"encoding": "utf-16"}, ["one\r\né"]),
    "empty": (put("a.txt", ""), {}, []),
    "one huge line": (put("a.txt", "x" * 3_000_000), {}, ["x" * 3_000_000]),
    "gzip": (put("a.txt.gz", gzip.compress(b"one")), {}, ["one"]),
    "upper-case gzip": (put("A.TXT.GZ", gzip.compress(b"one")), {}, ["one"]),
    "bzip2": (put("a.jsonl.bz2", bz2.compress(ROWS.encode())), {}, ["one", "two"]),
    "xz": (put("a.csv.xz", lzma.compress(b"text,n\none,1\n")), {}, ["one"]),
    "zstd without its library": (put("a.jsonl.zst", b"(\xb5/\xfd"), {}, "files: cannot read .*a.jsonl.zst: "),
    "truncated gzip": (
        put("a.jsonl.gz", gzip.compress(ROWS.encode())[:-9]),
        {},
        "files: cannot read .*a.jsonl.gz.*: Compressed file ended before",
    ),
    "gzip that is none": (put("a.txt.gz", "one"), {}, "files: cannot read .*a.txt.gz: Not a gzipped file"),
    "JSON Lines": (put("a.jsonl", ROWS), {}, ["one", "two"]),
    "JSON Lines with blank lines, CRLF and no last line end": (
        put("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two"}'),
        {},
        ["one", "two"],
    ),
    "JSON Lines in UTF-16": (put("a.jsonl", ROWS.encode("utf-16")), {"encoding": "utf-16"}, ["one", "two"]),
    "nulls and empty texts": (put("a.jsonl", '{"text": null}\n{"text": ""}\n' + ROWS), {}, ["one", "two"]),
    "strings like dates and numbers": (
        put("a.jsonl", '{"text": "2026-01-01"}\n{"text": "007"}\n'),
        {},
        ["2026-01-01", "007"],
    ),
    "bad line": (
        put("a.jsonl", ROWS + '{"text": "thr\n'),
        {},
        "files: .*a.jsonl:3 is not JSON: Invalid control .*column 14",
    ),
    "text in another encoding": (
        put("a.jsonl", ROWS.encode() + b'{"text": "caf\xe9"}\n'),
        {},
        "encoding_errors: .*a.jsonl:3 is not UTF-8",
    ),
    "another column in another encoding": (put("a.jsonl", b'{"text": "one", "n": "\xe9"}\n'), {}, ["one"]),
    "number as text": (put("a.jsonl", '{"text": 7}'), {}, "text_column: .*a.jsonl:1: expected text in 'text', got int"),
    "nested object": (
        put("a.jsonl", '{"text": {"en": "one"}}'),
        {},
        "text_column: .*a.jsonl:1: expected text in 'text', got dict",
    ),
    "wrong column": (
        put("a.jsonl", '{"body": "x", "n": 1}'),
        {},
        "text_column: .*a.jsonl:1 has no 'text'; it has body, n",
    ),
    "a list in a line": (put("a.jsonl", '["one"]'), {}, "text_column: .*a.jsonl:1 has no 'text'; it is not an object"),
    "JSON with a list": (put("a.json", '[{"text": "one"},\n {"text": "two"}]'), {}, ["one", "two"]),
    "JSON with a list inside": (put("a.json", '{"version": 1, "data": [{"text": "one"}]}'), {}, ["one"]),
    "JSON with one object": (put("a.json", '{"text": "one"}'), {}, ["one"]),
    "JSON that is JSON Lines": (put("a.json", ROWS), {}, ["one", "two"]),
    "JSON that ends early": (
        put("a.json", '[{"text": "one"},\n'),
        {},
        "files: .*a.json:2 is not JSON: Expecting value",
    ),
    "JSON that nests too deeply": (
        put("a.json", "[" * 100_000),
        {},
        "files: .*a.json:1 is not JSON: maximum recursion",
    ),
    "CSV with quoted line breaks": (put("a.csv", 'n,text\n1,"o""n\r\ne"\r\n2,two\n'), {}, ['o"n\r\ne', "two"]),
    "CSV with words of nothing": (put("a.csv", "text\nNA\n007\nnull\n\n1.50\n"), {}, ["NA", "007", "null", "1.50"]),
    "CSV with a huge field": (put("a.csv", 'text\n"' + "x\n" * 200_000 + '"\n'), {}, ["x\n" * 200_000]),
    "ragged CSV": (put("a.csv", "text,n\none,1\ntwo\n"), {}, r"files: .*a.csv:3 has 1 fields \(expected 2\)"),
    "CSV with an open quote": (put("a.csv", 'text\n"one\n'), {}, "files: .*a.csv:2 is not CSV: unexpected end of data"),
    "CSV with a column twice": (put("a.csv", "text,text\na,b\n"), {}, "files: .*a.csv:1 has 2 columns 'text'"),
    "CSV without the column": (
        put("a.csv", "a;text\n1;one\n"),
        {},
        "text_column: .*a.csv:2 has no 'text'; it has a;text",
    ),
    "CSV without rows": (put("a.csv", "text\n"), {}, []),
    "CSV that begins with blank lines": (put("a.csv", "\n\ntext\none\n"), {}, ["one"]),
    "CSV without a header": (put("a.csv", ""), {}, []),
    "Parquet": (table("a.parquet", text=["one", None, "", "two"], n=[1, 2, 3, 4]), {}, ["one", "two"]),
    "Parquet of large strings": (table("a.parquet", text=typed(["one"], "large_string")), {}, ["one"]),
    "Parquet of a dictionary": (
        table("a.parquet", text=typed(["one", "two", "one"], "dictionary", "int8", "string")),
        {},
        ["one", "two", "one"],
    ),
    "Parquet of bytes": (
        table("a.parquet", text=typed([b"one"], "binary")),
        {},
        "text_column: .*a.parquet:1: expected text in 'text', got bytes",
    ),
    "Parquet without the column": (table("a.parquet", n=[1]), {}, "text_column: .*a.parquet has no 'text'; it has n"),
    "Parquet without rows": (table("a.parquet", text=typed([], "string")), {}, []),
    "Parquet that is none": (put("a.parquet", "one"), {}, "files: cannot read .*a.parquet: "),
    "Parquet that is empty": (put("a.parquet", ""), {}, "files: cannot read .*a.parquet: "),
    "chat": (put("a.jsonl", json.dumps({"messages": CHAT})), {"text_column": "messages"}, [CHATML]),
    "chat in Parquet": (table("a.parquet", messages=[CHAT]), {"text_column": "messages"}, [CHATML]),
    "chat with a template": (
        put("a.json", json.dumps([{"messages": CHAT}])),
        {
            "text_column": "messages",
            "chat_template": "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}; {% endfor %}",
        },
        ["u: Hi; a: Hello; "],
    ),
    "chat about templates": (
        put("a.jsonl", '{"messages": [{"role": "a", "content": "{{ 7 * 7 }}"}]}'),
        {"text_column": "messages"},
        ["<|im_start|>a\n{{ 7 * 7 }}<|im_end|>\n"],
    ),
    "chat without content": (
        put("a.jsonl", '{"messages": [{"role": "user"}]}'),
        {"text_column": "messages"},
        "chat_template: .*a.jsonl:1: expected text in content of each message",
    ),
    "chat without role": (
        put("a.jsonl", '{"messages": [{"content": "Hi"}]}'),
        {"text_column": "messages"},
        "chat_template: .*a.jsonl:1: 'dict object' has no attribute 'role'",
    ),
    "template that breaks out": (
        put("a.jsonl", json.dumps({"messages": CHAT})),
        {"text_column": "messages", "chat_template": "{{ messages.__class__.__mro__ }}"},
        "chat_template: .*a.jsonl:1: access to attribute '__class__'",
    ),
    "list of texts": (
        put("a.jsonl", '{"text": ["one"]}'),
        {},
        "text_column: .*a.jsonl:1: expected text in 'text', got list",
    ),
    "hidden and other files": (hidden, {}, ["one"]),
    "links": (links, {}, ["one", "two", "three"]),
    "folder with the name of a file": (
        lambda folder: [(folder / "a.txt").mkdir(), (folder / "a.txt" / "b.txt").write_text("one")],
        {},
        ["one"],
    ),
    "names with brackets and a colon": (both(put("a[1].txt", "one"), put("b::c.txt", "two")), {}, ["one", "two"]),
    "only pictures": (put("a.png", "x"), {}, "files: .* matches 1 files, but none with extension .txt, .md"),
    "nothing": (lambda folder: None, {}, "files: .* matches no file"),
}


@pytest.mark.parametrize("name", TEXT_ZOO)
def test_text_is_right_or_refused_by_name(tmp_path: Path, name: str):
    make, settings, expected = TEXT_ZOO[name]
    folder = tmp_path / "zoo"
    folder.mkdir()
    make(folder)
    data = TextDataModule("files", files=str(folder), cache_dir=str(tmp_path / "cache"), **settings)
    if isinstance(expected, list):
        assert list(data.corpus.splits.train) == expected
        return
    with pytest.raises(UserError, match=f"^data.{expected}[^\n]*$"):
        data.prepare_data()
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_text_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("one")

    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "a.txt"))

    data = TextDataModule("files", files=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match="^data.files: cannot read .*a.txt: Permission denied$"):
        data.corpus.splits  # noqa: B018
    monkeypatch.undo()
    monkeypatch.setattr(Path, "open", denied)
    for use in (lambda: data.corpus.splits.train.fingerprint, lambda: list(data.corpus.splits.train)):
        with pytest.raises(UserError, match="^data.files: cannot read .*a.txt: .*Permission denied"):
            use()


def test_skipped_text_files_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name, make in (("hidden", hidden), ("links", links)):
        (tmp_path / name).mkdir()
        make(tmp_path / name)
        data = TextDataModule("files", files=str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
        with caplog.at_level("INFO"):
            data.corpus.splits, data.corpus.splits  # noqa: B018
    found = [record.message for record in caplog.records if "skipped" in record.message]
    assert found == [
        "data.files: 1 files found, skipped: 1 .PNG, 4 hidden, 1 without extension",
        "data.files: 3 files found, skipped: 1 broken link",
    ]


# --- Tokenizers and prompts -------------------------------------------------------------------------------------------

WORD_LEVEL = hf.Tokenizer(hf.models.WordLevel({"?": 0, "the": 1, "</s>": 2, "cat": 3}, unk_token="?"))
WORD_LEVEL.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
WHOLE = WORD_LEVEL.to_str()
LETTERS = {
    "</s>": 0,
    **{letter: i for i, letter in enumerate(["t", "h", "e", "Ġ", "c", "a"], start=1)},
    "th": 7,
    "the": 8,
}
MERGES = "t h\nth e\n"
PIECES = "[PAD]\n[UNK]\n[SEP]\nthe\nca\n##t\n"


def files(**contents: str | bytes) -> Callable[[Path], Path]:
    """Write a folder of files, named with two underscores for a dot."""

    def make(folder: Path) -> Path:
        for name, content in contents.items():
            data = content.encode() if isinstance(content, str) else content
            (folder / name.replace("__", ".")).write_bytes(data)
        return folder

    return make


def changed(**parts: object) -> str:
    """Return a tokenizer.json with other parts of its model."""
    whole = json.loads(WHOLE)
    return json.dumps({**whole, "model": {**whole["model"], **parts}})


def bpe(merges: str | bytes = MERGES, vocabulary: object = LETTERS, **others: str) -> Callable[[Path], Path]:
    return files(vocab__json=json.dumps(vocabulary), merges__txt=merges, **others)


TOKENIZERS = {
    "whole": (files(tokenizer__json=WHOLE), [1, 3]),
    "byte-order mark": (files(tokenizer__json="\ufeff" + WHOLE), [1, 3]),
    "truncated": (files(tokenizer__json=WHOLE[:-40]), "tokenizer.json is damaged: EOF while parsing"),
    "not UTF-8": (files(tokenizer__json=b"\xff\xfe{}"), "cannot read .*tokenizer.json: 'utf-8'"),
    "no tokenizer": (files(tokenizer__json='{"a": 1}'), "tokenizer.json is damaged: "),
    "a list": (files(tokenizer__json="[]"), "tokenizer.json is damaged: "),
    "empty file": (files(tokenizer__json=""), "tokenizer.json is damaged: EOF"),
    "empty vocabulary": (
        files(tokenizer__json=changed(vocab={})),
        "tokenizer.json is damaged: the vocabulary is empty",
    ),
    "one id twice": (
        files(tokenizer__json=changed(vocab={"?": 0, "the": 1, "</s>": 2, "cat": 1})),
        "tokenizer.json is damaged: the tokens '(the|cat)' and '(the|cat)' have the same id 1",
    ),
    "gaps in ids": (files(tokenizer__json=changed(vocab={"?": 0, "the": 70, "</s>": 9, "cat": 800})), [70, 800]),
    "negative id": (
        files(tokenizer__json=changed(vocab={"?": 0, "the": -1, "</s>": 2})),
        "tokenizer.json is damaged: ",
    ),
    "without separator": (
        files(tokenizer__json=changed(vocab={"?": 0, "the": 1})),
        "data.separator: the tokenizer has none",
    ),
    "nothing in the folder": (files(), "no tokenizer.json, vocab.json, vocab.txt, "),
    "only other files": (files(config__json="{}", readme__md="a"), "no tokenizer.json, vocab.json, vocab.txt, "),
    "truncated config": (
        files(tokenizer__json=WHOLE, tokenizer_config__json='{"eos'),
        "tokenizer_config.json is damaged: Unterminated",
    ),
    "config that is a list": (
        files(tokenizer__json=WHOLE, tokenizer_config__json="[1]"),
        "tokenizer_config.json is damaged: expected an object, got list",
    ),
    "unknown special tokens": (
        files(
            tokenizer__json=WHOLE, tokenizer_config__json='{"eos_token": "<none>", "mask_token": 3, "pad_token": null}'
        ),
        [1, 3],
    ),
    "vocab.json": (bpe(), [8, 4, 5, 6, 1]),
    "version of the merges": (bpe("#version: 0.2\n" + MERGES), [8, 4, 5, 6, 1]),
    "line breaks of Windows": (bpe(MERGES.replace("\n", "\r\n")), [8, 4, 5, 6, 1]),
    "merges with a byte-order mark": (bpe("\ufeff" + MERGES), [8, 4, 5, 6, 1]),
    "no merges": (
        files(vocab__json=json.dumps(LETTERS)),
        "no merges.txt in .* \\(expected vocab.json and merges.txt\\)",
    ),
    "merges that are empty": (bpe(""), [1, 2, 3, 4, 5, 6, 1]),
    "merge of three": (bpe("t h\nth e s\n"), "merges.txt:2: expected two tokens, got 'th e s'"),
    "merge of unknown tokens": (bpe("t h\nx y\n"), "vocab.json with merges.txt is damaged: .*`x`"),
    "vocab.json that is a list": (bpe(vocabulary=["a"]), "vocab.json is damaged: expected an object, got list"),
    "vocab.json with text for ids": (
        bpe(vocabulary={"a": "x"}),
        "vocab.json .* is damaged: expected a whole number as the id of 'a'",
    ),
    "vocab.json with one id twice": (
        bpe(vocabulary={**LETTERS, "x": 3}),
        "vocab.json is damaged: the tokens 'e' and 'x'",
    ),
    "vocab.json that is empty": (bpe("", vocabulary={}), "vocab.json is damaged: the vocabulary is empty"),
    "special token of the config": (bpe(tokenizer_config__json='{"eos_token": "<end>"}'), [8, 4, 5, 6, 1]),
    "vocab.txt": (files(vocab__txt=PIECES), [3, 4, 5]),
    "vocab.txt of Windows": (files(vocab__txt="\ufeff" + PIECES.replace("\n", "\r\n")), [3, 4, 5]),
    "vocab.txt without an end": (files(vocab__txt=PIECES.rstrip()), [3, 4, 5]),
    "vocab.txt with a token twice": (files(vocab__txt=PIECES + "the\n"), [6, 4, 5]),  # the last, as in transformers
    "vocab.txt without [UNK]": (files(vocab__txt="[SEP]\nthe\n"), "vocab.txt is damaged: no token \\[UNK\\]"),
    "vocab.txt that is empty": (files(vocab__txt=""), "vocab.txt is damaged: no token \\[UNK\\]"),
    "vocab.txt in Latin-1": (files(vocab__txt=b"[UNK]\n[SEP]\n\xe9\n"), "cannot read .*vocab.txt: 'utf-8'"),
    "sentencepiece garbage": (
        files(tokenizer__model=b"\x00garbage" * 9),
        "tokenizer.model is damaged: .*parse",
    ),
    "sentencepiece that is empty": (files(spiece__model=b""), "spiece.model is damaged: "),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_zoo_of_tokenizers(name: str, tmp_path: Path):
    make, expected = TOKENIZERS[name]
    if "sentencepiece" in name:
        pytest.importorskip("sentencepiece")
        pytest.importorskip("transformers")
    folder = str(make(tmp_path))
    if isinstance(expected, list):
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.encode("the cat") == expected
        assert Tokenizer.from_json(tokenizer.to_json(), tokenizer.separator_id).encode("the cat") == expected
    else:
        with pytest.raises(UserError, match=f"^data\\.[a-z]+: .*{expected.removeprefix('data.separator: ')}") as caught:
            Tokenizer.load(folder)
        assert "\n" not in str(caught.value)


PROMPT_FILES = {
    "no rows": (b"", "x has no rows"),
    "white space": (b" \n\n", "x has no rows"),
    "line breaks of Windows": ('\ufeff{"prompt": "a"}\r\n\r\n{"prompt": "b"}'.encode(), None),
    "not JSON": (b'{"prompt": "a"}\n{"prompt": \n', "x:2: not JSON: Expecting value"),
    "single quotes": (b"{'prompt': 'a'}", "x:1: not JSON: Expecting property name"),
    "an indented list": (b'[\n {"prompt": "a"}\n]', "x:1: not JSON: "),
    "a list": (b'["a"]', 'x:1: expected an object with a text "prompt"'),
    "a text": (b'"a"', 'x:1: expected an object with a text "prompt"'),
    "null": (b'{"prompt": "a"}\nnull', 'x:2: expected an object with a text "prompt"'),
    "no prompt": (b'{"text": "a"}', 'x:1: expected an object with a text "prompt"'),
    "a number": (b'{"prompt": 3}', 'x:1: expected an object with a text "prompt"'),
    "Latin-1": (b'{"prompt": "a"}\n\n{"prompt": "\xe9"}', "x:3: not UTF-8: "),
    "compressed": (b"\x1f\x8b\x08\x00", "x:1: not UTF-8: "),
    "half a character": (b'{"prompt": "\\ud800"}', "x:1: not UTF-8: "),
    "a field of the output": (b'{"prompt": "a", "tokens": 1}', "x:1: field 'tokens' is one of the output's"),
    "too long": (
        b'{"prompt": "a"}\n{"prompt": "%s"}' % (b"a" * 9),
        "x:2: prompt of 9 tokens, the model's context_length is 8",
    ),
    "deep": (b"[" * 100_000, "x:1: not JSON: "),
}


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a context of eight tokens."""
    sizes = {"dim": 8, "depth": 1, "num_heads": 1, "param_tokens": 4}
    task = LitCausalLM("tokenformer_lm_tiny", 257, 8, overrides=sizes)
    task.tokenizer_json = Tokenizer.bytes().to_json()
    path = tmp_path_factory.mktemp("eight") / "last.ckpt"
    torch.save(fresh_checkpoint(task, task.state_dict()), path)
    return str(path)


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_zoo_of_prompts(name: str, eight: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    content, expected = PROMPT_FILES[name]
    (tmp_path / "x").write_bytes(content)
    output = tmp_path / "out.jsonl"

    def run() -> None:
        generate_text(eight, prompts=str(tmp_path / "x"), output=str(output), max_new_tokens=1, device="cpu")

    if expected is None:
        run()
        assert [json.loads(line)["prompt"] for line in output.read_text().splitlines()] == ["a", "b"][
            : content.count(b"prompt")
        ]
        return
    with pytest.raises(UserError, match="^prompts: ") as caught:
        run()
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not output.exists() and capsys.readouterr().out == ""

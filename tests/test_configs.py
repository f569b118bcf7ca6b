"""Every config that ships is parsed and built; those on embedded data run."""

import gzip
import os
import struct

import numpy as np
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PillowImage

from lit_tokenformer.cli import main, shipped_configs

CONFIGS = shipped_configs()


def imagenet(folder, _):
    """A folder in ImageNet's layout with all its 1000 classes and one small image in each."""
    for split in ("train", "val"):
        for number in range(1000):
            (folder / split / f"n{number:08d}").mkdir(parents=True)
    picture = folder / "picture.jpg"
    PillowImage.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(picture)
    for place in folder.glob("*/n*"):
        os.link(picture, place / "0.jpg")
    return ["--data.root", str(folder)]


def fashion_mnist(folder, _):
    """Fashion-MNIST's four files with a few images each."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 256), ("t10k", 32)):
        images, labels = np.zeros((count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
            (raw / f"{name}-{kind}-ubyte").write_bytes(head + array.tobytes())
            with gzip.open(raw / f"{name}-{kind}-ubyte.gz", "wb") as packed:
                packed.write(head + array.tobytes())
    return ["--data.root", str(folder)]


def hugging_face(folder, _):
    """A local data set that load_dataset opens as it opens one on the hub."""
    features = Features({"img": Image(), "label": ClassLabel(names=[str(number) for number in range(10)])})
    picture = PillowImage.fromarray(np.zeros((32, 32, 3), np.uint8))
    rows = Dataset.from_dict({"img": [picture] * 140, "label": [i % 10 for i in range(140)]}, features=features)
    for split in ("train", "test"):
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return ["--data.hf_name", str(folder)]


def embedded_text(_, cache):
    return ["--data.cache_dir", str(cache)]


def embedded_images_and_text(_, cache):
    return ["--data.text.cache_dir", str(cache)]


def hugging_face_text(folder, cache):
    """As above for text, with a tokenizer that needs no hub."""
    rows = Dataset.from_dict({"text": [f"Document {number}. " * 300 for number in range(64)]})
    rows.to_parquet(folder / "train-00000-of-00001.parquet")
    return [*embedded_text(folder, cache), "--data.hf_name", str(folder), "--data.tokenizer", "bytes"]


DATA = {
    ("MultiTaskDataModule", None): embedded_images_and_text,
    ("ImageDataModule", "imagefolder"): imagenet,
    ("ImageDataModule", "fashion_mnist"): fashion_mnist,
    ("ImageDataModule", "huggingface"): hugging_face,
    ("TextDataModule", "python_stdlib"): embedded_text,
    ("TextDataModule", "huggingface"): hugging_face_text,
}


def data_arguments(config, folder, cache):
    data = yaml.safe_load(config.read_text())["data"]
    make = DATA.get((data["class_path"].split(".")[-1], data["init_args"].get("dataset")))
    return make(folder, cache) if make is not None else []


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_parsed_built_and_planned(name, text_cache, tmp_path, capsys):
    args = [*data_arguments(CONFIGS[name], tmp_path, text_cache), "--trainer.default_root_dir", str(tmp_path)]
    assert main(["plan", "--config", name, *args, "--trainer.accelerator", "cpu", "--trainer.devices", "1"]) == 0
    stages = yaml.safe_load(CONFIGS[name].read_text())["trainer"]["callbacks"][0]["init_args"].get("schedule", {})
    shown = capsys.readouterr().out
    assert all(f"qkv {tokens}," in shown for tokens in stages.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("tokenformer_")])
def test_configs_of_small_data_run_for_some_steps(name, text_cache, tmp_path):
    args = [*data_arguments(CONFIGS[name], tmp_path, text_cache), "--trainer.accelerator", "cpu"]
    args += ["--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", name, *args, "--trainer.fast_dev_run", "2"]) == 0

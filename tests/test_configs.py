"""Every config that ships is parsed and built; those on embedded data run."""

import gzip
import os
import struct
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from lightning.pytorch import Callback
from PIL import Image as PillowImage

from lit_tokenformer.checkpoints.load import write_checkpoint
from lit_tokenformer.cli.main import main
from lit_tokenformer.cli.parser import shipped_configs
from lit_tokenformer.data import Tokenizer
from lit_tokenformer.tasks import LitCausalLM
from lit_tokenformer.tasks.rebuild import fresh_checkpoint

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
    return ["--data.tasks.text.cache_dir", str(cache)]


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
    ("TextDataModule", "python_docs"): embedded_text,
    ("TextDataModule", "huggingface"): hugging_face_text,
}


def data_arguments(config, folder, cache):
    settings = yaml.safe_load(config.read_text())
    data = settings["data"]
    make = DATA.get((data["class_path"].split(".")[-1], data["init_args"].get("dataset")))
    more = make(folder, cache) if make is not None else []
    if settings["model"]["init_args"]["preset"] == "checkpoint":
        sizes = {"dim": 16, "depth": 2, "num_heads": 1}
        task = LitCausalLM("gpt2_tiny", 257, data["init_args"]["block_size"], overrides=sizes)
        task.tokenizer_json = Tokenizer.bytes().to_json()
        write_checkpoint(fresh_checkpoint(task, task.state_dict()), folder / "base.ckpt")
        more += ["--ckpt_path", str(folder / "base.ckpt")]
    return more


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_parsed_built_and_planned(name, text_cache, tmp_path, capsys):
    args = [*data_arguments(CONFIGS[name], tmp_path, text_cache), "--trainer.default_root_dir", str(tmp_path)]
    assert main(["plan", "--config", name, *args, "--trainer.accelerator", "cpu", "--trainer.devices", "1"]) == 0
    stages = yaml.safe_load(CONFIGS[name].read_text())["trainer"]["callbacks"][0]["init_args"].get("schedule", {})
    shown = capsys.readouterr().out
    assert all(f"qkv {tokens}," in shown for tokens in stages.values() if isinstance(tokens, int))
    assert name != "grow_pretrained" or "hidden 96, depth 3" in shown  # 1.5 times those of the checkpoint


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_saves_the_newest_state_at_an_interval(name):
    callbacks = yaml.safe_load(CONFIGS[name].read_text())["trainer"]["callbacks"]
    best, last = (one["init_args"] for one in callbacks if one["class_path"].endswith(".ModelCheckpoint"))
    assert "monitor" in best and "save_last" not in best  # which saves only when the score improves
    interval = {key: value for key, value in last.items() if key.startswith("every_n_")}
    assert last == {"filename": "last", "enable_version_counter": False, **interval}
    assert interval or "max_epochs" in yaml.safe_load(CONFIGS[name].read_text())["trainer"]  # else each epoch


class Reads(Callback):
    """The step of last.ckpt after each epoch."""

    steps: ClassVar[list[tuple[int, int]]] = []

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.global_step:
            path = os.path.join(trainer.log_dir, "checkpoints", "last.ckpt")
            self.steps.append((trainer.global_step, torch.load(path, weights_only=True)["global_step"]))


def test_last_is_the_newest_state_where_the_score_does_not_improve(tmp_path):
    Reads.steps.clear()
    config = yaml.safe_load(CONFIGS["vit_small"].read_text())
    trainer, model = config["trainer"], config["model"]["init_args"]
    trainer["callbacks"] = [*trainer["callbacks"][1:], {"class_path": "test_configs.Reads"}]  # without growth
    trainer |= {"max_epochs": 4, "limit_train_batches": 2, "limit_val_batches": 1, "default_root_dir": str(tmp_path)}
    trainer |= {"accelerator": "cpu", "enable_progress_bar": False}
    model["overrides"] |= {"dim": 16, "depth": 1, "num_heads": 2, "param_tokens": 4}
    model["optimizer"]["init_args"]["lr"] = 0.0
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "config.yaml")]) == 0
    assert Reads.steps == [(2, 2), (4, 4), (6, 6)]
    (folder,) = tmp_path.glob("lightning_logs/version_0/checkpoints")
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 8
    assert len(os.listdir(folder)) == 2  # and the best


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("tokenformer_")])
def test_configs_of_small_data_run_for_some_steps(name, text_cache, tmp_path):
    args = [*data_arguments(CONFIGS[name], tmp_path, text_cache), "--trainer.accelerator", "cpu"]
    args += ["--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", name, *args, "--trainer.fast_dev_run", "2"]) == 0

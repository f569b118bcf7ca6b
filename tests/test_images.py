"""Image data: what a batch holds, what bad input says, and that a resumed run sees the batches it would have seen."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import random
import re
import struct
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before datasets is imported

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from torch.utils.data import DataLoader

from lit_tokenformer.data import Augmentation, ImageDataModule
from lit_tokenformer.data.images.datasets import StreamImages
from lit_tokenformer.data.images.sources import decode_hub_image
from lit_tokenformer.data.images.transforms import train_transform
from lit_tokenformer.data.resumable import EpochSampler, ResumableStreamLoader, seeded
from lit_tokenformer.errors import UserError

torch.set_num_threads(1)

RECIPE = Augmentation(
    auto_augment="rand-m9-mstd0.5-inc1",
    mixup=0.8,
    cutmix=1.0,
    label_smoothing=0.1,
    reprob=0.25,
    interpolation="bicubic",
)
SMALL = {"image_size": 16, "batch_size": 4, "num_workers": 0}


def write_images(
    folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (20, 24), ending: str = "png"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:03d}.{ending}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with 12 training and 4 validation images each."""
    for number, name in enumerate(("cat", "dog")):
        write_images(tmp_path / "data" / "train" / name, 12, seed=number)
        write_images(tmp_path / "data" / "val" / name, 4, seed=10 + number)
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def hugging_face_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf_cache"))


def imagefolder(root: Path, **settings: object) -> ImageDataModule:
    return ImageDataModule("imagefolder", root=str(root), **{**SMALL, **settings})


def hub(root: Path, **settings: object) -> ImageDataModule:
    return ImageDataModule("huggingface", root=str(root), **{"hf_name": "imagefolder", **SMALL, **settings})


def digest(batch: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> str:
    return hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in batch)).hexdigest()[:16]


# --- Batches ---------------------------------------------------------------------------------------------------------


def test_digits_need_no_settings():
    data = ImageDataModule()
    assert (data.num_classes, data.image_size, data.num_train_samples) == (10, 8, 1437)
    assert data.class_names == [str(digit) for digit in range(10)]
    image, label = next(iter(data.train_dataloader()))
    assert image.shape == (32, 3, 8, 8) and image.dtype == torch.float32
    assert label.shape == (32,) and label.dtype == torch.int64
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 360
    with pytest.raises(UserError, match="test: the data have no test split"):
        data.test_dataloader()
    assert data.train_dataloader().num_workers == 0


def test_digits_are_normalised_and_split_by_class():
    splits = ImageDataModule().splits
    assert np.bincount(splits.val.labels).min() >= 34  # 360 over 10 classes
    images = torch.cat([image for image, _ in ImageDataModule(batch_size=360).val_dataloader()])
    assert abs(images.mean()) < 0.05 and abs(images.std() - 1) < 0.05


def test_digits_are_never_flipped_unless_asked():
    def flips(augmentation: Augmentation) -> int:
        data = ImageDataModule(augmentation=augmentation)
        fixed = data._eval_transform
        order = list(data.train_dataloader().sampler)
        images = data.train_dataloader().dataset
        return sum(
            torch.equal(images[key][0], fixed(images.reader.samples.read(key[2])).flip(-1)) for key in order[:200]
        )

    assert flips(Augmentation(shift=0.0)) == 0
    assert flips(Augmentation(shift=0.0, hflip=0.5)) > 50


def test_shift_moves_the_whole_image_by_at_most_its_share():
    data = ImageDataModule(augmentation=Augmentation(shift=1 / 8))
    images = data.train_dataloader().dataset
    fixed = data._eval_transform(images.reader.samples.read(0))
    padded = torch.nn.functional.pad(fixed, (1, 1, 1, 1), value=float(fixed.min()))
    moves = [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    shown = [images[(0, repeat, 0)][0] for repeat in range(30)]
    assert all(any(torch.allclose(image, move) for move in moves) for image in shown)
    assert len({digest([image]) for image in shown}) > 3


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str):
    write_images(tmp_path / "source", 4)
    for number, path in enumerate(sorted((tmp_path / "source").iterdir())):
        kind = "tiff" if mode == "CMYK" else "png"
        target = tmp_path / "data" / "train" / ("one", "two")[number % 2] / f"{path.stem}.{kind}"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert(mode).save(target)
    image, _ = next(iter(imagefolder(tmp_path / "data", batch_size=2, val_fraction=0.25).train_dataloader()))
    assert image.shape == (2, 3, 16, 16)


def test_train_transforms_give_what_timm_gives_to_the_last_bit():
    policy, mean, std = "rand-m5-mstd0.5", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    recipe = Augmentation(
        crop="rrc", hflip=0.5, auto_augment=policy, interpolation="bicubic", reprob=0.5, crop_pct=0.875
    )
    ours = train_transform(recipe, 24, mean, std)
    theirs = create_transform(
        24,
        is_training=True,
        auto_augment=policy,
        interpolation="bicubic",
        re_prob=0.5,
        re_mode="pixel",
        mean=mean,
        std=std,
    )
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for number in range(20):
        with seeded(number):
            image = ours(Image.fromarray(pixels))
        with seeded(number):
            expected = theirs(Image.fromarray(pixels))
        assert image.is_contiguous() and torch.equal(image, expected)


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "augmix-m10", "original"])
def test_a_policy_may_leave_an_image_no_bits(policy: str):
    colour = train_transform(Augmentation(crop="rrc", auto_augment=policy), 8, (0.5,) * 3, (0.5,) * 3).transforms[1]
    (step,) = colour.transforms
    found = getattr(step, "ops", None) or [one for pair in step.policy for one in pair]
    posterize: list[AugmentOp] = [one for one in found if one.name.startswith("Posterize")]
    assert posterize
    image = Image.new("RGB", (8, 8), "white")
    assert all(one.aug_fn(image, 0).getextrema() == ((0, 0),) * 3 for one in posterize)
    assert all(one.aug_fn(image, 4).getextrema() == ((240, 240),) * 3 for one in posterize)


def test_imagenet_recipe_gives_soft_labels_in_training_only(folder: Path):
    data = imagefolder(folder, augmentation=RECIPE, image_size=224)
    kinds = [type(step).__name__ for stage in data._train_transform.transforms for step in stage.transforms]
    assert kinds[:2] == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip"]
    assert "RandAugment" in kinds and "RandomErasing" in kinds
    assert data._eval_transform.transforms[0].size == 256 and data._eval_transform.transforms[1].size == (224, 224)

    recorder = Recorder()
    fit(data, recorder, max_epochs=1, limit_val_batches=1)
    (train_label,), (val_label,) = set(recorder.train_labels), set(recorder.val_labels)
    assert train_label == (torch.float32, (4, 2)) and val_label == (torch.int64, (4,))


def test_label_smoothing_alone_leaves_images_alone():
    data = ImageDataModule(batch_size=5, augmentation=Augmentation(label_smoothing=0.1))
    image, label = next(iter(data.train_dataloader()))
    mixed, soft = data.mix((image, label), epoch=0, batch_idx=0)
    assert torch.equal(mixed, image) and torch.equal(soft.argmax(1), label)
    torch.testing.assert_close(soft.max(1).values, torch.full((5,), 0.91))


def test_mixup_follows_from_its_place_in_the_run_alone():
    data = ImageDataModule(batch_size=4, augmentation=Augmentation(mixup=0.8, cutmix=1.0))
    batch = next(iter(data.train_dataloader()))

    def mix(epoch: int, batch_idx: int) -> str:
        return digest(data.mix(tuple(part.clone() for part in batch), epoch, batch_idx))

    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    assert mix(1, 2) == mix(1, 2)
    assert len({mix(0, 0), mix(0, 1), mix(1, 0)}) == 3
    assert np.array_equal(before, np.random.get_state()[1])


# --- Data sets -------------------------------------------------------------------------------------------------------


def write_fashion_mnist(root: Path) -> None:
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 10)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
        for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
            (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    base = root / CIFAR10.base_folder
    base.mkdir(parents=True)

    def dump(name: str, content: dict) -> str:
        (base / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    parts = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    sums = {}
    for name in parts:
        pixels = np.random.default_rng(len(sums)).integers(0, 256, (10, 3072), dtype=np.uint8)
        sums[name] = dump(name, {"data": pixels, "labels": list(range(10))})
    names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    meta = dump("batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in parts[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [[parts[5], sums[parts[5]]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "filename": "batches.meta", "md5": meta})


def test_fashion_mnist_is_read_from_its_files(tmp_path: Path):
    write_fashion_mnist(tmp_path)
    data = ImageDataModule("fashion_mnist", root=str(tmp_path), batch_size=4, num_workers=0, val_fraction=0.25)
    assert (data.num_classes, data.num_train_samples, data.class_names[9]) == (10, 30, "Ankle boot")
    assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 28, 28)
    assert len(data.val_dataloader().dataset) == 10 and len(data.test_dataloader().dataset) == 10


def test_cifar10_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_cifar(tmp_path, monkeypatch)
    data = ImageDataModule("cifar10", root=str(tmp_path), batch_size=4, num_workers=0, val_fraction=0)
    assert (data.num_classes, data.num_train_samples, data.class_names[3]) == (10, 50, "cat")
    assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 32, 32)
    assert data.splits.val is data.splits.test  # val_fraction 0


def test_timms_names_of_torchvision_data_sets_are_read(tmp_path: Path):
    write_fashion_mnist(tmp_path)
    small = {"root": str(tmp_path), "batch_size": 4, "num_workers": 0}
    ours, theirs = (ImageDataModule(name, **small) for name in ("fashion_mnist", "torch/fashion_mnist"))
    assert [digest(batch) for batch in theirs.train_dataloader()] == [
        digest(batch) for batch in ours.train_dataloader()
    ]
    write_images(tmp_path / "train" / "cat", 2), write_images(tmp_path / "train" / "dog", 2)
    write_images(tmp_path / "val" / "cat", 1), write_images(tmp_path / "val" / "dog", 1)
    folder = ImageDataModule("torch/image_folder", **{**small, "image_size": 16})
    assert folder.class_names == ["cat", "dog"] and len(folder.splits.val.labels) == 2
    check_refused(ImageDataModule("torch/nothing", **small), "data.dataset: torch/nothing: Unknown torchvision dataset")


class TensorFlowData:
    """Stands in for TensorFlow Datasets, which needs no TensorFlow to read array_record."""

    class decode:
        SkipDecoding = object

    def __init__(self, formats: str) -> None:
        self.formats = formats
        names = SimpleNamespace(names=["cat", "dog"])
        self.info = SimpleNamespace(features={"label": names}, splits={"train": 8, "test": 4})

    def builder(self, name: str, data_dir: str) -> TensorFlowData:
        if name != "pets":
            raise ValueError(f"Dataset {name} not found.\nMore lines")
        return self

    def as_data_source(self, split: str, decoders: dict) -> list[dict]:
        if self.formats != "array_record":
            raise NotImplementedError(f"Random access data source for file format {self.formats}\nis not supported.")
        images = [Image.new("RGB", (4, 4), (number,) * 3) for number in range(self.info.splits[split])]
        found = []
        for number, image in enumerate(images):
            file = io.BytesIO()
            image.save(file, "PNG")
            found.append({"image": file.getvalue(), "label": number % 2})
        return found


def test_tensorflow_data_sets_are_read_by_index(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", TensorFlowData("array_record"))
    data = ImageDataModule("tfds/pets", **SMALL, val_fraction=0.5)
    assert (data.class_names, data.num_train_samples, len(data.splits.val.labels)) == (["cat", "dog"], 4, 4)
    pixels = [data.splits.test.read(index).getpixel((0, 0)) for index in range(4)]
    assert pixels == [(number,) * 3 for number in range(4)] and data.splits.test.labels[3] == 1
    assert torch.cat([label for _, label in data.test_dataloader()]).tolist() == [0, 1, 0, 1]
    check_refused(ImageDataModule("tfds/cats", **SMALL), "data.dataset: tfds/cats: Dataset cats not found. More")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", TensorFlowData("tfrecord"))
    check_refused(ImageDataModule("tfds/pets", **SMALL), "data.dataset: tfds/pets: Random access .* not supp")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    check_refused(ImageDataModule("tfds/pets", **SMALL), "data.dataset: tfds/pets: needs TensorFlow Datasets .pip inst")


def test_held_out_images_are_not_trained_on_and_do_not_depend_on_the_seed(folder: Path):
    for path in (folder / "val").rglob("*.png"):
        path.unlink()
    (folder / "val" / "cat").rmdir(), (folder / "val" / "dog").rmdir(), (folder / "val").rmdir()
    held = [imagefolder(folder, val_fraction=0.25, seed=seed).splits for seed in (0, 1)]
    names = [{split.name(i) for i in range(len(split.labels))} for split in (held[0].train, held[0].val, held[1].val)]
    assert len(names[0]) == 18 and len(names[1]) == 6
    assert not names[0] & names[1] and names[1] == names[2]


def test_hugging_face_folder_gives_the_same_images_as_imagefolder(folder: Path):
    ours, theirs = imagefolder(folder), hub(folder)
    assert theirs.class_names == ours.class_names == ["cat", "dog"]
    assert theirs.num_train_samples == ours.num_train_samples == 24
    for a, b in zip(ours.val_dataloader(), theirs.val_dataloader(), strict=True):
        assert digest(a) == digest(b)


def test_hugging_face_files_may_lie_behind_a_link(folder: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    assert len(list(hub(tmp_path / "link").val_dataloader())) == len(list(hub(folder).val_dataloader()))
    assert str(folder.resolve()) in hub(tmp_path / "link").splits.val.folders


def test_a_stream_is_not_evaluated_by_processes_that_share_a_model(folder: Path):
    data = hub(folder, streaming=True)
    place = {"rank": 0, "num_replicas": 2}
    data.trainer = SimpleNamespace(strategy=ModelParallelStrategy(), distributed_sampler_kwargs=place)
    with pytest.raises(ValueError, match=r"^data.streaming: .*; set data.streaming: false, or trainer.strategy: ddp$"):
        data.val_dataloader()


def test_stream_reads_every_image_once_in_an_epoch(folder: Path):
    data = hub(folder, streaming=True, shuffle_buffer=8)
    assert data.num_classes == 2 and data.num_train_samples is None  # a folder is not counted before it is read
    batches = list(data.train_dataloader())
    assert len(batches) == 6 and torch.cat([label for _, label in batches]).bincount().tolist() == [12, 12]
    assert [digest(batch) for batch in data.val_dataloader()] == [digest(b) for b in hub(folder).val_dataloader()]


def test_predicts_a_folder_nested_or_flat(tmp_path: Path):
    write_images(tmp_path / "a", 2, ending="jpg")
    write_images(tmp_path / "b" / "c", 1, seed=1, ending="JPEG")
    data = ImageDataModule(predict_root=str(tmp_path), eval_batch_size=2)
    batches = list(data.predict_dataloader())
    assert [len(image) for image, _ in batches] == [2, 1]
    assert torch.cat([label for _, label in batches]).tolist() == [-1, -1, -1]
    assert [Path(data.predict_name(i)).relative_to(tmp_path).as_posix() for i in range(3)] == [
        "a/000.jpg",
        "a/001.jpg",
        "b/c/000.JPEG",
    ]


def test_predicts_the_test_images_by_default():
    data = ImageDataModule(batch_size=360)
    _, label = next(iter(data.predict_dataloader()))
    assert label.tolist() == data.splits.test.labels.tolist() and data.predict_name(7) == "7"


def test_lightning_predicts(tmp_path: Path):
    write_images(tmp_path, 5)
    data = ImageDataModule(predict_root=str(tmp_path), eval_batch_size=2)
    outputs = Trainer(**QUIET).predict(Recorder(), datamodule=data)
    assert [len(output) for output in outputs] == [2, 2, 1]


# --- One scale in training and evaluation ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "given", "crop_pct", "hflip", "interpolation"),
    [
        ("digits", {}, 1.0, 0.0, "bilinear"),
        ("mnist", {}, 1.0, 0.0, "bilinear"),
        ("cifar10", {}, 1.0, 0.5, "bilinear"),
        ("cifar10", {"crop": "rrc"}, 1.0, 0.5, "bilinear"),
        ("imagefolder", {}, 0.875, 0.5, "bicubic"),
        ("imagefolder", {"scale": (0.9, 1.0)}, 1.0, 0.5, "bicubic"),
        ("imagefolder", {"crop": "center"}, 1.0, 0.5, "bicubic"),
        ("imagefolder", {"crop": "shift"}, 1.0, 0.5, "bicubic"),
        ("imagefolder", {"crop": "rkrc"}, 1.0, 0.5, "bicubic"),
        ("wds/imagenet", {"crop": "center", "crop_pct": 0.9}, 0.9, 0.5, "bicubic"),
    ],
)
def test_defaults_of_each_data_set(dataset, given, crop_pct, hflip, interpolation):
    found = ImageDataModule(dataset, augmentation=Augmentation(**given)).augmentation
    assert (found.crop_pct, found.hflip, found.interpolation) == (crop_pct, hflip, interpolation)


@pytest.mark.parametrize("crop", ["center", "shift"])
def test_whole_images_are_trained_on_and_evaluated(folder: Path, crop: str):
    data = imagefolder(folder, augmentation=Augmentation(crop=crop, hflip=0.0, shift=0.0))
    image = data.splits.train.read(0)
    assert torch.equal(data._train_transform(image), data._eval_transform(image))


def test_transforms_are_logged_and_another_scale_warns(folder: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    imagefolder(folder, augmentation=Augmentation(auto_augment="rand-m9", mixup=0.8)).setup("fit")
    (line,) = [record.message for record in caplog.records if record.message.startswith("Images of")]
    assert line == (
        "Images of imagefolder: train rrc, scale 0.08 to 1, hflip 0.5, auto_augment rand-m9, mixup 0.8; "
        "eval bicubic resize to 18, center crop 16x16"
    )
    caplog.clear()
    imagefolder(folder).setup("validate")
    assert "train" not in caplog.text and "Images of imagefolder: eval bicubic" in caplog.text
    with pytest.warns(UserWarning, match=r"^data.augmentation.crop_pct: .* shows 77% .* training 100% to 100% "):
        imagefolder(folder, augmentation=Augmentation(crop="center", crop_pct=0.875)).setup("fit")
    with pytest.warns(UserWarning, match="training 90% to 100%"):
        imagefolder(folder, augmentation=Augmentation(scale=(0.9, 1.0), crop_pct=0.875)).setup("fit")


@pytest.mark.parametrize("auto_augment", [None, "rand-m9-mstd0.5-inc1", "augmix-m3-w3"])
def test_one_channel_and_other_than_square(folder: Path, auto_augment: str | None):
    look = Augmentation(auto_augment=auto_augment, color_jitter=0.2, reprob=0.5)
    assert imagefolder(folder, image_size=(8, 8)).image_size == 8
    data = imagefolder(folder, image_size=[8, 24], in_chans=1, augmentation=look)  # as from YAML
    assert data.mean == (pytest.approx(0.449),) and data.image_data["image_size"] == [8, 24]
    assert {image.shape for image, _ in data.train_dataloader()} == {(4, 1, 8, 24)}
    image = data.splits.val.read(0)
    expected = create_transform((8, 24), interpolation="bicubic", crop_pct=0.875, mean=data.mean, std=data.std)
    assert torch.equal(data._eval_transform(image), expected(image.convert("L")))


# --- Randomness ------------------------------------------------------------------------------------------------------


def rng_states() -> tuple[object, bytes, bytes]:
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


def test_seeded_gives_the_same_numbers_and_puts_the_generators_back():
    def draw() -> tuple[float, ...]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    before = rng_states()
    with seeded(1, 2, 3):
        first = draw()
    with seeded(1, 2, 3):
        second = draw()
    with seeded(1, 2, 4):
        third = draw()
    assert first == second and len(set(first)) == 3 and not set(first) & set(third)
    assert before == rng_states()


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_leave_the_global_generators_alone(folder: Path, workers: int):
    data = imagefolder(folder, num_workers=workers, augmentation=RECIPE)
    before = rng_states()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.predict_dataloader()):
        assert len(list(loader)) > 0
    assert before == rng_states()


def test_batches_do_not_depend_on_the_number_of_workers(folder: Path):
    runs = [
        [digest(b) for b in imagefolder(folder, num_workers=n, augmentation=RECIPE).train_dataloader()]
        for n in (0, 1, 2)
    ]
    assert runs[0] == runs[1] == runs[2] and len(set(runs[0])) == 6


def test_each_epoch_has_its_own_order_and_augmentation_and_each_seed_too(folder: Path):
    def run(seed: int, epoch: int) -> list[str]:
        loader = imagefolder(folder, seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [digest(batch) for batch in loader]

    runs = [run(0, 0), run(0, 1), run(1, 0), run(1, 1)]
    assert run(0, 1) == runs[1] and len({name for names in runs for name in names}) == 24


def test_processes_share_an_epoch_without_overlap():
    data = torch.utils.data.TensorDataset(torch.zeros(23))
    keys = [list(EpochSampler(data, seed=3, num_replicas=3, rank=rank)) for rank in range(3)]
    assert [len(part) for part in keys] == [7, 7, 7] == [len(EpochSampler(data, 3, 3, rank)) for rank in range(3)]
    assert len({key for part in keys for key in part}) == 21


def test_second_pass_of_an_epoch_differs_and_can_be_resumed(folder: Path):
    """As under a CombinedLoader that begins the shorter loader again."""
    loader = imagefolder(folder).train_dataloader()
    passes = [digest(batch) for _ in range(2) for batch in loader]
    assert len(set(passes)) == 12
    again = imagefolder(folder).train_dataloader()
    again.load_state_dict({"epoch": 0, "batches": 8})
    assert [digest(batch) for batch in again] == passes[8:]


def test_a_pass_that_is_left_early_begins_again(folder: Path):
    loader = imagefolder(folder).train_dataloader()
    assert digest(next(iter(loader))) == digest(next(iter(loader)))


def test_skipped_samples_are_not_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch):
    data = imagefolder(folder)
    loader = data.train_dataloader()
    loader.load_state_dict({"epoch": 0, "batches": 5})
    read = []
    original = data.splits.train.read
    monkeypatch.setattr(data.splits.train, "read", lambda index: read.append(index) or original(index))
    assert len(list(loader)) == 1 and len(read) == 4 and len(loader) == 6


# --- Resume under Lightning ------------------------------------------------------------------------------------------

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}


class Recorder(LightningModule):
    """Keeps a hash of every training batch, in order."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.fail_at = fail_at
        self.seen: list[str] = []
        self.train_labels: list[tuple] = []
        self.val_labels: list[tuple] = []

    def training_step(self, batch, batch_idx):
        if self.fail_at is not None and len(self.seen) == self.fail_at:
            raise RuntimeError("out of memory")
        self.seen.append(digest(batch))
        self.train_labels.append((batch[1].dtype, tuple(batch[1].shape)))
        return self.layer(batch[0].mean().reshape(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.val_labels.append((batch[1].dtype, tuple(batch[1].shape)))

    def predict_step(self, batch, batch_idx):
        return batch[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Stop(Callback):
    """Ends a run abruptly, as a killed job does, once a checkpoint has been saved at or after some batch."""

    def __init__(self, path: Path, batches: int) -> None:
        self.path, self.batches = path, batches

    def halt_if_due(self, model: Recorder) -> None:
        if len(model.seen) >= self.batches and any(self.path.glob("*.ckpt")):
            raise KeyboardInterrupt

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.halt_if_due(pl_module)


def fit(data: ImageDataModule, model: Recorder, ckpt_path: Path | None = None, **settings: object) -> None:
    trainer = Trainer(**{**QUIET, **settings})
    trainer.fit(model, datamodule=data, ckpt_path=str(ckpt_path) if ckpt_path else None, weights_only=False)


def newest(path: Path) -> Path:
    return max(path.glob("*.ckpt"), key=lambda file: int(file.stem.rpartition("=")[2]))


SAVES = {
    "mid_epoch": ({"every_n_train_steps": 2, "save_on_train_epoch_end": False}, 10, {"limit_val_batches": 0}),
    "mid_epoch_validated": ({"every_n_train_steps": 2, "save_on_train_epoch_end": False}, 10, {}),
    "last_batch": ({"every_n_train_steps": 3, "save_on_train_epoch_end": False}, 12, {"limit_val_batches": 0}),
    "last_batch_validated": ({"every_n_train_steps": 3, "save_on_train_epoch_end": False}, 12, {}),
    "epoch_end": ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, 6, {"limit_val_batches": 0}),
    "epoch_end_validated": ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, 6, {}),
    "validation_end": ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, 6, {}),
    "mid_validation": ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, 10, {"val_check_interval": 3}),
    "max_steps": ({"every_n_train_steps": 2, "save_on_train_epoch_end": False}, 10, {"max_steps": 9, "max_epochs": -1}),
    "limited": ({"every_n_train_steps": 2}, 8, {"limit_train_batches": 5}),
    "limited_validation_end": (
        {"every_n_epochs": 1, "save_on_train_epoch_end": False},
        5,
        {"limit_train_batches": 5},
    ),
}


def check_resume(make, path: Path, save: str, workers: int) -> None:
    checkpoint, stop_at, settings = SAVES[save]
    settings = {"max_epochs": 3, "accumulate_grad_batches": 2, **settings}
    straight = Recorder()
    fit(make(num_workers=workers), straight, **settings)

    keep = {**settings, "enable_checkpointing": True}
    saver = ModelCheckpoint(dirpath=path, save_top_k=-1, filename="{epoch}-{step}", **checkpoint)
    first = Recorder()
    with pytest.raises(SystemExit):  # what Lightning makes of KeyboardInterrupt
        fit(make(num_workers=workers), first, callbacks=[saver, Stop(path, stop_at)], **keep)
    assert len(set(straight.seen)) == len(straight.seen) and first.seen == straight.seen[: len(first.seen)]

    second = Recorder()
    fit(make(num_workers=workers), second, ckpt_path=newest(path), **settings)
    done = len(straight.seen) - len(second.seen)
    assert 0 < done <= len(first.seen) and second.seen == straight.seen[done:]


@pytest.mark.parametrize("save", SAVES)
def test_resumed_run_sees_the_same_batches(folder: Path, tmp_path: Path, save: str):
    check_resume(lambda **settings: imagefolder(folder, augmentation=RECIPE, **settings), tmp_path / "ckpt", save, 0)


@pytest.mark.slow
@pytest.mark.parametrize("save", SAVES)
def test_resumed_run_sees_the_same_batches_with_workers(folder: Path, tmp_path: Path, save: str):
    check_resume(lambda **settings: imagefolder(folder, augmentation=RECIPE, **settings), tmp_path / "ckpt", save, 2)


STREAM_SAVES = [save for save in SAVES if save != "mid_validation"]  # needs a length


@pytest.mark.parametrize("save", STREAM_SAVES)
def test_resumed_stream_gives_the_same_batches(folder: Path, tmp_path: Path, save: str):
    def make(**settings: object) -> ImageDataModule:
        return hub(folder, streaming=True, shuffle_buffer=8, augmentation=RECIPE, **settings)

    check_resume(make, tmp_path / "ckpt", save, 0)


def test_batch_that_failed_in_training_comes_again_after_a_resume(folder: Path, tmp_path: Path):
    straight, first, second = Recorder(), Recorder(fail_at=8), Recorder()
    fit(imagefolder(folder), straight, max_epochs=2)
    saver = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_on_exception=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(imagefolder(folder), first, max_epochs=2, enable_checkpointing=True, callbacks=[saver])
    fit(imagefolder(folder), second, ckpt_path=newest(tmp_path / "ckpt"), max_epochs=2)
    assert second.seen == straight.seen[8:]


def test_fit_can_be_continued_with_the_same_objects(folder: Path):
    straight, resumed, data = Recorder(), Recorder(), imagefolder(folder)
    fit(imagefolder(folder), straight, max_epochs=2)
    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(resumed, datamodule=data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(resumed, datamodule=data)
    assert resumed.seen == straight.seen


def test_yaml_and_command_line_set_the_imagenet_recipe(folder: Path, tmp_path: Path):
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(ImageDataModule, "data")
    (tmp_path / "recipe.yaml").write_text(
        f"""
data:
  dataset: imagefolder
  root: {folder}
  image_size: 224
  loader: {{batch_size: 4}}
  augmentation:
    {{crop: rrc, scale: [0.08, 1.0], hflip: 0.5, auto_augment: rand-m9-mstd0.5-inc1, reprob: 0.25, mixup: 0.8,
     cutmix: 1.0, label_smoothing: 0.1, interpolation: bicubic, crop_pct: 0.875}}
"""
    )
    config = parser.parse_args(["--config", str(tmp_path / "recipe.yaml"), "--data.augmentation.mixup", "0.2"])
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the older name
    data = instantiate(config).data
    assert data.augmentation.mixup == 0.2 and data.augmentation.scale == (0.08, 1.0) and data.num_classes == 2
    assert "--data.augmentation.label_smoothing" in parser.format_help()


def test_overfit_batches_repeats_the_same_images(folder: Path):
    model = Recorder()
    fit(imagefolder(folder, augmentation=Augmentation(crop="center", hflip=0)), model, max_epochs=3, overfit_batches=1)
    assert len(model.seen) == 3 and len(set(model.seen)) == 1


def test_stream_without_a_trainer_counts_its_epochs_and_resumes(folder: Path):
    def loader() -> ResumableStreamLoader:
        return hub(folder, streaming=True, shuffle_buffer=8).train_dataloader()

    whole = loader()
    epochs = [[digest(batch) for batch in whole] for _ in range(2)]
    assert set(epochs[0]).isdisjoint(epochs[1])
    first, second, third = loader(), loader(), loader()
    for batch, _ in zip(first, range(2), strict=False):
        state = first.state_dict()
        assert len(batch) == 2
    second.load_state_dict(state)
    assert [digest(batch) for batch in second] == epochs[0][state["batches"] :]
    third.load_state_dict(second.state_dict())
    assert [digest(batch) for batch in third] == epochs[1]


@pytest.mark.slow
def test_stream_with_workers_and_uneven_shards_resumes_anywhere(folder: Path):
    import datasets

    rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    rows = rows.cast_column("image", datasets.Image(decode=False)).select(range(22))

    def loader() -> ResumableStreamLoader:
        shards = rows.to_iterable_dataset(num_shards=3).shuffle(seed=0, buffer_size=4)  # one worker reads two of them
        transform = imagefolder(folder)._train_transform
        decode = partial(decode_hub_image, folders=(str(folder),))
        stream = StreamImages(shards, ("image", "label"), decode, transform, 0.001, batch_size=2, seed=0)
        return ResumableStreamLoader(stream, batch_size=2, num_workers=2, drop_last=True)

    whole = [digest(batch) for batch in loader()]
    assert len(set(whole)) == len(whole) >= 10
    for batches in range(1, len(whole)):
        resumed = loader()
        resumed.load_state_dict({"epoch": 0, "batches": batches, "finished": False})
        assert [digest(batch) for batch in resumed] == whole[batches:]


# --- Unreadable images -----------------------------------------------------------------------------------------------


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize("make", [imagefolder, hub])
def test_unreadable_training_image_is_named_once_and_replaced(folder: Path, make):
    spoil(folder / "train" / "cat" / "003.png")
    loader = make(folder, augmentation=Augmentation(crop="center", hflip=0)).train_dataloader()
    with pytest.warns(UserWarning, match=r"unreadable image skipped: .*cat.003\.png") as told:
        batches = [batch for _ in range(2) for batch in loader]
    assert len(told) == 1 and [len(image) for image, _ in batches] == [4] * 12
    shown = torch.cat([image for image, _ in batches[:6]])
    assert len({digest([image]) for image in shown}) == 23  # the next one stands in
    assert loader.dataset.reader.corrupt_indices == [3]


def test_unreadable_image_seen_by_a_worker_is_known_to_all(folder: Path):
    spoil(folder / "train" / "cat" / "003.png")
    loader = imagefolder(folder, num_workers=2).train_dataloader()
    with pytest.warns(UserWarning, match="unreadable"):
        expected = [digest(batch) for batch in imagefolder(folder).train_dataloader()]
    assert [digest(batch) for batch in loader] == expected
    assert loader.dataset.reader.corrupt_indices == [3]


@pytest.mark.filterwarnings("ignore:unreadable")
@pytest.mark.parametrize(("make", "workers"), [(imagefolder, 0), (imagefolder, 2), (hub, 0)])
def test_too_many_unreadable_images_stop_the_run(folder: Path, make, workers: int):
    for number in range(4):
        spoil(folder / "train" / "cat" / f"{number:03d}.png")
    with pytest.raises(ValueError, match=r"^data.max_corrupt_share: 4 of 24 images cannot be read") as caught:
        fit(make(folder, num_workers=workers, max_corrupt_share=0.1), Recorder(), max_epochs=1)
    assert "\n" not in str(caught.value) and str(caught.value).count(".png") == 3
    model = Recorder()
    fit(make(folder, num_workers=workers, max_corrupt_share=0.5), model, max_epochs=1)
    assert len(model.seen) == 6


def test_share_zero_stops_at_the_first_unreadable_image(folder: Path):
    spoil(folder / "val" / "dog" / "001.png")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"^data.max_corrupt_share: 1 of 8"):
        list(imagefolder(folder, max_corrupt_share=0.0).val_dataloader())


@pytest.mark.filterwarnings("ignore:unreadable")
def test_nothing_readable_ends_instead_of_searching_forever(tmp_path: Path):
    for name, count in (("one", 2), ("two", 1)):
        write_images(tmp_path / "train" / name, count)
        write_images(tmp_path / "val" / name, 1)
    for path in (tmp_path / "train").glob("*/*"):
        spoil(path)
    with pytest.raises(ValueError, match=r"^data.max_corrupt_share: none of 3 images"):
        list(imagefolder(tmp_path, batch_size=1).train_dataloader())


@pytest.mark.filterwarnings("ignore:unreadable")
def test_evaluation_leaves_an_unreadable_image_out(folder: Path):
    spoil(folder / "val" / "cat" / "001.png")
    batches = list(imagefolder(folder).val_dataloader())
    assert [len(image) for image, _ in batches] == [3, 4] and batches[0][1].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"^data.eval_batch_size: all 1 images"):
        list(imagefolder(folder, eval_batch_size=1).val_dataloader())


@pytest.mark.filterwarnings("ignore:unreadable")
def test_prediction_keeps_the_place_of_an_unreadable_image(tmp_path: Path):
    write_images(tmp_path, 3)
    spoil(tmp_path / "001.png")
    ((image, label),) = ImageDataModule(predict_root=str(tmp_path)).predict_dataloader()
    assert image.shape == (3, 3, 8, 8) and label.tolist() == [-1, -100, -1]


@pytest.mark.filterwarnings("ignore:unreadable")
def test_stream_replaces_unreadable_images_and_resumes_behind_one(folder: Path):
    for number in (0, 5, 6):
        spoil(folder / "train" / "cat" / f"{number:03d}.png")

    def loader() -> DataLoader:
        return hub(folder, streaming=True, shuffle_buffer=4).train_dataloader()

    whole = [digest(batch) for batch in loader()]
    assert len(whole) == 6
    for batches in range(1, 6):
        resumed = loader()
        resumed.load_state_dict({"epoch": 0, "batches": batches, "finished": False})
        assert [digest(batch) for batch in resumed] == whole[batches:]


@pytest.mark.parametrize("label", [None, -1])
def test_unlabeled_samples_of_a_stream_count_as_unreadable(folder: Path, label: int | None):
    files = sorted((folder / "train" / "cat").iterdir())[:4]
    rows = [{"image": {"bytes": file.read_bytes(), "path": file.name}, "label": 0} for file in files]
    rows[1]["label"] = label

    class Rows(list):
        def set_epoch(self, epoch: int) -> None:
            pass

    transform = imagefolder(folder)._eval_transform
    settings = {"columns": ("image", "label"), "decode": decode_hub_image, "transform": transform}
    make = partial(StreamImages, Rows(rows), **settings, max_corrupt_share=0.5, batch_size=2)
    with pytest.warns(UserWarning, match=r"unreadable image skipped: 001.png \(no label\)"):
        assert [found for _, found in make(seed=0)] == [0, 0, 0, 0]  # the next one stands in
    with pytest.warns(UserWarning, match="no label"):
        assert [found for _, found in make()] == [0, 0, 0]
    assert [found for _, found in make(labeled=False)] == [0, -1, 0, 0]  # prediction


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "digit"}, "data.dataset: unknown value 'digit', did you mean 'digits'?"),
        ({"image_size": 0}, "data.image_size: expected a whole number of 1 or more, got 0"),
        ({"image_size": (8, 0)}, "data.image_size: expected a whole number of 1 or more, got 0"),
        ({"in_chans": 4}, "data.in_chans: expected 3 (RGB) or 1 (gray), got 4"),
        ({"batch_size": 0}, "data.batch_size: expected a whole number of 1 or more, got 0"),
        ({"eval_batch_size": 0}, "data.eval_batch_size: expected"),
        ({"num_workers": -1}, "data.num_workers: expected a whole number of 0 or more, got -1"),
        ({"seed": -1}, "data.seed: expected"),
        ({"shuffle_buffer": 0}, "data.shuffle_buffer: expected"),
        ({"val_fraction": 1.0}, "data.val_fraction: expected a share from 0 to below 1, got 1.0"),
        ({"max_corrupt_share": 1.5}, "data.max_corrupt_share: expected a share from 0 to 1, got 1.5"),
        ({"batch_size": 5, "augmentation": RECIPE}, "data.batch_size: expected an even number"),
    ],
)
def test_wrong_setting_is_refused_when_created(settings: dict, message: str):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as caught:
        ImageDataModule(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("crop", "rcc"),
        ("interpolation", "cubic"),
        ("remode", "pixels"),
        ("scale", (0.5, 0.1)),
        ("scale", (0.5, 1.1)),
        ("ratio", (0.0, 1.0)),
        ("shift", 0.6),
        ("hflip", 1.1),
        ("color_jitter", -0.1),
        ("reprob", 2),
        ("crop_pct", 0),
        ("mixup", -0.1),
        ("cutmix", -1),
        ("label_smoothing", 1.0),
        ("auto_augment", "rond-m9"),
        ("auto_augment", "rand-q9"),
    ],
)
def test_wrong_augmentation_is_refused(setting: str, value: object):
    with pytest.raises(ValueError, match=f"^data.augmentation.{setting}: ") as caught:
        ImageDataModule(augmentation=Augmentation(**{setting: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "cifar10", "torch/imagenet", "imagefolder", "wds"])
def test_missing_root_is_named(tmp_path: Path, dataset: str):
    file = tmp_path / "file"
    file.touch()
    for root, message in ((None, "expected a folder"), (tmp_path / "no", "no such folder"), (file, "not a folder")):
        with pytest.raises(ValueError, match=f"^data.root: {message}"):
            print(ImageDataModule(dataset, root=str(root) if root else None).num_classes)
    with pytest.raises(ValueError, match=r"^data.root: no "):
        print(ImageDataModule(dataset, root=str(tmp_path)).num_classes)


def check_refused(data: ImageDataModule, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message) as caught:
        print(data.num_classes)
    assert "\n" not in str(caught.value)


def test_wrong_image_folder_is_refused(folder: Path, tmp_path: Path):
    (tmp_path / "flat" / "train").mkdir(parents=True)
    check_refused(imagefolder(tmp_path / "flat"), "data.root: no class folders in .*train; expected .*CLASS")
    (tmp_path / "flat" / "train" / "one").mkdir()
    check_refused(imagefolder(tmp_path / "flat"), "data.root: no images in .*train; known extensions: .*.jpg")
    (folder / "train" / "eel").mkdir()
    check_refused(
        imagefolder(folder), "data.root: train and val have different classes, 1 are in one of them only: eel"
    )
    (folder / "val" / "eel").mkdir()
    check_refused(imagefolder(folder), "data.root: no training images for 1 classes: eel")


def test_batch_larger_than_the_training_set_is_refused(folder: Path):
    with pytest.raises(ValueError, match=r"^data.batch_size: expected at most 24 .*, got 25"):
        imagefolder(folder, batch_size=25).train_dataloader()


def test_predict_root_without_images_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^data.predict_root: no images in"):
        ImageDataModule(predict_root=str(tmp_path)).setup("predict")
    with pytest.raises(ValueError, match=r"^data.predict_root: no such folder"):
        ImageDataModule(predict_root=str(tmp_path / "no")).setup("predict")


def test_wrong_hugging_face_settings_are_refused(folder: Path):
    check_refused(ImageDataModule("huggingface"), "data.hf_name: expected the name")
    check_refused(
        ImageDataModule("huggingface", hf_name="no/such-set"), "data.hf_name: cannot load 'no/such-set': .*Hub"
    )
    check_refused(hub(folder / "no"), "data.root: no such folder")
    columns = r"the columns are image \(Image\), label \(ClassLabel\)"
    check_refused(hub(folder, hf_image_column="img"), f"data.hf_image_column: no column 'img'; {columns}")
    check_refused(hub(folder, hf_label_column="fine"), f"data.hf_label_column: no column 'fine'; {columns}")
    check_refused(
        hub(folder, hf_label_column="image"),
        f"data.hf_label_column: expected .* class labels .*, got 'image'; {columns}",
    )
    check_refused(
        hub(folder, hf_train_split="all"), "data.hf_train_split: no split 'all' in imagefolder; it has train, val"
    )
    check_refused(hub(folder, hf_val_split="dev"), "data.hf_val_split: no split 'dev'")


def test_stream_without_a_validation_split_is_refused(tmp_path: Path):
    write_images(tmp_path / "data" / "train" / "one", 2)
    write_images(tmp_path / "data" / "train" / "two", 2)
    check_refused(hub(tmp_path / "data", streaming=True), "data.hf_val_split: a stream cannot be split, name a split")

"""Data under several processes and workers: every sample once in an epoch, none twice, after a resume too.

Processes are played one after the other; ``test_ddp.py`` has real ones.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import lzma
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lit_tokenformer.data import (
    Augmentation,
    ImageDataModule,
    MaskedTextDataModule,
    MultiTaskDataModule,
    TextDataModule,
)
from lit_tokenformer.data.resumable import ResumableDataModule
from lit_tokenformer.data.text.sources import HubStream
from lit_tokenformer.data.text.streaming import TextStreamLoader, TrainStream, train_stream_loader
from lit_tokenformer.data.text.tokenizer import Tokenizer

PLAIN = Augmentation(crop="center", hflip=0.0)
IMAGES = 41
SHARDS = ((9, 4, 6), (5, 8, 3, 7), (1, 14), (13,))
"""Documents in each shard of a stream: uneven ones, and fewer than processes."""


@pytest.fixture(autouse=True)
def hugging_face_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf_cache"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """41 training and 7 validation images that all differ, in two classes, and documents of noise."""
    folder = tmp_path_factory.mktemp("corpus")
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES + 7, 4, 4, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = folder / ("train" if number < IMAGES else "val") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    texts = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(30)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def images(folder: Path, **settings: Any) -> ImageDataModule:
    settings = {"batch_size": 3, "num_workers": 0, "augmentation": PLAIN, **settings}
    return ImageDataModule("imagefolder", str(folder), image_size=4, **settings)


def text(folder: Path, kind: type[TextDataModule] = TextDataModule, **settings: Any) -> TextDataModule:
    settings = {"batch_size": 3, "block_size": 32, "val_fraction": 0.2, "cache_dir": str(folder / "cache"), **settings}
    return kind("files", files=[str(folder / "texts.jsonl")], **settings)


def masked(folder: Path, **settings: Any) -> TextDataModule:
    return text(folder, MaskedTextDataModule, **settings)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes this process one of several."""
    return lambda rank, replicas: monkeypatch.setattr(
        ResumableDataModule, "_place", property(lambda _: (rank, replicas))
    )


def epoch(loader: DataLoader, number: int) -> DataLoader:
    loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
    return loader


def rows(batch: Any) -> list[str]:
    """A name for each sample of a batch."""
    parts = batch if isinstance(batch, (tuple, list)) else (batch,)
    return [
        hashlib.sha256(b"".join(part[i].numpy().tobytes() for part in parts)).hexdigest()[:12]
        for i in range(len(parts[0]))
    ]


def shared(
    make: Callable[..., Any], replicas: int, place: Callable, number: int = 0, **settings: Any
) -> list[list[list[str]]]:
    """The batches of each process in one epoch."""
    found = []
    for rank in range(replicas):
        place(rank, replicas)
        found.append([rows(batch) for batch in epoch(make(**settings).train_dataloader(), number)])
    return found


def flat(parts: Any) -> list[str]:
    return list(itertools.chain.from_iterable(itertools.chain.from_iterable(parts)))


# --- Data that are read by index -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("replicas", "workers"), [(1, 0), (2, 0), (3, 0), (2, 2)])
@pytest.mark.parametrize("make", [images, text, masked])
def test_processes_share_every_epoch(corpus: Path, place: Callable, make: Callable, replicas: int, workers: int):
    place(0, 1)
    samples = make(corpus).num_train_samples
    batches = samples // replicas // 3
    seen = []
    for number in range(1 if workers else 3):
        parts = shared(lambda **settings: make(corpus, **settings), replicas, place, number, num_workers=workers)
        assert [len(part) for part in parts] == [batches] * replicas
        seen.append(set(flat(parts)))
        assert len(flat(parts)) == len(seen[-1]) == batches * replicas * 3  # none twice
    if make is images and not workers:  # blocks of text are cut elsewhere in each epoch
        assert len(set.union(*seen)) == samples  # what an epoch leaves out, another one has


@pytest.mark.parametrize(("make", "workers"), [(images, 0), (text, 0), (masked, 0), (images, 2)])
def test_each_process_goes_on_with_its_next_batch(
    corpus: Path, place: Callable, make: Callable, workers: int, tmp_path: Path
):
    for rank in range(2):
        place(rank, 2)
        loader = epoch(make(corpus, num_workers=workers).train_dataloader(), 1)
        whole = []
        for batch in loader:
            whole.append(rows(batch))
            if len(whole) == 2:
                torch.save(loader.state_dict(), tmp_path / "state")
        resumed = epoch(make(corpus, num_workers=workers).train_dataloader(), 1)
        resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        assert [rows(batch) for batch in resumed] == whole[2:] and len(whole) > 3


@pytest.mark.parametrize("make", [images, text])
def test_another_number_of_processes_goes_on_with_the_same_samples(corpus: Path, place: Callable, make: Callable):
    """As long as all of them together take as many at once."""
    place(0, 1)
    whole = [sorted(rows(batch)) for batch in make(corpus, batch_size=8).train_dataloader()]
    loader = make(corpus, batch_size=8).train_dataloader()
    for _ in zip(range(2), loader, strict=False):
        state = loader.state_dict()
    for replicas in (2, 4):
        parts = []
        for rank in range(replicas):
            place(rank, replicas)
            resumed = make(corpus, batch_size=8 // replicas).train_dataloader()
            resumed.load_state_dict(state)
            parts.append([rows(batch) for batch in resumed])
        together = [sorted(itertools.chain.from_iterable(turn)) for turn in zip(*parts, strict=True)]
        assert together == whole[2:] and len(together) > 2
    place(0, 2)
    message = "^data.batch_size: the checkpoint is in the middle of an epoch .*got 16, expected 8 samples over all "
    with pytest.raises(ValueError, match=message):
        make(corpus, batch_size=8).train_dataloader().load_state_dict(state)
    between = make(corpus, batch_size=8).train_dataloader()  # the next epoch may be cut anew
    between.load_state_dict({**state, "batches": 3 * state["length"]})
    assert between.state_dict()["batches"] == 3 * len(between) != 3 * state["length"]


def test_processes_share_both_data_of_a_joint_batch(corpus: Path, place: Callable):
    parts: dict[str, list[str]] = {"image": [], "text": []}
    for rank in range(2):
        place(rank, 2)
        loader = MultiTaskDataModule(images(corpus), text(corpus, batch_size=1)).train_dataloader()
        for batch, _, _ in loader:
            for name, found in parts.items():
                found += rows(batch[name])
    assert len(parts["image"]) == len(set(parts["image"])) == IMAGES // 2 // 3 * 6
    assert len(parts["text"]) == len(set(parts["text"])) == IMAGES // 2 // 3 * 2


@pytest.mark.parametrize("replicas", [2, 3, 5])
def test_every_image_is_evaluated_once(corpus: Path, place: Callable, replicas: int):
    found = []
    for rank in range(replicas):
        place(rank, replicas)
        found.append([rows(batch) for batch in images(corpus, eval_batch_size=2).val_dataloader()])
    assert len(flat(found)) == len(set(flat(found))) == 7 and all(found)
    assert len({len(batches) for batches in found}) == 1  # processes wait for each other in each batch
    assert all(1 <= len(batch) <= 2 for batches in found for batch in batches)
    sizes = [len(rows(batch)) for batch in images(corpus, eval_batch_size=1).val_dataloader()]
    assert max(sizes) <= 2 and sum(sizes) == len(range(replicas - 1, 7, replicas))
    place(0, 8)
    with pytest.raises(ValueError, match=r"^trainer.devices: 8 processes cannot share 7 images for evaluation$"):
        images(corpus).val_dataloader()


# --- Every source of images ------------------------------------------------------------------------------------------

RANDOM = Augmentation(crop="rrc", hflip=0.5, auto_augment="rand-m5-inc1", reprob=0.5)
"""Draws from all three generators."""


@pytest.fixture(scope="module")
def image_sources(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of the corpus again, in tar files, WebDataset shards and Parquet files."""
    import datasets

    folder = tmp_path_factory.mktemp("image_sources")
    for name in ("tar", "shards", "parquet"):
        (folder / name).mkdir()
    files = sorted(corpus.glob("*/[ab]/*.png"))
    for split in ("train", "val"):
        own = [file for file in files if file.parts[-3] == split]
        with tarfile.open(folder / "tar" / f"{split}.tar", "w") as tar:
            for file in own:
                tar.add(file, file.relative_to(corpus / split))
        for shard in range(4):
            with tarfile.open(folder / "shards" / f"x-{split}-{shard}.tar", "w") as tar:
                for file in own[shard::4]:
                    tar.add(file, file.name)
                    text = tarfile.TarInfo(f"{file.stem}.cls")
                    text.size = 1
                    tar.addfile(text, io.BytesIO(b"01"["ab".index(file.parts[-2]) :][:1]))
            rows = {
                "image": [{"bytes": file.read_bytes(), "path": file.name} for file in own[shard::4]],
                "label": ["ab".index(file.parts[-2]) for file in own[shard::4]],
            }
            features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
            found = datasets.Dataset.from_dict(rows, features=features)
            name = "validation" if split == "val" else split
            found.to_parquet(str(folder / "parquet" / f"{name}-{shard:05d}-of-00004.parquet"))
    return folder


SOURCES: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "digits": lambda corpus, image_sources: {"dataset": "digits", "batch_size": 200, "eval_batch_size": 180},
    "folder": lambda corpus, image_sources: {"dataset": "imagefolder", "root": str(corpus)},
    "tar": lambda corpus, image_sources: {"dataset": "imagefolder", "root": str(image_sources / "tar")},
    "shards": lambda corpus, image_sources: {"dataset": "wds/x", "root": str(image_sources / "shards")},
    "hub": lambda corpus, image_sources: {"dataset": "huggingface", "hf_name": str(image_sources / "parquet")},
    "stream": lambda corpus, image_sources: {"dataset": f"hfids/{image_sources / 'parquet'}", "shuffle_buffer": 5},
}


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_resumes_in_the_middle_of_an_epoch(
    corpus: Path, image_sources: Path, place: Callable, source: str, workers: int, replicas: int
):
    """To the last bit, augmentation included; an epoch shows no image twice."""
    settings = {"image_size": 8, "batch_size": 3, "num_workers": workers, "augmentation": RANDOM}
    settings |= SOURCES[source](corpus, image_sources)
    seen: list[str] = []
    for rank in range(replicas):
        place(rank, replicas)
        loader = ImageDataModule(**settings).train_dataloader()
        if source != "stream":
            epoch(loader, 1)
        whole, states = [], []
        for batch in loader:
            whole.append(rows(batch))
            states.append(loader.state_dict())
        assert len(whole) > 2 and loader.num_workers == workers
        resumed = ImageDataModule(**settings).train_dataloader()
        resumed.load_state_dict(states[1])
        if source != "stream":
            epoch(resumed, 1)
        assert [rows(batch) for batch in resumed] == whole[2:]
        seen += flat([whole])
    assert len(seen) == len({*seen})


def test_tar_files_give_the_batches_of_the_folder(corpus: Path, image_sources: Path):
    for workers in (0, 2):
        folder, tar = (
            ImageDataModule(
                **{"image_size": 8, "batch_size": 3, "num_workers": workers, **SOURCES[name](corpus, image_sources)}
            )
            for name in ("folder", "tar")
        )
        for theirs, ours in zip(folder.train_dataloader(), tar.train_dataloader(), strict=True):
            assert all(map(torch.equal, theirs, ours))
        assert [rows(batch) for batch in folder.val_dataloader()] == [rows(batch) for batch in tar.val_dataloader()]


# --- Streams ---------------------------------------------------------------------------------------------------------


def documents(shards: list[list[int]]) -> Iterator[dict[str, str]]:
    for shard in shards:
        for number in shard:
            yield {"text": chr(number)}


def stream(sizes: tuple[int, ...]) -> HubStream:
    """One-letter documents, so that a block of two tokens is a document and what ends it."""
    import datasets

    letters = iter(range(ord("0"), ord("0") + sum(sizes)))
    shards = [[next(letters) for _ in range(size)] for size in sizes]
    return HubStream(datasets.IterableDataset.from_generator(documents, gen_kwargs={"shards": shards}))


def stream_loader(sizes: tuple[int, ...], **settings: Any) -> TextStreamLoader:
    own = {name: settings.pop(name, default) for name, default in (("shuffle_buffer", 4), ("seed", 0), ("rank", 0))}
    blocks = TrainStream(stream(sizes), Tokenizer.bytes(), 2, **own)
    return train_stream_loader(blocks, **{"batch_size": 1, **settings})


def letters(loader: Any) -> list[int]:
    return [row[1] for batch in loader for row in batch.tolist()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sizes", SHARDS)
def test_processes_and_workers_share_a_stream(sizes: tuple[int, ...], workers: int):
    every = Counter(range(ord("0"), ord("0") + sum(sizes)))
    for replicas in (1, 2, 3) if workers == 0 else (2,):
        loaders = [stream_loader(sizes, num_workers=workers, rank=rank, replicas=replicas) for rank in range(replicas)]
        for _ in range(2):  # epochs
            assert Counter(letter for loader in loaders for letter in letters(loader)) == every


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_each_process_goes_on_in_its_part_of_a_stream(workers: int):
    """In the second epoch, in which the shards come in another order."""

    def loader(rank: int) -> TextStreamLoader:
        return stream_loader((5, 8, 3, 7), num_workers=workers, rank=rank, replicas=2, batch_size=2)

    for rank in range(2):
        whole = loader(rank)
        letters(whole)
        found, states = [], []
        for batch in whole:
            found.append(batch.tolist())
            states.append(whole.state_dict())
        for done in (1, 3, len(found) - 1):
            resumed = loader(rank)
            # each process saves the places of all, which this one does not know of the other
            resumed.load_state_dict({**states[done - 1], "ranks": states[done - 1]["ranks"] * 2})
            assert [batch.tolist() for batch in resumed] == found[done:]


KINDS = ("jsonl", "csv", "parquet", "jsonl.gz", "txt", "md.xz")


@pytest.fixture(scope="module")
def text_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 24 documents in four files of each kind (text files: one document each)."""
    import datasets

    folder = tmp_path_factory.mktemp("text_sources")
    texts = [hashlib.sha512(str(number).encode()).hexdigest() for number in range(24)]
    for kind, shard in itertools.product(KINDS, range(4)):
        rows = datasets.Dataset.from_dict({"text": texts[shard * 6 : shard * 6 + 6]})
        path = folder / kind / f"{shard}.{kind}"
        path.parent.mkdir(exist_ok=True)
        if kind == "csv":
            rows.to_csv(path)
        elif kind == "parquet":
            rows.to_parquet(path)
        elif kind.startswith("jsonl"):
            rows.to_json(path, compression="gzip" if kind.endswith("gz") else None)
        else:
            for number, text in enumerate(rows["text"]):
                data = text.encode()
                inner = path.with_name(f"{shard}{number}.{kind}")
                inner.write_bytes(lzma.compress(data) if kind.endswith("xz") else data)
    return folder


RESUMED: dict[str, dict[str, Any]] = {
    "python_docs": {"dataset": "python_docs", "block_size": 2048},
    **{kind: {"dataset": "files", "files": f"{{}}/{kind}"} for kind in KINDS},
    **{
        f"{kind}, streamed": {"dataset": "files", "files": f"{{}}/{kind}", "streaming": True}
        for kind in ("jsonl.gz", "parquet", "txt")
    },
    **{
        f"huggingface {kind}{', streamed' * streaming}": {
            "dataset": "huggingface",
            "hf_name": kind,
            "files": f"{{}}/{kind}/*",
            "streaming": streaming,
        }
        for kind in ("csv", "parquet")
        for streaming in (False, True)
    },
}


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RESUMED)
def test_every_source_of_text_resumes_in_an_epoch(
    text_sources: Path, tmp_path: Path, place: Callable, name: str, workers: int, replicas: int
):
    settings = {"block_size": 16, "batch_size": 2, "shuffle_buffer": 4, "val_fraction": 0.2, **RESUMED[name]}
    if "files" in settings:
        settings["files"] = settings["files"].format(text_sources)

    def loader(rank: int) -> Any:
        place(rank, replicas)
        data = TextDataModule(**settings, num_workers=workers, cache_dir=str(text_sources / "cache"))
        return data.train_dataloader()

    for rank in range(replicas):
        whole, found, states = loader(rank), [], []
        for batch in itertools.islice(whole, 7):
            found.append(rows(batch))
            states.append(whole.state_dict())
        assert len(found) == 7 and len(set(itertools.chain.from_iterable(found))) == 14
        for done in (1, 4):
            state = states[done - 1]
            if "ranks" in state:  # each process saves the places of all, which this one does not know of the other
                state = {**state, "ranks": state["ranks"] * replicas}
            torch.save(state, tmp_path / "state")
            resumed = loader(rank)
            resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
            assert [rows(batch) for batch in itertools.islice(resumed, 7 - done)] == found[done:]


def test_shards_come_in_another_order_each_epoch():
    loader = stream_loader((6, 6, 6, 6), shuffle_buffer=1)
    orders = [[letter for letter in letters(loader) if (letter - ord("0")) % 6 == 0] for _ in range(4)]
    assert all(len(order) == 4 for order in orders) and len(set(map(tuple, orders))) > 1


def test_a_stream_goes_on_under_the_same_processes_only(corpus: Path, place: Callable):
    def make(replicas: int, **settings: Any) -> DataLoader:
        place(0, replicas)
        data = ImageDataModule(
            "huggingface", str(corpus), hf_name="imagefolder", streaming=True, image_size=4, **settings
        )
        return data.train_dataloader()

    settings = {"batch_size": 3, "num_workers": 0, "augmentation": PLAIN}
    loader = make(2, **settings)
    assert len(rows(next(iter(loader)))) == 3
    state = loader.state_dict()
    make(2, **settings).load_state_dict(state)
    with pytest.raises(ValueError, match=r"^trainer.devices .processes in all.: the stream position .* expected 2"):
        make(1, **settings).load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"^data.batch_size: the stream position in the checkpoint .* \(got 4, expected 3\)$"
    ):
        make(2, **{**settings, "batch_size": 4}).load_state_dict(state)
    make(1, **settings).load_state_dict({**state, "finished": True})

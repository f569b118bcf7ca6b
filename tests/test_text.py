"""Text data: what a batch holds, what bad input says, and that a resumed run sees the batches it would have seen."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before datasets is imported

import numpy as np
import pytest
import tokenizers as hf
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_tokenformer.data import TextDataModule, Tokenizer, token_cache
from lit_tokenformer.data.text import files as text_files
from lit_tokenformer.data.text.corpus import HashSplit
from lit_tokenformer.data.text.files import TextFiles, TextFormat
from lit_tokenformer.data.text.sources import HubStream
from lit_tokenformer.data.text.streaming import (
    EvalStream,
    TextStreamLoader,
    TrainStream,
    eval_stream_loader,
    train_stream_loader,
)
from lit_tokenformer.data.text.token_cache import EvalSampler
from lit_tokenformer.errors import UserError

torch.set_num_threads(1)

SEP = 256
DOCUMENTS = [f"Document {i}: " + "naïve words and more. " * (i % 7 + 1) for i in range(40)]


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf_cache"))


def write_lines(path: Path, texts: list[Any], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: text, "n": i}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "corpus.jsonl", DOCUMENTS)


def text(*files: Path, **settings: object) -> TextDataModule:
    defaults = {"block_size": 16, "batch_size": 4, "val_fraction": 0.2}
    return TextDataModule("files", files=[str(file) for file in files], **{**defaults, **settings})


def split_documents(texts: list[str], val: float = 0.2, test: float = 0.0) -> dict[str, list[str]]:
    split = HashSplit(val, test)
    return {name: [text for text in texts if split(text) == name] for name in ("train", "val", "test")}


def plain_stream(texts: list[str]) -> list[int]:
    """The tokens of a split, written down as plainly as can be."""
    return [SEP] + [token for text in texts for token in [*text.encode(), SEP]]


def plain_blocks(tokens: list[int], size: int) -> list[list[int]]:
    blocks = [tokens[start : start + size + 1] for start in range(0, len(tokens) - 1, size)]
    return [block + [-100] * (size + 1 - len(block)) for block in blocks]


def digest(batch: torch.Tensor) -> str:
    return hashlib.sha256(batch.numpy().tobytes()).hexdigest()[:16]


def rows(loader) -> list[list[int]]:
    return [row for batch in loader for row in batch.tolist()]


def refused(message: str):
    return pytest.raises(ValueError, match="^" + message + "[^\n]*$")


# --- Batches ---------------------------------------------------------------------------------------------------------


def test_python_docs_need_no_settings():
    data = TextDataModule()
    assert (data.vocab_size, data.block_size, data.context_length, data.separator_id) == (257, 256, 256, SEP)
    batch = next(iter(data.train_dataloader()))
    assert batch.shape == (16, 257) and batch.dtype == torch.int64
    assert 0 < data.num_train_samples == len(data.train_dataloader().dataset)
    summary = data.corpus_summary()
    assert re.fullmatch(r"python_docs: \d+ documents, \d+ bytes, \d+ tokens, sha256 \w{12}, Python [\d.]+", summary)


def test_standard_library_has_no_tests_in_it():
    source = TextDataModule("python_stdlib").corpus.splits.train
    names = {path.name for path in source.paths}
    assert len(source.paths) > 300 and {"argparse.py", "ast.py"} <= names
    assert sum(map(len, source)) > 5_000_000
    assert not any(
        {"test", "tests", "idle_test", "encodings", "site-packages"} & set(path.parts) for path in source.paths
    )


def test_evaluation_blocks_are_the_plain_ones(corpus: Path):
    data = text(corpus)
    expected = plain_blocks(plain_stream(split_documents(DOCUMENTS)["val"]), 16)
    assert rows(data.val_dataloader()) == expected
    with pytest.raises(UserError, match="test: the data have no test split"):
        data.test_dataloader()


def test_every_token_but_the_first_is_a_target_once(corpus: Path):
    blocks = torch.cat(list(text(corpus).val_dataloader()))
    targets = blocks[:, 1:]
    assert targets[targets != -100].tolist() == plain_stream(split_documents(DOCUMENTS)["val"])[1:]


def test_training_blocks_are_those_of_a_shifted_grid(corpus: Path):
    tokens = plain_stream(split_documents(DOCUMENTS)["train"])
    data = text(corpus, batch_size=1)
    shifts = []
    for epoch in range(6):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        found = rows(loader)
        shift = loader.dataset.shift(epoch, 0)
        shifts.append(shift)
        grid = [tokens[start : start + 17] for start in range(shift, shift + 16 * data.num_train_samples, 16)]
        assert sorted(found) == sorted(grid) and found != grid
    assert len(set(shifts)) > 2 and all(0 <= shift < 16 for shift in shifts)


def test_epochs_have_the_same_number_of_batches_and_another_order(corpus: Path):
    loader = text(corpus).train_dataloader()
    epochs = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        epochs.append([digest(batch) for batch in loader])
    assert len({len(epoch) for epoch in epochs}) == 1 and len({name for epoch in epochs for name in epoch}) == 3 * len(
        loader
    )


def test_batches_follow_from_the_seed_and_not_from_the_workers(corpus: Path):
    settings = ({"seed": 0}, {"seed": 0, "num_workers": 2}, {"seed": 1})
    runs = [[digest(batch) for batch in text(corpus, **one).train_dataloader()] for one in settings]
    assert runs[0] == runs[1] and set(runs[0]).isdisjoint(runs[2])


def test_loaders_leave_the_global_generators_alone(corpus: Path):
    data = text(corpus)
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes()
    assert all(list(loader) for loader in (data.train_dataloader(), data.val_dataloader()))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tobytes()


def test_own_test_split_is_held_out(corpus: Path):
    data = text(corpus, test_fraction=0.2)
    expected = split_documents(DOCUMENTS, 0.2, 0.2)
    assert all(expected.values())
    assert rows(data.test_dataloader()) == plain_blocks(plain_stream(expected["test"]), 16)
    assert rows(data.val_dataloader()) == plain_blocks(plain_stream(expected["val"]), 16)


def test_split_stays_when_documents_are_added():
    split = HashSplit(0.2, 0.1)
    before = {text: split(text) for text in DOCUMENTS}
    after = {text: split(text) for text in [*(f"new {i}" for i in range(3000)), *DOCUMENTS]}
    assert before.items() <= after.items()
    shares = Counter(after.values())
    assert abs(shares["val"] / len(after) - 0.2) < 0.03 and abs(shares["test"] / len(after) - 0.1) < 0.03


def test_bits_per_byte_come_from_a_plain_count(corpus: Path):
    expected = split_documents(DOCUMENTS, 0.2, 0.2)
    for tokenizer in ("bytes", "bpe:300"):
        data = text(corpus, test_fraction=0.2, tokenizer=tokenizer)
        for stage, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
            num_bytes = sum(len(text.encode()) for text in expected[stage])
            targets = sum(int((batch[:, 1:] != -100).sum()) for batch in loader)
            assert data.bytes_per_token(stage) == num_bytes / targets
    with refused("stage: unknown value 'train'"):
        data.bytes_per_token("train")


def test_bpe_learns_from_the_training_documents_alone(tmp_path: Path):
    data = text(write_lines(tmp_path / "a.jsonl", DOCUMENTS), tokenizer="bpe:300")
    expected = Tokenizer.train_bpe(split_documents(DOCUMENTS)["train"], 300).to_json()
    assert data.tokenizer.to_json() == expected != Tokenizer.train_bpe(DOCUMENTS, 300).to_json()


def test_bpe_size_is_known_without_training(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Tokenizer, "train_bpe", None)
    assert text(corpus, tokenizer="bpe:5000").vocab_size == 5000


def test_trained_bpe_is_kept(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    first = text(corpus, tokenizer="bpe:300").tokenizer
    monkeypatch.setattr(Tokenizer, "train_bpe", None)
    assert text(corpus, tokenizer="bpe:300").tokenizer.fingerprint == first.fingerprint


def test_special_token_in_a_document_is_text(tmp_path: Path):
    files = write_lines(tmp_path / "a.jsonl", [f"{i} <|endoftext|> " * 5 for i in range(20)])
    for tokenizer in ("bytes", "bpe:300"):
        data = text(files, tokenizer=tokenizer)
        counts = data.corpus.tokens.counts["val"]
        tokens = data.corpus.tokens.files["val"][: counts.tokens].tolist()
        assert tokens.count(data.separator_id) == counts.documents + 1


def test_large_vocabulary_takes_four_bytes(tmp_path: Path, corpus: Path):
    backend = hf.Tokenizer(hf.models.WordLevel({"?": 0, "</s>": 70_000}, unk_token="?"))
    backend.save(str(tmp_path / "tokenizer.json"))
    data = text(corpus, tokenizer=str(tmp_path / "tokenizer.json"), block_size=2, batch_size=1)
    assert data.vocab_size == 70_001 and data.corpus.tokens.dtype == "uint32"
    assert set(itertools.chain(*rows(data.val_dataloader()))) - {-100} == {0, 70_000}


# --- Files -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, corpus: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "corpus.parquet")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for i, document in enumerate(DOCUMENTS):
        (tmp_path / "folder" / "deep" / f"{i:03d}.{'md' if i % 2 else 'txt'}").write_text(document, newline="")
    (tmp_path / "folder" / "picture.png").touch()
    expected = list(text(corpus).corpus.documents())
    for files in ("corpus.parquet", "folder", "folder/**/*.*"):
        assert list(text(tmp_path / files).corpus.documents()) == expected
    assert len(expected) == 40


def test_text_is_taken_as_it_is(tmp_path: Path):
    content = "one\r\ntwo\x00 \n\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert list(text(tmp_path / "a.txt").corpus.splits.train) == [content]


def test_files_named_twice_are_read_once_and_empty_ones_not_at_all(tmp_path: Path):
    for name, content in (("b", "bb"), ("a", "aa"), ("c", "")):
        (tmp_path / f"{name}.txt").write_text(content)
    assert list(text(tmp_path / "b.txt", tmp_path, tmp_path / "*.txt").corpus.splits.train) == ["bb", "aa"]


def test_own_validation_files_are_not_trained_on(tmp_path: Path):
    files = [
        write_lines(tmp_path / name, DOCUMENTS[cut])
        for name, cut in (("a.jsonl", slice(30)), ("b.jsonl", slice(30, 40)))
    ]
    data = text(tmp_path, val_files=[str(files[1])])
    counts = data.corpus.tokens.counts
    assert (counts["train"].documents, counts["val"].documents) == (30, 10)
    assert rows(data.val_dataloader()) == plain_blocks(plain_stream(DOCUMENTS[30:]), 16)


@pytest.mark.parametrize("end", ["\n", " ", "-"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_one_document_is_split_by_position(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, end: str):
    whole = "".join(f"{number:03d} words{end}" for number in range(100))
    path = tmp_path / f"a.{kind}"
    path.write_text(whole) if kind == "txt" else write_lines(path, ["", whole])
    for _ in range(2):  # the second reads the cache
        data = text(path, val_fraction=0.1, test_fraction=0.05, tokenizer="bpe:270")
        with caplog.at_level("INFO"):
            counts = data.corpus.tokens.counts
        parts = {name: data.tokenizer.decode(file[1:-1]) for name, file in data.corpus.tokens.files.items()}
        assert parts["train"] + parts["test"] + parts["val"] == whole
        sizes = (844, 106, 50) if end == "-" else (850, 100, 50)  # after a space, after a line
        assert tuple(len(parts[name]) for name in ("train", "val", "test")) == sizes
        assert all(count.documents == 1 for count in counts.values())
        assert "split by position (bytes: train {}, val {}, test {})".format(*sizes) in caplog.text
        caplog.clear()
    assert data.tokenizer.to_json() == Tokenizer.train_bpe([whole[: sizes[0]]], 270).to_json()


def test_cut_of_a_document_is_at_a_line_or_a_space():
    split = HashSplit(0.25, 0.0)
    for content, last in (
        ("a" * 70 + "\n" + "b" * 29, "b" * 29),
        ("a" * 70 + " " + "b" * 29, "b" * 29),
        ("a\n" + "b" * 98, "b" * 25),  # too far away
        ("word " * 10 + "\n" + "word " * 10, "word " * 5),
        ("ab", None),
    ):
        found = split.cut(content)
        assert "".join(part for _, part in found) == content
        assert found[-1] == (("val", last) if last else ("train", "ab")), content


def test_fit_without_validation(corpus: Path):
    for make in (text, hub):
        model = Recorder()
        data = make(corpus, val_fraction=0, **({"streaming": True} if make is hub else {}))
        fit(data, model, max_epochs=2, val_check_interval=3, num_sanity_val_steps=2)
        assert len(model.seen) > 40 and data.val_dataloader() == []
        with refused("data.val_fraction: 0 leaves no validation data; use a fraction, or data.val_files"):
            data.setup("validate")
    saver = ModelCheckpoint(monitor="val/loss")
    told = "data.val_fraction: 0 leaves no validation data for ModelCheckpoint .monitor='val/loss'.; monitor train/loss"
    with refused(told):
        fit(text(corpus, val_fraction=0), Recorder(), callbacks=[saver], enable_checkpointing=True)
    with refused("data.val_fraction: expected above 0 with several tasks, got 0"):
        part = text(corpus, val_fraction=0)
        part.trainer = Trainer(**QUIET)
        part.trainer.datamodule = None
        part.setup("fit")


def test_pattern_follows_links_once(tmp_path: Path):
    (tmp_path / "b").mkdir()
    for name in ("a.txt", "b/c.txt", "b/d.csv", "b/.e.txt"):
        (tmp_path / name).write_text(name)
    for name in ("loop", "again", "more"):
        (tmp_path / "b" / name).symlink_to("..")
    assert list(text(tmp_path / "**/*.txt").corpus.splits.train) == ["a.txt", "b/c.txt"]
    assert list(text(tmp_path / "[a]*.txt").corpus.splits.train) == ["a.txt"]


def test_column_can_be_named_and_null_is_no_document(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", ["one", "two"], column="content")
    path.write_text(path.read_text() + '\n{"content": null}\n{"content": ""}\n')
    assert list(text(path, text_column="content").corpus.splits.train) == ["one", "two"]


def test_text_that_is_not_utf8(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    (tmp_path / "c.jsonl").write_text('{"text": "half \\ud83d"}\n')
    for name, where in (("a.txt", "a.txt"), ("b.jsonl", "b.jsonl:2"), ("c.jsonl", "c.jsonl:1")):
        with refused(f"data.encoding_errors: .*{re.escape(where)} is not UTF-8"):
            list(text(tmp_path / name).corpus.splits.train)
    found = [
        list(text(tmp_path / n, encoding_errors="replace").corpus.splits.train) for n in ("a.txt", "b.jsonl", "c.jsonl")
    ]
    assert found == [["caf\ufffd"], ["fine", "caf\ufffd"], ["half \ufffd"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "data.files: .*a.jsonl:2 is not JSON"),
        ('{"body": "a"}', "data.text_column: .*a.jsonl:2 has no 'text'; it has body"),
        ("[1]", "data.text_column: .*a.jsonl:2 has no 'text'; it is not an object"),
        ('{"text": 7}', "data.text_column: .*a.jsonl:2: expected text in 'text', got int"),
    ],
)
def test_wrong_line_is_named(tmp_path: Path, line: str, message: str):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    with refused(message):
        text(tmp_path / "a.jsonl").prepare_data()
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_wrong_parquet_is_named(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_text("nothing of the kind")
    with refused("data.text_column: .*a.parquet has no 'text'; it has body"):
        text(tmp_path / "a.parquet").prepare_data()
    with refused("data.files: cannot read .*b.parquet"):
        text(tmp_path / "b.parquet").prepare_data()


# --- Cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that are tokenised into."""
    made: list[Path] = []
    create = token_cache.atomic_folder
    monkeypatch.setattr(token_cache, "atomic_folder", lambda folder: made.append(folder) or create(folder))
    return made


def test_second_start_reads_the_cache(corpus: Path, builds: list[Path]):
    expected = rows(text(corpus).val_dataloader())
    assert rows(text(corpus, seed=3, batch_size=2).val_dataloader()) == expected and len(builds) == 1


def test_whatever_changes_the_tokens_makes_another_cache(tmp_path: Path, corpus: Path, builds: list[Path]):
    text(corpus).prepare_data()
    for settings in ({"val_fraction": 0.3}, {"test_fraction": 0.2}, {"tokenizer": "bpe:300"}, {"separator": "</s>"}):
        text(corpus, **settings).prepare_data()
    other = write_lines(tmp_path / "other.jsonl", [*DOCUMENTS, "one more"])
    text(other).prepare_data()
    other.rename(tmp_path / "elsewhere.jsonl")
    text(tmp_path / "elsewhere.jsonl").prepare_data()  # the same content
    assert len(builds) == len(set(builds)) == 6


def flip(path: Path, place: int = 1001) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        ("meta.json", Path.unlink),
        ("meta.json", lambda path: path.write_text(path.read_text()[:50])),
        ("meta.json", lambda path: path.write_text("{}")),
        ("meta.json", lambda path: path.write_text(path.read_text().replace('"format": ', '"format": -'))),
        ("train.bin", Path.unlink),
        ("train.bin", lambda path: path.write_bytes(path.read_bytes()[:-2])),
        ("val.bin", lambda path: path.write_bytes(path.read_bytes() + b"\0\0")),
        ("train.bin", flip),
    ],
)
def test_broken_cache_is_made_again(corpus: Path, builds: list[Path], file: str, spoil):
    expected = rows(text(corpus).train_dataloader())
    spoil(builds[0] / file)
    assert rows(text(corpus).train_dataloader()) == expected and builds == [builds[0]] * 2


def test_large_cache_is_checked_in_samples(corpus: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_files, "_FULL_DIGEST", 100)
    monkeypatch.setattr(text_files, "_SAMPLE", 50)
    expected = rows(text(corpus).train_dataloader())
    assert rows(text(corpus).train_dataloader()) == expected and len(builds) == 1
    flip(builds[0] / "train.bin", -1)
    assert rows(text(corpus).train_dataloader()) == expected and len(builds) == 2


@pytest.mark.parametrize("failing", ["_write", "file_digest"])
def test_full_disk_leaves_nothing_behind(tmp_path: Path, corpus: Path, failing: str, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, failing, full)
        with refused(f"data.cache_dir: no space left in {tmp_path}"):
            text(corpus).prepare_data()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    text(corpus).prepare_data()


def test_cache_dir_that_cannot_be_written_is_named(tmp_path: Path, corpus: Path):
    (tmp_path / "taken").touch()
    for tokenizer in ("bytes", "bpe:300"):
        with refused("data.cache_dir: cannot write"):
            text(corpus, cache_dir=str(tmp_path / "taken"), tokenizer=tokenizer).prepare_data()


def tokenise_at_the_same_time(corpus: Path, log: Path, barrier) -> None:
    build = token_cache._build

    def noted(*args) -> None:
        with log.open("a") as file:
            file.write("built\n")
        build(*args)

    token_cache._build = noted
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    barrier.wait(60)
    assert len(list(text(corpus, tokenizer="bpe:300").val_dataloader())) > 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_of_two_processes_one_tokenises(tmp_path: Path, corpus: Path):
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(2)
    processes = [
        fork.Process(target=tokenise_at_the_same_time, args=(corpus, tmp_path / "log", barrier)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


def test_edit_of_a_large_file_between_the_samples_is_noticed(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    """A large file is hashed in samples, which would overlook it."""
    for name, size in (("_FULL_DIGEST", 1000), ("_SAMPLES", 2), ("_SAMPLE", 10)):
        monkeypatch.setattr(text_files, name, size)
    first, second = (text(corpus).corpus.splits.train.fingerprint for _ in range(2))
    os.utime(corpus, (1e9, 1e9))
    assert first == second != text(corpus).corpus.splits.train.fingerprint


# --- Several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [2, 3, 7])
def test_processes_share_the_evaluation_without_counting_twice(corpus: Path, replicas: int):
    blocks = text(corpus).val_dataloader().dataset
    parts = [[blocks[i].tolist() for i in EvalSampler(blocks, replicas, rank)] for rank in range(replicas)]
    assert len({len(part) for part in parts}) == 1
    real = [block for turn in zip(*parts, strict=True) for block in turn if set(block) != {-100}]
    assert real == plain_blocks(plain_stream(split_documents(DOCUMENTS)["val"]), 16)


def test_processes_share_the_training_without_overlap(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    parts = []
    for rank in range(3):
        monkeypatch.setattr(TextDataModule, "_place", property(lambda self, rank=rank: (rank, 3)))
        parts.append(rows(text(corpus, batch_size=1).train_dataloader()))
    assert len({len(part) for part in parts}) == 1
    blocks = Counter(tuple(row) for part in parts for row in part)
    monkeypatch.undo()
    whole = Counter(tuple(row) for row in rows(text(corpus, batch_size=1).train_dataloader()))
    assert blocks <= whole and blocks.total() >= whole.total() - 2


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

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[str] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(digest(batch))
        return self.layer(batch.float().mean().reshape(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        assert batch.dtype == torch.int64

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Stop(Callback):
    """Ends a run abruptly, as a killed job does, once a checkpoint has been saved at or after some batch."""

    def __init__(self, path: Path, batches: int) -> None:
        self.path, self.batches = path, batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if len(pl_module.seen) >= self.batches and any(self.path.glob("*.ckpt")):
            raise KeyboardInterrupt


def fit(data: TextDataModule, model: Recorder, ckpt_path: Path | None = None, **settings: object) -> None:
    trainer = Trainer(**{**QUIET, **settings})
    trainer.fit(model, datamodule=data, ckpt_path=str(ckpt_path) if ckpt_path else None, weights_only=True)


def check_resume(make, path: Path, every: int, stop_at: int, **settings: object) -> None:
    settings = {"max_epochs": 2, "limit_val_batches": 1, **settings}
    straight, first, second = Recorder(), Recorder(), Recorder()
    fit(make(), straight, **settings)
    saver = ModelCheckpoint(path, save_top_k=-1, every_n_train_steps=every, save_on_train_epoch_end=False)
    with pytest.raises(SystemExit):  # what Lightning makes of KeyboardInterrupt
        fit(make(), first, callbacks=[saver, Stop(path, stop_at)], **{**settings, "enable_checkpointing": True})
    newest = max(path.glob("*.ckpt"), key=lambda file: int(file.stem.rpartition("=")[2]))
    fit(make(), second, ckpt_path=newest, **settings)
    assert first.seen == straight.seen[: len(first.seen)] and len(set(straight.seen)) == len(straight.seen)
    done = len(straight.seen) - len(second.seen)
    assert 0 < done <= len(first.seen) and second.seen == straight.seen[done:]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("every", "stop_at"), [(3, 8), (5, 70)])
def test_resumed_run_sees_the_same_batches(corpus: Path, tmp_path: Path, every: int, stop_at: int, workers: int):
    assert 40 < len(text(corpus).train_dataloader()) < 70  # the second is in the second epoch
    check_resume(lambda: text(corpus, num_workers=workers), tmp_path / "ckpt", every, stop_at)


def test_overfit_batches_repeats_the_same_block(corpus: Path):
    model = Recorder()
    fit(text(corpus), model, max_epochs=3, overfit_batches=1)
    assert len(model.seen) == 3 and len(set(model.seen)) == 1


def test_yaml_and_command_line_set_it_up(corpus: Path, tmp_path: Path):
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TextDataModule, "data")
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the older name
    for files in (f"['{corpus}']", f"'{corpus}'"):
        (tmp_path / "text.yaml").write_text(f"data: {{dataset: files, files: {files}, tokenizer: 'bpe:300'}}")
        for args in ([], ["--data.val_files", str(corpus)], ["--data.val_files", f"[{corpus}]"]):
            config = parser.parse_args(["--config", str(tmp_path / "text.yaml"), "--data.block_size", "32", *args])
            data = instantiate(config).data
            assert data.context_length == 32 and data.vocab_size == 300
            assert data.corpus.settings.files == (str(corpus),)
            assert data.corpus.settings.val_files == ((str(corpus),) if args else ())
    assert "Context length T in tokens" in parser.format_help()


# --- Streams ---------------------------------------------------------------------------------------------------------
#
# A document here is one word with an id of its own: a block (SEP, word, SEP) of block_size 2 tells which one it holds.


def word_tokenizer(count: int) -> Tokenizer:
    vocabulary = {"</s>": 0, **{f"w{i}": i for i in range(1, count + 1)}}
    backend = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token="</s>"))
    backend.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend)


def word_shards(path: Path, *sizes: int) -> HubStream:
    import datasets

    numbers = iter(range(1, sum(sizes) + 1))
    for shard, size in enumerate(sizes):
        write_lines(path / f"{shard}.jsonl", [f"w{next(numbers)}" for _ in range(size)])
    files = [str(path / f"{shard}.jsonl") for shard in range(len(sizes))]
    return HubStream(datasets.load_dataset("json", data_files=files, split="train", streaming=True))


def word_loader(
    stream: HubStream, count: int, block_size: int = 2, shuffle_buffer: int = 7, rank: int = 0, **settings: object
) -> TextStreamLoader:
    blocks = TrainStream(stream, word_tokenizer(count), block_size, shuffle_buffer, seed=0, rank=rank)
    return train_stream_loader(blocks, **{"batch_size": 3, **settings})


def words_of(batches) -> list[list[int]]:
    batches = list(batches)
    assert all((batch[:, [0, 2]] == 0).all() for batch in batches)
    return [batch[:, 1].tolist() for batch in batches]


def flat(lists: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def test_stream_gives_every_document_once_in_another_order_each_epoch(tmp_path: Path):
    loader = word_loader(word_shards(tmp_path, 10, 20, 30), 60)
    epochs = [flat(words_of(loader)) for _ in range(2)]
    assert all(sorted(epoch) == list(range(1, 61)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    assert all(abs(place - word) < 2 * 7 for place, word in enumerate(epochs[0], start=1))  # shuffled within windows


def save_and_load(state: dict, path: Path) -> dict:
    torch.save(state, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(("block_size", "shuffle_buffer"), [(2, 7), (2, 1), (5, 4), (5, 1000)])
def test_stream_goes_on_anywhere(tmp_path: Path, block_size: int, shuffle_buffer: int):
    stream = word_shards(tmp_path, 10, 20, 30)

    def loader() -> TextStreamLoader:
        return word_loader(stream, 60, block_size=block_size, shuffle_buffer=shuffle_buffer)

    whole, epochs, states = loader(), [], []
    for _ in range(2):
        epochs.append([])
        for batch in whole:
            epochs[-1].append(digest(batch))
            states.append((save_and_load(whole.state_dict(), tmp_path / "state"), len(epochs), len(epochs[-1])))
    for state, epoch, done in states:
        resumed = loader()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert [digest(batch) for batch in resumed] == epochs[epoch - 1][done:]
    resumed = loader()
    resumed.load_state_dict(whole.state_dict())  # the epoch is over: the next one begins
    assert [digest(batch) for batch in resumed] not in epochs


def test_resumed_stream_reads_one_window_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stream = word_shards(tmp_path, 10, 20, 30)
    loader = word_loader(stream, 60)
    for _, _ in zip(loader, range(10), strict=False):
        state = loader.state_dict()
    read = []
    original = TextFormat.text
    monkeypatch.setattr(TextFormat, "text", lambda *args: read.append(args[1]) or original(*args))
    resumed = word_loader(stream, 60)
    resumed.load_state_dict(state)
    batches = words_of(resumed)
    assert len(batches) == 10 and 30 <= len(read) < 30 + 7


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(12, 30, 9), (30, 9), (5, 26, 5, 6)])
def test_stream_with_workers_goes_on_anywhere(tmp_path: Path, sizes: tuple[int, ...]):
    """Shards of different sizes: workers end at different times."""
    stream, count = word_shards(tmp_path, *sizes), sum(sizes)
    whole = word_loader(stream, count, num_workers=2)
    batches, states = [], []
    for batch in whole:
        batches += words_of([batch])
        states.append(save_and_load(whole.state_dict(), tmp_path / "state"))
    seen = flat(batches)
    assert len(set(seen)) == len(seen) >= count - 2 * 2  # each worker leaves out what does not fill a batch
    for done, state in enumerate(states, start=1):
        resumed = word_loader(stream, count, num_workers=2)
        resumed.load_state_dict(state)
        assert words_of(resumed) == batches[done:]


@pytest.mark.parametrize("sizes", [(10, 20, 30, 20), (10, 30, 21)])
def test_processes_read_different_documents_of_a_stream(tmp_path: Path, sizes: tuple[int, ...]):
    stream, count = word_shards(tmp_path, *sizes), sum(sizes)
    parts = [flat(words_of(word_loader(stream, count, batch_size=1, rank=rank, replicas=2))) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(1, count + 1)) and all(len(part) >= 20 for part in parts)


def read_in_step(rank: int, path: Path, stream: HubStream, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path / 'meet'}", rank=rank, world_size=2)

    def loader() -> TextStreamLoader:
        return word_loader(stream, 50, rank=rank, replicas=2)

    whole, batches, states = loader(), [], []
    for batch in whole:
        batches += words_of([batch])
        states.append(whole.state_dict())
    resumed = loader()
    resumed.load_state_dict(states[2])
    results.put((rank, batches, words_of(resumed) == batches[3:], states[2]))
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_processes_end_a_stream_together_and_save_all_places(tmp_path: Path):
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    stream = word_shards(tmp_path, 35, 15)  # a shard for each process
    processes = [fork.Process(target=read_in_step, args=(rank, tmp_path, stream, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=300) for _ in processes)
    for process in processes:
        process.join(60)
    (_, first, first_resumed, state), (_, second, second_resumed, other) = found
    assert len(first) == len(second) == 5 and not set(flat(first)) & set(flat(second))
    assert first_resumed and second_resumed
    assert state == other and len(state["ranks"]) == 2


def test_stream_evaluates_like_a_corpus(corpus: Path):
    import datasets

    stream = HubStream(datasets.load_dataset("json", data_files=str(corpus), split="train", streaming=True))
    expected = plain_blocks(plain_stream(DOCUMENTS), 16)
    loader = eval_stream_loader(EvalStream(stream, Tokenizer.bytes(), 16), batch_size=4)
    assert rows(loader) == rows(loader) == expected
    num_bytes = sum(len(document.encode()) for document in DOCUMENTS)
    assert (loader.bytes_read, loader.tokens_read) == (num_bytes, num_bytes + len(DOCUMENTS))
    for replicas in (2, 3, 7):
        parts = [
            rows(eval_stream_loader(EvalStream(stream, Tokenizer.bytes(), 16, r, replicas), batch_size=4))
            for r in range(replicas)
        ]
        assert len({len(part) for part in parts}) == 1
        assert [block for turn in zip(*parts, strict=True) for block in turn if set(block) != {-100}] == expected


def hub(path: Path, **settings: object) -> TextDataModule:
    defaults = {
        "block_size": 16,
        "batch_size": 4,
        "val_fraction": 0.2,
        "hf_name": "json",
        "shuffle_buffer": 6,
        "num_workers": 0,
    }
    return TextDataModule("huggingface", files=[str(path)], **{**defaults, **settings})


def test_hugging_face_data_set_is_a_corpus_like_files(corpus: Path, builds: list[Path]):
    data = hub(corpus)
    assert rows(data.val_dataloader()) == rows(text(corpus).val_dataloader())
    assert data.num_train_samples == text(corpus).num_train_samples
    count = len(builds)
    assert rows(hub(corpus).val_dataloader()) and len(builds) == count


def test_streamed_data_set_is_split_and_measured_like_a_corpus(corpus: Path):
    data, same = hub(corpus, streaming=True, tokenizer="bpe:300"), text(corpus, tokenizer="bpe:300")
    assert data.tokenizer.to_json() == same.tokenizer.to_json()
    data.prepare_data(), data.setup("fit")
    assert data.num_train_samples is None and data.vocab_size == 300
    assert math.isclose(data.bytes_per_token("val"), same.bytes_per_token("val"), rel_tol=0.01)
    assert rows(data.val_dataloader()) == rows(same.val_dataloader())
    assert data.bytes_per_token("val") == same.bytes_per_token("val")
    tokens = [token for row in rows(data.train_dataloader()) for token in row[1:]]
    expected = split_documents(DOCUMENTS)["train"]
    assert tokens.count(data.separator_id) >= len(expected) - 4 and len(rows(data.train_dataloader())) > 20


@pytest.mark.parametrize("every", [2, 3])
def test_resumed_stream_sees_the_same_batches(corpus: Path, tmp_path: Path, every: int):
    """Lightning fetches one batch ahead; validation reads the same files in between."""
    settings = {"val_check_interval": 4, "limit_val_batches": 2}
    check_resume(lambda: hub(corpus, streaming=True), tmp_path / "ckpt", every, 9, **settings)


@pytest.mark.slow
def test_resumed_stream_with_workers_sees_the_same_batches(tmp_path: Path):
    for shard, size in enumerate((12, 28)):
        write_lines(tmp_path / "shards" / f"{shard}.jsonl", DOCUMENTS[:size] if shard else DOCUMENTS[28:])
    check_resume(lambda: hub(tmp_path / "shards" / "*.jsonl", streaming=True, num_workers=2), tmp_path / "ckpt", 3, 13)


class Seen(Recorder):
    """Writes down the rows each process trains on and validates with."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def note(self, stage: str, batch: torch.Tensor) -> None:
        with (self.path / f"{stage}{self.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(batch.tolist()) + "\n")

    def training_step(self, batch, batch_idx):
        self.note("train", batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.note("val", batch)


def noted(path: Path, stage: str) -> list[list[list[list[int]]]]:
    """The batches of both processes."""
    files = [path / f"{stage}{rank}.jsonl" for rank in range(2)]
    found = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    for file in files:
        file.unlink()
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("streaming", [False, True])
def test_two_processes_of_a_trainer_share_and_resume(tmp_path: Path, streaming: bool):
    texts = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(60)]
    path = write_lines(tmp_path / "texts.jsonl", texts)

    def run(ckpt_path: Path | None = None, **settings: object) -> list[list[list[list[int]]]]:
        trainer = Trainer(**{**QUIET, "devices": 2, "max_epochs": 1, "strategy": "ddp_notebook", **settings})
        data = hub(path, streaming=streaming)
        trainer.fit(Seen(tmp_path), datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return noted(tmp_path, "train")

    train = run()
    val = noted(tmp_path, "val")
    blocks = [block for turn in zip(*map(flat, val), strict=True) for block in turn if set(block) != {-100}]
    assert blocks == plain_blocks(plain_stream(split_documents(texts)["val"]), 16)
    assert len(train[0]) == len(train[1]) > 10
    assert not set(map(tuple, flat(train[0]))) & set(map(tuple, flat(train[1])))

    saver = ModelCheckpoint(tmp_path, every_n_train_steps=5, filename="{step}", save_top_k=-1)
    run(callbacks=[saver], enable_checkpointing=True, max_steps=8, limit_val_batches=0)
    rest = run(tmp_path / "step=5.ckpt", limit_val_batches=0)
    assert rest == [part[5:] for part in train]


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "python_doc"}, "data.dataset: unknown value 'python_doc', did you mean 'python_docs'?"),
        ({"tokenizer": "byte"}, "data.tokenizer: unknown value 'byte', did you mean 'bytes'?"),
        ({"tokenizer": "bpe:256"}, "data.tokenizer: expected bpe:N with N of 257 or more"),
        ({"tokenizer": "no/such/tokenizer.json"}, "data.tokenizer: no such file or folder: no/such/tokenizer.json"),
        ({"encoding_errors": "ignore"}, "data.encoding_errors: unknown value 'ignore'"),
        ({"block_size": 0}, "data.block_size: expected a whole number of 1 or more, got 0"),
        ({"batch_size": 0}, "data.batch_size: expected a whole number of 1 or more, got 0"),
        ({"eval_batch_size": 0}, "data.eval_batch_size: expected"),
        ({"num_workers": -1}, "data.num_workers: expected a whole number of 0 or more, got -1"),
        ({"seed": -1}, "data.seed: expected"),
        ({"shuffle_buffer": 0}, "data.shuffle_buffer: expected"),
        ({"val_fraction": 1.0}, "data.val_fraction: expected a share from 0 to below 1, got 1.0"),
        ({"test_fraction": -0.1}, "data.test_fraction: expected a share from 0 to below 1, got -0.1"),
        (
            {"val_fraction": 0.5, "test_fraction": 0.5},
            "data.val_fraction: expected less than 1 with data.test_fraction",
        ),
        ({"streaming": True}, "data.streaming: expected data.dataset: files or huggingface, got python_docs"),
        ({"files": "a.txt"}, "data.files: expected data.dataset: files or huggingface, got python_docs"),
        ({"encoding": "utf8000"}, "data.encoding: expected a text encoding such as latin-1, got 'utf8000'"),
        ({"encoding": "rot13"}, "data.encoding: expected a text encoding"),
        ({"chat_template": "{% for"}, "data.chat_template: expected a Jinja template or its file (unexpected 'end of "),
        ({"chat_template": "no.jinja"}, "data.chat_template: expected a Jinja template or its file ([Errno 2] No such"),
    ],
)
def test_wrong_setting_is_refused_when_created(settings: dict, message: str):
    with refused(re.escape(message)):
        TextDataModule(**settings)


def test_files_that_are_not_there_are_named(tmp_path: Path):
    (tmp_path / "a.doc").touch()
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("no.txt", "no such file or folder: .*no.txt"),
        ("*.txt", r".*\*.txt matches no file"),
        ("a**/**/*.txt", ".*: Invalid pattern"),
        ("*.doc", r".*\*.doc matches 1 files, but none with extension .txt, .md, .jsonl, .json, .csv, .parquet"),
        ("empty", ".*empty matches no file"),
        ("a.doc", "expected a file with extension .txt, .md, .jsonl, .json, .csv, .parquet, got .*a.doc"),
    ):
        with refused(f"data.files: {message}"):
            text(tmp_path / name).prepare_data()
    (tmp_path / "a.txt").write_text("a")
    with refused("data.val_files: no such file"):
        text(tmp_path / "a.txt", val_files=[str(tmp_path / "b.txt")]).prepare_data()
    with refused("data.val_files: includes all of data.files, with no file left for training"):
        text(tmp_path / "a.txt", val_files=[str(tmp_path / "a.txt")]).prepare_data()
    with refused("data.files: expected files, folders or patterns, got none"):
        TextDataModule("files").prepare_data()


def test_splits_without_documents_are_refused(tmp_path: Path, corpus: Path):
    for content, settings, message in (
        (["", ""], {}, "data.files: all documents are empty"),
        (DOCUMENTS, {"val_fraction": 1e-6}, r"data.val_fraction: empty validation split \(got none of 40 documents\)"),
        (DOCUMENTS[:2], {"val_fraction": 0.99}, r"data.val_fraction: empty training split \(got none of 2 documents\)"),
        (DOCUMENTS, {"test_fraction": 1e-6}, r"data.test_fraction: empty test split \(got none of 40 documents\)"),
    ):
        for make in (text, hub):
            if make is hub and content[0] == "":
                continue
            with refused(message):
                make(write_lines(tmp_path / "a.jsonl", content), **settings).prepare_data()
    (tmp_path / "empty.txt").touch()
    with refused("data.val_files: all documents are empty"):
        text(corpus, val_files=[str(tmp_path / "empty.txt")]).prepare_data()
    with refused(r"data.val_fraction: empty validation split \(got none of the stream\)"):
        hub(corpus, streaming=True, val_fraction=1e-6).setup("fit")


def test_splits_that_are_too_short_are_refused(corpus: Path, tmp_path: Path):
    longer = write_lines(tmp_path / "longer.jsonl", DOCUMENTS[:1] * 100)
    with refused("data.block_size: too few tokens in the validation split .* expected at least 5001"):
        text(corpus, block_size=5000).setup("validate")
    with refused(
        r"data.block_size: too few tokens in the training split for blocks of 2000 \(.* expected at least 4000\)"
    ):
        text(write_lines(tmp_path / "b.jsonl", DOCUMENTS[:30]), block_size=2000, val_files=[str(longer)]).setup("fit")
    with refused(r"data.batch_size: expected at most \d+ \(the training blocks of a process\), got 1000"):
        text(corpus, batch_size=1000).setup("fit")


def test_stream_too_short_for_a_batch_is_refused(corpus: Path):
    with refused("data.batch_size: the stream .* has less than 1000 blocks of 16"):
        list(hub(corpus, streaming=True, batch_size=1000).train_dataloader())


def test_place_in_a_stream_is_refused_under_other_settings(corpus: Path):
    loader = hub(corpus, streaming=True).train_dataloader()
    next(iter(loader))
    data = hub(corpus, streaming=True, shuffle_buffer=9)
    data.load_state_dict(loader.state_dict())
    with refused(r"data.shuffle_buffer: the stream position in the checkpoint depends on it \(got 9, expected 6\)"):
        data.train_dataloader()


def test_column_of_something_else_than_text_is_refused(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", [7] * 4)
    for streaming in (False, True):
        with refused("data.text_column: expected text or chat messages in 'text' of json, got int64"):
            hub(tmp_path / "a.jsonl", streaming=streaming).setup("fit")


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_a_hugging_face_data_set_are_checked_before_work(tmp_path: Path, streaming: bool):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    columns = {"text": ["one", None, "two"], "bytes": [b"one"] * 3, "list": [["one"]] * 3}
    pq.write_table(pa.table(columns), path)
    settings = {"hf_name": "parquet", "streaming": streaming}
    assert list(hub(path, **settings).corpus.splits.train) == ["one", "two"]
    with refused("data.text_column: expected text or chat messages in 'bytes' of parquet, got (large_)?binary"):
        hub(path, text_column="bytes", **settings).setup("fit")
    told = "data.text_column: row .*: expected text in 'list', got list"
    with refused(told if not streaming else f"data.max_corrupt_share: .*; the first: {told}"):
        list(hub(path, text_column="list", max_corrupt_share=0, **settings).corpus.splits.train)


def test_bad_row_of_a_stream_is_left_out_and_named(tmp_path: Path):
    texts: list[Any] = [f"document {number} " * 9 for number in range(40)]
    found = []
    for name, lines in (("whole", texts), ("bad", [*texts[:30], 5, *texts[30:]])):
        path = write_lines(tmp_path / f"{name}.jsonl", lines)
        data = hub(path, streaming=True, val_files=[str(path)])
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found.append([batch.tolist() for batch in data.train_dataloader()])
    assert found[0] == found[1]
    told = [str(one.message) for one in warned if "row" in str(one.message)]
    assert len(told) == 1 and "row 31 read from the stream: expected text in 'text', got int" in told[0]


def streamed(*files: Path, **settings: object) -> TextDataModule:
    return text(*files, **{"streaming": True, "num_workers": 0, "shuffle_buffer": 6, **settings})


def test_streamed_files_are_split_and_measured_like_a_corpus(corpus: Path):
    data, same = streamed(corpus, tokenizer="bpe:300"), text(corpus, tokenizer="bpe:300")
    data.prepare_data(), data.setup("fit")
    assert data.tokenizer.to_json() == same.tokenizer.to_json() and data.corpus_summary() == "files: streaming"
    assert rows(data.val_dataloader()) == rows(same.val_dataloader())
    assert data.bytes_per_token("val") == same.bytes_per_token("val")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_reader_cannot_parse_is_left_out_of_a_stream(tmp_path: Path, workers: int):
    """A line, a row of another length, a file that ends early."""
    good = json.dumps({"text": "a good document " * 9}) + "\n"
    (tmp_path / "a.jsonl").write_text(good * 9 + '{"text": "bad\n' + good * 9)
    (tmp_path / "b.csv").write_text("text,n\n" + f"{'a good document ' * 9},1\n" * 9 + "bad\n")
    (tmp_path / "c.txt.gz").write_bytes(b"bad")
    data = streamed(tmp_path, val_fraction=0, num_workers=workers, batch_size=1)
    tokens = 27 * (16 * 9 + 1)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert len(rows(data.train_dataloader())) == tokens // 16
    told = [str(one.message) for one in warned if "skipped" in str(one.message)]
    if workers == 0:
        reasons = ("a.jsonl:10 is not JSON", "b.csv:11 has 1 fields", "cannot read .*c.txt.gz")
        for message, reason in zip(told, reasons, strict=True):
            assert re.search(f"unreadable row skipped: data.files: .*{reason}", message)
    with refused("data.max_corrupt_share: 1 of 10 rows of the stream .*; the first: data.files: .*a.jsonl:10 is not"):
        list(streamed(tmp_path, val_fraction=0, max_corrupt_share=0, num_workers=workers).train_dataloader())


def test_stream_of_a_library_that_cannot_go_on_is_refused(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", DOCUMENTS * 9)
    path.write_text(path.read_text() + '{"text": "bad\n')
    with refused("data.(streaming: cannot read after .* rows|hf_name: cannot load 'json'): "):
        list(hub(path, streaming=True, val_fraction=0).train_dataloader())


def test_too_many_bad_rows_of_a_stream_are_refused(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", ["words " * 9] * 20 + [5] * 9)
    for share, told in ((0.001, "4 of 24 rows"), (0.0, "1 of 21 rows")):
        data = hub(path, streaming=True, num_workers=1, val_files=[str(path)], max_corrupt_share=share)
        with refused(f"data.max_corrupt_share: {told} .*; the first: data.text_column: row 21 "):
            list(data.train_dataloader())
    with refused("data.max_corrupt_share: expected a share from 0 to 1, got 2"):
        hub(path, streaming=True, max_corrupt_share=2)


@pytest.mark.parametrize("streaming", [False, True])
def test_chat_of_a_hugging_face_data_set(tmp_path: Path, streaming: bool):
    chats = [[{"role": "user", "content": f"Is it {i}?"}, {"role": "assistant", "content": "Yes."}] for i in range(30)]
    data = hub(
        write_lines(tmp_path / "a.jsonl", chats, column="chat"), streaming=streaming, text_column="chat", val_fraction=0
    )
    expected = [f"<|im_start|>user\nIs it {i}?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n" for i in range(30)]
    assert list(data.corpus.splits.train) == expected


def test_damaged_hugging_face_files_are_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with refused("data.hf_name: cannot load 'json': "):
        hub(tmp_path / "a.jsonl").prepare_data()


def test_wrong_hugging_face_settings_are_refused(corpus: Path):
    for settings, message in (
        ({"hf_name": None}, "data.hf_name: expected the name"),
        ({"hf_name": "no/such-set"}, "data.hf_name: cannot load 'no/such-set': "),
        ({"text_column": "body"}, "data.text_column: no column 'body'; json has text, n"),
        ({"hf_val_split": "dev"}, "data.hf_val_split: no split 'dev' in json; it has train"),
    ):
        for streaming in (False, True):
            with refused(message):
                hub(corpus, streaming=streaming, **settings).corpus.splits  # noqa: B018


def test_files_to_validate_on_need_none_to_train_on(tmp_path: Path):
    (tmp_path / "a.txt").write_text("Only to be read. " * 20)
    files = [str(tmp_path / "a.txt")]
    data = TextDataModule("files", val_files=files, block_size=16, cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    data.setup("validate")
    targets = sum(int((batch[:, 1:] >= 0).sum()) for batch in data.val_dataloader())
    assert targets == 17 * 20 + 1 and data.bytes_per_token("val") == 340 / 341
    with refused("data.files: no training documents"):
        data.setup("fit")


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfText")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "Line"}\n')
    files = TextFiles([tmp_path / "a.txt", tmp_path / "b.jsonl"], TextFormat())
    assert list(files) == ["Text", "Line"]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": ' + "1" * 5000 + "}"])
def test_lines_that_the_json_parser_gives_up_on_are_named(tmp_path: Path, line: str):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with refused("data.files: .*a.jsonl:2 is not JSON"):
        list(TextFiles([tmp_path / "a.jsonl"], TextFormat()))

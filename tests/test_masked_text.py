"""Masked text: what is hidden and how often, what a batch holds, and that a resumed run sees the same batches."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_tokenformer.data import MaskedTextDataModule, TextDataModule, Tokenizer
from lit_tokenformer.data import masking as module
from lit_tokenformer.data.text.corpus import HashSplit
from lit_tokenformer.data.text.masking import MaskIds, mask, uniform

torch.set_num_threads(1)

SEP, MASK = 256, 257
DOCUMENTS = [
    f"Title {i}\n\n" + "Naïve words, and more! Is 3.5 in it? " * (i % 4 + 1) + "\n    code(a.b)\n" for i in range(40)
]
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "un",
    "##believ",
    "##ably",
    "##able",
    "dog",
    "ran",
    ".",
    "!",
    ",",
]


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


def masked(path: Path, **settings: object) -> MaskedTextDataModule:
    defaults = {"block_size": 32, "batch_size": 4, "val_fraction": 0.2, "seed": 0}
    return MaskedTextDataModule("files", files=[str(path)], **{**defaults, **settings})


def documents(split: str) -> list[str]:
    return [text for text in DOCUMENTS if HashSplit(0.2, 0.0)(text) == split]


def stream(split: str) -> list[int]:
    return [SEP] + [token for text in documents(split) for token in [*text.encode(), SEP]]


def all_of(loader) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, labels, lengths = (torch.cat(parts) for parts in zip(*loader, strict=True))
    return tokens, labels, lengths


def originals(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.where(labels >= 0, labels, tokens)


def digest(batch) -> str:
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in batch)).hexdigest()[:16]


def epoch(data: MaskedTextDataModule, number: int):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return loader


def refused(message: str):
    return pytest.raises(ValueError, match="^" + message + "[^\n]*$")


def word_pieces(special: bool = True) -> hf.Tokenizer:
    """A vocabulary like BERT's; the special tokens are in it, and named as such or not."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*names, *WORDS])}
    backend = hf.Tokenizer(hf.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = hf.normalizers.BertNormalizer()
    backend.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    if special:
        backend.add_special_tokens(names)
    return backend


@pytest.fixture(params=[True, False], ids=["named special", "not named"])
def bert_like(request, tmp_path: Path) -> MaskedTextDataModule:
    word_pieces(request.param).save(str(tmp_path / "tokenizer.json"))
    random = np.random.default_rng(0)
    text = ["The cat sat on a mat. Unbelievably, a zebra ran! [MASK] " * n for n in random.integers(1, 6, 60)]
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": one + str(i)}) + "\n" for i, one in enumerate(text))
    )
    return masked(
        tmp_path / "text.jsonl", tokenizer=str(tmp_path / "tokenizer.json"), examples="sentences", whole_words=True
    )


# --- Which tokens are hidden, and how --------------------------------------------------------------------------------


def shares(tokens, labels, hideable, mask_id, before) -> dict[str, float]:
    """Share of the hideable tokens that is hidden; of the hidden ones, the share that is the mask, or the same."""
    hidden = labels != -100
    count = hidden.sum().item()
    return {
        "hidden": count / hideable.sum().item(),
        "masked": (tokens[hidden] == mask_id).sum().item() / count,
        "same": (tokens[hidden] == before[hidden]).sum().item() / count,
    }


@pytest.mark.parametrize("fraction", [0.15, 0.3])
def test_shares_are_those_of_the_hugging_face_collator(fraction: float):
    transformers = pytest.importorskip("transformers")
    vocabulary = {f"w{i}": i + 5 for i in range(995)} | {
        name: i for i, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    }
    backend = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token="[UNK]"))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    )
    before = torch.from_numpy(np.random.default_rng(0).integers(5, 1000, (1000, 128)))
    before[:, 0], before[:, -1] = 2, 3
    special = before < 5
    collate = transformers.DataCollatorForLanguageModeling(theirs, mlm_probability=fraction, seed=0)
    batch = collate(
        [{"input_ids": row, "special_tokens_mask": s} for row, s in zip(before, special.long(), strict=True)]
    )
    ids = MaskIds(Tokenizer(backend))
    draws = uniform((0, 1), np.arange(1000), 128)
    ours = map(torch.from_numpy, mask(before.numpy(), ~special.numpy(), draws, ids, fraction, whole_words=False))
    expected = shares(batch["input_ids"], batch["labels"], ~special, 4, before)
    found = shares(*ours, ~special, ids.mask, before)
    count = fraction * (~special).sum().item()
    exact = {"hidden": fraction, "masked": 0.8, "same": 0.1 + 0.1 / 995}
    for name, share in found.items():
        size = count if name != "hidden" else (~special).sum().item()
        error = 4 * (exact[name] * (1 - exact[name]) / size) ** 0.5
        assert abs(share - exact[name]) < error and abs(share - expected[name]) < 2 * error, name


def test_draws_are_those_of_philox_at_the_place_of_the_example():
    key = np.random.SeedSequence((5, 1)).generate_state(2, np.uint64)
    for example in (0, 7, 2**40):
        expected = np.random.Generator(np.random.Philox(key=key, counter=[0, example, 0, 0])).random((9, 2))
        assert (uniform((5, 1), np.array([example]), 9)[0] == expected).all()
        assert (uniform((5, 1), np.array([3, example]), 4)[1] == expected[:4]).all()  # whatever the batch and its width


def test_random_tokens_are_drawn_evenly_and_hidden_places_are_independent():
    ids = MaskIds(Tokenizer.bytes().with_mask())
    before = np.full((2000, 64), 65)
    tokens, labels = mask(before, before == 65, uniform((0, 1), np.arange(2000), 64), ids, 0.5, whole_words=False)
    drawn = np.bincount(tokens[(labels >= 0) & (tokens != MASK) & (tokens != 65)], minlength=258)
    assert drawn[[SEP, MASK]].tolist() == [0, 0] and abs(drawn[:256].sum() / (128_000 * 0.05) - 1) < 0.06
    rest = np.delete(drawn[:256], 65)
    assert rest.min() > 0 and ((rest - rest.mean()) ** 2).sum() / rest.mean() < 255 + 4 * (2 * 255) ** 0.5
    hidden = (labels >= 0) - 0.5
    assert np.abs(hidden.T @ hidden / 2000 - np.eye(64) / 4).max() < 0.25 * 4.5 / 2000**0.5  # places
    assert np.abs((hidden @ hidden.T)[~np.eye(2000, dtype=bool)] / 64).max() < 0.25 * 6 / 8  # rows
    assert np.abs(hidden.mean(axis=0)).max() < 0.5 * 4 / 2000**0.5


def test_at_least_one_token_of_an_example_is_hidden(corpus: Path):
    for settings in ({}, {"examples": "sentences", "whole_words": True}):
        _, labels, _ = all_of(
            masked(corpus, mask_fraction=1e-9, eval_mask_fraction=1e-9, **settings).train_dataloader()
        )
        words = (labels >= 0).sum(dim=1)
        assert (words >= 1).all() and (settings or (words == 1).all())


def test_row_without_anything_to_hide_stays_as_it_is():
    ids = MaskIds(Tokenizer.bytes().with_mask())
    before = np.full((2, 8), SEP)
    tokens, labels = mask(before, before != SEP, np.zeros((2, 8, 2)), ids, 1.0, whole_words=True)
    assert (tokens == before).all() and (labels == -100).all()


def plain_words(tokens: list[int], tokenizer: Tokenizer, pieces: bool) -> list[int]:
    """The number of each token's word, from the text."""
    word, numbers, before = 0, [], " "
    special = tokenizer.special_ids
    for token in tokens:
        text = "\0" if token in special else tokenizer._backend.id_to_token(token)
        if pieces:
            begins = not text.startswith("##")
        else:
            text = "\0" if token in special else tokenizer.decode([token])
            begins = not all(char.isalnum() or char == "\ufffd" for char in (before, text[0]))
        word += begins or before == "\0"
        numbers.append(word)
        before = text[-1]
    return numbers


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:280"])
@pytest.mark.parametrize("examples", ["blocks", "sentences"])
def test_whole_words_are_hidden_together(corpus: Path, tokenizer: str, examples: str):
    data = masked(corpus, tokenizer=tokenizer, examples=examples, whole_words=True, mask_fraction=0.3)
    check_whole_words(data, pieces=False, share=0.3)


def test_whole_words_of_word_pieces_are_hidden_together(bert_like: MaskedTextDataModule):
    check_whole_words(bert_like, pieces=True, share=0.15)


def check_whole_words(data: MaskedTextDataModule, pieces: bool, share: float) -> None:
    tokens, labels, _ = all_of(data.train_dataloader())
    special = data.tokenizer.special_ids
    whole = originals(tokens, labels)
    several = 0
    for row, hidden in zip(whole.tolist(), (labels >= 0).tolist(), strict=True):
        words: dict[int, set[bool]] = {}
        numbers = plain_words(row, data.tokenizer, pieces)
        for number, one, token in zip(numbers, hidden, row, strict=True):
            if token not in special:
                words.setdefault(number, set()).add(one)
        assert all(len(states) == 1 for states in words.values())
        several += sum(token not in special for token in row) - len(words)
    assert several > 100
    hideable = ~torch.isin(whole, torch.tensor(sorted(special)))
    assert abs((labels >= 0).sum() / hideable.sum() - share) < 0.05


@pytest.mark.parametrize("examples", ["blocks", "sentences"])
def test_special_tokens_are_never_hidden_and_never_drawn(bert_like: MaskedTextDataModule, examples: str):
    data = bert_like
    data.examples, data.mask_fraction, data.whole_words = examples, 1.0, False
    tokens, labels, _ = all_of(data.train_dataloader())
    assert data.tokenizer.special_ids == {0, 1, 2, 3, 4} and labels[labels >= 0].min() >= 5
    before = originals(tokens, labels)
    assert ((labels >= 0) == (before >= 5)).all()  # with a fraction of 1, all the others are
    assert (before == 1).any()  # the zebra is unknown
    assert set(tokens[labels >= 0].unique().tolist()) == {4, *range(5, 5 + len(WORDS))}


def test_masks_follow_from_the_seed_and_leave_the_global_generators_alone(corpus: Path):
    states = torch.get_rng_state(), np.random.get_state()[1].tobytes()
    runs = [[digest(b) for b in masked(corpus, **s).train_dataloader()] for s in ({}, {"num_workers": 2}, {"seed": 1})]
    assert runs[0] == runs[1] and set(runs[0]).isdisjoint(runs[2])
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == np.random.get_state()[1].tobytes()


# --- Batches ---------------------------------------------------------------------------------------------------------


def test_python_docs_need_no_settings():
    data = MaskedTextDataModule()
    data.setup("fit")
    tokens, labels, lengths = next(iter(data.train_dataloader()))
    assert tokens.shape == labels.shape == (32, 128) and lengths.tolist() == [128] * 32
    assert tokens.dtype == labels.dtype == lengths.dtype == torch.int64
    assert (data.separator_id, data.mask_id, data.context_length) == (SEP, MASK, 128)
    assert data.corpus_summary().endswith(
        f"{data.num_train_samples} training examples of 128.0 tokens, 0.0% of a batch is padding"
    )
    with refused("predict: "):
        data.predict_dataloader()


def test_training_blocks_are_those_of_causal_training(corpus: Path):
    settings = {"files": [str(corpus)], "block_size": 32, "batch_size": 4, "val_fraction": 0.2, "seed": 0}
    for number in range(3):
        plain = torch.cat(list(epoch(TextDataModule("files", **settings), number)))
        tokens, labels, _ = all_of(epoch(MaskedTextDataModule("files", **settings), number))
        assert torch.equal(originals(tokens, labels), plain[:, :-1])


def test_every_token_is_predicted_once_in_evaluation(corpus: Path):
    for settings, expected in (({}, stream("val")), ({"examples": "sentences"}, stream("val"))):
        _, labels, lengths = all_of(masked(corpus, eval_mask_fraction=1.0, **settings).val_dataloader())
        assert labels[labels >= 0].tolist() == [token for token in expected if token != SEP]
        assert settings or set(lengths.tolist()) == {32}


@pytest.mark.parametrize("examples", ["blocks", "sentences"])
def test_masks_of_evaluation_are_fixed(corpus: Path, examples: str, monkeypatch: pytest.MonkeyPatch):
    expected = [part.tolist() for part in all_of(masked(corpus, examples=examples).val_dataloader())]
    others = ({"eval_batch_size": 1}, {"eval_batch_size": 7, "num_workers": 2}, {"batch_size": 3, "mask_fraction": 0.5})
    for settings in others:
        data = masked(corpus, examples=examples, **settings)
        for _ in range(2):  # epochs
            assert [part.tolist() for part in all_of(data.val_dataloader())] == expected
    assert [part.tolist() for part in all_of(masked(corpus, examples=examples, seed=1).val_dataloader())] != expected
    parts = []
    for rank in range(3):
        monkeypatch.setattr(MaskedTextDataModule, "_place", property(lambda self, rank=rank: (rank, 3)))
        parts.append(all_of(masked(corpus, examples=examples).val_dataloader()))
    turns = [torch.stack(turn, dim=1).flatten(0, 1) for turn in zip(*parts, strict=True)]
    count = len(expected[0])
    assert [part[:count].tolist() for part in turns] == expected and len(turns[0]) < count + 3
    assert (turns[1][count:] == -100).all() and (turns[2] > 0).all()  # what fills up predicts nothing


@pytest.mark.parametrize("examples", ["blocks", "sentences"])
def test_dynamic_masks_differ_between_epochs_and_static_ones_do_not(corpus: Path, examples: str):
    def hidden(number: int, masking: str) -> Counter:
        loader = epoch(masked(corpus, examples=examples, masking=masking, batch_size=1), number)
        tokens, labels, _ = all_of(loader)
        return Counter((*row, *label) for row, label in zip(tokens.tolist(), labels.tolist(), strict=True))

    static = [hidden(number, "static") for number in range(3)]
    assert static[0] == static[1] == static[2] and static[0].total() > 30
    dynamic = [hidden(number, "dynamic") for number in range(2)]
    assert (dynamic[0] & dynamic[1]).total() < dynamic[0].total() / 10
    orders = [list(epoch(masked(corpus, masking="static"), number)) for number in range(2)]
    assert digest(orders[0][0]) != digest(orders[1][0])


def test_processes_share_the_training_without_overlap(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    parts = []
    for rank in range(3):
        monkeypatch.setattr(MaskedTextDataModule, "_place", property(lambda self, rank=rank: (rank, 3)))
        parts.append([digest(b) for b in masked(corpus, examples="sentences", batch_size=1).train_dataloader()])
    monkeypatch.undo()
    whole = Counter(digest(b) for b in masked(corpus, examples="sentences", batch_size=1).train_dataloader())
    assert len({len(part) for part in parts}) == 1
    shared = Counter(name for part in parts for name in part)
    assert shared <= whole and shared.total() >= whole.total() - 2


# --- Sentences -------------------------------------------------------------------------------------------------------


def plain_examples(text: bytes, size: int) -> list[bytes]:
    """As many sentences as fit, written down as plainly as can be."""
    sentences = [part for part in re.findall(rb"(?s).*?(?:\n+|[.!?](?=\s)|\Z)", text) if part]
    pieces = [part[start : start + size] for part in sentences for start in range(0, len(part), size)]
    examples = [pieces[0]]
    for piece in pieces[1:]:
        if len(examples[-1]) + len(piece) <= size:
            examples[-1] += piece
        else:
            examples.append(piece)
    return examples


@pytest.mark.parametrize("block_size", [2, 9, 32, 1000])
def test_sentences_are_packed_like_plain_ones(corpus: Path, block_size: int, monkeypatch: pytest.MonkeyPatch):
    expected = [example for text in documents("train") for example in plain_examples(text.encode(), block_size - 1)]
    for piece in (module._PIECE, 500):
        monkeypatch.setattr(module, "_PIECE", piece)
        data = masked(corpus, examples="sentences", block_size=block_size)
        tokens, labels, lengths = data._train_blocks.__getitems__(range(len(data._train_blocks)))
        rows = zip(originals(tokens, labels).tolist(), lengths.tolist(), strict=True)
        found = [(bytes(row[: length - 1]), set(row[length - 1 :])) for row, length in rows]
        assert found == [(example, {SEP}) for example in expected]  # the separator, and it pads
        assert tokens.shape == (len(expected), block_size) and data.num_train_samples == len(expected)


def test_every_token_comes_once_in_an_epoch_of_sentences(corpus: Path):
    data = masked(corpus, examples="sentences", batch_size=1)
    for number in range(2):
        tokens, labels, lengths = all_of(epoch(data, number))
        real = torch.arange(32) < lengths[:, None] - 1
        found = Counter(originals(tokens, labels)[real].tolist())
        assert found == Counter(token for token in stream("train") if token != SEP)
        assert (labels[~real] == -100).all() and (tokens[~real] == SEP).all()


def test_documents_without_a_place_to_cut_are_cut_all_the_same(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x" * 1000)
    (tmp_path / "b.txt").write_text("y" * 50)
    data = masked(tmp_path / "a.txt", val_files=[str(tmp_path / "b.txt")], examples="sentences", block_size=64)
    assert data._train_blocks.lengths.tolist() == [64] * 15 + [1000 - 15 * 63 + 1]
    assert all_of(data.val_dataloader())[2].tolist() == [51]


def test_width_is_the_block_or_the_longest(corpus: Path):
    for pad_to in ("block", "longest"):
        data = masked(corpus, examples="sentences", pad_to=pad_to)
        widths = {(tokens.shape[1], int(lengths.max())) for tokens, _, lengths in data.train_dataloader()}
        assert all(width == (32 if pad_to == "block" else longest) for width, longest in widths)
        padding = [1 - lengths.sum() / tokens.numel() for tokens, _, lengths in data.train_dataloader()]
        told = float(re.search(r"([\d.]+)% of a batch is padding", data.corpus_summary())[1]) / 100
        assert abs(told - np.mean(padding)) < 0.02


def test_width_does_not_change_a_mask(corpus: Path):
    block, longest = (
        masked(corpus, examples="sentences", pad_to=pad_to).val_dataloader() for pad_to in ("block", "longest")
    )
    for (wide, wide_labels, _), (tokens, labels, _) in zip(block, longest, strict=True):
        assert torch.equal(wide[:, : tokens.shape[1]], tokens) and torch.equal(
            wide_labels[:, : labels.shape[1]], labels
        )


# --- Vocabularies ----------------------------------------------------------------------------------------------------


def test_foreign_special_tokens_are_used(bert_like: MaskedTextDataModule):
    data = bert_like
    assert (data.mask_id, data.separator_id, data.vocab_size) == (4, 3, 64)
    tokens, _, lengths = all_of(data.train_dataloader())
    rows = torch.arange(len(tokens))
    assert (tokens[:, 0] == 2).all() and (tokens[rows, lengths - 1] == 3).all()
    assert (tokens[torch.arange(32) >= lengths[:, None]] == 0).all() and lengths.min() < 32
    assert ((tokens == 2) | (tokens == 3)).sum() == 2 * len(tokens)


def test_brackets_in_a_document_are_text(bert_like: MaskedTextDataModule):
    bert_like.mask_fraction = 1e-9
    tokens, labels, _ = all_of(bert_like.train_dataloader())
    assert (originals(tokens, labels) != 4).all()  # the text says [MASK] often


@pytest.mark.parametrize(
    ("tokenizer", "pad_vocab_to", "size"),
    [("bytes", 64, 320), ("bytes", 1, 258), ("bpe:4096", 64, 4160), ("bpe:319", 64, 320)],
)
def test_vocabulary_has_room_for_the_mask_and_is_rounded_up(corpus: Path, tokenizer: str, pad_vocab_to: int, size: int):
    data = masked(corpus, tokenizer=tokenizer, pad_vocab_to=pad_vocab_to)
    assert data.vocab_size == size
    assert data.mask_id == data.tokenizer.size - 1 == data.corpus.tokenizer.size < size
    again = Tokenizer.from_json(data.tokenizer.to_json())
    assert again.special_id("mask") == data.mask_id and again.decode([data.mask_id]) == "[MASK]"


def test_tokens_are_shared_with_causal_training(corpus: Path, tmp_path: Path):
    masked(corpus).prepare_data()
    TextDataModule("files", files=[str(corpus)], val_fraction=0.2).prepare_data()
    assert len(list((tmp_path / "cache").rglob("train.bin"))) == 1


def test_texts_of_other_vocabularies():
    sentence_pieces = hf.Tokenizer(hf.models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("▁the", -1.0), ("s", -2.0)], 0))
    assert Tokenizer(sentence_pieces).texts()[2:] == [" the", "s"]
    with_gap = Tokenizer(hf.Tokenizer(hf.models.WordLevel({"a": 0, "</s>": 2}, unk_token="a")))
    assert with_gap.texts() == [" a", None, " </s>"]
    assert Tokenizer.bytes().texts()[8:12] == ["\b", "\t", "\n", "\x0b"]
    with refused("data.tokenizer: expected a vocabulary with \\[MASK\\], or one whose ids have no gaps"):
        Tokenizer(hf.Tokenizer(hf.models.WordLevel({"a": 0, "</s>": 70_000}, unk_token="a"))).with_mask()


# --- Resume under Lightning ------------------------------------------------------------------------------------------


class Recorder(LightningModule):
    """Keeps a hash of every training batch, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[str] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(digest(batch))
        return self.layer(batch[2].float().mean().reshape(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        assert len(batch) == 3

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Stop(Callback):
    """Ends a run abruptly, as a killed job does."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if len(pl_module.seen) >= self.batches:
            raise KeyboardInterrupt


def fit(
    data: MaskedTextDataModule, ckpt_path: Path | None = None, model: Recorder | None = None, **settings: object
) -> list[str]:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(**{**quiet, "accelerator": "cpu", "max_epochs": 2, "limit_val_batches": 1, **settings})
    model = model or Recorder()
    with suppress(SystemExit):  # what Lightning makes of KeyboardInterrupt
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return model.seen


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("every", "stop_at"), [(3, 8), (7, 55)])
@pytest.mark.parametrize("examples", ["blocks", "sentences"])
def test_resumed_run_sees_the_same_batches(
    corpus: Path, tmp_path: Path, examples: str, every: int, stop_at: int, workers: int
):
    def data() -> MaskedTextDataModule:
        return masked(corpus, examples=examples, num_workers=workers, whole_words=True)

    straight = fit(data())
    assert len(set(straight)) == len(straight)
    assert 8 < len(straight) // 2 < 55 < len(straight)  # the second is in the second epoch
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=every, save_on_train_epoch_end=False)
    first = fit(data(), callbacks=[saver, Stop(stop_at)], enable_checkpointing=True)
    newest = max(tmp_path.glob("*.ckpt"), key=lambda file: int(file.stem.rpartition("=")[2]))
    rest = fit(data(), ckpt_path=newest)
    assert first == straight[:stop_at] and rest == straight[stop_at // every * every :]


@pytest.mark.parametrize("examples", ["blocks", "sentences"])
def test_examples_can_be_sent_to_another_process(corpus: Path, examples: str):
    dataset = masked(corpus, examples=examples).train_dataloader().dataset
    again = pickle.loads(pickle.dumps(dataset))
    assert digest(again.__getitems__([(1, 0, 5), (1, 0, 3)])) == digest(dataset.__getitems__([(1, 0, 5), (1, 0, 3)]))
    assert [part.tolist() for part in again[1, 0, 5]] == [part[0].tolist() for part in again.__getitems__([(1, 0, 5)])]


class Seen(Recorder):
    """Writes down what each process trains on."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        (self.path / f"rank{self.global_rank}.json").write_text(json.dumps(self.seen))
        return loss


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_two_processes_of_a_trainer_share_and_resume(corpus: Path, tmp_path: Path):
    def run(ckpt_path: Path | None = None, **settings: object) -> list[list[str]]:
        data = masked(corpus, examples="sentences")
        settings = {"devices": 2, "strategy": "ddp_notebook", "max_epochs": 1, **settings}
        fit(data, ckpt_path, model=Seen(tmp_path), **settings)
        return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]

    straight = run()
    assert len(straight[0]) == len(straight[1]) > 10 and not set(straight[0]) & set(straight[1])
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=5, filename="{step}", save_top_k=-1)
    run(callbacks=[saver], enable_checkpointing=True, max_steps=8)
    assert run(tmp_path / "step=5.ckpt") == [part[5:] for part in straight]


def test_overfit_batches_repeats_the_same_batch(corpus: Path):
    seen = fit(masked(corpus), max_epochs=3, overfit_batches=1)
    assert len(seen) == 3 and len(set(seen)) == 1


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_fraction": 0.0}, "data.mask_fraction: expected a share above 0 and at most 1, got 0.0"),
        ({"mask_fraction": 1.5}, "data.mask_fraction: expected a share above 0 and at most 1, got 1.5"),
        ({"eval_mask_fraction": -0.1}, "data.eval_mask_fraction: expected a share above 0 and at most 1, got -0.1"),
        ({"examples": "sentence"}, "data.examples: unknown value 'sentence', did you mean 'sentences'?"),
        ({"pad_to": "blocks"}, "data.pad_to: unknown value 'blocks', did you mean 'block'?"),
        ({"masking": "dynamical"}, "data.masking: unknown value 'dynamical', did you mean 'dynamic'?"),
        ({"pad_vocab_to": 0}, "data.pad_vocab_to: expected a whole number of 1 or more, got 0"),
        ({"streaming": True}, "data.streaming: expected false for masked text"),
        ({"dataset": "python_doc"}, "data.dataset: unknown value 'python_doc', did you mean 'python_docs'?"),
        ({"block_size": 0}, "data.block_size: expected a whole number of 1 or more, got 0"),
    ],
)
def test_wrong_setting_is_refused_when_created(settings: dict, message: str):
    with refused(re.escape(message)):
        MaskedTextDataModule(**settings)


def test_sizes_that_do_not_fit_are_refused(corpus: Path, tmp_path: Path):
    with refused("data.block_size: expected 2 or more for sentences with special tokens, got 1"):
        masked(corpus, examples="sentences", block_size=1).setup("fit")
    with refused(r"data.batch_size: expected at most \d+ \(the training examples of a process\), got 1000"):
        masked(corpus, examples="sentences", batch_size=1000).setup("fit")
    with refused("data.block_size: too few tokens in the validation split .* expected at least 5001"):
        masked(corpus, block_size=5000).setup("validate")
    with refused("data.separator: '\\[MASK\\]' is the mask token and cannot end a document"):
        masked(corpus, separator="[MASK]").setup("fit")
    (tmp_path / "a.txt").write_text("Only to be read. " * 20)
    data = MaskedTextDataModule("files", val_files=[str(tmp_path / "a.txt")], examples="sentences")
    data.setup("validate")
    assert len(list(data.val_dataloader())) == 1 and "training examples" not in data.corpus_summary()
    with refused("data.files: no training documents"):
        data.setup("fit")


def test_command_line_sets_it_up():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MaskedTextDataModule, "data")
    config = parser.parse_args(
        ["--data.examples", "sentences", "--data.mask_fraction", "0.3", "--data.whole_words", "true"]
    )
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the older name
    data = instantiate(config).data
    assert (data.examples, data.mask_fraction, data.whole_words) == ("sentences", 0.3, True)
    help_text = " ".join(parser.format_help().split())
    assert "0.3 in MosaicBERT" in help_text and "Fraction of tokens masked in training" in help_text

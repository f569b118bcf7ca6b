"""Tokenizers: exact round trips, ids one can rely on, and what a wrong name or file says."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as hf
from tokenizers import models, pre_tokenizers, processors

from lit_tokenformer.data.text.tokenizer import USUAL_SEPARATORS, Tokenizer, bpe_size, check_name, cut
from lit_tokenformer.data.text.word_table import WordTable

TEXTS = [
    "plain words, and more of them",
    "naïve café — “quotes” 日本語 🙂👩‍👩‍👧 \U0010ffff",
    "tabs\tand\r\nline\n\n\nbreaks  \u2028 two  spaces   three\x00\x7f\x85\xa0",
    "the literal <|endoftext|> and </s> are text",
    " leading and trailing ",
    "def f(x):\n    return x ** 2\n",
]


def letters(count: int, seed: int = 0) -> str:
    random.seed(seed)
    return "".join(random.choices("abcde é\n\n 日", k=count))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train_bpe([*TEXTS, letters(5000)], 400)


def words(*vocabulary: str) -> hf.Tokenizer:
    backend = hf.Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def one_line(caught: pytest.ExceptionInfo) -> bool:
    return "\n" not in str(caught.value)


def test_bytes_are_their_own_ids():
    tokenizer = Tokenizer.bytes()
    for text in TEXTS:
        assert tokenizer.encode(text) == list(text.encode())
    assert (tokenizer.size, tokenizer.separator, tokenizer.separator_id) == (257, "<|endoftext|>", 256)
    assert tokenizer.decode(range(256)) == bytes(range(256)).decode(errors="replace")


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_is_exact(bpe: Tokenizer, text: str):
    for tokenizer in (bpe, Tokenizer.bytes()):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.separator_id not in tokenizer.encode(text)


def test_every_character_survives(bpe: Tokenizer):
    text = "".join(map(chr, [*range(0x3000), *range(0xE000, 0x10FFFF, 997)]))
    assert bpe.decode(bpe.encode(text)) == text


def test_batch_is_encoded_like_its_texts(bpe: Tokenizer):
    assert bpe.encode_batch(TEXTS) == [bpe.encode(text) for text in TEXTS]


def test_bpe_is_shorter_than_bytes_and_the_same_each_time(bpe: Tokenizer):
    again = Tokenizer.train_bpe([*TEXTS, letters(5000)], 400)
    assert again.to_json() == bpe.to_json() and again.fingerprint == bpe.fingerprint
    assert bpe.size <= 400 and len(bpe.encode(letters(100))) < len(letters(100).encode())


def test_separators_are_written_by_name(bpe: Tokenizer):
    for tokenizer in (bpe, Tokenizer.bytes("</s>")):
        ids = [tokenizer.separator_id, *tokenizer.encode("a"), tokenizer.separator_id]
        assert tokenizer.decode(ids) == f"{tokenizer.separator}a{tokenizer.separator}"


# --- Long texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 7, 50, 1000])
def test_pieces_of_a_text_are_the_text(size: int):
    for text in ("", "a", letters(2000), "x" * 100, " " * 100, "\n" * 100, "a\nb" * 50, "a b" * 50):
        pieces = list(cut(text, size))
        assert "".join(pieces) == text and all(len(piece) <= size for piece in pieces)


def test_pieces_give_the_tokens_of_the_whole(bpe: Tokenizer):
    text = "\n".join("some words, naïve  and\n\n\tmore of them 1234"[: 5 + i % 38] for i in range(400))
    pieces = list(cut(text, 300))
    assert len(pieces) > 20
    assert [token for ids in bpe.encode_batch(pieces) for token in ids] == bpe.encode(text)


def test_documents_come_back_in_order_and_whole(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lit_tokenformer.data.text.tokenizer._BATCH", 500)
    documents = [letters(n, seed=n) for n in (1, 700, 3, 2000, 499, 0, 5)]
    found: list[list[int]] = [[]]
    for ids, ends in bpe.encode_documents(iter(documents)):
        found[-1] += ids.tolist()
        found += [[]] if ends else []
    assert found == [*map(bpe.encode, documents), []]


# --- Text as it is produced ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_text(bpe: Tokenizer, text: str):
    for tokenizer in (bpe, Tokenizer.bytes()):
        streamer = tokenizer.stream()
        parts = [streamer.step(token) for token in tokenizer.encode(text)]
        assert "".join(parts) == text and streamer.finish() == ""


def test_incomplete_characters_are_held_back():
    streamer = Tokenizer.bytes().stream()
    assert [streamer.step(byte) for byte in "a🙂b".encode()] == ["a", "", "", "", "🙂", "b"]
    assert streamer.step(0xF0) == "" and streamer.finish() == "\ufffd"
    assert [streamer.step(np.int64(97)), streamer.step(256)] == ["a", "<|endoftext|>"]


def test_bytes_that_are_no_text_do_not_stop_the_stream():
    streamer = Tokenizer.bytes().stream()
    text = "".join(streamer.step(token) for token in [0xFF, 97, 0xC3, 0x28, 98]) + streamer.finish()
    assert text == bytes([0xFF, 97, 0xC3, 0x28, 98]).decode(errors="replace")


# --- Files -----------------------------------------------------------------------------------------------------------


def test_saved_tokenizer_is_the_same(bpe: Tokenizer, tmp_path: Path):
    bpe.save(tmp_path / "tokenizer.json")
    for name in (tmp_path / "tokenizer.json", tmp_path):
        loaded = Tokenizer.load(str(name))
        assert loaded.fingerprint == bpe.fingerprint and loaded.encode(TEXTS[1]) == bpe.encode(TEXTS[1])
    assert Tokenizer.from_json(bpe.to_json()).separator_id == bpe.separator_id


def test_pickled_tokenizer_still_takes_special_tokens_for_text(bpe: Tokenizer):
    copy = pickle.loads(pickle.dumps(bpe))
    assert copy.encode(TEXTS[3]) == bpe.encode(TEXTS[3]) and copy.fingerprint == bpe.fingerprint


@pytest.mark.parametrize("separator", USUAL_SEPARATORS)
def test_usual_separators_are_found(separator: str):
    tokenizer = Tokenizer.from_json(words("?", "a", separator, "b").to_str())
    assert (tokenizer.separator, tokenizer.separator_id, tokenizer.size) == (separator, 2, 4)


def test_separator_can_be_named_and_must_exist():
    text = words("?", "STOP", "</s>").to_str()
    tokenizer = Tokenizer.from_json(text, "STOP")
    assert tokenizer.separator_id == 1 and tokenizer.fingerprint != Tokenizer.from_json(text).fingerprint
    for given, separator, message in (
        (text, "<eos>", "data.separator: the tokenizer has no token '<eos>'"),
        (words("?", "a").to_str(), None, "data.separator: the tokenizer has none of <|endoftext|>"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(message)) as caught:
            Tokenizer.from_json(given, separator)
        assert one_line(caught)


def test_padding_truncation_and_templates_of_a_file_are_not_used(tmp_path: Path):
    backend = words("?", "a", "b", "</s>")
    backend.enable_padding(length=8)
    backend.enable_truncation(max_length=2)
    backend.post_processor = processors.TemplateProcessing(single="</s> $A </s>", special_tokens=[("</s>", 3)])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(str(tmp_path)).encode("a b a b") == [1, 2, 1, 2]


def test_size_is_the_largest_id(tmp_path: Path):
    backend = hf.Tokenizer(models.WordLevel({"?": 0, "</s>": 900}, unk_token="?"))
    assert Tokenizer(backend).size == 901


# --- Vocabularies of other projects ----------------------------------------------------------------------------------

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.,!"]
BERT += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] + ["the", "cat", "caf", "##fe", "日", "É"]
FOREIGN = ["The cat, the café! CAT É日本 and  tabs\tx", "naïve\r\n\nlines ", " <s>x", "", "123 🙂"]


def gpt2_files(folder: Path, bpe: Tokenizer, *special: str) -> None:
    bpe._backend.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocabulary |= {name: len(vocabulary) + i for i, name in enumerate(set(special) - {*vocabulary})}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))


def sentence_pieces(folder: Path, kind: str, name: str = "tokenizer.model") -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (folder / "text.txt").write_text("the cat sat on the mat, naïve café 123\nan end of a line\n" * 30)
    settings = {
        "input": folder / "text.txt",
        "model_prefix": folder / "made",
        "model_type": kind,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    sentencepiece.SentencePieceTrainer.train(**settings, vocab_size=45)
    (folder / "made.model").rename(folder / name)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("vocab.json", {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<extra>"}),
        ("vocab.json", {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}),
        (
            "vocab.json",
            {
                "tokenizer_class": "RobertaTokenizer",
                "eos_token": "</s>",
                "mask_token": {"__type": "AddedToken", "content": "<mask>"},
            },
        ),
        ("vocab.json", {"tokenizer_class": "CLIPTokenizer"}),
        ("vocab.txt", {"tokenizer_class": "BertTokenizer", "do_lower_case": False}),
        ("vocab.txt", {"tokenizer_class": "BertTokenizer", "strip_accents": False, "sep_token": "[SEP]"}),
        ("vocab.txt", {"tokenizer_class": "DistilBertTokenizer", "do_lower_case": True}),
        ("unigram", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}),
        ("bpe", {"tokenizer_class": "LlamaTokenizer"}),
        ("bpe", None),
        ("tokenizer.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}),
    ],
)
def test_ids_are_those_of_transformers(kind: str, config: dict | None, bpe: Tokenizer, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|startoftext|>")
    if kind == "vocab.json":
        gpt2_files(tmp_path, bpe, *special, *(["a</w>", "t</w>"] if "CLIP" in str(config) else []))
    elif kind == "vocab.txt":
        (tmp_path / kind).write_text("\n".join(BERT) + "\n", encoding="utf-8")
    elif kind == "tokenizer.json":
        words("<unk>", "the", "</s>", "<s>x").save(str(tmp_path / kind))
    else:
        sentence_pieces(tmp_path, kind)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.load(str(tmp_path))
    for text in FOREIGN:
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == expected, text
        assert ours.decode(expected) == theirs.decode(expected, clean_up_tokenization_spaces=False)
    assert ours.separator_id == (theirs.eos_token_id if theirs.eos_token_id is not None else theirs.sep_token_id)
    assert ours.size == max(theirs.get_vocab().values()) + 1


def test_vocabulary_is_read_from_a_file_as_from_its_folder(bpe: Tokenizer, tmp_path: Path):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    gpt2_files(tmp_path / "a", bpe)
    (tmp_path / "b/vocab.txt").write_text("\n".join(BERT))
    for path in ("a/vocab.json", "a/merges.txt", "b/vocab.txt"):
        ours = Tokenizer.load(str(tmp_path / path))
        assert ours.fingerprint == Tokenizer.load(str((tmp_path / path).parent)).fingerprint
        again = Tokenizer.from_json(ours.to_json(), ours.separator_id)
        assert again.encode(FOREIGN[0]) == ours.encode(FOREIGN[0]) and again.special_ids == ours.special_ids
    assert Tokenizer.load(str(tmp_path / "a")).encode(FOREIGN[0]) == bpe.encode(FOREIGN[0])
    sentence_pieces(tmp_path / "c", "unigram", "mine.model")
    text = "the cat  sat on the naïve mat, 1"
    import sentencepiece

    expected = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "c/mine.model")).encode(text)
    for path in ("c", "c/mine.model"):
        assert Tokenizer.load(str(tmp_path / path)).encode(text) == expected


def test_special_tokens_of_a_folder_are_those_of_its_config(tmp_path: Path):
    words("?", "a", "<|endoftext|>", "<stop>", "<hide>", "[MASK]").save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(str(tmp_path)).separator == "<|endoftext|>"
    config = {"eos_token": "<stop>", "mask_token": {"content": "<hide>"}, "pad_token": None, "bos_token": "<none>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(str(tmp_path))
    assert (tokenizer.separator_id, tokenizer.special_id("mask"), tokenizer.special_id("pad")) == (3, 4, None)
    assert tokenizer.size == 6 and tokenizer.with_mask() is tokenizer and 4 in tokenizer.special_ids
    assert pickle.loads(pickle.dumps(tokenizer)).special_id("mask") == 4
    assert Tokenizer.load(str(tmp_path), "<|endoftext|>").separator_id == 2
    assert Tokenizer.load(str(tmp_path / "tokenizer.json")).separator_id == 2


def test_name_is_loaded_from_the_files_of_its_repository(bpe: Tokenizer, tmp_path: Path, monkeypatch):
    gpt2_files(tmp_path, bpe)
    asked = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert Tokenizer.load("openai-community/gpt2").encode(FOREIGN[0]) == bpe.encode(FOREIGN[0])
    assert {"tokenizer.json", "merges.txt", "tokenizer_config.json"} <= {*asked["openai-community/gpt2"]}
    assert not any(name.endswith((".bin", ".safetensors", ".py")) for name in asked["openai-community/gpt2"])


def test_code_of_a_folder_is_not_run(tmp_path: Path):
    pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(BERT))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass MineTokenizer: pass\n")
    config = {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": ["mine.MineTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^data.tokenizer: transformers cannot read .*vocab.txt: ") as caught:
        Tokenizer.load(str(tmp_path))
    assert one_line(caught) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("missing", ["transformers", "sentencepiece"])
def test_missing_package_is_named(missing: str, tmp_path: Path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        ValueError, match=r"^data.tokenizer: .*tokenizer.model needs .*: pip install 'lit-tokenformer\[hf\]'$"
    ):
        Tokenizer.load(str(tmp_path))


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bpe", "bpe:", "bpe:x", "bpe:256", "bpe:-1", "bpe:4k"])
def test_wrong_bpe_size_is_refused(name: str):
    with pytest.raises(ValueError, match=r"^data.tokenizer: expected bpe:N with N of 257 or more") as caught:
        check_name(name)
    assert one_line(caught) and bpe_size("bpe:257") == 257


@pytest.mark.parametrize("name", ["byte", "Bytes", "bpe4096", ""])
def test_misspelt_name_is_refused(name: str):
    with pytest.raises(ValueError, match=f"^data.tokenizer: unknown value '{name}'") as caught:
        check_name(name)
    assert one_line(caught)


def test_missing_and_damaged_files_are_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text('{"version":')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("no.json", "no such file or folder: "),
        ("empty", "no tokenizer.json, vocab.json, vocab.txt, .* in "),
        ("broken.json", ".*broken.json is damaged: EOF"),
        ("binary.json", "cannot read .*binary.json"),
    ):
        with pytest.raises(ValueError, match=f"^data.tokenizer: {message}") as caught:
            Tokenizer.load(str(tmp_path / name))
        assert one_line(caught)


def test_name_that_cannot_be_loaded_is_refused(monkeypatch: pytest.MonkeyPatch):
    def offline(name: str, **settings: object) -> None:
        raise OSError("no connection\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match=r"^data.tokenizer: 'gpt2' is not bytes.*no connection$"):
        Tokenizer.load("gpt2")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forks_neither_hang_nor_warn(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    tokenizer = Tokenizer.bytes()
    assert len(tokenizer.encode_batch(["ab", "cd"] * 50)) == 100
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    process = fork.Process(target=lambda: results.put(tokenizer.encode_batch(["ab", "cd"] * 50)))
    process.start()
    assert results.get(timeout=300)[:2] == [[97, 98], [99, 100]]
    process.join()
    assert "parallelism" not in capfd.readouterr().err


def test_a_vocabulary_is_trained_on_words_without_end():
    start = time.perf_counter()
    tokenizer = Tokenizer.train_bpe(["abc" * 40_000, " " * 40_000, "some words"], 300)
    assert time.perf_counter() - start < 300  # many minutes, if such a word is merged as a whole
    assert tokenizer.decode(tokenizer.encode("abc" * 5000)) == "abc" * 5000


# --- The table of words ----------------------------------------------------------------------------------------------

MARKS = " \n\t\r\x0b\x0c\x1c\x1f\0\x7f'\u2019“”éя中\xa0\u2003\x85\u3000\u200b🙂ab9s.t(٠²ªʰ\u0301🇦"


def test_a_table_of_words_changes_no_token(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Any mixture of spaces, marks and letters of Unicode, against the library; tables are emptied in between."""
    draw = random.Random(0)
    texts = ["".join(draw.choices(MARKS + 6 * " a's\n9é", k=draw.randint(0, 24))) for _ in range(3000)]
    texts += [*TEXTS, letters(2000), "a" * 5000 + " é", "é " * 3000, " " * 3000 + "é"]
    assert bpe._words is not None
    for most in (1 << 18, 50):
        monkeypatch.setattr("lit_tokenformer.data.text.word_table._MOST_WORDS", most)
        batches = [texts[place : place + 100] for place in range(0, len(texts), 100)]
        with ThreadPoolExecutor(3) as pool:
            found = [ids for batch in pool.map(bpe.encode_arrays, batches) for ids in batch]
        for text, ids, expected in zip(texts, found, bpe.encode_batch(texts), strict=True):
            assert ids.dtype == np.uint32 and ids.tolist() == expected, repr(text)
    assert len(bpe._words._table) < 2000


def test_only_tokenizers_that_split_as_gpt2_does_have_a_table(bpe: Tokenizer):
    def changed(change: Callable[[dict[str, Any]], Any]) -> hf.Tokenizer:
        rules = json.loads(bpe.to_json())
        change(rules)
        backend = hf.Tokenizer.from_str(json.dumps(rules))
        backend.encode_special_tokens = True
        return backend

    assert WordTable.fits(changed(lambda rules: None))
    for change in (
        lambda rules: rules["pre_tokenizer"].update(add_prefix_space=True),
        lambda rules: rules["pre_tokenizer"].update(use_regex=False),
        lambda rules: rules.update(pre_tokenizer={"type": "Whitespace"}),
        lambda rules: rules.update(normalizer={"type": "Lowercase"}),
        lambda rules: rules["model"].update(dropout=0.1),
        lambda rules: rules["added_tokens"][0].update(special=False),
    ):
        assert not WordTable.fits(changed(change))
    assert Tokenizer.bytes()._words is None

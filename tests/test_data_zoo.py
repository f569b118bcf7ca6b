"""A zoo of odd files, folders and tables: each gives the right values, or one line that names file and reason."""

# --- Tokenizers and prompts ------------------------------------------------------------------------------------------

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers as hf
import torch

from lit_tokenformer.cli.generate import generate_text
from lit_tokenformer.data import Tokenizer
from lit_tokenformer.errors import UserError
from lit_tokenformer.tasks import LitCausalLM
from lit_tokenformer.tasks.rebuild import fresh_checkpoint

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

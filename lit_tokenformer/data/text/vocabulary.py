"""Vocabulary files of other projects, read as a tokenizer of the ``tokenizers`` library."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lit_tokenformer.data.hub import first_line
from lit_tokenformer.errors import UserError

USUAL_SEPARATORS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
"""Default tokens that end a document, in order of preference."""

ROLES = {
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]",),
}
"""Usual names of other special tokens by role."""

SPECIAL = {*USUAL_SEPARATORS, *(name for names in ROLES.values() for name in names)}
"""Usual names of all special tokens."""

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")  # in order of preference
_CONFIG = "tokenizer_config.json"
_CONFIGS = ("special_tokens_map.json", "added_tokens.json", _CONFIG, "config.json")
_BYTE_LEVEL = ("", "gpt2", "roberta")
_WORD_PIECE = ("", "bert", "distilbert", "electra")


def download(name: str) -> Path:
    """Download the vocabulary files of a Hugging Face model, or find them in the cache, and return their folder."""
    files = [*_VOCABULARIES[:-1], "merges.txt", *_CONFIGS, "tokenizer.model", "spiece.model", "*.bpe.model"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as error:  # of the hub, the connection or the disk
        where = "not bytes, bpe:N, a file or a folder, and not loaded from Hugging Face"
        raise UserError(f"data.tokenizer: {name!r} is {where}: {first_line(error)}") from error


def find_vocabulary(folder: Path) -> Path | None:
    """Return the preferred vocabulary file of a folder, or ``None`` without one."""
    return next((found for name in _VOCABULARIES for found in sorted(folder.glob(name))), None)


def read_vocabulary(path: Path) -> tuple[hf.Tokenizer, dict[str, str]]:
    """Read a vocabulary: ``tokenizer.json``, ``vocab.json`` with ``merges.txt``, ``vocab.txt`` or sentencepiece.

    In a folder, ``tokenizer_config.json`` names the special tokens and the rules of ``vocab.json`` and ``vocab.txt``,
    by default those of GPT-2 and BERT. Other classes of tokenizers are converted by transformers.

    Args:
        path: Folder, or one of its files; a ``tokenizer.json`` named as a file is read without its folder.

    Returns:
        The tokenizer, and its special tokens by role (eos, mask, pad, ...), as far as they are known.

    Raises:
        ValueError: If a file is missing or damaged, or transformers is not installed and needed.
    """
    file = path
    if path.is_dir():
        found = find_vocabulary(path)
        if found is None:
            raise UserError(f"data.tokenizer: no {', '.join(_VOCABULARIES)} in {path}")
        file = found
    elif file.suffix not in (".txt", ".model") and file.name != "vocab.json":
        return from_text(read_text(file), file), {}
    config = {**_settings(file.with_name("special_tokens_map.json")), **_settings(file.with_name(_CONFIG))}
    named = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()}
    special = {
        key.removesuffix("_token"): token
        for key, token in named.items()
        if key.endswith("_token") and isinstance(token, str)
    }
    kind = config.get("tokenizer_class") or _settings(file.with_name("config.json")).get("model_type") or ""
    kind = str(kind).lower().removesuffix("fast").removesuffix("tokenizer")
    if file.name == "tokenizer.json":
        return from_text(read_text(file), file), special
    with _damage(file):
        if file.name in ("vocab.json", "merges.txt") and kind in _BYTE_LEVEL:
            backend = _byte_level(file.with_name("vocab.json"), file.with_name("merges.txt"), config)
        elif file.suffix == ".txt" and kind in _WORD_PIECE:
            backend = _word_piece(file, special.get("unk", "[UNK]"), config)
        else:
            return _converted(file)
        added = {int(place): token for place, token in config.get("added_tokens_decoder", {}).items()}
        names = [*special.values(), *(token for token in backend.get_vocab() if token in SPECIAL)]
        backend.add_tokens([hf.AddedToken(**added[place]) for place in sorted(added)])
        backend.add_special_tokens([hf.AddedToken(name, normalized=False) for name in dict.fromkeys(names)])
        return _checked(backend), special


def from_text(text: str, source: object) -> hf.Tokenizer:
    """Build a tokenizer from the text of a ``tokenizer.json``; raise a ``UserError`` with its source if damaged."""
    with _damage(source):
        return _checked(hf.Tokenizer.from_str(text))


def _checked(backend: hf.Tokenizer) -> hf.Tokenizer:
    """Validate a tokenizer with a round trip, and return it."""
    by_id: dict[int, str] = {}
    for token, place in backend.get_vocab(with_added_tokens=False).items():
        if (other := by_id.setdefault(place, token)) != token:
            raise ValueError("the tokens {!r} and {!r} have the same id {}".format(*sorted((other, token)), place))
    if not by_id:
        raise ValueError("the vocabulary is empty")
    backend.no_padding()  # the padded length is unbounded
    backend.decode(backend.encode("a 1\n", add_special_tokens=False).ids)
    return backend


@contextmanager
def _damage(source: object) -> Iterator[None]:
    """Convert every exception of the library, Rust panics included, to one line that names the source."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)  # Rust prints a panic to stderr and raises it as an exception too
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        raise UserError(f"data.tokenizer: {source} is damaged: {first_line(error)}") from error
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def read_text(path: Path) -> str:
    """Read a UTF-8 file, without a byte-order mark; raise a ``UserError`` if it is unreadable."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.tokenizer: cannot read {path}: {first_line(error)}") from error


def _lines(path: Path) -> list[str]:
    return read_text(path).removesuffix("\n").split("\n")  # other line separators are tokens


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with _damage(path):
        found = json.loads(read_text(path))
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, got {type(found).__name__}")
        return found


def _byte_level(vocab: Path, merges: Path, config: Mapping[str, Any]) -> hf.Tokenizer:
    """Build the byte-level BPE of GPT-2 and RoBERTa."""
    for file in (vocab, merges):
        if not file.is_file():
            raise UserError(f"data.tokenizer: no {file.name} in {file.parent} (expected vocab.json and merges.txt)")
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(_lines(merges), start=1):
        if line.strip() and not line.startswith("#version"):
            first, _, second = line.partition(" ")
            if not first or not second or " " in second:
                raise UserError(f"data.tokenizer: {merges}:{number}: expected two tokens, got {line!r}")
            pairs.append((first, second))
    tokens = _settings(vocab)
    with _damage(f"{vocab} with {merges.name}"):
        if wrong := [token for token, place in tokens.items() if not isinstance(place, int)]:
            raise ValueError(f"expected a whole number as the id of {wrong[0]!r}, got {tokens[wrong[0]]!r}")
        backend = hf.Tokenizer(models.BPE(tokens, pairs, continuing_subword_prefix="", end_of_word_suffix=""))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    return backend


def _word_piece(vocab: Path, unknown: str, config: Mapping[str, Any]) -> hf.Tokenizer:
    """Build BERT's WordPiece."""
    tokens = {token: place for place, token in enumerate(_lines(vocab))}
    if unknown not in tokens:
        raise ValueError(f"no token {unknown}")
    backend = hf.Tokenizer(models.WordPiece(tokens, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _converted(file: Path) -> tuple[hf.Tokenizer, dict[str, str]]:
    """Convert a vocabulary by transformers, without remote code."""
    try:
        from transformers import AutoTokenizer

        if file.suffix == ".model":
            from sentencepiece import SentencePieceProcessor

            SentencePieceProcessor(model_file=str(file))  # raises for another format
    except ImportError as error:
        raise UserError(f"data.tokenizer: {file} needs {error.name}: pip install 'lit-tokenformer[hf]'") from None
    with tempfile.TemporaryDirectory() as folder:  # the name of the file decides in transformers, and not its folder
        shutil.copy(file, Path(folder, "tokenizer.model" if file.suffix == ".model" else file.name))
        for other in (file.with_name(name) for name in ("vocab.json", "merges.txt", *_CONFIGS)):
            if other.is_file():
                shutil.copy(other, folder)
        try:
            found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            backend = _checked(found.backend_tokenizer)
        except Exception as error:
            raise UserError(f"data.tokenizer: transformers cannot read {file}: {first_line(error)}") from error
    return backend, {role.removesuffix("_token"): str(token) for role, token in found.special_tokens_map.items()}

"""Tokenizers of the ``tokenizers`` library: raw bytes, a trained byte-level BPE, vocabulary files, a Hugging Face name.

Byte-level BPE is that of GPT-2 (Radford et al. 2019, section 2.2); byte-pair encoding is arXiv:1508.07909.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from lit_tokenformer.atomic_io import atomic_write
from lit_tokenformer.data.text.vocabulary import ROLES, SPECIAL, USUAL_SEPARATORS, download, from_text, read_vocabulary
from lit_tokenformer.data.text.word_table import WordTable
from lit_tokenformer.errors import UserError, unknown_name

SEPARATOR = USUAL_SEPARATORS[0]
"""Special token that ends a document, in our own vocabularies."""

Key = TypeVar("Key")

BYTES_VOCAB_SIZE = 257  # the bytes and the separator
_PIECE = 1 << 18  # characters that are tokenized at once; a longer document is cut
_CUTS = re.compile(r"(?s).*\S\n(?=\S)"), re.compile(r"(?s).*\S(?= \S)")  # up to the last lone line break, or space
_LONG = re.compile(r"\S{1000}(?=\S)|\s{1000}(?=\s)")  # where long words are cut for BPE training
_BATCH = 1 << 20  # characters per encode_batch: about 100 MB inside the library

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_CHARS = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
"""Printable character of each byte in a byte-level vocabulary (GPT-2's table)."""
_CHAR_BYTES = {char: byte for byte, char in _BYTE_CHARS.items()}


def bpe_size(name: str) -> int | None:
    """Parse the vocabulary size N of ``bpe:N``; None for every other name.

    Raises:
        ValueError: If N is missing or below 257.

    Example:
        >>> bpe_size("bpe:4096"), bpe_size("bytes")
        (4096, None)
    """
    if name != "bpe" and not name.startswith("bpe:"):
        return None
    size = name.removeprefix("bpe").removeprefix(":")
    if not re.fullmatch(r"[0-9]+", size) or int(size) < BYTES_VOCAB_SIZE:
        expected = f"expected bpe:N with N of {BYTES_VOCAB_SIZE} or more (256 bytes and the separator)"
        raise UserError(f"data.tokenizer: {expected}, got {name}")
    return int(size)


def check_name(name: str) -> None:
    """Validate the setting ``data.tokenizer`` without opening a file.

    Raises:
        ValueError: If it is a misspelling of ``bytes`` or ``bpe:N``, or the file or folder does not exist.
    """
    if name == "bytes" or bpe_size(name) is not None or (name and Path(name).exists()):
        return
    if name.endswith((".json", ".txt", ".model")) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"data.tokenizer: no such file or folder: {name}")
    if not name or ("/" not in name and difflib.get_close_matches(name, ("bytes", "bpe:4096", "bpe:"), 1, cutoff=0.7)):
        raise unknown_name("data.tokenizer", name, ("bytes", "bpe:4096", "a vocabulary file", "a Hugging Face name"))


class Tokenizer:
    """Tokenizer that never adds special tokens and never parses them in the text of a document.

    ``decode(encode(text)) == text`` for every text with ``bytes`` and ``bpe:N``; other vocabularies may normalize.

    Args:
        backend: Tokenizer of the ``tokenizers`` library. Its templates, padding and truncation are disabled.
        separator: Special token that ends a document, or its id. None: the ``eos`` of ``special``, else the first of
            ``USUAL_SEPARATORS`` in the vocabulary.
        special: Special tokens by role, in addition to the usual names (``ROLES``).

    Raises:
        ValueError: If the separator is not in the vocabulary.

    Example:
        >>> tokenizer = Tokenizer.bytes()
        >>> tokenizer.encode("né"), tokenizer.separator_id, tokenizer.size
        ([110, 195, 169], 256, 257)
    """

    def __init__(
        self, backend: hf.Tokenizer, separator: str | int | None = None, special: Mapping[str, str] | None = None
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # "<|endoftext|>" inside a document is text
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.special = dict(special or {})
        if isinstance(separator, int):
            separator = backend.id_to_token(separator)
        if not isinstance(separator, (str, type(None))):
            raise UserError(f"data.separator: expected a token, got {separator!r}")
        names = (self.special.get("eos"), *USUAL_SEPARATORS) if separator is None else (separator,)
        found = next((name for name in names if name in vocabulary), None)
        if found is None and separator is not None:
            raise UserError(f"data.separator: the tokenizer has no token {separator!r}")
        if found is None:
            usual = ", ".join(USUAL_SEPARATORS)
            raise UserError(f"data.separator: the tokenizer has none of {usual}; set the token that ends a document")
        self._backend = backend
        self._vocabulary = vocabulary
        self.separator: str = found
        """Special token that ends a document."""
        self.separator_id: int = vocabulary[found]
        """Id of the separator."""
        self.size: int = max(vocabulary.values()) + 1
        """Largest id + 1."""

    @classmethod
    def bytes(cls, separator: str | None = None) -> Tokenizer:
        """Create the vocabulary of raw UTF-8 bytes: ids 0 to 255 are the bytes, 256 is the separator."""
        backend = hf.Tokenizer(models.BPE(vocab={_BYTE_CHARS[byte]: byte for byte in range(256)}, merges=[]))
        # Without GPT-2's regular expression: without merges it has no effect and takes three quarters of the time.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([hf.AddedToken(separator or SEPARATOR, normalized=False)])
        return cls(backend, separator or SEPARATOR)

    @classmethod
    def train_bpe(cls, documents: Iterable[str], vocab_size: int, separator: str | None = None) -> Tokenizer:
        """Train a byte-level BPE, deterministic in the documents.

        The vocabulary size is 257 or more; few texts may result in a smaller one.
        """
        _allow_parallelism()
        name = separator or SEPARATOR
        backend = hf.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        pieces = (piece for text in documents for whole in cut(text) for piece in _without_long_words(whole))
        alphabet = [_BYTE_CHARS[byte] for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[name], initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(pieces, trainer)
        return cls(backend, name)

    @classmethod
    def load(cls, name: str, separator: str | None = None) -> Tokenizer:
        """Load an existing tokenizer: ``bytes``, a vocabulary file or its folder, or a Hugging Face name.

        Raises:
            ValueError: If it is missing or damaged.
        """
        check_name(name)
        if name == "bytes":
            return cls.bytes(separator)
        backend, special = read_vocabulary(Path(name) if Path(name).exists() else download(name))
        return cls(backend, separator, special)

    @classmethod
    def from_json(cls, text: str, separator: str | int | None = None, source: str = "the tokenizer") -> Tokenizer:
        """Build a tokenizer from the text of its ``tokenizer.json``, with the name of its source in errors.

        Raises:
            ValueError: If the text is damaged.
        """
        return cls(from_text(text, source), separator)

    def to_json(self) -> str:
        """Return the text of a ``tokenizer.json``."""
        return self._backend.to_str()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``tokenizer.json``."""
        with atomic_write(path) as file:
            file.write(self.to_json().encode())

    def special_id(self, role: str) -> int | None:
        """Return the id of the special token with a role (see ``ROLES``), else None.

        An ordinary BPE token with the same text is not special.
        """
        names = (self.special.get(role, ""), *ROLES[role])
        return next((self._named[name] for name in names if name in self._named), None)

    @property
    def special_ids(self) -> set[int]:
        """Ids without text: the separator, the unknown token and the special tokens of the vocabulary."""
        added = self._backend.get_added_tokens_decoder().items()
        found = {self._named.get(name) for name in SPECIAL.union(self.special.values())}
        found |= {place for place, token in added if token.special}
        found |= {self.separator_id, self._vocabulary.get(getattr(self._backend.model, "unk_token", None) or "")}
        return {place for place in found if place is not None}

    @cached_property
    def _named(self) -> dict[str, int]:
        """Ids of the tokens that are special if their name is."""
        added = {token.content: place for place, token in self._backend.get_added_tokens_decoder().items()}
        return added if isinstance(self._backend.model, models.BPE) else {**self._vocabulary, **added}

    def with_mask(self) -> Tokenizer:
        """Return this tokenizer if it has a mask token, else a copy with one appended.

        Raises:
            ValueError: If the vocabulary's ids have gaps, so that a new id is not the last one.
        """
        if self.special_id("mask") is not None:
            return self
        copy, name = from_text(self.to_json(), "the tokenizer"), ROLES["mask"][0]
        copy.add_special_tokens([hf.AddedToken(name, normalized=False)])
        if copy.token_to_id(name) != self.size:
            raise UserError(f"data.tokenizer: expected a vocabulary with {name}, or one whose ids have no gaps")
        return Tokenizer(copy, self.separator, self.special)

    def texts(self) -> list[str | None]:
        """Return the text of each token by id; None for an unused id.

        Bytes that are not UTF-8 are replaced by U+FFFD. In vocabularies without spaces (WordPiece, WordLevel), a token
        that begins a word is prefixed with one.
        """
        model = self._backend.model
        prefix, suffix = (getattr(model, name, None) for name in ("continuing_subword_prefix", "end_of_word_suffix"))
        byte_level = not prefix and _BYTE_CHARS[32] in self._vocabulary
        found: list[str | None] = [None] * self.size
        for token, place in self._vocabulary.items():
            if prefix or isinstance(model, models.WordLevel):
                text = token.removeprefix(prefix) if prefix and token.startswith(prefix) else f" {token}"
            elif suffix:
                text = f"{token.removesuffix(suffix)} " if token.endswith(suffix) else token
            elif byte_level and set(token) <= _CHAR_BYTES.keys():
                text = bytes(_CHAR_BYTES[char] for char in token).decode(errors="replace")
            else:
                text = token.replace("▁", " ")
            found[place] = text
        return found

    @property
    def marks_continuation(self) -> bool:
        """Presence of marks on tokens that continue a word, such as ``##``."""
        return bool(getattr(self._backend.model, "continuing_subword_prefix", None))

    @property
    def fingerprint(self) -> str:
        """Hash of the vocabulary, its rules and the separator."""
        return hashlib.sha256(f"{self.separator}\n{self.to_json()}".encode()).hexdigest()[:16]

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._backend, self.separator, self.special)  # a pickled backend loses its settings

    def encode(self, text: str) -> list[int]:
        """Encode a text to token ids."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts to token ids, in parallel."""
        _allow_parallelism()
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode several texts to token ids, (n,) uint32 each; faster than :meth:`encode_batch` for many texts."""
        if self._words is None:
            return [np.array(ids, np.uint32) for ids in self.encode_batch(texts)]
        return self._words.encode(texts)

    @cached_property
    def _words(self) -> WordTable | None:
        return WordTable(self.encode_batch) if WordTable.fits(self._backend) else None

    def encode_documents(self, documents: Iterable[str]) -> Iterator[tuple[np.ndarray, bool]]:
        """Encode many documents to token ids, in order and in bounded memory; a long one is cut (see ``cut``).

        Yields:
            ``(ids (n,) uint32, ends)``: the ids of a piece, and whether it is the last one of its document.
        """
        for batch in batches(("", text) for text in documents):
            ids = self.encode_arrays([piece for _, piece, _ in batch])
            yield from ((one, ends) for one, (_, _, ends) in zip(ids, batch, strict=True))

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text, with special tokens by name and U+FFFD for bytes that are not UTF-8."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def stream(self) -> TextStreamer:
        """Create an incremental decoder."""
        return TextStreamer(self._backend)


class TextStreamer:
    """Incremental decoder that holds back incomplete characters.

    Example:
        >>> streamer = Tokenizer.bytes().stream()
        >>> [streamer.step(byte) for byte in "né".encode()]
        ['n', '', 'é']
    """

    def __init__(self, backend: hf.Tokenizer) -> None:
        self._backend = backend
        self._stream = decoders.DecodeStream(skip_special_tokens=False)
        self._held: list[int] = []

    def step(self, token: int) -> str:
        """Decode the next token id and return the completed text, often empty."""
        text = self._stream.step(self._backend, int(token))
        self._held = [*self._held, int(token)] if text is None else []
        return text or ""

    def finish(self) -> str:
        """Return the text held back, with U+FFFD for incomplete characters, and reset the decoder."""
        held, self._held = self._held, []
        self._stream = decoders.DecodeStream(skip_special_tokens=False)
        return self._backend.decode(held, skip_special_tokens=False) if held else ""


def cut(text: str, size: int = _PIECE) -> Iterator[str]:
    """Cut a long text into pieces of at most ``size`` characters (3 or more).

    A cut is after a single line break, else before a single space. Neither changes the tokens of bytes or a byte-level
    BPE; some other vocabularies (those that prepend a space to each text) see the start of a new text.

    Example:
        >>> list(cut("one two\\nthree four", size=9))
        ['one two\\n', 'three', ' four']
    """
    start = 0
    while len(text) - start > size:
        found = (one.match(text, start, start + size + 1) for one in _CUTS)
        stop = next((match.end() for match in found if match), start + size)
        yield text[start:stop]
        start = stop
    yield text[start:]


def batches(documents: Iterable[tuple[Key, str]]) -> Iterator[list[tuple[Key, str, bool]]]:
    """Cut documents (see ``cut``) into batches of about 1 MB: ``(key, piece, whether it is the document's last)``."""
    batch: list[tuple[Key, str, bool]] = []
    size = 0
    for key, document in documents:
        *begin, last = cut(document)
        for piece, ends in (*((piece, False) for piece in begin), (last, True)):
            batch.append((key, piece, ends))
            size += len(piece)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    yield batch


def _without_long_words(text: str) -> Iterator[str]:
    """Cut a text within long runs of spaces or non-spaces: BPE training is quadratic in a word's length."""
    ends = (run.end() for run in _LONG.finditer(text))
    return (text[start:stop] for start, stop in pairwise([0, *ends, len(text)]))


def _allow_parallelism() -> None:
    """Enable the library's threads in this process and disable them in forks, where they would hang."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # if set, the library does not warn
    _keep_forks_serial()


@cache
def _keep_forks_serial() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))

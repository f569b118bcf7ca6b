"""Tokenizer over the ``tokenizers`` library: raw bytes, a trained byte-level BPE, a ``tokenizer.json``, a hub name.

Byte-level BPE is that of GPT-2 (Radford et al. 2019, section 2.2); byte-pair encoding is arXiv:1508.07909.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from lit_tokenformer.atomic_io import atomic_write
from lit_tokenformer.errors import UserError, unknown_name

SEPARATOR = "<|endoftext|>"
"""Special token that ends a document, in our own vocabularies."""

USUAL_SEPARATORS = (SEPARATOR, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
"""Default separators of other vocabularies, in order of preference."""

MASKS = ("[MASK]", "<mask>")
"""Mask tokens; ``with_mask`` adds the first one."""

_USUAL_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<pad>", "<unk>", "<s>", "</s>", *MASKS)

BYTES_VOCAB_SIZE = 257  # the bytes and the separator
_PIECE = 1 << 18  # characters that are tokenized at once; a longer document is cut
_LONG = re.compile(r"\S{1000}(?=\S)|\s{1000}(?=\s)")  # where long words are cut for BPE training
_BATCH = 1 << 20  # characters per encode_batch: about 100 MB inside the library


def bpe_size(name: str) -> int | None:
    """Parse the vocabulary size N of ``bpe:N``; None for every other name.

    Args:
        name: Setting ``data.tokenizer``.

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
    """Validate the setting without opening a file.

    Args:
        name: Setting ``data.tokenizer``.

    Raises:
        ValueError: If it is a misspelling of ``bytes`` or ``bpe:N``, or the file or folder does not exist.
    """
    if name == "bytes" or bpe_size(name) is not None or (name and Path(name).exists()):
        return
    if name.endswith(".json") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"data.tokenizer: no such file or folder: {name}")
    if not name or ("/" not in name and difflib.get_close_matches(name, ("bytes", "bpe:4096", "bpe:"), 1, cutoff=0.7)):
        raise unknown_name("data.tokenizer", name, ("bytes", "bpe:4096", "a tokenizer.json", "a Hugging Face name"))


class Tokenizer:
    """Tokenizer that never adds special tokens and never parses them in the text of a document.

    ``decode(encode(text)) == text`` for every text with ``bytes`` and ``bpe:N``; other vocabularies may normalize.

    Args:
        backend: Tokenizer of the ``tokenizers`` library. Its templates, padding and truncation are disabled.
        separator: Special token that ends a document. None: the first of ``USUAL_SEPARATORS`` in the vocabulary.

    Raises:
        ValueError: If the separator is not in the vocabulary.

    Example:
        >>> tokenizer = Tokenizer.bytes()
        >>> tokenizer.encode("né"), tokenizer.separator_id, tokenizer.size
        ([110, 195, 169], 256, 257)
    """

    def __init__(self, backend: hf.Tokenizer, separator: str | None = None) -> None:
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # "<|endoftext|>" inside a document is text
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if separator is None:
            separator = next((token for token in USUAL_SEPARATORS if token in vocabulary), None)
            if separator is None:
                usual = ", ".join(USUAL_SEPARATORS)
                raise UserError(
                    f"data.separator: the tokenizer has none of {usual}; set the token that ends a document"
                )
        elif separator not in vocabulary:
            raise UserError(f"data.separator: the tokenizer has no token {separator!r}")
        self._backend = backend
        self.separator = separator
        """Special token that ends a document."""
        self.separator_id: int = vocabulary[separator]
        """Id of the separator."""
        self.size: int = max(vocabulary.values()) + 1
        """Largest id + 1."""

    @classmethod
    def bytes(cls, separator: str | None = None) -> Tokenizer:
        """Create the vocabulary of raw UTF-8 bytes: ids 0 to 255 are the bytes, 256 is the separator.

        Args:
            separator: Name of the separator. None: ``<|endoftext|>``.
        """
        backend = hf.Tokenizer(models.BPE(vocab={_BYTE_CHARS[byte]: byte for byte in range(256)}, merges=[]))
        # Without GPT-2's regular expression: without merges it has no effect and takes three quarters of the time.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        name = separator or SEPARATOR
        backend.add_special_tokens([hf.AddedToken(name, special=True, normalized=False)])
        return cls(backend, name)

    @classmethod
    def train_bpe(cls, documents: Iterable[str], vocab_size: int, separator: str | None = None) -> Tokenizer:
        """Train a byte-level BPE, deterministic in the documents.

        Args:
            documents: Texts to train on.
            vocab_size: Vocabulary size, 257 or more. Few texts may result in a smaller one.
            separator: Name of the separator. None: ``<|endoftext|>``.
        """
        _allow_parallelism()
        name = separator or SEPARATOR
        backend = hf.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[name],
            initial_alphabet=[_BYTE_CHARS[byte] for byte in range(256)],
            show_progress=False,
        )
        pieces = (piece for text in documents for whole in cut(text) for piece in _without_long_words(whole))
        backend.train_from_iterator(pieces, trainer)
        return cls(backend, name)

    @classmethod
    def load(cls, name: str, separator: str | None = None) -> Tokenizer:
        """Load an existing tokenizer: ``bytes``, a ``tokenizer.json`` or its folder, or a Hugging Face name.

        Args:
            name: Setting ``data.tokenizer``, other than ``bpe:N``.
            separator: See the class.

        Raises:
            ValueError: If it is missing or damaged.
        """
        check_name(name)
        if name == "bytes":
            return cls.bytes(separator)
        path = Path(name)
        if path.is_dir():
            path = path / "tokenizer.json"
            if not path.is_file():
                raise UserError(f"data.tokenizer: no tokenizer.json in {name}")
        if path.is_file():
            try:
                return cls.from_json(path.read_text(encoding="utf-8"), separator, source=str(path))
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"data.tokenizer: cannot read {path}: {_first_line(error)}") from error
        try:
            backend = hf.Tokenizer.from_pretrained(name)
        except Exception as error:  # the library raises plain Exceptions
            where = "not bytes, bpe:N, a file or a folder, and not loaded from Hugging Face"
            raise UserError(f"data.tokenizer: {name!r} is {where}: {_first_line(error)}") from error
        return cls(backend, separator)

    @classmethod
    def from_json(cls, text: str, separator: str | None = None, source: str = "the tokenizer") -> Tokenizer:
        """Build a tokenizer from the text of its ``tokenizer.json``.

        Args:
            text: Output of ``to_json``.
            separator: See the class.
            source: Name of the tokenizer, for errors.

        Raises:
            ValueError: If the text is damaged.
        """
        try:
            backend = checked_backend(text)
        except ValueError as error:
            raise UserError(f"data.tokenizer: {source} is damaged: {error}") from error
        return cls(backend, separator)

    def to_json(self) -> str:
        """Return the text of a ``tokenizer.json``."""
        return self._backend.to_str()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``tokenizer.json``.

        Args:
            path: File to write.
        """
        with atomic_write(path) as file:
            file.write(self.to_json().encode())

    def special_id(self, *names: str) -> int | None:
        """Return the id of the first of these special tokens in the vocabulary, else None.

        Args:
            names: Names such as ``[PAD]``. An ordinary BPE token with the same text is not special.
        """
        added = {token.content: place for place, token in self._backend.get_added_tokens_decoder().items()}
        known = added if isinstance(self._backend.model, models.BPE) else {**self._vocabulary, **added}
        return next((known[name] for name in names if name in known), None)

    @property
    def special_ids(self) -> set[int]:
        """Ids without text: the separator, the unknown token and the special tokens of the vocabulary."""
        added = self._backend.get_added_tokens_decoder()
        found = {self.special_id(name) for name in _USUAL_SPECIAL} | {self.separator_id}
        found.add(self._vocabulary.get(getattr(self._backend.model, "unk_token", None) or ""))
        return {place for place in found if place is not None} | {i for i, token in added.items() if token.special}

    def with_mask(self) -> Tokenizer:
        """Return this tokenizer if it has a mask token (``MASKS``), else a copy with one appended.

        Raises:
            ValueError: If the vocabulary's ids have gaps, so that a new id is not the last one.
        """
        if self.special_id(*MASKS) is not None:
            return self
        copy = Tokenizer.from_json(self.to_json(), self.separator)._backend
        copy.add_special_tokens([hf.AddedToken(MASKS[0], special=True, normalized=False)])
        if copy.token_to_id(MASKS[0]) != self.size:
            raise UserError(f"data.tokenizer: expected a vocabulary with {MASKS[0]}, or one whose ids have no gaps")
        return Tokenizer(copy, self.separator)

    def texts(self) -> list[str | None]:
        """Return the text of each token by id; None for an unused id.

        Bytes that are not UTF-8 are replaced by U+FFFD. In vocabularies without spaces (WordPiece, WordLevel), a token
        that begins a word is prefixed with one.
        """
        model, vocabulary = self._backend.model, self._vocabulary
        prefix = getattr(model, "continuing_subword_prefix", None)
        suffix = getattr(model, "end_of_word_suffix", None)
        byte_level = not prefix and _BYTE_CHARS[32] in vocabulary
        found: list[str | None] = [None] * self.size
        for token, place in vocabulary.items():
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
    def _vocabulary(self) -> dict[str, int]:
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def fingerprint(self) -> str:
        """Hash of the vocabulary, its rules and the separator."""
        return hashlib.sha256(f"{self.separator}\n{self.to_json()}".encode()).hexdigest()[:16]

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.from_json, (self.to_json(), self.separator)  # a pickled backend loses its settings

    def encode(self, text: str) -> list[int]:
        """Encode a text to token ids."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts to token ids, in parallel."""
        _allow_parallelism()
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_documents(self, documents: Iterable[str]) -> Iterator[tuple[np.ndarray, bool]]:
        """Encode many documents to token ids, in order and in bounded memory.

        A document of more than 262,144 characters is cut at a line break (see ``cut``).

        Args:
            documents: Texts to encode, read ahead by at most one batch.

        Yields:
            ``(ids (n,) uint32, ends)``: the ids of a piece, and whether it is the last one of its document.
        """
        texts: list[str] = []
        ends: list[bool] = []
        size = 0

        def flush() -> Iterator[tuple[np.ndarray, bool]]:
            for ids, end in zip(self.encode_batch(texts), ends, strict=True):
                yield np.array(ids, dtype=np.uint32), end
            texts.clear()
            ends.clear()

        for document in documents:
            pieces = list(cut(document))
            for number, piece in enumerate(pieces, start=1):
                texts.append(piece)
                ends.append(number == len(pieces))
                size += len(piece)
                if size >= _BATCH:
                    yield from flush()
                    size = 0
        if texts:
            yield from flush()

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
        """Decode the next token and return the completed text, often empty.

        Args:
            token: Token id.
        """
        text = self._stream.step(self._backend, int(token))
        self._held = [*self._held, int(token)] if text is None else []
        return text or ""

    def finish(self) -> str:
        """Return the text held back, with U+FFFD for incomplete characters, and reset the decoder."""
        held, self._held = self._held, []
        self._stream = decoders.DecodeStream(skip_special_tokens=False)
        return self._backend.decode(held, skip_special_tokens=False) if held else ""


def cut(text: str, size: int = _PIECE) -> Iterator[str]:
    """Cut a long text into pieces of at most ``size`` characters.

    A cut is after a single line break, else before a single space. Neither changes the tokens of bytes or a byte-level
    BPE; some other vocabularies (those that prepend a space to each text) see the start of a new text.

    Args:
        text: Text to cut.
        size: Maximum number of characters per piece, 3 or more.

    Example:
        >>> list(cut("one two\\nthree four", size=9))
        ['one two\\n', 'three', ' four']
    """
    start = 0
    while len(text) - start > size:
        stop = _lone(text, "\n", start, start + size - 1) + 1 or _lone(text, " ", start, start + size - 1)
        if stop <= start:
            stop = start + size
        yield text[start:stop]
        start = stop
    yield text[start:]


def _without_long_words(text: str) -> Iterator[str]:
    """Cut a text within long runs of spaces or non-spaces: BPE training is quadratic in a word's length."""
    start = 0
    for run in _LONG.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def _lone(text: str, space: str, start: int, last: int) -> int:
    """Find the last index in [start + 1, last] of the given space between two non-space characters; -1 if none."""
    place = text.rfind(space, start + 1, last + 1)
    while place > start and (text[place - 1].isspace() or text[place + 1].isspace()):
        place = text.rfind(space, start + 1, place)
    return place


def _byte_chars() -> dict[int, str]:
    """Return the printable character of each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


_BYTE_CHARS = _byte_chars()
_CHAR_BYTES = {char: byte for byte, char in _BYTE_CHARS.items()}
_FORKS_ARE_SERIAL = False


def _allow_parallelism() -> None:
    """Enable the library's threads in this process and disable them in forks, where they would hang."""
    global _FORKS_ARE_SERIAL
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # if set, the library does not warn
    if not _FORKS_ARE_SERIAL and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))
        _FORKS_ARE_SERIAL = True


def checked_backend(text: str) -> hf.Tokenizer:
    """Build the library's tokenizer from the text of a ``tokenizer.json`` and validate it with a round trip.

    Raises:
        ValueError: If it is damaged, for any exception of the library including Rust panics.
    """
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)  # Rust prints a panic to stderr and raises it as an exception too
        backend = hf.Tokenizer.from_str(text)
        backend.no_padding()  # the padded length is unbounded
        backend.decode(backend.encode("a 1\n", add_special_tokens=False).ids)
        return backend
    except BaseException as error:  # a Rust panic is not an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ValueError(_first_line(error)) from error
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

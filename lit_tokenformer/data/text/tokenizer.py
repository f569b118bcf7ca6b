"""One tokenizer class for all kinds: raw bytes, a byte-level BPE trained on the spot, a ``tokenizer.json``, a Hugging
Face name. The work is done by the ``tokenizers`` library.

Byte-level BPE is the one of GPT-2 (Radford et al. 2019, section 2.2); byte-pair encoding is arXiv:1508.07909.
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
"""The special token that ends a document, in our own vocabularies."""

USUAL_SEPARATORS = (SEPARATOR, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
"""Looked for, in this order, in the vocabularies of others."""

MASKS = ("[MASK]", "<mask>")
"""Special tokens that hide another one; the first is what ``with_mask`` adds."""

_USUAL_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<pad>", "<unk>", "<s>", "</s>", *MASKS)

BYTES_VOCAB_SIZE = 257  # the bytes and the separator
_PIECE = 1 << 18  # characters that are tokenised at once; a longer document is cut
_LONG = re.compile(r"\S{1000}(?=\S)|\s{1000}(?=\s)")  # where a word is cut that a vocabulary is trained on
_BATCH = 1 << 20  # characters in a batch for encode_batch: some 100 MB inside the library


def bpe_size(name: str) -> int | None:
    """The vocabulary size N of the name ``bpe:N``, None for every other name.

    Args:
        name: The setting ``data.tokenizer``.

    Raises:
        ValueError: If there is no number after ``bpe:``, or one below 257.

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
    """Refuses what can be seen to be wrong without opening anything.

    Args:
        name: The setting ``data.tokenizer``.

    Raises:
        ValueError: If it is a misspelling of ``bytes`` or ``bpe:N``, or the file or folder is not there.
    """
    if name == "bytes" or bpe_size(name) is not None or (name and Path(name).exists()):
        return
    if name.endswith(".json") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"data.tokenizer: no such file or folder: {name}")
    if not name or ("/" not in name and difflib.get_close_matches(name, ("bytes", "bpe:4096", "bpe:"), 1, cutoff=0.7)):
        raise unknown_name("data.tokenizer", name, ("bytes", "bpe:4096", "a tokenizer.json", "a Hugging Face name"))


class Tokenizer:
    """Text to token ids and back; never adds special tokens, and never reads them out of the text of a document.

    ``decode(encode(text)) == text`` for every text with ``bytes`` and ``bpe:N``; a foreign vocabulary may normalise.

    Args:
        backend: A tokenizer of the ``tokenizers`` library. Its templates, padding and truncation are not used.
        separator: The special token that ends a document. None: the first of ``USUAL_SEPARATORS`` it knows.

    Raises:
        ValueError: If the vocabulary does not hold the separator.

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
                looked = ", ".join(USUAL_SEPARATORS)
                raise UserError(
                    f"data.separator: the tokenizer has none of {looked}; name the one that ends a document"
                )
        elif separator not in vocabulary:
            raise UserError(f"data.separator: the tokenizer has no token {separator!r}")
        self._backend = backend
        self.separator = separator
        """The special token that ends a document."""
        self.separator_id: int = vocabulary[separator]
        """Its id."""
        self.size: int = max(vocabulary.values()) + 1
        """The largest id + 1."""

    @classmethod
    def bytes(cls, separator: str | None = None) -> Tokenizer:
        """The vocabulary of raw UTF-8 bytes: ids 0 to 255 are the bytes, 256 is the separator.

        Args:
            separator: Name of the separator. None: ``<|endoftext|>``.
        """
        backend = hf.Tokenizer(models.BPE(vocab={_BYTE_CHARS[byte]: byte for byte in range(256)}, merges=[]))
        # Without GPT-2's regular expression: there is nothing to merge, and it takes three quarters of the time.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        name = separator or SEPARATOR
        backend.add_special_tokens([hf.AddedToken(name, special=True, normalized=False)])
        return cls(backend, name)

    @classmethod
    def train_bpe(cls, documents: Iterable[str], vocab_size: int, separator: str | None = None) -> Tokenizer:
        """A byte-level BPE; the same documents give the same vocabulary.

        Args:
            documents: The texts to train on.
            vocab_size: Size of the vocabulary, 257 or more. Few texts may give a smaller one.
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
        """A tokenizer that exists already: ``bytes``, a ``tokenizer.json`` or its folder, or a Hugging Face name.

        Args:
            name: The setting ``data.tokenizer``, other than ``bpe:N``.
            separator: See the class.

        Raises:
            ValueError: If it is not there or damaged.
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
        except Exception as error:  # the library raises a plain Exception for much of this
            where = "not bytes, bpe:N, a file or a folder, and not loaded from Hugging Face"
            raise UserError(f"data.tokenizer: {name!r} is {where}: {_first_line(error)}") from error
        return cls(backend, separator)

    @classmethod
    def from_json(cls, text: str, separator: str | None = None, source: str = "the tokenizer") -> Tokenizer:
        """A tokenizer from the text of its ``tokenizer.json``.

        Args:
            text: What ``to_json`` gave.
            separator: See the class.
            source: What an error calls it.

        Raises:
            ValueError: If the text is damaged.
        """
        try:
            backend = checked_backend(text)
        except ValueError as error:
            raise UserError(f"data.tokenizer: {source} is damaged: {error}") from error
        return cls(backend, separator)

    def to_json(self) -> str:
        """The text of a ``tokenizer.json``."""
        return self._backend.to_str()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``tokenizer.json``.

        Args:
            path: The file.
        """
        with atomic_write(path) as file:
            file.write(self.to_json().encode())

    def special_id(self, *names: str) -> int | None:
        """The id of the first of these special tokens that the vocabulary has, None without.

        Args:
            names: Names such as ``[PAD]``. A BPE may have made a token of that text, which is not special.
        """
        added = {token.content: place for place, token in self._backend.get_added_tokens_decoder().items()}
        known = added if isinstance(self._backend.model, models.BPE) else {**self._vocabulary, **added}
        return next((known[name] for name in names if name in known), None)

    @property
    def special_ids(self) -> set[int]:
        """Ids that stand for no text: the separator, the unknown token, and all that the vocabulary calls special."""
        added = self._backend.get_added_tokens_decoder()
        found = {self.special_id(name) for name in _USUAL_SPECIAL} | {self.separator_id}
        found.add(self._vocabulary.get(getattr(self._backend.model, "unk_token", None) or ""))
        return {place for place in found if place is not None} | {i for i, token in added.items() if token.special}

    def with_mask(self) -> Tokenizer:
        """This tokenizer if it has a mask token (``MASKS``), else a copy with one more id for it, the last.

        Raises:
            ValueError: If the vocabulary's ids have gaps, so that no new one comes last.
        """
        if self.special_id(*MASKS) is not None:
            return self
        copy = Tokenizer.from_json(self.to_json(), self.separator)._backend
        copy.add_special_tokens([hf.AddedToken(MASKS[0], special=True, normalized=False)])
        if copy.token_to_id(MASKS[0]) != self.size:
            raise UserError(f"data.tokenizer: expected a vocabulary with {MASKS[0]}, or one whose ids have no gaps")
        return Tokenizer(copy, self.separator)

    def texts(self) -> list[str | None]:
        """The text that each id stands for, by id; None where there is no such token.

        Bytes that are no UTF-8 become U+FFFD. Where a vocabulary does not hold the spaces (WordPiece, WordLevel), the
        token that begins a word has one before it.
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
        """Whether the tokens that go on with a word have a mark of their own, such as ``##``."""
        return bool(getattr(self._backend.model, "continuing_subword_prefix", None))

    @property
    def _vocabulary(self) -> dict[str, int]:
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def fingerprint(self) -> str:
        """A hash of the vocabulary, its rules and the separator."""
        return hashlib.sha256(f"{self.separator}\n{self.to_json()}".encode()).hexdigest()[:16]

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.from_json, (self.to_json(), self.separator)  # a pickled backend forgets its settings

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of some texts, in parallel."""
        _allow_parallelism()
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_documents(self, documents: Iterable[str]) -> Iterator[tuple[np.ndarray, bool]]:
        """The token ids of many documents, in order and in bounded memory.

        A document of more than 262,144 characters is cut where a line ends (see ``cut``).

        Args:
            documents: The texts; read ahead by at most one batch.

        Yields:
            ``(ids (n,) uint32, ends)``: the ids of a piece, and whether its document ends with it.
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
        """The text of some token ids, special tokens by their names; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def stream(self) -> TextStreamer:
        """What turns tokens into text one by one, as they are produced."""
        return TextStreamer(self._backend)


class TextStreamer:
    """Text of tokens that come one by one; holds back what is not a whole character yet.

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
        """The text that is certain now that this token has come; often empty.

        Args:
            token: Its id.
        """
        text = self._stream.step(self._backend, int(token))
        self._held = [*self._held, int(token)] if text is None else []
        return text or ""

    def finish(self) -> str:
        """The text of what is still held back, with U+FFFD for incomplete characters; then begins anew."""
        held, self._held = self._held, []
        self._stream = decoders.DecodeStream(skip_special_tokens=False)
        return self._backend.decode(held, skip_special_tokens=False) if held else ""


def cut(text: str, size: int = _PIECE) -> Iterator[str]:
    """Cuts a long text into pieces of at most ``size`` characters.

    Cut is after a line break that stands alone, else before a space that stands alone. Neither changes what bytes or a
    byte-level BPE make of it; some foreign vocabularies (those that put a space before each text) see a new beginning.

    Args:
        text: The text.
        size: Characters in a piece, 3 or more.

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
    """A text cut wherever a run of spaces or of anything else gets long: training is quadratic in a word's length."""
    start = 0
    for run in _LONG.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def _lone(text: str, space: str, start: int, last: int) -> int:
    """The last place from start + 1 to last that holds the space between two characters that are none; -1: nowhere."""
    place = text.rfind(space, start + 1, last + 1)
    while place > start and (text[place - 1].isspace() or text[place + 1].isspace()):
        place = text.rfind(space, start + 1, place)
    return place


def _byte_chars() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


_BYTE_CHARS = _byte_chars()
_CHAR_BYTES = {char: byte for byte, char in _BYTE_CHARS.items()}
_FORKS_ARE_SERIAL = False


def _allow_parallelism() -> None:
    """Threads of the library in this process, none in its forks, where they would hang, and no warnings about it."""
    global _FORKS_ARE_SERIAL
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # once it is set, the library keeps quiet
    if not _FORKS_ARE_SERIAL and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))
        _FORKS_ARE_SERIAL = True


def checked_backend(text: str) -> hf.Tokenizer:
    """Build the library's tokenizer from the text of a ``tokenizer.json``, and try it.

    Raises:
        ValueError: If it is damaged: whatever the library raises, panics of Rust included.
    """
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)  # to which Rust writes what it raises as an exception too
        backend = hf.Tokenizer.from_str(text)
        backend.no_padding()  # which may be to any length
        backend.decode(backend.encode("a 1\n", add_special_tokens=False).ids)
        return backend
    except BaseException as error:  # a panic of Rust is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ValueError(_first_line(error)) from error
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

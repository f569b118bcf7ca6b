"""Text corpus of ``TextDataModule``: documents, splits, tokenizer and tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

from lightning.pytorch.utilities import rank_zero_info

from lit_tokenformer.data.text.files import hash_of
from lit_tokenformer.data.text.sources import SPLIT_NAMES, Documents, HubStream, Split, TextSettings, TextSplits
from lit_tokenformer.data.text.token_cache import FORMAT, TokenCache, built_once, disk_errors, open_or_build
from lit_tokenformer.data.text.tokenizer import BYTES_VOCAB_SIZE, Tokenizer, bpe_size
from lit_tokenformer.errors import UserError
from lit_tokenformer.registry import TEXT_SOURCES

_BPE_TRAINING_BYTES = 200_000_000
"""Maximum size of the training documents for BPE training, from the first document on."""

_BPE_STREAM_DOCUMENTS = 20_000
"""Maximum number of documents of a stream for BPE training."""

_PEEK = 100
"""Documents of a stream that are read ahead for its hash and its bytes per token."""


@dataclass(frozen=True)
class HashSplit:
    """Assignment of documents to splits by a hash of their text.

    Splits are stable when the corpus changes, equal documents share a split, and no seed changes the assignment.

    Example:
        >>> split = HashSplit(val_fraction=0.3, test_fraction=0.3)
        >>> [split(text) for text in ("Call me Ishmael.", "Mother died today.", "All children, except one, grow up.")]
        ['test', 'train', 'val']
        >>> HashSplit(val_fraction=0.3, test_fraction=0.0).cut("All children, except one, grow up.")
        [('train', 'All children, except '), ('val', 'one, grow up.')]
    """

    val_fraction: float
    test_fraction: float

    def __call__(self, text: str) -> Split:
        share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        if share < self.test_fraction:
            return "test"
        return "val" if share < self.test_fraction + self.val_fraction else "train"

    def cut(self, text: str) -> list[tuple[Split, str]]:
        """Cut a single document by position, after a line break or a space near it if there is one."""
        parts: list[tuple[Split, str]] = []
        shares: tuple[tuple[Split, float], ...] = (("val", self.val_fraction), ("test", self.test_fraction))
        for split, size in [(split, round(share * len(text))) for split, share in shares]:
            start = len(text) - size
            places = (text.rfind(mark, start - size // 2, start) + 1 for mark in "\n ")
            start = next(filter(None, places), start) if size else start
            parts, text = [(split, text[start:]), *parts], text[:start]
        return [(split, part) for split, part in (("train", text), *parts) if part]


@dataclass(eq=False, repr=False)
class TextCorpus:
    """Documents of a source with their splits, tokenizer and tokens, all created at first use."""

    dataset: str
    settings: TextSettings
    tokenizer_name: str
    separator: str | None

    @cached_property
    def splits(self) -> TextSplits:
        """Documents of the source."""
        return TEXT_SOURCES[self.dataset](self.settings)

    @cached_property
    def hash_split(self) -> HashSplit:
        """Split of the training documents into training and held-out ones."""
        return HashSplit(self.settings.val_fraction if self.splits.val is None else 0.0, self.settings.test_fraction)

    @cached_property
    def by_position(self) -> bool:
        """True if the training documents are a single one, which is cut into the splits."""
        train, cut = self.splits.train, self.hash_split != HashSplit(0.0, 0.0)
        return cut and not isinstance(train, HubStream) and len(list(islice(train, 2))) == 1

    @cached_property
    def own_splits(self) -> dict[Split, Documents | HubStream]:
        """Validation and test splits provided by the source."""
        own: dict[Split, Documents | HubStream] = {}
        if self.splits.val is not None:
            own["val"] = self.splits.val
        if self.splits.test is not None and self.settings.test_fraction == 0:
            own["test"] = self.splits.test
        return own

    @property
    def has_val(self) -> bool:
        """True if there is a validation split."""
        return "val" in self.own_splits or self.settings.val_fraction > 0

    def split_of(self, stage: str) -> Split:
        """Return the split that a stage (val or test) reads."""
        has_test = self.settings.test_fraction > 0 or "test" in self.own_splits
        return "test" if stage == "test" and has_test else "val"

    def documents(self) -> Iterator[tuple[Split, str]]:
        """Yield all documents of a stored corpus, each with its split."""
        yield from self._train_documents()
        for name, documents in self.own_splits.items():
            for text in documents:
                yield name, text

    def _train_documents(self) -> Iterator[tuple[Split, str]]:
        for text in self.splits.train:
            yield from self.hash_split.cut(text) if self.by_position else [(self.hash_split(text), text)]

    def stream(self, split: Split) -> HubStream:
        """Return the stream of a split's documents."""
        stream = self.own_splits.get(split, self.splits.train)
        assert isinstance(stream, HubStream)
        whole = split in self.own_splits or self.hash_split == HashSplit(0.0, 0.0)
        return stream if whole else replace(stream, keep=(self.hash_split, split))

    def head(self, split: Split, count: int = _PEEK) -> list[str]:
        """Return the first documents of a stream's split."""
        return list(islice(self.stream(split), count))

    @property
    def vocab_size(self) -> int:
        """Largest id + 1; N for ``bpe:N``."""
        size = BYTES_VOCAB_SIZE if self.tokenizer_name == "bytes" else bpe_size(self.tokenizer_name)
        return size or self.tokenizer.size

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer; ``bpe:N`` is trained and cached in ``cache_dir``."""
        size = bpe_size(self.tokenizer_name)
        if size is None:
            return Tokenizer.load(self.tokenizer_name, self.separator)
        cache_dir = self.settings.cache_dir
        path = cache_dir / "tokenizers" / f"{hash_of(self._source_key, size, self.separator)}.json"

        def kept() -> Tokenizer | None:
            try:
                return Tokenizer.from_json(path.read_text(encoding="utf-8"), self.separator)
            except (OSError, ValueError):
                return None

        def build() -> Tokenizer:
            tokenizer = Tokenizer.train_bpe(self._bpe_texts(), size, self.separator)
            with disk_errors(cache_dir):
                tokenizer.save(path)
            return tokenizer

        return built_once(cache_dir, path, kept, build)

    @cached_property
    def tokens(self) -> TokenCache:
        """Tokens of a stored corpus; raises a ``ValueError`` for an empty split."""
        sizes = [documents.size for documents in (self.splits.train, *self.own_splits.values())]  # type: ignore[union-attr]
        size = sum(filter(None, sizes)) if None not in sizes else None
        key = hash_of(self._source_key, self.tokenizer.fingerprint)
        tokens = open_or_build(self.settings.cache_dir, key, self.documents, self.tokenizer, size)
        counts = tokens.counts
        total = sum(count.documents for count in counts.values())
        if total == 0:
            raise UserError(f"data.{'files' if self.settings.files else 'dataset'}: all documents are empty")
        if total <= len(counts) and self.by_position:
            parts = ", ".join(f"{name} {count.bytes}" for name, count in counts.items() if count.bytes)
            rank_zero_info(f"Corpus of one document: split by position (bytes: {parts})")
        only_evaluated = self.splits.train.size == 0  # type: ignore[union-attr]
        self._check_splits(lambda split: counts[split].documents, f"{total} documents", skip_train=only_evaluated)
        return tokens

    def check_stream(self) -> None:
        """Raise a ``ValueError`` for an empty split of a stream."""
        self._check_splits(lambda split: len(self.head(split, 1)), "the stream")

    def _check_splits(self, size: Callable[[Split], int], of: str, skip_train: bool = False) -> None:
        for stage, setting in (("train", "val_fraction"), ("val", "val_fraction"), ("test", "test_fraction")):
            split: Split = "train" if stage == "train" else self.split_of(stage)
            if (split == "train" and skip_train) or (split == "val" and not self.has_val) or size(split):
                continue
            if split == "val" and self.settings.val_files:
                raise UserError("data.val_files: all documents are empty")
            name = SPLIT_NAMES[split]
            cure = "another fraction, more documents or data.val_files"
            raise UserError(f"data.{setting}: empty {name} split (got none of {of}); use {cure}")

    @cached_property
    def _source_key(self) -> str:
        """Hash of the documents and of the split settings."""
        splits, settings = self.splits, self.settings
        if isinstance(splits.train, HubStream):  # of its first documents: if others change, a vocabulary stays valid
            head = islice(splits.train, _PEEK)
            parts = [settings.hf_name or "", settings.hf_config or "", settings.hf_train_split, *head]
        else:
            parts = [getattr(part, "fingerprint", "") for part in (splits.train, splits.val, splits.test)]
        return hash_of(*parts, self.hash_split.val_fraction, self.hash_split.test_fraction, FORMAT)

    def _bpe_texts(self) -> Iterator[str]:
        left = _BPE_TRAINING_BYTES
        streamed = isinstance(self.splits.train, HubStream)
        for split, text in islice(self._train_documents(), _BPE_STREAM_DOCUMENTS if streamed else None):
            if left <= 0:
                return
            if split == "train":
                left -= len(text)
                yield text

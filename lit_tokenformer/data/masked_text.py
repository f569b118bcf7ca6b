"""Text for masked language models: some tokens of an example are hidden, and predicted from all the others.

BERT (arXiv:1810.04805, sec. 3.1) hides 15 % of the tokens: 80 % of these become [MASK], 10 % another token, 10 % stay.
RoBERTa (arXiv:1907.11692, sec. 4.1) draws them anew in each epoch; MosaicBERT (arXiv:2312.17482) hides 30 % in
training and 15 % in evaluation. Like Hugging Face's ``DataCollatorForLanguageModeling`` each token (or word) is hidden
with that probability; unlike it, at least one of an example is, and a random token is never a special one.

Every draw is a hash of (seed, epoch, pass, example, token), so batches are made whole, without a generator's state.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_tokenformer.data.text import TextDataModule
from lit_tokenformer.data.text_sources import EncodingErrors, Split
from lit_tokenformer.data.token_cache import PADDING, TokenFile, TrainBlocks
from lit_tokenformer.data.tokenizers import MASKS, Tokenizer, bpe_size
from lit_tokenformer.errors import unknown_name

MaskedBatch = tuple[Tensor, Tensor, Tensor]
"""``tokens (B, T)``, ``labels (B, T)`` and ``lengths (B,)``, all int64."""

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: the step of SplitMix64's counter
_PIECE = 1 << 22  # tokens in which sentences are looked for at once; a longer document is cut


class MaskedTextDataModule(TextDataModule):
    """Batches ``(tokens (B, T), labels (B, T), lengths (B,))``, all int64, for masked language modelling.

    ``labels`` are -100 but where a token is to be predicted; there they hold its id, and ``tokens`` the mask's, another
    or the same. The first ``lengths`` tokens of a row are real, the rest is padding ([PAD], else the separator).
    Special tokens and padding are never hidden.

    ``blocks`` are T tokens each of the stream ``SEP document SEP document SEP ... document SEP``. In evaluation the
    last one ends where the stream ends; what it shares with the one before is not predicted twice.

    ``sentences`` end after a token with a line break, and after one that ends in ``.``, ``!`` or ``?`` where white
    space comes next. As many in a row as fit are one example of up to T tokens, all of one document, between [CLS] (or
    <s>) and [SEP] where the vocabulary has them, else with the separator at its end; a longer sentence is cut.

    In evaluation an example's mask follows from the seed and its number alone, whatever the batch size, the workers and
    the processes; losses under different fractions cannot be compared. In training each example comes at most once in
    an epoch; what fills no batch of all processes is left out, other examples in each epoch. Splits, cache and resuming
    are those of ``TextDataModule``.

    Args:
        dataset: Where the documents come from: python_docs, python_stdlib, files or huggingface.
        files: Files, folders or patterns of .txt, .md, .jsonl and .parquet (dataset: files); with huggingface the
            ``data_files`` of ``load_dataset``.
        val_files: The same for validation. None: documents are held out by their hash.
        text_column: Name of the text in .jsonl, .parquet and Hugging Face data sets.
        encoding_errors: What happens with text that is not UTF-8: strict stops, replace puts U+FFFD in its place.
        tokenizer: bytes; bpe:N, trained on the training documents; a tokenizer.json or its folder; else the name of a
            Hugging Face model. One without [MASK] or <mask> gets an id for it after its last one.
        separator: Special token that ends a document. None: the first of the usual ones that the vocabulary knows.
        pad_vocab_to: The vocabulary's size is rounded up to a multiple of this; the ids above are never seen.
        examples: blocks (each of block_size tokens) or sentences (of different lengths).
        block_size: Tokens T of an example, at most, with [CLS] and [SEP].
        pad_to: Width of a batch of sentences: block (always T: one shape, so nothing is compiled twice) or longest
            (the batch's longest example).
        mask_fraction: Share of the tokens that is hidden in training, above 0; 0.3 in MosaicBERT.
        eval_mask_fraction: The same in validation and test.
        masking: dynamic draws the hidden tokens anew in each epoch; static hides the same ones of the same examples
            (blocks then have the same boundaries in each epoch).
        whole_words: Whether all tokens of a word are hidden together. A word begins with a token whose text begins with
            white space or punctuation, and after one that ends so; in vocabularies with ``##`` with every token without
            it. Each is still replaced for itself. The block's edges cut words.
        batch_size: Training examples in a batch, per process.
        eval_batch_size: Examples in a batch of validation and test, per process. None: as in training.
        num_workers: Loading processes for each training process. None: 0, since tokens are read from a memory map.
        pin_memory: Whether batches are put into page-locked memory. None: where there is CUDA.
        val_fraction: Share of the documents that is held out for validation where there is no split for it.
        test_fraction: Share of the documents that is held out for the test; 0 takes the Hugging Face data set's test
            split, else the validation documents.
        seed: Seed of order and masks, 0 or more. None: that of ``seed_everything``, else 0.
        cache_dir: Folder for tokens and trained vocabularies. None: lit_tokenformer in $XDG_CACHE_HOME or ~/.cache.
        hf_name: Hugging Face data set, or one of its readers such as text, json and parquet (dataset: huggingface).
        hf_config: Its configuration, where it has several.
        hf_train_split: Its split to train on.
        hf_val_split: Its split to validate on. None: validation, valid, val or dev, if there is one, else documents are
            held out by their hash.
        streaming: Not for masked text; the data set is stored.

    Raises:
        ValueError: If a setting is wrong (when created) or the text is not there (at the first use of a property or
            loader); the message is one line and names the setting.

    Example:
        >>> data = MaskedTextDataModule("python_docs", tokenizer="bytes")
        >>> data.vocab_size, data.context_length, data.mask_id
        (320, 128, 257)
    """

    def __init__(
        self,
        dataset: str = "python_docs",
        files: list[str] | None = None,
        val_files: list[str] | None = None,
        text_column: str = "text",
        encoding_errors: EncodingErrors = "strict",
        tokenizer: str = "bytes",
        separator: str | None = None,
        pad_vocab_to: int = 64,
        examples: Literal["blocks", "sentences"] = "blocks",
        block_size: int = 128,
        pad_to: Literal["block", "longest"] = "block",
        mask_fraction: float = 0.15,
        eval_mask_fraction: float = 0.15,
        masking: Literal["dynamic", "static"] = "dynamic",
        whole_words: bool = False,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        pin_memory: bool | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        seed: int | None = None,
        cache_dir: str | None = None,
        hf_name: str | None = None,
        hf_config: str | None = None,
        hf_train_split: str = "train",
        hf_val_split: str | None = None,
        streaming: bool = False,
    ) -> None:
        if streaming:
            raise ValueError("data.streaming: expected false for masked text, which is read from stored tokens")
        super().__init__(
            dataset=dataset,
            files=files,
            val_files=val_files,
            text_column=text_column,
            encoding_errors=encoding_errors,
            tokenizer=tokenizer,
            separator=separator,
            block_size=block_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
            cache_dir=cache_dir,
            hf_name=hf_name,
            hf_config=hf_config,
            hf_train_split=hf_train_split,
            hf_val_split=hf_val_split,
        )
        for name, value, choices in (
            ("examples", examples, ("blocks", "sentences")),
            ("pad_to", pad_to, ("block", "longest")),
            ("masking", masking, ("dynamic", "static")),
        ):
            if value not in choices:
                raise unknown_name(f"data.{name}", value, choices)
        for name, share in (("mask_fraction", mask_fraction), ("eval_mask_fraction", eval_mask_fraction)):
            if not 0 < share <= 1:
                raise ValueError(f"data.{name}: expected a share above 0 and at most 1, got {share}")
        if pad_vocab_to < 1:
            raise ValueError(f"data.pad_vocab_to: expected a whole number of 1 or more, got {pad_vocab_to}")
        self.pad_vocab_to = pad_vocab_to
        self.examples = examples
        self.pad_to = pad_to
        self.mask_fraction = mask_fraction
        self.eval_mask_fraction = eval_mask_fraction
        self.masking = masking
        self.whole_words = whole_words
        self._spans: dict[Split, SentenceSpans] = {}

    # --- What is known of the text -----------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, with a mask token; ``bpe:N`` is trained at first use and kept in ``cache_dir``."""
        return self._masked_tokenizer

    @property
    def mask_id(self) -> int:
        """Id of the token that hides another."""
        return self._ids.mask

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary V that a model needs: the largest id + 1, rounded up to a multiple of
        ``pad_vocab_to``; N + 1, rounded up, for ``bpe:N``, which needs no training to tell."""
        name = self.corpus.tokenizer_name
        own = name == "bytes" or bpe_size(name) is not None
        size = self.corpus.vocab_size + 1 if own else self.tokenizer.size
        return -(-size // self.pad_vocab_to) * self.pad_vocab_to

    def corpus_summary(self) -> str:
        """One line that says what was read, the number of training examples, and how much of a batch is padding."""
        summary = super().corpus_summary()
        lengths = self._train_blocks.lengths
        if len(lengths) == 0:
            return summary
        widths: Any = self.block_size
        if self.pad_to == "longest":  # of an epoch's batches, in some order
            batches = np.random.default_rng(0).permutation(lengths)[: len(lengths) // self.batch_size * self.batch_size]
            widths = batches.reshape(-1, self.batch_size).max(axis=1) if len(batches) else lengths.max()
        padding = max(0.0, 1 - lengths.mean() / np.mean(widths))
        return (
            f"{summary}; {len(lengths)} training examples of {lengths.mean():.1f} tokens, "
            f"{padding:.1%} of a batch is padding"
        )

    def predict_dataloader(self) -> Any:
        """Refused with a ``ValueError``: masked text is scored by ``validate``."""
        raise ValueError("predict: masked text is scored by `validate`")

    # --- Loaders -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _collate(batch: MaskedBatch) -> MaskedBatch:  # type: ignore[override]
        return batch  # made whole by MaskedExamples

    @cached_property
    def _masked_tokenizer(self) -> Tokenizer:
        return self.corpus.tokenizer.with_mask()

    @cached_property
    def _ids(self) -> MaskIds:
        return MaskIds(self.tokenizer)

    @cached_property
    def _train_blocks(self) -> MaskedExamples:  # type: ignore[override]
        return self._masked("train")

    def _eval_blocks(self, split: Split) -> MaskedExamples:
        return self._masked(split, training=False)

    def _masked(self, split: Split, training: bool = True) -> MaskedExamples:
        tokens, dynamic = self.corpus.tokens.files[split], training and self.masking == "dynamic"
        spans: BlockSpans | SentenceSpans
        if self.examples == "blocks":
            spans = BlockSpans(tokens, self.block_size, self._seed, training, shifted=dynamic)
        else:
            if split not in self._spans:
                self._spans[split] = SentenceSpans(tokens, self.tokenizer, self.block_size - self._ids.wraps)
            spans = self._spans[split]
        return MaskedExamples(
            tokens,
            spans,
            self._ids,
            self.mask_fraction if training else self.eval_mask_fraction,
            whole_words=self.whole_words,
            wrapped=self.examples == "sentences",
            width=self.block_size if self.pad_to == "block" or self.examples == "blocks" else None,
            seed=self._seed,
            dynamic=dynamic,
        )

    def _check_length(self, split: Split, replicas: int = 1) -> None:
        if self.examples == "blocks":
            return super()._check_length(split, replicas)
        name = {"train": "training", "val": "validation", "test": "test"}[split]
        if self.block_size <= self._ids.wraps:
            raise ValueError(
                f"data.block_size: expected {self._ids.wraps + 1} or more for sentences with the tokens around them, "
                f"got {self.block_size}"
            )
        examples = self._masked(split)
        if len(examples) == 0:
            raise ValueError(f"data.files: there are no {name} documents")
        if split == "train" and len(examples) // replicas < self.batch_size:
            raise ValueError(
                f"data.batch_size: expected at most {len(examples) // replicas} (the training examples of a process), "
                f"got {self.batch_size}; a smaller data.block_size gives more"
            )


class MaskIds:
    """What masking must know of a vocabulary; made once for it.

    Args:
        tokenizer: One with a mask token.

    Raises:
        ValueError: If the token that ends a document is the mask.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        texts = tokenizer.texts()
        mask = tokenizer.special_id(*MASKS)
        assert mask is not None
        if mask == tokenizer.separator_id:
            raise ValueError(f"data.separator: {tokenizer.separator!r} is the mask token and cannot end a document")
        pad, end = (tokenizer.special_id(*names) for names in (("[PAD]", "<pad>"), ("[SEP]",)))
        self.mask: int = mask
        self.start = tokenizer.special_id("[CLS]", "<s>")
        """What a sentence begins with, if anything."""
        self.end: int = tokenizer.separator_id if end is None else end
        """What a sentence ends with."""
        self.pad: int = tokenizer.separator_id if pad is None else pad
        self.wraps = 1 if self.start is None else 2
        """Special tokens around a sentence."""
        self.special = np.zeros(tokenizer.size, dtype=bool)
        """Ids that are never hidden, (V,)."""
        self.special[sorted(tokenizer.special_ids)] = True
        self.ordinary = np.array(
            [i for i, text in enumerate(texts) if text is not None and not self.special[i]], dtype=np.int64
        )
        """Ids that random tokens are drawn from."""
        self.begins, self.ends = (self.special | edge for edge in word_edges(tokenizer))
        """Ids that begin a word, and ids after which one begins, (V,) each."""


def word_edges(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens begin a word, and after which ones a word begins.

    Args:
        tokenizer: The vocabulary.

    Returns:
        Two tables (V,) bool, by token id. A token begins a word if it is true in the first, or the one before it is in
        the second.

    Example:
        >>> begins, ends = word_edges(Tokenizer.bytes())
        >>> [bool(begins[token] or ends[before]) for before, token in zip(b"-a cat.", b"a cat.", strict=False)]
        [True, True, True, False, False, True]
    """
    # Where tokens that go on with a word are marked, all others have a space before them: no rule for punctuation.
    is_edge = str.isspace if tokenizer.marks_continuation else _is_edge
    texts = [text or "" for text in tokenizer.texts()]
    begins = np.array([is_edge(text[:1]) for text in texts], dtype=bool)
    ends = np.array([is_edge(text[-1:]) for text in texts], dtype=bool)
    return begins, ends


def _is_edge(char: str) -> bool:
    """Whether a character is white space or, as in BERT's tokenizer, an ASCII sign or of Unicode's category P."""
    if char.isspace():
        return True
    return "!" <= char <= "~" and not char.isalnum() if char.isascii() else unicodedata.category(char).startswith("P")


class Spans(Protocol):
    """Which tokens of a stream an example holds."""

    lengths: np.ndarray
    """Tokens of each example, (N,) int64."""

    def __call__(self, index: np.ndarray, epoch: int, repeat: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The examples of some numbers; one behind the last gives an example in which nothing is predicted.

        Args:
            index: The numbers, (B,) int64.
            epoch: Zero-based epoch.
            repeat: The pass through it.

        Returns:
            ``(starts, lengths, first)``, (B,) each: the place of the first token, the number of tokens, and how many
            of them are not predicted because another example does.
        """


class BlockSpans:
    """Blocks of T tokens side by side. In training they can be shifted, and an incomplete last one is left out; in
    evaluation the last one ends with the stream.

    Args:
        tokens: The stream, T or more.
        block_size: T.
        seed: The run's seed, >= 0.
        training: Whether they are trained on.
        shifted: Whether boundaries differ between epochs, as in ``TrainBlocks``.
    """

    def __init__(self, tokens: TokenFile, block_size: int, seed: int, training: bool, shifted: bool) -> None:
        grid = TrainBlocks(tokens, block_size, seed)
        self._shift: Callable[[int, int], int] | None = grid.shift if shifted else None
        self._last = len(tokens) - block_size  # where a block can begin
        self.block_size = block_size
        self.lengths = np.full(len(grid) if training else -(-len(tokens) // block_size), block_size)

    def __call__(self, index: np.ndarray, epoch: int, repeat: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        wanted = index * self.block_size + (self._shift(epoch, repeat) if self._shift else 0)
        starts = np.minimum(wanted, self._last)
        return starts, np.full(len(index), self.block_size), wanted - starts


class SentenceSpans:
    """Sentences of one document, as many in a row as fit; see ``MaskedTextDataModule`` for where one ends.

    They are found at first use, once in each process: 0.02 s for a million tokens on one core.

    Args:
        tokens: The stream.
        tokenizer: Its vocabulary.
        size: Most tokens of an example.
    """

    def __init__(self, tokens: TokenFile, tokenizer: Tokenizer, size: int) -> None:
        texts = [text or "" for text in tokenizer.texts()]
        self._separator = tokenizer.separator_id
        self._size = size
        self._line = np.array(["\n" in text for text in texts])
        self._next_line = np.array([text[:1] in ("\n", "\r") for text in texts])
        self._stop = np.array([text.endswith((".", "!", "?")) for text in texts])
        self._space = np.array([text[:1].isspace() for text in texts])
        found = [np.zeros((2, 0), dtype=np.int64)]
        start = 0
        while start < len(tokens):
            ids = tokens.read(start, start + _PIECE)
            if start + len(ids) < len(tokens) and (ids == self._separator).any():
                ids = ids[: np.flatnonzero(ids == self._separator)[-1] + 1]
            found.append(start + self._examples(ids))
            start += len(ids)
        self.starts, stops = np.concatenate(found, axis=1)
        self.lengths = stops - self.starts

    def __call__(self, index: np.ndarray, epoch: int, repeat: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        nearest = np.minimum(index, len(self.lengths) - 1)
        return self.starts[nearest], self.lengths[nearest], np.where(index == nearest, 0, sys.maxsize)

    def _examples(self, ids: np.ndarray) -> np.ndarray:
        """Starts and stops (2, n) of the examples in a piece of the stream."""
        separator, before, after = ids == self._separator, ids[:-1], ids[1:]
        edge = np.ones(len(ids) + 1, dtype=bool)  # the places that a sentence or a separator begins or ends at
        edge[1:-1] = self._line[before] & ~self._next_line[after] | self._stop[before] & self._space[after]
        edge[:-1] |= separator
        edge[1:] |= separator
        edges = np.flatnonzero(edge)
        for i in np.flatnonzero(np.diff(edges) > self._size):  # a long sentence
            edge[edges[i] : edges[i + 1] : self._size] = True
        edges = np.flatnonzero(edge)
        document_ends = np.append(np.flatnonzero(separator), len(ids))
        last = document_ends[np.searchsorted(document_ends, edges)]
        following = np.searchsorted(edges, np.minimum(edges + self._size, last), side="right") - 1
        picked, place, jump = [], 0, following.tolist()
        while place < len(edges) - 1:
            if jump[place] == place:  # a separator
                place += 1
                continue
            picked.append(place)
            place = jump[place]
        return np.stack([edges[picked], edges[following[picked]]])


class MaskedExamples(Dataset):
    """Masked examples under keys ``(epoch, pass, index)`` or ``index``, a whole batch at once (``__getitems__``).

    Args:
        tokens: The stream of a split.
        spans: Which of its tokens an example holds.
        ids: What is to be known of the vocabulary.
        fraction: Share of the tokens that is hidden.
        whole_words: Whether all tokens of a word are hidden together.
        wrapped: Whether an example begins with ``ids.start``, if there is one, and ends with ``ids.end``.
        width: Tokens T of a row, with padding. None: as many as the longest of the batch has.
        seed: The run's seed, >= 0.
        dynamic: Whether masks differ between epochs.
    """

    def __init__(
        self,
        tokens: TokenFile,
        spans: Spans,
        ids: MaskIds,
        fraction: float,
        whole_words: bool,
        wrapped: bool,
        width: int | None,
        seed: int,
        dynamic: bool,
    ) -> None:
        self.tokens = tokens
        self.spans = spans
        self.ids = ids
        self.fraction = fraction
        self.whole_words = whole_words
        self.wrapped = wrapped
        self.width = width
        self.seed = seed
        self.dynamic = dynamic

    def __len__(self) -> int:
        return len(self.spans.lengths)

    @property
    def lengths(self) -> np.ndarray:
        """Real tokens of each example, (N,) int64."""
        return self.spans.lengths + (self.ids.wraps if self.wrapped else 0)

    def __getitem__(self, key: tuple[int, int, int] | int) -> MaskedBatch:
        tokens, labels, lengths = self.__getitems__([key])
        return tokens[0], labels[0], lengths[0]

    def __getitems__(self, keys: Sequence[tuple[int, int, int] | int]) -> MaskedBatch:
        """A batch; all keys are of one epoch and pass."""
        # A bare index comes from an evaluation, or from Lightning's own sampler (overfit_batches).
        full = [key if isinstance(key, tuple) else (0, 0, key) for key in keys]
        (epoch, repeat, _), index = full[0], np.array([key[2] for key in full])
        starts, counts, first = self.spans(index, epoch, repeat)
        ids, lead = self.ids, int(self.wrapped and self.ids.start is not None)
        lengths = counts + ids.wraps if self.wrapped else counts  # (B,)
        column = np.arange(self.width or lengths.max())
        places = starts[:, None] - lead + column  # (B, T)
        tokens = self.tokens.take(places.clip(0, len(self.tokens) - 1))
        if self.wrapped:
            tokens[column >= lengths[:, None]] = ids.pad
            tokens[np.arange(len(index)), lengths - 1] = ids.end
            if lead:
                tokens[:, 0] = ids.start
        maskable = ~ids.special[tokens] & (column >= first[:, None])
        if self.wrapped:  # where the separator stands in for padding and ends, it is special already
            maskable &= (column >= lead) & (column < lengths[:, None] - 1)
        entropy = (self.seed, epoch, repeat, 2) if self.dynamic else (self.seed, 0, 0, 3)
        run = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        rows = _mix(run + (index + 1).astype(np.uint64) * _GOLDEN)  # a counter's start for each example
        hidden, labels = mask(tokens, maskable, rows, ids, self.fraction, self.whole_words)
        return torch.from_numpy(hidden), torch.from_numpy(labels), torch.from_numpy(lengths)


def mask(
    tokens: np.ndarray, maskable: np.ndarray, rows: np.ndarray, ids: MaskIds, fraction: float, whole_words: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Hides each maskable token, or word, with a probability, at least one of a row (arXiv:1810.04805, section 3.1).

    Args:
        tokens: Token ids, (B, T) int64.
        maskable: Which of them may be hidden, (B, T) bool.
        rows: What the draws of a row follow from, (B,) uint64.
        ids: What is to be known of the vocabulary.
        fraction: The probability.
        whole_words: Whether all tokens of a word are hidden together.

    Returns:
        ``(tokens, labels)``, (B, T) int64 each: 80 % of the hidden tokens are the mask, 10 % are drawn from all tokens
        that are not special, 10 % stay; labels are the hidden ids, and -100 elsewhere.
    """
    column = np.arange(tokens.shape[1])
    draws = _uniform(rows[:, None], column)  # (B, T)
    if whole_words:
        begins = ids.begins[tokens]
        begins[:, 1:] |= ids.ends[tokens[:, :-1]]
        word = np.maximum.accumulate(np.where(begins, column, 0), axis=1)  # where each token's word begins
        draws = np.take_along_axis(draws, word, axis=1)
    draws = np.where(maskable, draws, 2.0)
    chosen = maskable & ((draws < fraction) | (draws == draws.min(axis=1, keepdims=True)))
    labels = np.where(chosen, tokens, PADDING)
    row, place = np.nonzero(chosen)
    how = _uniform(rows[row], place + (1 << 40))  # (number of hidden tokens,)
    which = (_uniform(rows[row], place + (1 << 41)) * len(ids.ordinary)).astype(np.int64)
    kept = tokens[row, place]
    hidden = tokens.copy()
    hidden[row, place] = np.where(how < 0.8, ids.mask, np.where(how < 0.9, ids.ordinary[which], kept))
    return hidden, labels


def _uniform(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Numbers from 0 to below 1, float64: the ``count``-th ones of the sequences at ``start`` (uint64)."""
    return (_mix(start + (count + 1).astype(np.uint64) * _GOLDEN) >> 11) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    """64 random bits of a counter, uint64: SplitMix64's output (Steele et al. 2014, doi:10.1145/2660193.2660195)."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)

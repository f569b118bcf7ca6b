"""Which tokens of a text are hidden from a masked language model: examples, words, and the draws.

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
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_tokenformer.data.text.token_cache import PADDING, TokenFile, TrainBlocks
from lit_tokenformer.data.text.tokenizer import MASKS, Tokenizer
from lit_tokenformer.errors import UserError

MaskedBatch = tuple[Tensor, Tensor, Tensor]
"""``tokens (B, T)``, ``labels (B, T)`` and ``lengths (B,)``, all int64."""

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: the step of SplitMix64's counter
_PIECE = 1 << 22  # tokens in which sentences are looked for at once; a longer document is cut


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
            raise UserError(f"data.separator: {tokenizer.separator!r} is the mask token and cannot end a document")
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

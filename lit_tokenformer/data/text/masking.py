"""Masks of a masked language model: examples, word boundaries and sampling.

BERT (arXiv:1810.04805, sec. 3.1) masks 15 % of the tokens: 80 % of these become [MASK], 10 % a random token, 10 % are
kept. RoBERTa (arXiv:1907.11692, sec. 4.1) samples new masks in each epoch; MosaicBERT (arXiv:2312.17482) masks 30 % in
training and 15 % in evaluation. As in Hugging Face's ``DataCollatorForLanguageModeling``, each token (or word) is
masked with that probability. Unlike there, at least one token of an example is masked, and a random token is never a
special one.

Random numbers are those of Philox (Salmon et al. 2011, doi:10.1145/2063384.2063405), a counter-based generator: the key
is a hash of (seed, epoch, pass) and the counter is the example, so a mask depends on nothing else.

Words are found by token id. The libraries' ``word_ids`` need the text, and encoding the text of a block again does not
give its tokens.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_tokenformer.data.text.token_cache import PADDING, TokenFile, TrainBlocks
from lit_tokenformer.data.text.tokenizer import Tokenizer
from lit_tokenformer.errors import UserError

MaskedBatch = tuple[Tensor, Tensor, Tensor]
"""``tokens (B, T)``, ``labels (B, T)`` and ``lengths (B,)``, all int64."""

_PIECE = 1 << 22  # tokens per chunk of sentence splitting; a longer document is cut


class MaskIds:
    """Token ids and tables for masking, of a tokenizer with a mask token, which ends no document."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        mask, pad, end = (tokenizer.special_id(role) for role in ("mask", "pad", "sep"))
        assert mask is not None
        if mask == tokenizer.separator_id:
            raise UserError(f"data.separator: {tokenizer.separator!r} is the mask token and cannot end a document")
        self.mask: int = mask
        self.start = tokenizer.special_id("cls")
        """Id at the beginning of a sentence, if any."""
        self.end: int = tokenizer.separator_id if end is None else end
        """Id at the end of a sentence."""
        self.pad: int = tokenizer.separator_id if pad is None else pad
        self.wraps = 1 if self.start is None else 2
        """Number of special tokens around a sentence."""
        self.special = np.zeros(tokenizer.size, dtype=bool)
        """Ids that are never masked, (V,)."""
        self.special[sorted(tokenizer.special_ids)] = True
        texts = tokenizer.texts()
        self.ordinary = np.flatnonzero(np.array([text is not None for text in texts]) & ~self.special)
        """Ids that random tokens are sampled from."""
        # With marked continuation tokens, all others have a space before them, and punctuation needs no rule.
        is_edge = str.isspace if tokenizer.marks_continuation else _is_edge
        self.begins, self.ends = (
            self.special | np.array([is_edge((text or "")[place]) for text in texts], dtype=bool)
            for place in (slice(0, 1), slice(-1, None))
        )
        """Ids that begin a word, and ids followed by the beginning of a word, (V,) each."""


def _is_edge(char: str) -> bool:
    """Return whether a character is white space or punctuation (ASCII symbols and Unicode category P, as in BERT)."""
    if char.isspace():
        return True
    return "!" <= char <= "~" and not char.isalnum() if char.isascii() else unicodedata.category(char).startswith("P")


class BlockSpans:
    """Examples that are adjacent blocks of T tokens.

    In training an incomplete last block is dropped; in evaluation the last block ends at the end of the stream, which
    has at least T tokens. ``shifted`` boundaries differ between epochs, as in ``TrainBlocks``.
    """

    def __init__(self, tokens: TokenFile, block_size: int, seed: int, training: bool, shifted: bool) -> None:
        grid = TrainBlocks(tokens, block_size, seed)
        self._shift = grid.shift if shifted else None
        self._last = len(tokens) - block_size  # where a block can begin
        self.block_size = block_size
        self.lengths = np.full(len(grid) if training else -(-len(tokens) // block_size), block_size)
        """Number of tokens of each example, (N,) int64."""

    def __call__(self, index: np.ndarray, epoch: int, repeat: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the spans of the examples at ``index`` (B,) int64; the index N is an example without predictions.

        Returns:
            ``(starts, lengths, first)``, (B,) each: position of the first token, number of tokens, and number of
            leading tokens that are excluded since another example predicts them.
        """
        wanted = index * self.block_size + (self._shift(epoch, repeat) if self._shift else 0)
        starts = np.minimum(wanted, self._last)
        return starts, np.full(len(index), self.block_size), wanted - starts


class SentenceSpans:
    """Examples of consecutive sentences of one document, packed up to a maximum length; see ``MaskedTextDataModule``.

    Sentence boundaries are computed once per process, in 0.02 s per million tokens on one core.
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
            ids = tokens[start : start + _PIECE]
            if start + len(ids) < len(tokens) and (ids == self._separator).any():
                ids = ids[: np.flatnonzero(ids == self._separator)[-1] + 1]
            found.append(start + self._examples(ids))
            start += len(ids)
        self.starts, stops = np.concatenate(found, axis=1)
        self.lengths = stops - self.starts

    def __call__(self, index: np.ndarray, epoch: int, repeat: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the spans of some examples; see ``BlockSpans``."""
        nearest = np.minimum(index, len(self.lengths) - 1)
        return self.starts[nearest], self.lengths[nearest], np.where(index == nearest, 0, sys.maxsize)

    def _examples(self, ids: np.ndarray) -> np.ndarray:
        """Compute starts and stops (2, n) of the examples in a chunk of the stream."""
        separator, before, after = ids == self._separator, ids[:-1], ids[1:]
        edge = np.ones(len(ids) + 1, dtype=bool)  # the boundaries of sentences and separators
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


@dataclass(eq=False, repr=False)
class MaskedExamples(Dataset):
    """Masked examples under keys ``(epoch, pass, index)`` or ``index``, batched in ``__getitems__``."""

    tokens: TokenFile
    spans: BlockSpans | SentenceSpans
    ids: MaskIds
    fraction: float
    """Fraction of tokens to mask."""
    whole_words: bool
    wrapped: bool
    """Whether to begin an example with ``ids.start``, if defined, and to end it with ``ids.end``."""
    width: int | None
    """Row length T with padding. None: that of the longest example in the batch."""
    seed: int
    dynamic: bool
    """Whether masks differ between epochs."""

    def __len__(self) -> int:
        return len(self.spans.lengths)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example without padding, (N,) int64."""
        return self.spans.lengths + (self.ids.wraps if self.wrapped else 0)

    def __getitem__(self, key: tuple[int, int, int] | int) -> MaskedBatch:
        tokens, labels, lengths = self.__getitems__([key])
        return tokens[0], labels[0], lengths[0]

    def __getitems__(self, keys: Sequence[tuple[int, int, int] | int]) -> MaskedBatch:
        """Return a batch; all keys are of one epoch and pass."""
        # A bare index comes from evaluation or from Lightning's own sampler (overfit_batches).
        full = [key if isinstance(key, tuple) else (0, 0, key) for key in keys]
        (epoch, repeat, _), index = full[0], np.array([key[2] for key in full])
        starts, counts, first = self.spans(index, epoch, repeat)
        ids, lead = self.ids, int(self.wrapped and self.ids.start is not None)
        lengths = counts + ids.wraps if self.wrapped else counts  # (B,)
        column = np.arange(self.width or lengths.max())
        places = starts[:, None] - lead + column  # (B, T)
        tokens = self.tokens[places.clip(0, len(self.tokens) - 1)]
        if self.wrapped:
            tokens[column >= lengths[:, None]] = ids.pad
            tokens[np.arange(len(index)), lengths - 1] = ids.end
            if lead:
                tokens[:, 0] = ids.start
        maskable = ~ids.special[tokens] & (column >= first[:, None])
        if self.wrapped:  # a separator used as padding or end is special already
            maskable &= (column >= lead) & (column < lengths[:, None] - 1)
        entropy = (self.seed, epoch, repeat, 2) if self.dynamic else (self.seed, 0, 0, 3)
        hidden, labels = mask(
            tokens, maskable, uniform(entropy, index, len(column)), ids, self.fraction, self.whole_words
        )
        return torch.from_numpy(hidden), torch.from_numpy(labels), torch.from_numpy(lengths)


def uniform(entropy: Sequence[int], index: np.ndarray, width: int) -> np.ndarray:
    """Draw two uniform numbers in [0, 1) per token of each example, independent of the other examples and the width.

    The generator's key is a hash of ``entropy``, and a word of its counter is the example index (B,) int64.

    Returns:
        Draws, (B, T, 2) float64.
    """
    philox = np.random.Philox(key=np.random.SeedSequence(entropy).generate_state(2, np.uint64))
    state, words = philox.state, np.empty((len(index), width, 2), dtype=np.uint64)
    for row, example in zip(words, index, strict=True):
        state["state"]["counter"][1] = example
        philox.state = state
        row[:] = philox.random_raw((width, 2))  # NumPy keeps the raw words in all versions
    return (words >> 11) * 2.0**-53


def mask(
    tokens: np.ndarray, maskable: np.ndarray, draws: np.ndarray, ids: MaskIds, fraction: float, whole_words: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Mask each maskable token or word with a probability, at least one per row (arXiv:1810.04805, section 3.1).

    Args:
        tokens: Token ids, (B, T) int64.
        maskable: Mask of candidate tokens, (B, T) bool.
        draws: Uniform numbers in [0, 1), (B, T, 2): the first selects a token, the second replaces it.
        ids: Token ids and tables of the vocabulary.
        fraction: Masking probability.
        whole_words: Whether to mask all tokens of a word together.

    Returns:
        ``(tokens, labels)``, (B, T) int64 each. 80 % of the selected tokens are replaced by the mask, 10 % by a random
        non-special token, 10 % are kept; labels are their original ids, and -100 elsewhere.
    """
    select, replace = draws[..., 0], draws[..., 1]
    if whole_words:
        begins = ids.begins[tokens]
        begins[:, 1:] |= ids.ends[tokens[:, :-1]]
        word = np.maximum.accumulate(np.where(begins, np.arange(tokens.shape[1]), 0), axis=1)  # start of each word
        select = np.take_along_axis(select, word, axis=1)
    select = np.where(maskable, select, 2.0)
    chosen = maskable & ((select < fraction) | (select == select.min(axis=1, keepdims=True)))
    how, kept, count = replace[chosen], tokens[chosen], len(ids.ordinary)  # (number of selected tokens,)
    which = ((how - 0.8) * 10 * count).astype(np.int64).clip(0, count - 1)
    hidden = tokens.copy()
    hidden[chosen] = np.where(how < 0.8, ids.mask, np.where(how < 0.9, ids.ordinary[which], kept))
    return hidden, np.where(chosen, tokens, PADDING)

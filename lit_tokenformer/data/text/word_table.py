"""Byte-level BPE by a table of words: token ids of a text from those of its words, most of which repeat.

Byte-level BPE (GPT-2, Radford et al. 2019, section 2.2) splits a text into words by a regular expression and merges
bytes within each word. The ``tokenizers`` library spends most of its time on that expression. Here Python's ``re``
splits ASCII text, and the library encodes each distinct word once. Words of other characters, whose classes depend on
the version of Unicode, are split by the library as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import tokenizers as hf

_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
"""GPT-2's expression for text in ASCII."""

_FOREIGN = re.compile(
    r"(?:\A|(?<=[^\s\x80-\U0010ffff])(?=\s))(?:\s*(?:(?!\s)[\0-\x7f])*[^\0-\x7f]\S*(?:(?<=[^\0-\x7f])\s+\S*)*)+",
    re.ASCII,
)
"""Spaces and words with other characters, up to a word that ends in ASCII: no word of GPT-2's crosses either end.

A word never continues from a visible character to a space, but another character may itself be a space.
"""

_MOST_WORDS, _MOST_CHARACTERS = 1 << 18, 1 << 24
"""Size of a table, about 60 MB; a larger one is cleared."""


class WordTable:
    """Encoder of many texts, with the same token ids as ``encode_batch``.

    Args:
        encode_batch: Encodes texts to token ids with the tokenizer's library.
    """

    def __init__(self, encode_batch: Callable[[Sequence[str]], list[list[int]]]) -> None:
        self._encode_batch = encode_batch
        self._table: dict[str, tuple[int, ...]] = {}
        self._characters = 0

    @staticmethod
    def fits(backend: hf.Tokenizer) -> bool:
        """Check that a tokenizer splits texts by GPT-2's expression and encodes each word on its own."""
        rules = json.loads(backend.to_str())
        split, model, added = rules["pre_tokenizer"] or {}, rules["model"], rules["added_tokens"]
        plain = split.get("type") == "ByteLevel" and split.get("use_regex", True) and not split["add_prefix_space"]
        whole = model.get("type") == "BPE" and not model.get("dropout") and rules["normalizer"] is None
        return bool(plain and whole and backend.encode_special_tokens and all(one["special"] for one in added))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts to token ids, (n,) uint32 each."""
        words = [_split(text) for text in texts]
        if len(self._table) > _MOST_WORDS or self._characters > _MOST_CHARACTERS:
            self._table, self._characters = {}, 0
        table = self._table  # of this call, even if another thread starts a new one
        new = list(set(chain.from_iterable(words)) - table.keys())
        if new:
            table.update(zip(new, map(tuple, self._encode_batch(new)), strict=True))
            self._characters += sum(map(len, new))
        find = table.__getitem__
        return [np.fromiter(chain.from_iterable(map(find, text)), np.uint32) for text in words]


def _split(text: str) -> list[str]:
    """Split a text into words, and parts that the library has to split."""
    if text.isascii():
        return _WORDS.findall(text)
    found: list[str] = []
    end = 0
    for part in _FOREIGN.finditer(text):
        found += _WORDS.findall(text, end, part.start())
        found.append(part.group())
        end = part.end()
    return found + _WORDS.findall(text, end)

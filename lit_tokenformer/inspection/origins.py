"""Origin of parameter tokens: the growth that added each one, its original, and its movement since a checkpoint.

Growth events in a checkpoint record the row map of every parameter (see
:class:`~callbacks.ParameterGrowthCallback`), so nothing else has to be saved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_tokenformer.growth import growth_method
from lit_tokenformer.growth.rows import KEPT

Event = Mapping[str, Any]
"""A growth as :class:`~callbacks.ParameterGrowthCallback` records it."""

_BLOCK = re.compile(r"(.*?\bblocks\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Origins:
    """Origin of the tokens of one layer, (N,) int64 each.

    Args:
        growth: Number of the growth that added each token, from 1; 0 for the initial ones, -1 where unknown.
        original: Index of the token that each copy of a split was copied from; -1 for other tokens.
        source: Index of each token, or of the one it was copied from, before the first of the events; -1 for appended
            tokens.
        layer: Name of the layer before the first of the events; it differs after blocks were inserted.
    """

    growth: Tensor
    original: Tensor
    source: Tensor
    layer: str


def trace(events: Sequence[Event], layer: str, count: int, pattern_length: int = 1, kind: str | None = None) -> Origins:
    """Trace the tokens of a layer back through growths.

    Args:
        events: The growths, the oldest first.
        layer: Name of the layer.
        count: Number of its tokens, N.
        pattern_length: Length of the model's layer pattern, by which blocks are inserted.
        kind: Kind of its tokens, for events of earlier releases without a row map.

    Example:
        >>> split = {"rows": {"mlp.key_tokens": [2, 4, 2, 0, 1]}, "before": {}, "after": {}}
        >>> found = trace([split], "mlp", 4)
        >>> found.growth.tolist(), found.original.tolist(), found.source.tolist()
        ([0, 1, 0, 1], [-1, 0, -1, 2], [0, 0, 1, 1])
    """
    index = torch.arange(count)
    growth, original = torch.zeros_like(index), torch.full_like(index, -1)
    old = torch.ones(count, dtype=torch.bool)  # not added by a later growth
    for number, event in reversed([*enumerate(events, start=1)]):
        key = f"{layer}.key_tokens".lstrip(".")
        kept, row = event.get(KEPT, {}).get(key), _row_map(event, key, kind)
        if kept is not None and int(index.max()) < len(kept):
            index = torch.where(index < 0, -1, torch.tensor(kept)[index.clamp_min(0)])
        if row is not None:
            before, after, copies = row[:3]
            if int(index.max()) >= after:  # changed by a tool that keeps no record
                growth[old] = -1
                return Origins(growth, original, torch.full_like(index, -1), layer)
            copied = index < copies * before
            new = old & ((index % copies != 0) | ~copied)
            places = torch.full((after,), -1)
            places[index[old & ~new]] = (old & ~new).nonzero()[:, 0]
            is_copy = new & copied
            original[is_copy] = places[index[is_copy] // copies * copies]
            growth[new] = number
            old = old & ~new
            index = torch.where((index < 0) | ~copied, -1, index // copies)
        source, inserted = _before_insertion(event, layer, pattern_length)
        if inserted:  # a copy of its block with zero values
            growth[old], old = number, torch.zeros_like(old)
        layer = source
    return Origins(growth, original, index, layer)


def movement(now: Tensor, then: Tensor | None, source: Tensor) -> Tensor:
    """Compute the distance of keys from earlier ones, relative to the norm of those, (N,); NaN where unknown.

    Args:
        now: Keys, (N, D).
        then: Earlier keys, (N0, D); ``None`` if there are none.
        source: Index of the earlier key of each key, (N,) int64; -1 for none.
    """
    if then is None or then.shape[1:] != now.shape[1:] or (len(source) and int(source.max()) >= len(then)):
        return torch.full((len(now),), torch.nan)
    before = then[source.clamp_min(0)].float()
    distance = (now.float() - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-12)
    return torch.where(source < 0, torch.nan, distance)


def _row_map(event: Event, key: str, kind: str | None) -> Sequence[int] | None:
    """Return the row map of a parameter: rows before and after the growth, and copies of each."""
    if "rows" in event or kind is None:
        return event.get("rows", {}).get(key)
    before, after = event["before"].get(kind, 0), event["after"].get(kind, 0)
    if not 0 < before < after:
        return None
    return before, after, growth_method(event["method"]).rows(before, after).copies


def _before_insertion(event: Event, layer: str, unit: int) -> tuple[str, bool]:
    """Return the name of a layer before the blocks of an event were inserted, and whether its block was inserted."""
    before, after = event["before"].get("depth"), event["after"].get("depth")
    found = _BLOCK.fullmatch(layer)
    if before is None or after is None or before == after or found is None:
        return layer, False

    def origin(number: int) -> int:  # as Tokenformer.origins
        return number // unit * (before // unit) // (after // unit) * unit + number % unit

    number = int(found[2])
    source = origin(number)
    return f"{found[1]}{source}{found[3]}", any(origin(one) == source for one in range(number))

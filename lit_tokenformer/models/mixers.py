"""Interaction between data tokens: softmax attention."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.models.positions import Rotary, turn
from lit_tokenformer.models.projections import make_projection


class Context(NamedTuple):
    """What all blocks need to know of a sequence.

    Args:
        rotary: Angles of the positions, where there are rotary ones.
        mask: Who attends to whom, (B, 1, T, S) bool, or (1, 1, T, S); ``None`` for the rule in ``causal``.
        causal: Whether a data token attends only to those before it and to itself, where there is no mask.
        start: Data tokens of the sequence that were computed before, S - T.
    """

    rotary: Rotary | None = None
    mask: Tensor | None = None
    causal: bool = False
    start: int = 0


class KeyValueCache:
    """Keys and values of the data tokens that were computed before, in memory that is taken once.

    Args:
        length: Data tokens that fit.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def append(self, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Puts keys and values (B, H, T, d) at ``start``; returns all up to there, (B, H, start + T, d)."""
        if self.key is None or self.value is None:
            shape = (*key.shape[:2], self.length, key.shape[3])
            self.key, self.value = key.new_empty(shape), value.new_empty(shape)
        end = start + key.shape[2]
        self.key[:, :, start:end] = key
        self.value[:, :, start:end] = value
        return self.key[:, :, :end], self.value[:, :, :end]


class Attention(nn.Module):
    """Multi-head softmax attention with separate query, key, value and output projections.

    Source: arXiv 2410.23168, eq. 6-8; the scale is 1/sqrt(d).

    Args:
        config: Sizes and the kind of projection.
    """

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.query = make_projection(config.projection, config, "qkv", dim, dim)
        self.key = make_projection(config.projection, config, "qkv", dim, dim)
        self.value = make_projection(config.projection, config, "qkv", dim, dim)
        self.proj = make_projection(config.projection, config, "proj", dim, dim)

    def forward(self, x: Tensor, context: Context = Context(), cache: KeyValueCache | None = None) -> Tensor:  # noqa: B008
        """(B, T, D) -> (B, T, D); with a cache, data tokens attend to those in it too."""
        split = (*x.shape[:2], self.num_heads, -1)
        query = self.query(x).view(split).transpose(1, 2)  # (B, H, T, d)
        key = self.key(x).view(split).transpose(1, 2)  # (B, H, T, d)
        value = self.value(x).view(split).transpose(1, 2)  # (B, H, T, d)
        if context.rotary is not None:
            query, key = turn(query, context.rotary), turn(key, context.rotary)
        if cache is not None:
            key, value = cache.append(key, value, context.start)  # (B, H, S, d)
        causal = context.causal and context.mask is None
        mixed = F.scaled_dot_product_attention(query, key, value, context.mask, is_causal=causal)  # (B, H, T, d)
        return self.proj(mixed.transpose(1, 2).reshape(x.shape))  # (B, T, D)

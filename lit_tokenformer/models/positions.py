"""Position encodings: learned, rotary and ALiBi.

Sources: rotary positions, arXiv 2104.09864, section 3.2, in GPT-NeoX's form as in the published TokenFormer (only the
first dimensions of each head are rotated, paired by halves); ALiBi, arXiv 2108.12409, section 3, and its symmetric form
for bidirectional models, arXiv 2312.17482, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.registry import POSITIONS

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary angles of r dimensions, (T, r / 2) or (B, 1, T, r / 2) each."""


class Positions(NamedTuple):
    """Position encoding of a model.

    Args:
        learned: Whether the stem adds a trainable vector to each data token.
        limited: Whether the sequence length is limited.
        rotary: Rotary angles of queries and keys, ``(config, positions, dtype) -> Rotary``.
        bias: Additive bias of the attention scores, ``(num_heads, start, length, like) -> (1, H, T, S)``.
    """

    learned: bool = False
    limited: bool = False
    rotary: Callable[[TokenformerConfig, Tensor, torch.dtype], Rotary] | None = None
    bias: Callable[[int, int, int, Tensor], Tensor] | None = None


def token_positions(start: int, length: int, padding: Tensor | None, device: torch.device) -> Tensor:
    """Compute the positions of data tokens, (T,) int64, or (B, T) with left padding.

    Args:
        start: Data tokens of the sequence already in the decoding state.
        length: Number of data tokens, T.
        padding: Left padding of each sequence in data tokens, (B,) int64.
        device: Device of the result.
    """
    positions = torch.arange(start, start + length, device=device)
    return positions if padding is None else (positions - padding[:, None]).clamp_min(0)


def alibi_slopes(num_heads: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Compute the ALiBi slope of each head, (H,).

    Example:
        >>> alibi_slopes(4, torch.float32).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    whole = 2 ** math.floor(math.log2(num_heads))
    head = torch.arange(1, whole + 1, dtype=dtype, device=device)
    return torch.cat([torch.exp2(-8 * head / whole), torch.exp2(-4 * (2 * head - 1) / whole)])[:num_heads]


def alibi_bias(num_heads: int, start: int, length: int, like: Tensor, heads: Tensor | None = None) -> Tensor:
    """Compute the ALiBi bias of the attention scores, -slope * distance, (1, H, T, S) with S = start + T.

    Args:
        num_heads: Number of heads, H.
        start: Data tokens of the sequence already in the decoding state.
        length: Number of data tokens, T.
        like: Reference tensor; the result is on its device, in its dtype or float32, whichever is wider.
        heads: Slope index of each head, (H',) int64; ``None`` for one slope each.
    """
    slopes = alibi_slopes(num_heads, torch.promote_types(like.dtype, torch.float32), like.device)
    slopes = slopes if heads is None else slopes[heads]
    rows = torch.arange(start, start + length, device=like.device)
    distance = (rows[:, None] - torch.arange(start + length, device=like.device)).abs()  # (T, S)
    return -(slopes[:, None, None] * distance)[None]


def rotary_angles(config: TokenformerConfig, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """Compute rotary angles of positions (T,) or (B, T), in ``dtype`` or float32, whichever is wider."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, config.rotary_dim, 2, device=positions.device, dtype=wide) / config.rotary_dim
    angles = positions[..., None].to(wide) * config.rotary_base**-exponents  # (..., T, r / 2)
    angles = angles if positions.ndim == 1 else angles[:, None]
    return angles.cos(), angles.sin()


def turn(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the first r dimensions of each head, (B, H, T, d) -> (B, H, T, d)."""
    cos, sin = rotary
    half = cos.shape[-1]
    left, right, kept = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = left * cos - right * sin, right * cos + left * sin
    return torch.cat([turned[0].to(x.dtype), turned[1].to(x.dtype), kept], dim=-1)


POSITIONS.register("learned")(Positions(learned=True, limited=True))
POSITIONS.register("rotary")(Positions(limited=True, rotary=rotary_angles))
POSITIONS.register("alibi")(Positions(bias=alibi_bias))
POSITIONS.register("none")(Positions())

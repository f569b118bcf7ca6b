"""Positions of data tokens, and those that act inside attention.

Sources: rotary positions, arXiv 2104.09864, section 3.2, in GPT-NeoX's form (the two halves of the turned dimensions
are the pairs, and only the first dimensions of each head are turned), which the published TokenFormer uses; ALiBi,
arXiv 2108.12409, section 3, and its symmetric form for models that look both ways, arXiv 2312.17482, section 3.1.
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
"""Cosines and sines, each (T, r / 2) or (B, 1, T, r / 2), of the angles by which r dimensions of a head are turned."""


class Positions(NamedTuple):
    """Where the order of the data tokens enters a model.

    Args:
        learned: Whether the stem adds a trainable vector to each data token.
        limited: Whether no sequence can be longer than the model's length.
        rotary: Angles of queries and keys, ``(config, positions, dtype) -> Rotary``.
        bias: Sum with the scores, ``(num_heads, start, length, like) -> (1, H, T, S)``.
    """

    learned: bool = False
    limited: bool = False
    rotary: Callable[[TokenformerConfig, Tensor, torch.dtype], Rotary] | None = None
    bias: Callable[[int, int, int, Tensor], Tensor] | None = None


def token_positions(start: int, length: int, padding: Tensor | None, device: torch.device) -> Tensor:
    """Places of data tokens in their sequence, (T,) int64, or (B, T) where there is padding at the left.

    Args:
        start: Data tokens that came before.
        length: Data tokens, T.
        padding: Data tokens at the left of each sequence that are none of it, (B,) int64.
        device: Where they are put.
    """
    positions = torch.arange(start, start + length, device=device)
    return positions if padding is None else (positions - padding[:, None]).clamp_min(0)


def alibi_slopes(num_heads: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """How fast the scores of each head fall with the distance, (H,).

    Example:
        >>> alibi_slopes(4, torch.float32).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    whole = 2 ** math.floor(math.log2(num_heads))
    head = torch.arange(1, whole + 1, dtype=dtype, device=device)
    return torch.cat([torch.exp2(-8 * head / whole), torch.exp2(-4 * (2 * head - 1) / whole)])[:num_heads]


def alibi_bias(num_heads: int, start: int, length: int, like: Tensor, heads: Tensor | None = None) -> Tensor:
    """What is added to the scores of T data tokens with all S = start + T, (1, H, T, S): minus slope times distance.

    Args:
        num_heads: H.
        start: Data tokens that came before.
        length: Data tokens, T.
        like: What it is on the device of, in its precision or in float32, whichever is wider.
        heads: Which of ``num_heads`` slopes each head has, (H',) int64; ``None`` for one each.
    """
    slopes = alibi_slopes(num_heads, torch.promote_types(like.dtype, torch.float32), like.device)
    slopes = slopes if heads is None else slopes[heads]
    rows = torch.arange(start, start + length, device=like.device)
    distance = (rows[:, None] - torch.arange(start + length, device=like.device)).abs()  # (T, S)
    return -(slopes[:, None, None] * distance)[None]


def rotary_angles(config: TokenformerConfig, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """Cosines and sines for positions (T,) or (B, T), in ``dtype`` or float32, whichever is wider."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, config.rotary_dim, 2, device=positions.device, dtype=wide) / config.rotary_dim
    angles = positions[..., None].to(wide) * config.rotary_base**-exponents  # (..., T, r / 2)
    angles = angles if positions.ndim == 1 else angles[:, None]
    return angles.cos(), angles.sin()


def turn(x: Tensor, rotary: Rotary) -> Tensor:
    """Turns the first r dimensions of each head in ``x``, (B, H, T, d) -> (B, H, T, d)."""
    cos, sin = rotary
    half = cos.shape[-1]
    left, right, kept = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = left * cos - right * sin, right * cos + left * sin
    return torch.cat([turned[0].to(x.dtype), turned[1].to(x.dtype), kept], dim=-1)


POSITIONS.register("learned")(Positions(learned=True, limited=True))
POSITIONS.register("rotary")(Positions(limited=True, rotary=rotary_angles))
POSITIONS.register("alibi")(Positions(bias=alibi_bias))
POSITIONS.register("none")(Positions())

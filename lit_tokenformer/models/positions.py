"""Positions of data tokens that act inside attention.

Source: Su et al., "RoFormer", arXiv 2104.09864, section 3.2; in GPT-NeoX's form (the two halves of the turned
dimensions are the pairs, and only the first dimensions of each head are turned), which the published TokenFormer uses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_tokenformer.models.config import TokenformerConfig

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, each (T, r) or (B, 1, T, r), of the angles by which r dimensions of a head are turned."""


def rotary_angles(config: TokenformerConfig, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """Cosines and sines for positions (T,) or (B, T), in ``dtype`` or float32, whichever is wider."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, config.rotary_dim, 2, device=positions.device, dtype=wide) / config.rotary_dim
    angles = positions[..., None].to(wide) * config.rotary_base**-exponents  # (..., T, r / 2)
    angles = torch.cat([angles, angles], dim=-1)  # (..., T, r)
    angles = angles if positions.ndim == 1 else angles[:, None]
    return angles.cos(), angles.sin()


def turn(x: Tensor, rotary: Rotary) -> Tensor:
    """Turns the first r dimensions of each head in ``x``, (B, H, T, d) -> (B, H, T, d)."""
    cos, sin = rotary
    size = cos.shape[-1]
    turned, kept = x[..., :size], x[..., size:]
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-right, left], dim=-1) * sin
    return torch.cat([turned.to(x.dtype), kept], dim=-1)

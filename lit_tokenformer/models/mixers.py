"""Interaction between data tokens: softmax attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.models.projections import make_projection


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

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        split = (*x.shape[:2], self.num_heads, -1)
        query = self.query(x).view(split).transpose(1, 2)  # (B, H, T, d)
        key = self.key(x).view(split).transpose(1, 2)  # (B, H, T, d)
        value = self.value(x).view(split).transpose(1, 2)  # (B, H, T, d)
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, H, T, d)
        return self.proj(mixed.transpose(1, 2).reshape(x.shape))  # (B, T, D)

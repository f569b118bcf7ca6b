"""One factory for every projection of every architecture: linear, or Pattention."""

from __future__ import annotations

import math

from torch import nn

from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.models.pattention import Pattention


def _linear(config: TokenformerConfig, kind: str, dim_in: int, dim_out: int) -> nn.Module:
    layer = nn.Linear(dim_in, dim_out, bias=config.bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _pattention(config: TokenformerConfig, kind: str, dim_in: int, dim_out: int) -> nn.Module:
    return Pattention(
        dim_in,
        dim_out,
        num_tokens=getattr(config.tokens, kind),
        score_norm=config.score_norm,
        kind=kind,
        key_std=0.02,
        value_std=2 / (config.depth * math.sqrt(config.dim)),  # the published "wang_init"
    )


PROJECTIONS = {"linear": _linear, "pattention": _pattention}


def make_projection(name: str, config: TokenformerConfig, kind: str, dim_in: int, dim_out: int) -> nn.Module:
    """A map (..., dim_in) -> (..., dim_out) with fresh weights.

    Args:
        name: A name in ``PROJECTIONS``.
        config: The architecture it belongs to.
        kind: Which total of parameter tokens it follows: ``qkv``, ``proj`` or ``ffn``.
        dim_in: Width of the input.
        dim_out: Width of the output.
    """
    return PROJECTIONS[name](config, kind, dim_in, dim_out)

"""Projections, linear or Pattention, and weight initialization."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.models.pattention import Pattention
from lit_tokenformer.registry import INITS, PROJECTIONS


class Init(NamedTuple):
    """In-place weight initialization scheme.

    Args:
        projection: Initializes a linear projection: ``(weight, config, residual)``, where ``residual`` marks layers
            that write to the residual stream.
        embedding: Initializes a token embedding, (V, D).
        head: Initializes an untied language head, (V, D).
        std: Standard deviation of a linear projection's weights: ``(config, residual, dim_in) -> std``.
    """

    projection: Callable[[Tensor, TokenformerConfig, bool], object]
    embedding: Callable[[Tensor], object]
    head: Callable[[Tensor], object]
    std: Callable[[TokenformerConfig, bool, int], float] = lambda config, residual, inputs: 0.02


def _normal(weight: Tensor) -> object:
    return nn.init.normal_(weight, std=0.02)


def _orthogonal(weight: Tensor, scale: float = 1.0) -> object:
    rows, columns = weight.shape
    return nn.init.orthogonal_(weight, gain=scale * math.sqrt(max(1.0, rows / columns)))


def _gpt2_std(config: TokenformerConfig, residual: bool, inputs: int) -> float:
    return 0.02 / math.sqrt(2 * config.depth) if residual else 0.02


def _neox_std(config: TokenformerConfig, residual: bool, inputs: int) -> float:
    return 2 / (config.depth * math.sqrt(config.dim)) if residual else math.sqrt(2 / (5 * config.dim))


def _normal_of(std: Callable[[TokenformerConfig, bool, int], float]) -> Init:
    def projection(weight: Tensor, config: TokenformerConfig, residual: bool) -> object:
        return nn.init.normal_(weight, std=std(config, residual, weight.shape[1]))

    return Init(projection, _normal, _normal, std)


INITS.register("trunc_normal")(
    Init(lambda weight, config, residual: nn.init.trunc_normal_(weight, std=0.02), _normal, _normal)
)
INITS.register("normal")(Init(lambda weight, config, residual: _normal(weight), _normal, _normal))
INITS.register("gpt2")(_normal_of(_gpt2_std))  # Radford et al. 2019, section 2.3
INITS.register("neox")(_normal_of(_neox_std))  # arXiv 2204.06745, section 2.1
INITS.register("rwkv")(  # of the official code; its norm after the embedding rescales the small values
    Init(
        lambda weight, config, residual: _orthogonal(weight),
        lambda weight: nn.init.uniform_(weight, -1e-4, 1e-4),
        lambda weight: _orthogonal(weight, 0.5),
        lambda config, residual, inputs: inputs**-0.5,
    )
)


@PROJECTIONS.register("linear")
def _linear(
    config: TokenformerConfig, kind: str, dim_in: int, dim_out: int, residual: bool, bias: bool, zero: bool
) -> nn.Module:
    layer = nn.Linear(dim_in, dim_out, bias=bias)
    layer.init_std = INITS[config.init].std(config, residual, dim_in)  # type: ignore[assignment]  # for growth
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        INITS[config.init].projection(layer.weight, config, residual)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


@PROJECTIONS.register("pattention")
def _pattention(
    config: TokenformerConfig, kind: str, dim_in: int, dim_out: int, residual: bool, bias: bool, zero: bool
) -> nn.Module:
    layer = Pattention(
        dim_in,
        dim_out,
        num_tokens=getattr(config.tokens, kind),
        score_norm=config.score_norm,
        kind=kind,
        key_std=0.02,
        value_std=pattention_value_std(config),
    )
    if zero:  # not the keys: zero scores give values zero gradient
        nn.init.zeros_(layer.value_tokens)
    return layer


def pattention_value_std(config: TokenformerConfig) -> float:
    """Initial standard deviation of value tokens: the published "wang_init"."""
    return 2 / (config.depth * math.sqrt(config.dim))


def make_projection(
    config: TokenformerConfig,
    kind: str,
    dim_in: int,
    dim_out: int,
    residual: bool = False,
    bias: bool | None = None,
    zero: bool = False,
) -> nn.Module:
    """Create the projection (..., dim_in) -> (..., dim_out) that ``config.projection`` names.

    Args:
        config: Architecture.
        kind: Kind of parameter tokens: ``qkv``, ``proj`` or ``ffn``.
        dim_in: Input dimension.
        dim_out: Output dimension.
        residual: Whether the output is added to the residual stream.
        bias: Enable bias of a linear projection; ``None`` uses ``config.bias``.
        zero: Initialize the output to zero.
    """
    wanted = config.bias if bias is None else bias
    layer = PROJECTIONS[config.projection](config, kind, dim_in, dim_out, residual, wanted, zero)
    layer.kind = kind
    return layer

"""Cost of one part of a model: parameters, floating-point operations, activations kept for the backward pass.

A multiply-add counts as two operations, and only matrix products and convolutions count, as in
``torch.utils.flop_counter``. A part has a method ``cost(length)``, with the length of the sequence, T, which gives its
:class:`Cost` for each data token; that of a stem or a head is for each sample.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Cost:
    """Cost of a part; ``+`` adds what is computed after it.

    Args:
        parameters: Trainable parameters.
        flops: Operations of the forward pass.
        kept: Activations kept for the backward pass.
        spared: Operations of the last product, if the backward pass needs no result of it: activation checkpointing
            does not repeat it.
    """

    parameters: int = 0
    flops: int = 0
    kept: int = 0
    spared: int = 0

    def __add__(self, other: Cost) -> Cost:
        parameters, flops = self.parameters + other.parameters, self.flops + other.flops
        return Cost(parameters, flops, self.kept + other.kept, other.spared)


def count_parameters(part: nn.Module) -> int:
    """Trainable parameters of a module."""
    return sum(parameter.numel() for parameter in part.parameters())


def part_cost(part: nn.Module, length: int) -> Cost:
    """Cost of a part for each data token.

    Args:
        part: A module with a method ``cost``, or a layer of torch's own. Any other is estimated, with a warning: two
            operations for each parameter.
        length: Length of the sequence, T.

    Example:
        >>> part_cost(nn.Linear(4, 8), length=1)
        Cost(parameters=40, flops=64, kept=4, spared=64)
    """
    own: Any = getattr(part, "cost", None)
    if own is not None:
        return own(length)
    parameters = count_parameters(part)
    if isinstance(part, nn.Linear):
        flops = 2 * part.in_features * part.out_features
        return Cost(parameters, flops, part.in_features, flops)
    if isinstance(part, (nn.LayerNorm, nn.RMSNorm)):
        return Cost(parameters, 0, part.normalized_shape[0])
    if isinstance(part, nn.Identity):
        return Cost()
    _warn(type(part).__name__)
    return Cost(parameters, 2 * parameters, sum(one.shape[-1] for one in part.parameters() if one.ndim > 1))


def same_input_cost(dim: int, length: int, *layers: nn.Module) -> Cost:
    """Cost of layers that read the same input (..., dim), which is kept once."""
    costs = [part_cost(layer, length) for layer in layers]
    return sum(costs, start=Cost()) + Cost(kept=-(len(costs) - 1) * dim)


@lru_cache
def _warn(kind: str) -> None:
    warnings.warn(f"{kind} declares no cost; it is counted with two operations for each parameter", stacklevel=4)

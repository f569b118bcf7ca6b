"""Cost of one part of a model: parameters, FLOPs, activations saved for the backward pass.

A multiply-add counts as two FLOPs. Only matrix products and convolutions count, as in ``torch.utils.flop_counter``. A
part implements ``cost(length)``, where length is the sequence length T, and returns a :class:`Cost` per data token; a
stem or a head returns it per sample.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Cost:
    """Cost of a part; ``a + b`` is the cost of a followed by b.

    Args:
        parameters: Trainable parameters.
        flops: FLOPs of the forward pass.
        kept: Activations saved for the backward pass, in elements.
        spared: FLOPs of the last product, if the backward pass does not need its result; activation checkpointing does
            not recompute it.
        inactive: Parameters that a data token does not use: those of experts other than its own.
    """

    parameters: int = 0
    flops: int = 0
    kept: int = 0
    spared: int = 0
    inactive: int = 0

    def __add__(self, other: Cost) -> Cost:
        parameters, flops = self.parameters + other.parameters, self.flops + other.flops
        return Cost(parameters, flops, self.kept + other.kept, other.spared, self.inactive + other.inactive)


def count_parameters(part: nn.Module) -> int:
    """Count the parameters of a module."""
    return sum(parameter.numel() for parameter in part.parameters())


def part_cost(part: nn.Module, length: int) -> Cost:
    """Compute the cost of a part per data token.

    Args:
        part: Module with a method ``cost``, or a torch layer. Any other module is estimated at two FLOPs per parameter,
            with a warning.
        length: Sequence length, T.

    Example:
        >>> part_cost(nn.Linear(4, 8), length=1)
        Cost(parameters=40, flops=64, kept=4, spared=64, inactive=0)
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
    """Compute the cost of layers with a shared input (..., dim), which is saved once."""
    costs = [part_cost(layer, length) for layer in layers]
    return sum(costs, start=Cost()) + Cost(kept=-(len(costs) - 1) * dim)


@lru_cache
def _warn(kind: str) -> None:
    warnings.warn(f"{kind} declares no cost; estimated at two FLOPs per parameter", stacklevel=4)

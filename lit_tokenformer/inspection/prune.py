"""Removal of parameter tokens that a model does not use.

The norm of all scores couples the tokens of a layer: without a token, the weights of all others rise. :func:`prune`
compensates the mean of this change by tau, ``tau' = tau sqrt(1 - share)``, with the removed tokens' share of the
squared norm. Tokens with zero keys have no share, so their removal is exact for every input. For all others it is
exact in the mean only: a token is dead if its measured removal changes the mean loss by less than a tolerance.

Weights, moving average and optimizer state lose the same rows, and the other rows keep their state bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_tokenformer.errors import UserError
from lit_tokenformer.growth.axes import PlannedGrowth, check_shared
from lit_tokenformer.growth.rows import Rows
from lit_tokenformer.growth.shrink import Tensors, check_whole_tensors, replace_tensors, swapped_tensors, tensor_place
from lit_tokenformer.inspection.statistics import Loss, TokenStatistics, collect, evaluated, mean_loss, task_loss
from lit_tokenformer.models.axes import find_axes

TOLERANCE = 1e-4
"""Change of the mean loss, in nats, below which removed tokens are dead."""

Tokens = Mapping[str, Sequence[int]]
"""Indices of parameter tokens by layer name."""

Energy = Mapping[str, Tensor]
"""Mean share of each token in the squared norm of the scores, (N,) by layer name."""


@dataclass(frozen=True)
class DeadTokens:
    """Tokens that can be removed together.

    Args:
        tokens: Indices by layer name.
        energy: Shares in the squared norm of the scores, for :func:`prune`.
        loss: Mean loss before the removal.
        change: Measured change of the mean loss by the removal of all of them.
    """

    tokens: dict[str, list[int]]
    energy: dict[str, Tensor]
    loss: float
    change: float

    def __len__(self) -> int:
        return sum(map(len, self.tokens.values()))


def prune(
    module: nn.Module,
    tokens: Tokens,
    energy: Energy | None = None,
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> int:
    """Remove parameter tokens from a module and its optimizers, in place.

    Args:
        module: Module with Pattention layers.
        tokens: Indices of the tokens to remove, by layer name.
        energy: Mean share of each token in the squared norm of the scores, as :func:`find_dead` measures it; default:
            the shares in the squared norm of the keys.
        optimizers: Optimizers of the module, whose state loses the same rows.

    Returns:
        Number of parameters removed.

    Raises:
        UserError: For an unknown layer or token, if no token of a layer would remain, and for parametrized, sharded or
            tied parameters. The module is unchanged then.

    Example:
        >>> from lit_tokenformer.models import Pattention
        >>> layer, x = Pattention(8, 8, num_tokens=4), torch.randn(2, 8)
        >>> _ = layer.key_tokens.data[1].zero_()  # never has a weight
        >>> before = layer(x)
        >>> prune(layer, {"": [1]}), torch.allclose(layer(x), before, atol=1e-6)
        (16, True)
    """
    plan = _plan(module, tokens)
    moments = [
        (state, key, kept)
        for one, index in plan
        for tensor in one.axis.tensors
        for optimizer in optimizers
        for state in [optimizer.state.get(tensor.of(one.part), {})]
        for key, value in state.items()
        if (kept := _kept_rows(value, tensor.of(one.part), tensor.dim, index)) is not None
    ]
    before = sum(parameter.numel() for parameter in module.parameters())
    replace_tensors(_kept_tensors(plan, energy))
    for state, key, kept in moments:
        state[key] = kept
    return before - sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def without(module: nn.Module, tokens: Tokens, energy: Energy | None = None) -> Iterator[None]:
    """Evaluate a module without some of its parameter tokens within the block; see :func:`prune`."""
    with swapped_tensors(_kept_tensors(_plan(module, tokens), energy)):
        yield


def find_dead(
    model: nn.Module,
    batches: Iterable[Any],
    tolerance: float = TOLERANCE,
    loss: Loss = task_loss,
    statistics: Mapping[str, TokenStatistics] | None = None,
) -> DeadTokens:
    """Find the tokens whose joint removal changes the mean loss by less than a tolerance.

    Candidates are ordered by the sum of their absolute first-order effects. The number of removed candidates is found
    by bisection, with one evaluation of the loss for each trial.

    Args:
        model: Task, or any module with ``loss``.
        batches: Batches of the task.
        tolerance: Change of the mean loss, in nats.
        loss: Loss of the module for a batch.
        statistics: Statistics over these batches, if known.

    Raises:
        UserError: If the tolerance is not above 0; see also :func:`~lit_tokenformer.inspection.statistics.collect`.
    """
    if not tolerance > 0:
        raise UserError(f"tolerance: expected above 0, got {tolerance}")
    batches = list(batches)
    if statistics is None:
        statistics, _, _ = collect(model, batches, top=1, loss=loss)
    energy = {name: one.energy for name, one in statistics.items()}
    order = [one for one in by_influence(statistics) if statistics[one[0]].influence[one[1]] < tolerance]
    kept = {name: int(one.influence.argmax()) for name, one in statistics.items()}  # one token must remain
    order = [(name, token) for name, token in order if kept[name] != token]
    with evaluated(model):
        whole = mean_loss(model, batches, loss)

        def change(number: int) -> float:
            with without(model, _by_layer(order[:number]), energy):
                return mean_loss(model, batches, loss) - whole

        low, high, found = 0, len(order), 0.0
        trial = high
        while low < high:
            measured = change(trial)
            low, high, found = (trial, high, measured) if abs(measured) < tolerance else (low, trial - 1, found)
            trial = (low + high + 1) // 2
    return DeadTokens(_by_layer(order[:low]), energy, whole, found)


def by_influence(statistics: Mapping[str, TokenStatistics]) -> list[tuple[str, int]]:
    """List all tokens as (layer, index), the least influential first."""
    pairs = [(float(value), name, i) for name, one in statistics.items() for i, value in enumerate(one.influence)]
    return [(name, i) for _, name, i in sorted(pairs)]


def _by_layer(tokens: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, index in tokens:
        found.setdefault(name, []).append(index)
    return {name: sorted(indices) for name, indices in found.items()}


def _plan(module: nn.Module, tokens: Tokens) -> list[tuple[PlannedGrowth, Tensor]]:
    """Plan a removal: each axis with the indices that remain, (n,) int64."""
    axes = {name: (part, axis) for name, part, axis in find_axes(module) if axis.tau is not None}
    plan = []
    for name, removed in tokens.items():
        if name not in axes:
            raise UserError(f"tokens: unknown layer {name!r} (expected one of {', '.join(axes)})")
        part, axis = axes[name]
        total = axis.size(part)
        if wrong := [one for one in removed if not 0 <= one < total]:
            raise UserError(f"tokens: {name} has {total} tokens, got index {wrong[0]}")
        stays = torch.ones(total, dtype=torch.bool)
        stays[list(removed)] = False
        index = stays.nonzero()[:, 0]
        if not len(index):
            raise UserError(f"tokens: no token of {name} would remain (expected at least 1)")
        check_whole_tensors(part, axis, f"tokens: {name}")
        plan.append((PlannedGrowth(name, part, axis, Rows(total, len(index))), index))
    check_shared(module, [one for one, _ in plan])
    return plan


def _kept_tensors(plan: Iterable[tuple[PlannedGrowth, Tensor]], energy: Energy | None) -> Tensors:
    found = {}
    for one, index in plan:
        for tensor in one.axis.tensors:
            whole = tensor.of(one.part)
            found[tensor.owner(one.part)] = whole.index_select(tensor.dim, index.to(whole.device))
        tau: Any = one.axis.tau
        share = _removed_share(one, index, energy)
        found[tensor_place(one.part, tau)] = tau * (1 - share) ** 0.5
    return found


def _removed_share(one: PlannedGrowth, index: Tensor, energy: Energy | None) -> float:
    """Return the share of removed tokens in the squared norm; exactly 0 for zero keys."""
    if energy is not None:
        shares = energy[one.name]
    else:
        keys = next(tensor for tensor in one.axis.tensors if tensor.name in ("key_tokens", "keys.weight"))
        squared = keys.of(one.part).detach().double().square().sum(dim=1).cpu()
        shares = squared / squared.sum().clamp_min(1e-30)
    removed = torch.ones(one.rows.before, dtype=torch.bool)
    removed[index] = False
    return min(float(shares[removed].sum()), 1.0)


def _kept_rows(value: Any, parameter: Tensor, dim: int, index: Tensor) -> Tensor | None:
    """Select the rows of optimizer state that remain; ``None`` for state without rows."""
    if not isinstance(value, Tensor) or value.ndim != parameter.ndim or value.shape[dim] != parameter.shape[dim]:
        return None
    return value.index_select(dim, index.to(value.device))

"""Smaller models inside a model: the first units of each axis, sorted by importance.

A prefix is the model with the first n of N units of an axis, as in MatFormer (arXiv 2310.07707). It has the weights of
the whole model, so one training run yields every size (:class:`~callbacks.NestedSizes`). :func:`prefix` evaluates a
prefix in place, :func:`shrink` cuts the model down to it; both compute the same function, bit for bit.

Parameter tokens share a normalization of scale tau. tau^2 is the number of tokens that tau was set for: N, or fewer
after growth by ``zero``, which keeps tau. A prefix with at least that many tokens keeps tau, so the model before a
growth by ``zero`` is an exact prefix of the grown one. A shorter prefix has tau sqrt(n/N), which is sqrt(n) for tau =
sqrt(N), as in the published format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.growth.axes import PlannedGrowth, check_shared
from lit_tokenformer.growth.rows import Rows
from lit_tokenformer.models import ParamTokens, model_size
from lit_tokenformer.models.axes import OUT, Axis, find_axes, refresh
from lit_tokenformer.models.config import KINDS, OTHER

Prefix = int | float | Mapping[str, int | float]
"""Size of a prefix as users write it: tokens as in growth, a share below 1, or totals and shares by kind of axis."""

Tensors = Mapping[tuple[nn.Module, str], Tensor]
"""Tensors by owner and attribute."""

Order = Mapping[str, Tensor]
"""New order of the units of each axis, (units,) int64 by the key of :func:`unit_importance`."""


def shrink(module: nn.Module, tokens: Prefix, setting: str = "tokens") -> None:
    """Remove the last units of the axes of a module, in place: the inverse of :func:`~lit_tokenformer.growth.grow`.

    An optimizer of the module is invalid afterwards; create a new one.

    Args:
        module: Module with Pattention layers, or with parts that declare :class:`~lit_tokenformer.models.Axis`.
        tokens: Totals: n (qkv n, proj n, ffn 4n; Pattention layers without a kind n) or by kind, ``{qkv: n, proj: n,
            ffn: m, other: k, hidden: h, heads: H}``; missing kinds are unchanged. A number below 1 is a share: 0.25 is
            the first quarter of the parameter tokens of every layer, or of the hidden units of a model without any.
        setting: Name of the setting in errors.

    Raises:
        UserError: If no unit or more than the present units would remain, for an unknown kind, and for sharded or tied
            parameters. The module is unchanged then.

    Example:
        >>> from lit_tokenformer.models import Pattention
        >>> layer = Pattention(8, 8, num_tokens=16)
        >>> shrink(layer, 0.25)
        >>> layer.num_tokens, layer.tau.item()
        (4, 2.0)
    """
    replace_tensors(prefix_tensors(planned_prefix(module, tokens, setting)))


@contextmanager
def prefix(module: nn.Module, tokens: Prefix) -> Iterator[None]:
    """Evaluate a module at a smaller size within the block; gradients reach the parameters of the whole module.

    The forward pass must end within the block, the backward pass need not, except for activation checkpointing, which
    repeats the forward pass.

    Args:
        module: The module, not sharded.
        tokens: Size, as in :func:`shrink`.

    Raises:
        UserError: As :func:`shrink`.

    Example:
        >>> from lit_tokenformer.models import Pattention
        >>> layer = Pattention(8, 8, num_tokens=16)
        >>> with prefix(layer, 4):
        ...     layer.num_tokens
        4
        >>> layer.num_tokens
        16
    """
    with swapped_tensors(prefix_tensors(planned_prefix(module, tokens))):
        yield


def replace_tensors(tensors: Tensors) -> None:
    """Replace the data of parameters and buffers, whose sizes may change."""
    for (owner, attribute), tensor in tensors.items():
        present = getattr(owner, attribute)
        present.data, present.grad = tensor.detach().clone(), None
        owner._non_persistent_buffers_set.discard(attribute)
        refresh(owner)


@contextmanager
def swapped_tensors(tensors: Tensors) -> Iterator[None]:
    """Replace parameters and buffers within the block by tensors, which may be differentiable in the parameters."""
    whole: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
    for (owner, attribute), tensor in tensors.items():
        store: dict[str, Any] = owner._buffers if attribute in owner._buffers else owner._parameters
        whole.append((store, attribute, store[attribute], tensor))
    try:
        for store, attribute, _, tensor in whole:
            store[attribute] = tensor
        yield
    finally:
        for store, attribute, tensor, _ in whole:
            store[attribute] = tensor


def planned_prefix(module: nn.Module, tokens: Prefix, setting: str = "tokens") -> list[PlannedGrowth]:
    """Plan a prefix of a module: its axes and their sizes, in module order.

    Args:
        module: The module.
        tokens: Size, as in :func:`shrink`.
        setting: Name of the setting in errors.

    Raises:
        UserError: As :func:`shrink`.
    """
    sizes = _by_kind(tokens, model_size(module), setting)
    plan = []
    for name, part, axis in find_axes(module):
        before, size = axis.size(part), sizes.get(axis.kind)
        if size is None:
            continue
        after = int(size * before) if isinstance(size, float) else size
        where = f"{axis.kind} of layer {name!r}" if name else axis.kind
        if after < 1:
            raise UserError(f"{setting}: {size:g} of {before} {where} leaves none (expected at least 1)")
        if after > before:
            raise UserError(f"{setting}: {where} would grow from {before} to {after}; use grow")
        plan.append(PlannedGrowth(name, part, axis, Rows(before, after)))
        check_whole_tensors(part, axis, f"{setting}: {where}")
    check_shared(module, plan)
    return plan


def check_whole_tensors(part: nn.Module, axis: Axis, where: str) -> None:
    """Raise a ``UserError`` that begins with ``where`` if tensors of an axis are parametrized or sharded."""
    for tensor in axis.tensors:
        owner, attribute = tensor.owner(part)
        if attribute not in (*owner._parameters, *owner._buffers):
            raise UserError(f"{where} is parametrized; remove the parametrization first")
        if isinstance(tensor.of(part), DTensor):
            raise UserError(f"{where} is sharded among processes (expected a whole model)")


def _by_kind(tokens: Prefix, current: Mapping[str, int], setting: str) -> dict[str, int | float]:
    """Resolve the size of each kind of axis, as a total or a share."""
    kinds = [kind for kind in (*KINDS, OTHER) if kind in current]
    if isinstance(tokens, bool) or not isinstance(tokens, (int, float, Mapping)):
        raise UserError(f"{setting}: expected totals or a share below 1, got {tokens!r}")
    if isinstance(tokens, float):
        sizes: dict[str, int | float] = dict.fromkeys(
            kinds or [kind for kind in ("hidden",) if kind in current], tokens
        )
    elif isinstance(tokens, int):
        if tokens < 1:
            raise UserError(f"{setting}: expected at least 1 token, got {tokens}")
        by_kind = {**dict(ParamTokens.parse(tokens).items()), OTHER: tokens}
        sizes = {kind: by_kind[kind] for kind in kinds}
    else:
        sizes = dict(tokens)
    if not sizes:
        raise UserError(f"{setting}: the model has no parameter tokens and no hidden units (got {tokens!r})")
    for kind, size in sizes.items():
        if kind not in current:
            raise unknown_name(setting, kind, current)
        if kind == "depth":
            raise UserError(f"{setting}: depth cannot shrink; the first blocks alone are not a smaller model")
        if kind == "experts":
            raise UserError(f"{setting}: experts cannot shrink; a router chooses among all of them")
        if isinstance(size, bool) or not isinstance(size, (int, float)) or (isinstance(size, int) and size < 1):
            raise UserError(f"{setting}: {kind}: expected a whole number of at least 1 or a share, got {size!r}")
        if isinstance(size, float) and not 0 < size < 1:
            raise UserError(f"{setting}: {kind}: expected a share above 0 and below 1, got {size:g}")
    return sizes


def prefix_tensors(plan: Iterable[PlannedGrowth]) -> dict[tuple[nn.Module, str], Tensor]:
    """Compute the tensors of a prefix by owner and attribute: contiguous, and differentiable in the whole tensors."""
    found: dict[tuple[nn.Module, str], Tensor] = {}
    for one in plan:
        for tensor in one.axis.tensors:
            place = tensor.owner(one.part)
            whole = found.get(place, tensor.of(one.part))
            found[place] = whole.narrow(tensor.dim, 0, one.rows.after * tensor.block)
        if one.axis.tau is not None:
            found[tensor_place(one.part, one.axis.tau)] = _prefix_tau(one.axis.tau, one.rows)
    return {place: tensor.contiguous() for place, tensor in found.items()}


def _prefix_tau(tau: Tensor, rows: Rows) -> Tensor:
    """Compute the scale of a prefix, (): tau where it was set for at most n tokens, else tau sqrt(n/N)."""
    wide = tau.to(torch.promote_types(tau.dtype, torch.float32))
    excess = (wide / math.sqrt(rows.before)).clamp_min(1)  # above 1 for a tau of other origin
    return torch.minimum(wide, math.sqrt(rows.after) * excess).to(tau.dtype)


def tensor_place(part: nn.Module, tensor: Tensor) -> tuple[nn.Module, str]:
    """Find the module below ``part`` that owns a tensor, and its attribute name."""
    for owner in part.modules():
        for attribute, own in (*owner._buffers.items(), *owner._parameters.items()):
            if own is tensor:
                return owner, attribute
    raise UserError(f"tokens: tau of {type(part).__name__} is neither a buffer nor a parameter of it")


def unit_importance(module: nn.Module, kinds: Iterable[str], gradient: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    """Estimate the increase of the loss when a unit is removed, to first order.

    Removing a parameter token takes ``w V`` from the output y, so the loss changes by ``-sum_t w_t (V . dL/dy_t)`` over
    data tokens t, which is ``-V . dL/dV`` (arXiv 1611.06440, eq. 7). Hidden units and heads likewise, with the tensors
    that they write through. The change of the normalization of the other tokens is ignored.

    Args:
        module: The module.
        kinds: Kinds of axes.
        gradient: Gradient of the loss by parameter.

    Returns:
        Importance (units,) in float64 for each axis, by ``part/kind``.
    """
    found = {}
    for name, part, axis in find_axes(module):
        if axis.kind not in kinds:
            continue
        total = torch.zeros(axis.size(part), dtype=torch.float64)
        for tensor in axis.tensors:
            weight = tensor.of(part)
            if tensor.role == OUT and weight in gradient:
                wide = torch.promote_types(weight.dtype, torch.float32)
                change = (weight.detach().to(wide) * gradient[weight].to(wide)).movedim(tensor.dim, 0)
                total -= change.reshape(len(total), -1).sum(dim=1).cpu()
        found[f"{name}/{axis.kind}"] = total
    return found


@torch.no_grad()
def reorder_units(module: nn.Module, order: Order, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
    """Reorder the units of the axes of a module, in place, which preserves its function up to rounding.

    Args:
        module: The module.
        order: Index of the unit that moves to each place, by axis.
        optimizers: Optimizers whose state is reordered too.

    Raises:
        UserError: If a parameter is shared by two axes, which would reorder it twice, or if the order of the units is
            fixed, as that of heads with ALiBi. The module is unchanged then.
    """
    moves: dict[tuple[Tensor, int], Tensor] = {}
    for name, part, axis in find_axes(module):
        units = order.get(f"{name}/{axis.kind}")
        for tensor in axis.tensors if units is not None else ():
            owner, attribute = tensor.owner(part)
            if attribute in owner._buffers:  # ALiBi slopes, which all blocks share
                raise UserError(f"sort: the order of {axis.kind} is fixed by {attribute}")
            entries = units[:, None] * tensor.block + torch.arange(tensor.block)  # type: ignore[index]
            place = tensor.of(part), tensor.dim
            if place in moves:
                raise UserError(f"sort: {f'{name}.{tensor.name}'.lstrip('.')} is shared by several layers")
            moves[place] = entries.flatten()
    states = [optimizer.state for optimizer in optimizers]
    for (moved, dim), index in moves.items():
        kept = [value for state in states for value in state.get(moved, {}).values() if isinstance(value, Tensor)]
        for one in (moved, *kept):
            if one.ndim == moved.ndim and one.shape[dim] == len(index):
                one.copy_(one.index_select(dim, index.to(one.device)))

"""Growth of one tensor along one dimension: the origin of each unit, and the writing of new units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_tokenformer.growth.shards import gather, is_elsewhere, local, moves_no_rows, owned_rows

Fill = Callable[[Tensor, Tensor, Tensor, slice], None]
"""Writer of grown units: ``(copies, appended, old, place)``, with uninitialized copies (n, copies, ...), uninitialized
appended units (m, ...), old units (n, ...) and their slice of all old units. m is 0 unless the slice is the whole."""

KEPT = "kept"
"""Entry of a growth's record with the rows that later removals and sorts left, in their present order, by parameter."""


def record_kept(event: dict[str, Any], name: str, rows: Sequence[int]) -> None:
    """Record a removal or a sort of the rows of a parameter since a growth.

    Args:
        event: Record of the latest growth.
        name: Name of the parameter.
        rows: Indices of the rows that remain, in their new order.
    """
    kept = event.setdefault(KEPT, {})
    kept[name] = [kept[name][row] for row in rows] if name in kept else list(rows)


@dataclass(frozen=True)
class Rows:
    """Origin of the units of a grown axis.

    Args:
        before: Units before the growth, N.
        after: Units after the growth.
        copies: Consecutive copies of each old unit, r; 1 unless split.
    """

    before: int
    after: int
    copies: int = 1

    def new(self, device: torch.device | None = None) -> Tensor:
        """Mask of the new units, (after,) bool; the first of each set of copies is the original."""
        index = torch.arange(self.after, device=device)
        return (index % self.copies != 0) | (index >= self.copies * self.before)


@dataclass(frozen=True)
class GrownTensor:
    """Growth of one tensor of an axis.

    Args:
        rows: Origin of its units.
        dim: Dimension that grew.
        block: Entries per unit.
    """

    rows: Rows
    dim: int = 0
    block: int = 1

    def mask(self, device: torch.device | None = None) -> Tensor:
        """Mask of the new entries of the dimension, (entries,) bool."""
        return self.rows.new(device).repeat_interleave(self.block)

    def new(self, tensor: Tensor) -> Tensor:
        """Mask of the new entries, broadcastable to the local shard of ``tensor``.

        Args:
            tensor: Tensor at its new size, replicated or sharded by rows.
        """
        mask = self.mask(tensor.device)
        if self.dim == 0:
            own = owned_rows(tensor, len(mask))
            mask = mask[own.start : own.stop]
        return mask.view([-1 if dim == self.dim else 1 for dim in range(tensor.ndim)])


@torch.no_grad()
def regrown(old: Tensor, grown: GrownTensor, fill: Fill) -> Tensor:
    """Grow a tensor and return the local shard of the result; the whole of an unsharded tensor.

    Args:
        old: Tensor, replicated or sharded by rows.
        grown: Growth of the tensor.
        fill: Writer of the new units.
    """
    if is_elsewhere(old):
        return local(old)
    rows, dim, block = grown.rows, grown.dim, grown.block
    by_rows = dim == 0 and block == 1
    stays = by_rows and moves_no_rows(old, rows.before, rows.copies) and rows.after == rows.copies * rows.before
    if stays:
        own = owned_rows(old, rows.before)
        here, place = local(old), slice(own.start, own.stop)
    else:
        here, place = gather(old), slice(0, rows.before)
    if not by_rows:
        here = here.movedim(dim, 0).unflatten(0, (-1, block))  # (N, block, ...)
    copied = rows.copies * len(here)
    new = here.new_empty((copied + rows.after - rows.copies * rows.before, *here.shape[1:]))
    fill(new[:copied].view(len(here), rows.copies, *here.shape[1:]), new[copied:], here, place)
    if not by_rows:
        new = new.flatten(0, 1).movedim(0, dim).contiguous()
    if stays or not isinstance(old, DTensor):
        return new
    own = owned_rows(old, len(new))
    return new[own.start : own.stop].clone()


def normal(
    shape: tuple[int, ...], place: slice, reference: Tensor, std: float, generator: torch.Generator
) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows from N(0, std) in float32 or wider, each with its slice of the requested rows.

    All rows are drawn, in float32 on the generator's device, so that every process consumes the same draws.

    Args:
        shape: Shape of the whole tensor.
        place: Requested rows.
        reference: Tensor with the device and precision of the result.
        std: Standard deviation.
        generator: Random generator.
    """
    wide = torch.promote_types(reference.dtype, torch.float32)
    # on a CPU, draws in multiples of 16 are equal to those of one call
    height = 16 * max(1, _DRAWN_AT_ONCE // (16 * math.prod(shape[1:])))
    for start in range(0, shape[0], height):
        drawn = torch.randn(
            (min(height, shape[0] - start), *shape[1:]),
            generator=generator,
            dtype=torch.float32,
            device=generator.device,
        )
        first, last = max(start, place.start), min(start + len(drawn), place.stop)
        if first < last:
            block = drawn[first - start : last - start].to(device=reference.device, dtype=wide).mul_(std)
            yield slice(first - place.start, last - place.start), block


_DRAWN_AT_ONCE = 2**18
"""Elements per block: 1 MB, which fits a CPU cache."""


def fill_normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Draw a whole tensor from N(0, std); zeros for a std of 0."""
    if std == 0:
        tensor.zero_()
        return
    for part, drawn in normal(tuple(tensor.shape), slice(0, len(tensor)), tensor, std, generator):
        tensor[part] = drawn

"""Rows of a tensor that grows along one dimension: where each unit comes from, and how the new ones are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_tokenformer.growth.shards import gather, local, moves_no_rows, owned_rows

Fill = Callable[[Tensor, Tensor, Tensor, slice], None]
"""Write the units of a tensor that grew, given the empty copies (n, copies, ...), the empty units that are no copies
(m, ...), the old units (n, ...), and which of all old units these are. m is 0 unless they are all."""


@dataclass(frozen=True)
class Rows:
    """Where the units of a grown axis come from.

    Args:
        before: Units before the growth, N.
        after: Units after it.
        copies: How often each old unit stands in the new axis, side by side; 1 unless it was split.
    """

    before: int
    after: int
    copies: int = 1

    def new(self, device: torch.device | None = None) -> Tensor:
        """Mask of the units that were not there before, (after,) bool; the first of each set of copies was."""
        index = torch.arange(self.after, device=device)
        return (index % self.copies != 0) | (index >= self.copies * self.before)


@dataclass(frozen=True)
class GrownTensor:
    """Rows of one tensor of a grown axis.

    Args:
        rows: Where its units come from.
        dim: The dimension that grew.
        block: Entries for each unit.
    """

    rows: Rows
    dim: int = 0
    block: int = 1

    def mask(self, device: torch.device | None = None) -> Tensor:
        """Mask of the new entries of the dimension, (entries,) bool."""
        return self.rows.new(device).repeat_interleave(self.block)

    def new(self, tensor: Tensor) -> Tensor:
        """Mask of the new entries, broadcastable to what this process holds of ``tensor``.

        Args:
            tensor: The tensor at its new size, whole or sharded by rows.
        """
        mask = self.mask(tensor.device)
        if self.dim == 0:
            own = owned_rows(tensor, len(mask))
            mask = mask[own.start : own.stop]
        return mask.view([-1 if dim == self.dim else 1 for dim in range(tensor.ndim)])


@torch.no_grad()
def regrown(old: Tensor, grown: GrownTensor, fill: Fill) -> Tensor:
    """The part that this process holds of a tensor that grows; of a tensor that is not sharded, all.

    Args:
        old: The tensor, whole or sharded by rows.
        grown: How it grows.
        fill: Writes the new units.
    """
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
    """Rows of N(0, std) in float32 at least, block by block, each with its place among the wanted rows.

    They are drawn on the generator's device in float32, and all of them, so that every process draws the same.

    Args:
        shape: Shape of the whole.
        place: The wanted rows.
        reference: A tensor on the wanted device and in the wanted precision.
        std: Standard deviation.
        generator: Source of the draws.
    """
    wide = torch.promote_types(reference.dtype, torch.float32)
    height = 16 * max(1, _DRAWN_AT_ONCE // (16 * math.prod(shape[1:])))  # by 16 a CPU draws what it draws all at once
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
"""Numbers; 1 MB, which stays in a CPU's cache."""


def fill_normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Draw a whole tensor from N(0, std); zeros for a std of 0."""
    if std == 0:
        tensor.zero_()
        return
    for part, drawn in normal(tuple(tensor.shape), slice(0, len(tensor)), tensor, std, generator):
        tensor[part] = drawn

"""Growth methods: how the new units of an axis are made (N units become r N, or any larger number).

``split``
    Every unit is copied r times: tensors of role *in* repeat, tensors of role *out* become ``out / r + E_j`` with
    random E_j that sum to zero, tau becomes sqrt(r) tau. The output stays the same for every activation and score
    normalization, and the copies get different gradients from the first step. Relatives: Net2WiderNet (arXiv
    1511.05641), LEMON (arXiv 2310.07999). Copies are next to their originals. A remainder of a factor that is not whole
    is made by ``zero``.
``zero``
    New units read at random and write zero; parameter tokens, whose normalization couples all scores, read zero and
    write at random (arXiv 2410.23168, section 3.3 with tau fixed). Exact for every normalization but softmax. What is
    zero moves at the first optimizer step, what is random at the second.
``random``
    New units as initialized, tau by the new number: what the published code does. It changes the function.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_tokenformer.errors import UserError
from lit_tokenformer.growth.rows import Fill, Rows, fill_normal, normal
from lit_tokenformer.models.axes import OUT, OWN, Axis, AxisTensor
from lit_tokenformer.registry import GROWTH_METHODS


class GrowthMethod:
    """A way to make the new units of an axis; this one is ``zero``, and a base for others.

    Attributes:
        exact: Whether the model computes the same function after a growth.
    """

    exact = True

    def rows(self, before: int, after: int) -> Rows:
        """Where the units come from when ``before`` of them become ``after``."""
        return Rows(before, after)

    def std(self, axis: Axis, tensor: AxisTensor) -> float:
        """Standard deviation of units that are no copies; 0 for zeros.

        Args:
            axis: The axis that grows.
            tensor: One of its tensors.
        """
        random = tensor.role == OWN or (tensor.role == OUT) == (axis.tau is not None)
        return tensor.std if random else 0.0

    def fill(self, axis: Axis, tensor: AxisTensor, rows: Rows, noise: float, generator: torch.Generator) -> Fill:
        """The function that writes the new units of a tensor.

        Args:
            axis: The axis that grows.
            tensor: One of its tensors.
            rows: Where its units come from.
            noise: Size of the differences between copies, in standard deviations of initial values.
            generator: Source of random values.
        """

        def write(copies: Tensor, appended: Tensor, old: Tensor, place: slice) -> None:
            if tensor.role == OUT and rows.copies > 1:
                _share(copies, old, place, rows.before, noise * tensor.std, generator)
            else:
                copies.copy_(old[:, None])
            fill_normal(appended, self.std(axis, tensor), generator)
            if tensor.settle is not None:
                tensor.settle(appended)

        return write

    def tau(self, tau: Tensor, rows: Rows) -> Tensor:
        """The scale of the normalization after the growth, ()."""
        return tau.double() * math.sqrt(rows.copies)

    def gradient_scale(self, tensor: AxisTensor, rows: Rows) -> float:
        """Factor on the gradient of an old unit: 1/r for what units read that were split."""
        return 1.0 if tensor.role == OUT else 1 / rows.copies


class Split(GrowthMethod):
    """``split``: see the head of this module."""

    def rows(self, before: int, after: int) -> Rows:
        return Rows(before, after, after // before)


class Random(GrowthMethod):
    """``random``: see the head of this module."""

    exact = False

    def std(self, axis: Axis, tensor: AxisTensor) -> float:
        return tensor.std

    def tau(self, tau: Tensor, rows: Rows) -> Tensor:
        return torch.full_like(tau, math.sqrt(rows.after))


GROWTH_METHODS.register("split")(Split())
GROWTH_METHODS.register("zero")(GrowthMethod())
GROWTH_METHODS.register("random")(Random())

EARLIER_NAMES = {"zero_keys": "zero"}
"""Names of methods in earlier releases."""


def growth_method(name: str) -> GrowthMethod:
    """The method of a name.

    Raises:
        UserError: For an unknown name.
    """
    return GROWTH_METHODS[EARLIER_NAMES.get(name, name)]


def _share(copies: Tensor, old: Tensor, place: slice, before: int, std: float, generator: torch.Generator) -> None:
    """Write ``old / r + E_j`` into r copies (n, r, ...), with random E_j that sum to zero."""
    count = copies.shape[1]
    for part, spread in normal((before, *copies.shape[1:]), place, old, std, generator):
        spread.sub_(spread.mean(dim=1, keepdim=True)).mul_(math.sqrt(count / (count - 1)))
        whole, parts = old[part].to(spread.dtype), copies[part]
        parts.copy_(spread.add_(whole[:, None] / count))
        parts[:, -1] = whole - parts[:, :-1].to(spread.dtype).sum(dim=1)  # rounding must not change the sum


def check_rows(axis: Axis, rows: Rows, method: GrowthMethod, name: str) -> None:
    """Reject a growth that cannot keep a part's function, or whose new units would never train.

    Raises:
        UserError: If that is so.
    """
    appended = rows.after > rows.copies * rows.before
    if method.exact and appended and not axis.zero_exact:
        raise UserError(
            f"method: zero keys change the output under score_norm 'softmax'; layer {name!r} can go from "
            f"{rows.before} tokens to a multiple of it by 'split', not to {rows.after}"
        )
    if appended and not any(method.std(axis, tensor) for tensor in axis.tensors if tensor.role != OWN):
        raise UserError(f"method: new {axis.kind} of {name!r} would read and write zeros, and never train")

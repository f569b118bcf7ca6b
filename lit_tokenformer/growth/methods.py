"""Growth methods: initialization of the new units of an axis (N units become r N, or any larger number).

``split``
    Copies every unit r times: tensors of role *in* repeat, tensors of role *out* become ``out / r + E_j`` with random
    E_j that sum to zero, tau becomes sqrt(r) tau. The output is unchanged for every activation and score normalization,
    and the copies get different gradients from the first step. Copies directly follow their originals. If r is not
    whole, the remainder is initialized by ``zero``. Related work: Net2WiderNet (arXiv 1511.05641), LEMON (arXiv
    2310.07999).
``zero``
    Initializes input weights at random and output weights to zero. Parameter tokens, whose normalization couples all
    scores, have zero keys and random values (arXiv 2410.23168, section 3.3 with tau fixed). Exact for every
    normalization except softmax. Zero weights change in the first optimizer step, random ones in the second.
``random``
    Initializes new units as a new model does, with tau of the new size, as the published code. Not
    function-preserving.
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
    """Initialization of the new units of an axis: ``zero``, and the base class of other methods.

    Attributes:
        exact: Whether growth preserves the function of the model.
    """

    exact = True

    def rows(self, before: int, after: int) -> Rows:
        """Plan the origin of the units of an axis that grows from ``before`` to ``after``."""
        return Rows(before, after)

    def std(self, axis: Axis, tensor: AxisTensor) -> float:
        """Standard deviation of appended units; 0 for zeros.

        Args:
            axis: Growing axis.
            tensor: Tensor of the axis.
        """
        random = tensor.role == OWN or (tensor.role == OUT) == (axis.tau is not None)
        return tensor.std if random else 0.0

    def fill(self, axis: Axis, tensor: AxisTensor, rows: Rows, noise: float, generator: torch.Generator) -> Fill:
        """Build the function that writes the new units of a tensor.

        Args:
            axis: Growing axis.
            tensor: Tensor of the axis.
            rows: Origin of its units.
            noise: Size of the differences between copies, in standard deviations of initial values.
            generator: Random generator.
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
        """Compute the scale of the normalization after the growth, ()."""
        return tau.double() * math.sqrt(rows.copies)

    def gradient_scale(self, tensor: AxisTensor, rows: Rows) -> float:
        """Factor on the gradient of an old unit: 1/r for tensors of role ``in`` or ``own`` under a split."""
        return 1.0 if tensor.role == OUT else 1 / rows.copies


class Split(GrowthMethod):
    """``split``: see the module docstring."""

    def rows(self, before: int, after: int) -> Rows:
        return Rows(before, after, after // before)


class Random(GrowthMethod):
    """``random``: see the module docstring."""

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
    """Look up a growth method by name.

    Raises:
        UserError: If the name is unknown.
    """
    return GROWTH_METHODS[EARLIER_NAMES.get(name, name)]


def _share(copies: Tensor, old: Tensor, place: slice, before: int, std: float, generator: torch.Generator) -> None:
    """Write ``old / r + E_j`` into r copies (n, r, ...), with random E_j that sum to zero."""
    count = copies.shape[1]
    for part, spread in normal((before, *copies.shape[1:]), place, old, std, generator):
        spread.sub_(spread.mean(dim=1, keepdim=True)).mul_(math.sqrt(count / (count - 1)))
        whole, parts = old[part].to(spread.dtype), copies[part]
        parts.copy_(spread.add_(whole[:, None] / count))
        parts[:, -1] = whole - parts[:, :-1].to(spread.dtype).sum(dim=1)  # the sum is exact despite rounding


def check_rows(axis: Axis, rows: Rows, method: GrowthMethod, name: str) -> None:
    """Check that a growth preserves the function of a part and that its new units are trainable.

    Raises:
        UserError: If it does not, or they are not.
    """
    appended = rows.after > rows.copies * rows.before
    if method.exact and appended and not axis.zero_exact:
        raise UserError(
            f"method: zero keys change the output under score_norm 'softmax' or expert_groups (layer {name!r} got "
            f"{rows.before} -> {rows.after} tokens, expected a multiple of {rows.before} with 'split')"
        )
    if appended and not any(method.std(axis, tensor) for tensor in axis.tensors if tensor.role != OWN):
        raise UserError(
            f"method: new {axis.kind} of {name!r} would have zero input and output weights, and never train"
        )

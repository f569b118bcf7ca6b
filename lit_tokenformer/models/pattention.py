"""Pattention: attention of data tokens over trainable key and value parameter tokens.

Source: Wang et al., "TokenFormer", arXiv 2410.23168, eq. 4 and appendix A, eq. 16. Differences from the published code:
the scale ``tau`` is a buffer instead of the square root of the *current* number of tokens, so that tokens can be
appended without changing the layer's function; a row of zero scores yields zeros instead of NaN; the ``softmax`` form
subtracts the maximum, so that it cannot overflow.

Shapes: B batch, T data tokens, N parameter tokens. ``...`` is any number of leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.models.axes import IN, OUT, OWN, Axis, AxisTensor, follow_sizes
from lit_tokenformer.models.config import KINDS, OTHER
from lit_tokenformer.models.part_cost import Cost, part_cost
from lit_tokenformer.models.pattention_kernels import l2_gelu, l2_scale
from lit_tokenformer.models.token_groups import BASE, Gate, gated_sum
from lit_tokenformer.registry import SCORE_NORMS

Activation = Callable[[Tensor], Tensor]


SERIES_STD = 0.02
"""Initial standard deviation of the scales of a series, except for the first term's."""


class ScoreNorm(NamedTuple):
    """Score normalization of Pattention.

    Args:
        function: ``(scores, tau, activation) -> weights``, (..., N) each.
        zero_keys_exact: Whether a parameter token with a zero key has no effect on the output.
        whole: Fused Pattention with GELU, ``(x, K, V, tau) -> y``; ``None`` without one.
    """

    function: Callable[[Tensor, Tensor, Activation], Tensor]
    zero_keys_exact: bool
    whole: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None


def _l2_gelu(scores: Tensor, tau: Tensor, activation: Activation) -> Tensor:
    return activation((scores * l2_scale(scores, tau)).to(scores.dtype))


def _gelu_l2(scores: Tensor, tau: Tensor, activation: Activation) -> Tensor:
    activated = activation(scores)
    return (activated * l2_scale(activated, tau)).to(scores.dtype)


def _softmax(scores: Tensor, tau: Tensor, activation: Activation) -> Tensor:
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return (tau.square() * scores.softmax(dim=-1, dtype=dtype)).to(scores.dtype)  # tau^2 = N


def _gelu(scores: Tensor, tau: Tensor, activation: Activation) -> Tensor:
    return activation(scores)


SCORE_NORMS.register("l2_gelu")(ScoreNorm(_l2_gelu, zero_keys_exact=True, whole=l2_gelu))
SCORE_NORMS.register("gelu_l2")(ScoreNorm(_gelu_l2, zero_keys_exact=True))
SCORE_NORMS.register("softmax")(ScoreNorm(_softmax, zero_keys_exact=False))  # exp(0) = 1: a zero key has weight
SCORE_NORMS.register("gelu")(ScoreNorm(_gelu, zero_keys_exact=True))


def series_activation(x: Tensor, scale: Tensor, shift: Tensor, activation: Activation = F.gelu) -> Tensor:
    """Series informed activation of PanGu-pi (arXiv 2312.17276, eq. 7): ``sum_i activation(a_i x + b_i)``.

    Args:
        x: Input, (..., N).
        scale: Scales a, (N, terms).
        shift: Shifts b, (N, terms).
        activation: Activation of each term.

    Returns:
        (..., N).
    """
    terms = zip(scale.to(x.dtype).unbind(dim=1), shift.to(x.dtype).unbind(dim=1), strict=True)
    return sum((activation(x * a + b) for a, b in terms), start=torch.zeros((), dtype=x.dtype, device=x.device))


def new_series(size: int, terms: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Initialize scale and shift of a series near the plain activation, (size, terms) each.

    The first term is the plain activation (a = 1); the others start with a ~ N(0, SERIES_STD); every b is 0.
    """
    scale, shift = torch.empty(size, terms), torch.zeros(size, terms)
    nn.init.normal_(scale, std=SERIES_STD)
    scale[:, 0] = 1.0
    return nn.Parameter(scale), nn.Parameter(shift)


def series_tensors(scale: str, shift: str) -> list[AxisTensor]:
    """Declare scale and shift of a series along an axis; the series of a new unit starts near the plain activation."""

    def settle(new: Tensor) -> None:
        new[:, 0] = 1.0

    return [AxisTensor(scale, 0, OWN, SERIES_STD, settle), AxisTensor(shift, 0, OWN, 0.0)]


def pattention(
    x: Tensor,
    key_tokens: Tensor,
    value_tokens: Tensor,
    tau: Tensor,
    score_norm: str = "l2_gelu",
    activation: Activation = F.gelu,
) -> Tensor:
    """Attend from data tokens ``x`` to parameter tokens: ``y = norm(x K^T) V``.

    Args:
        x: Data tokens, (..., D_in).
        key_tokens: Key parameter tokens K, (N, D_in); with tensor parallelism, K and V are sharded by rows.
        value_tokens: Value parameter tokens V, (N, D_out).
        tau: Scale of the normalized scores, (); initially sqrt(N).
        score_norm: Score normalization, a name in ``SCORE_NORMS``.
        activation: Replacement of GELU in score normalizations with an activation.

    Returns:
        (..., D_out).

    Example:
        >>> one = torch.ones(1, 2)
        >>> pattention(one, one, one, torch.tensor(1.0))
        tensor([[0.8413, 0.8413]])
    """
    norm = SCORE_NORMS[score_norm]
    if isinstance(key_tokens, DTensor):  # one all-reduce of a scalar per data token for the norm, one of the output
        whole = DTensor.from_local(x, key_tokens.device_mesh, [Replicate()], run_check=False)
        weights = norm.function(F.linear(whole, key_tokens), tau, activation)
        shared: DTensor = weights @ value_tokens  # type: ignore[assignment]
        return shared.redistribute(placements=[Replicate()]).to_local()
    if norm.whole is not None and activation is F.gelu:
        return norm.whole(x, key_tokens, value_tokens, tau)
    weights = norm.function(F.linear(x, key_tokens), tau, activation)  # (..., N)
    return weights @ value_tokens  # (..., D_out)


class Pattention(nn.Module):
    """Projection by attention over parameter tokens; more tokens can be appended at any time.

    A checkpoint with another number of tokens can be loaded: the layer adopts its size. The layer can hold further
    groups of tokens, see :mod:`~lit_tokenformer.models.token_groups`; without them it is the published layer.

    Args:
        dim_in: Input dimension, D_in.
        dim_out: Output dimension, D_out.
        num_tokens: Number of parameter tokens, N.
        score_norm: Score normalization, a name in ``SCORE_NORMS``; ``l2_gelu`` is the published one.
        kind: Kind of parameter tokens in growth schedules (``qkv``, ``proj``, ``ffn``); ``None`` for ``other``. Tokens
            of a group are of a kind of their own, such as ``ffn:docs``.
        key_std: Initial standard deviation of key tokens.
        value_std: Initial standard deviation of value tokens, also of tokens appended later.
        series: Terms of a series informed activation in place of GELU; 1 is GELU itself.

    Attributes:
        key_tokens: Key parameter tokens, (N, D_in).
        value_tokens: Value parameter tokens, (N, D_out).
        scale_tokens: Scales of the series, (N, series); ``None`` for GELU itself.
        shift_tokens: Shifts of the series, (N, series); ``None`` for GELU itself.
        tau: Scale of the normalized scores, (); float32 or wider in any precision, so that growth is exact.
        groups: Further groups of tokens by name, each a layer of its own; ``None`` without groups.
        gate: Gate of the groups, including the layer's own tokens; ``None`` without groups.

    Raises:
        UserError: If ``num_tokens`` < 1, ``score_norm`` is unknown, or a series is set without an activation.

    Example:
        >>> Pattention(8, 16, num_tokens=4)(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 16])
    """

    PARTS = ("key_tokens", "value_tokens", "scale_tokens", "shift_tokens")
    """Parameters with one row per parameter token."""
    appendable = True
    """Whether tokens can be appended behind the others without a change of the function."""

    tau: Tensor
    scale_tokens: nn.Parameter | None
    shift_tokens: nn.Parameter | None

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        num_tokens: int,
        score_norm: str = "l2_gelu",
        kind: str | None = None,
        key_std: float = 0.02,
        value_std: float = 0.02,
        series: int = 1,
    ) -> None:
        super().__init__()
        if num_tokens < 1:
            raise UserError(f"num_tokens: expected at least 1, got {num_tokens}")
        if score_norm not in SCORE_NORMS:
            raise unknown_name("score_norm", score_norm, SCORE_NORMS)
        kind = OTHER if kind is None else kind
        if kind.partition(":")[0] not in (*KINDS, OTHER):
            raise unknown_name("kind", kind, (*KINDS, OTHER))
        if series < 1 or (series > 1 and score_norm == "softmax"):
            raise UserError(f"series: expected at least 1, and 1 with score_norm 'softmax', got {series}")
        self.score_norm = score_norm
        self.series = series
        self.kind = kind
        self.key_std = key_std
        self.value_std = value_std
        self.key_tokens = nn.Parameter(torch.empty(num_tokens, dim_in))
        self.value_tokens = nn.Parameter(torch.empty(num_tokens, dim_out))
        scale, shift = new_series(num_tokens, series) if series > 1 else (None, None)
        self.register_parameter("scale_tokens", scale)
        self.register_parameter("shift_tokens", shift)
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("tau", torch.tensor(math.sqrt(num_tokens), dtype=wide))
        self.groups: nn.ModuleDict | None = None
        self.gate: Gate | None = None
        self.reset_parameters()
        follow_sizes(self)

    @property
    def num_tokens(self) -> int:
        """Current number of parameter tokens, N."""
        return self.key_tokens.shape[0]

    def axes(self) -> list[Axis]:
        """Declare the axis of parameter tokens."""
        tensors = [
            AxisTensor("key_tokens", 0, IN, self.key_std),
            AxisTensor("value_tokens", 0, OUT, self.value_std),
        ]
        if self.scale_tokens is not None:
            tensors += series_tensors("scale_tokens", "shift_tokens")
        exact = SCORE_NORMS[self.score_norm].zero_keys_exact and self.appendable
        return [Axis(self.kind, tuple(tensors), tau=self.tau, zero_exact=exact)]

    def output_units(self, name: str) -> list[AxisTensor]:
        """Declare the tensor indexed by output: the columns of the values."""
        return [AxisTensor(f"{name}.value_tokens", 1, IN, self.value_std)]

    def input_units(self, name: str) -> list[AxisTensor]:
        """Declare the tensor indexed by input: the columns of the keys."""
        return [AxisTensor(f"{name}.key_tokens", 1, OUT, self.key_std)]

    def outputs(self) -> list[nn.Parameter]:
        """Parameters that scale the output; with all of them zero, the output is zero."""
        groups: Any = (self.groups or {}).values()
        return [self.value_tokens, *(one for group in groups for one in group.outputs())]

    def cost(self, length: int) -> Cost:
        """Cost per data token; activation checkpointing recomputes the last product of the fused form."""
        total, (dim_in, dim_out) = self.num_tokens, (self.key_tokens.shape[1], self.value_tokens.shape[1])
        by_hand = SCORE_NORMS[self.score_norm].whole is not None and self.series == 1
        kept = total + 1 if by_hand else (2 + self.series) * total  # scores, normalized scores, weights
        spared = 0 if by_hand else 2 * total * dim_out
        own = sum(parameter.numel() for parameter in self.parameters(recurse=False))
        whole = Cost(own, 2 * total * (dim_in + dim_out), dim_in + kept)
        for group in (self.groups or {}).values():
            cost = part_cost(group, length)
            whole, spared = whole + replace(cost, kept=cost.kept - dim_in), spared + cost.spared  # of the same input
        return replace(whole, spared=spared)

    def no_weight_decay(self) -> set[str]:
        """Parameter names without weight decay: those of a series."""
        return {"scale_tokens", "shift_tokens"} if self.series > 1 else set()

    def reset_parameters(self) -> None:
        """Reinitialize all tokens: keys N(0, key_std), values N(0, value_std), tau sqrt(N)."""
        nn.init.normal_(self.key_tokens, std=self.key_std)
        nn.init.normal_(self.value_tokens, std=self.value_std)
        if self.series > 1:
            for part, fresh in zip(
                ("scale_tokens", "shift_tokens"), new_series(self.num_tokens, self.series), strict=True
            ):
                getattr(self, part).data.copy_(fresh)
        self.tau.fill_(math.sqrt(self.num_tokens))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        if self.groups is None or self.gate is None:
            return self.attend(x)
        return gated_sum(x, {BASE: self.attend, **self.groups}, self.gate)

    def attend(self, x: Tensor) -> Tensor:
        """Attend to the layer's own tokens, without further groups, (..., D_in) -> (..., D_out)."""
        return pattention(x, self.key_tokens, self.value_tokens, self.tau, self.score_norm, self.activation)

    @property
    def activation(self) -> Activation:
        """GELU, or its series."""
        if self.scale_tokens is None or self.shift_tokens is None:
            return F.gelu
        return partial(series_activation, scale=self.scale_tokens, shift=self.shift_tokens)

    def extra_repr(self) -> str:
        return (
            f"{self.key_tokens.shape[1]}, {self.value_tokens.shape[1]}, num_tokens={self.num_tokens}, "
            f"score_norm={self.score_norm!r}, kind={self.kind!r}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Pattention:
        before = self.tau
        super()._apply(fn, recurse)
        if self.tau.dtype.itemsize < 4:  # a half-precision tau would be off by up to 0.4 %
            self.tau = before.to(self.tau.device)
        return self

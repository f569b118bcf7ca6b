"""Feed-forward layers: pointwise, except RWKV's channel mix with its token shift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lit_tokenformer.errors import UserError
from lit_tokenformer.models.axes import Axis, AxisTensor, follow_sizes, input_units, output_units
from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.models.experts import Experts, Grouped
from lit_tokenformer.models.mixers import Context, RecurrentState, layer_ratios, mixed, token_shift
from lit_tokenformer.models.part_cost import Cost, count_parameters, part_cost, same_input_cost
from lit_tokenformer.models.pattention import Pattention, new_series, series_activation, series_tensors
from lit_tokenformer.models.projections import make_projection, pattention_value_std
from lit_tokenformer.registry import ACTIVATIONS, FEED_FORWARDS

ACTIVATIONS.register("gelu")(F.gelu)
ACTIVATIONS.register("gelu_tanh")(partial(F.gelu, approximate="tanh"))
ACTIVATIONS.register("silu")(F.silu)
ACTIVATIONS.register("relu")(F.relu)


class Activation(nn.Module):
    """Activation, or a series of it (PanGu-pi, arXiv 2312.17276, eq. 7) with a scale and shift per channel.

    Args:
        config: Architecture, with the activation's name and number of terms.
    """

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__()
        self.function = ACTIVATIONS[config.activation]
        self.series = config.series
        if config.series > 1:
            self.scale, self.shift = new_series(config.mlp_hidden, config.series)
        self._hidden = config.mlp_hidden

    def cost(self, length: int) -> Cost:
        """Cost per data token."""
        return Cost(count_parameters(self), 0, self._hidden * self.series)

    def units(self, name: str) -> list[AxisTensor]:
        """Tensors indexed by channel; none without a series."""
        return series_tensors(f"{name}.scale", f"{name}.shift") if self.series > 1 else []

    def no_weight_decay(self) -> set[str]:
        """Parameter names without weight decay."""
        return {"scale", "shift"} if self.series > 1 else set()

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_hidden) -> (..., D_hidden)."""
        return series_activation(x, self.scale, self.shift, self.function) if self.series > 1 else self.function(x)


class FeedForward(nn.Module):
    """Base class of feed-forwards, (B, T, D) -> (B, T, D).

    A feed-forward declares ``output_layer``, the layer that writes to the residual stream, and its ``cost``. One with a
    static method ``grouped(experts, x, groups)`` computes several copies of itself at once, each for its own rows.

    Attributes:
        pointwise: Whether each output depends on its own data token only.
        aux_losses: Names of the auxiliary losses that the feed-forward adds in training by ``Context.add_loss``.
    """

    pointwise = True
    aux_losses: tuple[str, ...] = ()

    def new_state(self, length: int) -> RecurrentState | None:
        """Create a decoding state; ``None``, since a pointwise layer needs none."""
        return None

    def forward(self, x: Tensor, context: Context = Context(), state: RecurrentState | None = None) -> Tensor:  # noqa: B008
        """(B, T, D) -> (B, T, D)."""
        raise NotImplementedError


@FEED_FORWARDS.register("pattention")
class PattentionFeedForward(Pattention):
    """One Pattention layer as the whole feed-forward (arXiv 2410.23168, eq. 10).

    Args:
        config: Architecture.
        layer: Index of the block; unused.
    """

    pointwise = True
    new_state = FeedForward.new_state

    def __init__(self, config: TokenformerConfig, layer: int = 0) -> None:
        super().__init__(
            config.dim,
            config.dim,
            num_tokens=config.tokens.ffn,
            score_norm=config.score_norm,
            kind="ffn",
            key_std=0.02,
            value_std=pattention_value_std(config),
            series=config.series,
        )
        self.dropout = nn.Dropout(config.dropout)

    @property
    def output_layer(self) -> nn.Module:
        """Layer that writes to the residual stream: the layer itself."""
        return self

    def cost(self, length: int) -> Cost:
        """Cost per data token."""
        return _with_dropout(super().cost(length), self.dropout)

    def forward(self, x: Tensor, context: Context = Context(), state: RecurrentState | None = None) -> Tensor:  # noqa: B008
        """(B, T, D) -> (B, T, D)."""
        return self.dropout(super().forward(x))

    @staticmethod
    def grouped(experts: Sequence[PattentionFeedForward], x: Tensor, groups: Grouped) -> Tensor:
        """Apply each expert to its rows, (M, D) -> (M, D)."""
        return experts[0].dropout(groups.project(experts, x))


@FEED_FORWARDS.register("mlp")
class MLP(FeedForward):
    """MLP: two projections with an activation between them.

    Args:
        config: Architecture.
        layer: Index of the block; unused.
    """

    def __init__(self, config: TokenformerConfig, layer: int = 0) -> None:
        super().__init__()
        self.fc1 = make_projection(config, "ffn", config.dim, config.mlp_hidden)
        self.activation = Activation(config)
        self.fc2 = make_projection(config, "ffn", config.mlp_hidden, config.dim, residual=True)
        self.dropout = nn.Dropout(config.dropout)
        follow_sizes(self)

    def axes(self) -> list[Axis]:
        """Declare the axis of hidden units."""
        reads, writes = output_units("fc1", self.fc1), input_units("fc2", self.fc2)
        return [Axis("hidden", (*reads, *self.activation.units("activation"), *writes))]

    @property
    def output_layer(self) -> nn.Module:
        """Layer that writes to the residual stream."""
        return self.fc2

    def cost(self, length: int) -> Cost:
        """Cost per data token."""
        parts = (part_cost(part, length) for part in (self.fc1, self.activation, self.fc2))
        return _with_dropout(sum(parts, start=Cost()), self.dropout)

    def forward(self, x: Tensor, context: Context = Context(), state: RecurrentState | None = None) -> Tensor:  # noqa: B008
        """(B, T, D) -> (B, T, D)."""
        return self.dropout(self.fc2(self.activation(self.fc1(x))))

    @staticmethod
    def grouped(experts: Sequence[MLP], x: Tensor, groups: Grouped) -> Tensor:
        """Apply each expert to its rows, (M, D) -> (M, D)."""
        hidden = experts[0].activation(groups.project([one.fc1 for one in experts], x))
        return experts[0].dropout(groups.project([one.fc2 for one in experts], hidden))


@FEED_FORWARDS.register("glu")
class GLU(FeedForward):
    """Gated linear unit (arXiv 2002.05202, section 2): ``down(activation(gate x) * up x)``.

    MosaicBERT uses ``gelu``; PanGu-pi uses ``silu`` with a series.

    Args:
        config: Architecture.
        layer: Index of the block; unused.
    """

    def __init__(self, config: TokenformerConfig, layer: int = 0) -> None:
        super().__init__()
        self._dim, self._hidden = config.dim, config.mlp_hidden
        self.gate = make_projection(config, "ffn", config.dim, config.mlp_hidden, bias=False)
        self.up = make_projection(config, "ffn", config.dim, config.mlp_hidden, bias=False)
        self.activation = Activation(config)
        self.dropout = nn.Dropout(config.dropout)
        self.down = make_projection(config, "ffn", config.mlp_hidden, config.dim, residual=True)
        follow_sizes(self)

    def axes(self) -> list[Axis]:
        """Declare the axis of hidden units."""
        reads = output_units("gate", self.gate) + output_units("up", self.up)
        return [Axis("hidden", (*reads, *self.activation.units("activation"), *input_units("down", self.down)))]

    @property
    def output_layer(self) -> nn.Module:
        """Layer that writes to the residual stream."""
        return self.down

    def cost(self, length: int) -> Cost:
        """Cost per data token; both factors of the hidden units are saved for backward."""
        into = same_input_cost(self._dim, length, self.gate, self.up)
        hidden = self.activation.cost(length) + Cost(kept=2 * self._hidden)
        return into + hidden + part_cost(self.down, length)

    def forward(self, x: Tensor, context: Context = Context(), state: RecurrentState | None = None) -> Tensor:  # noqa: B008
        """(B, T, D) -> (B, T, D)."""
        return self.down(self.dropout(self.activation(self.gate(x)) * self.up(x)))

    @staticmethod
    def grouped(experts: Sequence[GLU], x: Tensor, groups: Grouped) -> Tensor:
        """Apply each expert to its rows, (M, D) -> (M, D)."""
        gate, up = (groups.project([getattr(one, name) for one in experts], x) for name in ("gate", "up"))
        hidden = experts[0].dropout(experts[0].activation(gate) * up)
        return groups.project([one.down for one in experts], hidden)


@FEED_FORWARDS.register("channel_mix", causal=(True,), unpad=(False,), series=(1,))
class ChannelMix(FeedForward):
    """RWKV-4's channel mix: ``sigmoid(R x_r) * V relu(K x_k)^2``, with token-shifted inputs x_r and x_k.

    Source: arXiv 2305.13048, eq. 18-20.

    Args:
        config: Architecture.
        layer: Index of the block; the initial token shift depends on it.
    """

    pointwise = False

    def __init__(self, config: TokenformerConfig, layer: int = 0) -> None:
        super().__init__()
        _, to_zero, place = layer_ratios(config, layer)
        self._dim, self._hidden = config.dim, config.mlp_hidden
        self.mix_key = nn.Parameter(place**to_zero)
        self.mix_receptance = nn.Parameter(place**to_zero)
        self.key = make_projection(config, "ffn", config.dim, config.mlp_hidden)
        self.value = make_projection(config, "ffn", config.mlp_hidden, config.dim, residual=True, zero=True)
        self.receptance = make_projection(config, "ffn", config.dim, config.dim, zero=True)
        self.dropout = nn.Dropout(config.dropout)
        follow_sizes(self)

    def axes(self) -> list[Axis]:
        """Declare the axis of hidden units."""
        return [Axis("hidden", (*output_units("key", self.key), *input_units("value", self.value)))]

    @property
    def output_layer(self) -> nn.Module:
        """Layer that writes to the residual stream."""
        return self.value

    def cost(self, length: int) -> Cost:
        """Cost per data token; the gate needs the result of the last product."""
        parts = (part_cost(part, length) for part in (self.key, self.value, self.receptance))
        return sum(parts, start=Cost()) + Cost(2 * self._dim, 0, 2 * self._dim + self._hidden)

    def new_state(self, length: int) -> RecurrentState:
        """Create a recurrent state with the last data token."""
        return RecurrentState()

    def forward(self, x: Tensor, context: Context = Context(), state: RecurrentState | None = None) -> Tensor:  # noqa: B008
        """(B, T, D) -> (B, T, D)."""
        shifted = token_shift(x, context.present, state)
        hidden = self.key(mixed(x, shifted, self.mix_key)).relu().square()
        gate = self.receptance(mixed(x, shifted, self.mix_receptance)).sigmoid()
        return self.dropout(gate * self.value(hidden))


def _with_dropout(cost: Cost, dropout: nn.Dropout) -> Cost:
    """Cost of a layer followed by dropout, whose backward pass needs its input."""
    return replace(cost, spared=0) if dropout.p > 0 else cost


def make_feed_forward(config: TokenformerConfig, layer: int) -> nn.Module:
    """Create the feed-forward of block ``layer``, (B, T, D) -> (B, T, D); with several experts, all of them."""
    make = FEED_FORWARDS[config.parts_of(layer)[1]]
    if config.experts == 1:
        return make(config, layer)
    return with_experts([make(config, layer) for _ in range(config.experts)], config, partial(make, config, layer))


def with_experts(experts: Sequence[nn.Module], config: TokenformerConfig, shared: Callable[[], nn.Module]) -> Experts:
    """Put feed-forwards behind a router, with the shared experts of the config.

    Args:
        experts: Feed-forwards.
        config: Architecture.
        shared: Creates a shared expert.

    Raises:
        UserError: If a feed-forward is not pointwise, or too few for the experts of each data token.
    """
    check_experts(experts[0], len(experts), config)
    more = [shared() for _ in range(config.shared_experts)]
    return Experts(experts, config.dim, config.experts_top_k, more, config.experts_balance, config.expert_groups)


def check_experts(feed_forward: Any, experts: int, config: TokenformerConfig, setting: str = "experts") -> None:
    """Check that a feed-forward supports a number of experts.

    Raises:
        UserError: If it is not pointwise, there are fewer experts than each data token uses, or its tokens cannot be
            divided.
    """
    if not getattr(feed_forward, "pointwise", False):
        raise UserError(f"{setting}: {type(feed_forward).__name__} has no experts (expected a pointwise feed-forward)")
    groups = config.expert_groups
    if groups > 1 and (not isinstance(feed_forward, Pattention) or feed_forward.num_tokens % groups):
        tokens = feed_forward.num_tokens if isinstance(feed_forward, Pattention) else "no"
        raise UserError(f"expert_groups: {groups} shards of {tokens} tokens of {type(feed_forward).__name__}")
    if experts < config.experts_top_k:
        raise UserError(f"{setting}: expected at least experts_top_k {config.experts_top_k}, got {experts}")

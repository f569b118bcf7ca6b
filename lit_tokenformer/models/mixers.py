"""Token mixers: softmax attention and RWKV-4's time mix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_tokenformer.errors import UserError
from lit_tokenformer.models.axes import OWN, Axis, AxisTensor, follow_sizes, input_units, output_units
from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.models.part_cost import Cost, part_cost, same_input_cost
from lit_tokenformer.models.positions import Rotary, turn
from lit_tokenformer.models.projections import make_projection
from lit_tokenformer.models.wkv import WKVState, wkv
from lit_tokenformer.registry import MIXERS, POSITIONS


class Packing(NamedTuple):
    """Layout of a padded batch (B, T) packed into n data tokens without padding.

    Args:
        places: Index of each packed data token in the flattened batch, (n,) int64.
        batch: Number of sequences, B.
        length: Padded length, T.
        lengths: Data tokens of each sequence without padding, if attention runs per sequence; ``None`` if attention
            runs on the padded batch.
    """

    places: Tensor
    batch: int
    length: int
    lengths: list[int] | None = None

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (1, n, ...)."""
        return x.flatten(0, 1).index_select(0, self.places)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, n, ...) -> (B, T, ...), with zeros at the padding."""
        padded = x.new_zeros(self.batch * self.length, *x.shape[2:]).index_copy(0, self.places, x[0])
        return padded.unflatten(0, (self.batch, self.length))


class Attend(Protocol):
    """Attention function: queries (B, H, T, d), keys and values (B, H', S, d) -> (B, T, H, d)."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float) -> Tensor: ...


class Context(NamedTuple):
    """Per-batch context shared by all blocks.

    Args:
        rotary: Rotary angles of the positions; ``None`` without rotary positions.
        mask: Attention mask, bool or additive, (B, 1 | H, T, S), or (1, ...) for the whole batch; ``None`` applies
            ``causal`` alone.
        causal: Whether attention is causal; ignored with a mask.
        start: Data tokens of the sequence already in the decoding state, S - T.
        present: Mask of the data tokens that are not padding, (B, T, 1) bool; ``None`` for all.
        packing: Layout of a packed batch; ``None`` for a batch (B, T).
        aux_losses: Auxiliary losses by name, () each, accumulated by the parts; ``None`` disables their collection.
        attend: Attention function that applies ``mask``; ``None`` for torch's.
    """

    rotary: Rotary | None = None
    mask: Tensor | None = None
    causal: bool = False
    start: int = 0
    present: Tensor | None = None
    packing: Packing | None = None
    aux_losses: dict[str, Tensor] | None = None
    attend: Attend | None = None

    def add_loss(self, name: str, loss: Tensor) -> None:
        """Add an auxiliary loss to the training loss; losses of the same name are summed over the blocks.

        Args:
            name: Name of the loss, logged as ``train/aux/NAME``; declared by the part in its attribute ``aux_losses``.
            loss: Weighted loss, ().
        """
        if self.aux_losses is not None:
            self.aux_losses[name] = self.aux_losses[name] + loss if name in self.aux_losses else loss

    def alone(self, number: int, length: int) -> Context:
        """Slice the context for sequence ``number`` alone, with ``length`` data tokens and no padding."""
        rotary, mask = self.rotary, self.mask
        if rotary is not None:
            rotary = rotary[0][..., :length, :], rotary[1][..., :length, :]
        if mask is not None:
            mask = mask[number % len(mask), None, :, :length, :length]  # (1, 1 | H, T, T)
        return self._replace(rotary=rotary, mask=mask, packing=None)


class KeyValueCache:
    """KV cache of one attention layer, allocated once.

    Args:
        length: Capacity in data tokens.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def append(self, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, H, T, d) at ``start``; return all up to the end, (B, H, start + T, d)."""
        if self.key is None or self.value is None:
            shape = (*key.shape[:2], self.length, key.shape[3])
            self.key, self.value = key.new_empty(shape), value.new_empty(shape)
        end = start + key.shape[2]
        self.key[:, :, start:end] = key
        self.value[:, :, start:end] = value
        return self.key[:, :, :end], self.value[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Select sequences by index (B',), in place."""
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key.index_select(0, rows), self.value.index_select(0, rows)

    def crop(self, length: int) -> None:
        """Keep the first data tokens; later ones are overwritten by :meth:`append`."""


class Mixer(nn.Module):
    """Base class of token mixers, (B, T, D) -> (B, T, D).

    A mixer is constructed as ``(config, layer)``: the architecture and the index of the block. It declares
    ``output_layer``, the layer that writes to the residual stream, and its ``cost``.

    Attributes:
        uses_mask: Whether data tokens interact only as ``Context.mask`` and ``Context.causal`` allow.
        aux_losses: Names of the auxiliary losses that the mixer adds in training by :meth:`Context.add_loss`.
    """

    uses_mask = False
    aux_losses: tuple[str, ...] = ()

    def new_state(self, length: int) -> Any:
        """Create a decoding state for at most ``length`` data tokens.

        Raises:
            UserError: If the mixer does not define a decoding state.
        """
        raise UserError(f"mixer: {type(self).__name__} has no decoding state, so the model cannot generate")

    def forward(self, x: Tensor, context: Context = Context(), state: Any = None) -> Tensor:  # noqa: B008
        """(B, T, D) -> (B, T, D)."""
        raise NotImplementedError


@MIXERS.register("attention")
class Attention(Mixer):
    """Multi-head softmax attention with separate query, key, value and output projections.

    Source: arXiv 2410.23168, eq. 6-8; the scale is 1/sqrt(d). Grouped queries: arXiv 2305.13245, section 2.2.

    Args:
        config: Architecture.
        layer: Index of the block; unused.
    """

    uses_mask = True

    def __init__(self, config: TokenformerConfig, layer: int = 0) -> None:
        super().__init__()
        dim, inner = config.dim, config.num_heads * config.head_width
        self.head_dim = config.head_width
        self._kind, units = config.head_units
        self._queries = config.num_heads // units  # per key and value head
        self.query = make_projection(config, "qkv", dim, inner)
        self.key = make_projection(config, "qkv", dim, units * self.head_dim)
        self.value = make_projection(config, "qkv", dim, units * self.head_dim)
        self.proj = make_projection(config, "proj", inner, dim, residual=True)
        self._dim, self._inner, self._key_width = dim, inner, units * self.head_dim
        self.attn_dropout = config.attn_dropout
        self.dropout = nn.Dropout(config.dropout)
        self._has_slopes = POSITIONS[config.positions].bias is not None
        if self._has_slopes:  # part of the state dict once heads have grown
            self.register_buffer("slope_of_head", torch.arange(config.num_heads), persistent=False)
        follow_sizes(self)

    def axes(self) -> list[Axis]:
        """Declare the axis of attention heads; of key and value heads with their queries, if these are grouped."""
        group = self._queries * self.head_dim
        blocks = {"query": group, "key": self.head_dim, "value": self.head_dim}
        reads = [replace(unit, block=blocks[n]) for n in blocks for unit in output_units(n, getattr(self, n))]
        units = [*reads, *(replace(unit, block=group) for unit in input_units("proj", self.proj))]
        slopes = [AxisTensor("slope_of_head", 0, OWN, 0.0, block=self._queries)] if self._has_slopes else []
        return [Axis(self._kind, (*units, *slopes))]

    @property
    def output_layer(self) -> nn.Module:
        """Layer that writes to the residual stream."""
        return self.proj

    def cost(self, length: int) -> Cost:
        """Cost per data token; queries, keys, values and the attention output are saved for backward."""
        into = same_input_cost(self._dim, length, self.query, self.key, self.value)
        kept = 2 * (self._inner + self._key_width)
        return into + Cost(0, 4 * length * self._inner, kept) + part_cost(self.proj, length)

    def new_state(self, length: int) -> KeyValueCache:
        """Create a KV cache."""
        return KeyValueCache(length)

    def forward(self, x: Tensor, context: Context = Context(), state: KeyValueCache | None = None) -> Tensor:  # noqa: B008
        """(B, T, D) -> (B, T, D); with a state, data tokens also attend to those in the KV cache."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        packing = context.packing
        if packing is None:
            mixed = self._attend(query, key, value, context, state)
        elif packing.lengths is None:
            unpack = packing.unpack
            mixed = packing.pack(self._attend(unpack(query), unpack(key), unpack(value), context))
        else:
            split = zip(*(one.split(packing.lengths, dim=1) for one in (query, key, value)), strict=True)
            alone = [self._attend(q, k, v, context.alone(i, q.shape[1])) for i, (q, k, v) in enumerate(split)]
            mixed = torch.cat(alone, dim=1)
        return self.dropout(self.proj(mixed))  # (B, T, D)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: Context, state: KeyValueCache | None = None
    ) -> Tensor:
        """Attend: queries (B, T, H d), keys and values (B, T, H' d) -> (B, T, H d)."""
        split = (*query.shape[:2], -1, self.head_dim)
        query = query.view(split).transpose(1, 2)  # (B, H, T, d)
        key = key.view(split).transpose(1, 2)  # (B, H', T, d)
        value = value.view(split).transpose(1, 2)  # (B, H', T, d)
        if context.rotary is not None:
            query, key = turn(query, context.rotary), turn(key, context.rotary)
        if state is not None:
            key, value = state.append(key, value, context.start)  # (B, H', S, d)
        if context.attend is not None:
            rate = self.attn_dropout if self.training else 0.0
            return context.attend(query, key, value, context.mask, rate).flatten(2)  # (B, T, H d)
        causal = context.causal and context.mask is None
        rate = self.attn_dropout if self.training else 0.0
        mask = (
            context.mask if context.mask is None or context.mask.dtype == torch.bool else context.mask.to(query.dtype)
        )
        grouped = {"enable_gqa": True} if self._queries > 1 else {}
        if state is not None and _is_slow(query):
            mixed = attend_wide(query, key, value, mask, **grouped)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, mask, rate, causal, **grouped)  # (B, H, T, d)
        return mixed.transpose(1, 2).flatten(2)  # (B, T, H d)


def _is_slow(query: Tensor) -> bool:
    """Check for a single query (B, H, 1, d) in half precision on a CPU, where torch's kernel is slow."""
    half = query.shape[2] == 1 and query.dtype.itemsize == 2 and query.device.type == "cpu"
    return half and not torch.is_autocast_enabled("cpu")


def attend_wide(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **grouped: bool) -> Tensor:
    """Attend in float32, one sequence after another, whose copies fit into the cache."""
    size = len(query) if torch.compiler.is_compiling() else 1
    wide = [one.float() if one.dtype.itemsize == 2 else one for one in (query, *([] if mask is None else [mask]))]
    masks = [None] * len(query) if mask is None else wide[1].expand(len(query), -1, -1, -1).split(size)
    parts = zip(wide[0].split(size), key.split(size), value.split(size), masks, strict=False)
    mixed = [F.scaled_dot_product_attention(q, k.float(), v.float(), m, **grouped) for q, k, v, m in parts]
    return torch.cat(mixed).to(query.dtype)


class RecurrentState:
    """Recurrent state of one RWKV layer; its size does not depend on the sequence length.

    Attributes:
        last: Input of the last data token, (B, 1, D), for the token shift.
        sums: Weighted sums of the WKV operator; ``None`` without one.
    """

    last: Tensor | None = None
    sums: WKVState | None = None

    def keep_last(self, last: Tensor) -> None:
        """Keep the input of the last data token, (B, 1, D)."""
        self.last = last

    def keep_sums(self, sums: WKVState) -> None:
        """Keep the sums after the last data token."""
        self.sums = sums

    def select(self, rows: Tensor) -> None:
        """Select sequences by index (B',), in place."""
        self.last = None if self.last is None else self.last.index_select(0, rows)
        self.sums = None if self.sums is None else type(self.sums)(*(one.index_select(0, rows) for one in self.sums))

    def crop(self, length: int) -> None:
        """Raise an error: earlier inputs are not kept.

        Raises:
            UserError: Always.
        """
        raise UserError(f"state: a recurrent state cannot be cropped (to {length} data tokens)")


def token_shift(x: Tensor, present: Tensor | None, state: RecurrentState | None) -> Tensor:
    """Shift the sequence by one data token, (B, T, D) -> (B, T, D); zeros before the first.

    Args:
        x: Inputs.
        present: Mask of the data tokens that are not padding, (B, T, 1) bool; ``None`` for all.
        state: Recurrent state with the last input, updated in place.
    """
    if present is not None:
        x = x * present
    before = state.last if state is not None and state.last is not None else torch.zeros_like(x[:, :1])
    shifted = torch.cat([before, x[:, :-1]], dim=1)
    if state is not None:
        state.keep_last(x[:, -1:])
    return shifted


def mixed(x: Tensor, shifted: Tensor, share: Tensor) -> Tensor:
    """Interpolate between the previous data token and the current one, with weight ``share`` (D,) on the latter."""
    return torch.lerp(shifted, x, share.to(x.dtype))


def layer_ratios(config: TokenformerConfig, layer: int) -> tuple[float, float, Tensor]:
    """Relative depth of a block, as 0 to 1 and as 1 to 1/L, and relative index of each channel, (D,) in [0, 1)."""
    layer = min(layer, config.depth - 1)  # after a growth in depth
    return layer / max(config.depth - 1, 1), 1 - layer / config.depth, torch.arange(config.dim) / config.dim


@MIXERS.register("wkv", stem=("token",), positions=("none",), causal=(True,), unpad=(False,))
class TimeMix(Mixer):
    """RWKV-4's time mix: a gated average of past values with exponentially decaying weights.

    Source: arXiv 2305.13048, eq. 11-17; initialization of the official code (RWKV-v4neo). Exponentials are computed in
    float32 or wider.

    Args:
        config: Architecture.
        layer: Index of the block; initial decay and token shift depend on it.
    """

    def __init__(self, config: TokenformerConfig, layer: int = 0) -> None:
        super().__init__()
        dim = config.dim
        to_one, to_zero, place = layer_ratios(config, layer)
        channel = torch.arange(dim)
        steps = channel / max(dim - 1, 1)
        self.time_decay = nn.Parameter(-5 + 8 * steps ** (0.7 + 1.3 * to_one))
        self.time_first = nn.Parameter(torch.full((dim,), 0.3).log() + 0.5 * ((channel + 1) % 3 - 1))
        self.mix_key = nn.Parameter(place**to_zero)
        self.mix_value = nn.Parameter(place**to_zero + 0.3 * to_one)
        self.mix_receptance = nn.Parameter(place ** (0.5 * to_zero))
        self.key = make_projection(config, "qkv", dim, dim, zero=True)
        self.value = make_projection(config, "qkv", dim, dim)
        self.receptance = make_projection(config, "qkv", dim, dim, zero=True)
        self.proj = make_projection(config, "proj", dim, dim, residual=True, zero=True)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def output_layer(self) -> nn.Module:
        """Layer that writes to the residual stream."""
        return self.proj

    def cost(self, length: int) -> Cost:
        """Cost per data token; two shifted inputs, key, value, two sums, the gate twice and its product are saved."""
        dim = len(self.mix_key)
        into = same_input_cost(dim, length, self.key, self.value, self.receptance)
        return into + Cost(5 * dim, 0, 9 * dim) + part_cost(self.proj, length)

    def new_state(self, length: int) -> RecurrentState:
        """Create a recurrent state."""
        return RecurrentState()

    def lr_scales(self) -> dict[str, float]:
        """Learning-rate multipliers of the official code, by parameter name."""
        return {"time_decay": 2.0, "time_first": 3.0}

    def forward(self, x: Tensor, context: Context = Context(), state: RecurrentState | None = None) -> Tensor:  # noqa: B008
        """(B, T, D) -> (B, T, D); with a state, continues from it."""
        shifted = token_shift(x, context.present, state)
        key = self.key(mixed(x, shifted, self.mix_key))
        value = self.value(mixed(x, shifted, self.mix_value))
        gate = self.receptance(mixed(x, shifted, self.mix_receptance)).sigmoid()
        if context.present is not None:
            key, value = key.masked_fill(~context.present, -torch.inf), value * context.present
        averaged, sums = wkv(self.time_decay, self.time_first, key, value, None if state is None else state.sums)
        if state is not None:
            state.keep_sums(sums)
        return self.dropout(self.proj(gate * averaged))


def make_mixer(config: TokenformerConfig, layer: int) -> nn.Module:
    """Create the mixer of block ``layer``, (B, T, D) -> (B, T, D)."""
    return MIXERS[config.parts_of(layer)[0]](config, layer)

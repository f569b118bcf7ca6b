"""Graphs of a model for inference engines: named inputs and outputs, with dynamic batch and length.

Names follow Hugging Face's exporters: ``pixel_values``, ``input_ids``, ``attention_mask``, ``logits``, and
``past_key_values.N.key`` in, ``present.N.key`` out. Every state of a decoder starts as zeros, a KV cache with length 0.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, export

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.models import Tokenformer
from lit_tokenformer.models.mixers import KeyValueCache, RecurrentState
from lit_tokenformer.models.wkv import EMPTY, WKVState

Axes = tuple[int | str, ...]
"""Shape with the names of dynamic axes: ``batch``, ``length``, ``past`` and ``total`` (past and new data tokens)."""


class Graph(nn.Module):
    """Model as a function of tensors, in the order of ``inputs`` and ``outputs``.

    Args:
        model: Model in evaluation mode.
        function: ``(model, *inputs) -> outputs``.
        inputs: Shape of each input, by name.
        outputs: Names of the outputs.
        example: Inputs for ``(batch, length, past)``.
        limits: Maximum of dynamic axes, by name.
    """

    def __init__(
        self,
        model: Tokenformer,
        function: Callable[..., tuple[Tensor, ...]],
        inputs: dict[str, Axes],
        outputs: Sequence[str],
        example: Callable[[int, int, int], tuple[Tensor, ...]],
        limits: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.function = function
        self.inputs = inputs
        self.outputs = list(outputs)
        self.example = example
        self.limits = limits or {}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs."""
        return self.function(self.model, *inputs)

    @torch.no_grad()
    def trace(self) -> Any:
        """Trace a ``torch.export.ExportedProgram``; a part that fixes a dynamic axis raises."""
        names = {axis for shape in self.inputs.values() for axis in shape if isinstance(axis, str)}
        dims = {name: Dim(name, max=self.limits.get(name)) for name in names}
        shapes = [{i: dims[axis] for i, axis in enumerate(shape) if axis in dims} for shape in self.inputs.values()]
        return export(self, self.example(2, 3, 4), dynamic_shapes=(tuple(shapes),))


def make_graph(model: Tokenformer, cache: bool | None = None) -> Graph:
    """Build the graph of a model.

    Args:
        model: Model of any size; its parameters are shared.
        cache: Whether a causal language model takes and returns its KV caches or recurrent states; ``None`` for yes.

    Raises:
        UserError: For a cache of a model that does not decode, or a model that cannot be exported.
    """
    model = _dense(model)
    if hasattr(model.stem, "image"):
        raise UserError(f"format: no graph for text after an image (got stem {model.config.stem!r})")
    if model.config.head not in _GRAPHS:
        raise unknown_name("head", model.config.head, _GRAPHS)
    return _GRAPHS[model.config.head](model, cache)


def _dense(model: Tokenformer) -> Tokenformer:
    """Return the model in evaluation mode without packing, which changes shapes and not outputs."""
    twin = copy.copy(model)  # with the same parameters
    twin.config = dataclasses.replace(model.config, unpad=False)
    return twin.eval()


def _image(model: Tokenformer, cache: bool | None) -> Graph:
    _no_cache(cache, "an image model")
    config = model.config
    size = config.image_size if isinstance(config.image_size, tuple) else (config.image_size,) * 2
    shape = (config.in_chans, *size)
    return Graph(
        model,
        lambda model, image: (model(image),),
        {"pixel_values": ("batch", *shape)},
        ["logits"],
        lambda batch, length, past: (torch.randn(batch, *shape, dtype=_dtype(model)),),
    )


def _masked(model: Tokenformer, cache: bool | None) -> Graph:
    _no_cache(cache, "a masked language model")

    def example(batch: int, length: int, past: int) -> tuple[Tensor, ...]:
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[0, 1:] = 0  # padding
        return _tokens(model, batch, length), mask

    return Graph(
        model,
        lambda model, tokens, mask: (model(tokens, lengths=mask.sum(1)),),
        {"input_ids": ("batch", "length"), "attention_mask": ("batch", "length")},
        ["logits"],
        example,
        _limits(model),
    )


def _causal(model: Tokenformer, cache: bool | None) -> Graph:
    if cache is None or cache:
        return _step(model) if _recurrent(model) else _cached(model)
    if _recurrent(model):
        raise UserError(
            "cache: false fixes the length of a recurrent model; its graph reads one data token at a time, with its "
            "states (expected true)"
        )
    return Graph(
        model,
        lambda model, tokens: (model(tokens),),
        {"input_ids": ("batch", "length")},
        ["logits"],
        lambda batch, length, past: (_tokens(model, batch, length),),
        _limits(model),
    )


_GRAPHS: dict[str, Callable[[Tokenformer, bool | None], Graph]] = {
    "image": _image,
    "language": _causal,
    "masked_language": _masked,
}
"""Graph of each head."""


def _cached(model: Tokenformer) -> Graph:
    """Read any number of data tokens after a KV cache of any length, with padding on the left."""

    def function(model: Tokenformer, tokens: Tensor, mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        padding = mask.shape[1] - mask.sum(1)
        return _continue(model, names, tokens, past, padding)

    def example(batch: int, length: int, past: int) -> tuple[Tensor, ...]:
        mask = torch.ones(batch, past + length, dtype=torch.int64)
        mask[0, 0] = 0  # padding
        return _tokens(model, batch, length), mask, *_states(model, batch, past).values()

    names = list(_states(model, 1, 1))
    return Graph(
        model,
        function,
        {"input_ids": ("batch", "length"), "attention_mask": ("batch", "total"), **_state_axes(model)},
        ["logits", *map(_present, names)],
        example,
    )


def _step(model: Tokenformer) -> Graph:
    """Read one data token after the recurrent states."""

    def function(model: Tokenformer, tokens: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        return _continue(model, names, tokens, past)

    names = list(_states(model, 1, 1))
    return Graph(
        model,
        function,
        {"input_ids": ("batch", 1), **_state_axes(model)},
        ["logits", *map(_present, names)],
        lambda batch, length, past: (_tokens(model, batch, 1), *_states(model, batch, past).values()),
    )


class _TracedCache(KeyValueCache):
    """KV cache that is extended out of place, from inputs of a graph."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value

    def append(self, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H, T, d) and return all, (B, H, P + T, d)."""
        before: Any = self.key, self.value
        self.key, self.value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
        return self.key, self.value


class _TracedState:
    """Decoding state of a graph, with a length that may be symbolic."""

    position_ids = None

    def __init__(self, blocks: list[Any], start: int, padding: Tensor | None) -> None:
        self.blocks, self.start, self.padding = blocks, start, padding

    def check(self, more: int, positions: bool = True) -> None:
        """Accept any length."""

    def advance(self, more: int) -> None:
        """Do nothing: the state is read once."""


def _continue(
    model: Tokenformer, names: list[str], tokens: Tensor, past: Sequence[Tensor], padding: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Read data tokens after the states ``past``: logits, and the states after them."""
    given = dict(zip(names, past, strict=True))
    blocks, start = [], 0
    for number, parts in enumerate(model.new_state(0).blocks):
        built = []
        for prefix, part in _prefixes(number, parts):
            own = {name.removeprefix(prefix): tensor for name, tensor in given.items() if name.startswith(prefix)}
            built.append(_build(part, own))
            start = own["key"].shape[2] if isinstance(part, KeyValueCache) else start
        blocks.append(tuple(built))
    state: Any = _TracedState(blocks, start, padding)
    logits = model(tokens, state=state)
    return logits, *_tensors(blocks).values()


def _build(part: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Build the state of a part from its tensors; zeros are an empty state."""
    if isinstance(part, KeyValueCache):
        return _TracedCache(tensors["key"], tensors["value"])
    if isinstance(part, RecurrentState):
        part.last = tensors["last"]
        if "denominator" in tensors:
            scale = tensors["log_scale"].masked_fill(tensors["denominator"] == 0, EMPTY)
            part.sums = WKVState(tensors["numerator"], tensors["denominator"], scale)
    return part


def _states(model: Tokenformer, batch: int, past: int) -> dict[str, Tensor]:
    """Return the decoding states after ``past`` random data tokens, by name."""
    state = model.new_state(past)
    with torch.no_grad():
        model(_tokens(model, batch, past), state=state)
    return _tensors(state.blocks)


def _tensors(blocks: Sequence[Any]) -> dict[str, Tensor]:
    """Return the tensors of the states of all blocks, by name.

    Raises:
        UserError: For a state of a plugin's part.
    """
    found: dict[str, Any] = {}
    for number, parts in enumerate(blocks):
        for prefix, part in _prefixes(number, parts):
            if isinstance(part, RecurrentState):
                sums = {} if part.sums is None else part.sums._asdict()
                found |= {f"{prefix}{name}": tensor for name, tensor in {"last": part.last, **sums}.items()}
            elif isinstance(part, KeyValueCache):
                found |= {f"{prefix}key": part.key, f"{prefix}value": part.value}
            elif part is not None:
                raise UserError(f"cache: true: the decoding state {type(part).__name__} cannot be exported")
    return {name: tensor.contiguous() for name, tensor in found.items()}  # compiled packages read fixed strides


def _prefixes(number: int, parts: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the states of the mixer and the feed-forward of a block, with the prefix of the names of their tensors."""
    for place, part in zip(("attn", "mlp"), parts, strict=True):
        kind = f"past_key_values.{number}." if isinstance(part, KeyValueCache) else f"past_states.{number}.{place}."
        yield kind, part


def _state_axes(model: Tokenformer) -> dict[str, Axes]:
    """Return the shapes of the decoding states, by name."""
    found = {}
    for name, tensor in _states(model, 1, 1).items():
        axes: list[int | str] = ["batch", *tensor.shape[1:]]
        if name.startswith("past_key_values."):
            axes[2] = "past"
        found[name] = tuple(axes)
    return found


def _present(name: str) -> str:
    return name.replace("past_key_values", "present").replace("past_states", "present_states")


def _recurrent(model: Tokenformer) -> bool:
    """Return True if data tokens interact by other means than attention, such as a token shift."""
    return not model.keeps_documents_apart


def _limits(model: Tokenformer) -> dict[str, int]:
    limit = model.config.length_limit
    return {} if limit is None else {"length": limit}


def _tokens(model: Tokenformer, batch: int, length: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (batch, length))


def _dtype(model: Tokenformer) -> torch.dtype:
    return next(model.parameters()).dtype


def _no_cache(cache: bool | None, kind: str) -> None:
    if cache is not None:
        raise UserError(f"cache: {kind} has none (got {str(cache).lower()})")

"""Readers: from token ids to the logits of the next one, with a decoding state, with slots, or without a state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_tokenformer.errors import UserError
from lit_tokenformer.models.backbone import Tokenformer
from lit_tokenformer.models.slots import SlotState

Step = Callable[[Tokenformer, Tensor, Any], Tensor]
"""Decoding step: model, token ids (B, T) and decoding state to the logits of the next token, (B, V)."""

PREFILL_TOKENS = 4096
"""Most data tokens of prompts, with padding, that are read at once into slots; a longer prompt is read alone."""

_ROUNDING = 64  # capacities of compiled steps, so that similar texts share a compilation


def read_step(model: Tokenformer, tokens: Tensor, state: Any) -> Tensor:
    """Read token ids (B, T) and compute the logits of the next token, (B, V)."""
    # not model(...): a compiled model would be recompiled for each length
    features = model.forward_features(tokens, state=state)
    return model.forward_head(features[:, -1:])[:, 0]


def compile_step(model: Tokenformer) -> Step:
    """Compile the decoding step of a model, by Inductor on a CPU and with CUDA graphs on a GPU.

    The first token of each batch size and capacity compiles, which takes seconds to minutes. On a CPU, products of a
    single row read each weight once (:mod:`~lit_tokenformer.inference.row_products`).

    Args:
        model: Causal language model. On a CPU, its weights are stored in another order from now on, with equal values.

    Raises:
        UserError: If a part of the model has a decoding state without slots, or torch cannot compile here.
    """
    SlotState(model, 1, 1)  # raises
    device = next(model.parameters()).device.type
    mode = "reduce-overhead" if device == "cuda" else None
    options = None
    if device == "cpu":
        from lit_tokenformer.inference.row_products import cpu_options, store_by_rows

        _check_compiler()
        store_by_rows(model)
        options = cpu_options()
    return torch.compile(read_step, mode=mode, options=options, dynamic=False, fullgraph=True)


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        raise UserError(f"compile: no C++ compiler ({str(error).splitlines()[0]}); install g++ or set CXX") from None


class Reader:
    """Reader with a decoding state of all rows (KV caches or recurrent states).

    Args:
        model: Causal language model.
        rows: Token ids of each prompt, (T,) int64.
        length: Capacity in data tokens.
    """

    def __init__(self, model: Tokenformer, rows: list[Tensor], length: int) -> None:
        self.model = model
        self.prompt, padding = pad_left(rows, next(model.parameters()).device)
        self.state = model.new_state(length, padding)

    def __call__(self, tokens: Tensor | None) -> Tensor:
        """Prefill the prompts (``None``) or decode the last tokens (B, 1), and return the next logits (B, V)."""
        return read_step(self.model, self.prompt if tokens is None else tokens, self.state)


class Rereader:
    """Reference reader without a state, which recomputes each row alone for every token.

    Args:
        model: Causal language model.
        rows: Token ids of each prompt, (T,) int64.
    """

    def __init__(self, model: Tokenformer, rows: list[Tensor]) -> None:
        self.model = model
        self.rows = [row.to(next(model.parameters()).device) for row in rows]

    def __call__(self, tokens: Tensor | None) -> Tensor:
        """As :meth:`Reader.__call__`."""
        if tokens is not None:
            limit = self.model.config.length_limit  # a row that fills the context has ended
            self.rows = [torch.cat([row, new])[:limit] for row, new in zip(self.rows, tokens, strict=True)]
        features = torch.cat([self.model.forward_features(row[None])[:, -1] for row in self.rows])
        return self.model.forward_head(features[:, None])[:, 0]


class SlotReader:
    """Reader of sequences that enter and leave one by one.

    Args:
        model: Causal language model.
        slots: Number of slots, B.
        length: Capacity of each slot in data tokens.
        step: Result of :func:`compile_step`; ``None`` for the model as it is.
        prompts: Prompts that the first call reads, one per slot, (T,) int64.

    Attributes:
        lengths: Data tokens read so far in each slot; 0 for a slot that is not used, which saves time.
    """

    @torch.inference_mode()  # a compiled step is specific to it
    def __init__(
        self, model: Tokenformer, slots: int, length: int, step: Step | None = None, prompts: Sequence[Tensor] = ()
    ) -> None:
        self.model, self.step, self.prompts = model, step, prompts
        if step is not None:
            length = -(-length // _ROUNDING) * _ROUNDING
            length = min(length, model.config.length_limit or length)
        self.state = model.new_slots(slots, length)
        self.lengths = [0] * slots

    def __call__(self, tokens: Tensor | None) -> Tensor:
        """Read one token of each slot, (B, 1), or the prompts (``None``), and return the next logits (B, V)."""
        if tokens is None:
            return self.prefill(range(len(self.prompts)), self.prompts)
        if self.step is None:
            self.lengths = [min(length + 1, self.state.length) for length in self.lengths]
            self.state.visible = max(self.lengths)
            return read_step(self.model, tokens, self.state)
        self.state.check(1)
        torch.compiler.cudagraph_mark_step_begin()
        return self.step(self.model, tokens, self.state)

    def prefill(self, slots: Sequence[int], rows: Sequence[Tensor]) -> Tensor:
        """Read prompts into slots, and return the next logits, (n, V).

        Args:
            slots: Slot of each prompt.
            rows: Token ids of each prompt, (T,) int64.
        """
        found, start = [], 0
        while start < len(rows):
            end, longest = start + 1, len(rows[start])
            while end < len(rows) and max(longest, len(rows[end])) * (end + 1 - start) <= PREFILL_TOKENS:
                longest = max(longest, len(rows[end]))
                end += 1
            tokens, padding = pad_left(rows[start:end], self.state.position_ids.device)
            state = self.model.new_state(longest, padding)
            found.append(read_step(self.model, tokens, state))
            self.state.fill(slots[start:end], state)
            start = end
        for slot, row in zip(slots, rows, strict=True):
            self.lengths[slot] = len(row)
        return torch.cat(found)

    def select(self, slots: Sequence[int]) -> None:
        """Keep some of the slots."""
        self.state.select(torch.tensor(slots, device=self.state.position_ids.device))
        self.lengths = [self.lengths[slot] for slot in slots]


def pad_left(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Stack token ids (T,) to (B, T), padded on the left; and the padding of each row, (B,), if any."""
    longest = max(map(len, rows))
    padding = torch.tensor([longest - len(row) for row in rows], device=device)
    tokens = pad_sequence(list(rows), batch_first=True, padding_side="left").to(device)
    return tokens, padding if len({*map(len, rows)}) > 1 else None

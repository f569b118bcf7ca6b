"""Decoding state with slots: sequences at positions of their own, in tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_tokenformer.errors import UserError
from lit_tokenformer.models.decoding import DecodingState
from lit_tokenformer.models.mixers import KeyValueCache, RecurrentState
from lit_tokenformer.models.wkv import WKVState

if TYPE_CHECKING:
    from lit_tokenformer.models.backbone import Tokenformer


class SlotState(DecodingState):
    """Decoding state of sequences of different length, each in a slot of its own, read one data token at a time.

    A sequence enters by :meth:`fill`, with the state of its prompt. All slots are computed in each step; the output of
    a slot that was never filled is undefined. The tensors are written in place, as a compiled step and CUDA graphs
    need.

    Args:
        model: Model that the state belongs to.
        slots: Number of slots, B.
        length: Capacity of each slot in data tokens, S.

    Attributes:
        position_ids: Data tokens read so far in each slot, (B, 1) int64: the position of the next one.
        visible: Data tokens of the caches that attention reads; less than the capacity saves time.

    Raises:
        UserError: If the state of a mixer or feed-forward has no form with slots.
    """

    position_ids: Tensor

    def __init__(self, model: Tokenformer, slots: int, length: int) -> None:
        super().__init__([], length, None, model)
        device = next(model.parameters()).device
        self.position_ids = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self.visible = length
        self._bias: Tensor | None = None
        for block in model.new_state(length).blocks:
            self.blocks.append(tuple(None if part is None else _slotted(part)(self) for part in block))  # type: ignore

    def fill(self, slots: Sequence[int], state: DecodingState, start: int = 0) -> None:
        """Copy the sequences of another state into slots.

        Args:
            slots: Slot of each sequence.
            state: State after the same number of data tokens of each sequence, with or without left padding.
            start: Index of the first sequence in ``state``.
        """
        for row, slot in enumerate(slots, start=start):
            skip = 0 if state.padding is None else int(state.padding[row])
            for own, other in zip(self.blocks, state.blocks, strict=True):
                for part, source in zip(own, other, strict=True):
                    if part is not None:
                        part.fill(slot, source, row, slice(skip, state.start))
            self.position_ids[slot] = state.start - skip

    def select(self, rows: Tensor) -> None:
        """Select slots by index, (B',) int64, in place."""
        super().select(rows)
        self.position_ids = self.position_ids[rows]

    def crop(self, length: int) -> None:
        """Raise an error: sequences have different lengths.

        Raises:
            UserError: Always.
        """
        raise UserError("state: slots cannot be cropped")

    def check(self, more: int, positions: bool = True) -> None:
        """Check that the model has not grown and that one data token is read; the caller checks the capacity."""
        if more != 1:
            raise UserError(f"state: slots read one data token at a time (got {more})")
        if not torch.compiler.is_compiling():
            super().check(0)

    def advance(self, more: int) -> None:
        """Move all slots on; those at the end of their capacity stay there."""
        self.position_ids.add_(more).clamp_(max=self.length - 1)

    def mask(self, bias: Callable[[int], Tensor] | None = None) -> Tensor:
        """Attention mask of the next data token: bool (B, 1, 1, S), or additive (B, H, 1, S) with a bias.

        Args:
            bias: Computes the bias of the attention scores of T data tokens, T -> (1, H, T, T).
        """
        columns = torch.arange(self.visible, device=self.position_ids.device)
        present = columns <= self.position_ids[:, None, None]  # (B, 1, 1, S)
        if bias is None:
            return present
        if self._bias is None:
            self._bias = bias(self.length)[0]  # (H, S, S)
        rows = self._bias[:, self.position_ids[:, 0], : self.visible].transpose(0, 1)[:, :, None]  # (B, H, 1, S)
        return rows.masked_fill(~present, -torch.inf)


class SlotCache(KeyValueCache):
    """KV cache with a position of its own for each slot.

    Args:
        slots: State that the cache is a part of.
    """

    def __init__(self, slots: SlotState) -> None:
        super().__init__(slots.length)
        self.slots = slots

    def fill(self, slot: int, other: KeyValueCache, row: int, places: slice) -> None:
        """Copy the keys and values of a sequence at ``places`` to the start of a slot."""
        assert other.key is not None and other.value is not None
        if self.key is None or self.value is None:  # zeros, since masked data tokens are multiplied by 0
            batch, (heads, width) = len(self.slots.position_ids), (other.key.shape[1], other.key.shape[3])
            shape = (batch, heads, self.length, width)
            self.key, self.value = _fixed(other.key.new_zeros(shape)), _fixed(other.value.new_zeros(shape))
        size = places.stop - places.start
        self.key[slot, :, :size] = other.key[row, :, places]
        self.value[slot, :, :size] = other.value[row, :, places]

    def append(self, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, H, 1, d) at the positions; return the visible ones, (B, H, S, d)."""
        assert self.key is not None and self.value is not None
        places = self.slots.position_ids[:, 0]
        rows = torch.arange(len(places), device=places.device)
        self.key[rows, :, places] = key[:, :, 0]
        self.value[rows, :, places] = value[:, :, 0]
        return self.key[:, :, : self.slots.visible], self.value[:, :, : self.slots.visible]


class SlotRecurrentState(RecurrentState):
    """Recurrent state whose tensors are written in place.

    Args:
        slots: State that this is a part of.
    """

    def __init__(self, slots: SlotState) -> None:
        self.slots = slots

    def fill(self, slot: int, other: RecurrentState, row: int, places: slice) -> None:
        """Copy the state of a sequence into a slot."""
        assert other.last is not None
        batch = len(self.slots.position_ids)
        if self.last is None:
            self.last = _fixed(other.last.new_zeros(batch, *other.last.shape[1:]))
            sums = other.sums
            self.sums = None if sums is None else WKVState(*(_fixed(s.new_zeros(batch, *s.shape[1:])) for s in sums))
        self.last[slot] = other.last[row]
        for own, sums_of in zip(self.sums or (), other.sums or (), strict=True):
            own[slot] = sums_of[row]

    def keep_last(self, last: Tensor) -> None:
        """Keep the input of the last data token, (B, 1, D)."""
        assert self.last is not None
        self.last.copy_(last)

    def keep_sums(self, sums: WKVState) -> None:
        """Keep the sums after the last data token."""
        for own, new in zip(self.sums or (), sums, strict=True):
            own.copy_(new)


def has_slots(model: Tokenformer) -> bool:
    """Check that the states of all parts of a model have a form with slots."""
    return all(part is None or type(part) in _SLOTTED for block in model.new_state(1).blocks for part in block)


def _slotted(part: Any) -> Callable[[SlotState], Any]:
    if type(part) not in _SLOTTED:
        raise UserError(f"state: {type(part).__name__} has no form with slots")
    return _SLOTTED[type(part)]


def _fixed(tensor: Tensor) -> Tensor:
    """Mark a tensor as one that stays at its address, so that CUDA graphs write to it."""
    torch._dynamo.mark_static_address(tensor)
    return tensor


_SLOTTED: dict[type, Callable[[SlotState], Any]] = {KeyValueCache: SlotCache, RecurrentState: SlotRecurrentState}

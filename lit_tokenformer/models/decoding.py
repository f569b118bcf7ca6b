"""Decoding state: what a model keeps of the data tokens read so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lit_tokenformer.errors import UserError
from lit_tokenformer.models.axes import find_axes
from lit_tokenformer.registry import POSITIONS

if TYPE_CHECKING:
    from lit_tokenformer.models.backbone import Tokenformer
    from lit_tokenformer.models.block import State


class DecodingState:
    """Decoding state for incremental generation (KV caches or recurrent states).

    Args:
        blocks: State of each block.
        length: Capacity in data tokens.
        padding: Left padding of each sequence in data tokens, (B,) int64; ``None`` without padding.
        model: Model that the state belongs to.

    Attributes:
        start: Data tokens read so far, including padding.
    """

    position_ids: Tensor | None = None
    """Position of the next data token of each sequence, if these differ; see :mod:`~lit_tokenformer.models.slots`."""

    def __init__(self, blocks: list[State], length: int, padding: Tensor | None, model: Tokenformer) -> None:
        self.blocks = blocks
        self.length = length
        self.padding = padding
        self.start = 0
        self._axes = [(axis.tensors[0], part) for _, part, axis in find_axes(model)]
        self._sizes = self._axis_lengths()
        self._model_blocks = model.blocks
        learned = POSITIONS[model.config.positions].learned
        most = 0 if padding is None else int(padding.max())
        self._positions = model.config.context_length + most if learned else None

    def _axis_lengths(self) -> list[int]:
        return [tensor.of(part).shape[tensor.dim] for tensor, part in self._axes]

    def select(self, rows: Tensor) -> None:
        """Select sequences by index, in place: reorder them for beam search, repeat or drop them.

        Args:
            rows: Index of the source of each sequence, (B',) int64; a source may occur several times, or never.

        Raises:
            UserError: If the state of a mixer or feed-forward defines no ``select``.
        """
        for state in self._of_blocks("select"):
            state.select(rows)
        self.padding = None if self.padding is None else self.padding[rows]

    def crop(self, length: int) -> None:
        """Drop the last data tokens, in place, as after a rejected speculation.

        Args:
            length: Data tokens to keep, including padding; negative for the number of data tokens to drop.

        Raises:
            UserError: If fewer have been read, or if a recurrent state would have to go back.
        """
        kept = length if length >= 0 else self.start + length
        if not 0 <= kept <= self.start:
            raise UserError(f"state: cannot crop to {length} data tokens (got {self.start} so far)")
        if kept < self.start:
            for state in self._of_blocks("crop"):
                state.crop(kept)
        self.start = kept

    def _of_blocks(self, method: str) -> list[Any]:
        """States of all parts that have one; each must define ``method``."""
        states = [state for block in self.blocks for state in block if state is not None]
        missing = next((state for state in states if not hasattr(state, method)), None)
        if missing is not None:
            raise UserError(f"state: {type(missing).__name__} defines no {method!r}")
        return states

    def advance(self, more: int) -> None:
        """Count ``more`` data tokens as read."""
        self.start += more

    def check(self, more: int, positions: bool = True) -> None:
        """Check that the model has not grown and that ``more`` data tokens fit.

        Args:
            more: Data tokens to read.
            positions: Check the number of learned positions too.

        Raises:
            UserError: If it has grown, or if they do not fit.
        """
        grown = len(self._model_blocks) != len(self.blocks)
        if grown or self._axis_lengths() != self._sizes:
            raise UserError("state: created before a growth of the model; create a new one")
        if self.start + more > self.length:
            raise UserError(
                f"state: capacity exceeded (got {self.start + more} data tokens, expected at most {self.length})"
            )
        if positions and self._positions is not None and self.start + more > self._positions:
            raise UserError(
                f"context_length: more data tokens than learned positions (got {self.start + more}, "
                f"expected at most {self._positions})"
            )

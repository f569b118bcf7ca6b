"""Attention masks: causal, document, padding and given masks, combined."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_tokenformer.errors import UserError
from lit_tokenformer.models.decoding import DecodingState


def columns(start: int, length: int, device: torch.device) -> Tensor:
    """Indices of ``length`` data tokens from ``start``, (T,)."""
    return torch.arange(start, start + length, device=device)


def make_mask(
    x: Tensor,
    causal: bool,
    start: int = 0,
    padding: Tensor | None = None,
    documents: Tensor | None = None,
    lengths: Tensor | None = None,
    given: Tensor | None = None,
    always: bool = False,
) -> Tensor | None:
    """Combine masks, bool or additive, (B | 1, H | 1, T, S); ``None`` for full or plain causal attention.

    Args:
        x: Data tokens, (B, T, D).
        causal: Whether attention is causal; a ``given`` mask of four dimensions is in its place.
        start: Data tokens of the sequence already in the decoding state, S - T.
        padding: Left padding of each sequence in data tokens, (B,) int64.
        documents: Document index of each data token, (B, T) int64.
        lengths: Length of each sequence in data tokens, (B,) int64.
        given: Padding mask (B, S), nonzero for data tokens, or an attention mask (B | 1, H | 1, T, S).
        always: Return plain causal attention as a mask too.
    """
    length, device = x.shape[1], x.device
    every, rows = columns(0, start + length, device), columns(start, length, device)[:, None]
    mask = None
    if documents is not None:
        mask = (documents[:, :, None] == documents[:, None, :])[:, None]  # (B, 1, T, T)
    if lengths is not None:
        present = (every < lengths[:, None])[:, None, None]  # (B, 1, 1, T)
        mask = present if mask is None else mask & (present | (every == rows))
    if padding is not None:  # padding attends to itself: a softmax over an empty set is NaN
        mask = (every >= padding[:, None, None, None]) | (every == rows)  # (B, 1, T, S)
    if given is not None and given.ndim == 2:
        present = (given != 0)[:, None, None] | (every == rows)  # (B, 1, T, S)
        mask = present if mask is None else mask & present
    if given is not None and given.ndim == 4:
        return given if mask is None else restricted(given, mask)
    if causal and length > 1 and (mask is not None or start or always):
        before = (every <= rows)[None, None]  # (1, 1, T, S)
        mask = before if mask is None else mask & before
    return mask


def restricted(scores: Tensor, mask: Tensor) -> Tensor:
    """Restrict a mask, bool or additive, by another."""
    if mask.dtype != torch.bool:
        return restricted(mask, scores) if scores.dtype == torch.bool else scores + mask
    return scores & mask if scores.dtype == torch.bool else scores.masked_fill(~mask, -torch.inf)


def check_mask(mask: Tensor, x: Tensor, state: DecodingState | None, recurrent: bool) -> Tensor | None:
    """Check a mask given by the user.

    Args:
        mask: Padding mask (B, S) or attention mask (B | 1, H | 1, T, S).
        x: Data tokens, (B, T, D).
        state: Decoding state.
        recurrent: Whether the model has recurrent parts, which read all data tokens before the current one.

    Returns:
        Where the data tokens are not padding, (B, T, 1) bool; ``None`` for a mask of four dimensions.

    Raises:
        UserError: For an unexpected shape or dtype, or a mask that recurrent parts cannot apply.
    """
    (batch, length), start = x.shape[:2], 0 if state is None else state.start
    if state is not None and state.padding is not None:
        raise UserError("attention_mask: cannot be combined with the padding of the state")
    total = start + length
    if mask.shape == (batch, total):
        present = mask != 0
        if recurrent:
            runs = present[:, :1].sum(1) + (~present[:, :-1] & present[:, 1:]).sum(1)
            if (runs > 1).any() or (state is not None and not present[:, -1].all()):
                raise UserError(
                    "attention_mask: recurrent parts support padding at the ends only, and left with a state"
                )
        return present[:, start:, None]
    if recurrent:
        expected = f"expected {batch, total} in a model with recurrent parts"
        raise UserError(f"attention_mask: unexpected shape (got {tuple(mask.shape)}, {expected})")
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[2:] != (length, total):
        expected = f"{batch, total} or (B | 1, H | 1, {length}, {total})"
        raise UserError(f"attention_mask: unexpected shape (got {tuple(mask.shape)}, expected {expected})")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise UserError(f"attention_mask: unsupported dtype (got {mask.dtype}, expected bool or floating point)")
    return None

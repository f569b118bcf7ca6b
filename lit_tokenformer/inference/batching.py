"""Continuous batching: many prompts decoded in a fixed number of slots, each refilled when its sequence has ended.

Source: iteration-level scheduling of Orca (Yu et al., OSDI 2022, section 3.1), with the prefill of a prompt between two
decoding steps.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lit_tokenformer.inference.readers import SlotReader, Step
from lit_tokenformer.inference.sampling import Sampling, check_finite, choose, prepare, seen_tokens
from lit_tokenformer.models.backbone import Tokenformer


class SlotDecoder:
    """Decoder of many prompts in slots, the longest prompts first.

    The tokens of a prompt do not depend on the other prompts or on the number of slots, except where rounding decides a
    tie. The model must be in evaluation mode.

    Args:
        model: Causal language model.
        prompts: Token ids, one non-empty sequence per row.
        slots: Number of rows decoded at once.
        max_new_tokens: Maximum number of new tokens per row.
        sampling: Sampling settings.
        stop: Token ids that end a row; the stop token is returned too.
        vocab_size: Exclude token ids from here on.
        seed: One sampling seed per row.
        step: Compiled decoding step; ``None`` for the model as it is.

    Raises:
        UserError: If the arguments do not match the model, or a part of the model has a state without slots.

    Example:
        >>> from lit_tokenformer.models import create_backbone
        >>> model = create_backbone("tokenformer_lm_tiny", vocab_size=257, context_length=8).eval()
        >>> decoder = SlotDecoder(model, [[1], [1, 2, 3], [4]], 2, 2, Sampling(temperature=0))
        >>> [[row for row, _ in tokens] for tokens in decoder]  # the longest first, and the third after the first
        [[1, 0], [1, 0], [2], [2]]
    """

    def __init__(
        self,
        model: Tokenformer,
        prompts: Sequence[Tensor | Sequence[int]],
        slots: int,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        stop: Collection[int] = (),
        vocab_size: int | None = None,
        seed: Sequence[int] | None = None,
        step: Step | None = None,
    ) -> None:
        self._request = request = prepare(model, prompts, max_new_tokens, sampling, vocab_size, seed)
        self._sampling, self._stop = sampling, frozenset(stop)
        self._left = list(request.limits)
        lengths = [len(row) for row in request.rows]
        order = sorted((n for n, left in enumerate(self._left) if left > 0), key=lambda n: -lengths[n])
        self._waiting = order[::-1]
        self._rows: list[int | None] = [None] * min(slots, len(order))  # the row in each slot
        self._compiled = step is not None
        if not order:
            return
        device = next(model.parameters()).device
        with torch.inference_mode():
            length = max(lengths[n] + self._left[n] for n in order)
            self._reader = SlotReader(model, len(self._rows), length, step)
            self._tokens = torch.zeros(len(self._rows), 1, dtype=torch.int64, device=device)
            nothing = [torch.empty(0, dtype=torch.int64)] * len(self._rows)
            self._seen = seen_tokens(nothing, request.size, sampling, device)

    def __iter__(self) -> SlotDecoder:
        return self

    def __next__(self) -> list[tuple[int, int]]:
        """Prefill waiting prompts into free slots, or decode a token in all slots; return pairs of row and token id."""
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        taken = [slot for slot, row in enumerate(self._rows) if row is not None]
        if free and self._waiting:
            slots = free[: len(self._waiting)]
            for slot in slots:
                self._rows[slot] = self._waiting.pop()
            return self._decode(slots, prefill=True)
        if not taken:
            raise StopIteration
        if not self._compiled and 2 * len(taken) <= len(self._rows):
            self._keep(taken)
            taken = list(range(len(taken)))
        return self._decode(taken)

    def end(self, row: int) -> None:
        """End a row, such as at a stop string; its slot is free."""
        if row in self._rows:
            slot = self._rows.index(row)
            self._rows[slot], self._reader.lengths[slot] = None, 0

    @torch.inference_mode()
    def _decode(self, slots: list[int], prefill: bool = False) -> list[tuple[int, int]]:
        """Compute and store the next token of some slots."""
        rows: list[int] = [self._rows[slot] for slot in slots]  # type: ignore[misc]
        places = torch.tensor(slots, device=self._tokens.device)
        whole = len(slots) == len(self._rows)
        if prefill:
            prompts = [self._request.rows[row] for row in rows]
            logits = self._reader.prefill(slots, prompts)
            new = seen_tokens(prompts, self._request.size, self._sampling, logits.device)
            if self._seen is not None and new is not None:
                self._seen[places] = new
        else:
            logits = self._reader(self._tokens)
            logits = logits if whole else logits[places]
        seen = None if self._seen is None else self._seen[places]
        generators = [self._request.generators[row] for row in rows] if self._request.generators else []
        chosen = choose(logits[:, : self._request.size], self._sampling, seen, generators)
        self._tokens[places, 0] = chosen
        if self._seen is not None and seen is not None:
            self._seen[places] = seen
        tokens = chosen.tolist()
        check_finite(tokens)
        for row, token in zip(rows, tokens, strict=True):
            self._left[row] -= 1
            if token in self._stop or self._left[row] == 0:
                self.end(row)
        return list(zip(rows, tokens, strict=True))

    @torch.inference_mode()
    def _keep(self, slots: list[int]) -> None:
        """Drop the other slots, which saves the time to compute them."""
        places = torch.tensor(slots, device=self._tokens.device)
        self._reader.select(slots)
        self._tokens = self._tokens[places]
        self._seen = None if self._seen is None else self._seen[places]
        self._rows = [self._rows[slot] for slot in slots]

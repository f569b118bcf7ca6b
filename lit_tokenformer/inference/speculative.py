"""Speculative decoding: a small draft model proposes tokens, and the model checks several of them in one forward pass.

Source: Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318. The text is a sample of the
model alone: a draft token x is accepted with probability ``min(1, p(x) / q(x))``, else the next token is drawn from
``max(p - q, 0)``, normalized, with the probabilities p of the model and q of the draft, both after temperature, top-k,
top-p and repetition penalty. Greedy decoding yields the text of the model alone, except where rounding decides a tie:
one forward pass over several tokens adds in another order than several passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_tokenformer.errors import UserError
from lit_tokenformer.inference.sampling import (
    ENDED,
    NOT_FINITE,
    Sampling,
    check_causal_lm,
    check_finite,
    draw,
    evaluation_mode,
    prepare,
)
from lit_tokenformer.models.backbone import DecodingState, Tokenformer
from lit_tokenformer.models.mixers import KeyValueCache


@dataclass
class Speculation:
    """Statistics of speculative decoding.

    Attributes:
        tokens: New tokens.
        calls: Forward passes of the model.
        drafted: Tokens proposed by the draft.
        accepted: Proposed tokens that the model accepted.
    """

    tokens: int = 0
    calls: int = 0
    drafted: int = 0
    accepted: int = 0

    def __str__(self) -> str:
        """Format the counts for a log line.

        Example:
            >>> print(Speculation(tokens=200, calls=60, drafted=240, accepted=168))
            30.0 calls of the model per 100 tokens (60 for 200), 70 % of the drafted tokens accepted
        """
        calls, share = 100 * self.calls / max(self.tokens, 1), 100 * self.accepted / max(self.drafted, 1)
        return (
            f"{calls:.1f} calls of the model per 100 tokens ({self.calls} for {self.tokens}), "
            f"{share:.0f} % of the drafted tokens accepted"
        )


def speculate_tokens(
    model: Tokenformer,
    draft: Tokenformer,
    prompts: Sequence[Tensor | Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    stop: Collection[int] = (),
    vocab_size: int | None = None,
    seed: int | Sequence[int] | None = None,
    draft_length: int = 4,
    counts: Speculation | None = None,
) -> Generator[Tensor, None, None]:
    """Decode continuations of prompts like :func:`~lit_tokenformer.inference.sampling.generate_tokens`, with a draft.

    Rows of a batch are decoded one after another, each with its own states, since they accept different numbers of
    tokens. A seed yields another sample than without a draft.

    Args:
        model: Causal language model.
        draft: Smaller causal language model with the same vocabulary, such as a prefix of ``model``.
        prompts: Token ids, one non-empty sequence per row.
        max_new_tokens: Maximum number of new tokens per row.
        sampling: Sampling settings, of both models.
        stop: Token ids that end a row.
        vocab_size: Exclude token ids from here on.
        seed: Sampling seed, or one per row.
        draft_length: Tokens that the draft proposes before each forward pass of the model.
        counts: Counts to add to.

    Yields:
        Next token id of each row, (B,) int64 on the CPU; ``ENDED`` (-1) for rows that have already ended.

    Raises:
        UserError: At the call, as ``generate_tokens``, and if the draft does not match the model.

    Example:
        >>> from lit_tokenformer.models import create_backbone
        >>> sizes = {"vocab_size": 257, "context_length": 32}
        >>> model, draft = (create_backbone("tokenformer_lm_tiny", param_tokens=n, **sizes) for n in (16, 4))
        >>> counts = Speculation()
        >>> tokens = speculate_tokens(model, draft, [[1, 2, 3]], 10, Sampling(temperature=0), counts=counts)
        >>> len(list(tokens)), counts.tokens, counts.calls <= 10
        (10, 10, True)
    """
    if isinstance(draft_length, bool) or draft_length != int(draft_length) or draft_length < 1:
        raise UserError(f"draft_length: expected a whole number of at least 1, got {draft_length}")
    request = prepare(model, prompts, max_new_tokens, sampling, vocab_size, seed)
    check_draft(model, draft, request.size)
    counts = Speculation() if counts is None else counts
    generators: list[torch.Generator | None] = [*request.generators] or [None] * len(request.rows)
    rows = [
        _Row(model, draft, ids.tolist(), limit, sampling, request.size, generator, draft_length, counts)
        for ids, limit, generator in zip(request.rows, request.limits, generators, strict=True)
    ]
    return _generate(rows, frozenset(stop), counts)


def check_draft(model: Tokenformer, draft: Tokenformer, vocab_size: int) -> None:
    """Check that a draft model can propose tokens for a model.

    Args:
        model: The model.
        draft: The draft.
        vocab_size: Number of token ids to sample from.

    Raises:
        UserError: If it is not a causal language model, has a smaller vocabulary or context, or if either model has a
            recurrent state, which cannot go back to the last accepted token.
    """
    check_causal_lm(draft)
    if draft.config.vocab_size < vocab_size:
        raise UserError(
            f"draft: its vocabulary has {draft.config.vocab_size} tokens (expected {vocab_size}, as the model's)"
        )
    ours, theirs = model.config.length_limit, draft.config.length_limit
    if theirs is not None and (ours is None or theirs < ours):
        raise UserError(f"draft: its context_length is {theirs} (expected at least the model's {ours})")
    for name, one in (("model", model), ("draft", draft)):
        states = (state for block in one.new_state(1).blocks for state in block)
        if kinds := {type(state).__name__ for state in states if not isinstance(state, KeyValueCache | None)}:
            raise UserError(f"draft: unsupported by a recurrent model ({name} has {', '.join(sorted(kinds))})")


def _generate(rows: list[_Row], stop: frozenset[int], counts: Speculation) -> Generator[Tensor, None, None]:
    with evaluation_mode(rows[0].model, rows[0].draft):
        alive = [row.left > 0 for row in rows]
        while any(alive):
            chosen = [row.next() if lives else ENDED for row, lives in zip(rows, alive, strict=True)]
            counts.tokens += sum(alive)
            alive = [
                lives and row.left > 0 and token not in stop
                for row, lives, token in zip(rows, alive, chosen, strict=True)
            ]
            yield torch.tensor(chosen)


class _Row:
    """Speculative decoding of one prompt.

    Args:
        model: The model.
        draft: The draft.
        ids: Token ids of the prompt.
        limit: Maximum number of new tokens.
        sampling: Sampling settings.
        vocab_size: Number of token ids to sample from, V.
        generator: Random generator; ``None`` for greedy decoding.
        draft_length: Tokens to propose.
        counts: Counts to add to.

    Attributes:
        left: New tokens that may follow.
    """

    def __init__(
        self,
        model: Tokenformer,
        draft: Tokenformer,
        ids: list[int],
        limit: int,
        sampling: Sampling,
        vocab_size: int,
        generator: torch.Generator | None,
        draft_length: int,
        counts: Speculation,
    ) -> None:
        self.model, self.draft, self.ids, self.left = model, draft, ids, limit
        self._state, self._draft_state = (one.new_state(len(ids) + limit) for one in (model, draft))
        self._sampling, self._vocab_size, self._generator = sampling, vocab_size, generator
        self._draft_length, self._counts = draft_length, counts
        self._ready: deque[int] = deque()

    def next(self) -> int:
        """Return the next token."""
        if not self._ready:
            self._ready.extend(self._speculate())
        self.left -= 1
        return self._ready.popleft()

    @torch.inference_mode()
    def _speculate(self) -> list[int]:
        """Propose tokens, check them in one forward pass of the model, and return at least one new token."""
        drafted: list[int] = []
        proposals: list[Tensor] = []
        for _ in range(min(self._draft_length, self.left - 1)):
            scores = self._read(self.draft, self._draft_state, drafted, 1)  # (1, V)
            drafted.append(self._choose(scores[0], "draft"))
            proposals.append(scores[0])
        scores = self._read(self.model, self._state, drafted, len(drafted) + 1)  # (k + 1, V)
        self._counts.calls += 1
        self._counts.drafted += len(drafted)
        new: list[int] = []
        for token, wanted, proposed in zip(drafted, scores, proposals, strict=False):
            checked = self._check(token, wanted, proposed)
            new.append(checked)
            if checked != token:
                break
            self._counts.accepted += 1
        else:
            new.append(self._choose(scores[-1], "model"))
        self.ids += new
        for state in (self._state, self._draft_state):
            state.crop(min(state.start, len(self.ids) - 1))
        return new

    def _read(self, model: Tokenformer, state: DecodingState, drafted: list[int], count: int) -> Tensor:
        """Read the tokens that are not in the state yet, and return the scores of the next ``count``, (count, V)."""
        ids = [*self.ids, *drafted]
        device = next(model.parameters()).device
        features = model.forward_features(torch.tensor([ids[state.start :]], device=device), state=state)
        logits = model.forward_head(features[:, -count:])[0, :, : self._vocab_size]  # (count, V)
        seen = None
        if self._sampling.repetition_penalty != 1:
            seen = torch.zeros(count, self._vocab_size, dtype=torch.bool)
            for number, row in enumerate(seen, start=len(ids) - count + 1):
                row[[token for token in ids[:number] if token < self._vocab_size]] = True
            seen = seen.to(device)
        return self._sampling.scores(logits, seen)

    def _choose(self, scores: Tensor, name: str) -> int:
        """Sample a token id from scores (V,)."""
        if self._generator is None:
            best, chosen = scores.max(dim=-1)
            token = int(chosen) if best.isfinite() else NOT_FINITE
        else:
            token = int(draw(scores[None], self._uniform(scores)))
        check_finite([token], name)
        return token

    def _check(self, token: int, wanted: Tensor, proposed: Tensor) -> int:
        """Accept a drafted token or replace it, given the scores (V,) of the model and of the draft."""
        if self._generator is None:
            return self._choose(wanted, "model")
        p, q = wanted.softmax(dim=-1), proposed.softmax(dim=-1).to(wanted.device)
        if self._uniform(p) * q[token] < p[token]:
            return token
        rest = (p - q).clamp_min(0)
        return self._choose((rest if rest.any() else p).log(), "model")

    def _uniform(self, like: Tensor) -> Tensor:
        """Draw a uniform number in [0, 1), (1,)."""
        return torch.rand(1, generator=self._generator).to(like)

"""Autoregressive decoding: sampling, stopping, and batches of prompts of different length.

Sources: top-p is nucleus sampling, arXiv 1904.09751, section 3.1. The repetition penalty is that of CTRL, arXiv
1909.05858, section 4.1, in the form of Hugging Face: a negative logit is multiplied instead of divided, so that the
penalty lowers it too. The order is that of ``transformers``: penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_tokenformer.errors import UserError
from lit_tokenformer.inference.readers import Reader, Rereader, SlotReader, Step
from lit_tokenformer.models.backbone import Tokenformer
from lit_tokenformer.models.image_text import ImageTextReader

ENDED = -1
"""Placeholder for the token id of a row that has already ended."""

NOT_FINITE = -2
"""Placeholder for the token id of a row with NaN scores."""
_NUCLEUS = 1024  # most nuclei are smaller, and this top-k takes a sixth of the time of sorting 50,304


@dataclass(frozen=True)
class Sampling:
    """Sampling settings for the next token.

    Args:
        temperature: Sampling temperature, the divisor of the logits; 0 is greedy decoding.
        top_k: Sample from the k most probable tokens; ``None`` for all.
        top_p: Sample from the smallest set of most probable tokens with this total probability; ``None`` for all.
        repetition_penalty: Penalty on tokens that occurred before; above 1 lowers their probability, 1 disables it.

    Raises:
        ValueError: For a value out of range.

    Example:
        >>> Sampling(temperature=0.7, top_k=2).scores(torch.tensor([[0.7, 2.1, 1.4]]))
        tensor([[   -inf,  0.0000, -1.0000]])
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature: expected a number of at least 0, got {self.temperature}")
        if self.top_k is not None and (isinstance(self.top_k, bool) or self.top_k != int(self.top_k) or self.top_k < 1):
            raise UserError(f"top_k: expected a whole number of at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p: expected a probability in (0, 1], got {self.top_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty: expected a number above 0, got {self.repetition_penalty}")

    @property
    def greedy(self) -> bool:
        """Greedy decoding (temperature 0)."""
        return self.temperature == 0

    def scores(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Compute the logits to sample from, up to a constant per row; ``-inf`` for excluded tokens.

        Args:
            logits: Logits of the model, (B, V).
            seen: Mask of token ids that occurred before, (B, V) bool; ``None`` for none.

        Returns:
            Scores (B, V), in float32 or wider.
        """
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if seen is not None and self.repetition_penalty != 1:
            scores = penalize(scores, seen, self.repetition_penalty)
        if self.greedy:
            return scores
        scores = (scores - scores.amax(dim=-1, keepdim=True)) / self.temperature  # no overflow at low temperatures
        if self.top_k is not None:
            scores = keep_top_k(scores, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            scores = keep_top_p(scores, self.top_p)
        return scores


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Apply CTRL's repetition penalty to the logits (B, V) of the tokens in ``seen`` (B, V) bool."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the k largest logits (B, V) of each row to ``-inf``."""
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1, sorted=False)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Set all logits (B, V) to ``-inf`` but the smallest set of the largest whose probabilities reach ``p``."""
    probabilities = logits.softmax(dim=-1)
    largest, ids = probabilities.topk(min(_NUCLEUS, logits.shape[-1]), dim=-1)
    if (largest.sum(dim=-1) < p).any():
        largest, ids = probabilities.sort(dim=-1, descending=True)
    before = largest.cumsum(dim=-1) - largest  # of all that are more probable; 0 for the first, which is always kept
    kept = logits.gather(-1, ids).masked_fill(before >= p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, kept)


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Sample token ids from the softmax of ``scores`` by inverse transform sampling.

    Args:
        scores: Scores, (B, V).
        uniform: Uniform number in [0, 1) per row, (B,).

    Returns:
        Token ids (B,) int64, never one with score ``-inf``; -2 for a row with NaN scores.
    """
    probabilities = scores.softmax(dim=-1)
    reached = probabilities.cumsum(dim=-1)
    # On some devices the cumulative sums are not monotonic due to rounding, so the end is their maximum over
    # candidates.
    reached = reached.masked_fill(probabilities == 0, -1)
    end = reached.amax(dim=-1)
    found = (reached > (uniform.to(scores) * end)[:, None]).byte().argmax(dim=-1)  # the first
    return torch.where(end > 0, found, NOT_FINITE)


def generate_tokens(
    model: Tokenformer,
    prompts: Sequence[Tensor | Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: Collection[int] = (),
    vocab_size: int | None = None,
    seed: int | Sequence[int] | None = None,
    cache: bool = True,
    images: Tensor | None = None,
    step: Step | None = None,
) -> Generator[Tensor, None, None]:
    """Decode continuations of prompts, token by token.

    Each row has its own random generator, so its text does not depend on the rest of the batch. A row ends at a token
    of ``stop``, after ``max_new_tokens``, or when prompt and new tokens fill a bounded context.

    Args:
        model: Causal language model; in eval mode while the generator is open, restored afterwards.
        prompts: Token ids, one non-empty sequence per row; lengths may differ.
        max_new_tokens: Maximum number of new tokens per row.
        sampling: Sampling settings.
        stop: Token ids that end a row; the stop token is yielded too.
        vocab_size: Exclude token ids from here on (padding of a rounded-up vocabulary).
        seed: Sampling seed; ``None`` draws one from torch's global generator. With a sequence of one seed per row,
            each row equals its prompt decoded alone with that seed.
        cache: Whether to use the decoding state (KV caches or recurrent states); without it, every row is recomputed
            alone for each token.
        images: Image before each prompt, (B, C, height, width), for a model with the stem ``image_text``.
        step: Compiled decoding step, the result of :func:`~lit_tokenformer.inference.readers.compile_step`.

    Yields:
        Next token id of each row, (B,) int64 on the CPU; ``ENDED`` (-1) for rows that have already ended.

    Raises:
        ValueError: At the call, if the arguments do not match the model; later, for non-finite logits, or if the model
            grew since the last token, which invalidates the decoding state.

    Example:
        >>> from lit_tokenformer.models import create_backbone
        >>> model = create_backbone("tokenformer_lm_tiny", vocab_size=257, context_length=8)
        >>> len(list(generate_tokens(model, [[1, 2, 3], [4]], max_new_tokens=6)))
        6
    """
    rows, limits, size, generators = prepare(model, prompts, max_new_tokens, sampling, vocab_size, seed)
    check_images(model, images, len(rows))
    length = max(len(row) for row in rows) + max(limits)

    def new_reader() -> Callable[[Tensor | None], Tensor]:
        if images is not None:
            weight = next(model.parameters())
            return ImageTextReader(model, images.to(weight.device, weight.dtype), rows, length, cache)
        if not cache:
            return Rereader(model, rows)
        return Reader(model, rows, length) if step is None else SlotReader(model, len(rows), length, step, rows)

    return _generate(model, new_reader, rows, limits, sampling, frozenset(stop), size, generators)


class Request(NamedTuple):
    """Checked arguments of a decoding.

    Args:
        rows: Token ids of each prompt, (T,) int64.
        limits: Maximum number of new tokens of each row.
        size: Number of token ids to sample from.
        generators: Random generator of each row; none for greedy decoding.
    """

    rows: list[Tensor]
    limits: list[int]
    size: int
    generators: list[torch.Generator]


def prepare(
    model: Tokenformer,
    prompts: Sequence[Tensor | Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    vocab_size: int | None,
    seed: int | Sequence[int] | None,
) -> Request:
    """Check the arguments of :func:`generate_tokens`.

    Raises:
        UserError: If they do not match the model.
    """
    config = model.config
    check_causal_lm(model)
    if isinstance(max_new_tokens, bool) or max_new_tokens != int(max_new_tokens) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens: expected a whole number of at least 1, got {max_new_tokens}")
    size = config.vocab_size if vocab_size is None else vocab_size
    if not 1 <= size <= config.vocab_size:
        raise UserError(f"vocab_size: expected 1 to the model's {config.vocab_size}, got {size}")
    if len(prompts) == 0:
        raise UserError("prompts: expected at least one")
    rows = [torch.as_tensor(prompt, dtype=torch.long, device="cpu") for prompt in prompts]
    for number, row in enumerate(rows, start=1):
        name = "prompt" if len(rows) == 1 else f"prompt {number}"
        if row.ndim != 1 or len(row) == 0:
            raise UserError(f"{name}: expected at least one token id, got shape {tuple(row.shape)}")
        if config.length_limit is not None and len(row) > config.length_limit:
            raise UserError(f"{name}: {len(row)} tokens, the model's context_length is {config.length_limit}")
        if row.min() < 0 or row.max() >= config.vocab_size:
            worst = row.min() if row.min() < 0 else row.max()
            raise UserError(f"{name}: token id {worst} is not in the model's vocabulary of {config.vocab_size}")
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    places = [(one, 0) for one in seed] if isinstance(seed, Sequence) else [(seed, row) for row in range(len(rows))]
    if len(places) != len(rows):
        raise UserError(f"seed: expected one, or one for each of the {len(rows)} prompts, got {len(places)}")
    generators = [] if sampling.greedy else [_row_generator(*place) for place in places]
    limit = config.length_limit
    limits = [max_new_tokens if limit is None else min(max_new_tokens, limit - len(row)) for row in rows]
    return Request(rows, limits, size, generators)


def check_causal_lm(model: Tokenformer) -> None:
    """Reject a model that is not a causal language model with a ``ValueError``."""
    if model.config.head != "language" or not model.config.causal:
        kind = f"head: {model.config.head}, causal: {str(model.config.causal).lower()}"
        raise UserError(f"model: not a causal language model (got {kind})")


def check_images(model: Tokenformer, images: Tensor | None, count: int) -> None:
    """Reject images that do not fit the model or the number of prompts with a ``UserError``."""
    if images is None:
        return
    config = model.config
    if not hasattr(model.stem, "image"):
        raise UserError(f"image: the model reads no images (got stem {config.stem!r}, expected a LitVisionLanguage)")
    size = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    if images.shape != (count, config.in_chans, *size):
        raise UserError(f"image: expected shape {(count, config.in_chans, *size)}, got {tuple(images.shape)}")


def check_finite(tokens: Collection[int], name: str = "model") -> None:
    """Reject token ids drawn from non-finite logits with a ``UserError``."""
    if NOT_FINITE in tokens:
        raise UserError(f"{name}: non-finite logits; the weights may come from a diverged fit")


def _generate(
    model: Tokenformer,
    new_reader: Callable[[], Callable[[Tensor | None], Tensor]],
    rows: list[Tensor],
    limits: list[int],
    sampling: Sampling,
    stop: frozenset[int],
    vocab_size: int,
    generators: list[torch.Generator],
) -> Generator[Tensor, None, None]:
    seen = seen_tokens(rows, vocab_size, sampling, next(model.parameters()).device)
    with evaluation_mode(model):
        read = new_reader()
        tokens: Tensor | None = None
        alive = [limit > 0 for limit in limits]
        for count in range(1, max(limits) + 1):
            with torch.inference_mode():
                tokens = choose(read(tokens)[:, :vocab_size], sampling, seen, generators)[:, None]  # (B, 1)
            chosen = tokens[:, 0].tolist()
            check_finite(chosen)
            chosen = [token if lives else ENDED for token, lives in zip(chosen, alive, strict=True)]
            alive = [
                lives and token not in stop and count < limit
                for token, lives, limit in zip(chosen, alive, limits, strict=True)
            ]
            yield torch.tensor(chosen)
            if not any(alive):
                return


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode within the block."""
    were_training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True


def seen_tokens(rows: Sequence[Tensor], vocab_size: int, sampling: Sampling, device: torch.device) -> Tensor | None:
    """Mask of the token ids in each prompt, (B, V) bool; ``None`` without a repetition penalty."""
    if sampling.repetition_penalty == 1:
        return None
    seen = torch.zeros(len(rows), vocab_size, dtype=torch.bool)
    for occurred, row in zip(seen, rows, strict=True):
        occurred[row[row < vocab_size]] = True
    return seen.to(device)


def choose(logits: Tensor, sampling: Sampling, seen: Tensor | None, generators: Sequence[torch.Generator]) -> Tensor:
    """Sample token ids, (B,), -2 for a row with non-finite scores.

    Args:
        logits: Logits, (B, V).
        sampling: Sampling settings.
        seen: Mask of token ids that occurred before, (B, V) bool, updated in place; ``None`` for none.
        generators: Random generator of each row; none for greedy decoding.
    """
    scores = sampling.scores(logits, seen)
    if sampling.greedy:
        best, chosen = scores.max(dim=-1)
        chosen = torch.where(best.isfinite(), chosen, NOT_FINITE)
    else:
        uniform = torch.stack([torch.rand((), generator=generator) for generator in generators])
        chosen = draw(scores, uniform.to(logits.device))
    if seen is not None:
        seen.scatter_(1, chosen.clamp_min(0)[:, None], True)
    return chosen


def _row_generator(seed: int, row: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

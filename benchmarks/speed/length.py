"""Cost against the length of the text: a new token with its attention alone and its decoding state, and training.

    python -m benchmarks.speed.length [--presets tokenformer_150m] [--lengths 64 1024] [--tokens 40] [--batch 1]
    python -m benchmarks.speed.length --presets rwkv4_small transformer_small --lengths 64 256 1024 4096 --vocab 256

Weights are random. After a prompt of each length the texts continue by one token in turn; the baseline is
``scaled_dot_product_attention`` with one query over keys and values of the shapes of the KV cache, once per block. Peak
memory is that of the process beyond the one after the shortest length, when one text is decoded token by token
(``--peak``). A training step is a forward and backward pass over one text of each length; its exponent is the slope of
log time against log length from the second length on, 1 where time is linear in the length.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.speed.lines import Line
from benchmarks.speed.timing import arguments, main, median, peak_bytes, ratio, take_turns
from lit_tokenformer.inference.sampling import Sampling, generate_tokens
from lit_tokenformer.models import TokenformerConfig, create_backbone

GREEDY = Sampling(temperature=0)


def attention_over_cache(config: TokenformerConfig, batch: int, length: int, room: int, like: torch.Tensor) -> Callable:
    """Build a function that does the attention of one new token in every block."""
    shape = (batch, config.num_heads, room, config.dim // config.num_heads)
    caches = [torch.randn(2, *shape, device=like.device, dtype=like.dtype) for _ in range(config.depth)]
    query = torch.randn(*shape[:2], 1, shape[3], device=like.device, dtype=like.dtype)

    @torch.inference_mode()
    def attend() -> None:
        for key, value in caches:
            F.scaled_dot_product_attention(query, key[:, :, :length], value[:, :, :length])

    return attend


def state_bytes(model: Any, length: int) -> int:
    """Size of the decoding state after a text of this length."""
    state, found = model.new_state(length), 0
    with torch.inference_mode():
        model.forward_features(
            torch.zeros(1, length, dtype=torch.long, device=next(model.parameters()).device), state=state
        )
    for part in (part for block in state.blocks for part in block if part is not None):
        for value in vars(part).values():
            tensors = value if isinstance(value, tuple) else (value,)
            found += sum(one.nbytes for one in tensors if isinstance(one, torch.Tensor))
    return found


def decoding(preset: str, dtype: str, given: argparse.Namespace) -> list[Line]:
    """Measure a new token after each length, against attention over the cache alone."""
    room = max(given.lengths) + given.tokens + 2
    model = create_backbone(preset, context_length=room, **given.overrides).eval()
    model = model.to(given.device, getattr(torch, dtype))
    functions: dict[str, Callable[[], object]] = {}
    for length in given.lengths:
        prompts = torch.randint(model.config.vocab_size, (given.batch, length))
        functions[f"token {length}"] = partial(next, generate_tokens(model, list(prompts), given.tokens + 2, GREEDY))
        like = next(model.parameters())
        functions[f"attention {length}"] = attention_over_cache(model.config, given.batch, length, room, like)
    taken = take_turns(functions, given.tokens, given.device, warmup=2)  # the first token reads the prompt
    lines = []
    for length in given.lengths:
        token, attention = ([1e3 * one for one in taken[f"{what} {length}"]] for what in ("token", "attention"))
        what = f"`{preset}`, {dtype}, batch {given.batch}, after {length:,} tokens"
        against = "attention over the cache"
        lines.append(
            Line(f"a new token, {what}", against, median(token), median(attention), "ms", ratio(attention, token))
        )
        mine, theirs = (state_bytes(model, one) / 1e3 for one in (length, given.lengths[0]))
        lines.append(Line(f"decoding state, {what}", f"{given.lengths[0]:,} tokens", mine, theirs, "kB", mine / theirs))
    return lines


def peak(preset: str, given: argparse.Namespace) -> str:
    """Measure the growth of peak memory while one text is decoded token by token."""
    model = create_backbone(preset, context_length=max(given.lengths) + 1, **given.overrides).eval().to(given.device)
    peaks = []
    for number, _ in enumerate(generate_tokens(model, [[1]], max(given.lengths), GREEDY), start=1):
        if number in (min(given.lengths), max(given.lengths)):
            peaks.append(peak_bytes(given.device))
    more = (peaks[-1] - peaks[0]) / 1e6
    return f"`{preset}`: peak memory at the last token less that at the {min(given.lengths)}th: {more:.1f} MB."


def training(given: argparse.Namespace) -> list[Line]:
    """Measure a forward and backward pass of every preset over a text of each length, and the exponents."""
    functions: dict[str, Callable[[], object]] = {}
    for name in given.presets:
        model = create_backbone(name, context_length=max(given.lengths), **given.overrides).to(given.device)
        for length in given.lengths:
            tokens = torch.randint(model.config.vocab_size, (1, length), device=given.device)
            functions[f"{name} {length}"] = partial(forward_and_backward, model, tokens)
    taken = take_turns(functions, given.rounds, given.device, warmup=1)
    lines, (first, *lengths) = [], given.lengths
    for name in given.presets:
        milliseconds = [1e3 * median(taken[f"{name} {length}"]) for length in given.lengths]
        slope = float(np.polyfit(np.log(lengths), np.log(milliseconds[1:]), 1)[0]) if len(lengths) > 1 else np.nan
        what = f"training step, `{name}`, {lengths[-1]:,} tokens; ratio: exponent"
        lines.append(Line(what, f"{first:,} tokens", milliseconds[-1], milliseconds[0], "ms", slope))
    return lines


def forward_and_backward(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Run forward and backward pass without the head."""
    model(tokens, pre_logits=True).sum().backward()
    model.zero_grad(set_to_none=True)


def measure(given: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Decode first: the peak of memory must not be that of training."""
    given.overrides = {"vocab_size": given.vocab} if given.vocab else {}
    notes = [peak(name, given) for name in given.presets] if given.peak else []
    lines = [line for dtype in given.dtypes for name in given.presets for line in decoding(name, dtype, given)]
    return [*lines, *(training(given) if len(given.presets) > 1 else [])], notes


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--presets", nargs="+", default=["tokenformer_150m"], help="several are trained, too")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--tokens", type=int, default=40, help="tokens after each prompt")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--vocab", type=int, help="vocabulary size; a small one does not hide the cost of the blocks")
    parser.add_argument("--peak", action="store_true", help="measure peak memory of decoding, too")
    main("length", parser, measure)

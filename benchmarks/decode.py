"""Time for a new token after short and after long texts, beside what attention over the cache alone takes.

    python benchmarks/decode.py [--preset tokenformer_150m] [--lengths 64 1024] [--tokens 40] [--batch 1]
        [--device cpu] [--dtype float32]

A text of each length is read, with random weights, and goes on by one token in turn, so that other work on the machine
disturbs all alike; the figures are medians. Attention is ``scaled_dot_product_attention`` with one query over keys and
values of the same shapes, as they lie in the cache, once for each block. What a new token takes beyond it should not
depend on the length.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from lit_tokenformer.inference.sampling import Sampling, generate_tokens
from lit_tokenformer.models import TokenformerConfig, create_backbone


def attention_over_cache(config: TokenformerConfig, batch: int, length: int, room: int, like: torch.Tensor) -> Callable:
    """A function that does the attention of one new token in every block."""
    shape = (batch, config.num_heads, room, config.dim // config.num_heads)
    caches = [torch.randn(2, *shape, device=like.device, dtype=like.dtype) for _ in range(config.depth)]
    query = torch.randn(*shape[:2], 1, shape[3], device=like.device, dtype=like.dtype)

    @torch.inference_mode()
    def attend() -> float:
        for key, value in caches:
            out = F.scaled_dot_product_attention(query, key[:, :, :length], value[:, :, :length])
        return float(out[0, 0, 0, 0])  # waits for the device

    return attend


def milliseconds(function: Callable[[], object]) -> float:
    """What one call takes."""
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def main(preset: str, lengths: list[int], tokens: int, batch: int, device: str, dtype: str) -> None:
    """Prints a line for each length."""
    torch.manual_seed(0)
    room = max(lengths) + tokens + 2
    model = create_backbone(preset, context_length=room).eval().to(device, getattr(torch, dtype))
    config = model.config
    weight = next(model.parameters())
    steps, attentions = [], []
    for length in lengths:
        prompts = torch.randint(config.vocab_size, (batch, length))
        steps.append(generate_tokens(model, list(prompts), tokens + 2, Sampling(temperature=0), seed=0))
        attentions.append(attention_over_cache(config, batch, length, length + tokens + 2, weight))
    for step, attend in zip(steps, attentions, strict=True):  # reads the text, and the second token warms up
        next(step), next(step), attend()
    taken = [[] for _ in lengths]
    attended = [[] for _ in lengths]
    for _ in range(tokens):
        for number in range(len(lengths)):
            taken[number].append(milliseconds(lambda step=steps[number]: next(step)))
            attended[number].append(milliseconds(attentions[number]))

    print(
        f"{preset}, batch {batch}, {dtype} on {weight.device}, {torch.get_num_threads()} threads, medians of {tokens}"
    )
    print("tokens before   a new token   attention over the cache   all else   (ms)")
    for number, length in enumerate(lengths):
        token, attention = statistics.median(taken[number]), statistics.median(attended[number])
        rest = statistics.median(a - b for a, b in zip(taken[number], attended[number], strict=True))
        print(f"{length:13,}   {token:11.2f}   {attention:24.3f}   {rest:8.2f}")
    token = [statistics.median(a - b for a, b in zip(one, taken[0], strict=True)) for one in taken]
    attention = [statistics.median(a - b for a, b in zip(one, attended[0], strict=True)) for one in attended]
    for number, length in list(enumerate(lengths))[1:]:
        print(
            f"from {lengths[0]:,} to {length:,} tokens: a new token takes {token[number]:+.2f} ms, "
            f"attention over the cache {attention[number]:+.2f} ms (medians of differences within a round)"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tokenformer_150m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    main(**vars(parser.parse_args()))

"""How cost grows with the length: training time of RWKV-4 and of attention, RWKV-4's speed and memory in generation.

    python benchmarks/recurrence.py [--preset rwkv4_small] [--beside transformer_small]
        [--lengths 256 512 1024 2048 4096] [--rounds 5] [--tokens 4096] [--device cpu]

Training is a forward and backward pass over one text of each length; both models and all lengths take turns, so that
other work on the machine disturbs all alike, and figures are medians. The exponent is the slope of log time against
log length, 1 where time grows linearly. Generation writes ``tokens`` tokens in one go and tells the speed of windows
of it, the size of the state, and the growth of the process's peak memory between the 64th token and the last.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import time

import numpy as np
import torch

from lit_tokenformer.inference.sampling import Sampling, generate_tokens
from lit_tokenformer.models import create_backbone

VOCABULARY = 256  # small, so that the head does not hide what the blocks take


def seconds(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """What a forward and backward pass takes."""
    start = time.perf_counter()
    model(tokens, pre_logits=True).sum().backward()
    model.zero_grad(set_to_none=True)
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def training(presets: list[str], lengths: list[int], rounds: int, device: str) -> None:
    """Prints the time for each length, and how it grows."""
    models = {
        name: create_backbone(name, vocab_size=VOCABULARY, context_length=max(lengths)).to(device) for name in presets
    }
    taken: dict[tuple[str, int], list[float]] = {(name, length): [] for name in presets for length in lengths}
    for number in range(rounds + 1):
        for name, length in taken:
            passed = seconds(models[name], torch.randint(VOCABULARY, (1, length), device=device))
            if number:  # the first warms up
                taken[name, length].append(passed)
    print("training, ms:  " + "".join(f"{length:>9,}" for length in lengths) + "   exponent, from the second length on")
    for name in presets:
        medians = [statistics.median(taken[name, length]) for length in lengths]
        (slope, _), at = (
            np.polyfit(np.log(lengths[1:]), np.log(medians[1:]), 1),
            "".join(f"{1000 * one:9.0f}" for one in medians),
        )
        print(f"{name:15}{at}   {slope:.2f}")


def state_bytes(model: torch.nn.Module, length: int) -> int:
    """Size of what is remembered of a text of this length."""
    state = model.new_state(length)
    with torch.inference_mode():
        model.forward_features(torch.zeros(1, length, dtype=torch.long), state=state)
    kept = [vars(part).values() for part in itertools.chain(*state.blocks) if part is not None]
    flat = (
        tensor for values in kept for value in values for tensor in (value if isinstance(value, tuple) else [value])
    )
    return sum(tensor.numel() * tensor.element_size() for tensor in flat if isinstance(tensor, torch.Tensor))


def generation(preset: str, tokens: int, device: str) -> None:
    """Prints the speed of windows, the size of the state and the growth of memory."""
    model = create_backbone(preset, vocab_size=VOCABULARY).eval().to(device)
    steps = generate_tokens(model, [[1]], tokens, Sampling(temperature=0), seed=0)
    marks = [64, 256, 1024, tokens]
    moments, peaks = {}, {}
    for number, _ in enumerate(steps, start=1):
        moments[number] = time.perf_counter()
        if number in marks:
            peaks[number] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("generation, tokens/s:", end="")
    for mark in marks:
        window = [moments[i] - moments[i - 1] for i in range(max(2, mark - 200), mark + 1)]
        print(f"   {1 / statistics.median(window):.0f} up to the {mark:,}th", end="")
    print(f"\nstate after 64 and after {tokens:,} tokens: {state_bytes(model, 64):,} and", end=" ")
    print(f"{state_bytes(model, tokens):,} bytes")
    print(f"peak memory at the end less that at the 64th token: {(peaks[tokens] - peaks[64]) / 1e6:.1f} MB")


def main(preset: str, beside: str, lengths: list[int], rounds: int, tokens: int, device: str) -> None:
    """Generation first: the peak of memory must not be that of training."""
    torch.manual_seed(0)
    print(f"{preset} on {device}, {torch.get_num_threads()} threads")
    generation(preset, tokens, device)
    training([preset, beside], lengths, rounds, device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="rwkv4_small")
    parser.add_argument("--beside", default="transformer_small")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    main(**vars(parser.parse_args()))

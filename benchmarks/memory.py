"""Peak resident memory of training a language model, beside what weights, gradients and Adam's moments take.

    python benchmarks/memory.py [--preset tokenformer_150m] [--length 1024] [--batch 1] [--checkpointing]

It makes three optimizer steps on random tokens, in a process of its own; every figure is in GB (10^9 bytes).
"""

from __future__ import annotations

import argparse
import resource
from functools import partial

import torch

from lit_tokenformer.tasks import LitCausalLM


def main(preset: str, length: int, batch: int, checkpointing: bool) -> None:
    """Prints the peak, what weights, gradients and moments take, and the difference."""
    torch.manual_seed(0)
    optimizer = partial(
        torch.optim.AdamW, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )  # as in the configs
    task = LitCausalLM(preset, context_length=length, optimizer=optimizer, grad_checkpointing=checkpointing)
    task.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    adam = task.build_optimizer()
    for step in range(3):
        loss = task.training_step(torch.randint(50277, (batch, length + 1)), step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    parameters = sum(parameter.numel() for parameter in task.parameters())
    fixed = 4 * 4 * parameters / 1e9
    print(
        f"{preset}, {batch} x {length} tokens, checkpointing {checkpointing}: peak {peak:.2f}, weights, gradients and "
        f"moments of {parameters:,} parameters {fixed:.2f}, all else {peak - fixed:.2f} GB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tokenformer_150m")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    main(**vars(parser.parse_args()))

"""What leaving out the padding saves: a training step of a masked language model, padded and unpadded.

    python benchmarks/unpadding.py [--preset mosaic_bert_small] [--shares 0 0.25 0.5 0.75] [--batch 32] [--length 128]
        [--rounds 9] [--device cpu] [--dtype float32]

Both forms have the same weights and see the same batches in turn, so that other work on the machine disturbs both
alike; figures are medians. Lengths lie evenly around what gives the share. ``fraction`` is the unpadded form's time
over the padded form's: were all work proportional to the real tokens, it would be 1 - share; attention over the padded
batch and the head, which is computed for masked tokens alone in both, are not.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from lit_tokenformer.models import Tokenformer
from lit_tokenformer.tasks import LitMaskedLM


def make_batch(share: float, batch: int, length: int, vocabulary: int, device: str) -> tuple[torch.Tensor, ...]:
    """Random tokens, 15 % of the real ones to be told."""
    mean = (1 - share) * length
    spread = min(mean - 1, length - mean)
    lengths = torch.linspace(mean - spread, mean + spread, batch).round().long()
    tokens = torch.randint(vocabulary, (batch, length))
    real = torch.arange(length) < lengths[:, None]
    labels = torch.where((torch.rand(batch, length) < 0.15) & real, tokens, -100)
    labels[:, 0] = tokens[:, 0]
    return tuple(one.to(device) for one in (tokens, labels, lengths))


def milliseconds(task: LitMaskedLM, batch: tuple[torch.Tensor, ...], dtype: torch.dtype) -> float:
    """What a forward and backward pass takes."""
    device = batch[0].device.type
    start = time.perf_counter()
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        loss = task.training_step(batch, 0)
    loss.backward()
    task.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def main(preset: str, shares: list[float], batch: int, length: int, rounds: int, device: str, dtype: str) -> None:
    """Prints a line for each share."""
    torch.manual_seed(0)
    tasks = {}
    for unpad in (False, True):
        overrides = {"unpad": unpad, "dropout": 0.0, "attn_dropout": 0.0}
        tasks[unpad] = LitMaskedLM(preset, 4096, length, overrides=overrides).to(device).train()
        tasks[unpad].log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    tasks[True].load_state_dict(tasks[False].state_dict())
    assert isinstance(tasks[True].backbone, Tokenformer)
    print(
        f"{preset}, {batch} x {length} tokens, {dtype} on {device}, {torch.get_num_threads()} threads, {rounds} rounds"
    )
    print("share of padding   padded   unpadded (ms)   fraction   1 - share")
    for share in shares:
        given = make_batch(share, batch, length, 4096, device)
        real = 1 - given[2].float().mean().item() / length
        losses = [task.training_step(given, 0).item() for task in tasks.values()]
        assert abs(losses[0] - losses[1]) < 1e-4 * losses[0], losses
        taken = {unpad: [] for unpad in tasks}
        for number in range(rounds + 2):
            for unpad, task in tasks.items():
                passed = milliseconds(task, given, getattr(torch, dtype))
                if number >= 2:  # the first warm up
                    taken[unpad].append(passed)
        padded, unpadded = (statistics.median(taken[unpad]) for unpad in (False, True))
        ratio = statistics.median(b / a for a, b in zip(taken[False], taken[True], strict=True))
        print(f"{real:16.2f}   {padded:6.0f}   {unpadded:13.0f}   {ratio:8.2f}   {1 - real:9.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mosaic_bert_small")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    main(**vars(parser.parse_args()))

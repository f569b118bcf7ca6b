"""Growth in a plain PyTorch loop, with optimizer state, and a checkpoint of the grown model.

python -m examples.plain_loop
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from lit_tokenformer import create_backbone, grow
from lit_tokenformer.models import param_tokens


def new_model() -> nn.Module:
    sizes = {"image_size": 8, "patch_size": 4, "dim": 64, "num_heads": 2, "depth": 2, "param_tokens": 16}
    return create_backbone("tokenformer_vit_tiny_patch16_224", in_chans=1, num_classes=10, **sizes)


def main(steps: int = 300) -> float:
    """Train with growths after a third and two thirds of the steps.

    Returns:
        Accuracy on held-out digits, from 0 to 1.
    """
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    train, test = order[360:], order[:360]

    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=20)
    schedule = {steps // 3: {"qkv": 32, "proj": 32, "ffn": 128}, 2 * steps // 3: {"depth": 4}}
    for step in range(steps):
        if step in schedule:
            before = model(images[test])
            grow(model, schedule[step], optimizer=optimizer)  # replaces parameters; maps the state of the optimizer
            print(step, schedule[step], f"largest difference {(model(images[test]) - before).abs().max():.1e}")
        batch = train[torch.randint(len(train), (64,))]
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "grown.pt"
        torch.save(model.state_dict(), path)
        loaded = new_model()
        grow(loaded, {**param_tokens(model), "depth": 4})  # depth first; tokens would also follow the tensors
        loaded.load_state_dict(torch.load(path, weights_only=True))
    assert torch.equal(loaded.eval()(images[test]), model.eval()(images[test]))
    accuracy = (loaded(images[test]).argmax(1) == labels[test]).float().mean().item()
    print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

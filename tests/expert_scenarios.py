"""Fits of a model with experts under several strategies, in the processes of torchrun: see test_experts.py."""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from callbacks import ParameterGrowthCallback
from lit_tokenformer.distributed.sharding import reshard
from lit_tokenformer.distributed.strategy import GrowingModelParallelStrategy
from lit_tokenformer.tasks import LitCausalLM

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
STRATEGIES = {  # with data-parallel processes
    "ddp": (lambda: "ddp", 2),
    "fsdp": (lambda: GrowingModelParallelStrategy(2, 1, process_group_backend="gloo"), 2),
    "tensor_parallel": (lambda: GrowingModelParallelStrategy(1, 2, process_group_backend="gloo"), 1),
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def fit(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Fit 3 optimizer steps of 2 micro-batches; in ``NAME_grown``, the experts come by a growth after the first."""
    make, data = STRATEGIES[name.removesuffix("_grown")] if WORLD > 1 else (lambda: "auto", 1)
    seed_everything(0)
    sizes = {"dim": 16, "depth": 2, "num_heads": 2, "param_tokens": 8}
    grown = name.endswith("grown")
    task = LitCausalLM(
        "tokenformer_lm_tiny",
        vocab_size=31,
        context_length=12,
        overrides={**sizes, "experts_top_k": 2, "experts": 1 if grown else 4},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    )
    for block in task.backbone.blocks if not grown else ():
        block.mlp.router.bias[1] = -5.0  # idle on every process
        nn.init.normal_(block.mlp.router.weight)
    words = torch.randint(31, (24, 13), generator=torch.Generator().manual_seed(1))
    sampler = DistributedSampler(words, num_replicas=data, rank=RANK % data, shuffle=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=make(),
        max_steps=3,
        accumulate_grad_batches=2,
        callbacks=[ParameterGrowthCallback({1: {"experts": 4}}, unit="step", check=False)] if grown else [],
        use_distributed_sampler=False,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader(words, batch_size=4 // data, sampler=sampler))
    reshard(task)
    return {key: whole(tensor) for key, tensor in task.state_dict().items()}


if __name__ == "__main__":
    for scenario in sys.argv[2:]:
        state = fit(Path(sys.argv[1]), scenario)
        torch.save(state, Path(sys.argv[1]) / f"{scenario}-{WORLD}-{RANK}.pt")

"""Fits of one adapter under several strategies, in the processes of torchrun: see test_adapters.py."""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler

from callbacks import AdapterCallback
from lit_tokenformer.distributed.strategy import GrowingModelParallelStrategy
from lit_tokenformer.tasks import LitCausalLM

RANK = int(os.environ.get("RANK", 0))
STRATEGIES = {  # with data-parallel processes
    "prepare": (lambda: "auto", 1),
    "one": (lambda: "auto", 1),
    "ddp": (lambda: "ddp", 2),
    "fsdp": (lambda: GrowingModelParallelStrategy(2, 1, process_group_backend="gloo"), 2),
    "tensor_parallel": (lambda: GrowingModelParallelStrategy(1, 2, process_group_backend="gloo"), 1),
    "resumed": (lambda: GrowingModelParallelStrategy(1, 2, process_group_backend="gloo"), 1),
}


def fit(folder: Path, name: str) -> None:
    """Fit an adapter on the base for 2 epochs of 2 global batches; ``prepare`` fits the base, ``resumed`` the rest."""
    make, data = STRATEGIES[name]
    seed_everything(0)
    task = LitCausalLM(
        "tokenformer_lm_tiny",
        vocab_size=31,
        context_length=12,
        overrides={"dim": 16, "depth": 2, "num_heads": 2, "param_tokens": 8},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    )
    words = torch.randint(31, (16, 13), generator=torch.Generator().manual_seed(1))
    sampler = DistributedSampler(words, num_replicas=data, rank=RANK % data, shuffle=False)
    keep = ModelCheckpoint(
        folder / f"{name}_kept", "step{step}", save_top_k=-1, every_n_train_steps=2, auto_insert_metric_name=False
    )
    adapter = AdapterCallback(
        str(folder / "prepare_kept" / "step4.ckpt"), "docs", {"qkv": 2, "ffn": 4}, output=str(folder / name)
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if name in ("prepare", "one") else 2,
        strategy=make(),
        max_steps=4,
        callbacks=[keep] if name == "prepare" else [adapter, keep],
        use_distributed_sampler=False,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    resumes = str(folder / "fsdp_kept" / "step2.ckpt") if name == "resumed" else None
    trainer.fit(task, DataLoader(words, batch_size=8 // data, sampler=sampler), ckpt_path=resumes)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        fit(Path(sys.argv[1]), name)

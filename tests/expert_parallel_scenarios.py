"""Fits with experts divided among processes, and the same fits on one process; run by test_expert_parallel.py.

Usage: expert_parallel_scenarios.py FOLDER NAME[:ckpt_path=FILE|:tensor=PROCESSES]...; started by torchrun.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler

from callbacks import ParameterGrowthCallback, TrainingMonitor
from lit_tokenformer.checkpoints.checkpoint_io import WholeCheckpointIO
from lit_tokenformer.distributed import GrowingModelParallelStrategy
from lit_tokenformer.distributed.sharding import shard
from lit_tokenformer.models import create_backbone
from lit_tokenformer.models.experts import Experts
from lit_tokenformer.tasks import LitCausalLM, LRSchedule

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SIZES = {"dim": 16, "depth": 2, "num_heads": 2, "param_tokens": 8}
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
"""Optimizer whose steps depend on the scale of gradients, unlike Adam's."""
FITS = {  # preset, overrides, routing bias
    "tokens": ("tokenformer_lm_tiny", {"experts_top_k": 2, "shared_experts": 1}, [0, -5, 0, 0]),  # one is idle
    "mlp": ("gpt2_tiny", {}, [5, 5, 0, 0]),  # all data tokens of process 1 are sent to process 0, which sends none
    "grown": ("tokenformer_lm_tiny", {"experts_top_k": 2}, [0, 0, 0, 0]),
}


def fit(folder, name, epochs=1, ckpt_path=None, tensor=1):
    """Fit epochs of 3 optimizer steps of 2 micro-batches, and save FOLDER/NAME-WORLD.ckpt.

    Args:
        folder: Folder of checkpoints and logs.
        name: A key of FITS.
        epochs: Number of epochs.
        ckpt_path: Checkpoint to resume from, which is then part of the name.
        tensor: Tensor-parallel processes, part of the name if there are several.
    """
    preset, overrides, bias = FITS[name]
    data, division = WORLD // tensor, f"{WORLD // tensor}x{tensor}" if tensor > 1 else str(WORLD)
    seed_everything(0)
    task = LitCausalLM(
        preset,
        vocab_size=31,
        context_length=12,
        overrides={**SIZES, "experts": 4, **overrides},
        optimizer=partial(torch.optim.AdamW, lr=0.01) if name == "grown" else SGD,
        schedule=LRSchedule("constant"),
    )
    if name != "mlp":
        task.double()  # later steps enlarge the rounding of earlier ones
    for block in task.backbone.blocks:
        block.mlp.router.bias += torch.tensor(bias)
        nn.init.normal_(block.mlp.router.weight)
    words = torch.randint(31, (24, 13), generator=torch.Generator().manual_seed(1))
    sampler = DistributedSampler(words, num_replicas=data, rank=RANK // tensor, shuffle=False)
    strategy = GrowingModelParallelStrategy(data, tensor, process_group_backend="gloo", expert_parallel_size=2)
    grows = [ParameterGrowthCallback({1: {"qkv": 16, "ffn": 48}}, unit="step", check=False)] if name == "grown" else []
    trainer = Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=strategy if WORLD > 1 else "auto",
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        callbacks=[*grows, TrainingMonitor(log_images=0, log_text=0)],
        plugins=[WholeCheckpointIO()],
        use_distributed_sampler=False,
        logger=CSVLogger(
            folder, name=f"{name}-{division}", version="" if ckpt_path is None else f"from-{ckpt_path.name}"
        ),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(words, batch_size=4 // data, sampler=sampler)
    trainer.fit(task, loader, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    sent = [block.mlp.router.last_load.view(2, 2).sum(dim=1).tolist() for block in task.backbone.blocks]
    assert name != "mlp" or all(share == [1, 0] for share in sent), sent
    if WORLD > 1:
        held = {sum(one.to_local().numel() for one in layer.experts.parameters()) for layer in layers(task)}
        total = {sum(one.numel() for one in layer.experts.parameters()) for layer in layers(task)}
        assert held == {total.pop() // WORLD}, held
    origin = "" if ckpt_path is None else f"-from-{ckpt_path.name}"
    trainer.save_checkpoint(folder / f"{name}-{division}{origin}.ckpt")


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, Experts)]


def forward():
    """Compare the outputs of each process with those of the whole model for the same data tokens."""
    for preset, given in (
        ("tokenformer_lm_tiny", {"experts_top_k": 2}),
        ("llama_tiny", {"mlp_ratio": 2.0, "shared_experts": 1}),
        ("transformer_tiny", {"projection": "pattention", "experts_top_k": 3}),
    ):
        torch.manual_seed(0)
        model = create_backbone(preset, **{**SIZES, "vocab_size": 31, "context_length": 12, "experts": 4, **given})
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        tokens = torch.randint(31, (2 * WORLD, 12))
        expected = model(tokens).chunk(WORLD)[RANK]
        shard(model, init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("data_parallel", "tensor_parallel")), (), 2)
        own = tokens.chunk(WORLD)[RANK]
        for context in (torch.enable_grad, torch.no_grad):
            with context():
                torch.testing.assert_close(model(own), expected, rtol=1e-6, atol=1e-6)
                assert model(own[:, :1]).shape == (2, 1, 31)  # experts without data tokens


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for scenario in sys.argv[2:]:
        name, *more = scenario.split(":")
        given = dict(one.split("=") for one in more)
        if name == "forward":
            torch.distributed.init_process_group("gloo")
            forward()
        elif "ckpt_path" in given:
            fit(folder, name, 2, folder / given["ckpt_path"])
        else:
            fit(folder, name, tensor=int(given.get("tensor", 1)))

"""A vision transformer of timm, trained with timm's optimizer and schedule on Fashion-MNIST."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch.nn import functional as F

from benchmarks.growth_study.kept_images import KeptImages
from examples.grow_pretrained.arms import Demonstration, Study, write

BATCH, WIDTH, HEADS, DEPTH = 64, 32, 2, 2
LR = 4e-3
ARCHITECTURE = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}


class Images:
    """Training and evaluation by timm alone.

    Args:
        root: Folder with FashionMNIST/raw.
    """

    def __init__(self, root: str) -> None:
        self.settings = {"root": root, "batch_size": BATCH, "eval_batch_size": 500}
        self.data = KeptImages(**self.settings)

    def train_base(self, folder: Path, seed: int, steps: int) -> None:
        """Train a ``VisionTransformer`` in a plain loop, and save it as ``push_to_hf_hub`` does."""
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **ARCHITECTURE)
        optimizer = create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=0.05, betas=(0.9, 0.95))
        schedule = CosineLRScheduler(optimizer, steps, warmup_t=steps // 20, warmup_prefix=True, t_in_epochs=False)
        images, labels = self.data.train_dataloader().dataset.tensors  # type: ignore[attr-defined]
        order = torch.cat([torch.randperm(len(images)) for _ in range(1 + steps * BATCH // len(images))])
        model.train()
        for step in range(steps):
            batch = order[step * BATCH : (step + 1) * BATCH]
            schedule.step_update(step)
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        save_for_hf(model, str(folder), model_args=ARCHITECTURE, safe_serialization=True)

    @torch.no_grad()
    def score(self, folder: Path) -> dict[str, float]:
        """Load a folder with timm alone, and evaluate it on the test images.

        Returns:
            Loss in nats, top-1 accuracy, parameters in all and in the blocks.
        """
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        images, labels = self.data.val_dataloader().dataset.tensors  # type: ignore[attr-defined]
        logits = torch.cat([model(part) for part in images.split(500)])
        return {
            "loss": F.cross_entropy(logits, labels).item(),
            "accuracy": (logits.argmax(1) == labels).float().mean().item(),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "block_parameters": sum(parameter.numel() for parameter in model.blocks.parameters()),
        }

    def demonstration(self, smoke: bool) -> Demonstration:
        """Set up the arms; a smoke test takes seconds and shows nothing."""
        growth = {"unit": "step", "schedule": {1: {"depth": "1.5x", "hidden": "1.5x"}}}
        adam = {"lr": LR, "betas": [0.9, 0.95], "weight_decay": 0.05, "fused": True}
        return Demonstration(
            train_base=self.train_base,
            score=self.score,
            format="timm",
            settings={
                "trainer": {
                    "callbacks": [{"class_path": "callbacks.ParameterGrowthCallback", "init_args": growth}],
                    "gradient_clip_val": 1.0,
                },
                "model": {
                    "class_path": "lit_tokenformer.tasks.LitImageClassifier",
                    "init_args": {
                        "preset": "checkpoint",
                        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": adam},
                        "schedule": {"name": "cosine", "warmup": 0.05, "unit": "share"},
                    },
                },
                "data": {"class_path": "benchmarks.growth_study.kept_images.KeptImages", "init_args": self.settings},
            },
            preset="vit_tiny_patch16_224",
            fields={"dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "patch_size": 7},
            of_data={"image_size": 28, "in_chans": 1, "num_classes": 10},
            final={"depth": 3, "mlp_ratio": 6.0},
            batch=BATCH,
            base_steps=20 if smoke else 1000,
            share=0.4,
            rates=(LR,) if smoke else (LR / 4, LR / 2),
            scratch_rates=(LR,) if smoke else (LR, 2 * LR),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="Folder of the fits; those found there are not repeated.")
    parser.add_argument("--root", default="data", help="Folder with FashionMNIST/raw.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base_steps", type=int, help="Steps of the base model.")
    parser.add_argument("--smoke", action="store_true", help="A few steps.")
    given = parser.parse_args()
    demonstration = Images(given.root).demonstration(given.smoke)
    if given.base_steps is not None:
        demonstration = replace(demonstration, base_steps=given.base_steps)
    results = Study(demonstration, given.output).run(given.seeds)
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    write(results, given.output / "vit", ("loss", "accuracy"), versions)


if __name__ == "__main__":
    main()

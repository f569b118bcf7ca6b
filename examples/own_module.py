"""Growth inside a LightningModule of your own: a vision transformer on scikit-learn's digits, two growths.

python -m examples.own_module
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from callbacks import GrowingEMA, ParameterGrowthCallback, TrainingMonitor
from lit_tokenformer import create_backbone
from lit_tokenformer.cost import ModelCost, model_cost


class Digits(LightningModule):
    """Classifier that knows nothing of growth."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"image_size": 8, "patch_size": 4, "dim": 64, "num_heads": 2, "depth": 2, "param_tokens": 16}
        self.model = create_backbone("tokenformer_vit_tiny_patch16_224", in_chans=1, num_classes=10, **sizes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> (B, 10)."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/acc1", (self(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    def cost(self) -> ModelCost:
        """Optional: FLOPs for ``TrainingMonitor`` and for the log line of a growth."""
        return model_cost(self.model.config, self.model.size)


def main(epochs: int = 12) -> float:
    """Train with growths after a third and two thirds of the epochs.

    Returns:
        Validation accuracy, from 0 to 1.
    """
    seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    train, val = torch.utils.data.random_split(data, [1437, 360])
    growth = ParameterGrowthCallback({epochs // 3: 32, 2 * epochs // 3: 64})
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[growth, GrowingEMA(decay=0.95), TrainingMonitor(log_images=0)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Digits(), DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=360))
    for event in growth.events:
        print(event["epoch"], event["before"], "->", event["after"], f"{event['output_difference']:.1e}")
    accuracy = float(trainer.callback_metrics["val/acc1"])
    print(f"validation accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""Images decoded once and kept in memory; at the sizes of the study, reading them takes longer than a training step."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset
from torchvision.datasets import FashionMNIST

from lit_tokenformer.data import ImageDataModule


class KeptImages(ImageDataModule):
    """Fashion-MNIST as ``ImageDataModule`` normalizes it, in one channel, without augmentation. Its fits cannot resume.

    ``root`` is a folder with FashionMNIST/raw.
    """

    def __init__(self, root: str, batch_size: int, eval_batch_size: int) -> None:
        sizes: dict[str, Any] = {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
        super().__init__("fashion_mnist", root, in_chans=1, val_fraction=0.0, **sizes)

    @cached_property
    def _kept(self) -> dict[bool, TensorDataset]:
        self.splits  # noqa: B018 (a one-line error if the files are missing)
        return {train: self._read(train) for train in (True, False)}

    def _read(self, train: bool) -> TensorDataset:
        files = FashionMNIST(str(self.settings.root), train=train)
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        grey = (files.data[:, None].float() / 255 - mean[:1].view(1, 1, 1)) / std[:1].view(1, 1, 1)
        return TensorDataset(grey, files.targets.long())

    def train_dataloader(self) -> DataLoader:
        """Load all images in an order drawn from the seed; an incomplete last batch is dropped."""
        kept = self._kept[True]
        order = RandomSampler(kept, generator=torch.Generator().manual_seed(self._seed))
        return self._loader(kept, BatchSampler(order, self.batch_size, drop_last=True))

    def val_dataloader(self) -> DataLoader:
        """Load the test images in order."""
        kept = self._kept[False]
        return self._loader(kept, BatchSampler(SequentialSampler(kept), self.eval_batch_size, drop_last=False))

    def _loader(self, kept: TensorDataset, batches: BatchSampler) -> DataLoader:
        loader: Any = DataLoader(kept, sampler=batches, batch_size=None)
        return loader


def summary(root: str) -> str:
    """Count the images of both splits below ``root``, with the SHA-256 of their pixels and labels."""
    splits = [FashionMNIST(root, train=train) for train in (True, False)]
    digest = hashlib.sha256()
    for one in splits:
        digest.update(one.data.numpy().tobytes() + one.targets.to(torch.uint8).numpy().tobytes())
    counts = " and ".join(f"{len(one):,}" for one in splits)
    return f"fashion_mnist: {counts} images, sha256 {digest.hexdigest()[:12]}"

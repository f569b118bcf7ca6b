"""LightningDataModule of images with questions and answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_tokenformer.data.image_text.sources import ImageTextSource, Pair, Pairs, PairSettings, PairSplits
from lit_tokenformer.data.images.datamodule import EvalImageSampler
from lit_tokenformer.data.images.transforms import ImageSize, pair
from lit_tokenformer.data.resumable import EpochSampler, ResumableDataModule, ResumableLoader, no_test_split
from lit_tokenformer.data.settings import (
    HubImageSettings,
    LoaderSettings,
    accept_flat_names,
    check_share,
    check_whole,
    flat_settings,
)
from lit_tokenformer.data.text.tokenizer import Tokenizer, bpe_size
from lit_tokenformer.errors import UserError
from lit_tokenformer.registry import IMAGE_TEXT_SOURCES

IGNORED = -100
"""Label of a token that is not predicted."""
_HUB = HubImageSettings()


def to_tensor(image: Image.Image, image_size: ImageSize, in_chans: int = 3) -> Tensor:
    """Convert an image to a tensor (C, H, W) float32 in [-1, 1]; one of another size is resized to the whole frame.

    Args:
        image: Image of any mode.
        image_size: Height and width in pixels, or both in one number.
        in_chans: Number of channels: 3 (RGB) or 1 (gray).
    """
    height, width = pair(image_size)
    image = image.convert("L" if in_chans == 1 else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).reshape(height, width, in_chans).permute(2, 0, 1)
    return pixels.to(torch.float32).contiguous().div_(127.5).sub_(1)


def collate(samples: list[dict[str, Any] | None]) -> dict[str, Tensor]:
    """Collate samples that are not ``None``, with the texts padded on the right to the longest."""
    found = [sample for sample in samples if sample is not None]
    longest = max(len(sample["tokens"]) for sample in found)
    tokens = torch.zeros(len(found), longest, dtype=torch.long)
    labels = torch.full((len(found), longest), IGNORED)
    for row, sample in enumerate(found):
        tokens[row, : len(sample["tokens"])] = torch.tensor(sample["tokens"])
        labels[row, : len(sample["labels"])] = torch.tensor(sample["labels"])
    image = torch.stack([sample["image"] for sample in found])
    return {"image": image, "tokens": tokens, "labels": labels, "group": torch.tensor([one["group"] for one in found])}


@dataclass(eq=False, repr=False)
class PairDataset(Dataset):
    """Pairs as tensors: training pairs under keys ``(epoch, pass, index)``, evaluation pairs under indices.

    Args:
        pairs: The pairs.
        tokenizer: Tokenizer of questions and answers.
        image_size: Image size in pixels.
        in_chans: Number of image channels.
        block_size: Maximum length of a text in tokens; the rest is cut.
        seed: Seed of the run; ``None`` for evaluation, where the index N is ``None``.
    """

    pairs: Pairs
    tokenizer: Tokenizer
    image_size: ImageSize
    in_chans: int
    block_size: int
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int, int] | int) -> dict[str, Any] | None:
        epoch, repeat, index = key if isinstance(key, tuple) else (0, 0, key)
        if self.seed is None and index >= len(self):
            return None
        entropy = (index,) if self.seed is None else (self.seed, epoch, repeat, index)
        found = self.pairs.read(index, np.random.default_rng(entropy), self.seed is not None)
        return self.encode(found)

    def encode(self, found: Pair) -> dict[str, Any]:
        """Return image, tokens, labels and group of a pair."""
        separator = self.tokenizer.separator_id
        question = [*self.tokenizer.encode(found.question), separator][-self.block_size + 1 :]
        text = [*question, *self.tokenizer.encode(found.answer), separator][: self.block_size + 1]
        labels = [IGNORED] * (len(question) - 1) + text[len(question) :]
        image = to_tensor(found.image, self.image_size, self.in_chans)
        return {"image": image, "tokens": text[:-1], "labels": labels, "group": found.group}


class VisionLanguageDataModule(ResumableDataModule):
    """Batches ``{"image": (B, C, H, W), "tokens": (B, T), "labels": (B, T), "group": (B,)}`` of questions about images.

    A text is the question, the separator, the answer and the separator; labels are the next token where it belongs to
    the answer or ends it, else -100. Images are in [-1, 1]; those of another size are resized to the whole frame. Every
    random choice is a function of the seed, the epoch and the sample, so a resumed run sees the same batches as an
    uninterrupted one, bit for bit, with any number of workers.

    Args:
        dataset: Data set: digits_grid (2 x 2 of scikit-learn's digits, with questions for one or all of them; held-out
            digits), rendered_text (words of Python's standard library in Pillow's font; held-out words), files (ROOT
            with images and a metadata.jsonl of file_name, text and, optionally, question, in train, validation and
            test folders or in one), huggingface, or images/NAME: a data set of ``ImageDataModule``, whose class names
            are the answers, with the same splits (digits, mnist, kmnist, fashion_mnist, cifar10, cifar100, imagefolder,
            huggingface).
        root: Folder of the data; the ``data_dir`` of ``load_dataset`` for huggingface.
        image_size: Input image size in pixels, height = width or ``[height, width]``. Default: 16 for digits_grid,
            [16, 80] for rendered_text, that of ``ImageDataModule`` for images/NAME, else 224.
        in_chans: Number of image channels: 3 (RGB) or 1 (gray).
        tokenizer: bytes, or a vocabulary file, its folder or the name of a Hugging Face model; see ``TextDataModule``.
        block_size: Maximum length T of question, answer and separator in tokens; longer ones are cut. Default: 20 for
            digits_grid, 14 for rendered_text, 32 for images/NAME, else 64.
        question: Question about each image of images/NAME.
        text_column: Name of the answers in rows.
        question_column: Name of the questions in rows; without it, questions are empty.
        train_samples: Training samples of digits_grid and rendered_text, drawn again in each epoch.
        val_samples: Validation samples of digits_grid and rendered_text.
        val_fraction: Fraction of the training samples held out if files or a Hugging Face data set have no validation
            split. Independent of the seed.
        seed: Seed of the sample order and of drawn samples, >= 0. Default: that of ``seed_everything``, else 0.
        loader: Batch sizes and worker processes. Each is also an argument of its own: ``batch_size=8``.
        hub: Hugging Face data set (dataset: huggingface), also as ``hf_name``, ``hf_config``, ``hf_train_split``,
            ``hf_val_split``, ``hf_image_column`` and ``hf_label_column``.

    Raises:
        ValueError: If a setting is invalid (on creation) or the data are missing (at the first use of a property or
            loader); the message is one line and begins with the setting.

    Example:
        >>> data = VisionLanguageDataModule("digits_grid", train_samples=8, batch_size=2)
        >>> data.image_size, data.vocab_size, next(iter(data.train_dataloader()))["image"].shape
        (16, 257, torch.Size([2, 3, 16, 16]))
    """

    masked = None
    """Batches of another kind than text, with or without masked tokens."""

    @accept_flat_names
    def __init__(
        self,
        dataset: str = "digits_grid",
        root: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        tokenizer: str = "bytes",
        block_size: int | None = None,
        question: str = "class?",
        text_column: str = "text",
        question_column: str = "question",
        train_samples: int = 20_000,
        val_samples: int = 1_000,
        val_fraction: float = 0.1,
        seed: int | None = None,
        loader: LoaderSettings = ResumableDataModule.loader_defaults,
        hub: HubImageSettings = _HUB,
    ) -> None:
        super().__init__(seed, loader=loader)
        self.dataset = dataset
        self.source: ImageTextSource = IMAGE_TEXT_SOURCES[dataset]
        self._needs_workers = not self.source.tiny
        height, width = pair(self.source.image_size if image_size is None else image_size)
        self.image_size: ImageSize = height if height == width else (height, width)
        self.in_chans = in_chans
        self.block_size = self.source.block_size if block_size is None else block_size
        self.tokenizer_name = tokenizer
        check_whole(image_size=(min(height, width), 1), block_size=(self.block_size, 3))
        check_whole(train_samples=(train_samples, 1), val_samples=(val_samples, 1))
        check_share(val_fraction=val_fraction)
        if in_chans not in (1, 3):
            raise UserError(f"data.in_chans: expected 3 (RGB) or 1 (gray), got {in_chans}")
        if bpe_size(tokenizer) is not None:
            raise UserError(f"data.tokenizer: expected bytes or an existing vocabulary, got {tokenizer}")
        if hub.streaming:
            raise UserError("data.streaming: unsupported by VisionLanguageDataModule (expected false)")
        located = {name: value for name, value in flat_settings(hub).items() if name in PairSettings.__annotations__}
        self.settings = PairSettings(
            root=root,
            train_samples=train_samples,
            val_samples=val_samples,
            val_fraction=val_fraction,
            question=question,
            text_column=text_column,
            question_column=question_column,
            **located,
        )

    @property
    def data_settings(self) -> dict[str, Any]:
        own = {"dataset": self.dataset, "image_size": self.image_size, "in_chans": self.in_chans}
        own |= {"tokenizer": self.tokenizer_name, "block_size": self.block_size}
        return {**super().data_settings, **own, **asdict(self.settings)}

    @cached_property
    def splits(self) -> PairSplits:
        """Data set splits, opened at first use."""
        return self.source.open(self.settings)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of questions and answers."""
        return Tokenizer.load(self.tokenizer_name)

    @property
    def vocab_size(self) -> int:
        """Vocabulary size V, the largest id + 1."""
        return self.tokenizer.size

    @property
    def separator_id(self) -> int:
        """Id of the token after a question and after an answer."""
        return self.tokenizer.separator_id

    @property
    def context_length(self) -> int:
        """Maximum length T of a text in tokens: ``block_size``."""
        return self.block_size

    @property
    def group_names(self) -> tuple[str, ...]:
        """Group names of questions that evaluation reports separately."""
        return self.splits.group_names

    @property
    def class_names(self) -> tuple[str, ...]:
        """Answers to choose from, for images/NAME; else none."""
        return self.splits.class_names

    @property
    def num_train_samples(self) -> int:
        """Number of training samples per epoch over all processes."""
        return len(self.splits.train)

    def setup(self, stage: str) -> None:
        """Open the data, so that missing files fail fast."""
        splits = self.splits
        if stage == "fit":
            rank_zero_info(f"{self.dataset}: {len(splits.train)} training and {len(splits.val)} validation samples")

    def train_dataloader(self) -> DataLoader:
        """Create the resumable training loader of this process."""
        rank, replicas = self._place
        pairs = self._dataset(self.splits.train, self._seed)
        sampler = EpochSampler(pairs, self._seed, num_replicas=replicas, rank=rank)
        self._check_batch_size(len(sampler), "samples")
        settings: dict[str, Any] = {"sampler": sampler, "collate_fn": collate, "drop_last": True}
        return self._resumed(self._create_loader(ResumableLoader, pairs, **settings))

    def val_dataloader(self) -> DataLoader:
        """Create the validation loader, in order."""
        return self._eval_loader(self.splits.val)

    def test_dataloader(self) -> DataLoader:
        """Create the test loader, in order; raise a ``UserError`` without a test split."""
        if self.splits.test is None:
            raise no_test_split()
        return self._eval_loader(self.splits.test)

    def predict_dataloader(self) -> DataLoader:
        """Create the prediction loader, in order: the test split, else the validation split."""
        return self._create_loader(
            DataLoader, self._dataset(self._predict_pairs), batch_size=self.eval_batch_size, collate_fn=collate
        )

    def predict_name(self, index: int) -> str:
        """Return the path of an image, or its index without a file, by its index in the prediction order."""
        return self._predict_pairs.name(index)

    @property
    def _predict_pairs(self) -> Pairs:
        return self.splits.test or self.splits.val

    def _dataset(self, pairs: Pairs, seed: int | None = None) -> PairDataset:
        return PairDataset(pairs, self.tokenizer, self.image_size, self.in_chans, self.block_size, seed)

    def _eval_loader(self, pairs: Pairs) -> DataLoader:
        found, (rank, replicas) = self._dataset(pairs), self._place
        if len(found) < replicas:
            raise UserError(f"trainer.devices: {replicas} processes cannot share {len(found)} samples for evaluation")
        sampler = EvalImageSampler(found, self.eval_batch_size, replicas, rank) if replicas > 1 else None
        size = self.eval_batch_size if sampler is None else sampler.batch_size
        return self._create_loader(DataLoader, found, sampler=sampler, batch_size=size, collate_fn=collate)

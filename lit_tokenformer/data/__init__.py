"""LightningDataModules for images and text."""

# Imported first, since typing caches the order of the first Union it sees: with that of `datasets`, a Trainer's
# `limit_val_batches: 1` from a config would become 1.0, which means all batches.
import lightning.pytorch  # noqa: F401

from lit_tokenformer.data.image_text import VisionLanguageDataModule
from lit_tokenformer.data.images.datamodule import ImageDataModule
from lit_tokenformer.data.images.transforms import Augmentation
from lit_tokenformer.data.multitask import MultiTaskDataModule
from lit_tokenformer.data.text.datamodule import TextDataModule
from lit_tokenformer.data.text.masked import MaskedTextDataModule
from lit_tokenformer.data.text.tokenizer import Tokenizer

__all__ = [
    "Augmentation",
    "ImageDataModule",
    "MaskedTextDataModule",
    "MultiTaskDataModule",
    "TextDataModule",
    "Tokenizer",
    "VisionLanguageDataModule",
]

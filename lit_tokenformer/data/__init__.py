"""LightningDataModules: what the models are trained on."""

from lit_tokenformer.data.augmentation import Augmentation
from lit_tokenformer.data.images import ImageDataModule
from lit_tokenformer.data.masked_text import MaskedTextDataModule
from lit_tokenformer.data.multitask import MultiTaskDataModule
from lit_tokenformer.data.text import TextDataModule
from lit_tokenformer.data.tokenizers import Tokenizer

__all__ = [
    "Augmentation",
    "ImageDataModule",
    "MaskedTextDataModule",
    "MultiTaskDataModule",
    "TextDataModule",
    "Tokenizer",
]

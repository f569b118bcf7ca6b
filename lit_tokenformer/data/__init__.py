"""LightningDataModules: what the models are trained on."""

from lit_tokenformer.data.augmentation import Augmentation
from lit_tokenformer.data.images import ImageDataModule
from lit_tokenformer.data.text import TextDataModule
from lit_tokenformer.data.tokenizers import Tokenizer

__all__ = ["Augmentation", "ImageDataModule", "TextDataModule", "Tokenizer"]

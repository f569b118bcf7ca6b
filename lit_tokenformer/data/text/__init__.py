"""Text data: sources, tokenizers, token caches, streams and the LightningDataModules."""

from lit_tokenformer.data.text.datamodule import TextDataModule
from lit_tokenformer.data.text.masked import MaskedTextDataModule

__all__ = ["MaskedTextDataModule", "TextDataModule"]

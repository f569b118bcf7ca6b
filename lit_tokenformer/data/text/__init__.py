"""Text: sources, tokenizers, token caches and streams, and the LightningDataModules over them."""

from lit_tokenformer.data.text.datamodule import TextDataModule
from lit_tokenformer.data.text.masked import MaskedTextDataModule

__all__ = ["MaskedTextDataModule", "TextDataModule"]

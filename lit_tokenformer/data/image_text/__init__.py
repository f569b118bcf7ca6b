"""Pairs of image and text: data sets and data module."""

from lit_tokenformer.data.image_text.datamodule import VisionLanguageDataModule

__all__ = ["VisionLanguageDataModule"]

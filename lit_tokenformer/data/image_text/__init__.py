"""Pairs of image and text: data sets and data module."""

from lit_tokenformer.data.image_text.datamodule import VisionLanguageDataModule, to_tensor

__all__ = ["VisionLanguageDataModule", "to_tensor"]

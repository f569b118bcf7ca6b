"""LightningDataModules: what the models are trained on."""

from lit_tokenformer.data.augmentation import Augmentation
from lit_tokenformer.data.images import ImageDataModule

__all__ = ["Augmentation", "ImageDataModule"]

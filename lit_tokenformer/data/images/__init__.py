"""Image classification data: sources, transforms, datasets and the LightningDataModule."""

from lit_tokenformer.data.images.datamodule import ImageDataModule

__all__ = ["ImageDataModule"]

"""Images and labels: sources, transforms, datasets, and the LightningDataModule over them."""

from lit_tokenformer.data.images.datamodule import ImageDataModule

__all__ = ["ImageDataModule"]

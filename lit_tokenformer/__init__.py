"""Models that grow while they train: TokenFormer for images and text, on PyTorch Lightning."""

from lit_tokenformer import moved
from lit_tokenformer.growth import grow
from lit_tokenformer.models import Pattention, Tokenformer, TokenformerConfig, create_backbone, list_presets
from lit_tokenformer.version import __version__

moved.install()

__all__ = [
    "Pattention",
    "Tokenformer",
    "TokenformerConfig",
    "__version__",
    "create_backbone",
    "grow",
    "list_presets",
]

"""Models that grow while they train: TokenFormer for images and text, on PyTorch Lightning."""

import gc

_collects = gc.isenabled()
gc.disable()  # garbage collection takes a tenth of the time of these imports and finds nothing
try:
    from lit_tokenformer import moved
    from lit_tokenformer.growth import grow
    from lit_tokenformer.models import Pattention, Tokenformer, TokenformerConfig, create_backbone, list_presets
    from lit_tokenformer.version import __version__
finally:
    if _collects:
        gc.enable()

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

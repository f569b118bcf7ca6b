"""Import and export of weights in the formats of other projects."""

from lit_tokenformer.interop.timm import read_timm, write_timm
from lit_tokenformer.interop.tokenformer import load_published, read_published, write_published
from lit_tokenformer.interop.transformers_format import read_transformers, write_transformers

__all__ = [
    "load_published",
    "read_published",
    "read_timm",
    "read_transformers",
    "write_published",
    "write_timm",
    "write_transformers",
]

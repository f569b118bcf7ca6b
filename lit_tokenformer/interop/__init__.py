"""Import and export of weights in the formats of other projects."""

from lit_tokenformer.interop.engines import export_engine, load_engine
from lit_tokenformer.interop.native import load_native, read_native, write_native
from lit_tokenformer.interop.timm_format import read_timm, write_timm
from lit_tokenformer.interop.tokenformer import load_published, read_published, write_published
from lit_tokenformer.interop.transformers_format import read_transformers, write_transformers

__all__ = [
    "export_engine",
    "load_engine",
    "load_native",
    "load_published",
    "read_native",
    "read_published",
    "read_timm",
    "read_transformers",
    "write_native",
    "write_published",
    "write_timm",
    "write_transformers",
]

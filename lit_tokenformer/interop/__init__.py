"""Import and export of weights in the formats of other projects."""

from lit_tokenformer.interop.tokenformer import load_published, read_published, write_published

__all__ = ["load_published", "read_published", "write_published"]

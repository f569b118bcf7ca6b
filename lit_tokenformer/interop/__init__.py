"""Weights and models of other projects, in and out."""

from lit_tokenformer.interop.tokenformer import load_published, read_published, write_published

__all__ = ["load_published", "read_published", "write_published"]

"""Command-line interface."""

from lit_tokenformer.cli.main import main

__all__ = ["main"]

"""Command-line interface."""

import gc

_collects = gc.isenabled()
gc.disable()  # as in the package
try:
    from lit_tokenformer.cli.main import main
finally:
    if _collects:
        gc.enable()

__all__ = ["main"]

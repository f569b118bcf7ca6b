"""Checkpoints of a fit: read without executing what is in them, written atomically."""

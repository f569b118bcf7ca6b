"""Comparison of presets on the same data, optimizer, schedule and budget: the ``compare`` command."""

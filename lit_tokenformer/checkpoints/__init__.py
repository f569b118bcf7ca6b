"""Checkpoints and folders of runs: atomic writes, reading without execution, and what killed processes left."""

"""Checkpoints: safe loading and atomic writes."""

"""Grow models that transformers and timm trained, and give them back."""

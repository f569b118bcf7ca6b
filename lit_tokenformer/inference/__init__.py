"""Inference: sampling, text generation and evaluation."""

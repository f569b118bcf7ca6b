"""Inference with a trained model: sampling, text generation, evaluation."""

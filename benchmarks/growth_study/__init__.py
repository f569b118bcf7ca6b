"""The study of whether growing pays."""

"""Benchmarks: speed against other libraries, the study of growth, and the check on a GPU."""

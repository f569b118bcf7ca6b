"""A check of the project on a GPU in a few minutes: whether it is right there, and how fast."""

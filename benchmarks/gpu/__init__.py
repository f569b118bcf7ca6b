"""GPU check in a few minutes: correctness and speed."""

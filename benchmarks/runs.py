"""What the pictures here share: curves of a run, read from its TensorBoard logs."""

from __future__ import annotations

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


class Run:
    """The scalars that a fit with ``callbacks.TrainingMonitor`` wrote.

    Args:
        log_dir: Folder with the events, such as ``lightning_logs/version_0``.
    """

    def __init__(self, log_dir: str) -> None:
        self._events = EventAccumulator(log_dir, size_guidance={"scalars": 0})
        self._events.Reload()
        self.tags: list[str] = self._events.Tags()["scalars"]

    def series(self, tag: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a scalar, each (n,)."""
        scalars = self._events.Scalars(tag) if tag in self.tags else []
        return np.array([scalar.step for scalar in scalars]), np.array([scalar.value for scalar in scalars])

    def compute(self, steps: np.ndarray | list[int]) -> np.ndarray:
        """Training operations up to each step, in TFLOP."""
        return np.interp(steps, *self.series("compute/training_flops")) / 1e12

    def growths(self) -> np.ndarray:
        """The steps at which the model grew."""
        return self.series("growth/seconds")[0]

"""Throughput of a fit: samples, data tokens and FLOPs per second, MFU, time spent waiting for data, memory."""

from __future__ import annotations

import re
import resource
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer

_DENSE_BF16 = {
    **{"gb200": 2500e12, "b200": 2250e12, "gh200": 989e12, "h200 nvl": 835e12, "h200": 989e12},
    **{"h100 nvl": 835e12, "h100 pcie": 756e12, "h100": 989e12, "a100": 312e12, "a800": 312e12, "a30": 165e12},
    **{"a40": 149.7e12, "a10g": 70e12, "a10": 125e12, "l40s": 362e12, "l40": 181e12, "l4": 121e12},
    **{"rtx 5090": 209.5e12, "rtx 4090": 165.2e12, "rtx 3090": 71e12, "rtx a6000": 154.8e12},
}
"""Dense bf16 matrix products of NVIDIA devices in FLOPs per second, by part of the name; the first match wins.

From NVIDIA's data sheets, without sparsity. Lightning's ``get_available_flops`` has no entry for an H200's name, and
sparse figures for the H100 NVL.
"""

_MEASURING_SECONDS = 0.1

_NEXT_BATCH = ".train_dataloader_next"
"""End of the name of the action that Lightning's profilers time while a fit waits for its next batch."""


class Counts(NamedTuple):
    """Training since the start of a fit, over all processes.

    Args:
        samples: Samples.
        data_tokens: Data tokens (text) or patches (images).
        flops: FLOPs of forward and backward passes, without recomputed activations.
        seconds: Seconds of training, without validation.
        waiting: Seconds of ``seconds`` in which this process waited for its next batch.
    """

    samples: int = 0
    data_tokens: int = 0
    flops: int = 0
    seconds: float = 0.0
    waiting: float = 0.0

    def since(self, earlier: Counts) -> Counts:
        """Return the difference to earlier counts."""
        return Counts(*(now - then for now, then in zip(self, earlier, strict=True)))  # type: ignore[arg-type]


class Throughput:
    """Count training steps and the seconds spent on them; the device is synchronized only when counts are read.

    Args:
        trainer: Trainer of the fit, whose waiting for batches is timed until :meth:`close`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._counts = Counts()
        self._since: float | None = time.perf_counter()
        self._device = trainer.strategy.root_device
        self._profiler: Any = trainer.profiler  # type: ignore[attr-defined]
        before, after, begun = self._profiler.start, self._profiler.stop, 0.0

        def start(action_name: str) -> None:
            nonlocal begun
            if action_name.endswith(_NEXT_BATCH):
                begun = time.perf_counter()
            before(action_name)

        def stop(action_name: str) -> None:
            after(action_name)
            if action_name.endswith(_NEXT_BATCH):
                self._add(waiting=time.perf_counter() - begun)

        self._profiler.start, self._profiler.stop = start, stop

    def close(self) -> None:
        """Stop counting."""
        self._stop()
        for name in ("start", "stop"):
            vars(self._profiler).pop(name, None)

    def pause(self) -> None:
        """Stop the clock, as during validation."""
        self._wait()
        self._stop()

    def resume(self) -> None:
        """Restart the clock."""
        self._stop()
        self._since = time.perf_counter()

    def count(self, samples: int, data_tokens: int = 0, flops: int = 0) -> None:
        """Count a batch of all processes."""
        self._add(samples=samples, data_tokens=data_tokens, flops=flops)

    def counts(self) -> Counts:
        """Return the counts up to now, after the device has finished."""
        self._wait()
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._counts._replace(seconds=self._counts.seconds + running)

    def _wait(self) -> None:
        if self._since is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _stop(self) -> None:
        if self._since is not None:
            self._add(seconds=time.perf_counter() - self._since)
        self._since = None

    def _add(self, **more: Any) -> None:
        old = self._counts
        self._counts = old._replace(**{name: getattr(old, name) + value for name, value in more.items()})


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """Return the peak FLOPs per second of a device, and where the figure comes from.

    Args:
        device: The device. A known NVIDIA device has the dense bf16 peak of its data sheet in any precision; for any
            other, matrix products are timed once per process, for a tenth of a second.
        precision: Precision of the trainer, such as ``bf16-mixed``.
    """
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else ""
    whole = not re.search(r"laptop|\bmig\b", name)  # otherwise a fraction of the device with the same name
    for part, peak in _DENSE_BF16.items():
        if whole and re.search(rf"\b{part}\b", name):
            return peak, "data sheet, dense bf16"
    kinds = {"bf": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    dtype = kinds.get(str(precision)[:2], torch.float32)
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return _measured(device, dtype, threads), f"measured matmul, {str(dtype).removeprefix('torch.')}"


@lru_cache
@torch.no_grad()
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Time square matrix products of growing size, and return the most FLOPs per second."""
    best, size, end = 1.0, 256, time.perf_counter() + _MEASURING_SECONDS
    while time.perf_counter() < end:
        factor = torch.ones(size, size, device=device, dtype=dtype)
        (factor @ factor)[0, 0].item()  # warm up, and wait for the device
        begun = time.perf_counter()
        (factor @ factor)[0, 0].item()
        passed = time.perf_counter() - begun
        best = max(best, 2 * size**3 / passed)
        size *= 2 if passed < _MEASURING_SECONDS / 30 else 1  # the next size takes eight times as long
    return best


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated on a CUDA device, otherwise resident in this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM")


def resident_bytes(name: str) -> int:
    """Resident memory of this process in bytes: current ``VmRSS`` or peak ``VmHWM``; always the peak without /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

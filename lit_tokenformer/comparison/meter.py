"""Self-measurement of a fit: speed, memory, versions and machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.throughput import resident_bytes
from lit_tokenformer.atomic_io import atomic_write
from lit_tokenformer.version import __version__

MEASURED = "measured.json"
"""File written by :class:`Meter` at the end of a fit; a fit without it is unfinished."""


class Meter(Callback):
    """Measure speed and memory of the training steps, stop at a non-finite loss, and validate after the last step.

    At the end of the fit ``measured.json`` in the trainer's ``default_root_dir`` contains:

    - ``failed``: Reason of an early stop, or null.
    - ``steps``, ``samples``: Optimizer steps and training samples.
    - ``seconds``: Wall time of all training steps, data loading included, validation excluded.
    - ``step_seconds``: Seconds per step: the median at each model size after its first steps, averaged over all steps.
    - ``peak_bytes``: Peak memory of a training step beyond that before the model (CUDA: allocated; CPU: resident).
    - ``parameters``, ``environment``.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        own = [*pl_module.parameters(), *pl_module.buffers()]
        self._before = resident_bytes("VmRSS") - sum(one.numel() * one.element_size() for one in own)
        self._seconds: list[list[float]] = [[]]
        self._peak = self._samples = self._step = 0
        self._failed: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resume(trainer, pl_module)

    def on_parameter_growth(self, trainer: Trainer, pl_module: LightningModule, event: dict[str, Any]) -> None:
        """Time the steps at the new size separately."""
        self._seconds.append([])
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += len(batch[0]) if isinstance(batch, (tuple, list)) else len(batch)
        if trainer.global_step == self._step:
            return  # gradient accumulation
        self._step = trainer.global_step
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        self._seconds[-1].append(now - self._since)
        self._since = now
        if not torch.isfinite(outputs["loss"]):
            self._failed = f"non-finite loss {float(outputs['loss'])} at step {self._step}"
        if self._failed or self._step >= trainer.max_steps >= 0:
            trainer.should_stop = True  # Lightning validates before it stops

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._record_peak(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._resume(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record_peak(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sizes = [seconds for seconds in self._seconds if seconds]
        typical = sum(len(one) * float(np.median(one[min(5, len(one) // 2) :])) for one in sizes)
        measured = {
            "failed": self._failed,
            "steps": self._step,
            "samples": self._samples,
            "seconds": sum(map(sum, sizes)),
            "step_seconds": typical / max(1, self._step),
            "peak_bytes": self._peak,
            "parameters": sum(parameter.numel() for parameter in pl_module.parameters()),
            "environment": environment(pl_module.device),
        }
        with atomic_write(Path(trainer.default_root_dir) / MEASURED) as file:
            file.write(json.dumps(measured, indent=1).encode())

    def _resume(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start or resume measuring."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        elif sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
        self._since = time.perf_counter()

    def _record_peak(self, pl_module: LightningModule) -> None:
        cuda = pl_module.device.type == "cuda"
        now = torch.cuda.max_memory_allocated(pl_module.device) if cuda else resident_bytes("VmHWM") - self._before
        self._peak = max(self._peak, now)


def environment(device: torch.device) -> dict[str, Any]:
    """Collect the versions, machine and commit of a result."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = {}
    if (root / ".git").exists() and shutil.which("git"):
        changed = " and changes" if git("status", "--porcelain", "-uno") else ""
        commit = {"commit": git("rev-parse", "--short", "HEAD") + changed}
    models = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    cpu = models[0].split(":", 1)[1].strip() if models else platform.processor()
    return {
        "date": datetime.date.today().isoformat(),
        **commit,
        "lit_tokenformer": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _lines(file: str) -> list[str]:
    return Path(file).read_text(encoding="utf-8").splitlines() if Path(file).exists() else []

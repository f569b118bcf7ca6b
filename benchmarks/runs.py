"""What the scripts here share: curves of a run, read from its TensorBoard logs, and what a fit measures of itself."""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
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


MEASURED = "measured.json"
"""What :class:`Meter` writes into the folder of a fit when it ends; a fit without it is not a whole one."""


class Meter(Callback):
    """Measures speed and memory of the training steps of a fit, stops it when its loss is no number, and validates
    after the last step, whatever the interval of validation is.

    ``measured.json`` in the trainer's ``default_root_dir`` holds, when the fit ends:

    ``failed``: why it stopped early, or null; ``steps``, ``samples``: what was trained on; ``seconds``: of all training
    steps, with the loading of their data and without validation; ``step_seconds``: of one step, the median at each size
    of the model without the first steps, averaged over the steps of each; ``peak_bytes``: the highest memory in a
    training step beyond what was there before the model (of the process; on CUDA, what is allocated there);
    ``parameters``; ``environment``.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        own = [*pl_module.parameters(), *pl_module.buffers()]
        self._before = resident_bytes("VmRSS") - sum(one.numel() * one.element_size() for one in own)
        self._seconds: list[list[float]] = [[]]
        self._peak = self._samples = self._step = 0
        self._failed: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._go_on(trainer, pl_module)

    def on_parameter_growth(self, trainer: Trainer, pl_module: LightningModule, event: dict[str, Any]) -> None:
        """Takes the steps at the new size apart from those before."""
        self._seconds.append([])
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += len(batch[0]) if isinstance(batch, (tuple, list)) else len(batch)
        if trainer.global_step == self._step:
            return  # gradients are accumulated
        self._step = trainer.global_step
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        self._seconds[-1].append(now - self._since)
        self._since = now
        if not torch.isfinite(outputs["loss"]):
            self._failed = f"the loss is {float(outputs['loss'])} at step {self._step}"
        if self._failed or self._step >= trainer.max_steps >= 0:
            trainer.should_stop = True  # Lightning validates before it stops

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._look(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._go_on(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(pl_module)

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
        folder = Path(trainer.default_root_dir)
        (folder / "unfinished.json").write_text(json.dumps(measured, indent=1), encoding="utf-8")
        (folder / "unfinished.json").replace(folder / MEASURED)

    def _go_on(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to measure, at the start and after each validation."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        elif sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest so far is what is there now
        self._since = time.perf_counter()

    def _look(self, pl_module: LightningModule) -> None:
        cuda = pl_module.device.type == "cuda"
        now = torch.cuda.max_memory_allocated(pl_module.device) if cuda else resident_bytes("VmHWM") - self._before
        self._peak = max(self._peak, now)


def serve() -> None:
    """Reads folders from the standard input, a line each, and runs ``fit`` with the ``given.yaml`` in each.

    Every fit is a fork of this process, which has imported what takes long. When one has ended, with its output in
    ``output.txt``, its exit status is written to the standard output.
    """
    from lit_tokenformer.cli.main import main

    for line in sys.stdin:
        folder = line.rstrip("\n")
        child = os.fork()
        if not child:
            status = 1
            try:
                with open(f"{folder}/output.txt", "w", encoding="utf-8") as output:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                    status = main(["fit", "--config", f"{folder}/given.yaml", "--trainer.default_root_dir", folder])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(os.waitpid(child, 0)[1], flush=True)


def resident_bytes(name: str) -> int:
    """Resident bytes of this process: ``VmRSS`` now, ``VmHWM`` at most; the latter for both where there is no /proc."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
        return int(lines[name].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and commit that a result belongs to."""
    root = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    models = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    cpu = models[0].split(":", 1)[1].strip() if models else platform.processor()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD")
        + (" and changes" if git("status", "--porcelain", "-uno") else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _lines(file: str) -> list[str]:
    return Path(file).read_text(encoding="utf-8").splitlines() if Path(file).exists() else []

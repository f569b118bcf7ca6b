"""Fits of a comparison, each a separate process, and their results."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_tokenformer.comparison.meter import MEASURED

SERVER = "from lit_tokenformer.cli.compare import serve_fits; serve_fits()"
"""Code of the process that forks the fits."""

SCORES = {
    "val/acc1": ("accuracy (%)", 100.0),
    "val/bits_per_byte": ("bits per byte", 1.0),
    "val/accuracy": ("accuracy of masked tokens (%)", 100.0),
}
"""Logged metrics that can be the score of a task: column of the table, and factor."""

NOT_RUN = "not run"
UNFINISHED = "ended without a result"
"""Begins the reason of a fit that was stopped from outside."""


class Run:
    """Scalars logged by a fit with ``callbacks.TrainingMonitor``.

    Args:
        log_dir: Folder with TensorBoard events, such as ``lightning_logs/version_0``.
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
        """Training FLOPs up to each step, in TFLOP."""
        return np.interp(steps, *self.series("compute/training_flops")) / 1e12

    def growths(self) -> np.ndarray:
        """Steps at which the model grew."""
        return self.series("growth/seconds")[0]


@dataclass
class Fit:
    """Fit in a separate folder, named by a hash of its settings; equal settings are one fit under any label.

    Args:
        arm: Label of the arm.
        what: Purpose in the progress report, such as ``seed 0``.
        config: Settings of the fit.
        logs: Folder of all fits.
    """

    arm: str
    what: str
    config: dict[str, Any]
    logs: Path

    @cached_property
    def folder(self) -> Path:
        key = hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode()).hexdigest()[:10]
        own = self.logs / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', self.arm)[:60]}-{key}"
        return own if own.exists() else next(self.logs.glob(f"*-{key}"), own)  # of an arm with another label

    @property
    def measured(self) -> dict[str, Any]:
        """Content of ``measured.json``; ``failed`` is the reason of a failure or null."""
        file = self.folder / MEASURED
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        output = self.folder / "output.txt"
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines() if output.exists() else []
        errors = [line.strip() for line in lines if re.match(r"\S*(Error|Exception|error)\b", line)]
        if errors:
            return {"failed": errors[-1][:200]}
        return {"failed": f"{UNFINISHED} after: {lines[-1].strip()}"[:200] if lines else NOT_RUN}

    @cached_property
    def curve(self) -> Run:
        """Logged scalars."""
        return Run(str(self.folder / "lightning_logs" / "version_0"))

    @property
    def result(self) -> dict[str, Any]:
        """Final loss, score and curve, next to the measurements; a failed fit has only the latter."""
        measured = self.measured
        found: dict[str, Any] = {"folder": str(self.folder), **measured}
        if measured["failed"]:
            return found
        logged, values = self.curve.series("val/loss")
        steps, first = np.unique(logged, return_index=True)  # the first validation is also logged as a result
        losses = values[first]
        if not len(losses) or not np.isfinite(losses[-1]):
            return {**found, "failed": "non-finite validation loss"}
        score = next((name for name in SCORES if name in self.curve.tags), None)
        name, unit = SCORES[score] if score else (None, 1.0)
        growths = self.curve.growths()
        return found | {
            "loss": float(losses[-1]),
            "score": float(self.curve.series(score)[1][-1]) * unit if score else None,
            "score_name": name,
            "curve": {
                "steps": steps.tolist(),
                "tflops": self.curve.compute(steps).tolist(),
                "losses": losses.tolist(),
                "growths": self.curve.compute(growths).tolist() if len(growths) else [],
            },
        }

    def run(self, server: subprocess.Popen[str], progress: str) -> None:
        """Train in a fork of the server process."""
        assert server.stdin is not None and server.stdout is not None
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        text = yaml.safe_dump(self.config, sort_keys=False)
        (self.folder / "given.yaml").write_text(text, encoding="utf-8")
        begun = time.perf_counter()
        server.stdin.write(f"{self.folder.resolve()}\n")
        server.stdin.flush()
        if not server.stdout.readline():
            raise RuntimeError(f"fit server exited with status {server.wait()}")
        failed = f"; {self.measured['failed']}" if self.measured["failed"] else ""
        print(f"{progress} {self.arm}, {self.what}: {time.perf_counter() - begun:.0f} s{failed}", flush=True)


class Runner:
    """Run fits in parallel and skip finished ones.

    Args:
        logs: Folder of all fits.
        jobs: Number of parallel fits.
        read_only: Only read finished fits.
    """

    def __init__(self, logs: Path, jobs: int, read_only: bool) -> None:
        self.logs, self.jobs, self.read_only = logs, jobs, read_only
        self._servers: queue.Queue[subprocess.Popen[str]] = queue.Queue()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: Any) -> None:
        while not self._servers.empty():
            self._servers.get().communicate()  # closing its input ends it

    def _start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # no CUDA before the fork
        if self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        command = [sys.executable, "-c", SERVER]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        for _ in range(self.jobs):
            self._servers.put(subprocess.Popen(command, env=environment, **pipes))

    def fit(self, arm: str, what: str, config: dict[str, Any]) -> Fit:
        """Describe a fit without running it."""
        return Fit(arm, what, config, self.logs)

    def run(self, fits: Sequence[Fit]) -> None:
        """Run the unfinished fits."""
        if self.read_only:
            return
        todo = [fit for fit in fits if not (fit.folder / MEASURED).exists()]
        if todo and self._servers.empty():
            self._start()

        def train(number: int) -> None:
            server = self._servers.get()
            try:
                todo[number].run(server, f"[{number + 1}/{len(todo)}]")
            finally:
                self._servers.put(server)

        with ThreadPoolExecutor(self.jobs) as pool:
            for _ in pool.map(train, range(len(todo))):
                pass

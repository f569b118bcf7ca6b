"""Fits in processes of their own, for ``compare.py``, and what came out of them."""

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
from comparison_arms import Planned
from runs import MEASURED, Run

ROOT = Path(__file__).resolve().parent.parent
SCORES = {
    "val/acc1": ("accuracy (%)", 100.0),
    "val/bits_per_byte": ("bits per byte", 1.0),
    "val/accuracy": ("accuracy of masked tokens (%)", 100.0),
}


@dataclass
class Fit:
    """One fit in a folder of its own, whose name follows from its settings.

    Args:
        arm: The label of its arm.
        what: What it is for.
        config: Its YAML.
        logs: Folder of all fits.
    """

    arm: str
    what: str
    config: dict[str, Any]
    logs: Path

    @cached_property
    def folder(self) -> Path:
        key = hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode()).hexdigest()[:10]
        return self.logs / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', self.arm)[:60]}-{key}"

    @property
    def measured(self) -> dict[str, Any]:
        """What it measured of itself; ``failed`` says what went wrong, if something did."""
        file = self.folder / MEASURED
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        output = self.folder / "output.txt"
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines() if output.exists() else []
        told = [line for line in lines if re.match(r"\S*(Error|Exception|error)\b", line)] or lines
        return {"failed": told[-1].strip()[:200] if told else "it was not run"}

    @cached_property
    def curve(self) -> Run:
        """Its logs."""
        return Run(str(self.folder / "lightning_logs" / "version_0"))

    @property
    def result(self) -> dict[str, Any]:
        """What came out of it: ``failed``, or losses with what they cost."""
        measured = self.measured
        found: dict[str, Any] = {"folder": str(self.folder), **measured}
        if measured["failed"]:
            return found
        logged, values = self.curve.series("val/loss")
        steps, first = np.unique(logged, return_index=True)  # the first validation is logged twice, once as a result
        losses = values[first]
        if not len(losses) or not np.isfinite(losses[-1]):
            return {**found, "failed": "its validation loss is no number"}
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
        """Trains in a process of its own, a fork of ``runs.serve``."""
        assert server.stdin is not None and server.stdout is not None
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        text = yaml.safe_dump(self.config, sort_keys=False)
        (self.folder / "given.yaml").write_text(text, encoding="utf-8")
        begun = time.perf_counter()
        server.stdin.write(f"{self.folder.resolve()}\n")
        server.stdin.flush()
        if not server.stdout.readline():
            raise ValueError(f"the process that starts fits has ended: {server.wait()}")
        failed = f"; {self.measured['failed']}" if self.measured["failed"] else ""
        print(f"{progress} {self.arm}, {self.what}: {time.perf_counter() - begun:.0f} s{failed}", flush=True)


class Runner:
    """Runs fits side by side.

    Args:
        logs: Folder of all fits.
        jobs: Fits at a time.
        draw_only: Whether nothing is run, and only what is there already is read.
    """

    def __init__(self, logs: Path, jobs: int, draw_only: bool) -> None:
        self.logs, self.jobs, self.draw_only = logs, jobs, draw_only
        self._servers: queue.Queue[subprocess.Popen[str]] = queue.Queue()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: Any) -> None:
        while not self._servers.empty():
            self._servers.get().communicate()  # ends where its input ends

    def _start(self) -> None:
        places = [str(ROOT / "benchmarks"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        if self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        command = [sys.executable, "-c", "import runs; runs.serve()"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        for _ in range(self.jobs):
            self._servers.put(subprocess.Popen(command, env=environment, **pipes))

    def fit(self, planned: Planned, what: str, config: dict[str, Any]) -> Fit:
        """A fit that is not run yet."""
        return Fit(planned.arm.label, what, config, self.logs)

    def run(self, fits: Sequence[Fit]) -> None:
        """Runs those that have not been run."""
        if self.draw_only:
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

"""The worker: run parts of the check in one process, and write down what each one finds."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu.check import PARTS, RESTART, ROOT, RUNNING, write
from benchmarks.speed.lines import Line
from lit_tokenformer.comparison.meter import environment


@dataclass
class Findings:
    """Findings of a part; each addition rewrites ``PART.json`` in ``folder``.

    ``tiny`` chooses the sizes of a rehearsal; the part must have ended at ``deadline``, in seconds since the epoch.
    """

    part: str
    folder: Path
    device: str
    tiny: bool
    deadline: float
    begun: float = field(default_factory=time.time)
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def save(self, status: str = RUNNING, error: str = "") -> None:
        """Write down what was found so far."""
        found = {
            "status": status,
            "seconds": time.time() - self.begun,
            "error": error,
            "skipped": self.skipped,
            "environment": environment(torch.device(self.device)),
            "lines": [line.as_dict() for line in self.lines],
            "notes": self.notes,
        }
        write(self.folder, self.part, found)

    def add(self, *lines: Line) -> None:
        """Add figures."""
        self.lines += lines
        self.save()

    def fits(self, seconds: float, what: str) -> bool:
        """Check whether the time left covers ``seconds`` on an H100; if not, note ``what`` as skipped."""
        enough = self.tiny or time.time() + seconds <= self.deadline
        if not enough:
            self.skipped.append(f"no time left for {what}")
            self.save()
        return enough


def work(parts: Sequence[str], options: argparse.Namespace) -> int:
    """Run parts until one fails; called in the worker.

    Returns:
        0, or :data:`RESTART` after a failure, since the CUDA context may be unusable.
    """
    if options.device == "cpu":
        torch.set_num_threads(1)  # a part may fork
    for part in parts:
        findings = Findings(part, options.output, options.device, options.tiny, options.work)
        if not options.tiny and options.work - findings.begun < PARTS[part]:
            findings.save("skipped")
            continue
        print(f"== {part}", flush=True)
        findings.save()
        try:
            torch.manual_seed(0)
            run = RUN[part] if part in RUN else importlib.import_module(f"benchmarks.gpu.{part}").run
            run(findings)
        except Exception:
            traceback.print_exc()
            findings.save("failed", traceback.format_exc()[-4000:])
            return RESTART
        failed = any(line.unit == "failed" and line.ours for line in findings.lines)
        findings.save("failed" if failed else "ok")
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return 0


def right(findings: Findings) -> None:
    """Run the tests of devices (``tests/test_devices.py``), each a line with its largest relative error, if any."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        chosen = ["-m", "gpu"] if findings.device == "cuda" else ["-k", "cpu and not compiled"]
        words = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers", f"--junitxml={report}", *chosen]
        command = [sys.executable, "-m", "pytest", "tests/test_devices.py", *words]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout[-6000:], flush=True)
        cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
    found: dict[str, list[ET.Element]] = {}
    for case in cases:
        found.setdefault(case.attrib["name"].split("[")[0], []).append(case)
    for name, of_name in found.items():
        failed = [case for case in of_name if case.find("failure") is not None or case.find("error") is not None]
        skipped = sum(case.find("skipped") is not None for case in of_name)
        ran = len(of_name) - skipped
        findings.lines.append(Line(name, f"{ran} cases", len(failed), 0, "failed", len(failed) / max(1, ran), "<= 0"))
        findings.notes += [f"{case.attrib['name']}: {_reason(case)}" for case in failed]
    errors: dict[str, float] = {}
    for case in cases:
        for one in case.iter("property"):
            errors[one.attrib["name"]] = max(errors.get(one.attrib["name"], 0), float(one.attrib["value"]))
    findings.notes += [f"{name}: at most {error:.2g}" for name, error in errors.items()]
    if done.returncode and not any(line.ours for line in findings.lines):
        raise RuntimeError(f"pytest ended with status {done.returncode}: {done.stdout[-1500:]}")


def _reason(case: ET.Element) -> str:
    """First line of the error of a test."""
    element = case.find("failure") if case.find("failure") is not None else case.find("error")
    return (element.attrib.get("message", "") if element is not None else "").splitlines()[0][:300]


def pattention(findings: Findings) -> None:
    """Pattention against an MLP, the formula and each of its forms, eager and compiled; q, k and v by one product."""
    from benchmarks.speed import qkv
    from benchmarks.speed.pattention import measure, speedup

    shapes = [(16384, 768, 3072), (16384, 1536, 6144), (8192, 768, 8560)] if not findings.tiny else [(64, 16, 32)]
    for mode in ("eager", "compiled") if not findings.tiny else ("eager",):
        faster = []
        for shape in shapes:
            torch.compiler.reset()
            if not findings.fits(6 if mode == "eager" else 30, f"{mode} {shape}"):
                continue
            given = shape, "bfloat16", mode, 3 if findings.tiny else 30, findings.device
            try:
                lines, than_formula = measure(*given, forms=True)
            except Exception as error:  # a kernel that this device cannot run must not take the other figures along
                findings.add(Line("Triton kernels", f"{mode} {shape}", 1, 0, "failed", 1, "<= 0"))
                findings.notes.append(f"Triton kernels, {mode} {shape}: {error}"[:300])
                lines, than_formula = measure(*given)
            faster.append(than_formula)
            findings.add(*lines)
        if faster:
            findings.add(speedup(f"bfloat16 {mode}", faster, ">= 1.3" if mode == "compiled" else ">= 1.25"))
    for shape in [(16384, 768, 768), (1, 768, 768)] if not findings.tiny else [(32, 16, 32), (1, 16, 32)]:
        if findings.fits(3, f"q, k and v {shape}"):
            findings.add(*qkv.measure(shape, "bfloat16", 3 if findings.tiny else 30, findings.device))


def decode(findings: Findings) -> None:
    """Greedy decoding at batch 1 and 32 against transformers (``benchmarks.speed.decode``)."""
    from benchmarks.speed.decode import PASS, PRESET, compare

    for batch in (1, 32) if not findings.tiny else (1, 2):
        if findings.fits(20, f"batch {batch}"):
            preset, last, rows = ("tokenformer_lm_tiny", 64, 256) if findings.tiny else (PRESET, 256, PASS[0])
            dtype = "float32" if findings.tiny else "bfloat16"
            given = {"rounds": 1 if findings.tiny else 2, "batch": batch, "preset": preset, "last": last, "rows": rows}
            more = {"compile": findings.device != "cpu", "quantize": [], "together": 1, "device": findings.device}
            findings.add(*compare(dtype, argparse.Namespace(**given, **more)))


def growth(findings: Findings) -> None:
    """A growth event with AdamW against a training step (``benchmarks.speed.growth``)."""
    from benchmarks.speed.growth import measure

    sizes = {"before": "tokenformer_owt_354m", "after": "tokenformer_owt_757m", "length": 1024}
    if findings.tiny:
        sizes = {"before": "tokenformer_lm_tiny", "after": "tokenformer_lm_small", "length": 32}
    lines, notes = measure(argparse.Namespace(device=findings.device, rounds=1, whole=True, threads=1, **sizes))
    findings.notes += notes
    findings.add(*lines)


RUN: dict[str, Callable[[Findings], None]] = {one.__name__: one for one in (right, pattention, decode, growth)}
"""Parts that use what exists; the others are modules of their own, with a function ``run``."""

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a part may fork

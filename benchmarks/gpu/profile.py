"""Profile: the longest kernels of a training step, and each wait of the host for the device in a fit."""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.check import ROOT
from benchmarks.gpu.parts import Findings
from benchmarks.gpu.training import COMPILING, compile_model, make
from benchmarks.speed.callbacks import fit, make_callbacks
from callbacks import GrowingEMA

STEPS = 3
"""Steps that are profiled."""
WATCHED = range(4, 8)
"""Steps of a fit in which the host's waits are counted."""


def run(findings: Findings) -> None:
    """Synchronizations first, since they cost seconds; then kernels, eager and compiled."""
    synchronizations(findings)
    name, batch, length = ("tokenformer_lm_tiny", 1, 64) if findings.tiny else ("tokenformer_owt_124m", 16, 1024)
    training = make(name, batch, length, findings.device)
    kernels(training, f"{name}, eager", findings)
    if findings.fits(COMPILING, "the compiled step"):
        compile_model(training, "aot_eager" if findings.tiny else "inductor")
        kernels(training, f"{name}, compiled", findings)


def kernels(training: Any, what: str, findings: Findings) -> None:
    """Note the ten longest kernels of a step, with their milliseconds and share."""
    for _ in range(1 if findings.tiny else 3):
        training.step()
    cuda = findings.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            training.step()
        if cuda:
            torch.cuda.synchronize()
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    found = [(getattr(one, own), one.key) for one in profiler.key_averages() if one.device_type == kind]
    total = sum(spent for spent, _ in found)
    for spent, key in sorted(found, reverse=True)[:10]:
        findings.notes.append(f"{what}: {spent / STEPS / 1e3:.2f} ms, {spent / max(total, 1):.1%}: `{key[:110]}`")
    findings.notes.append(f"{what}: {total / STEPS / 1e3:.2f} ms of kernels in a step")
    findings.save()


class Watch(Callback):
    """Have CUDA warn of each synchronization in some steps."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx in (WATCHED.start, WATCHED.stop):
            torch.cuda.set_sync_debug_mode("warn" if batch_idx == WATCHED.start else "default")


def synchronizations(findings: Findings) -> None:
    """Note where the host waits for the device in ordinary steps of a fit with this project's callbacks."""
    cuda, steps = findings.device == "cuda", WATCHED.stop + 4
    callbacks = [*([Watch()] if cuda else []), *make_callbacks(steps - 1, "step"), GrowingEMA()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(callbacks, 1, argparse.Namespace(device=findings.device, steps=steps), "bf16-mixed", length=64)
    waits = Counter(_place(one) for one in caught if "synchronizing CUDA" in str(one.message))
    for place, count in waits.most_common():
        findings.notes.append(f"host waits at {place}: {count / len(WATCHED):g} a step")
    total = f"host waits in a step of a fit: {sum(waits.values()) / len(WATCHED):g}"
    findings.notes.append(total if cuda else "no CUDA")
    findings.save()


def _place(caught: warnings.WarningMessage) -> str:
    """File and line of a warning, without the folder that the file is installed in."""
    path = Path(caught.filename)
    parts = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) else path.parts[-3:]
    return f"{'/'.join(parts)}:{caught.lineno}"

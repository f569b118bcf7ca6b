"""Profile: the longest kernels of a training step, and each wait of the host for the device in a fit."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from benchmarks.gpu.check import ROOT
from benchmarks.gpu.parts import Findings
from benchmarks.gpu.training import COMPILING, compile_model, make
from callbacks import (
    ErrorLog,
    GrowingEMA,
    LossGuard,
    ParameterGrowthCallback,
    PreemptionCheckpoint,
    RunSummary,
    TrainingMonitor,
)
from lit_tokenformer.tasks import LitCausalLM

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
        if batch_idx == WATCHED.start:
            torch.cuda.set_sync_debug_mode("warn")
        elif batch_idx == WATCHED.stop:
            torch.cuda.set_sync_debug_mode("default")


def synchronizations(findings: Findings) -> None:
    """Note where the host waits for the device in ordinary steps of a fit with this project's callbacks."""
    cuda, length, vocabulary = findings.device == "cuda", 64, 128
    task = LitCausalLM("tokenformer_lm_tiny", vocab_size=vocabulary, context_length=length)
    tokens: Any = torch.randint(vocabulary, (8 * (WATCHED.stop + 4), length + 1))
    data: DataLoader = DataLoader(tokens, 8, pin_memory=cuda)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(
            accelerator=findings.device,
            devices=1,
            precision="bf16-mixed",
            max_epochs=1,
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            default_root_dir=folder,
            callbacks=[
                *([Watch()] if cuda else []),
                ParameterGrowthCallback({WATCHED.stop + 3: 256}, unit="step"),
                TrainingMonitor(log_images=0),
                GrowingEMA(),
                LossGuard(),
                RunSummary(),
                PreemptionCheckpoint(),
                ErrorLog(),
            ],
        ).fit(task, data)
    waits = Counter(
        f"{_short(one.filename)}:{one.lineno}" for one in caught if "synchronizing CUDA" in str(one.message)
    )
    findings.notes += [
        f"host waits at {place}: {count / len(WATCHED):g} a step" for place, count in waits.most_common()
    ]
    findings.notes.append(
        f"host waits in a step of a fit: {sum(waits.values()) / len(WATCHED):g}" if cuda else "no CUDA"
    )
    findings.save()


def _short(file: str) -> str:
    """A source file without the folder that it is installed in."""
    path = Path(file)
    if path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    return "/".join(path.parts[-3:])

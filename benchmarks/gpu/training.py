"""Training steps against timm and transformers: throughput, MFU and peak memory, eager and compiled.

One model is in memory at a time. FLOPs are those of the closed form (:mod:`lit_tokenformer.cost`: matrix products
only, attention over the whole sequence), for both sides; MFU is FLOP/s over those of one product of two matrices of
8,192 x 8,192 in bfloat16, measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from typing import NamedTuple

import torch

from benchmarks.gpu.parts import Findings
from benchmarks.speed.lines import Line
from benchmarks.speed.timing import Training, peak_bytes, reset_peak, seconds
from benchmarks.speed.training import THEIRS
from benchmarks.speed.training import make as make_training
from lit_tokenformer.cost import model_cost
from lit_tokenformer.models import preset_config


class Pair(NamedTuple):
    """A preset and its baseline (``speed.training``), samples and data tokens of a batch, and seconds on an H100."""

    ours: str
    theirs: str
    batch: int
    tokens: int
    seconds: float


PAIRS = (
    Pair("tokenformer_owt_124m", "gpt_neox", 16, 1024, 25),
    Pair("tokenformer_vit_base_patch16_224", "vit_base_patch16_224", 256, 0, 25),
    Pair("tokenformer_owt_354m", "gpt_neox_354m", 16, 1024, 30),
)
TINY = (
    Pair("tokenformer_lm_tiny", "gpt_neox_tiny", 1, 64, 0),
    Pair("tokenformer_vit_tiny_patch16_224", "vit_tiny_patch16_224", 1, 0, 0),
)
COMPILING = 45.0
"""Seconds that compiling a model takes."""
MODES = {"eager": None, "compiled": "inductor"}


class Measured(NamedTuple):
    """Of a training step: its seconds (median) and the highest memory in bytes."""

    seconds: float
    peak: int


def run(findings: Findings) -> None:
    """Every pair eager, then every pair compiled."""
    peak = product_rate(findings.device, 256 if findings.tiny else 8192)
    findings.notes.append(f"Peak: {peak / 1e12:.1f} TFLOP/s in a bfloat16 matrix product.")
    for mode, backend in MODES.items():
        for pair in TINY[: 1 if backend else 2] if findings.tiny else PAIRS:
            if findings.fits(pair.seconds + 2 * COMPILING * bool(backend), f"{mode} {pair.ours}"):
                ours, theirs = (measure(name, pair, backend, findings) for name in (pair.ours, pair.theirs))
                findings.add(*compare(pair, mode, ours, theirs, peak))


def compare(pair: Pair, mode: str, ours: Measured, theirs: Measured, peak: float) -> list[Line]:
    """Compare the two models of a pair."""
    length = {"context_length": pair.tokens} if pair.tokens else {}
    presets = (pair.ours, THEIRS[pair.theirs] or pair.theirs)
    flops = [pair.batch * model_cost(preset_config(name, **length)).training_flops for name in presets]
    rate, other = (count / side.seconds for count, side in zip(flops, (ours, theirs), strict=True))
    shape = f"{pair.batch} x {pair.tokens:,} tokens" if pair.tokens else f"{pair.batch} images"
    what = f"`{pair.ours}`, {shape}, bf16-mixed, {mode}"
    wanted = ">= 0.45" if mode == "compiled" and "354m" in pair.ours else ""
    figures: tuple[tuple[str, float, float, str, float, str], ...] = (
        ("step", 1e3 * ours.seconds, 1e3 * theirs.seconds, "ms", ours.seconds / theirs.seconds, ""),
        ("rate", rate / 1e12, other / 1e12, "TFLOP/s", rate / other, ">= 1.0"),
        ("MFU", rate / peak, other / peak, "", rate / peak, wanted),
        ("peak memory", ours.peak / 1e9, theirs.peak / 1e9, "GB", ours.peak / theirs.peak, "<= 1.0"),
    )
    return [Line(f"{one[0]} of {what}", pair.theirs, *one[1:]) for one in figures]


def measure(name: str, pair: Pair, backend: str | None, findings: Findings) -> Measured:
    """Train one model for some steps on one batch."""
    cuda = findings.device == "cuda"
    gc.collect()
    torch.compiler.reset()
    if cuda:
        torch.cuda.empty_cache()
        reset_peak(findings.device)
    training = make(name, pair.batch, pair.tokens, findings.device)
    if backend is not None:
        compile_model(training, "aot_eager" if findings.tiny else backend)
    for _ in range(1 if findings.tiny else 3):
        training.step()
    taken = [seconds(training.step, findings.device) for _ in range(2 if findings.tiny else 10)]
    return Measured(statistics.median(taken), peak_bytes(findings.device))


def make(name: str, batch: int, length: int, device: str) -> Training:
    """Build a model in training in bf16-mixed, which is not compiled."""
    given = argparse.Namespace(images=batch, sequences=batch, length=length, device=device, compile=False)
    return make_training(name, given, torch.bfloat16)


def compile_model(training: Training, backend: str) -> None:
    """Compile a model in place: of a task, its backbone, as ``model.compile: true`` does."""
    getattr(training.model, "backbone", training.model).compile(dynamic=False, backend=backend)


def product_rate(device: str, size: int) -> float:
    """FLOP/s of one bfloat16 matrix product on random numbers, the median of ten."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    taken = [seconds(lambda: left @ right, device) for _ in range(13)][3:]
    return 2 * size**3 / statistics.median(taken)

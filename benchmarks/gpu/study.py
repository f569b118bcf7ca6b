"""Growth study at ten million parameters: the reduced arms of ``benchmarks/growth_study`` on a GPU, one seed.

Byte language models on Python source that is on the machine: every ``.py`` file of the interpreter's ``site-packages``
in the order of their paths, up to 100 MB. The final size has 9.8 million parameters in its blocks; the budget C is 60 s
of an H100 or less. All arms have the same learning rate; the smaller sizes from scratch show whether the final one is
the right one for C.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import Findings
from benchmarks.growth_study.arms import DOMAINS, Arm, Domain, controls, load_arms
from benchmarks.speed.lines import Line
from lit_tokenformer.comparison.fits import Runner

CORPUS = 100_000_000
"""Bytes of source."""
RATE = 2e-3
BATCH, BLOCK = 128, 512
BUDGET = 6e15
"""Training FLOPs C."""


def run(findings: Findings) -> None:
    """Train the arms one after the other, as far as time allows."""
    folder = (findings.folder / "study").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.jsonl"
    findings.notes.append(f"Corpus: {write_corpus(corpus, 2_000_000 if findings.tiny else CORPUS)}")
    domain = make_domain(corpus, findings.tiny)
    reference: float | None = None
    with Runner(folder, jobs=1, read_only=False) as runner:
        for arm in arms(domain, findings.tiny):
            if not findings.fits(60, arm.name):
                continue
            config = arm.fit(domain, seed=0, evaluations=4)
            config["trainer"] |= {"accelerator": findings.device, "precision": "bf16-mixed"}
            fit = runner.fit(arm.name, "seed 0", config)
            runner.run([fit])
            result = fit.result
            if result.get("failed"):
                raise RuntimeError(f"{arm.name}: {result['failed']}")
            loss, reference = result["loss"], reference if reference is not None else result["loss"]
            tflop, steps = result["curve"]["tflops"][-1], result["steps"]
            what = f"{arm.name}, {arm.share:.2f} C ({tflop:,.3g} TFLOP, {steps:,} steps, {result['seconds']:.0f} s)"
            findings.add(Line(what, "final size from scratch", loss, reference, "nats", loss / reference))


def arms(domain: Domain, tiny: bool) -> list[Arm]:
    """The final size from scratch first, then grown models, then the smaller sizes from scratch."""
    of_study = {arm.name: arm for arm in (*load_arms(domain)["reduced"], *controls(domain))}
    final, *smaller = (f"from scratch, {tokens} tokens" for tokens in reversed(domain.ladder))
    names = [final, "grown", "grown in tokens alone", "published growth", *smaller, "from scratch, 1 block"]
    return [replace(of_study[name], lr=RATE) for name in (names[:2] if tiny else names)]


def make_domain(corpus: Path, tiny: bool) -> Domain:
    """The text domain of the study at another size, on another corpus."""
    batch, block = (4, 64) if tiny else (BATCH, BLOCK)
    settings: dict[str, Any] = {
        "block_size": block,
        "batch_size": batch,
        "eval_batch_size": batch,
        "num_workers": 0 if tiny else 4,
    }
    settings |= {"dataset": "files", "files": [str(corpus)], "cache_dir": str(corpus.parent / "cache")}
    settings |= {"tokenizer": "bytes", "val_fraction": 0.05}
    return replace(
        DOMAINS["text"],
        data={"class_path": "lit_tokenformer.data.TextDataModule", "init_args": settings},
        base=dict(zip(("dim", "depth", "num_heads"), (32, 2, 2) if tiny else (320, 6, 5), strict=True)),
        of_data={"vocab_size": 257, "context_length": block},
        ladder=(4, 8, 16) if tiny else (80, 160, 320),
        budget=2e9 if tiny else BUDGET,
        val_batches=2 if tiny else 20,
    )


def write_corpus(file: Path, size: int) -> str:
    """Write the source as JSON lines, a document each, up to ``size`` bytes; return a description."""
    digest, total = hashlib.sha256(), 0
    with file.open("w", encoding="utf-8") as lines:
        for path in sorted(Path(torch.__file__).parents[1].rglob("*.py")):
            text = path.read_text(encoding="utf-8", errors="ignore") if path.is_file() else ""
            if total + len(text) > size:
                break
            if text.strip():
                total += len(text.encode())
                digest.update(text.encode())
                lines.write(json.dumps({"text": text}) + "\n")
    return f"{total / 1e6:.1f} MB of Python source, SHA-256 {digest.hexdigest()[:12]}"

"""Training steps against those of timm's ViT and transformers' GPT-NeoX: FLOP/s and memory.

    python -m benchmarks.speed.training [--what vit lm lm354m memory] [--images 8] [--sequences 1] [--compile]
    python -m benchmarks.speed.training --peak tokenformer_150m [--checkpointing]

A step is forward pass, loss, backward pass, AdamW (fused, as in the configs) and zeroed gradients; ours goes through
``training_step`` of the task and its parameter groups, without a trainer. Both sides have float32 weights (for bfloat16
autocast), random inputs of the same shape, no dropout and no augmentation, the loss as their library has it (timm's
models with ``F.cross_entropy``, GPT-NeoX given labels), and PyTorch's own attention.

- ``vit``: ``tokenformer_vit_base_patch16_224`` and ``..._matched_...`` against timm's ``vit_base_patch16_224``.
- ``lm``: ``tokenformer_owt_124m`` against a GPT-NeoX of the same width, depth, heads and vocabulary, with shared
  embeddings as ours are, so that both have 124 million parameters.
- ``lm354m``: the same of ``tokenformer_owt_354m``; the feed-forward of the GPT-NeoX has 15,584 hidden units.
- ``memory``: peak memory of three steps of each language model, in a process of its own: allocated on CUDA, resident
  beyond that before the model on the CPU. ``--peak`` prints it for any preset.

FLOPs are those of matrix products and convolutions in forward and backward pass, counted by
``torch.utils.flop_counter`` with attention as plain products.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks.speed.lines import Line
from benchmarks.speed.timing import arguments, main, median, peak_bytes, ratio, take_turns, unlogged
from lit_tokenformer.comparison.meter import resident_bytes
from lit_tokenformer.models import TokenformerConfig, preset_config
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier


def adamw(params: Any) -> torch.optim.Optimizer:
    """AdamW as in the configs."""
    return torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


class Training:
    """A model in training on one batch.

    Args:
        model: Model or task.
        optimizer: Optimizer of its parameters.
        loss: Computes the loss of the batch.
        dtype: Precision of autocast; float32 for none.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], dtype: torch.dtype
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss = loss
        self.dtype = dtype

    def gradients(self) -> None:
        """Run forward and backward pass."""
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, self.dtype) if self.dtype != torch.float32 else nullcontext():
            loss = self.loss()
        loss.backward()

    def step(self) -> None:
        """Run one training step."""
        self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def flops(self) -> int:
        """FLOPs of forward and backward pass."""
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.gradients()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()


def our_vit(name: str, given: argparse.Namespace, dtype: torch.dtype) -> Training:
    """One of our presets, as a task."""
    return ours(LitImageClassifier(name, optimizer=adamw, compile=given.compile), images(given), given, dtype)


def our_lm(name: str, given: argparse.Namespace, dtype: torch.dtype) -> Training:
    """One of our presets, as a task."""
    settings = {"compile": given.compile, "grad_checkpointing": getattr(given, "checkpointing", False)}
    task = LitCausalLM(name, context_length=given.length, optimizer=adamw, **settings)
    return ours(task, text(given, given.length + 1, task.backbone.config.vocab_size), given, dtype)


def ours(task: Any, batch: Any, given: argparse.Namespace, dtype: torch.dtype) -> Training:
    """A task under training without a trainer."""
    task = unlogged(task.to(given.device).train())
    return Training(task, task.build_optimizer(), lambda: task.training_step(batch, 0), dtype)


def timm_vit(name: str, given: argparse.Namespace, dtype: torch.dtype) -> Training:
    """One of timm's models."""
    model = timm.create_model(name).to(given.device).train()
    if given.compile:
        model.compile(dynamic=False)
    image, label = images(given)
    return Training(model, adamw(model.parameters()), lambda: F.cross_entropy(model(image), label), dtype)


def neox(name: str, given: argparse.Namespace, dtype: torch.dtype) -> Training:
    """A GPT-NeoX of the sizes of one of our presets."""
    config = neox_config(
        preset_config(NEOX[name], context_length=given.length),
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = GPTNeoXForCausalLM(config).to(given.device).train()
    if given.compile:
        model.compile(dynamic=False)
    tokens = text(given, given.length, config.vocab_size)
    return Training(model, adamw(model.parameters()), lambda: model(tokens, labels=tokens).loss, dtype)


def neox_config(config: TokenformerConfig, **settings: Any) -> GPTNeoXConfig:
    """Width, depth, heads and vocabulary of an architecture, with blocks of as many FLOPs."""
    attention, tokens = 4 * config.dim**2, dict(config.tokens.items())
    block = 2 * config.dim * (3 * tokens["qkv"] + tokens["proj"] + tokens["ffn"])
    return GPTNeoXConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=(block - attention) // (2 * config.dim),
        max_position_embeddings=config.context_length,
        **settings,
    )


def images(given: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Draw random images of 224 pixels and their labels."""
    torch.manual_seed(0)
    image, label = torch.randn(given.images, 3, 224, 224), torch.randint(1000, (given.images,))
    return image.to(given.device), label.to(given.device)


def text(given: argparse.Namespace, length: int, vocab_size: int) -> Tensor:
    """Draw random tokens."""
    torch.manual_seed(0)
    return torch.randint(vocab_size, (given.sequences, length)).to(given.device)


Maker = Callable[[str, argparse.Namespace, torch.dtype], Training]
MODELS: dict[str, Maker] = {
    "tokenformer_vit_base_patch16_224": our_vit,
    "tokenformer_vit_base_matched_patch16_224": our_vit,
    "vit_base_patch16_224": timm_vit,
    "tokenformer_owt_124m": our_lm,
    "gpt_neox": neox,
    "tokenformer_owt_354m": our_lm,
    "gpt_neox_354m": neox,
}
NEOX = {"gpt_neox": "tokenformer_owt_124m", "gpt_neox_354m": "tokenformer_owt_354m"}
"""The preset that has the sizes of each."""
PAIRS = {
    "vit": [
        ("tokenformer_vit_base_patch16_224", "vit_base_patch16_224", ">= 0.97"),
        ("tokenformer_vit_base_matched_patch16_224", "vit_base_patch16_224", ""),
    ],
    "lm": [("tokenformer_owt_124m", "gpt_neox", ">= 1.0")],
    "lm354m": [("tokenformer_owt_354m", "gpt_neox_354m", "")],
}
"""Ours, theirs, and the goal."""


def speed(what: str, given: argparse.Namespace) -> list[Line]:
    """FLOP/s of the models of one kind."""
    pairs = PAIRS[what]
    models = {name: MODELS[name](name, given, torch.float32) for pair in pairs for name in pair[:2]}
    flops = {name: model.flops() for name, model in models.items()}
    lines = []
    for dtype in given.dtypes:
        for model in models.values():
            model.dtype = getattr(torch, dtype)
        taken = take_turns({name: model.step for name, model in models.items()}, given.rounds, given.device, warmup=1)
        rates = {name: [flops[name] / passed / 1e9 for passed in taken[name]] for name in models}
        for ours, theirs, goal in pairs:
            mine, other = rates[ours], rates[theirs]
            what_ = f"step of `{ours}`, {described(given, dtype)}"
            lines.append(Line(what_, theirs, median(mine), median(other), "GFLOP/s", ratio(mine, other), goal))
    return lines


def described(given: argparse.Namespace, dtype: str) -> str:
    """Describe precision and mode."""
    return dtype + (", compiled" if given.compile else "")


def memory(given: argparse.Namespace) -> list[Line]:
    """Peak memory per FLOP of the language models."""
    (ours, theirs, _), lines = PAIRS["lm"][0], []
    for dtype in given.dtypes:
        found = {name: peak_elsewhere(name, given, dtype) for name in (ours, theirs)}
        for what, of, goal in (("peak", "peak", "<= 0.9"), ("beyond weights, gradients and moments", "beyond", "")):
            mine, other = (found[name][of] / (found[name]["flops"] / 1e9) for name in (ours, theirs))
            what_ = f"memory of a step of `{ours}`, {what}, {described(given, dtype)}"
            lines.append(Line(what_, theirs, mine, other, "bytes/GFLOP", mine / other, goal))
    return lines


def peak_elsewhere(name: str, given: argparse.Namespace, dtype: str) -> dict[str, int]:
    """Run :func:`peak` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.speed.training", "--peak", name, "--dtypes", dtype]
    for option in ("device", "threads", "sequences", "length"):
        command += [f"--{option}", str(getattr(given, option))]
    command += ["--compile"] if given.compile else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak(name: str, given: argparse.Namespace) -> dict[str, int]:
    """Peak memory of three steps in bytes, that beyond the fixed state, and the FLOPs of one step."""
    before = 0 if given.device.startswith("cuda") else resident_bytes("VmRSS")
    model = MODELS.get(name, our_lm)(name, given, getattr(torch, given.dtypes[0]))
    for _ in range(3):
        model.step()
    most = peak_bytes(given.device, before)
    fixed = sum(4 * one.numel() * one.element_size() for one in model.model.parameters())
    return {"peak": most, "beyond": most - fixed, "flops": 0 if given.checkpointing else model.flops()}


def measure(given: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Measure what is asked for."""
    return [line for what in given.what for line in (memory(given) if what == "memory" else speed(what, given))], []


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=5, dtypes=("float32", "bfloat16"))
    parser.add_argument("--what", nargs="+", default=["vit", "lm", "memory"], choices=[*PAIRS, "memory"])
    parser.add_argument("--images", type=int, default=8, help="images in a batch")
    parser.add_argument("--sequences", type=int, default=1, help="texts in a batch")
    parser.add_argument("--length", type=int, default=1024, help="data tokens of a text")
    parser.add_argument("--compile", action="store_true", help="compile both sides with torch.compile")
    parser.add_argument(
        "--peak",
        help="print the peak memory of this model or preset, and that beyond weights, gradients and moments, in bytes",
    )
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, with --peak")
    given = parser.parse_args()
    if given.peak:
        torch.set_num_threads(given.threads)
        print(json.dumps(peak(given.peak, given)))
    else:
        main("training-compiled" if given.compile else "training", parser, measure)

"""Training steps against those of timm's ViT and transformers' GPT-NeoX: FLOP/s and memory.

    python -m benchmarks.speed.training [--what vit lm lm354m memory] [--images 8] [--sequences 1] [--compile]
    python -m benchmarks.speed.training --peak tokenformer_150m [--checkpointing]

A step is forward pass, loss, backward pass and AdamW (fused, as in the configs); ours goes through ``training_step`` of
the task, without a trainer. Both sides have float32 weights (for bfloat16 autocast), random inputs of the same shape,
no dropout, the loss as their library has it, and PyTorch's own attention.

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
import multiprocessing
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks.speed.lines import Line
from benchmarks.speed.timing import Training, arguments, main, median, peak_bytes, ratio, take_turns, unlogged
from lit_tokenformer.comparison.meter import resident_bytes
from lit_tokenformer.models import TokenformerConfig, preset_config
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier


def adamw(params: Any) -> torch.optim.Optimizer:
    """AdamW as in the configs."""
    return torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def make(name: str, given: argparse.Namespace, dtype: torch.dtype) -> Training:
    """Build a preset, or a model that presets are compared with, in training without a trainer."""
    torch.manual_seed(0)
    return (theirs if name in THEIRS else ours)(name, given, dtype)


def ours(name: str, given: argparse.Namespace, dtype: torch.dtype) -> Training:
    """Build one of our presets, as a task."""
    settings: dict[str, Any] = {"optimizer": adamw, "compile": given.compile}
    task: Any
    batch: Any
    if preset_config(name).stem == "patch":
        task, batch = LitImageClassifier(name, **settings), images(given)
    else:
        settings["grad_checkpointing"] = getattr(given, "checkpointing", False)
        task = LitCausalLM(name, context_length=given.length, **settings)
        batch = text(given, given.length + 1, task.backbone.config.vocab_size)
    task = unlogged(task.to(given.device).train())
    return Training(task, lambda: task.training_step(batch, 0), dtype, task.build_optimizer())


def theirs(name: str, given: argparse.Namespace, dtype: torch.dtype) -> Training:
    """Build one of timm's models, or a GPT-NeoX of the sizes of one of our presets."""
    model: Any
    if preset := THEIRS[name]:
        sizes = preset_config(preset, context_length=given.length)
        more: dict[str, Any] = {"tie_word_embeddings": True, "use_cache": False, "attn_implementation": "sdpa"}
        model = GPTNeoXForCausalLM(neox_config(sizes, **more))
        tokens = text(given, given.length, sizes.vocab_size)
    else:
        model, (image, label) = timm.create_model(name), images(given)
    model = model.to(given.device).train()
    if given.compile:
        model.compile(dynamic=False)

    def loss() -> Tensor:
        return model(tokens, labels=tokens).loss if preset else F.cross_entropy(model(image), label)

    return Training(model, loss, dtype, adamw(model.parameters()))


def counted(training: Training) -> int:
    """Count the FLOPs of forward and backward pass."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        training.gradients()
    training.model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


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


THEIRS = {
    "vit_base_patch16_224": "",
    "vit_tiny_patch16_224": "",
    "gpt_neox": "tokenformer_owt_124m",
    "gpt_neox_354m": "tokenformer_owt_354m",
    "gpt_neox_tiny": "tokenformer_lm_tiny",
}
"""Baselines: models of timm, and each GPT-NeoX with the preset whose sizes it has."""
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
    models = {name: make(name, given, torch.float32) for pair in pairs for name in pair[:2]}
    flops = {name: counted(model) for name, model in models.items()}
    lines = []
    for dtype in given.dtypes:
        for model in models.values():
            model.dtype = getattr(torch, dtype)
        taken = take_turns({name: model.step for name, model in models.items()}, given.rounds, given.device, warmup=1)
        rates = {name: [flops[name] / passed / 1e9 for passed in taken[name]] for name in models}
        for mine, other, goal in pairs:
            rate, baseline = rates[mine], rates[other]
            what_ = f"step of `{mine}`, {dtype}{', compiled' * given.compile}"
            lines.append(Line(what_, other, median(rate), median(baseline), "GFLOP/s", ratio(rate, baseline), goal))
    return lines


def memory(given: argparse.Namespace) -> list[Line]:
    """Peak memory per FLOP of the language models."""
    (model, baseline, _), lines = PAIRS["lm"][0], []
    for dtype in given.dtypes:
        found = {name: peak_elsewhere(name, given, dtype) for name in (model, baseline)}
        for what, of, goal in (("peak", "peak", "<= 0.9"), ("beyond weights, gradients and moments", "beyond", "")):
            mine, other = (found[name][of] / (found[name]["flops"] / 1e9) for name in (model, baseline))
            what_ = f"memory of a step of `{model}`, {what}, {dtype}{', compiled' * given.compile}"
            lines.append(Line(what_, baseline, mine, other, "bytes/GFLOP", mine / other, goal))
    return lines


def peak_elsewhere(name: str, given: argparse.Namespace, dtype: str) -> dict[str, int]:
    """Run :func:`peak` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak, (name, argparse.Namespace(**{**vars(given), "dtypes": [dtype]})))


def peak(name: str, given: argparse.Namespace) -> dict[str, int]:
    """Peak memory of three steps in bytes, that beyond the fixed state, and the FLOPs of one step."""
    torch.set_num_threads(given.threads)
    before = 0 if given.device.startswith("cuda") else resident_bytes("VmRSS")
    model = make(name, given, getattr(torch, given.dtypes[0]))
    for _ in range(3):
        model.step()
    most = peak_bytes(given.device, before)
    fixed = sum(4 * one.numel() * one.element_size() for one in model.model.parameters())
    return {"peak": most, "beyond": most - fixed, "flops": 0 if given.checkpointing else counted(model)}


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
    parser.add_argument("--peak", help="print the peak memory of this model, and that beyond its fixed state, in bytes")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, with --peak")
    given = parser.parse_args()
    if given.peak:
        print(json.dumps(peak(given.peak, given)))
    else:
        main("training-compiled" if given.compile else "training", parser, measure)

"""Training steps beside those of timm's ViT and transformers' GPT-NeoX: operations each second, and memory.

    python benchmarks/speed_training.py [--what vit lm lm354m memory] [--images 8] [--sequences 1] [--compile]
        [--dtypes float32 bfloat16] [--rounds 5] [--threads 2] [--device cpu]

A step is forward pass, loss, backward pass, AdamW (fused, as in the configs) and zeroed gradients; ours goes through
``training_step`` of the task and its parameter groups, without a trainer. Both sides have float32 weights (for bfloat16
autocast), random inputs of the same shape, no dropout and no augmentation, the loss as their library has it (timm's
models with ``F.cross_entropy``, GPT-NeoX given labels), and PyTorch's own attention.

- ``vit``: ``tokenformer_vit_base_patch16_224`` and ``..._matched_...`` beside timm's ``vit_base_patch16_224``.
- ``lm``: ``tokenformer_owt_124m`` and a GPT-NeoX of the same width, depth, heads and vocabulary, with shared
  embeddings as ours are, so that both have 124 million parameters.
- ``lm354m``: the same of ``tokenformer_owt_354m``; the feed-forward of the GPT-NeoX is 15,584 wide.
- ``memory``: the highest memory of three steps of each language model, in a process of its own: what is allocated on
  CUDA, on the CPU what is resident beyond what was there before the model.

Operations are those of matrix products and convolutions in forward and backward pass, counted by
``torch.utils.flop_counter`` with attention as plain products.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext

import timm
import torch
import torch.nn.functional as F
from runs import resident_bytes
from side_by_side import Line, arguments, median, ratio, report, take_turns
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lit_tokenformer.models import preset_config
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier


def adamw(params: object) -> torch.optim.Optimizer:
    """As the configs have it."""
    return torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)  # type: ignore[arg-type]


class Training:
    """A model under training on one batch.

    Args:
        model: What is trained.
        optimizer: Over its parameters.
        loss: The loss of the batch.
        dtype: Of autocast; float32 for none.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], dtype: torch.dtype
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss = loss
        self.dtype = dtype

    def gradients(self) -> None:
        """Forward and backward pass."""
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, self.dtype) if self.dtype != torch.float32 else nullcontext():
            loss = self.loss()
        loss.backward()

    def step(self) -> None:
        """One step of training."""
        self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def flops(self) -> int:
        """Operations of forward and backward pass."""
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.gradients()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()


def our_vit(name: str, given: argparse.Namespace, dtype: torch.dtype) -> Training:
    """One of our presets, as a task."""
    task = LitImageClassifier(name, optimizer=adamw, compile=given.compile).to(given.device).train()
    task.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    batch = images(given)
    return Training(task, task.build_optimizer(), lambda: task.training_step(batch, 0), dtype)


def timm_vit(name: str, given: argparse.Namespace, dtype: torch.dtype) -> Training:
    """One of timm's models."""
    model = timm.create_model(name).to(given.device).train()
    if given.compile:
        model.compile(dynamic=False)
    image, label = images(given)
    return Training(model, adamw(model.parameters()), lambda: F.cross_entropy(model(image), label), dtype)


def images(given: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Random images of 224 pixels, and their labels."""
    torch.manual_seed(0)
    image, label = torch.randn(given.images, 3, 224, 224), torch.randint(1000, (given.images,))
    return image.to(given.device), label.to(given.device)


def our_lm(name: str, given: argparse.Namespace, dtype: torch.dtype) -> Training:
    """One of our presets, as a task."""
    task = (
        LitCausalLM(name, context_length=given.length, optimizer=adamw, compile=given.compile).to(given.device).train()
    )
    task.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    batch = text(given, given.length + 1)
    return Training(task, task.build_optimizer(), lambda: task.training_step(batch, 0), dtype)


def neox(name: str, given: argparse.Namespace, dtype: torch.dtype) -> Training:
    """A GPT-NeoX of the sizes of one of our presets."""
    model = GPTNeoXForCausalLM(neox_config(NEOX[name], given.length)).to(given.device).train()
    if given.compile:
        model.compile(dynamic=False)
    tokens = text(given, given.length)
    return Training(model, adamw(model.parameters()), lambda: model(tokens, labels=tokens).loss, dtype)


def neox_config(preset: str, length: int) -> GPTNeoXConfig:
    """Width, depth, heads and vocabulary of a preset, with blocks of as many operations."""
    config = preset_config(preset, context_length=length)
    attention, tokens = 4 * config.dim**2, dict(config.tokens.items())
    block = 2 * config.dim * (3 * tokens["qkv"] + tokens["proj"] + tokens["ffn"])
    return GPTNeoXConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=(block - attention) // (2 * config.dim),
        max_position_embeddings=length,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )


def text(given: argparse.Namespace, length: int) -> Tensor:
    """Random tokens."""
    torch.manual_seed(0)
    return torch.randint(50304, (given.sequences, length)).to(given.device)


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
    """Operations each second of the models of one kind."""
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
    """What the lines of a run have in common."""
    return dtype + (", compiled" if given.compile else "")


def memory(given: argparse.Namespace) -> list[Line]:
    """Highest memory for each operation of the language models."""
    (ours, theirs, _), lines = PAIRS["lm"][0], []
    for dtype in given.dtypes:
        found = {name: peak_elsewhere(name, given, dtype) for name in (ours, theirs)}
        for what, of, goal in (("peak", "peak", "<= 0.9"), ("beyond weights, gradients and moments", "beyond", "")):
            mine, other = (found[name][of] / (found[name]["flops"] / 1e9) for name in (ours, theirs))
            what_ = f"memory of a step of `{ours}`, {what}, {described(given, dtype)}"
            lines.append(Line(what_, theirs, mine, other, "bytes/GFLOP", mine / other, goal))
    return lines


def peak_elsewhere(name: str, given: argparse.Namespace, dtype: str) -> dict[str, int]:
    """What :func:`peak` finds in a process of its own."""
    words = ["--peak", name, "--dtypes", dtype, "--device", given.device, "--threads", str(given.threads)]
    words += [
        "--sequences",
        str(given.sequences),
        "--length",
        str(given.length),
        *(["--compile"] if given.compile else []),
    ]
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak(name: str, given: argparse.Namespace) -> dict[str, int]:
    """Highest memory of three steps in bytes, what of it is beyond the fixed state, and the operations of one step."""
    cuda = given.device.startswith("cuda")
    before = 0 if cuda else resident_bytes("VmRSS")
    model = MODELS[name](name, given, getattr(torch, given.dtypes[0]))
    for _ in range(3):
        model.step()
    most = torch.cuda.max_memory_allocated(given.device) if cuda else resident_bytes("VmHWM") - before
    fixed = sum(4 * one.numel() * one.element_size() for one in model.model.parameters())
    return {"peak": most, "beyond": most - fixed, "flops": model.flops()}


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=5, dtypes=("float32", "bfloat16"))
    parser.add_argument("--what", nargs="+", default=["vit", "lm", "memory"], choices=[*PAIRS, "memory"])
    parser.add_argument("--images", type=int, default=8, help="images in a batch")
    parser.add_argument("--sequences", type=int, default=1, help="texts in a batch")
    parser.add_argument("--length", type=int, default=1024, help="data tokens of a text")
    parser.add_argument("--compile", action="store_true", help="compile both sides with torch.compile")
    parser.add_argument("--peak", choices=MODELS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak:
        print(json.dumps(peak(given.peak, given)))
    else:
        lines = [line for what in given.what for line in (memory(given) if what == "memory" else speed(what, given))]
        report("training-compiled" if given.compile else "training", lines, given.rounds, given.device, given.output)

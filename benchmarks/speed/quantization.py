"""Weight-only int8 and int4: perplexity, tokens per second and size of the weights, against the unquantized weights.

    python -m benchmarks.speed.quantization [--ckpt_path CHECKPOINT]

Greedy decoding of ``tokenformer_owt_124m`` with random weights at batch 1, 32 to 96 tokens; both take turns of 16
tokens. With ``--ckpt_path``, the perplexity of that checkpoint too, over the validation texts of ``causal_lm_small``
(the source of Python's standard library, no download), such as a checkpoint of ``fit --config causal_lm_small``.
"""

from __future__ import annotations

import argparse
import copy
import math
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.speed.lines import Line
from benchmarks.speed.timing import arguments, main, median, ratio, take_turns
from lit_tokenformer.data import TextDataModule
from lit_tokenformer.inference.quantization import SCHEMES, quantize
from lit_tokenformer.inference.sampling import Sampling, generate_tokens
from lit_tokenformer.inference.text import TextGenerator
from lit_tokenformer.models import Tokenformer, create_backbone

PRESET = "tokenformer_owt_124m"
FIRST, TURN, BATCHES = 32, 16, 8  # prompt and turn in data tokens, and validation batches


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the tensors in the state dict, tied ones once; those of a quantized tensor are its parts."""
    parts: dict[int, int] = {}
    for tensor in {id(one): one for one in model.parameters()}.values():
        names = getattr(tensor.data, "tensor_data_names", None)
        for part in [getattr(tensor.data, name) for name in names] if names else [tensor]:
            parts[id(part)] = part.nbytes
    return sum(parts.values())


@torch.inference_mode()
def perplexity(model: Tokenformer, batches: list[Tensor]) -> float:
    """Perplexity over data tokens, exp of the mean loss in nats per token."""
    losses = [
        nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())
        for batch in batches
    ]
    return math.exp(float(torch.stack(losses).mean()))


def decoding(dtype: str, device: str, rounds: int) -> list[Line]:
    """Measure tokens per second and the size of the weights."""
    plain = create_backbone(PRESET).eval().requires_grad_(False).to(device, getattr(torch, dtype))
    schemes = SCHEMES if device == "cpu" else ("int8",)
    models = {**{scheme: quantize(copy.deepcopy(plain), scheme) for scheme in schemes}, "plain": plain}
    prompt = torch.randint(plain.config.vocab_size, (FIRST,))
    steps = {
        name: generate_tokens(model, [prompt], TURN * (rounds + 2), Sampling(temperature=0))
        for name, model in models.items()
    }

    def turn(name: str) -> None:
        for _ in range(TURN):
            next(steps[name])

    taken = take_turns({name: partial(turn, name) for name in models}, rounds)
    speed = {name: TURN / median(one) for name, one in taken.items()}
    size = {name: weight_bytes(model) / 1e6 for name, model in models.items()}
    lines = []
    for scheme in schemes:
        what, faster = f"{PRESET}, {scheme}", ratio(taken["plain"], taken[scheme])
        lines += [
            Line(f"{what}, decoding", dtype, speed[scheme], speed["plain"], "tokens/s", faster),
            Line(f"{what}, weights", dtype, size[scheme], size["plain"], "MB", size[scheme] / size["plain"]),
        ]
    return lines


def quality(ckpt_path: str, device: str) -> list[Line]:
    """Measure the perplexity of a checkpoint with each scheme."""
    generator = TextGenerator.load(ckpt_path, device)
    model = generator.backbone
    data = TextDataModule("python_stdlib", val_fraction=0.05, block_size=model.config.context_length)
    data.use_tokenizer(generator.tokenizer)
    data.setup("validate")
    batches = [batch.to(device) for batch, _ in zip(data.val_dataloader(), range(BATCHES), strict=False)]
    before = perplexity(model, batches)
    lines = []
    for scheme in SCHEMES if device == "cpu" else ("int8",):
        after = perplexity(quantize(copy.deepcopy(model), scheme), batches)
        lines.append(Line(f"perplexity, {scheme}", "float32", after, before, "per token", after / before))
    return lines


def measure(given: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Measure each dtype, and the perplexity of a checkpoint."""
    lines = [line for dtype in given.dtypes for line in decoding(dtype, given.device, given.rounds)]
    return [*lines, *(quality(given.ckpt_path, given.device) if given.ckpt_path else [])], []


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=4, dtypes=("float32", "bfloat16"))
    parser.add_argument("--ckpt_path", help="checkpoint of a language model")
    main("quantization", parser, measure)

"""Adapters against LoRA and full fine-tuning, and what each forgets.

    python -m benchmarks.adapters [--steps 300] [--base_steps 1500] [--seeds 3] [--parts text images forgetting]

``text``: a byte-level language model of 278,656 parameters is trained on Python's standard library and adapted to the
documentation of Python. ``images``: a ViT is trained on the handwritten digits 0 to 4 and adapted to 5 to 9, with a new
head. Each arm (tokens, LoRA of as many trained parameters, full fine-tuning) is trained at three learning rates; a
figure is the mean over the seeds at the best of them. ``forgetting``: five tasks of two digits each, one after the
other, each with a head of its own: an adapter per task, against fine-tuning of the whole model.

Results are printed as Markdown, and written to ``benchmarks/results/adapters.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lit_tokenformer.adapters import add_adapter, set_adapter
from lit_tokenformer.data import TextDataModule, Tokenizer
from lit_tokenformer.inference.text import TextGenerator
from lit_tokenformer.models import create_backbone

RESULTS = Path(__file__).parent / "results" / "adapters.json"
TOKENS = {"qkv": 8, "proj": 8, "ffn": 20}
RATES = {"tokens": (3e-3, 1e-2, 3e-2), "lora": (3e-3, 1e-2, 3e-2), "full": (1e-3, 3e-3, 1e-2)}
Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]
"""Training batches of a seed."""


def adapt(base: nn.Module, arm: str, seed: int, also_train: tuple[str, ...] = ()) -> tuple[nn.Module, list[Tensor]]:
    """Return a copy of the base that is prepared for training, with its trained parameters."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    if arm == "tokens":
        add_adapter(model, "new", TOKENS, also_train, seed=seed)
    elif arm == "lora":
        layers = [name for name, layer in model.named_modules() if hasattr(layer, "key_tokens")]
        targets = [f"{name}.{part}" for name in layers for part in ("key_tokens", "value_tokens")]
        lora = {"r": 4, "lora_alpha": 4, "target_modules": [], "target_parameters": targets}
        add_adapter(model, "new", None, also_train, lora=lora)
    return model, [one for one in model.parameters() if one.requires_grad]


def train(model: nn.Module, parameters: list[Tensor], batches: Iterator[Any], steps: int, rate: float) -> None:
    """Train with AdamW, a warm-up of 20 steps and a cosine schedule down to a tenth."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedules = torch.optim.lr_scheduler
    warmup = schedules.LinearLR(optimizer, 0.05, total_iters=20)
    cosine = schedules.CosineAnnealingLR(optimizer, max(1, steps - 20), eta_min=rate / 10)
    schedule = schedules.SequentialLR(optimizer, [warmup, cosine], [20])
    model.train()
    for _, (inputs, targets) in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.inference_mode()
def loss_on(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Compute the mean loss, in nats per byte."""
    losses = [F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).item() for inputs, targets in batches]
    return statistics.mean(losses)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Compute the share of images whose most probable class is the label."""
    return (model(images).argmax(-1) == labels).float().mean().item()


def compare(
    part: str,
    base: nn.Module,
    batches: Batches,
    scores: Callable[[nn.Module], dict[str, float]],
    args: argparse.Namespace,
    also_train: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Train every arm at every rate with every seed; the scores are those of the trained models.

    Each fit is written to the output at once, and not repeated after an interruption.
    """
    found: dict[str, Any] = {}
    for arm, rates in RATES.items():
        for rate in rates:
            for seed in range(args.seeds):
                model, parameters = adapt(base, arm, seed, also_train)
                count = sum(one.numel() for one in parameters)
                name = f"{part}, {args.base_steps} + {args.steps} steps, {arm}, {rate:g}, seed {seed}"
                if name not in args.fits:
                    train(model, parameters, batches(seed), args.steps, rate)
                    args.fits[name] = scores(model)
                    args.write()
                rows = found.setdefault(arm, {"trained": count, "rates": {}})["rates"]
                rows.setdefault(f"{rate:g}", []).append(args.fits[name])
                print(f"{arm} {rate:g} seed {seed}: {rows[f'{rate:g}'][-1]}", flush=True)
    return found


def text(args: argparse.Namespace) -> dict[str, Any]:
    """Compare the arms on text: loss on the new domain and on the old one, with the adapter and without."""

    def domain(dataset: str) -> tuple[Batches, list[Any], list[str]]:
        data = TextDataModule(dataset, tokenizer="bytes", block_size=128, batch_size=8)
        data.prepare_data()
        data.setup("fit")
        evaluation = [(one[:, :-1], one[:, 1:]) for _, one in zip(range(24), data.val_dataloader(), strict=False)]
        prompts = [Tokenizer.bytes().decode(row[:64].tolist()) for inputs, _ in evaluation for row in inputs[:4]]
        rows = torch.cat([one for _, one in zip(range(1500), data.train_dataloader(), strict=False)])

        def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
            generator = torch.Generator().manual_seed(seed)
            while True:
                chosen = rows[torch.randint(len(rows), (8,), generator=generator)]
                yield chosen[:, :-1], chosen[:, 1:]

        return batches, evaluation, prompts

    (old, old_set, old_prompts), (new, new_set, new_prompts) = domain("python_stdlib"), domain("python_docs")
    torch.manual_seed(0)
    sizes = {"dim": 64, "depth": 4, "num_heads": 4, "param_tokens": 64, "vocab_size": 257, "context_length": 128}
    base = create_backbone("tokenformer_lm_tiny", **sizes)
    train(base, [*base.parameters()], old(0), args.base_steps, 3e-3)

    def scores(model: nn.Module) -> dict[str, float]:
        found = {"new": loss_on(model, new_set), "old": loss_on(model, old_set)}
        if "_adapters" in vars(model):
            set_adapter(model, None)
            found["old_off"] = loss_on(model, old_set)
        return found

    start = {"new": loss_on(base, new_set), "old": loss_on(base, old_set)}
    found = {"zero_shot": start, **compare("text", base, new, scores, args)}
    model, parameters = adapt(base, "tokens", 0)
    train(model, parameters, new(0), args.steps, float(best(found["tokens"], "new", min)[0]))
    generator: Any = TextGenerator(model, Tokenizer.bytes())  # type: ignore[arg-type]
    picked = generator.best_adapters([*old_prompts, *new_prompts])
    right = [name is None for name in picked[: len(old_prompts)]] + [
        name == "new" for name in picked[len(old_prompts) :]
    ]
    return {**found, "auto_right": statistics.mean(right), "auto_prompts": len(right)}


def digits(classes: tuple[int, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return training and test images (B, 1, 8, 8) of some digits, with labels from 0."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    target = torch.tensor(found.target)
    chosen = torch.stack([target == one for one in classes]).any(0).nonzero()[:, 0]
    labels = torch.stack([target[chosen] == one for one in classes]).float().argmax(0)
    cut = 3 * len(chosen) // 4
    return (images[chosen[:cut]], labels[:cut]), (images[chosen[cut:]], labels[cut:])


def shuffled(images: Tensor, labels: Tensor) -> Batches:
    """Return random batches of 32 images."""

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(images), (32,), generator=generator)
            yield images[chosen], labels[chosen]

    return batches


def image_base(classes: tuple[int, ...], steps: int) -> Any:
    """Train a ViT on some digits."""
    torch.manual_seed(0)
    sizes = {"dim": 64, "depth": 2, "num_heads": 4, "param_tokens": 64, "image_size": 8, "patch_size": 2}
    base = create_backbone("tokenformer_vit_tiny_patch16_224", in_chans=1, num_classes=len(classes), **sizes)
    train(base, [*base.parameters()], shuffled(*digits(classes)[0])(0), steps, 3e-3)
    return base


def images(args: argparse.Namespace) -> dict[str, Any]:
    """Compare the arms on images: accuracy on new classes, with a new head."""
    base = image_base((0, 1, 2, 3, 4), args.base_steps // 5)
    base.reset_classifier(5)
    learned, held = digits((5, 6, 7, 8, 9))
    return compare("images", base, shuffled(*learned), lambda model: {"new": accuracy(model, *held)}, args, ("head",))


def forgetting(args: argparse.Namespace) -> dict[str, Any]:
    """Learn five tasks in sequence; entry (i, j) is the accuracy on task j after task i."""
    tasks = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    base = image_base(tasks[0], args.base_steps // 15)
    found: dict[str, Any] = {"adapters": [], "fine_tuning": []}
    adapted, tuned, heads = copy.deepcopy(base), copy.deepcopy(base), {0: copy.deepcopy(base.head)}
    for number, classes in enumerate(tasks):
        batches = shuffled(*digits(classes)[0])(number)
        if number:
            add_adapter(adapted, f"task{number}", TOKENS, ["head"])
            train(adapted, [one for one in adapted.parameters() if one.requires_grad], batches, args.steps // 4, 1e-2)
            tuned.reset_classifier(2)
            train(tuned, [*tuned.parameters()], shuffled(*digits(classes)[0])(number), args.steps // 4, 1e-3)
            heads[number] = copy.deepcopy(tuned.head)
        rows: tuple[list[float], list[float]] = ([], [])
        for place in range(number + 1):
            held = digits(tasks[place])[1]
            set_adapter(adapted, f"task{place}" if place else None)
            rows[0].append(accuracy(adapted, *held))
            tuned.head = copy.deepcopy(heads[place])
            rows[1].append(accuracy(tuned, *held))
        tuned.head = copy.deepcopy(heads[number])
        for name, row in zip(found, rows, strict=True):
            found[name].append(row)
            print(f"{name} after task {number + 1}: {', '.join(f'{one:.3f}' for one in row)}", flush=True)
    return found


def best(arm: dict[str, Any], score: str, of: Callable[..., Any]) -> tuple[str, float, float]:
    """Return the best rate, with mean and standard deviation over its seeds."""
    rates = {rate: [one[score] for one in rows] for rate, rows in arm["rates"].items()}
    rate = of(rates, key=lambda rate: statistics.mean(rates[rate]))
    return rate, statistics.mean(rates[rate]), statistics.pstdev(rates[rate])


def report(part: str, found: dict[str, Any]) -> Iterator[str]:
    """Format the results of a part as Markdown."""
    if part == "forgetting":
        yield "| | after task | " + " | ".join(f"task {number}" for number in range(1, 6)) + " |"
        yield "|---" * 7 + "|"
        for name, matrix in found.items():
            for number, row in enumerate(matrix, start=1):
                shown = [f"{one:.3f}" for one in row] + [""] * (5 - len(row))
                yield f"| {name} | {number} | {' | '.join(shown)} |"
        return
    of = min if part == "text" else max
    yield "| | trained | rate | new | all rates |" + (" old | old, off |" if part == "text" else "")
    yield "|---" * (7 if part == "text" else 5) + "|"
    for arm in RATES:
        rate, mean, spread = best(found[arm], "new", of)
        every = statistics.mean(one["new"] for rows in found[arm]["rates"].values() for one in rows)
        line = f"| {arm} | {found[arm]['trained']:,} | {rate} | {mean:.4f} +- {spread:.4f} | {every:.4f} |"
        rows = found[arm]["rates"][rate]
        for score in ("old", "old_off") if part == "text" else ():
            values = [one[score] for one in rows if score in one]
            line += f" {statistics.mean(values):.4f} |" if values else " |"
        yield line
    if part == "text":
        zero, full = found["zero_shot"]["new"], best(found["full"], "new", min)[1]
        for arm in ("tokens", "lora"):
            share = (zero - best(found[arm], "new", min)[1]) / (zero - full)
            yield f"{arm}: {share:.0%} of the gap to full fine-tuning"
        yield f"zero-shot: new {zero:.4f}, old {found['zero_shot']['old']:.4f}"
        yield "| | after domain | loss on domain 1 | loss on domain 2 |\n|---|---|---|---|"
        for name, arm, first in (
            ("one adapter per domain, named", "tokens", "old_off"),
            ("fine-tuning", "full", "old"),
        ):
            rows = found[arm]["rates"][best(found[arm], "new", min)[0]]
            forgot = statistics.mean(one[first] for one in rows)
            yield f"| {name} | 1 | {found['zero_shot']['old']:.4f} | |"
            yield f"| {name} | 2 | {forgot:.4f} | {best(found[arm], 'new', min)[1]:.4f} |"
        yield f"auto: right for {found['auto_right']:.0%} of {found['auto_prompts']} prompts of 64 bytes"


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--base_steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["text", "images", "forgetting"], choices=[*PARTS])
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    known = json.loads(args.output.read_text()) if args.output.exists() else {}
    args.fits = known.setdefault("fits", {})
    args.write = lambda: args.output.write_text(json.dumps(known, indent=1) + "\n")
    for part in args.parts:
        found = PARTS[part](args)
        settings = {"steps": args.steps, "base_steps": args.base_steps, "seeds": args.seeds}
        known[part] = {"settings": settings, "torch": torch.__version__, "results": found}
        args.write()
        print(f"\n## {part}\n", *report(part, found), sep="\n", flush=True)


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "text": text,
    "images": images,
    "forgetting": forgetting,
}

if __name__ == "__main__":
    main()

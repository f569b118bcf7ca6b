"""Image and text in one sequence: words read, text next to images, ``merge``, and classification by answers.

    python -m benchmarks.vision_language [--parts words twin merge zero_shot] [--seeds 3]

``words``      held-out words of ``rendered_text`` by training step (one seed)
``twin``       bits per byte of text in a ``LitMultiTask`` next to questions about grids of digits, against text alone
``merge``      an image classifier and a language model, trained separately, merged and trained jointly; against joint
               training from scratch for as many FLOPs
``zero_shot``  digits by the most probable class name as the answer, against an image classifier of equal sizes

Results are printed as Markdown, and written to ``benchmarks/results/vision_language.json`` after every fit; a fit that
is already there is skipped, so an interrupted command continues.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor

from lit_tokenformer.data import ImageDataModule, MultiTaskDataModule, TextDataModule, VisionLanguageDataModule
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier, LitMultiTask, LitVisionLanguage, LRSchedule
from lit_tokenformer.tasks.merge import merge_tasks

RESULTS = Path(__file__).parent / "results" / "vision_language.json"
READER = {"dim": 96, "depth": 3, "num_heads": 4, "param_tokens": 64, "patch_size": 8}
POSITIONS = {"rotary_fraction": 1.0, "rotary_base": 100.0}
SMALL = {"dim": 64, "depth": 3, "num_heads": 4, "param_tokens": 48}
BITS, ACCURACY = "val/bits_per_byte", "val/acc1"
COLUMNS = {
    "words": ("step", "cpu_seconds", "val/loss", "val/exact_match", "val/char_error_rate"),
    "twin": (BITS, "val/prose/bits_per_byte", "val/eyes/exact_match"),
    "merge": ("flops", ACCURACY, "val/exact_match", BITS),
    "zero_shot": (ACCURACY, "val/exact_match"),
}
ANSWER = 8
"""Tokens of a sequence of ``class?``, separator and a digit."""


class Curve(Callback):
    """Scores of each validation, with the optimizer step and the CPU seconds of training until then."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.seconds, self.start = 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = time.process_time()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds += time.process_time() - self.start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.rows.append({"step": trainer.global_step, "cpu_seconds": round(self.seconds, 1), **found})
        self.start = time.process_time()


class Joint(LightningModule):
    """Train a merged model on answers and, in the same step, on text; the loss is the sum."""

    def __init__(self, task: LitVisionLanguage) -> None:
        super().__init__()
        self.task = task
        self.tasks = ("eyes", "prose")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        answers, _ = self.task.feature_loss(*self.task.batch_features(batch["eyes"]))
        return answers + text_loss(self.task, batch["prose"])

    def configure_optimizers(self) -> Any:
        return self.task.configure_optimizers()


def text_loss(task: Any, tokens: Tensor) -> Tensor:
    """Compute the mean loss of texts (B, T + 1), in nats per byte."""
    return F.cross_entropy(task.backbone(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def trainer(**settings: Any) -> Trainer:
    """Create a quiet trainer on the CPU."""
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return Trainer(accelerator="cpu", num_sanity_val_steps=0, gradient_clip_val=1.0, **quiet, **settings)


def fit(task: LightningModule, data: LightningDataModule, steps: int, every: int = 0) -> list[dict[str, float]]:
    """Train a task and validate it at intervals of ``every`` steps; 0 for once, at the end."""
    curve = Curve()
    intervals: dict[str, Any] = {"val_check_interval": every or steps, "check_val_every_n_epoch": None}
    batches = 0 if isinstance(task, Joint) else 24  # of text; more than image data have
    with tempfile.TemporaryDirectory() as folder:
        settings = {"default_root_dir": folder, "max_steps": steps, "max_epochs": -1, "limit_val_batches": batches}
        trainer(callbacks=[curve], **settings, **intervals).fit(task, data)
    return curve.rows


def recipe(rate: float) -> dict[str, Any]:
    """Optimizer and schedule of a task."""
    optimizer = partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return {"optimizer": optimizer, "schedule": LRSchedule("cosine", warmup=0.1, min_factor=0.02)}


def answers(data: VisionLanguageDataModule, overrides: dict[str, Any], **settings: Any) -> LitVisionLanguage:
    """Build a task for images and answers."""
    sizes: Any = {"image_size": data.image_size, "in_chans": data.in_chans, "context_length": data.block_size}
    sizes["overrides"] = {**POSITIONS, **overrides}
    return LitVisionLanguage("tokenformer_lm_tiny", separator_id=256, **sizes, **settings)


def text_data() -> TextDataModule:
    """Open Python's standard library as bytes."""
    return TextDataModule("python_stdlib", tokenizer="bytes", block_size=128, batch_size=8)


def language_model(overrides: dict[str, Any], **settings: Any) -> LitCausalLM:
    """Build a language model of bytes."""
    sizes: Any = {"vocab_size": 257, "context_length": 128, "separator_id": 256}
    return LitCausalLM("tokenformer_lm_tiny", overrides={**POSITIONS, **overrides}, **sizes, **settings)  # type: ignore[arg-type]


@torch.inference_mode()
def bits_per_byte(task: Any, data: TextDataModule) -> float:
    """Compute bits per byte on 24 validation batches."""
    batches = [batch for _, batch in zip(range(24), data.val_dataloader(), strict=False)]
    return statistics.mean(text_loss(task.eval(), batch).item() for batch in batches) / math.log(2)


# --- Parts: each yields the name of a fit, and a function that trains it and returns rows of scores ---------------

Fits = Iterator[tuple[str, Callable[[], list[dict[str, float]]]]]


def words(args: argparse.Namespace) -> Fits:
    """Read held-out words."""

    def run() -> list[dict[str, float]]:
        settings: Any = {"in_chans": 1, "batch_size": args.batch_size, "eval_batch_size": 250}
        data = VisionLanguageDataModule("rendered_text", train_samples=args.every * args.batch_size, **settings)
        task = answers(data, {**READER, **args.sizes}, **recipe(args.rate))
        return fit(task, data, args.word_steps, args.every)

    yield f"{args.word_steps} steps of {args.batch_size} at {args.rate:g}", run


def twin(args: argparse.Namespace) -> Fits:
    """Train text alone, and next to questions about images, on as many text tokens."""
    sizes = {**SMALL, "dim": 96, **args.sizes}

    def alone() -> list[dict[str, float]]:
        return fit(language_model(sizes, **recipe(2e-3)), text_data(), args.steps)

    def joint(weight: float) -> list[dict[str, float]]:
        eyes = VisionLanguageDataModule("digits_grid", batch_size=32, eval_batch_size=250)
        shared: Any = {**POSITIONS, **sizes}
        grid: Any = {"image_size": 16, "context_length": 20, "separator_id": 256, "overrides": {"patch_size": 8}}
        prose = partial(LitCausalLM, vocab_size=257, context_length=128, separator_id=256)
        tasks = {"eyes": partial(LitVisionLanguage, **grid), "prose": prose}
        given: dict[str, Any] = {"tasks": tasks, "loss_weights": {"eyes": weight}, **recipe(2e-3)}
        task = LitMultiTask("tokenformer_lm_tiny", overrides=shared, **given)
        data = MultiTaskDataModule(tasks={"eyes": eyes, "prose": text_data()}, epoch="prose")
        return fit(task, data, args.steps)

    yield "text alone", alone
    for weight in (1.0, 0.1):
        yield f"text and images, weight of images {weight:g}", partial(joint, weight)


def digits() -> VisionLanguageDataModule:
    """Open scikit-learn's digits with their class names as answers."""
    return VisionLanguageDataModule("images/digits", batch_size=32, eval_batch_size=180)


def classifier(overrides: dict[str, Any]) -> LitImageClassifier:
    """Build an image classifier for scikit-learn's digits."""
    return LitImageClassifier("tokenformer_vit_tiny_patch16_224", 10, 8, {**overrides, "patch_size": 4}, **recipe(2e-3))  # type: ignore[arg-type]


def zero_shot(args: argparse.Namespace) -> Fits:
    """Classify digits by scores of class names, and by a head."""
    sizes = {**SMALL, **args.sizes}

    def by_answers() -> list[dict[str, float]]:
        data = digits()
        return fit(answers(data, {**sizes, "patch_size": 4}, **recipe(2e-3)), data, args.steps)

    yield "class names as answers", by_answers
    data = partial(ImageDataModule, "digits", batch_size=32, eval_batch_size=180)
    yield "image classifier", lambda: fit(classifier(sizes), data(), args.steps)


def merge(args: argparse.Namespace) -> Fits:
    """Train jointly after `merge`, and from scratch for as many FLOPs."""
    sizes, rate = {**SMALL, **args.sizes}, 1e-3
    separate, joint = args.steps, args.steps // 2
    text_flops = 8 * language_model(sizes).cost().training_flops
    image_flops = 32 * classifier(sizes).cost().training_flops
    data = digits()
    data.block_size = ANSWER
    whole = answers(data, {**sizes, "patch_size": 4, "class_token": True})  # a data token uses one of two groups
    joint_flops = 32 * whole.cost().training_flops + text_flops

    def models() -> tuple[LitImageClassifier, LitCausalLM]:
        return classifier(sizes), language_model(sizes, **recipe(2e-3))

    def score(task: LitVisionLanguage, flops: int) -> dict[str, float]:
        (found,) = trainer().validate(task, digits(), verbose=False)
        return {"flops": flops, BITS: bits_per_byte(task, text_data()), **found}

    def train(task: LitVisionLanguage, steps: int, before: int) -> dict[str, float]:
        settings = recipe(rate)
        task.make_optimizer, task.schedule = settings["optimizer"], settings["schedule"]
        fit(
            Joint(task.train()),
            MultiTaskDataModule(tasks={"eyes": digits(), "prose": text_data()}, epoch="prose"),
            steps,
        )
        return score(task, before + steps * joint_flops)

    def merged() -> list[dict[str, float]]:
        image, text = models()
        seen = fit(image, ImageDataModule("digits", batch_size=32, eval_batch_size=180), separate)[-1]
        read = fit(text, text_data(), separate)[-1]
        both, spent = merge_tasks(image, text), separate * (text_flops + image_flops)
        alone = {"flops": spent, ACCURACY: seen[ACCURACY], BITS: read[BITS]}
        return [alone, score(both, spent), train(both, joint, spent)]

    def scratch() -> list[dict[str, float]]:
        steps = joint + round(separate * (text_flops + image_flops) / joint_flops)
        return [train(merge_tasks(*models()), steps, 0)]

    yield "separate, merged, joint", merged
    yield "joint from scratch", scratch


PARTS: dict[str, Callable[[argparse.Namespace], Fits]] = {
    "words": words,
    "twin": twin,
    "merge": merge,
    "zero_shot": zero_shot,
}


def report(part: str, fits: dict[str, list[list[dict[str, float]]]]) -> Iterator[str]:
    """Format the results of a part as Markdown: a row for each row of a fit, with mean and range over the seeds."""
    columns = COLUMNS[part]
    yield "| | " + " | ".join(columns) + " |"
    yield "|---" * (1 + len(columns)) + "|"
    for name, seeds in fits.items():
        for rows in zip(*seeds, strict=True):
            cells = []
            for column in columns:
                found = [row[column] for row in rows if column in row]
                spread = f" ({min(found):.4g} to {max(found):.4g})" if len({*found}) > 1 else ""
                cells.append(f"{statistics.mean(found):.4g}{spread}" if found else "")
            yield f"| {name} | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=[*PARTS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500, help="of each fit but those of words")
    parser.add_argument("--word_steps", type=int, default=3600)
    parser.add_argument("--batch_size", type=int, default=64, help="of words")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate for words")
    parser.add_argument("--every", type=int, default=600, help="steps between validations of words")
    parser.add_argument("--sizes", type=json.loads, default={}, help="fields of all architectures, as JSON")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    known: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    for part in args.parts:
        fits = known.setdefault(part, {"steps": args.steps, "torch": torch.__version__, "fits": {}})["fits"]
        for seed in range(1 if part == "words" else args.seeds):
            for name, run in PARTS[part](args):
                if seed >= len(fits.setdefault(name, [])):
                    seed_everything(seed, verbose=False)
                    fits[name].append(run())
                    args.output.write_text(json.dumps(known, indent=1) + "\n")
        print(f"\n## {part}\n", *report(part, fits), sep="\n", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main()

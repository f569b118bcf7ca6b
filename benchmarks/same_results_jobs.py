"""Small jobs for ``same_results.py``: fits, commands and plans, and readers of their results.

They use public names and the command line only, so that they run before and after modules have moved.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import runpy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SIZES = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 8}
TEXT = {"vocab_size": 257, "context_length": 16}
IMAGE = {"image_size": 8, "patch_size": 4, "num_classes": 10}
HALF, WHOLE = 3, 6
"""Optimizer steps at which a fit saves a checkpoint."""
RESULTS = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step")
"""Entries of a checkpoint whose numbers are compared; of all others only the tensors are."""
METRICS = re.compile(r"size/parameters|growth/output_difference|rows/\w+|(train|val)/(\w+/)?(loss|acc\d|bits_per_byte)")
"""Logged metrics without those that are measured times."""

Found = dict[str, Any]
"""Results of one job by name: tensors, numbers, text."""


# --- Jobs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A fit through Lightning's Trainer, resumed halfway; a causal language model then generates text.

    Args:
        preset: Name of the preset.
        task: Arguments of the task.
        data: Arguments of the data module; of images, of their augmentation.
        growth: Arguments of ``ParameterGrowthCallback``; empty for a fit without growth.
        trainer: Arguments of the Trainer.
        callbacks: Arguments of further callbacks of this project, by their name.
        head: ``image``, ``language``, ``masked_language`` or ``multitask``.
    """

    preset: str
    head: str
    task: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    growth: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def start(self, folder: Path) -> Found:
        """Train from fresh weights."""
        return self._run(folder, None)

    def resume(self, folder: Path, source: Path) -> Found:
        """Train the second half from a checkpoint, and generate text from the weights at the end."""
        found = self._run(folder, source / f"step={HALF}.ckpt")
        if self.head == "language":
            found |= generated(folder / f"step={WHOLE}.ckpt")
        return found

    def _run(self, folder: Path, ckpt_path: Path | None) -> Found:
        from lightning.pytorch import Callback, Trainer, seed_everything
        from lightning.pytorch.callbacks import ModelCheckpoint

        import callbacks as ours

        losses: list[torch.Tensor] = []

        class Losses(Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
                losses.append(outputs["loss"].detach().clone())

        seed_everything(7 if ckpt_path is None else 99, verbose=False)
        task, data = self._task_and_data()
        trainer = Trainer(
            default_root_dir=folder,
            max_steps=WHOLE,
            limit_val_batches=2,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **self.trainer,
            callbacks=[
                Losses(),
                ModelCheckpoint(folder, "{step}", every_n_train_steps=HALF, save_top_k=-1),
                *([ours.ParameterGrowthCallback(**{"unit": "step", **self.growth})] if self.growth else []),
                *(getattr(ours, name)(**settings) for name, settings in self.callbacks.items()),
            ],
        )
        trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
        found: Found = {f"loss of batch {number}": loss for number, loss in enumerate(losses)}
        found |= trainer.validate(task, data, verbose=False, weights_only=True)[0]
        return found | read(folder)

    def _task_and_data(self) -> tuple[Any, Any]:
        from lit_tokenformer import data, tasks

        overrides = {**SIZES, **self.task.get("overrides", {})}
        images: dict[str, Any] = {"dataset": "digits", "batch_size": 8, "seed": 3, "num_workers": 0}
        text: dict[str, Any] = {
            "dataset": "python_docs",
            "block_size": TEXT["context_length"],
            "batch_size": 4,
            "seed": 3,
        }
        given: dict[str, Any] = {
            "schedule": tasks.LRSchedule("cosine", warmup=2, min_factor=0.1, unit="step"),
            **self.task,
        }
        if self.head == "image":
            given |= {"num_classes": 10, "image_size": 8, "overrides": {**overrides, "patch_size": 4}}
            augmentation = data.Augmentation(**{"shift": 0.125, **self.data})
            return tasks.LitImageClassifier(self.preset, **given), data.ImageDataModule(
                **images, augmentation=augmentation
            )
        given |= {"overrides": overrides, "context_length": TEXT["context_length"]}
        if self.head == "masked_language":
            module = data.MaskedTextDataModule(**{**text, "examples": "sentences", **self.data})
            return tasks.LitMaskedLM(self.preset, module.vocab_size, **given), module
        given |= {"vocab_size": TEXT["vocab_size"], "separator_id": 256}
        if self.head == "language":
            return tasks.LitCausalLM(self.preset, **given), data.TextDataModule(**{**text, **self.data})
        both = data.MultiTaskDataModule(data.ImageDataModule(**images), data.TextDataModule(**text), **self.data)
        given |= {"num_classes": 10, "image_size": 8, "image": {"patch_size": 4}}
        return tasks.LitMultiTask(self.preset, **given), both


@dataclass(frozen=True)
class CommandLine:
    """A fit through the command line, resumed halfway, and the commands that read its checkpoint.

    Args:
        config: Settings of the fit; the parts that all fits share are added.
        then: Commands after the fit as lists of arguments; ``{ckpt}`` is the last checkpoint, ``{out}`` a new path.
    """

    config: dict[str, Any]
    then: tuple[tuple[str, ...], ...] = ()

    def start(self, folder: Path) -> Found:
        """Train from fresh weights."""
        return self._fit(folder)

    def resume(self, folder: Path, source: Path) -> Found:
        """Train the second half from a checkpoint, and run the other commands."""
        found = self._fit(folder, "--ckpt_path", str(source / f"step={HALF}.ckpt"))
        for number, command in enumerate(self.then):
            out = folder / f"{number}-{command[0]}"
            paths = {"ckpt": folder / f"step={WHOLE}.ckpt", "out": out, "config": folder / "given.yaml"}
            paths["before"] = folder / f"{number - 1}-{self.then[number - 1][0]}"
            run(*(part.format(**paths) for part in command))
            found |= {f"{command[0]}: {name}": value for name, value in read(out).items()}
        return found

    def _fit(self, folder: Path, *more: str) -> Found:
        folder.mkdir(parents=True)
        save = {"dirpath": str(folder), "filename": "{step}", "every_n_train_steps": HALF, "save_top_k": -1}
        callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": save}]
        callbacks += [
            {"class_path": f"callbacks.{name}", "init_args": settings}
            for name, settings in self.config["callbacks"].items()
        ]
        logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder)}}
        trainer = {
            **{"max_steps": WHOLE, "limit_val_batches": 2, "val_check_interval": HALF, "accelerator": "cpu"},
            **{"logger": logger, "log_every_n_steps": 1, "enable_progress_bar": False, "limit_predict_batches": 2},
            **{"check_val_every_n_epoch": None, "enable_model_summary": False, "callbacks": callbacks},
        }
        config = {"seed_everything": 1, "trainer": {**trainer, "default_root_dir": str(folder)}}
        config |= {part: self.config[part] for part in ("model", "data")}
        (folder / "given.yaml").write_text(json.dumps(config))  # JSON is YAML
        run("fit", "--config", str(folder / "given.yaml"), *more)
        return read(folder)


@dataclass(frozen=True)
class Plan:
    """The numbers that ``plan`` prints for one preset at its own size, with a growth."""

    preset: str

    def start(self, folder: Path) -> Found:
        """Plan a fit, and take the numbers of its output without the words."""
        from lit_tokenformer.models import preset_config

        config = preset_config(self.preset)
        task, data = {
            "image": ("LitImageClassifier", ("ImageDataModule", "--data.image_size=224")),
            "language": ("LitCausalLM", ("TextDataModule",)),
            "masked_language": ("LitMaskedLM", ("MaskedTextDataModule",)),
        }[config.head]
        growth = {"unit": "step", "schedule": {40: totals} if (totals := _growth(config, 2)) else {}}
        callback = {"class_path": "callbacks.ParameterGrowthCallback", "init_args": growth}
        shown = run(
            *("plan", f"--model=lit_tokenformer.tasks.{task}", f"--model.preset={self.preset}"),
            *(f"--data=lit_tokenformer.data.{data[0]}", *data[1:], f"--trainer.callbacks={json.dumps([callback])}"),
            *("--trainer.max_steps=100", "--trainer.accelerator=cpu", "--trainer.logger=false"),
        )
        return {"numbers": " ".join(re.findall(r"\d[\d,.]*(?:e[+-]\d+)?", shown))}

    def resume(self, folder: Path, source: Path) -> Found:
        """Nothing to resume."""
        return {}


Job = Fit | CommandLine | Plan


def _growth(config: Any, factor: int) -> dict[str, int]:
    """Totals of a growth: tokens where an architecture has them, and depth where blocks can be inserted."""
    tokens = config.tokens
    kinds = {kind: factor * getattr(tokens, kind) for kind in ("qkv", "proj", "ffn")}
    kinds = kinds if config.projection == "pattention" else {}
    return kinds | ({"depth": config.depth + 1} if config.norm_position != "post" else {})


def all_jobs() -> dict[str, Job]:
    """Every job by its name."""
    from lit_tokenformer.models import list_presets, preset_config

    jobs: dict[str, Job] = {}
    seen: set[Any] = set()
    names = sorted(list_presets(), key=lambda name: ("tiny" not in name, name))
    for name in names:
        for projection in (preset_config(name).projection, "pattention"):
            config = preset_config(name, **SIZES, **TEXT, **IMAGE, projection=projection)
            if config in seen:  # only its size differs from that of a preset before
                continue
            seen.add(config)
            totals = _growth(config, 2)
            depth = {key: total for key, total in totals.items() if key == "depth"}
            tokens = {key: total for key, total in totals.items() if key != "depth"}
            stages = [stage for stage in (tokens, depth) if stage]
            growth: dict[str, Any] = {"schedule": dict(zip((1, 2), stages, strict=False))} if stages else {}
            task = {"overrides": {"projection": projection}}
            jobs[f"{name}, {projection}"] = Fit(name, config.head, task, growth=growth)
    image, language, masked = "tokenformer_vit_tiny_patch16_224", "tokenformer_lm_tiny", "tokenformer_mlm_tiny"
    ramps = {"tau_steps": 3, "ramp_steps": 2, "rewarm_steps": 2}
    plateau = {"trigger": "plateau", "window": 1, "patience": 1, "min_delta": 10.0, "cooldown": 0}
    ways: dict[str, dict[str, Any]] = {
        "zero_keys": {"method": "zero_keys"},
        "random": {"method": "random"},
        "zero_keys, ramps": {"method": "zero_keys", **ramps},
        "split, old rows frozen": {"freeze_old_steps": 3, "old_updates": 0.1, "new_state": "zeros"},
        "random, optimizer state reset": {"method": "random", "new_state": "reset"},
        "trigger": plateau,
    }
    for title, growth in ways.items():
        jobs[f"growth: {title}"] = Fit(language, "language", growth={"schedule": {1: 12, 2: 24}, **growth})
    for norm in ("gelu_l2", "softmax", "gelu"):
        task = {"overrides": {"score_norm": norm}}
        jobs[f"score norm: {norm}"] = Fit(language, "language", task, growth={"schedule": {1: 16}})
    small: dict[str, Any] = {"schedule": {1: 16, 2: {"depth": 3}}}
    mixed = {"mixup": 0.5, "label_smoothing": 0.1}
    noisy: dict[str, Any] = {
        "overrides": {"drop_path": 0.2, "dropout": 0.1, "patch_drop_rate": 0.25, "global_pool": "avg"}
    }
    halves: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    jobs |= {
        "image: GrowingEMA, accumulation": Fit(
            image, "image", noisy, mixed, small, halves, {"GrowingEMA": {"decay": 0.9}}
        ),
        "image: PatchDropSchedule": Fit(
            image,
            "image",
            growth=small,
            callbacks={"PatchDropSchedule": {"schedule": {1: 0.5, 4: 0.0}, "unit": "step"}},
        ),
        "text: layer-wise rates, z-loss, documents apart": Fit(
            language, "language", {"layerwise_lr": True, "z_loss": 1e-3, "cross_documents": False}, growth=small
        ),
        "text: as large as linear, gradient checkpointing": Fit(
            *(language, "language"),
            {"grad_checkpointing": True, "match": "parameters", "overrides": {"param_tokens": None}},
            growth={"schedule": {2: 256}},
        ),
        "masked text: blocks, whole words": Fit(
            masked, "masked_language", data={"examples": "blocks", "whole_words": True}, growth=small
        ),
        "multitask": Fit(language, "multitask", growth=small),
        "multitask: learned weights": Fit(language, "multitask", {"loss_weights": "uncertainty"}, growth=small),
    }
    jobs |= _command_lines(image, language, masked)
    return jobs | {f"plan: {name}": Plan(name) for name in names}


def _command_lines(image: str, language: str, masked: str) -> dict[str, Job]:
    """The shipped configs in a tiny size, with all callbacks, and the commands around a fit."""
    growth = {"schedule": {1: 16, 2: {"depth": 3}}, "unit": "step"}
    callbacks = {"ParameterGrowthCallback": growth, "TrainingMonitor": {}, "LossGuard": {}, "RunSummary": {}}
    texts = {"dataset": "python_docs", "block_size": 32, "batch_size": 4}
    pictures = {"dataset": "digits", "batch_size": 8, "num_workers": 0, "augmentation": {"shift": 0.125, "mixup": 0.2}}

    def config(task: str, preset: str, data: str, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
        overrides = {**SIZES, "rotary_fraction": 0.5, **more.pop("overrides", {})}
        init_args = {"preset": preset, "overrides": overrides, "schedule": {"unit": "step", "warmup": 1}, **more}
        return {
            "callbacks": callbacks,
            "model": {"class_path": f"lit_tokenformer.tasks.{task}", "init_args": init_args},
            "data": {"class_path": f"lit_tokenformer.data.{data}", "init_args": settings},
        }

    def part(name: str, settings: dict[str, Any]) -> dict[str, Any]:
        return {"class_path": f"lit_tokenformer.data.{name}", "init_args": settings}

    images = config("LitImageClassifier", image, "ImageDataModule", pictures, overrides={"patch_size": 4})
    images["callbacks"] = {**callbacks, "GrowingEMA": {"decay": 0.9}}
    bpe = {**texts, "tokenizer": "bpe:300"}
    both = {"image": part("ImageDataModule", pictures), "text": part("TextDataModule", texts)}
    grow = ("grow", "--ckpt_path={ckpt}", "--tokens=32", "--output={out}")
    score = ("--config={config}", "--ckpt_path={ckpt}", "--trainer.logger=false")
    return {
        "command line: image": CommandLine(images, (grow, ("predict", *score, "--output={out}"))),
        "command line: text": CommandLine(
            config("LitCausalLM", language, "TextDataModule", bpe),
            (
                grow,
                ("export", "--ckpt_path={ckpt}", "--output={out}"),
                ("import", "--source={before}", "--output={out}"),
            ),
        ),
        "command line: masked text": CommandLine(
            config("LitMaskedLM", masked, "MaskedTextDataModule", {**texts, "examples": "sentences"}), (grow,)
        ),
        "command line: multitask": CommandLine(
            config("LitMultiTask", language, "MultiTaskDataModule", both, image={"patch_size": 4}),
            (("split", "--ckpt_path={ckpt}", "--output={out}"),),
        ),
    }


# --- Results ---------------------------------------------------------------------------------------------------------


def run(*args: str) -> str:
    """Run the command line in this process.

    Returns:
        Its output.

    Raises:
        RuntimeError: If it fails.
    """
    output = io.StringIO()
    status: Any = None
    sys.argv = ["lit-tokenformer", *args]
    with contextlib.redirect_stdout(output):
        try:
            runpy.run_module("lit_tokenformer", run_name="__main__")
        except SystemExit as stop:
            status = stop.code
    if status:
        raise RuntimeError(f"exit status {status}: lit-tokenformer {' '.join(args)}")
    return output.getvalue()


def generated(ckpt_path: Path) -> Found:
    """Text from a checkpoint, greedy and sampled, of several prompts at once."""
    given = ("generate", f"--ckpt_path={ckpt_path}", "--prompt=im", "--prompt=The st", "--format=json")
    found: Found = {}
    for title, settings in {"greedy": ("--temperature=0",), "sampled": ("--top_k=50", "--seed=5")}.items():
        lines = run(*given, "--max_new_tokens=8", *settings).splitlines()
        found |= {f"{title} text {number}": json.loads(line)["completion"] for number, line in enumerate(lines)}
    return found


def read(path: Path) -> Found:
    """Results in a file, or in all files of a folder."""
    if path.is_dir():
        files = sorted(one for one in path.rglob("*") if one.is_file())
        return {f"{one.relative_to(path)}: {name}": value for one in files for name, value in read(one).items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(sorted(load_file(path).items()))
    if path.name == "metrics.csv":
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        cells = [(row["step"], name, cell) for row in rows for name, cell in row.items() if cell]
        return {f"{name} at step {step}": cell for step, name, cell in cells if METRICS.fullmatch(name)}
    if path.name.endswith("-predict") or path.name == "tokenizer.json":
        return {f"line {number}": line for number, line in enumerate(path.read_text().splitlines())}
    if path.suffix == ".ckpt" or path.name.endswith(("-grow", "-import")):
        return dict(leaves(torch.load(path, map_location="cpu", weights_only=True)))
    return {}


def leaves(value: Any, path: str = "", numbers: bool = False) -> Iterator[tuple[str, Any]]:
    """Tensors of a checkpoint, and the numbers of its :data:`RESULTS`, by their place."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            name = str(key).split("{")[0].rsplit(".", 1)[-1] if path == "callbacks" else str(key)
            yield from leaves(one, f"{path}/{name}" if path else name, numbers or (not path and key in RESULTS))
    elif isinstance(value, (list, tuple)):
        for number, one in enumerate(value):
            yield from leaves(one, f"{path}/{number}", numbers)
    elif numbers and isinstance(value, (bool, int, float)):
        yield path, value

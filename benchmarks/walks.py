"""List the files of this project that five walks through it enter.

The walks are an image batch, a text batch, a growth, a resume, and a checkpoint to text.

A file counts as entered if a function of it runs; imports do not count. ``docs/design.md`` has the lists.

    python -m benchmarks.walks
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything

from callbacks import ParameterGrowthCallback
from lit_tokenformer.cli import main as command_line
from lit_tokenformer.data import ImageDataModule, TextDataModule
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lit_tokenformer", "callbacks")
SIZES = {"dim": 32, "depth": 1, "num_heads": 2, "param_tokens": 8}


@contextlib.contextmanager
def entered(found: set[str]) -> Iterator[None]:
    """Record the files whose functions run in the block."""

    def watch(frame: Any, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(ROOT)) and frame.f_code.co_name != "<module>":
            name = os.path.relpath(path, ROOT)
            if name.startswith(PACKAGES) and not name.endswith("moved.py"):
                found.add(name)

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)


def trainer(folder: str, epochs: int = 2, **settings: Any) -> Trainer:
    """Build a trainer of two batches per epoch."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    limits = {"limit_train_batches": 2, "limit_val_batches": 0, "default_root_dir": folder}
    return Trainer(max_epochs=epochs, **limits, **quiet, **settings)  # type: ignore[arg-type]


def digits() -> tuple[LitImageClassifier, ImageDataModule]:
    """Build an image classifier and its data."""
    seed_everything(0, verbose=False)
    overrides: Any = {**SIZES, "patch_size": 4}
    task = LitImageClassifier("tokenformer_vit_tiny_patch16_224", num_classes=10, image_size=8, overrides=overrides)
    return task, ImageDataModule("digits", batch_size=8, num_workers=0)


def documents(folder: str) -> tuple[LitCausalLM, TextDataModule]:
    """Build a language model and its data."""
    texts = Path(folder) / "texts"
    texts.mkdir(exist_ok=True)
    for number in range(60):
        (texts / f"{number}.txt").write_text(f"{number} one two three four. " * 200)
    cache = str(Path(folder) / "cache")
    overrides: Any = {**SIZES, "rotary_fraction": 0.5}
    settings: dict[str, Any] = {"tokenizer": "bytes", "block_size": 16, "batch_size": 4, "num_workers": 0}
    data = TextDataModule("files", files=[str(texts)], cache_dir=cache, **settings)
    data.prepare_data()
    data.setup("fit")
    return LitCausalLM("tokenformer_lm_tiny", data.vocab_size, 16, overrides=overrides), data


def image_batch(folder: str, found: set[str]) -> None:
    """From an image data set to weights that took a step."""
    task, data = digits()
    with entered(found):
        trainer(folder, enable_checkpointing=False).fit(task, data)


def text_batch(folder: str, found: set[str]) -> None:
    """From documents to weights that took a step."""
    task, data = documents(folder)
    _, data = documents(folder)
    with entered(found):
        trainer(folder, enable_checkpointing=False).fit(task, data)


def growth(folder: str, found: set[str]) -> None:
    """From a due key of a schedule to a larger model with its optimizer."""

    class Watched(ParameterGrowthCallback):
        def on_train_batch_start(self, *args: Any) -> None:
            with entered(found):
                super().on_train_batch_start(*args)

    task, data = digits()
    trainer(folder, enable_checkpointing=False, callbacks=[Watched({1: 16})]).fit(task, data)


def resume(folder: str, found: set[str]) -> None:
    """From a checkpoint after a growth to the next step."""
    task, data = digits()
    first = trainer(folder, callbacks=[ParameterGrowthCallback({1: 16})])
    first.fit(task, data)
    first.save_checkpoint(f"{folder}/x.ckpt")
    task, data = digits()
    second = trainer(folder, epochs=3, callbacks=[ParameterGrowthCallback({1: 16})])
    with entered(found):
        second.fit(task, data, ckpt_path=f"{folder}/x.ckpt", weights_only=True)


def checkpoint_to_text(folder: str, found: set[str]) -> None:
    """From a checkpoint to generated text on the command line."""
    task, data = documents(folder)
    fit = trainer(folder)
    fit.fit(task, data)
    fit.save_checkpoint(f"{folder}/x.ckpt")
    with entered(found), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        command_line(["generate", "--ckpt_path", f"{folder}/x.ckpt", "--max_new_tokens", "3"])


WALKS: list[Callable[[str, set[str]], None]] = [image_batch, text_batch, growth, resume, checkpoint_to_text]


def main() -> None:
    """Print each walk with its files."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    for walk in WALKS:
        found: set[str] = set()
        with tempfile.TemporaryDirectory() as folder:
            walk(folder, found)
        print(f"{walk.__name__}: {len(found)}")
        for name in sorted(found):
            print(f"    {name}")


if __name__ == "__main__":
    main()

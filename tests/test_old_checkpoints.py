"""Checkpoints, configs and import paths of version 0.1.0 keep working, with the same numbers.

Each folder of ``tests/data/checkpoints`` has the ``last.ckpt`` of a fit that grew, the ``config.yaml`` that the command
line wrote, and in ``expected.json`` the scores, the loss of the next training step and the text of that version.
"""

import csv
import importlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from lit_tokenformer.cli import main
from lit_tokenformer.models import param_tokens
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier, LitMaskedLM

FOLDER = Path(__file__).parent / "data" / "checkpoints"
TASKS = {"image": LitImageClassifier, "text": LitCausalLM, "masked_text": LitMaskedLM}

MOVED = {  # as in the config.yaml of runs, and in code, by the module where each is public
    "callbacks": {
        "callbacks.ema.GrowingEMA",
        "callbacks.error_log.ErrorLog",
        "callbacks.interruptions.PreemptionCheckpoint",
        "callbacks.monitor.TrainingMonitor",
        "callbacks.parameter_growth.ParameterGrowthCallback",
        "callbacks.patch_dropping.PatchDropSchedule",
        "callbacks.predictions.PredictionWriter",
        "callbacks.safeguard.LossGuard",
        "callbacks.summary.RunSummary",
    },
    "lit_tokenformer.data": {
        "lit_tokenformer.data.augmentation.Augmentation",
        "lit_tokenformer.data.images.ImageDataModule",
        "lit_tokenformer.data.masked_text.MaskedTextDataModule",
        "lit_tokenformer.data.multitask.MultiTaskDataModule",
        "lit_tokenformer.data.text.TextDataModule",
        "lit_tokenformer.data.tokenizers.Tokenizer",
    },
    "lit_tokenformer.models": {
        "lit_tokenformer.models.backbone.Tokenformer",
        "lit_tokenformer.models.config.ParamTokens",
        "lit_tokenformer.models.config.TokenformerConfig",
        "lit_tokenformer.models.pattention.Pattention",
        "lit_tokenformer.models.presets.BackboneOverrides",
        "lit_tokenformer.models.presets.create_backbone",
    },
    "lit_tokenformer.tasks": {
        "lit_tokenformer.tasks.base.LitTask",
        "lit_tokenformer.tasks.causal_lm.LitCausalLM",
        "lit_tokenformer.tasks.image_classification.LitImageClassifier",
        "lit_tokenformer.tasks.masked_lm.LitMaskedLM",
        "lit_tokenformer.tasks.multitask.LitMultiTask",
        "lit_tokenformer.tasks.schedule.LRSchedule",
        "lit_tokenformer.tasks.schedule.LRSchedulerConfig",
    },
    "lit_tokenformer": {"lit_tokenformer.growth.grow"},
}
ALONE = [  # no package has them; the first three stand in configs
    "lit_tokenformer.checkpoint_io.WholeCheckpointIO",
    "lit_tokenformer.tasks.causal_lm.published_adamw",
    "lit_tokenformer.tasks.masked_lm.mosaic_adamw",
    "lit_tokenformer.initialization.initialize_from",
    "lit_tokenformer.text_generation.TextGenerator",
]

SAVE_NEXT = (
    *("--trainer.max_steps=5", "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"),
    *(
        "--trainer.callbacks.dirpath=.",
        "--trainer.callbacks.filename=next",
        "--trainer.callbacks.every_n_train_steps=1",
    ),
)


def load(path):
    """What an import path names."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("package", "path"), [(package, path) for package in MOVED for path in sorted(MOVED[package])])
def test_an_old_import_path_names_the_public_class(package, path):
    assert load(path) is load(f"{package}.{path.rsplit('.', 1)[1]}")


@pytest.mark.parametrize("path", ALONE)
def test_an_import_path_without_a_package_stays(path):
    assert load(path).__name__ == path.rsplit(".", 1)[1]


@pytest.fixture
def copied(tmp_path, monkeypatch, text_cache):
    """Copy a checkpoint and the texts that its config names into the current folder."""
    monkeypatch.chdir(tmp_path)

    def copy(kind):
        shutil.copytree(FOLDER / kind, tmp_path, dirs_exist_ok=True)
        for name in ("text.txt", "val.txt"):
            shutil.copy(FOLDER / name, tmp_path)
        return json.loads((FOLDER / kind / "expected.json").read_text())

    return copy


def run(command, *args):
    assert main([command, "--config", "config.yaml", "--ckpt_path", "last.ckpt", *args]) == 0


def logged():
    """The latest value of each metric in the newest log."""
    newest = max(Path("logs").rglob("metrics.csv"), key=os.path.getmtime)
    with newest.open(newline="") as file:
        return {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value}


def same(found, expected):
    """Equal but for the rounding of another release of torch."""
    return {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", TASKS)
def test_an_old_checkpoint_is_validated_with_the_same_scores(kind, copied):
    expected = copied(kind)
    run("validate")
    assert same(logged(), expected["validate"])
    assert param_tokens(TASKS[kind].load_from_checkpoint("last.ckpt", weights_only=True)) == expected["param_tokens"]


@pytest.mark.parametrize("kind", TASKS)
def test_a_fit_is_resumed_from_an_old_checkpoint(kind, copied):
    expected = copied(kind)
    steps = torch.load("last.ckpt", weights_only=True)["global_step"] + 1
    run("fit", *SAVE_NEXT, f"--trainer.max_steps={steps}")
    assert same(logged(), expected["fit"])
    resumed = torch.load("next.ckpt", weights_only=True)
    assert resumed["global_step"] == steps and len(resumed["optimizer_states"][0]["state"]) > 0


def test_an_old_language_model_generates_the_same_text(copied, capsys):
    expected = copied("text")
    args = ["--prompt", "A model", "--max_new_tokens", "8", "--temperature", "0", "--format", "json"]
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--ckpt_path", "last.ckpt", *args])
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out)["completion"] == expected["text"]


@pytest.mark.parametrize("kind", TASKS)
def test_every_class_path_in_an_old_config_is_importable(kind):
    text = (FOLDER / kind / "config.yaml").read_text()
    for path in re.findall(r": ((?:lit_tokenformer|callbacks)\.[\w.]+)$", text, flags=re.MULTILINE):
        assert callable(load(path))
    assert yaml.safe_load(text)["model"]["class_path"] == f"lit_tokenformer.tasks.{TASKS[kind].__name__}"

"""Every architecture of the table does what a user does with it: it trains, grows, resumes, is evaluated, generates."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import ParameterGrowthCallback
from lit_tokenformer.cli.main import main
from lit_tokenformer.data import ImageDataModule, MaskedTextDataModule, TextDataModule
from lit_tokenformer.inference.text import TextGenerator
from lit_tokenformer.models import list_presets, preset_config
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier, LitMaskedLM, LRSchedule

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("text_cache")]
SIZES = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 8}
FAMILIES = [name for name in list_presets() if name.endswith("_tiny") or "vit_tiny" in name]


def images(name, projection):
    overrides = {**SIZES, "patch_size": 4, "projection": projection}
    return LitImageClassifier(name, 10, 8, overrides=overrides), ImageDataModule("digits", batch_size=8)


def texts(name, projection):
    data = TextDataModule("python_docs", block_size=16, batch_size=2)
    depth = len(preset_config(name).layers or range(2))  # of blocks that differ, one of each kind
    overrides = {**SIZES, "projection": projection, "depth": depth}
    return LitCausalLM(name, data.vocab_size, 16, overrides=overrides), data


def masked_texts(name, projection):
    data = MaskedTextDataModule("python_docs", examples="sentences", block_size=16, batch_size=4)
    return LitMaskedLM(name, data.vocab_size, 16, overrides={**SIZES, "projection": projection}), data


KINDS = {"image": images, "language": texts, "masked_language": masked_texts}


def fit(name, projection, folder, ckpt_path=None):
    seed_everything(0)
    task, data = KINDS[preset_config(name).head](name, projection)
    task.schedule = LRSchedule("constant")
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    grows = [ParameterGrowthCallback({1: 16}, unit="step")] if task.backbone.param_tokens else []
    trainer = Trainer(
        default_root_dir=folder,
        max_steps=4,
        limit_val_batches=2,
        callbacks=[keep, *grows],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    return task, data, trainer


@pytest.mark.parametrize("projection", ["linear", "pattention"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_preset_trains_grows_resumes_is_evaluated_and_generates(name, projection, tmp_path):
    task, data, trainer = fit(name, projection, tmp_path / "one")
    assert all(total in (16, 64) for total in task.backbone.param_tokens.values())
    (scores,) = trainer.validate(task, data, verbose=False)
    assert torch.tensor(list(scores.values())).isfinite().all() and "val/loss" in scores
    rest, _, _ = fit(name, projection, tmp_path / "two", tmp_path / "one" / "step=2.ckpt")
    for key, tensor in task.state_dict().items():
        assert torch.equal(tensor, rest.state_dict()[key]), key
    if task.backbone.config.causal:
        texts = TextGenerator.load(tmp_path / "one" / "step=4.ckpt").generate("import", max_new_tokens=4)
        assert texts.startswith("import")


@pytest.mark.parametrize("more", [[], ["--model.overrides.projection", "pattention"]], ids=["linear", "pattention"])
def test_another_architecture_is_one_word_on_the_command_line(more, tmp_path):
    args = ["--model.preset", "rwkv4_small", *more, "--data.tokenizer", "bytes"]
    args += ["--data.dataset", "python_docs", "--data.block_size", "16", "--trainer.default_root_dir", str(tmp_path)]
    args += ["--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "2", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", "causal_lm_small", *args]) == 0

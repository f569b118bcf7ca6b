"""A new experiment from the weights of a checkpoint: what is taken, what is fresh, and what is refused."""

import copy
import logging
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from timm.layers import resample_abs_pos_embed
from torch.utils.data import DataLoader, TensorDataset

from callbacks import ParameterGrowthCallback
from lit_tokenformer.checkpoints.load import write_checkpoint
from lit_tokenformer.cli.commands import grow_checkpoint
from lit_tokenformer.cli.main import main
from lit_tokenformer.data import TextDataModule, Tokenizer
from lit_tokenformer.errors import UserError
from lit_tokenformer.growth import grow
from lit_tokenformer.models import model_size
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier, LitMultiTask
from lit_tokenformer.tasks.initialization import initialize_from
from lit_tokenformer.tasks.rebuild import fresh_checkpoint

pytestmark = pytest.mark.usefixtures("few_digits", "text_cache")

SIZES = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 8}
GROWN = {"qkv": 16, "proj": 16, "ffn": 64, "depth": 3}
VIT = "tokenformer_vit_tiny_patch16_224"


def classifier(num_classes=10, image_size=8, preset=VIT, **overrides):
    return LitImageClassifier(preset, num_classes, image_size, overrides={**SIZES, "patch_size": 4, **overrides})


def language_model(vocab_size=257, context_length=32, preset="tokenformer_lm_tiny", **overrides):
    return LitCausalLM(preset, vocab_size, context_length, overrides={**SIZES, **overrides})


def saved(task, path, **more):
    """A checkpoint of a task, as ``import`` and ``split`` write it."""
    write_checkpoint({**fresh_checkpoint(task, task.state_dict()), **more}, path)
    return path


def run(*args):
    """Runs a command in this process; returns its exit status."""
    try:
        return main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code


def error_line(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


@pytest.fixture
def logged(caplog):
    """What is logged."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger.name)
    yield lambda: caplog.text
    logger.removeHandler(caplog.handler)


# --- On the command line ------------------------------------------------------------------------------------------


def image_config(folder, schedule=None, **data):
    """A tiny ViT that grows in tokens and depth."""
    growth = {"schedule": {1: GROWN} if schedule is None else schedule}
    callbacks = [
        {"class_path": "callbacks.ParameterGrowthCallback", "init_args": growth},
        {"class_path": "callbacks.GrowingEMA", "init_args": {"decay": 0.5}},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}},
    ]
    trainer = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "callbacks": callbacks}
    model = {"preset": VIT, "overrides": {**SIZES, "patch_size": 4}}
    given = {
        "trainer": {**trainer, "enable_model_summary": False, "default_root_dir": str(folder)},
        "model": {"class_path": "LitImageClassifier", "init_args": model},
        "data": {"class_path": "ImageDataModule", "init_args": {"batch_size": 32, "num_workers": 0, **data}},
    }
    folder.mkdir(exist_ok=True)
    (folder / "given.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    return "--config", folder / "given.yaml"


def last(folder, version=0):
    return folder / "lightning_logs" / f"version_{version}" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def digits(few_digits, tmp_path_factory):
    """A finished fit on the digits that grew: 10 classes of 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("digits")
    assert run("fit", *image_config(folder)) == 0
    return last(folder)


@pytest.fixture(scope="module")
def folder_of_images(tmp_path_factory):
    """Another data set: 3 classes of 16 x 16 pixels."""
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for number in range(30):
        path = root / ("train", "val")[number > 23] / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return {"dataset": "imagefolder", "root": str(root), "image_size": 16, "batch_size": 8}


def test_a_fit_starts_from_weights_on_another_data_set(digits, folder_of_images, tmp_path, logged):
    config = image_config(tmp_path, **folder_of_images)
    args = ["--model.optimizer", "SGD", "--model.optimizer.lr", 0.0, "--trainer.max_epochs", 1]
    assert run("fit", *config, *args, "--init_from", digits) == 0
    old, new = (torch.load(path, weights_only=True) for path in (digits, last(tmp_path)))
    assert (new["epoch"], new["global_step"]) == (0, 3) and new["grown_depth"] == 3
    assert new["param_tokens"] == {"qkv": 16, "proj": 16, "ffn": 64}
    assert new["callbacks"]["ParameterGrowthCallback"]["events"] == []
    assert new["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.0
    trained, kept = old["current_model_state"], new["state_dict"]  # a rate of 0 changes nothing
    blocks = [name for name in kept if ".blocks." in name]
    assert len(blocks) > 30 and all(torch.equal(kept[name], trained[name]) for name in blocks)
    assert kept["backbone.head.fc.weight"].shape == (3, 32) and kept["backbone.stem.pos_embed"].shape == (1, 17, 32)
    for part in (
        "image_size 8 -> 16, num_classes 10 -> 3",
        "pos_embed resampled 5 -> 17",
        "newly initialized: backbone.head.fc.weight, backbone.head.fc.bias",
        "qkv 16, proj 16, ffn 64, depth 3",
    ):
        assert part in logged()
    assert LitImageClassifier.load_from_checkpoint(last(tmp_path), weights_only=True).backbone.num_classes == 3


def test_a_requeued_job_resumes_its_own_checkpoint(digits, folder_of_images, tmp_path):
    config = [*image_config(tmp_path, **folder_of_images), "--ckpt_path", "last"]
    base = tmp_path / "base.ckpt"
    base.write_bytes(digits.read_bytes())
    assert run("fit", *config, "--init_from", base, "--trainer.max_epochs", 1) == 0
    base.unlink()  # a job that resumes does not read it
    assert run("fit", *config, "--init_from", base, "--trainer.max_epochs", 2) == 0
    first, second = (torch.load(last(tmp_path, version), weights_only=True) for version in (0, 1))
    assert (first["global_step"], second["global_step"]) == (3, 6)
    assert (
        run("fit", *config, "--init_from", base, "--seed_everything", 5) == 2
    )  # nothing to resume, nothing to start from


def test_the_schedule_continues_from_the_size_of_the_checkpoint(digits, tmp_path, logged, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    config = image_config(tmp_path, {0: {"qkv": 12, "depth": 3}, 1: 32})
    assert run("plan", *config, "--init_from", digits) == 0
    shown = capsys.readouterr().out
    assert "qkv 16, proj 16, ffn 64" in shown and "qkv 32, proj 32, ffn 128" in shown and "qkv 12" not in shown
    assert run("fit", *config, "--init_from", digits) == 0
    assert "skipped stages (epoch 0)" in logged()
    (event,) = torch.load(last(tmp_path), weights_only=True)["callbacks"]["ParameterGrowthCallback"]["events"]
    assert event["before"]["qkv"] == 16 and event["after"]["qkv"] == 32


def test_a_saved_config_starts_from_the_same_weights(digits, tmp_path):
    assert run("fit", *image_config(tmp_path), "--init_from", digits, "--trainer.max_steps", 1) == 0
    config = tmp_path / "lightning_logs" / "version_0" / "config.yaml"
    assert yaml.safe_load(config.read_text())["init_from"] == str(digits)
    again = ["--config", config, "--trainer.default_root_dir", tmp_path / "again"]
    assert run("fit", *again) == 0
    ours, theirs = (torch.load(last(path), weights_only=True) for path in (tmp_path, tmp_path / "again"))
    assert all(torch.equal(tensor, theirs["state_dict"][name]) for name, tensor in ours["state_dict"].items())
    assert run("validate", "--config", config, "--ckpt_path", last(tmp_path)) == 0


def text_config(folder, text, **data):
    """A tiny language model on a text of one's own."""
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text(text * 60)
    (folder / "b.txt").write_text(text * 10)
    trainer = {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "val_check_interval": 2}
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    files = {"files": [str(folder / "a.txt")], "val_files": [str(folder / "b.txt")]}
    given = {
        "trainer": {**trainer, "callbacks": [checkpoint], "default_root_dir": str(folder)},
        "model": {"class_path": "LitCausalLM", "init_args": {"preset": "tokenformer_lm_tiny", "overrides": SIZES}},
        "data": {
            "class_path": "TextDataModule",
            "init_args": {"dataset": "files", **files, "block_size": 32, "batch_size": 4, **data},
        },
    }
    (folder / "given.yaml").write_text(yaml.safe_dump(given))
    return "--config", folder / "given.yaml"


FIRST, SECOND = "The quick brown fox jumps over the lazy dog. ", "Sphinx of black quartz, judge my vow! "


@pytest.fixture(scope="module")
def fox(text_cache, tmp_path_factory):
    """A finished fit of a language model."""
    folder = tmp_path_factory.mktemp("fox")
    assert run("fit", *text_config(folder, FIRST)) == 0
    return last(folder)


def test_a_language_model_starts_from_weights_on_another_corpus(fox, tmp_path, logged, capsys):
    args = ["--model.optimizer", "SGD", "--model.optimizer.lr", 0.0, "--init_from", fox]
    assert run("fit", *text_config(tmp_path, SECOND), *args) == 0
    old, new = (torch.load(path, weights_only=True) for path in (fox, last(tmp_path)))
    assert new["global_step"] == 2 and str(tmp_path) in str(new["callbacks"])
    assert str(fox.parent) not in str(new["callbacks"])  # the best of the other corpus is not this one's
    assert all(torch.equal(tensor, old["state_dict"][name]) for name, tensor in new["state_dict"].items())
    assert "newly initialized" not in logged()
    capsys.readouterr()
    assert run("generate", "--ckpt_path", last(tmp_path), "--max_new_tokens", 2, "--prompt", "A") == 0
    assert capsys.readouterr().out.startswith("A")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--init_from", "missing.ckpt"], "init_from: missing.ckpt is not a file"),
        (["--init_from", "{digits}", "--ckpt_path", "{digits}"], "starts a new experiment, ckpt_path: "),
        (["--init_ema", "true"], "init_ema: needs init_from"),
        (["--init_from", "{fox}"], "is of another architecture: stem 'token' (this model: 'patch'), head 'language' "),
        (["--init_from", "{digits}", "--model.overrides.dim", 64], "dim 32 (this model: 64); set model.preset and "),
        (["--init_from", "{digits}", "--model.overrides.num_heads", 4], "num_heads 2 (this model: 4)"),
        (["--init_from", "{digits}", "--model.overrides.patch_size", 2], "patch_size 4 (this model: 2)"),
        (["--init_from", "{digits}", "--model.preset", "vit_tiny_patch16_224"], "another architecture: "),
    ],
)
def test_bad_input_is_one_line_before_any_work(args, message, digits, fox, tmp_path, capsys):
    config = image_config(tmp_path)
    assert run("fit", *config, *(str(arg).format(digits=digits, fox=fox) for arg in args)) == 2
    line = error_line(capsys)
    assert line.startswith("init_") and message in line
    assert not (tmp_path / "lightning_logs").exists()


def test_another_vocabulary_is_refused_before_any_work(fox, tmp_path, capsys):
    assert run("fit", *text_config(tmp_path, SECOND, tokenizer="bpe:300"), "--init_from", fox) == 2
    line = error_line(capsys)
    assert line.startswith("init_from: ") and "another vocabulary (257 tokens, this model 300)" in line
    assert "init_resize_vocab" in line and not (tmp_path / "lightning_logs").exists()


# --- In Python ----------------------------------------------------------------------------------------------------


def assert_equal_weights(task, expected, but=()):
    state = task.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        if name not in but:
            torch.testing.assert_close(tensor, expected[name].to(tensor.dtype), rtol=0, atol=0)


HEAD = {"backbone.head.fc.weight", "backbone.head.fc.bias"}


def test_positions_are_resampled_and_the_head_is_fresh(tmp_path):
    old, task = classifier(), classifier(num_classes=3, image_size=16)
    fresh = copy.deepcopy(task.state_dict())
    initialize_from(task, saved(old, tmp_path / "old.ckpt"))
    position = "backbone.stem.pos_embed"
    assert_equal_weights(task, {**old.state_dict(), **{name: fresh[name] for name in HEAD}}, but={position})
    resampled = resample_abs_pos_embed(old.backbone.stem.pos_embed, new_size=[4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(task.backbone.stem.pos_embed, resampled)
    assert task(torch.zeros(1, 3, 16, 16)).shape == (1, 3)


@pytest.mark.parametrize("classes", [["b", "c", "a"], ["c", "d"], ["d", "b", "e", "a"], ["d", "e", "f"]])
def test_classes_of_an_image_head_are_matched_by_name(classes, tmp_path, logged):
    task = classifier(num_classes=3)
    path = saved(task, tmp_path / "one.ckpt", image_data={"class_names": ["a", "b", "c"]})
    new = classifier(num_classes=len(classes))
    fresh = copy.deepcopy(new.backbone.head.fc)
    initialize_from(new, path, SimpleNamespace(image_data={"class_names": classes}))
    for number, name in enumerate(classes):
        row = "abc".find(name)
        for part in ("weight", "bias"):
            source = getattr(fresh, part)[number] if row < 0 else getattr(task.backbone.head.fc, part)[row]
            assert torch.equal(getattr(new.backbone.head.fc, part)[number], source)
    known = sum(name in "abc" for name in classes)
    by_name = f"backbone.head.fc.weight: {known} of {len(classes)} classes by name"
    assert (by_name if known else "newly initialized: backbone.head.fc.weight, backbone.head.fc.bias") in logged()


def test_the_same_architecture_computes_the_same(tmp_path):
    old, task = classifier().eval(), classifier(param_tokens=4, depth=1).eval()
    grow(old, 16)
    initialize_from(task, saved(old, tmp_path / "old.ckpt"))
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(task(image), old(image))
    assert model_size(task) == {"heads": 2, "qkv": 16, "proj": 16, "ffn": 64, "depth": 2} and task.backbone.grown


def made_by(kind, digits, folder):
    """A checkpoint of the digits' model, of another make."""
    path = folder / f"{kind}.ckpt"
    if kind == "fit":
        return digits
    if kind == "grow":
        return grow_checkpoint(str(digits), 32, str(path))
    checkpoint = torch.load(digits, weights_only=True)
    state = checkpoint["current_model_state"]
    if kind == "folder":
        torch.distributed.checkpoint.save({"state_dict": state}, checkpoint_id=path, no_dist=True)
        rest = ("current_model_state", "averaging_state", "state_dict", "optimizer_states")
        torch.save({name: value for name, value in checkpoint.items() if name not in rest}, path / "meta.pt")
    elif kind == "weights_only":
        torch.save({"state_dict": state}, path)
    elif kind == "half":
        half = {name: tensor.half() for name, tensor in state.items()}
        torch.save({**checkpoint, "state_dict": half, "current_model_state": half}, path)
    return path


@pytest.mark.parametrize("kind", ["fit", "grow", "folder", "weights_only", "half"])
def test_checkpoints_of_every_make_are_read(kind, digits, tmp_path):
    path = made_by(kind, digits, tmp_path)
    task = classifier()
    initialize_from(task, path)
    state = torch.load(digits, weights_only=True)["current_model_state"]
    if kind == "grow":
        assert model_size(task) == {"heads": 2, "qkv": 32, "proj": 32, "ffn": 128, "depth": 3}
        old = classifier(param_tokens=16, depth=3)
        old.load_state_dict(state)
        image = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(task.eval()(image), old.eval()(image), rtol=1e-5, atol=1e-6)
    else:
        expected = {name: tensor.half().float() for name, tensor in state.items()} if kind == "half" else state
        assert_equal_weights(task, expected)
    assert next(task.parameters()).dtype == torch.float32


def test_an_imported_model_is_trained_further(fox, tmp_path):
    assert run("export", "--ckpt_path", fox, "--output", tmp_path / "published") == 0
    assert run("import", "--source", tmp_path / "published", "--output", tmp_path / "start.ckpt") == 0
    task = language_model()
    initialize_from(task, tmp_path / "start.ckpt")
    assert_equal_weights(task, torch.load(fox, weights_only=True)["state_dict"])
    assert task.tokenizer_json == Tokenizer.bytes().to_json()


def test_the_moving_average_is_taken_where_it_is_asked_for(digits, tmp_path):
    checkpoint = torch.load(digits, weights_only=True)
    task = classifier()
    initialize_from(task, digits, ema=True)
    assert_equal_weights(task, checkpoint["state_dict"])
    name = "backbone.blocks.0.attn.query.key_tokens"
    assert not torch.equal(checkpoint["state_dict"][name], checkpoint["current_model_state"][name])
    with pytest.raises(UserError, match="init_ema: .* has no moving average"):
        initialize_from(task, saved(task, tmp_path / "plain.ckpt"), ema=True)


class Text:
    """Stands for a data module of text."""

    def __init__(self, text, size=270):
        self.tokenizer = Tokenizer.train_bpe([text] * 20, size)


def test_tokens_of_both_vocabularies_keep_their_embeddings(tmp_path):
    first, second = Text(FIRST), Text(SECOND)
    old, task = language_model(270, tie_embeddings=False), language_model(270, tie_embeddings=False)
    fresh = copy.deepcopy(task.state_dict())
    old.tokenizer_json = first.tokenizer.to_json()
    path = saved(old, tmp_path / "old.ckpt")
    with pytest.raises(UserError, match=r"init_from: .* another vocabulary \(270 other tokens\); set data.tokenizer"):
        initialize_from(task, path, second)  # as many tokens, of another meaning
    initialize_from(task, path, second, resize_vocab=True)
    ours, theirs = (data.tokenizer._vocabulary for data in (first, second))
    common = ours.keys() & theirs.keys()
    assert 256 <= len(common) < 270 and any(ours[token] != theirs[token] for token in common)
    for name in ("backbone.stem.embedding.weight", "backbone.head.weight"):
        now, before = task.state_dict()[name], old.state_dict()[name]
        for token, number in theirs.items():
            source = before[ours[token]] if token in common else fresh[name][number]
            assert torch.equal(now[number], source), (name, token)
    initialize_from(task, path, first)  # the same one needs no setting


def test_a_padded_vocabulary_is_resized_by_rows(tmp_path):
    old, task = language_model(257), language_model(320)
    fresh = task.backbone.stem.embedding.weight.detach().clone()
    path = saved(old, tmp_path / "old.ckpt")
    with pytest.raises(UserError, match=r"257 tokens, this model 320\).*model.overrides.vocab_size to 257"):
        initialize_from(task, path)
    initialize_from(task, path, resize_vocab=True)
    weight = task.backbone.stem.embedding.weight
    assert torch.equal(weight[:257], old.backbone.stem.embedding.weight) and torch.equal(weight[257:], fresh[257:])
    assert task.backbone.head.weight is weight


@pytest.mark.parametrize("length", [16, 48])
def test_learned_positions_of_text_take_another_length(length, tmp_path, logged):
    preset = "gpt2_tiny"
    old, task = language_model(preset=preset), language_model(context_length=length, preset=preset)
    fresh = task.backbone.stem.positions.detach().clone()
    initialize_from(task, saved(old, tmp_path / "old.ckpt"))
    positions, common = task.backbone.stem.positions, min(length, 32)
    assert torch.equal(positions[:common], old.backbone.stem.positions[:common])
    assert torch.equal(positions[common:], fresh[common:])
    assert f"backbone.stem.positions 32 -> {length}" in logged()


def test_tied_and_untied_embeddings_are_not_mixed_up(tmp_path):
    path = saved(language_model(tie_embeddings=False), tmp_path / "old.ckpt")
    with pytest.raises(UserError, match=r"init_from: .*head.weight.* differ, .*tie_embeddings"):
        initialize_from(language_model(tie_embeddings=True), path)


def test_several_tasks_start_from_several_tasks_only(tmp_path):
    sizes = {"image_size": 8, "vocab_size": 257, "context_length": 32, "image": {"patch_size": 4}, "overrides": SIZES}
    old = LitMultiTask("tokenformer_lm_tiny", num_classes=10, loss_weights="uncertainty", **sizes)
    task = LitMultiTask("tokenformer_lm_tiny", num_classes=3, **sizes)
    path = saved(old, tmp_path / "old.ckpt")
    initialize_from(task, path)
    fresh = {"image.backbone.head.fc.weight", "image.backbone.head.fc.bias"}
    theirs = {name: tensor for name, tensor in old.state_dict().items() if not name.startswith("log_variances")}
    assert_equal_weights(task, theirs, but=fresh)
    with pytest.raises(UserError, match="init_from: .*LitMultiTask', .*; split it with `lit-tokenformer split`"):
        initialize_from(classifier(), path)


def test_another_architecture_is_found_by_its_weights_too(tmp_path):
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": classifier(dim=64).state_dict()}, path)  # without hyperparameters
    with pytest.raises(UserError, match=r"init_from: .* another architecture: .*64.*, expected .*32"):
        initialize_from(classifier(), path)
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match="init_from: .* has no weights of a LitImageClassifier"):
        initialize_from(classifier(), path)
    state = {**classifier().state_dict(), "backbone.stem.pos_embed": torch.zeros(1, 4, 32)}
    torch.save({"state_dict": state}, path)
    with pytest.raises(UserError, match="init_from: .*has 3 positions, expected a square"):
        initialize_from(classifier(), path)
    for name, tensor in (("query.key_tokens", torch.zeros(5, 32)), ("query.key_tokens", torch.zeros(()))):
        torch.save({"state_dict": {**classifier().state_dict(), f"backbone.blocks.0.attn.{name}": tensor}}, path)
        with pytest.raises(UserError, match=rf"init_from: .*{name}"):
            initialize_from(classifier(), path)
    for name in ("stem.embedding.weight", "blocks.0.attn.query.tau"):
        torch.save({"state_dict": {**language_model().state_dict(), f"backbone.{name}": torch.zeros(3, 2)}}, path)
        with pytest.raises(UserError, match=rf"init_from: .*{name}"):
            initialize_from(language_model(), path, resize_vocab=True)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    "change",
    [
        {"extra": Payload},
        {"current_model_state": 3},
        {"current_model_state": {"backbone.stem.cls_token": 1}},
    ],
)
def test_a_strangers_checkpoint_is_refused_and_nothing_in_it_is_executed(change, tmp_path):
    change = {key: value(tmp_path / "executed") if value is Payload else value for key, value in change.items()}
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": classifier().state_dict(), **change}, path)
    with pytest.raises(UserError, match=r"^init_from: .*old\.ckpt"):
        initialize_from(classifier(), path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"preset": "no_such", "overrides": {}},
        {"preset": 3, "overrides": None},
        {"preset": VIT, "overrides": {"dim": [[]], "unheard": 1}},
    ],
)
def test_where_the_arguments_say_nothing_the_shapes_decide(arguments, tmp_path):
    old, task = classifier(), classifier()
    torch.save({"state_dict": old.state_dict(), "hyper_parameters": arguments}, tmp_path / "old.ckpt")
    initialize_from(task, tmp_path / "old.ckpt")
    assert_equal_weights(task, old.state_dict())


def test_a_schedule_that_shrinks_the_model_is_still_refused(tmp_path):
    task = classifier(param_tokens=16)
    trainer = Trainer(accelerator="cpu", logger=False, max_epochs=2, callbacks=[ParameterGrowthCallback({1: 8})])
    with pytest.raises(UserError, match="schedule: epoch 1: qkv would shrink from 16 to 8"):
        trainer.fit(task, [(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))])


def test_a_task_whose_head_was_reset_is_trained_and_saved(digits, tmp_path):
    task = LitImageClassifier.load_from_checkpoint(digits, weights_only=True)
    task.backbone.reset_classifier(3)
    samples = DataLoader(TensorDataset(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])), batch_size=4)
    growth = ParameterGrowthCallback({0: 12, 1: 32})  # the first stage is behind the model already
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=2, callbacks=[growth], **settings)
    trainer.fit(task, samples, samples)
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    loaded = LitImageClassifier.load_from_checkpoint(tmp_path / "new.ckpt", weights_only=True)
    assert loaded.backbone.num_classes == 3 and model_size(loaded) == {
        "heads": 2,
        "qkv": 32,
        "proj": 32,
        "ffn": 128,
        "depth": 3,
    }
    assert len(growth.events) == 1


def test_another_depth_than_the_config_is_refused_where_it_could_not_be_resumed(digits):
    task = classifier()
    initialize_from(task, digits)
    task._device_mesh = object()  # as under ModelParallelStrategy
    task._trainer = SimpleNamespace(callbacks=[], state=SimpleNamespace(fn=TrainerFn.FITTING))
    with pytest.raises(UserError, match="model.overrides.depth: expected 3, .* got 2; under ModelParallelStrategy"):
        task.configure_model()


def test_data_of_text_are_compared_as_the_command_line_gives_them(tmp_path):
    (tmp_path / "a.txt").write_text(FIRST * 20)
    data = TextDataModule("files", [f"{tmp_path}/a.txt"], tokenizer="bpe:270", block_size=32)
    old, task = language_model(270), language_model(270)
    old.tokenizer_json = data.tokenizer.to_json()
    initialize_from(task, saved(old, tmp_path / "old.ckpt"), data)
    assert_equal_weights(task, old.state_dict())

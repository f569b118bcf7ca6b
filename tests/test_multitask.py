"""Two tasks on one backbone: each is as if it were alone, in what it logs, and in what is left when they are split."""

import sys

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import GrowingEMA, ParameterGrowthCallback, TrainingMonitor
from lit_tokenformer.cli.commands import grow_checkpoint, read_checkpoint, split_checkpoint
from lit_tokenformer.cli.main import main
from lit_tokenformer.data import Augmentation, ImageDataModule, MultiTaskDataModule, TextDataModule
from lit_tokenformer.growth import grow
from lit_tokenformer.inference.text import TextGenerator
from lit_tokenformer.models import param_tokens
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier, LitMultiTask, LRSchedule
from lit_tokenformer.tasks.rebuild import rebuild_task

pytestmark = pytest.mark.usefixtures("few_digits", "text_cache")
SIZES = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 8, "rotary_fraction": 0.5}
WORDS = "import this, import that, and return the same; "


def make_task(**settings):
    given = {"num_classes": 10, "image_size": 8, "vocab_size": 257, "context_length": 16, "separator_id": 256}
    given |= {"overrides": SIZES, "image": {"patch_size": 4}, "schedule": LRSchedule("constant")}
    return LitMultiTask("tokenformer_lm_tiny", **{**given, **settings})


def make_data(folder, epoch="image", mixup=0.0, image_batch=16, text_batch=4, val_words=7):
    """8 training batches of images, and by default 5 of text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text(WORDS * 8)
    (folder / "val.txt").write_text(WORDS * val_words)
    files = {"files": [str(folder / "train.txt")], "val_files": [str(folder / "val.txt")], "cache_dir": str(folder)}
    augmentation = Augmentation(shift=0.125, mixup=mixup)
    image = ImageDataModule("digits", batch_size=image_batch, eval_batch_size=10, seed=3, augmentation=augmentation)
    text = TextDataModule("files", **files, block_size=16, batch_size=text_batch, eval_batch_size=3, seed=3)
    return MultiTaskDataModule(image, text, epoch)


def make_trainer(*callbacks, **settings):
    given = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    given |= {"enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks)}
    return Trainer(**{**given, "callbacks": list(callbacks), **settings})


def every_step(folder):
    """Keeps a checkpoint of every optimizer step."""
    return ModelCheckpoint(folder, "step{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)


def make_batch():
    image, tokens = torch.randn(6, 3, 8, 8), torch.randint(257, (4, 17))
    return {"image": (image, torch.randint(10, (6,))), "text": tokens}


def assert_equal_weights(task, other):
    ours, theirs = task.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_metrics_that_can_be_monitored_are_those_that_are_logged(tmp_path):
    task = make_task(loss_weights="uncertainty")
    trainer = make_trainer(max_epochs=1)
    trainer.fit(task, make_data(tmp_path))
    assert {name for name in trainer.callback_metrics if not name.startswith("size/")} == task.logged_metrics()


# -- one set of parameter tokens


def test_blocks_and_final_norm_are_shared_and_counted_once():
    task = make_task()
    assert task.image.backbone.blocks is task.text.backbone.blocks
    assert task.image.backbone.norm is task.text.backbone.norm
    own = sum(p.numel() for part in task.backbones.values() for p in (*part.stem.parameters(), *part.head.parameters()))
    tied = task.text.backbone.stem.embedding.weight.numel()
    shared = sum(p.numel() for p in (*task.image.backbone.blocks.parameters(), *task.image.backbone.norm.parameters()))
    assert task.cost().parameters == sum(p.numel() for p in task.parameters()) == own - tied + shared
    optimized = [p for group in task.build_optimizer().param_groups for p in group["params"]]
    assert len(optimized) == len(set(optimized)) == len(list(task.parameters()))


def test_decay_spares_what_it_spares_in_each_task_alone():
    task = make_task(loss_weights="uncertainty")
    names = {parameter: name for name, parameter in task.named_parameters()}
    spared = {names[p] for p in task.build_optimizer().param_groups[1]["params"]}
    assert {"image.backbone.stem.cls_token", "image.backbone.stem.pos_embed", "log_variances.text"} <= spared
    assert not any("tokens" in name and "cls" not in name for name in spared)


@pytest.mark.parametrize("weights", [{"image": 0.5, "text": 3.0}, {"text": 0.0}, "uncertainty"])
def test_gradient_is_the_weighted_sum_of_the_tasks_gradients(weights):
    task = make_task(loss_weights=weights).double()
    if weights == "uncertainty":
        torch.nn.init.constant_(task.log_variances["image"], -0.7)
    batch = make_batch()
    batch["image"] = batch["image"][0].double(), batch["image"][1]
    shared = [*task.image.backbone.blocks.parameters(), *task.image.backbone.norm.parameters()]
    with pytest.warns(UserWarning, match="log"):  # no trainer
        losses = {name: part.training_step(batch[name], 0) for name, part in task.tasks.items()}
        alone = {name: torch.autograd.grad(loss, shared) for name, loss in losses.items()}
        task.training_step(batch, 0).backward()
    factor = {name: torch.as_tensor(weight).item() for name, weight in task.weights().items()}
    for number, parameter in enumerate(shared):
        wanted = sum(factor[name] * alone[name][number] for name in alone)
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-10, atol=1e-12)
    for name, s in task.log_variances.items():  # d/ds (exp(-s) L + s)
        torch.testing.assert_close(
            s.grad.squeeze(), 1 - factor[name] * losses[name].detach().double(), rtol=1e-6, atol=0
        )


def test_a_preset_of_either_kind_serves_both():
    task = make_task()
    assert (task.image.backbone.config.causal, task.text.backbone.config.causal) == (False, True)
    vision = LitMultiTask(
        "tokenformer_vit_tiny_patch16_224", 10, 8, vocab_size=30, context_length=8, overrides={"patch_size": 4}
    )
    assert vision.image.backbone.config.positions == "learned" and vision.text.backbone.config.positions == "rotary"
    assert vision(torch.zeros(1, 8, dtype=torch.long), "text").shape == (1, 8, 30)


def test_step_flops_are_the_sum_of_both():
    task = make_task()
    image = LitImageClassifier("tokenformer_lm_tiny", 10, 8, overrides=dict(task.image.hparams.overrides))
    text = LitCausalLM("tokenformer_lm_tiny", 257, 16, overrides=SIZES)
    assert task.costs() == {"image": image.cost(), "text": text.cost()}
    assert task.cost().training_flops == image.cost().training_flops + text.cost().training_flops


# -- each task as if it were alone


def test_scores_are_those_of_each_task_alone(tmp_path):
    def data_with_test(name=None):
        """Data whose validation split stands for a test split, which they have not."""
        made = make_data(tmp_path)
        for part in made.parts.values():
            part.test_dataloader = part.val_dataloader
        return made if name is None else getattr(made, name)

    task, data = make_task(loss_weights={"text": 0.25}), data_with_test()
    trainer = make_trainer()
    for run, stage in ((trainer.validate, "val"), (trainer.test, "test")):
        scores = {name: score for part in run(task, data, verbose=False) for name, score in part.items()}
        task.trainer.save_checkpoint(tmp_path / f"{stage}.ckpt")
        split_checkpoint(str(tmp_path / f"{stage}.ckpt"), str(tmp_path / stage))
        for name, kind in (("image", LitImageClassifier), ("text", LitCausalLM)):
            alone = kind.load_from_checkpoint(tmp_path / stage / f"{name}.ckpt", weights_only=True)
            (wanted,) = getattr(make_trainer(), run.__name__)(alone, data_with_test(name), verbose=False)
            for score, value in wanted.items():
                if not score.startswith("size/"):
                    assert scores[score.replace("/", f"/{name}/", 1)] == value, score
        total = scores[f"{stage}/image/loss"] + 0.25 * scores[f"{stage}/text/loss"]
        assert scores[f"{stage}/loss"] == pytest.approx(total, rel=1e-6)
        assert f"{stage}/image/acc1" in scores and f"{stage}/text/bits_per_byte" in scores


@pytest.mark.parametrize(
    ("epoch", "image_batch", "batches"), [("image", 16, 8), ("text", 16, 5), ("longest", 16, 8), ("longest", 40, 5)]
)
def test_each_task_gets_the_batches_of_its_own_data(tmp_path, epoch, image_batch, batches):
    seen = {"image": [], "text": []}

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen["image"].append((trainer.current_epoch, batch["image"][0].sum().item()))
            seen["text"].append((trainer.current_epoch, batch["text"].sum().item()))

    data = make_data(tmp_path, epoch, image_batch=image_batch)
    make_trainer(Watch(), max_epochs=2, limit_val_batches=0).fit(make_task(), data)
    assert len(seen["image"]) == len(seen["text"]) == 2 * batches
    for name, total in (("image", lambda batch: batch[0].sum().item()), ("text", lambda batch: batch.sum().item())):
        loader = getattr(make_data(tmp_path, epoch, image_batch=image_batch), name).train_dataloader()
        for number in range(2):
            loader.sampler.set_epoch(number)
            wanted = [total(batch) for _ in range(2) for batch in loader][:batches]  # a second pass has another order
            assert [value for at, value in seen[name] if at == number] == wanted


def test_learned_weights_are_logged_and_move(tmp_path):
    task = make_task(loss_weights="uncertainty")
    trainer = make_trainer(max_epochs=1, limit_val_batches=1)
    trainer.fit(task, make_data(tmp_path))
    logged = trainer.logged_metrics
    assert logged["train/text/weight"] < 1  # its loss is far above 1
    assert logged["train/text/weight"] != logged["train/image/weight"]


def test_monitor_counts_both_tasks(tmp_path):
    monitor, task = TrainingMonitor(), make_task()
    make_trainer(monitor, max_epochs=1, limit_val_batches=0, limit_train_batches=3).fit(task, make_data(tmp_path))
    costs = task.costs()
    assert monitor.training_flops == 3 * (16 * costs["image"].training_flops + 4 * costs["text"].training_flops)
    assert monitor.data_tokens == 3 * (16 * 5 + 4 * 16)


# -- growth, checkpoints, resume


def test_growth_in_the_middle_keeps_both_outputs(tmp_path):
    growth = ParameterGrowthCallback({1: 16, 2: 32})
    task = make_task()
    trainer = make_trainer(growth, max_epochs=3, limit_train_batches=2, precision="64-true")
    trainer.fit(task, make_data(tmp_path))
    assert [event["after"]["qkv"] for event in growth.events] == [16, 32]
    assert all(event["output_difference"] < 1e-12 for event in growth.events)
    assert task.image.backbone.blocks is task.text.backbone.blocks
    assert param_tokens(task)["qkv"] == 32


def test_growth_difference_is_that_of_the_task_it_harms_most(tmp_path):
    growth = ParameterGrowthCallback({1: 32}, method="random")
    task = make_task()
    make_trainer(growth, max_epochs=2, limit_train_batches=1, limit_val_batches=0).fit(task, make_data(tmp_path))
    assert growth.events[0]["output_difference"] > 1e-3


def fit(folder, data, ckpt_path=None, growth=None, **settings):
    """3 epochs of 8 batches with growth, a moving average, mixup and a shorter loader that begins anew."""
    seed_everything(7 if ckpt_path is None else 99)  # what is not in the checkpoint must not matter
    task = make_task(overrides={**SIZES, "drop_path": 0.2}, loss_weights="uncertainty", **settings)
    callbacks = [growth or ParameterGrowthCallback({1: 16, 2: 24}, method="zero_keys"), GrowingEMA(decay=0.9)]
    callbacks += [every_step(folder)] if ckpt_path is None else []
    trainer = make_trainer(*callbacks, TrainingMonitor(), max_epochs=3, limit_val_batches=1)
    trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    return task


@pytest.mark.slow
@pytest.mark.parametrize("epoch", ["image", "text"])
def test_resume_from_any_step_is_bit_equal(tmp_path, epoch):
    whole = fit(tmp_path / "whole", make_data(tmp_path / "data", epoch, mixup=0.4))
    for step in (5, 8) if epoch == "image" else (5,):  # 5: a pass through the text ends; 8: one of images
        data = make_data(tmp_path / "data", epoch, mixup=0.4)
        resumed = fit(tmp_path / f"from{step}", data, tmp_path / "whole" / f"step{step}.ckpt")
        assert_equal_weights(resumed, whole)


def test_resume_where_the_shorter_loader_has_begun_anew_is_bit_equal(tmp_path):
    growth = {"growth": ParameterGrowthCallback({0: 16})}
    whole = fit(tmp_path / "whole", make_data(tmp_path / "data"), **growth)
    resumed = fit(tmp_path / "again", make_data(tmp_path / "data"), tmp_path / "whole" / "step14.ckpt", **growth)
    assert_equal_weights(resumed, whole)


def fitted(folder, *callbacks, **settings):
    """A checkpoint of a fit that grew."""
    task = make_task(**settings)
    growth = ParameterGrowthCallback({1: 16})
    trainer = make_trainer(growth, *callbacks, max_epochs=2, limit_train_batches=3, limit_val_batches=1)
    trainer.fit(task, make_data(folder))
    trainer.save_checkpoint(folder / "grown.ckpt")
    return task, folder / "grown.ckpt"


def test_a_checkpoint_of_another_size_loads(tmp_path):
    task, path = fitted(tmp_path)
    loaded = LitMultiTask.load_from_checkpoint(path, weights_only=True)
    assert_equal_weights(loaded, task)
    assert loaded.image.backbone.blocks is loaded.text.backbone.blocks
    fresh = make_task()
    make_trainer().validate(fresh, make_data(tmp_path), ckpt_path=path, verbose=False, weights_only=True)
    assert_equal_weights(fresh, task)
    grown = grow_checkpoint(str(path), 32)
    assert param_tokens(rebuild_task(grown, read_checkpoint(grown)))["qkv"] == 32
    names = len(read_checkpoint(path)["optimizer_states"][0]["state"])
    assert names == len(list(task.parameters()))


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    _, path = fitted(tmp_path)
    with pytest.raises(ValueError, match=r"another architecture: image\.dim 32 \(this model: 64\)"):
        other = make_task(overrides={**SIZES, "dim": 64})
        make_trainer().validate(other, make_data(tmp_path), ckpt_path=path, weights_only=True)
    with pytest.raises(ValueError, match=r"another architecture: .*log_variances.* is missing"):
        other = make_task(loss_weights="uncertainty")
        make_trainer().validate(other, make_data(tmp_path), ckpt_path=path, weights_only=True)


@pytest.mark.parametrize("average", [False, True])
def test_split_gives_identical_outputs(tmp_path, average):
    task, path = fitted(tmp_path, *([GrowingEMA(decay=0.9)] if average else []))
    task = LitMultiTask.load_from_checkpoint(path, weights_only=True).eval()  # of an average, the average
    folder = split_checkpoint(str(path), str(tmp_path / "parts"))
    assert sorted(file.name for file in folder.iterdir()) == ["image.ckpt", "text.ckpt", "tokenizer.json"]
    image = LitImageClassifier.load_from_checkpoint(folder / "image.ckpt", weights_only=True).eval()
    text = LitCausalLM.load_from_checkpoint(folder / "text.ckpt", weights_only=True).eval()
    batch = make_batch()
    assert torch.equal(image(batch["image"][0]), task(batch["image"][0]))
    assert torch.equal(text(batch["text"][:, :-1]), task(batch["text"][:, :-1], "text"))
    assert param_tokens(image) == param_tokens(text) == param_tokens(task)
    assert TextGenerator.load(folder / "text.ckpt", "cpu").generate("import", max_new_tokens=3).startswith("import")
    grow(text, 32)
    with pytest.raises(ValueError, match="output: .* exists already"):
        split_checkpoint(str(path), str(folder))
    with pytest.raises(ValueError, match="text.ckpt is of a LitCausalLM, not of several tasks"):
        split_checkpoint(str(folder / "text.ckpt"), str(tmp_path / "more"))
    assert not (tmp_path / "more").exists() and not (tmp_path / "more.part").exists()
    with pytest.raises(ValueError, match=r"is of a LitMultiTask: .*take them apart with `lit-tokenformer split`"):
        TextGenerator.load(path, "cpu")


# -- what a user may give


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": {"patch_size": 4, "dim": 64}}, "model.image.dim: 64 for images and 32 for text"),
        ({"text": {"depth": 3}}, "model.image.depth: 2 for images and 3 for text"),
        ({"image": {"patch_size": 4, "param_tokens": 16}}, "model.image.param_tokens: 16 for images and 8 for text"),
        ({"image": {"patch_sice": 4}}, "overrides: unknown value 'patch_sice', did you mean 'patch_size'"),
        ({"loss_weights": "uncertanty"}, "model.loss_weights: unknown value 'uncertanty', did you mean 'uncertainty'"),
        ({"loss_weights": {"audio": 1.0}}, "model.loss_weights: unknown value 'audio'. Known: image, text"),
        ({"loss_weights": {"text": -1.0}}, "model.loss_weights.text: expected a number of at least 0, got -1.0"),
        ({"loss_weights": {"text": float("nan")}}, "model.loss_weights.text: expected a number of at least 0, got nan"),
        ({"loss_weights": {"text": 0.0, "image": 0.0}}, "model.loss_weights: all are 0"),
    ],
)
def test_bad_settings_of_the_model_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task(**settings)


def test_bad_settings_of_the_data_are_named(tmp_path):
    data = make_data(tmp_path)
    with pytest.raises(ValueError, match="data.text: expected a data module"):
        MultiTaskDataModule(data.image)
    with pytest.raises(ValueError, match="data.epoch: unknown value 'both'"):
        MultiTaskDataModule(data.image, data.text, "both")
    with pytest.raises(ValueError, match=r"data.image: ImageDataModule has none; use MultiTaskDataModule"):
        make_trainer().validate(make_task(), data.image)
    with pytest.raises(ValueError, match="data: MultiTaskDataModule is for LitMultiTask, the model is a LitCausalLM"):
        make_trainer().validate(LitCausalLM("tokenformer_lm_tiny", 257, 16), data)
    with pytest.raises(ValueError, match="data.tokenizer: it has 257 tokens, the model's vocab_size is 100"):
        make_trainer().validate(make_task(vocab_size=100), data)
    with pytest.raises(ValueError, match="model.num_classes: the model was built for 7, the data have 10"):
        make_trainer().validate(make_task(num_classes=7), data)


def given(folder, **changes):
    """A config of a tiny model on digits and Python's documentation."""
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    growth = {"class_path": "callbacks.ParameterGrowthCallback", "init_args": {"schedule": {1: 16}}}
    config = {
        "trainer": {
            "max_epochs": 2,
            "limit_train_batches": 2,
            "limit_val_batches": 1,
            "limit_test_batches": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "default_root_dir": str(folder),
            "callbacks": [growth, {"class_path": "callbacks.TrainingMonitor"}, checkpoint],
        },
        "model": {
            "class_path": "LitMultiTask",
            "init_args": {"preset": "tokenformer_lm_tiny", "overrides": SIZES, "image": {"patch_size": 4}},
        },
        "data": {
            "class_path": "MultiTaskDataModule",
            "init_args": {
                "image": {"class_path": "ImageDataModule", "init_args": {"dataset": "digits", "batch_size": 32}},
                "text": {
                    "class_path": "TextDataModule",
                    "init_args": {"block_size": 32, "batch_size": 4},
                },
            },
        },
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        part = config
        for name in parents:
            part = part[name]
        part.pop(last) if value is None else part.update({last: value})
    file = folder / "given.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def run(*args):
    """Runs a command in this process; returns its exit status."""
    try:
        return main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__init_args__text": None}, "data.text: expected a data module"),
        ({"data__init_args__image": None}, "data.image: expected a data module"),
        ({"data__init_args__epoch": "txt"}, "data.epoch: unknown value 'txt', did you mean 'text'"),
        ({"model__init_args__loss_weights": "uncertanty"}, "did you mean 'uncertainty'"),
        ({"model__init_args__loss_weights": {"text": "much"}}, "loss_weights"),
        ({"model__init_args__image__dim": 64}, "model.image.dim: 64 for images and 32 for text"),
        ({"model__init_args__image__patch": 4}, "Group 'image' does not accept option 'patch'"),
    ],
)
def test_an_error_in_a_config_is_one_line(tmp_path, capsys, changes, message):
    assert run("plan", "--config", given(tmp_path, **changes)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line


@pytest.mark.slow
def test_the_command_line_fits_resumes_validates_and_splits(tmp_path, capsys):
    config = given(tmp_path)
    assert run("plan", "--config", config) == 0
    assert "4 optimizer steps of 32 image and 4 text samples" in capsys.readouterr().out
    assert run("fit", "--config", config) == 0
    assert run("fit", "--config", config, "--ckpt_path", "last", "--trainer.max_epochs", 3) == 0
    (path,) = tmp_path.glob("lightning_logs/version_1/checkpoints/last.ckpt")
    assert (path.parent / "tokenizer.json").is_file()
    assert run("validate", "--config", config, "--ckpt_path", path) == 0
    assert run("test", "--config", config, "--ckpt_path", path) == 2  # digits have no test split
    assert run("split", "--ckpt_path", path, "--output", tmp_path / "parts") == 0
    checkpoint = torch.load(tmp_path / "parts" / "image.ckpt", weights_only=True)
    assert checkpoint["task"] == "LitImageClassifier" and checkpoint["param_tokens"]["qkv"] == 16
    capsys.readouterr()
    assert run("generate", "--ckpt_path", tmp_path / "parts" / "text.ckpt", "--max_new_tokens", 2, "--prompt", "a") == 0
    assert capsys.readouterr().out.startswith("a")
    assert run("export", "--ckpt_path", path, "--output", tmp_path / "published") == 2
    assert "take them apart with `lit-tokenformer split`" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_two_processes_agree_after_growth(tmp_path):
    class Save(Callback):
        def on_train_end(self, trainer, pl_module):
            torch.save(pl_module.state_dict(), tmp_path / f"out-{trainer.global_rank}")

    seed_everything(0)
    trainer = make_trainer(
        *(ParameterGrowthCallback({1: 16}), Save()),
        devices=2,
        strategy="ddp_notebook",
        max_epochs=2,
        limit_val_batches=2,
    )
    trainer.fit(make_task(loss_weights="uncertainty"), make_data(tmp_path, text_batch=2))
    first, second = (torch.load(tmp_path / f"out-{rank}", weights_only=True) for rank in range(2))
    assert first["image.backbone.blocks.0.attn.query.key_tokens"].shape == (16, 32)
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name

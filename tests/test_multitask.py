"""Tasks on one backbone: each is as if it were alone, in what it logs, and in what is left when they are split."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from callbacks import GrowingEMA, ParameterGrowthCallback, TrainingMonitor
from lit_tokenformer.cli.commands import grow_checkpoint, read_checkpoint, split_checkpoint
from lit_tokenformer.cli.main import main
from lit_tokenformer.data import (
    Augmentation,
    ImageDataModule,
    MaskedTextDataModule,
    MultiTaskDataModule,
    TextDataModule,
)
from lit_tokenformer.growth import grow
from lit_tokenformer.inference.text import TextGenerator
from lit_tokenformer.models import param_tokens
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier, LitMaskedLM, LitMultiTask, LRSchedule
from lit_tokenformer.tasks.initialization import initialize_from
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


class Smoothed(LitImageClassifier):
    """A user's task: label smoothing, and arguments that it passes on."""

    def __init__(self, smoothing: float = 0.1, **kwargs):
        super().__init__(**kwargs)
        self.smoothing = smoothing

    def training_loss(self, batch):
        image, label = batch
        loss = F.cross_entropy(self(image), label, label_smoothing=self.smoothing)
        self.log("train/loss", loss)
        return loss, len(image)


def make_three(**settings):
    """Digits, three shades and prose."""
    pictures = {"image_size": 8, "overrides": {"patch_size": 4}}
    tasks = {
        "digits": partial(LitImageClassifier, num_classes=10, **pictures),
        "shades": partial(Smoothed, smoothing=0.2, num_classes=3, **pictures),
        "prose": partial(LitCausalLM, vocab_size=257, context_length=16, separator_id=256),
    }
    given = {"overrides": SIZES, "schedule": LRSchedule("constant"), "tasks": tasks}
    return LitMultiTask("tokenformer_lm_tiny", **{**given, **settings})


def write_shades(folder, classes=3):
    """24, 6 and 6 images, told apart by their brightness."""
    for number in range(36):
        place = folder / ("train", "val", "test")[number // 24 + number // 30] / f"shade{number % classes}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 80 * (number % classes) + number, np.uint8)).save(place / f"{number}.png")
    return folder


def make_data_of_three(folder):
    """8 batches of digits, 6 of shades, 5 of prose."""
    pair = make_data(folder)
    root = folder / "shades" if (folder / "shades").exists() else write_shades(folder / "shades")
    shades = ImageDataModule("imagefolder", root=str(root), image_size=8, batch_size=4, seed=3)
    return MultiTaskDataModule(tasks={"digits": pair.image, "shades": shades, "prose": pair.text})


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


# -- any number of tasks


def test_image_and_text_are_two_tasks_like_any_others(tmp_path):
    tasks = {
        "image": partial(LitImageClassifier, num_classes=10, image_size=8, overrides={"patch_size": 4}),
        "text": partial(LitCausalLM, vocab_size=257, context_length=16, separator_id=256, z_loss=0.01),
    }
    ends = []
    for settings in ({"z_loss": 0.01}, {"image": {}, "tasks": tasks}):
        seed_everything(0)
        task = make_task(**settings, loss_weights={"text": 0.5})
        growth, data = ParameterGrowthCallback({1: 16}), make_data(tmp_path)
        data = data if "tasks" not in settings else MultiTaskDataModule(tasks=data.parts)
        make_trainer(growth, max_epochs=2, limit_train_batches=3).fit(task, data)
        ends.append(task)
    assert_equal_weights(*ends)
    assert ends[0].text.hparams == {"cross_documents": True, **ends[1].text.hparams}


@pytest.mark.parametrize("weights", [{"shades": 0.5, "prose": 3.0}, "uncertainty"])
def test_loss_of_three_tasks_is_the_weighted_sum(tmp_path, weights):
    task, data = make_three(loss_weights=weights), make_data_of_three(tmp_path)
    blocks = {id(part.backbone.blocks) for part in task.tasks.values()}
    assert len(blocks) == 1 and task.digits.backbone.stem is not task.shades.backbone.stem
    losses = {}
    task.log = lambda name, value, **_: losses.update({name: value})
    ((batch, _, _),) = [next(iter(data.train_dataloader()))]
    total = task.training_step(batch, 0)
    factors = {name: float(weight) for name, weight in task.weights().items()}
    torch.testing.assert_close(total, sum(factors[name] * losses[f"train/{name}/loss"] for name in task.tasks))
    image, label = batch["shades"]
    torch.testing.assert_close(
        losses["train/shades/loss"], F.cross_entropy(task(image, "shades"), label, label_smoothing=0.2)
    )


def test_three_tasks_resume_bit_equal_through_growth_of_tokens_and_depth(tmp_path):
    def fit(ckpt_path=None):
        seed_everything(7 if ckpt_path is None else 99)
        callbacks = [ParameterGrowthCallback({1: {"qkv": 16, "depth": 3}}), *([every_step(tmp_path)] * (not ckpt_path))]
        trainer, task = make_trainer(*callbacks, max_epochs=2, limit_train_batches=7), make_three()
        trainer.fit(task, make_data_of_three(tmp_path / "data"), ckpt_path=ckpt_path, weights_only=True)
        logged = {name for name in trainer.callback_metrics if not name.startswith("size/")}
        assert logged == task.logged_metrics() > {"val/digits/acc1", "val/shades/loss", "val/prose/bits_per_byte"}
        return task

    whole = fit()
    assert len(whole.prose.backbone.blocks) == 3 and param_tokens(whole)["qkv"] == 16
    for step in (6, 11):  # the first passes through shades and prose are over
        assert_equal_weights(fit(tmp_path / f"step{step}.ckpt"), whole)
    loaded = LitMultiTask.load_from_checkpoint(tmp_path / "step14.ckpt", weights_only=True)  # Smoothed is imported
    assert_equal_weights(loaded, whole)
    assert loaded.shades.smoothing == 0.2 and isinstance(loaded.shades, Smoothed)


def test_two_corpora_keep_their_own_tokenizers(tmp_path):
    def data_of_two(tokenizer="bpe:280"):
        text = make_data(tmp_path).text
        files = {"files": [str(tmp_path / "train.txt")], "val_files": [str(tmp_path / "val.txt")]}
        words = MaskedTextDataModule("files", **files, tokenizer=tokenizer, block_size=16, batch_size=4)
        return MultiTaskDataModule(tasks={"words": words, "prose": text})  # not in the order of the model

    def task_of_two():
        return make_task(image={}, tasks={"prose": LitCausalLM, "words": LitMaskedLM}, sizes=data.sizes)

    data = data_of_two()
    task = task_of_two()
    assert (task.prose.backbone.config.vocab_size, task.words.backbone.config.causal) == (257, False)
    last = ModelCheckpoint(tmp_path, "last")
    make_trainer(last, max_epochs=1, limit_train_batches=2, limit_val_batches=1).fit(task, data)
    folder = split_checkpoint(str(tmp_path / "last.ckpt"), str(tmp_path / "parts"))
    files = ["prose.tokenizer.json", "words.tokenizer.json"]
    assert sorted(file.name for file in folder.iterdir()) == ["prose.ckpt", files[0], "words.ckpt", files[1]]
    for name in ("prose", "words"):
        own = json.loads(data.parts[name].tokenizer.to_json())
        for place in (tmp_path, folder):
            assert json.loads((place / f"{name}.tokenizer.json").read_text()) == own
    assert TextGenerator.load(folder / "prose.ckpt", "cpu").generate("import", max_new_tokens=3).startswith("import")
    initialize_from(task_of_two(), tmp_path / "last.ckpt", data)
    other = data_of_two("bytes")
    with pytest.raises(ValueError, match=r"data.tokenizer: .*words.tokenizer.json in the checkpoint's folder"):
        make_trainer().validate(task_of_two(), other, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"init_from: .* has another vocabulary"):
        initialize_from(task_of_two(), tmp_path / "last.ckpt", other)


def test_the_first_task_chooses_the_tokens_of_all():
    tasks = {"prose": partial(LitCausalLM, context_length=64), "lines": partial(LitCausalLM, context_length=8)}
    sizes = {name: size for name, size in SIZES.items() if name != "param_tokens"}
    task = make_task(image={}, tasks=tasks, overrides=sizes, match="flops", match_to="gpt2_tiny", layerwise_lr=True)
    alone = LitCausalLM("tokenformer_lm_tiny", 50304, 64, overrides=sizes, match="flops", match_to="gpt2_tiny")
    assert param_tokens(task) == param_tokens(alone) == param_tokens(task.lines)
    assert task.layerwise_lr


def test_a_checkpoint_of_before_there_were_names_is_split_too(tmp_path):
    _, path = fitted(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint |= checkpoint.pop("extras")["text"]
    checkpoint["hyper_parameters"].pop("layerwise_lr")
    torch.save(checkpoint, tmp_path / "old.ckpt")
    assert (split_checkpoint(str(tmp_path / "old.ckpt"), str(tmp_path / "parts")) / "tokenizer.json").is_file()


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
    with pytest.raises(
        ValueError, match="ckpt_path: expected a checkpoint of LitMultiTask, got LitCausalLM in .*text.ckpt"
    ):
        split_checkpoint(str(folder / "text.ckpt"), str(tmp_path / "more"))
    assert not (tmp_path / "more").exists() and not (tmp_path / "more.part").exists()
    with pytest.raises(ValueError, match=r"is of a LitMultiTask: .*split the checkpoint with `lit-tokenformer split`"):
        TextGenerator.load(path, "cpu")


# -- what a user may give

PAIR = {"image": partial(LitImageClassifier, image_size=8, overrides={"patch_size": 4}), "text": LitCausalLM}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": {"patch_size": 4, "dim": 64}}, "model.image.dim: 64 for image and 32 for text"),
        ({"text": {"depth": 3}}, "model.image.depth: 2 for image and 3 for text"),
        ({"image": {"patch_size": 4, "param_tokens": 16}}, "model.image.param_tokens: 16 for image and 8 for text"),
        ({"image": {"patch_sice": 4}}, "overrides: unknown value 'patch_sice', did you mean 'patch_size'"),
        ({"loss_weights": "uncertanty"}, "model.loss_weights: unknown value 'uncertanty', did you mean 'uncertainty'"),
        ({"loss_weights": {"audio": 1.0}}, "model.loss_weights: unknown value 'audio'. Known: image, text"),
        (
            {"loss_weights": {"txt": 1.0}, "image": {}, "tasks": PAIR},
            "model.loss_weights: unknown value 'txt', did you",
        ),
        ({"tasks": PAIR}, "model.image: conflicts with model.tasks"),
        ({"image": {}, "tasks": {}}, "model.tasks: expected at least one task"),
        ({"image": {}, "tasks": {"log": LitCausalLM}}, "model.tasks: invalid task name 'log': it is in use"),
        ({"image": {}, "tasks": {"a/b": LitCausalLM}}, "model.tasks: invalid task name 'a/b': expected letters"),
        ({"image": {}, "tasks": {"a": dict}}, "model.tasks.a: expected a task class .* got 'dict'"),
        ({"image": {}, "tasks": {"a": {"class_path": "os.system"}}}, "model.tasks.a: expected a task class"),
        (
            {"image": {}, "tasks": {"a": partial(LitCausalLM, z_los=1)}},
            "model.tasks.a: unknown value 'z_los', did you mean 'z_loss'",
        ),
        (
            {"image": {}, "tasks": {"a": partial(LitCausalLM, compile=True)}},
            "tasks.a.compile: shared by all tasks",
        ),
        ({"image": {}, "tasks": PAIR, "sizes": {"text": {}}}, "data.tasks: expected data for image, text, got text"),
        (
            {"image": {}, "tasks": {**PAIR, "c": partial(LitCausalLM, overrides={"dim": 64})}},
            "model.tasks.image.dim: 32 for image and 64 for c; .* set model.overrides.dim for all tasks",
        ),
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
    with pytest.raises(ValueError, match=r"data.text: conflicts with data.tasks"):
        MultiTaskDataModule(text=data.text, tasks=data.parts)
    with pytest.raises(ValueError, match=r"data.tasks.setup: invalid task name 'setup'"):
        MultiTaskDataModule(tasks={"setup": data.text})
    with pytest.raises(ValueError, match="data.tasks: expected data for image, text, got image, prose"):
        make_trainer().validate(make_task(), MultiTaskDataModule(tasks={"image": data.image, "prose": data.text}))
    with pytest.raises(ValueError, match="data.epoch: unknown value 'both'"):
        MultiTaskDataModule(data.image, data.text, "both")
    with pytest.raises(ValueError, match=r"data.image: not in ImageDataModule; use MultiTaskDataModule"):
        make_trainer().validate(make_task(), data.image)
    with pytest.raises(ValueError, match="data: MultiTaskDataModule needs LitMultiTask, got LitCausalLM"):
        make_trainer().validate(LitCausalLM("tokenformer_lm_tiny", 257, 16), data)
    with pytest.raises(ValueError, match="data.tokenizer: .*got 257, expected at most vocab_size 100"):
        make_trainer().validate(make_task(vocab_size=100), data)
    with pytest.raises(ValueError, match=r"model.num_classes: does not match the data \(got 7, expected 10\)"):
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
        (
            {"model__init_args__loss_weights": {"txt": 1.0}},
            "error: model.loss_weights: unknown value 'txt', did you mean 'text'? Known: image, text",
        ),
        ({"model__init_args__image__dim": 64}, "model.image.dim: 64 for image and 32 for text"),
        ({"model__init_args__image__patch": 4}, "Group 'image' does not accept option 'patch'"),
    ],
)
def test_an_error_in_a_config_is_one_line(tmp_path, capsys, changes, message):
    assert run("plan", "--config", given(tmp_path, **changes)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line


def named(config):
    """The same config with a mapping of tasks."""
    config = yaml.safe_load(config.read_text())
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    image = {"class_path": "LitImageClassifier", "init_args": {"overrides": model.pop("image")}}
    model["tasks"] = {"image": image, "text": {"class_path": "LitCausalLM"}}
    data["tasks"] = {name: data.pop(name) for name in ("image", "text")}
    return config


@pytest.mark.slow
def test_configs_of_both_forms_train_the_same_model(tmp_path):
    old, found = given(tmp_path), []
    new = tmp_path / "new.yaml"
    new.write_text(yaml.safe_dump(named(old), sort_keys=False))
    for config in (old, new):
        assert run("fit", "--config", config, "--trainer.default_root_dir", tmp_path / config.stem) == 0
        (path,) = (tmp_path / config.stem).glob("lightning_logs/version_0/checkpoints/last.ckpt")
        found.append(torch.load(path, weights_only=True))
    ours, theirs = (one["state_dict"] for one in found)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_the_command_line_trains_two_sets_of_images_and_a_text(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # of the tables of scores
    monkeypatch.setattr("rich._console", None)  # an earlier test may have made it, at another width
    config = yaml.safe_load(given(tmp_path).read_text())
    model, text = config["model"]["init_args"], config["data"]["init_args"]["text"]
    text["init_args"]["test_fraction"] = 0.1
    config["data"]["init_args"] = {"tasks": {"prose": text}}
    for classes in (3, 2):
        images = {
            "dataset": "imagefolder",
            "root": str(write_shades(tmp_path / str(classes), classes)),
            "batch_size": 8,
        }
        images = {"class_path": "ImageDataModule", "init_args": {**images, "image_size": 8}}
        config["data"]["init_args"]["tasks"][f"shades{classes}"] = images
    smoothed = {"class_path": "test_multitask.Smoothed", "init_args": {"smoothing": 0.2}}
    tasks = {"prose": "LitCausalLM", "shades3": "LitImageClassifier"}
    model["tasks"] = {**{name: {"class_path": kind} for name, kind in tasks.items()}, "shades2": smoothed}
    model |= {"overrides": {**SIZES, "patch_size": 4}, "loss_weights": {"shades2": 0.5}}
    del model["image"]
    file = tmp_path / "three.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    assert run("plan", "--config", file, "--model.tasks.shades3.overrides.patch_size", 2) == 0
    assert "4 optimizer steps of 4 prose and 8 shades3 and 8 shades2 samples" in capsys.readouterr().out
    assert run("fit", "--config", file) == 0
    assert run("fit", "--config", file, "--ckpt_path", "last", "--trainer.max_epochs", 3) == 0
    (path,) = tmp_path.glob("lightning_logs/version_1/checkpoints/last.ckpt")
    capsys.readouterr()
    for command, stage in (("validate", "val"), ("test", "test")):
        assert run(command, "--config", file, "--ckpt_path", path) == 0
        shown = capsys.readouterr().out
        for name in ("loss", "prose/bits_per_byte", "shades3/acc1", "shades2/acc1"):
            assert f"{stage}/{name}" in shown
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert [len(weights[f"shades{number}.backbone.head.fc.bias"]) for number in (3, 2)] == [3, 2]
    assert weights["shades2.backbone.blocks.0.attn.query.key_tokens"].shape == (16, 32)
    assert run("split", "--ckpt_path", path, "--output", tmp_path / "parts") == 2
    assert "names 'test_multitask.Smoothed', which was not imported" in capsys.readouterr().err


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
    assert "split the checkpoint with `lit-tokenformer split`" in capsys.readouterr().err


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

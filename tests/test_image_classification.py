"""The image classification task: loss, metrics, optimizer, schedule, and the classes that a checkpoint knows."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from lit_tokenformer.data import Augmentation, ImageDataModule
from lit_tokenformer.errors import UserError
from lit_tokenformer.tasks import LitImageClassifier, LRSchedule, LRSchedulerConfig

TINY = {"dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "param_tokens": 8}


def make_task(**settings):
    return LitImageClassifier(
        "tokenformer_vit_tiny_patch16_224", num_classes=10, image_size=8, overrides=TINY, **settings
    )


def loader(count=24, batch_size=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.randint(10, (count,), generator=generator)), batch_size=batch_size)


def fit(task, max_epochs=2, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=max_epochs, accelerator="cpu", enable_model_summary=False, **quiet, **settings)
    trainer.fit(task, loader(), loader())
    return trainer


def test_soft_targets_of_one_class_equal_hard_ones():
    task, (image, label) = make_task().eval(), next(iter(loader()))
    task.log = lambda *_, **__: None
    hard = task.training_step((image, label), 0)
    soft = task.training_step((image, F.one_hot(label, 10).float()), 0)
    torch.testing.assert_close(hard, soft)


def test_metrics_that_can_be_monitored_are_those_that_are_logged():
    task = make_task()
    trainer = fit(task, max_epochs=1)
    assert {name for name in trainer.callback_metrics if not name.startswith("size/")} == task.logged_metrics()


def test_metrics_are_shares_over_the_whole_validation_set():
    task = make_task()
    trainer = fit(task)
    task.eval()
    with torch.no_grad():
        logits = torch.cat([task(image) for image, _ in loader()])
    label = torch.cat([label for _, label in loader()])
    assert trainer.callback_metrics["val/acc1"].item() == pytest.approx(
        (logits.argmax(1) == label).float().mean().item()
    )
    top5 = (logits.topk(5).indices == label[:, None]).any(1).float().mean().item()
    assert trainer.callback_metrics["val/acc5"].item() == pytest.approx(top5)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(F.cross_entropy(logits, label).item(), rel=1e-5)


def test_decay_spares_vectors_class_token_and_positions():
    task = make_task()
    decayed, spared = task.parameter_groups()
    names = {parameter: name for name, parameter in task.named_parameters()}
    assert spared["weight_decay"] == 0.0 and "weight_decay" not in decayed
    assert {names[parameter].split(".")[-1] for parameter in spared["params"]} == {
        *("cls_token", "pos_embed", "weight", "bias")  # the final norm's weight and bias, biases of stem and head
    }
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert len(names) == len(decayed["params"]) + len(spared["params"])


class Rates(torch.optim.SGD):
    """Remembers its learning rate at every step."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.rates = []

    @torch.no_grad()
    def step(self, closure=None):
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


def rates(schedule, **settings):
    trainer = fit(make_task(optimizer=lambda params: Rates(params, lr=1.0), schedule=schedule), **settings)
    return trainer.optimizers[0].rates  # 6 steps an epoch


def test_cosine_with_warmup_in_epochs():
    expected = [step / 6 for step in range(6)] + [0.1 + 0.9 * (1 + math.cos(math.pi * s / 12)) / 2 for s in range(12)]
    assert rates(LRSchedule("cosine", warmup=1, min_factor=0.1), max_epochs=3) == pytest.approx(expected)


def test_constant_with_warmup_in_steps():
    expected = [0.5, 0.75, *[1.0] * 10]
    assert rates(LRSchedule("constant", warmup=2, warmup_start=0.5, unit="step")) == pytest.approx(expected)


def test_warmup_stable_decay():
    expected = [0.0, 0.5, *[1.0] * 7, 0.75, 0.5, 0.25]
    assert rates(LRSchedule("wsd", warmup=2, decay=4, unit="step")) == pytest.approx(expected)


def test_restarts_begin_anew_with_a_warmup_that_is_a_share_of_their_steps():
    found = rates(LRSchedule("cosine", warmup=0.25, min_factor=0.5, unit="share", restarts=(8,)))
    first = [0.0, 0.5, *[0.75 + 0.25 * math.cos(math.pi * step / 6) for step in range(6)]]
    assert found == pytest.approx([*first, 0.0, *[0.75 + 0.25 * math.cos(math.pi * step / 3) for step in range(3)]])


def test_schedule_counts_optimizer_steps_under_accumulation():
    assert len(rates(LRSchedule("constant"), accumulate_grad_batches=4)) == 4
    expected = [0.0, 0.5, 1.0, 0.5]
    found = rates(LRSchedule("cosine", warmup=1), accumulate_grad_batches=4)
    assert found == pytest.approx(expected)


def test_a_torch_scheduler_takes_the_place_of_the_schedule():
    def halve(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    trainer = fit(make_task(optimizer=lambda params: Rates(params, lr=1.0), lr_scheduler=halve))
    assert trainer.optimizers[0].rates == pytest.approx([1.0] * 6 + [0.5] * 6)


def stepped_rates(scheduler, config=None, **settings):
    task = make_task(
        optimizer=lambda params: Rates(params, lr=1.0),
        lr_scheduler=scheduler,
        lr_scheduler_config=config or LRSchedulerConfig(),
    )
    return fit(task, **settings).optimizers[0].rates


def halve(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def test_a_torch_scheduler_steps_with_the_optimizer_where_steps_limit_the_fit():
    assert stepped_rates(halve, max_epochs=-1, max_steps=3) == pytest.approx([1.0, 0.5, 0.25])
    assert stepped_rates(halve, max_epochs=5, max_steps=3) == pytest.approx([1.0, 0.5, 0.25])  # within an epoch
    assert stepped_rates(halve, max_epochs=5, max_steps=8) == pytest.approx([1.0] * 6 + [0.5] * 2)


def test_a_scheduler_that_is_made_for_steps_steps_with_the_optimizer():
    found = stepped_rates(lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=12))
    assert len(set(found)) == 12 and max(found) == pytest.approx(1.0, abs=0.01) and found[-1] < 1e-4


def test_interval_and_frequency_of_a_torch_scheduler_can_be_set():
    found = stepped_rates(halve, LRSchedulerConfig("step", frequency=3))
    assert found == pytest.approx([1.0] * 3 + [0.5] * 3 + [0.25] * 3 + [0.125] * 3)
    assert stepped_rates(halve, LRSchedulerConfig("epoch"), max_epochs=-1, max_steps=7) == pytest.approx(
        [1.0] * 6 + [0.5]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": "batch"}, "model.lr_scheduler_config.interval: unknown value 'batch'"),
        ({"interval": "step", "frequency": 0}, "model.lr_scheduler_config.frequency: expected at least 1, got 0"),
        ({"frequency": 2}, "model.lr_scheduler_config.frequency: needs interval"),
    ],
)
def test_bad_intervals_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LRSchedulerConfig(**settings)


def reduce(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=0, threshold=1e9, threshold_mode="abs"
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_epochs": 6, "check_val_every_n_epoch": 2}, [1.0] * 24 + [0.5] * 12),
        ({"max_epochs": 3}, [1.0] * 12 + [0.5] * 6),
        ({"max_epochs": 2, "val_check_interval": 3}, [1.0] * 6 + [0.5] * 3 + [0.25] * 3),
        (
            {"max_epochs": -1, "max_steps": 10, "val_check_interval": 4, "check_val_every_n_epoch": None},
            [1.0] * 8 + [0.5] * 2,
        ),
    ],
)
def test_a_scheduler_on_a_plateau_steps_after_each_validation(settings, expected):
    assert stepped_rates(reduce, LRSchedulerConfig(monitor="val/loss"), **settings) == pytest.approx(expected)


def test_a_scheduler_on_a_plateau_of_the_training_loss_steps_after_each_epoch():
    config = LRSchedulerConfig(monitor="train/loss")
    assert stepped_rates(reduce, config, max_epochs=3, check_val_every_n_epoch=2) == pytest.approx(
        [1.0] * 12 + [0.5] * 6
    )


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        (None, "lr_scheduler_config.monitor: ReduceLROnPlateau needs a metric"),
        ("val/los", "no metric 'val/los' .logged: .*val/loss"),
    ],
)
def test_a_scheduler_on_a_plateau_needs_a_metric(monitor, message):
    with pytest.raises(ValueError, match=message):
        stepped_rates(reduce, LRSchedulerConfig(monitor=monitor))


class ScaledData(LightningDataModule):
    batch_size = 2

    def train_dataloader(self):
        return loader(batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(batch_size=self.batch_size)


def fit_with(callback, task, folder, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu",
        enable_model_summary=False,
        callbacks=[callback],
        default_root_dir=folder,
        **quiet,
        **settings,
    )
    trainer.fit(task, datamodule=ScaledData())
    return trainer


def test_the_schedule_ends_with_the_fit_after_a_search_for_the_batch_size(tmp_path):
    task = make_task(optimizer=lambda params: Rates(params, lr=1.0), schedule=LRSchedule("cosine", warmup=1))
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=1)
    fit_with(finder, task, tmp_path, max_epochs=3, limit_val_batches=0)
    assert finder.optimal_batch_size == 4
    expected = [step / 6 for step in range(6)] + [(1 + math.cos(math.pi * step / 12)) / 2 for step in range(12)]
    assert task.trainer.optimizers[0].rates[-18:] == pytest.approx(expected)


def test_the_rate_that_a_search_finds_is_the_schedules_highest(tmp_path):
    task = make_task(
        optimizer=lambda params: Rates(params, lr=123.0), schedule=LRSchedule("constant", warmup=2, unit="step")
    )
    finder = LearningRateFinder(min_lr=1e-5, max_lr=1e-2, num_training_steps=20)
    trainer = fit_with(finder, task, tmp_path, max_epochs=2, limit_val_batches=0)
    found = finder.optimal_lr.suggestion()
    assert 1e-5 <= found <= 1e-2
    assert trainer.optimizers[0].rates[-24:] == pytest.approx([0, found / 2] + [found] * 22)


def test_a_learning_rate_of_the_task_replaces_the_optimizers():
    task = make_task(optimizer=lambda params: Rates(params, lr=1.0), schedule=LRSchedule("constant"))
    task.learning_rate = 0.25
    assert fit(task).optimizers[0].rates == pytest.approx([0.25] * 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cosin"}, "schedule.name: unknown value 'cosin', did you mean 'cosine'"),
        ({"unit": "epochs"}, "schedule.unit: unknown value 'epochs', did you mean 'epoch'"),
        ({"warmup": -1}, "schedule.warmup: expected at least 0, got -1"),
        ({"restarts": (5, 5)}, "schedule.restarts: expected increasing steps above 0, got .5, 5."),
        ({"restarts": (0,)}, "schedule.restarts: expected increasing steps above 0"),
        ({"min_factor": 2}, r"schedule.min_factor: expected a factor in \[0, 1\], got 2"),
    ],
)
def test_bad_schedules_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LRSchedule(**settings)


def test_a_schedule_without_an_end_is_refused():
    with pytest.raises(ValueError, match="schedule.name: 'cosine' needs a limit"):
        fit(make_task(), max_epochs=-1)


def test_data_of_another_number_of_classes_are_refused():
    task = LitImageClassifier("tokenformer_vit_tiny_patch16_224", num_classes=7, image_size=8, overrides=TINY)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"model.num_classes: does not match the data \(got 7, expected 10\)"):
        trainer.fit(task, ImageDataModule("digits"))


def test_hyperparameters_are_plain_and_come_back(tmp_path):
    schedule = LRSchedule("wsd", warmup=1, decay=2)
    task = make_task(optimizer=lambda params: Rates(params, lr=1.0), schedule=schedule, grad_checkpointing=True)
    trainer = fit(task)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    hparams = torch.load(tmp_path / "one.ckpt", weights_only=True)["hyper_parameters"]
    assert "optimizer" not in hparams and hparams["overrides"] == TINY and hparams["schedule"]["name"] == "wsd"
    loaded = LitImageClassifier.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert loaded.schedule == schedule and loaded.backbone.grad_checkpointing


def test_activation_checkpointing_gives_the_same_gradients():
    plain, saving = make_task(), make_task(grad_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    for task in (plain, saving):
        task.log = lambda *_, **__: None
        task.training_step(next(iter(loader())), 0).backward()
    for ours, theirs in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


# --- Classes and transform in the checkpoint -------------------------------------------------------------------------

SHADES = {"black": 0, "gray": 128, "white": 255}
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
LOOK = {"image_size": (8, 16), "in_chans": 1, "batch_size": 6, "num_workers": 0}
LOOK |= {"augmentation": Augmentation(crop="center", hflip=0.0)}


def draw(root, names):
    """Six pictures of each shade, in classes with other names."""
    for split in ("train", "val"):
        for shade, name in zip(SHADES.values(), names, strict=True):
            (root / split / name).mkdir(parents=True)
            for number in range(6):
                pixels = np.full((12, 20 + number), shade, dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    """A checkpoint that tells three shades of gray apart, and the pictures."""
    folder = tmp_path_factory.mktemp("shades")
    data = ImageDataModule("imagefolder", str(draw(folder / "data", SHADES)), **LOOK)
    torch.manual_seed(0)
    settings = {"optimizer": lambda params: torch.optim.AdamW(params, lr=3e-3), "schedule": LRSchedule("constant")}
    task = LitImageClassifier("vit_tiny_patch16_224", 3, (8, 16), overrides=TINY, in_chans=1, **settings)
    trainer = Trainer(max_epochs=8, enable_checkpointing=False, **QUIET)
    trainer.fit(task, data)
    assert trainer.callback_metrics["val/acc1"] == 1
    trainer.save_checkpoint(folder / "shades.ckpt")
    return folder / "shades.ckpt"


def evaluate(checkpoint, root, **settings):
    data = ImageDataModule("imagefolder", str(root), **{**LOOK, **settings})
    task = LitImageClassifier("vit_tiny_patch16_224", 3, (8, 16), overrides=TINY, in_chans=1)
    return Trainer(**QUIET).validate(task, data, ckpt_path=str(checkpoint), weights_only=True, verbose=False)[0]


def test_a_checkpoint_has_its_classes_and_transform(shades):
    found = torch.load(shades, weights_only=True)["image_data"]
    assert found == {
        **{"class_names": ["black", "gray", "white"], "image_size": [8, 16], "in_chans": 1, "crop_pct": 1.0},
        **{"mean": [pytest.approx(0.449)], "std": [pytest.approx(0.226)], "interpolation": "bicubic"},
    }


def test_reordered_classes_are_mapped_by_name(shades, tmp_path, caplog):
    caplog.set_level("INFO")
    assert evaluate(shades, shades.parent / "data")["val/acc1"] == 1 and "by name" not in caplog.text
    data = ImageDataModule("imagefolder", str(shades.parent / "data"), **LOOK)
    data.splits.class_names.reverse()
    for samples in (data.splits.train, data.splits.val):
        samples.labels = 2 - samples.labels
    task = LitImageClassifier.load_from_checkpoint(shades, weights_only=True)
    found = Trainer(**QUIET).validate(task, data, ckpt_path=str(shades), weights_only=True, verbose=False)
    assert found[0]["val/acc1"] == 1 and "mapped to the classes of the checkpoint by name" in caplog.text
    with pytest.raises(
        UserError, match=r"^data: the classes are in another order .*got white, gray, black; expected b"
    ):
        Trainer(max_epochs=9, enable_checkpointing=False, **QUIET).fit(task, data, ckpt_path=str(shades))


def test_renamed_classes_are_refused(shades, tmp_path):
    root = draw(tmp_path / "data", ["black", "silver", "white"])
    with pytest.raises(UserError, match=r"^data: the classes are not .* 2 are in one of them only: gray, silver$"):
        evaluate(shades, root)


def test_another_transform_warns(shades):
    with pytest.warns(UserWarning, match=r"transformed differently than in training: crop_pct 1.0 -> 0.5"):
        evaluate(shades, shades.parent / "data", augmentation=Augmentation(crop_pct=0.5))


def test_images_are_predicted_without_data(shades):
    task = LitImageClassifier.load_from_checkpoint(shades, weights_only=True)
    folder = shades.parent / "data" / "val"
    found = task.predict_images(folder, batch_size=4)
    assert [(image.split("/")[-2], next(iter(probabilities))) for image, probabilities in found] == [
        (name, name) for name in SHADES for _ in range(6)
    ]
    assert (
        all(sum(one.probabilities.values()) == pytest.approx(1) for one in found) and len(found[0].probabilities) == 3
    )
    alone = task.predict_images([folder / "gray" / "3.png"], top=1)
    assert alone == [(str(folder / "gray" / "3.png"), {"gray": pytest.approx(found[9].probabilities["gray"])})]
    with pytest.raises(UserError, match="^images: no such folder or file: /no"):
        task.predict_images("/no")


def test_predictions_agree_with_those_of_the_data_module(shades):
    data = ImageDataModule("imagefolder", str(shades.parent / "data"), **LOOK)
    task = LitImageClassifier.load_from_checkpoint(shades, weights_only=True)
    expected = torch.cat(Trainer(**QUIET).predict(task, data))
    found = task.predict_images(shades.parent / "data" / "val")
    shares = torch.tensor([[one.probabilities[name] for name in SHADES] for one in found])
    torch.testing.assert_close(shares, expected)


def test_an_earlier_checkpoint_says_what_predicting_needs(tmp_path):
    task = make_task()
    fit(task, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    loaded = LitImageClassifier.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    with pytest.raises(UserError, match=r"^ckpt_path: the checkpoint has no class names .* --data.predict_root$"):
        loaded.predict_images(tmp_path)

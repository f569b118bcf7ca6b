"""A run that is stopped anywhere and resumed ends with the weights of one that was not, bit for bit."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from callbacks import GrowingEMA, ParameterGrowthCallback
from lit_tokenformer.data import Augmentation, ImageDataModule
from lit_tokenformer.errors import UserError
from lit_tokenformer.growth.optimizer import check_optimizer_state
from lit_tokenformer.models import param_tokens
from lit_tokenformer.tasks import LitImageClassifier, LRSchedule

pytestmark = pytest.mark.usefixtures("few_digits")  # 8 batches of 16

TINY = {"dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "param_tokens": 8, "drop_path": 0.2}


def make_task(**overrides):
    return LitImageClassifier(
        "tokenformer_vit_tiny_patch16_224",
        num_classes=10,
        image_size=8,
        overrides={**TINY, **overrides},
        schedule=LRSchedule("cosine", warmup=1, min_factor=0.1),
    )


def make_data(num_workers=0, **augmentation):
    settings = {"num_workers": num_workers, "augmentation": Augmentation(**augmentation)}
    return ImageDataModule("digits", batch_size=16, seed=3, **settings)


def run(folder, growth, ckpt_path=None, ema=False, data=None, max_epochs=4, **trainer):
    """Fits for 4 epochs of 8 batches; from the start, keeps a checkpoint of every optimizer step and epoch's end."""
    seed_everything(7 if ckpt_path is None else 99)  # what is not in the checkpoint must not matter
    task = make_task()
    callbacks = [ParameterGrowthCallback(**growth)]
    if ckpt_path is None:
        callbacks += [
            ModelCheckpoint(folder, "step{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False),
            ModelCheckpoint(folder, "end{epoch}", save_top_k=-1, auto_insert_metric_name=False),
        ]
    if ema:
        callbacks.append(GrowingEMA(decay=0.9))
    fit = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=ckpt_path is None,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        limit_val_batches=1,
        **trainer,
    )
    fit.fit(task, data or make_data(shift=0.125), ckpt_path=ckpt_path, weights_only=True)
    return fit, task


@pytest.fixture(scope="module")
def fitted(few_digits, tmp_path_factory):
    """The checkpoints of a run that grew twice."""
    folder = tmp_path_factory.mktemp("fitted")
    run(folder, BY_EPOCH)
    return folder


def assert_equal_weights(task, other):
    ours, theirs = task.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


BY_EPOCH = {"schedule": {1: 16, 3: {"ffn": 80}}}
BY_STEP = {"schedule": {3: 16, 7: 32}, "unit": "step"}
RAMPED = {"schedule": {1: 12, 2: 24}, "method": "zero_keys", "tau_steps": 6, "ramp_steps": 5, "rewarm_steps": 4}
SOME = ("step2.ckpt", "step3.ckpt", "step4.ckpt", "step5.ckpt", "step7.ckpt", "step9.ckpt", "end1.ckpt")
"""Before, at and after each growth, in the middle of an epoch and at its end."""


@pytest.mark.slow
@pytest.mark.parametrize("growth", [BY_EPOCH, BY_STEP, RAMPED], ids=["by_epoch", "by_step", "ramped"])
def test_resume_from_every_step_and_epoch_end_is_bit_equal(tmp_path, growth):
    # 8 batches an epoch, two of them accumulated: 4 optimizer steps an epoch, 16 in all
    _, whole = run(tmp_path / "whole", growth, accumulate_grad_batches=2)
    kept = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(kept) == 20
    for name in kept if growth is BY_EPOCH else SOME:
        if name not in ("step16.ckpt", "end3.ckpt"):
            checkpoint = tmp_path / "whole" / name
            fit, resumed = run(tmp_path / f"from-{name}", growth, ckpt_path=checkpoint, accumulate_grad_batches=2)
            assert fit.global_step == 16, name
            assert_equal_weights(resumed, whole)


@pytest.mark.slow
def test_resume_with_moving_average_mixup_and_workers_is_bit_equal(tmp_path):
    data = {"num_workers": 2, "shift": 0.125, "mixup": 0.5, "label_smoothing": 0.1}
    _, whole = run(tmp_path / "whole", BY_EPOCH, ema=True, data=make_data(**data))
    for name in ("step5.ckpt", "step9.ckpt", "end1.ckpt", "step27.ckpt"):
        _, resumed = run(
            tmp_path / name, BY_EPOCH, ckpt_path=tmp_path / "whole" / name, ema=True, data=make_data(**data)
        )
        assert_equal_weights(resumed, whole)


def test_a_resume_at_the_end_of_an_epoch_is_bit_equal_with_plain_loaders(tmp_path):
    def data():  # its seeds are drawn from the global generator, like drop paths
        generator = torch.Generator().manual_seed(1)
        samples = [(torch.randn(3, 8, 8, generator=generator), number % 10) for number in range(8)]
        return DataLoader(samples, batch_size=4, shuffle=True)

    never = {"schedule": {}}
    _, whole = run(tmp_path, never, data=data(), max_epochs=2)
    for name in ("step2.ckpt", "end0.ckpt"):
        _, resumed = run(tmp_path / "again", never, tmp_path / name, data=data(), max_epochs=2)
        assert_equal_weights(resumed, whole)


def test_growth_by_nothing_equals_a_run_without_the_callback(tmp_path):
    with_callback, first = run(tmp_path / "a", {"schedule": {1: 8, 2: {"ffn": 32}}}, max_epochs=3)
    growth = with_callback.callbacks[0]
    assert isinstance(growth, ParameterGrowthCallback) and not growth.events
    _, second = run(tmp_path / "b", {"schedule": {}}, max_epochs=3)
    assert_equal_weights(first, second)


def test_a_checkpoint_of_any_stage_loads_into_the_ungrown_config(fitted):
    plain = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    for name, tokens in (("end0", 8), ("end1", 16), ("end3", 16)):
        path = fitted / f"{name}.ckpt"
        loaded = LitImageClassifier.load_from_checkpoint(path, weights_only=True)
        assert param_tokens(loaded)["qkv"] == tokens
        fresh = make_task()
        plain.validate(fresh, make_data(), ckpt_path=path, verbose=False, weights_only=True)
        assert param_tokens(fresh) == param_tokens(loaded)
        assert_equal_weights(fresh, loaded)
    assert param_tokens(fresh) == {"qkv": 16, "proj": 16, "ffn": 80}
    plain.validate(fresh, make_data(), ckpt_path=fitted / "end0.ckpt", verbose=False, weights_only=True)
    assert param_tokens(fresh)["ffn"] == 32  # an earlier stage into a later model shrinks it


def test_a_checkpoint_of_another_architecture_is_refused(fitted):
    other = make_task(depth=3)
    with pytest.raises(ValueError, match=r"ckpt_path: .*another architecture: .*blocks\.2.* is missing"):
        Trainer(accelerator="cpu", logger=False).validate(
            other, make_data(), ckpt_path=fitted / "end0.ckpt", weights_only=True
        )
    with pytest.raises(ValueError, match=r"another architecture: dim 32 \(this model: 48\)"):
        Trainer(accelerator="cpu", logger=False).validate(
            make_task(dim=48), make_data(), ckpt_path=fitted / "end0.ckpt", weights_only=True
        )


def test_optimizer_state_of_a_wrong_shape_is_found_at_load(fitted, tmp_path):
    checkpoint = torch.load(fitted / "end1.ckpt", weights_only=True)
    state = checkpoint["optimizer_states"][0]["state"]
    key = next(key for key, value in state.items() if value["exp_avg"].ndim == 2 and len(value["exp_avg"]) == 16)
    state[key]["exp_avg"] = state[key]["exp_avg"][:8]
    torch.save(checkpoint, tmp_path / "broken.ckpt")
    with pytest.raises(
        ValueError, match=r"optimizer state: exp_avg of parameter .* has the wrong shape \(got \(8, 32\)"
    ):
        run(tmp_path / "again", BY_EPOCH, ckpt_path=tmp_path / "broken.ckpt")
    check_optimizer_state(make_task().build_optimizer())


# --- Settings that changed --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halfway(few_digits, tmp_path_factory):
    """A checkpoint of the last batch of the second of four epochs."""
    folder = tmp_path_factory.mktemp("halfway")
    again(folder, save_at=16)
    return folder / "last.ckpt"


def again(folder, ckpt_path=None, max_epochs=4, save_at=-1, data=None, overrides=TINY, **task):
    """A fit that is or is not resumed; returns it and all that it warned of."""
    seed_everything(7)
    task = {"schedule": LRSchedule("cosine", warmup=1, min_factor=0.1), "overrides": overrides, **task}
    model = LitImageClassifier("tokenformer_vit_tiny_patch16_224", num_classes=10, image_size=8, **task)
    fit = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
        callbacks=[SaveAndStop(folder / "last.ckpt", save_at)],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit.fit(model, data or make_data(), ckpt_path=ckpt_path, weights_only=True)
    return fit, [str(one.message) for one in caught if "ckpt_path: " in str(one.message)]


class SaveAndStop(Callback):
    """Saves a checkpoint and ends the fit early; the schedule does not know."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def adamw(lr=3e-4, **settings):
    return lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.05, **settings)


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=32)


@pytest.mark.parametrize("lr_scheduler", [None, one_cycle])
@pytest.mark.parametrize("step", [11, 16])  # in the middle and at the end of an epoch
def test_a_resume_with_the_same_settings_warns_of_nothing(lr_scheduler, step, tmp_path):
    again(tmp_path, lr_scheduler=lr_scheduler, save_at=step)
    fit, warned = again(tmp_path, tmp_path / "last.ckpt", lr_scheduler=lr_scheduler)
    assert fit.global_step == 32 and warned == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer": adamw(lr=0.01)}, "model.optimizer.lr 0.01 (checkpoint: 0.0003)"),
        ({"optimizer": adamw(betas=(0.8, 0.9))}, "model.optimizer.betas (0.8, 0.9) (checkpoint: (0.9, 0.999))"),
        ({"overrides": {**TINY, "param_tokens": 12}}, "model.overrides.ffn 48 (checkpoint: 32)"),
    ],
)
def test_a_setting_without_effect_on_a_resumed_fit_is_named(changed, message, halfway, tmp_path):
    fit, (warned,) = again(tmp_path, halfway, **changed)
    assert warned.startswith("ckpt_path: settings ignored on resume in favor of the checkpoint's: ")
    assert message in warned and "--init_from" in warned and fit.global_step == 32
    assert fit.optimizers[0].param_groups[0]["initial_lr"] == 3e-4
    fit.save_checkpoint(tmp_path / "last.ckpt")  # what is in effect is in the next checkpoint
    assert len(again(tmp_path, tmp_path / "last.ckpt", max_epochs=5, **changed)[1]) == 2  # and the schedule's length


def test_settings_of_a_scheduler_that_are_restored_are_named(tmp_path):
    def step(size):
        return lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=size)

    again(tmp_path, save_at=16, lr_scheduler=step(1))
    _, (warned,) = again(tmp_path, tmp_path / "last.ckpt", lr_scheduler=step(3))
    assert "model.lr_scheduler.step_size 3 (checkpoint: 1)" in warned


def test_other_data_are_named(halfway, tmp_path):
    data = ImageDataModule("digits", batch_size=24, seed=4, num_workers=0)
    _, warned = again(tmp_path, halfway, data=data)
    assert warned[0].startswith("ckpt_path: resuming with different data settings: data.batch_size 24 (checkpoint: 16)")
    assert "data.seed 4 (checkpoint: 3)" in warned[0]
    assert "the learning-rate schedule changed" in warned[1]  # fewer steps in an epoch


def test_a_stretched_schedule_is_reported_with_both_rates(halfway, tmp_path):
    fit, (warned,) = again(tmp_path, halfway, max_epochs=8)
    assert fit.global_step == 64
    schedule = LRSchedule("cosine", warmup=1, min_factor=0.1)
    old, new = (f"{3e-4 * schedule.factor(16, total, 8):.3g}" for total in (32, 64))
    assert old != new and f"at step 16 the rate was {old} in the checkpoint's fit and is {new} now" in warned


def test_nothing_left_to_train_is_reported_with_what_to_raise(tmp_path):
    fit, _ = again(tmp_path, max_epochs=1)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    fit, (warned,) = again(tmp_path, tmp_path / "last.ckpt", max_epochs=1)
    assert fit.global_step == 8
    assert "nothing left to train" in warned and "raise trainer.max_epochs" in warned and "--init_from" in warned


def test_another_optimizer_is_refused_in_one_line(halfway, tmp_path):
    with pytest.raises(UserError, match=r"model.optimizer: .* of 'torch.optim.adamw.AdamW', expected that of .*\.SGD"):
        again(tmp_path, halfway, optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    checkpoint = torch.load(halfway, weights_only=True)
    assert checkpoint.pop("fit_settings")  # as in checkpoints that were written before
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(UserError, match=r"model.optimizer: .* of another optimizer, expected that of .*Adadelta"):
        again(tmp_path, tmp_path / "old.ckpt", optimizer=lambda params: torch.optim.Adadelta(params))
    assert again(tmp_path, tmp_path / "old.ckpt")[1] == []


def test_weights_alone_are_refused_where_a_fit_is_to_be_resumed(halfway, tmp_path):
    checkpoint = torch.load(halfway, weights_only=True)
    for part in ("optimizer_states", "lr_schedulers", "callbacks"):
        del checkpoint[part]
    torch.save(checkpoint, tmp_path / "weights.ckpt")
    with pytest.raises(UserError, match="ckpt_path: the checkpoint has weights only.* --init_from"):
        again(tmp_path, tmp_path / "weights.ckpt")


def test_an_architecture_whose_weights_only_fit_in_shape_is_refused(halfway):
    plain = Trainer(accelerator="cpu", logger=False)
    with pytest.raises(UserError, match=r"ckpt_path: .*another architecture: num_heads 2 \(this model: 4\)"):
        plain.validate(make_task(num_heads=4), make_data(), ckpt_path=halfway, weights_only=True)

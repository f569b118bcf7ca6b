"""A model that grows when its training loss says so."""

import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from callbacks import LossGuard, ParameterGrowthCallback, TrainingMonitor
from callbacks.growth_triggers import TRIGGERS
from lit_tokenformer.data import ImageDataModule
from lit_tokenformer.models import param_tokens
from lit_tokenformer.tasks import LitImageClassifier, LRSchedule

TINY = {"dim": 8, "depth": 1, "num_heads": 1, "patch_size": 4, "param_tokens": 8}
FAST = {"unit": "step", "window": 2, "patience": 2, "cooldown": 0}


def make(name, patience=2, min_delta=0.01, threshold=0.5):
    return TRIGGERS[name](patience, min_delta, threshold)


def firings(trigger, losses, compute=None):
    """The windows at which it fires; each costs as much as another, unless told."""
    spent = compute or range(1, len(losses) + 1)
    return [window for window, pair in enumerate(zip(losses, spent, strict=True)) if trigger.update(*pair)]


def test_plateau_fires_after_patience_windows_without_improvement():
    assert firings(make("plateau", patience=3), [3, 2, 1, 1, 1.2, 0.995]) == [5]
    assert firings(make("plateau", patience=2), [1.0, 1.1, 0.8, 0.9, 0.7, 0.8]) == []
    assert firings(make("plateau", patience=2, min_delta=0), [1.0, 0.999, 0.998, 0.997]) == []


def test_plateau_lets_small_improvements_add_up():
    assert firings(make("plateau", patience=3), [1 - 0.006 * window for window in range(12)]) == []
    assert firings(make("plateau", patience=3), [1 - 0.003 * window for window in range(12)])[:1] == [3]


def test_slope_fires_where_a_power_law_has_flattened_and_not_where_the_loss_is_a_line_in_the_logarithm():
    compute = [2.0 ** (window / 2) for window in range(12)]
    power_law = [2 + 3 * spent**-0.5 for spent in compute]  # its slope halves when compute is fourfold
    assert firings(make("slope", patience=2, threshold=0.51), power_law, compute)[0] == 5
    assert firings(make("slope", patience=2, threshold=0.26), power_law, compute)[0] == 9
    line = [9 - 0.3 * math.log(spent) for spent in compute]
    assert firings(make("slope", patience=4), line, compute) == []
    steeper = [9 - 0.3 * math.log(spent) ** 2 for spent in compute]
    assert firings(make("slope", patience=4), steeper, compute) == []


def test_slope_fires_at_a_loss_that_never_falls():
    assert firings(make("slope", patience=3), [1.0, 1.0, 1.0])[0] == 2
    assert firings(make("slope", patience=3), [1.0, 1.1, 1.2])[0] == 2


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_trigger_goes_on_from_its_state(name):
    losses = [3.0, 2.0, 1.5, 1.2, 1.1, 1.15, 1.08, 1.08, 1.09]
    whole = firings(make(name), losses)
    assert whole
    for stop in range(len(losses)):
        before, after = make(name), make(name)
        early = firings(before, losses[:stop])
        after.load_state_dict(before.state_dict())
        late = [window for window in range(stop, len(losses)) if after.update(losses[window], window + 1)]
        assert early + late == whole


class Scripted(LitImageClassifier):
    """Its loss has the value that a function of the optimizer step gives; its gradients are those of the real one."""

    script = None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss - loss.detach() + self.script(self.trainer.global_step)


def make_task(script=None):
    torch.manual_seed(0)
    task = (Scripted if script else LitImageClassifier)(
        "tokenformer_vit_tiny_patch16_224",
        num_classes=10,
        image_size=8,
        overrides=TINY,
        schedule=LRSchedule("constant"),
    )
    task.script = script
    return task


def fit(task, *callbacks, data=None, max_epochs=4, ckpt_path=None, **settings):
    """Fits for epochs of 6 batches."""
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(24, 3, 8, 8, generator=generator), torch.randint(10, (24,), generator=generator)
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )
    if data is None:
        trainer.fit(task, loader, loader if settings.get("limit_val_batches") else None)
    else:
        trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def grown_at(growth):
    return [event["step"] for event in growth.events]


def flat(step):
    return 1.0


def flat_from_step_8(step):
    return 5 - math.log(min(step, 7) + 1)


SCRIPTS = {"plateau": flat, "slope": flat_from_step_8}


@pytest.mark.parametrize(("trigger", "first"), [("plateau", 6), ("slope", 10)])
def test_a_model_grows_where_its_trigger_fires_and_not_before_the_key(trigger, first):
    growth = ParameterGrowthCallback({0: 16}, trigger=trigger, **FAST)
    fit(make_task(SCRIPTS[trigger]), growth)
    assert grown_at(growth) == [first] and growth.events[0]["trigger"] == trigger
    waiting = ParameterGrowthCallback({13: 16}, trigger=trigger, **FAST)
    fit(make_task(SCRIPTS[trigger]), waiting)
    assert grown_at(waiting) == [13]
    by_epoch = ParameterGrowthCallback({2: 16}, trigger=trigger, **{**FAST, "unit": "epoch"})
    fit(make_task(SCRIPTS[trigger]), by_epoch)
    assert grown_at(by_epoch) == [12]


def test_each_firing_grows_once_and_after_each_growth_the_cool_down_begins_anew():
    growth = ParameterGrowthCallback({0: 16, 1: 24, 2: 32}, trigger="plateau", **{**FAST, "cooldown": 4})
    task = make_task(flat)
    with pytest.warns(UserWarning, match="training ended before trigger 'plateau' fired; remaining growth: 32 tokens"):
        fit(task, growth)
    assert grown_at(growth) == [10, 20]  # 4 steps of cool-down, the first window and two that are no better
    assert param_tokens(task)["qkv"] == 24


def test_a_loss_in_the_cool_down_is_not_seen():
    def low_at_first(step):
        return 0.0 if step < 4 else 5 - step / 10

    growth = ParameterGrowthCallback({0: 16}, trigger="plateau", **{**FAST, "cooldown": 4})
    with pytest.warns(UserWarning, match="16 tokens"):
        fit(make_task(low_at_first), growth)
    seeing = ParameterGrowthCallback({0: 16}, trigger="plateau", **FAST)
    fit(make_task(low_at_first), seeing)
    assert grown_at(seeing) == [6]


def test_a_trigger_that_never_fires_is_told_with_what_was_not_reached():
    growth = ParameterGrowthCallback({0: 16, 1: {"ffn": 80}}, trigger="slope", **FAST)
    told = r"training ended before trigger 'slope' fired; remaining growth: 16, then \{'ffn': 80\} tokens"
    with pytest.warns(UserWarning, match=told) as caught:
        fit(make_task(lambda step: 5 - step), growth)
    assert not growth.events and sum("before trigger" in str(warning.message) for warning in caught) == 1


def test_a_schedule_needs_no_loss_and_keeps_no_state(recwarn):
    growth = ParameterGrowthCallback({1: 16, 2: 24}, patience=1, window=1)
    fit(make_task(lambda step: math.nan), growth)
    assert grown_at(growth) == [6, 12] and {event["trigger"] for event in growth.events} == {"schedule"}
    assert growth.state_dict() == {"events": growth.events}
    assert not [warning for warning in recwarn if "trigger" in str(warning.message)]


def test_accumulated_batches_count_as_one_step_of_the_whole_loss():
    class Look(Callback):
        def on_parameter_growth(self, trainer, pl_module, event):
            assert all(parameter.grad is None for parameter in pl_module.parameters())

    growth = ParameterGrowthCallback({0: 16}, trigger="plateau", **FAST)
    fit(make_task(flat), growth, Look(), accumulate_grad_batches=4)  # 6 batches an epoch: two steps
    assert grown_at(growth) == [6]
    falling = ParameterGrowthCallback({0: 16}, trigger="plateau", min_delta=0.05, **{**FAST, "patience": 1})
    with pytest.warns(UserWarning, match="16 tokens"):  # it falls by 0.06 in each window, not by a quarter of that
        fit(make_task(lambda step: 5 - 0.03 * step), falling, accumulate_grad_batches=4)


def test_compute_of_all_stages_is_what_the_monitor_counts():
    growth, monitor = ParameterGrowthCallback({0: 16, 1: 64, 2: 128}, trigger="plateau", **FAST), TrainingMonitor()
    with pytest.warns(UserWarning, match="128 tokens"):
        fit(make_task(lambda step: 1.0 if step < 12 else 20.0 - step), growth, monitor, max_epochs=3)
    assert grown_at(growth) == [6, 12]
    assert growth.state_dict()["signal"]["compute"] == pytest.approx(monitor.training_flops)


class Bare(LightningModule):
    """A model that does not tell what it costs."""

    def __init__(self, script):
        super().__init__()
        self.task, self.script = make_task(), script

    def training_step(self, batch, batch_idx):
        loss = self.task(batch[0]).square().mean()
        return {"loss": loss - loss.detach() + self.script(self.trainer.global_step)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_that_tells_no_cost_is_measured_in_steps():
    growth = ParameterGrowthCallback({0: 16}, trigger="slope", **FAST)
    fit(Bare(flat_from_step_8), growth)
    assert grown_at(growth) == [10]


def test_batches_without_a_loss_are_left_out():
    class Holes(Scripted):
        def training_step(self, batch, batch_idx):
            return None if self.trainer.global_step == 1 else super().training_step(batch, batch_idx)

    growth = ParameterGrowthCallback({0: 16}, trigger="plateau", **FAST)
    task = make_task(flat)
    task.__class__ = Holes
    fit(task, growth)
    assert grown_at(growth) == [6]


def test_rollbacks_and_validation_do_not_disturb_a_trigger():
    growth = ParameterGrowthCallback({0: 16}, trigger="plateau", **FAST)
    guard = LossGuard("rollback", every_n_steps=2)
    task = make_task(lambda step: math.nan if step == 3 else 1.0)
    with pytest.warns(UserWarning, match="rolled back to step"):
        fit(task, growth, guard, limit_val_batches=1, val_check_interval=2)
    assert guard.rollbacks == 1 and grown_at(growth) == [6]


def resumable(folder, growth, ckpt_path=None, script=None):
    seed_everything(7 if ckpt_path is None else 99)  # what is not in the checkpoint must not matter
    task, callbacks = make_task(script), [growth]
    if ckpt_path is None:
        name = {"filename": "step{step}", "auto_insert_metric_name": False}
        callbacks.append(ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, **name))
    data = ImageDataModule("digits", batch_size=16, seed=3, num_workers=0)
    fit(task, *callbacks, data=data, ckpt_path=ckpt_path, max_epochs=3, limit_val_batches=1)
    return task


@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.usefixtures("few_digits")  # 8 batches of 16
def test_a_run_that_is_stopped_within_a_window_resumes_bit_for_bit(tmp_path, trigger):
    def growth():
        settings = {"unit": "step", "window": 3, "patience": 2, "cooldown": 2, "min_delta": 0.1}
        return ParameterGrowthCallback({0: 16, 15: 24, 21: 32}, trigger=trigger, **settings)

    first = growth()
    whole = resumable(tmp_path, first)
    assert len(first.events) >= 2
    for step in (1, 7, first.events[0]["step"], first.events[1]["step"] - 1):
        again = growth()
        resumed = resumable(tmp_path, again, tmp_path / f"step{step}.ckpt")
        timeless = [[{**event, "seconds": 0} for event in one.events] for one in (first, again)]
        assert timeless[0] == timeless[1]
        assert again.state_dict()["signal"] == first.state_dict()["signal"]
        for name, weight in whole.state_dict().items():
            assert torch.equal(weight, resumed.state_dict()[name]), name


@pytest.mark.usefixtures("few_digits")
def test_a_checkpoint_without_the_state_of_this_trigger_begins_anew(tmp_path):
    resumable(tmp_path, ParameterGrowthCallback({23: 16}, unit="step"), script=flat)
    growth = ParameterGrowthCallback({0: 16}, trigger="plateau", **FAST)
    resumable(tmp_path, growth, tmp_path / "step8.ckpt", script=flat)
    assert grown_at(growth) == [14]

    resumable(tmp_path / "slope", ParameterGrowthCallback({23: 16}, trigger="slope", **FAST), script=flat)
    growth = ParameterGrowthCallback({0: 16}, trigger="plateau", **FAST)
    resumable(tmp_path, growth, tmp_path / "slope" / "step8.ckpt", script=flat)
    assert grown_at(growth) == [14]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trigger": "plateu"}, "trigger: unknown value 'plateu', did you mean 'plateau'"),
        ({"trigger": "slope", "window": 0}, "window: expected at least 1, got 0"),
        ({"trigger": "plateau", "patience": 0}, "patience: expected at least 1, got 0"),
        ({"trigger": "slope", "patience": 1}, "patience: expected at least 2 for trigger 'slope', got 1"),
        ({"trigger": "plateau", "min_delta": -0.1}, "min_delta: expected at least 0, got -0.1"),
        ({"trigger": "plateau", "min_delta": math.nan}, "min_delta: expected at least 0, got nan"),
        ({"trigger": "slope", "threshold": 0}, "threshold: expected a number between 0 and 1, got 0"),
        ({"trigger": "slope", "threshold": 1.0}, "threshold: expected a number between 0 and 1, got 1.0"),
        ({"trigger": "slope", "cooldown": -1}, "cooldown: expected at least 0, got -1"),
    ],
)
def test_bad_settings_are_refused_when_made(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        ParameterGrowthCallback({1: 16}, **settings)
    assert "\n" not in str(caught.value)

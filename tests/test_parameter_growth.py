"""A model that grows inside a running fit."""

import math

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks import GrowingEMA, ParameterGrowthCallback, TrainingMonitor
from callbacks.growth_check import OutputCheck
from callbacks.growth_steps import latest_rows
from lit_tokenformer.growth import grow
from lit_tokenformer.models import Pattention, param_tokens
from lit_tokenformer.tasks import LitImageClassifier, LRSchedule

TINY = {"dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "param_tokens": 8}
SGD = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1)}


def make_task(compile=False, optimizer=None, **overrides):
    torch.manual_seed(0)
    settings = {"optimizer": optimizer} if optimizer else {}
    return LitImageClassifier(
        "tokenformer_vit_tiny_patch16_224",
        num_classes=10,
        image_size=8,
        overrides={**TINY, **overrides},
        schedule=LRSchedule("constant"),
        compile=compile,
        **settings,
    )


def loader(batches=6, batch_size=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batches * batch_size, 3, 8, 8, generator=generator)
    labels = torch.randint(10, (len(images),), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


def fit(task, *callbacks, max_epochs=3, **settings):
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
    trainer.fit(task, loader(), loader(1) if settings.get("limit_val_batches") else None)
    return trainer


class Watch(Callback):
    """Calls a function after every optimizer step."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(self.look(trainer, pl_module))


def sizes(trainer, task):
    return trainer.global_step, param_tokens(task)["qkv"]


def test_growth_by_epoch_and_by_step_happens_where_it_is_due():
    by_epoch = Watch(sizes)
    fit(make_task(), ParameterGrowthCallback({1: 16, 2: 32}), by_epoch)
    assert [size for _, size in by_epoch.seen] == [8] * 6 + [16] * 6 + [32] * 6
    by_step = Watch(sizes)
    fit(make_task(), ParameterGrowthCallback({4: 16, 13: 32}, unit="step"), by_step)
    assert [size for _, size in by_step.seen] == [8] * 4 + [16] * 9 + [32] * 5


def test_growth_waits_until_no_gradient_is_pending():
    grown_at = []

    class Look(Callback):
        def on_parameter_growth(self, trainer, pl_module, event):
            grown_at.append((event["step"], trainer.fit_loop.epoch_loop.batch_idx))
            assert all(parameter.grad is None for parameter in pl_module.parameters())

    # 6 batches an epoch, 4 accumulated, the last 2 of an epoch step too: steps end with batches 3 and 5
    fit(make_task(), ParameterGrowthCallback({1: 16, 2: 32}, unit="step"), Look(), accumulate_grad_batches=4)
    assert [step for step, _ in grown_at] == [1, 2]
    assert [batch for _, batch in grown_at] == [4, 0]


def test_each_growth_is_checked_and_remembered():
    growth = ParameterGrowthCallback({1: 16, 2: {"ffn": 100}})
    fit(make_task(), growth)
    first, second = growth.events
    assert first["before"] == {"qkv": 8, "proj": 8, "ffn": 32} and first["after"] == {"qkv": 16, "proj": 16, "ffn": 64}
    assert second["after"] == {"qkv": 16, "proj": 16, "ffn": 100}
    assert first["epoch"] == 1 and first["step"] == 6
    assert first["output_difference"] < 1e-6 and second["output_difference"] < 1e-6
    assert second["parameters"] - first["parameters"] == 2 * 36 * 64  # 36 tokens of 32 + 32 numbers in 2 blocks


def test_a_multiple_is_one_of_the_size_at_which_the_fit_began(tmp_path):
    schedule = {1: {"ffn": "1.5x", "depth": "2x"}, 2: {"ffn": "3x"}}
    task, growth = make_task(), ParameterGrowthCallback(schedule)
    assert [size["ffn"] for _, size in growth.remaining_stages(task)] == [48, 96]
    last = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(task, growth, last)
    assert [(event["after"]["ffn"], event["after"]["depth"]) for event in growth.events] == [(48, 4), (96, 4)]
    resumed, growth = make_task(), ParameterGrowthCallback(schedule)
    trainer = Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[growth])
    trainer.fit(resumed, loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert [event["after"]["ffn"] for event in growth.events] == [48, 96]
    expected = task.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())
    with pytest.raises(ValueError, match="schedule: epoch 1: unknown value 'hidden'"):
        fit(make_task(), ParameterGrowthCallback({1: {"hidden": "2x"}}))


def test_random_growth_is_told_to_change_the_function():
    growth = ParameterGrowthCallback({1: 16}, method="random")
    fit(make_task(), growth)
    assert growth.events[0]["output_difference"] > 0.01


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("method", ["split", "zero_keys"])
def test_every_precision_works_through_a_growth(precision, method):
    task, growth = make_task(), ParameterGrowthCallback({1: 16, 2: 32}, method=method)
    trainer = fit(task, growth, precision=precision)
    assert param_tokens(task)["ffn"] == 128
    assert all(torch.isfinite(parameter).all() for parameter in task.parameters())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    half = precision == "bf16-true"
    assert {parameter.dtype for parameter in task.parameters()} == {torch.bfloat16 if half else torch.float32}
    layer = task.backbone.blocks[0].attn.query
    assert layer.tau.dtype == torch.float32
    assert layer.tau.item() == pytest.approx(math.sqrt(32 if method == "split" else 8), rel=1e-6)
    # bf16 keeps 8 bits: what V / r rounds to is off by up to 2^-9
    assert max(event["output_difference"] for event in growth.events) < (0.02 if half else 1e-6)


def test_compiled_backbone_is_compiled_once_for_each_size():
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    task = make_task()
    task.backbone.compile(dynamic=False, backend=backend, fullgraph=True)
    fit(task, ParameterGrowthCallback({1: 16, 2: 32}))
    assert len(compiled) == 3


def test_the_same_optimizer_goes_on_with_its_groups_and_steps():
    task = make_task()
    trainer = fit(task, ParameterGrowthCallback({1: 16}))
    (optimizer,) = trainer.optimizers
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert held == set(task.parameters())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert {float(optimizer.state[parameter]["step"]) for parameter in task.parameters()} == {18.0}


def adafactor(params):
    return timm.optim.Adafactor(params, lr=1e-3)


OPTIMIZERS = {
    "adam": lambda params: torch.optim.Adam(params, lr=1e-3, amsgrad=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "lion": lambda params: timm.optim.Lion(params, lr=1e-4),
    "muon": lambda params: timm.optim.Muon(params, lr=1e-3),
    "torch_adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", ["split", "zero_keys"])
def test_optimizers_carry_their_state_over_in_a_fit(name, method, recwarn):
    task = make_task(optimizer=OPTIMIZERS[name])
    kept = []

    class Look(Callback):
        def on_parameter_growth(self, trainer, pl_module, event):
            kept.append(all(trainer.optimizers[0].state[p] for p in pl_module.parameters()))

    trainer = fit(task, ParameterGrowthCallback({1: 32, 2: 64}, method=method), Look())
    assert kept == [True, True] and trainer.global_step == 18
    assert all(torch.isfinite(parameter).all() for parameter in task.parameters())
    assert not [warning for warning in recwarn if "carried over" in str(warning.message)]


def test_state_that_cannot_be_carried_over_is_reset_with_a_warning():
    task = make_task(optimizer=adafactor, param_tokens=32)
    with pytest.warns(
        UserWarning, match=r"Adafactor keeps exp_avg_sq_col, exp_avg_sq_row, which cannot be carried over.*was reset"
    ):
        fit(task, ParameterGrowthCallback({1: 64}))


def test_a_second_fit_goes_on_with_the_schedule():
    task, growth = make_task(), ParameterGrowthCallback({1: 16, 3: 32})
    trainer = fit(task, growth, max_epochs=4)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(task, loader())
    assert param_tokens(task)["qkv"] == 32 and len(growth.events) == 2 and trainer.global_step == 30


def test_frozen_parameters_stay_frozen():
    task = make_task()
    task.backbone.blocks[0].requires_grad_(False)
    before = task.backbone.blocks[0].mlp.key_tokens.detach().clone()
    fit(task, ParameterGrowthCallback({1: 16}))
    grown = task.backbone.blocks[0].mlp.key_tokens
    assert not grown.requires_grad
    assert torch.equal(grown[::2], before) and torch.equal(grown[1::2], before)


def keys_of(trainer, task):
    layer = task.backbone.blocks[0].mlp
    return layer.key_tokens.detach().clone(), layer.value_tokens.detach().clone()


def test_zero_keys_move_at_the_first_step_and_their_values_at_the_second():
    watch = Watch(keys_of)
    fit(make_task(**SGD), ParameterGrowthCallback({1: 16}, method="zero_keys"), watch, max_epochs=2)
    (first_keys, first_values), (_, second_values) = watch.seen[6:8]
    assert (first_keys[32:].norm(dim=1) > 0).all()
    assert not torch.equal(first_values[32:], second_values[32:])


def test_copies_of_a_split_differ_after_one_step():
    watch = Watch(keys_of)
    fit(make_task(**SGD), ParameterGrowthCallback({1: 16}), watch, max_epochs=2)
    keys, values = watch.seen[6]
    assert ((keys[::2] - keys[1::2]).norm(dim=1) > 0).all()
    assert ((values[::2] - values[1::2]).norm(dim=1) > 0).all()


def test_old_rows_stand_still_while_they_are_frozen():
    watch = Watch(keys_of)
    growth = ParameterGrowthCallback({1: 16}, method="zero_keys", freeze_old_steps=3)
    fit(make_task(), growth, watch, max_epochs=2)  # AdamW with weight decay
    before, frozen, free = watch.seen[5][0], watch.seen[8][0], watch.seen[9][0]
    assert torch.equal(before, frozen[:32]) and not torch.equal(before, free[:32])
    assert not torch.equal(watch.seen[6][0][32:], frozen[32:])


def test_old_rows_take_a_share_of_their_updates_while_they_are_slowed():
    free, slowed = Watch(keys_of), Watch(keys_of)
    fit(make_task(), ParameterGrowthCallback({1: 16}, method="zero_keys"), free, max_epochs=2)
    settings = {"freeze_old_steps": 1, "old_updates": 0.25}
    fit(make_task(), ParameterGrowthCallback({1: 16}, method="zero_keys", **settings), slowed, max_epochs=2)
    before, one, other = free.seen[5][0], free.seen[6][0], slowed.seen[6][0]
    torch.testing.assert_close(other[:32] - before, (one[:32] - before) / 4)
    assert torch.equal(other[32:], one[32:])


def test_ramp_scales_the_updates_of_new_rows_only():
    plain, ramped = Watch(keys_of), Watch(keys_of)
    fit(make_task(), ParameterGrowthCallback({1: 16}, method="zero_keys"), plain, max_epochs=2)
    fit(make_task(), ParameterGrowthCallback({1: 16}, method="zero_keys", ramp_steps=4), ramped, max_epochs=2)
    torch.testing.assert_close(ramped.seen[6][0][32:], plain.seen[6][0][32:] / 4)  # from zero, a quarter of the way
    torch.testing.assert_close(ramped.seen[6][0][:32], plain.seen[6][0][:32])


def test_new_rows_are_updated_at_a_multiple_of_their_learning_rate():
    plain, faster, ramped = Watch(keys_of), Watch(keys_of), Watch(keys_of)
    for watch, settings in ((plain, {}), (faster, {"new_updates": 1.3}), (ramped, {"new_updates": 2, "ramp_steps": 4})):
        fit(make_task(), ParameterGrowthCallback({1: 16}, method="zero_keys", **settings), watch, max_epochs=2)
    for watch, multiple in ((faster, 1.3), (ramped, 0.5)):
        assert torch.equal(watch.seen[6][0][:32], plain.seen[6][0][:32])
        torch.testing.assert_close(watch.seen[6][0][32:], multiple * plain.seen[6][0][32:])


def test_learning_rate_is_warmed_up_again_without_a_trace_in_the_schedule():
    rates, shown = [], Watch(lambda trainer, task: trainer.optimizers[0].param_groups[0]["lr"])

    class Recorder(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    task = make_task(optimizer=lambda params: Recorder(params, lr=0.1))
    fit(task, ParameterGrowthCallback({1: 16}, rewarm_steps=4), shown, max_epochs=2)
    assert rates == pytest.approx([0.1] * 6 + [0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert shown.seen == pytest.approx([0.1] * 12)


def test_callbacks_that_report_the_learning_rate_see_it_warmed_up_again():
    class Monitor(Callback):
        """Looks when LearningRateMonitor does."""

        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, *_):
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    def halving(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # from the rate before, not from the first

    task = make_task(optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    task.make_lr_scheduler, monitor = halving, Monitor()
    trainer = fit(task, ParameterGrowthCallback({1: 16}, rewarm_steps=4), monitor, max_epochs=3)
    assert monitor.seen == pytest.approx([0.1] * 6 + [0.0125, 0.025, 0.0375, 0.05, 0.05, 0.05] + [0.025] * 6)
    assert [type(callback) for callback in trainer.callbacks[:2]] == [ParameterGrowthCallback, Monitor]


def test_tau_moves_to_the_root_of_the_number_of_tokens():
    taus = Watch(lambda trainer, task: task.backbone.blocks[0].attn.query.tau.item())
    fit(make_task(), ParameterGrowthCallback({1: 18}, method="zero_keys", tau_steps=4), taus, max_epochs=2)
    assert taus.seen[:6] == pytest.approx([math.sqrt(8)] * 6)
    assert taus.seen[6:10] == pytest.approx([math.sqrt(8) * (18 / 8) ** (step / 8) for step in (1, 2, 3, 4)])
    assert taus.seen[9:] == pytest.approx([math.sqrt(18)] * 3)


def test_the_best_of_each_size_is_kept(tmp_path):
    name = "{epoch}-{size:.0f}"
    best = ModelCheckpoint(tmp_path, name, monitor="val/loss", save_top_k=1)

    class Size(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("size", float(param_tokens(pl_module)["qkv"]))

    patience = EarlyStopping("val/loss", patience=3, min_delta=1e9)
    growth = ParameterGrowthCallback({2: 16, 4: 32})
    trainer = fit(make_task(), growth, Size(), best, patience, max_epochs=6, limit_val_batches=1)
    assert {path.stem.split("size=")[1] for path in tmp_path.iterdir()} == {"8", "16", "32"}
    assert trainer.current_epoch == 6  # patience began anew at each growth


def test_layers_without_a_kind_or_without_pattention():
    task = make_task(projection="linear", feed_forward="mlp")
    with pytest.warns(UserWarning, match="schedule: the model has no Pattention layer"):
        fit(task, ParameterGrowthCallback({1: {"ffn": 16}}))
    assert param_tokens(task) == {}
    task = make_task(projection="linear")
    fit(task, ParameterGrowthCallback({1: 16}))
    assert param_tokens(task) == {"ffn": 64}
    assert sum(isinstance(layer, Pattention) for layer in task.modules()) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": {4: 16, 2: 32}}, "schedule: keys must increase .got epoch 2 after epoch 4."),
        ({"schedule": {1: 16, 2: 8}}, "schedule: epoch 2: qkv would shrink from 16 to 8"),
        ({"schedule": {1: {"qkv": 16, "fnn": 9}}}, "schedule: epoch 1: unknown value 'fnn', did you mean 'ffn'"),
        ({"schedule": {"x": 16}}, "schedule: expected a non-negative integer as epoch, got 'x'"),
        ({"schedule": {1.5: 16}}, "schedule: expected a non-negative integer as epoch, got 1.5"),
        ({"schedule": {"1.5": 16}}, "schedule: expected a non-negative integer as epoch, got '1.5'"),
        ({"schedule": {-1: 16}}, "schedule: expected a non-negative integer as epoch, got -1"),
        ({"schedule": {1: "many"}}, "schedule: epoch 1: .*got 'many'"),
        ({"schedule": {1: {"ffn": "0.5x"}}}, "schedule: epoch 1: ffn: expected a total or a multiple such as 2x, got"),
        ({"schedule": {1: {"ffn": "twice"}}}, "schedule: epoch 1: ffn: expected a total or a multiple such as 2x, got"),
        ({"schedule": {1: 0}}, "schedule: epoch 1: .*at least 1, got 0"),
        ({"schedule": {1: 1.5}}, "schedule: epoch 1: .*got 1.5"),
        ({"schedule": {1: 16}, "unit": "epochs"}, "unit: unknown value 'epochs', did you mean 'epoch'"),
        ({"schedule": {1: 16}, "method": "copy"}, "method: unknown value 'copy'"),
        ({"schedule": {1: 16}, "new_state": "none"}, "new_state: unknown value"),
        ({"schedule": {1: 16}, "noise": 0}, "noise: 0 keeps the copies of a split identical"),
        ({"schedule": {1: 16}, "ramp_steps": -2}, "ramp_steps: expected at least 0, got -2"),
        ({"schedule": {1: 16}, "new_updates": -1}, "new_updates: expected at least 0, got -1"),
    ],
)
def test_bad_settings_are_refused_when_made(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        ParameterGrowthCallback(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": {3: 16}}, r"schedule: epoch 3 is beyond the end of the fit \(trainer.max_epochs=3\)"),
        (
            {"schedule": {18: 16}, "unit": "step"},
            r"schedule: step 18 is beyond the end of the fit \(18 optimizer steps\)",
        ),
        ({"schedule": {1: 4}}, "schedule: epoch 1: qkv would shrink from 8 to 4"),
        (
            {"schedule": {1: 16, 2: 10**10}},
            r"schedule: epoch 2: not enough memory for the new parameters alone \(got [\d,.]+ GiB",
        ),
    ],
)
def test_schedules_that_do_not_fit_are_refused_before_training(settings, message):
    steps = Watch(sizes)
    with pytest.raises(ValueError, match=message):
        fit(make_task(), ParameterGrowthCallback(**settings), steps)
    assert not steps.seen


def test_zero_keys_are_refused_for_softmax_before_training():
    steps = Watch(sizes)
    with pytest.raises(ValueError, match="zero keys change the output under score_norm 'softmax'"):
        fit(make_task(score_norm="softmax"), ParameterGrowthCallback({1: 16}, method="zero_keys"), steps)
    assert not steps.seen


def test_a_strategy_that_cannot_grow_is_refused():
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceXLAStrategy

    from callbacks.growth_strategies import growth_context

    for strategy in (FSDPStrategy, DeepSpeedStrategy, SingleDeviceXLAStrategy):
        trainer = Trainer(accelerator="cpu", logger=False)
        trainer._accelerator_connector.strategy = strategy.__new__(strategy)
        with pytest.raises(ValueError, match=f"trainer.strategy: a model cannot grow under {strategy.__name__}"):
            growth_context(trainer)


class OwnModule(LightningModule):
    """A user's module: Pattention layers without a kind, and none of our hooks."""

    def __init__(self, more=0):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), Pattention(192, 16, 8), nn.Tanh(), Pattention(16, 10, 8 + more))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class OwnForward(OwnModule):
    def forward(self, images):
        return self.net(images)


@pytest.mark.parametrize("schedule", [{1: 16, 2: 32}, {1: {"other": 16}, 2: {"other": 32}}])
def test_layers_of_a_users_module_grow_and_their_outputs_are_compared(schedule):
    growth, task = ParameterGrowthCallback(schedule), OwnForward()
    trainer = fit(task, growth, TrainingMonitor(), GrowingEMA(decay=0.5))
    assert [event["after"] for event in growth.events] == [{"other": 16}, {"other": 32}]
    assert param_tokens(task) == {"other": 32}
    assert all(event["output_difference"] < 1e-5 for event in growth.events)
    assert [id(one) for one in trainer.optimizers[0].param_groups[0]["params"]] == [id(p) for p in task.parameters()]


def test_a_user_is_told_once_that_outputs_are_not_compared(recwarn):
    class Needy(OwnModule):
        def forward(self, images, scale):
            return self.net(images) * scale

    for module, problem in ((OwnModule, "has no forward"), (Needy, "forward raised TypeError")):
        OutputCheck._warned.clear()
        growth = ParameterGrowthCallback({1: 16, 2: 32})
        fit(module(), growth)
        told = [str(one.message) for one in recwarn if "check: cannot compare the outputs" in str(one.message)]
        recwarn.clear()
        assert len(told) == 1 and problem in told[0] and "define model_output(batch)" in told[0]
        assert all(math.isnan(event["output_difference"]) for event in growth.events)


def test_comparing_outputs_draws_no_random_number():
    class Noisy(OwnModule):
        def forward(self, images):
            return self.net(images) + torch.randn(1)

    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    OutputCheck(Noisy(), next(iter(loader()))).difference()
    torch.manual_seed(3)
    check = OutputCheck(Noisy(), next(iter(loader())))
    torch.manual_seed(3)
    check.difference()
    assert torch.equal(torch.rand(3), expected)


def test_a_model_that_is_grown_in_part_grows_to_the_whole():
    growth, task = ParameterGrowthCallback({1: 16}, freeze_old_steps=-1, method="zero_keys"), OwnModule(more=4)
    seen = Watch(lambda trainer, task: task.net[3].key_tokens.detach().clone())
    fit(task, growth, seen, TrainingMonitor())
    assert param_tokens(task) == {"other": 16} and task.net[3].num_tokens == 16
    (event,) = growth.events
    assert event["before"] == {"other": 8}
    parts = {
        f"net.{layer}.{part}": size for layer, size in ((1, 8), (3, 12)) for part in ("key_tokens", "value_tokens")
    }
    assert {name: grown.rows.before for name, _, grown in latest_rows(task, event)} == parts
    earlier = {**event, "layers_before": {"net.3": 12}}  # as earlier releases recorded it
    del earlier["rows"]
    assert [*latest_rows(task, earlier)] == [*latest_rows(task, event)]
    assert torch.equal(seen.seen[-1][:12], seen.seen[5]) and not torch.equal(seen.seen[-1][12:], seen.seen[6][12:])


def test_a_resume_does_not_skip_the_growth_of_layers_that_lag_behind(tmp_path):
    task = OwnModule()
    grow(task.net[3], 16)  # the last layer has the first stage's size, the other has not
    growth = ParameterGrowthCallback({1: 16})
    fit(task, growth)
    assert task.net[1].num_tokens == 16
    assert {name: grown.rows.before for name, _, grown in latest_rows(task, growth.events[0])} == {
        "net.1.key_tokens": 8,
        "net.1.value_tokens": 8,
    }


@pytest.mark.parametrize(
    "average",
    [WeightAveraging(), EMAWeightAveraging(), StochasticWeightAveraging(1e-3)],
    ids=lambda one: type(one).__name__,
)
def test_averages_that_cannot_grow_are_refused_before_training(average):
    steps = Watch(sizes)
    with pytest.raises(ValueError, match=rf"^trainer.callbacks: {type(average).__name__} .* use callbacks.GrowingEMA$"):
        fit(make_task(), ParameterGrowthCallback({1: 16}), average, steps)
    assert not steps.seen
    fit(make_task(), ParameterGrowthCallback({}), average, max_epochs=2)


@pytest.mark.parametrize(("mode", "worst"), [("min", math.inf), ("max", -math.inf)])
def test_scores_of_different_sizes_are_not_compared(mode, worst):
    """A score that falls back at a growth and then improves ends no fit and lowers no rate."""

    class Score(Callback):
        def __init__(self):
            self.rates = []

        def on_train_epoch_end(self, trainer, pl_module):
            epoch = trainer.current_epoch
            score = 1.0 / (epoch + 1) + (10.0 if epoch >= 3 else 0.0)
            pl_module.log("score", score if mode == "min" else -score)
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    class Plateaus(OwnModule):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode, patience=1)
            return {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "score"}

    class Best(Callback):
        def on_parameter_growth(self, trainer, pl_module, event):
            self.found = trainer.early_stopping_callback.best_score, trainer.lr_scheduler_configs[0].scheduler.best

    patience = EarlyStopping("score", mode=mode, patience=2, check_on_train_epoch_end=True)
    score, best = Score(), Best()
    trainer = fit(Plateaus(), ParameterGrowthCallback({3: 16}), score, patience, best, max_epochs=8)
    assert trainer.current_epoch == 8 and len(set(score.rates)) == 1
    assert [float(one) for one in best.found] == [worst, worst]


def test_the_command_line_keeps_the_keys_of_a_schedule_as_they_are():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ParameterGrowthCallback, "growth")
    for given, kept in (("{1: 16, 2: {ffn: 64}}", {1: 16, 2: {"ffn": 64}}), ('{"1": 16}', {1: 16})):
        config = parser.parse_args([f"--growth.schedule={given}"])
        again = parser.parse_string(parser.dump(config))
        for one in (config, again):
            assert parser.instantiate_classes(one).growth.schedule == kept
    with pytest.raises(ValueError, match="schedule: expected a non-negative integer as epoch, got 1.5"):
        parser.instantiate_classes(parser.parse_args(["--growth.schedule={1.5: 16}"]))

"""A loss that is no number never reaches the weights; what a fit came to is told by size."""

import json
import math
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import GrowingEMA, LossGuard, ParameterGrowthCallback, RunSummary, TrainingMonitor
from callbacks.loss_guard import NonFiniteLoss, _gradients, _non_finite, _norm
from lit_tokenformer.data import ImageDataModule
from lit_tokenformer.tasks import LitImageClassifier, LRSchedule

pytestmark = pytest.mark.usefixtures("few_digits")  # 8 batches of 16

TINY = {"dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4, "param_tokens": 4}


class Task(LitImageClassifier):
    """Its loss is no number in some batches, counted over the whole fit."""

    bad = {}

    def training_step(self, batch, batch_idx):
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        if self.bad.get(number, 1.0) is None:
            return None
        return super().training_step(batch, batch_idx) * self.bad.get(number, 1.0)


class Weights(Callback):
    """Keeps weights and moments as they are before each batch."""

    def __init__(self):
        self.before = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        moments = [state["exp_avg"] for state in trainer.optimizers[0].state.values()]
        self.before.append([tensor.detach().clone() for tensor in (*pl_module.state_dict().values(), *moments)])


def fit(folder, bad, *callbacks, guard=None, epochs=2, ckpt_path=None, task=Task, **trainer):
    seed_everything(1)
    task = task(
        "tokenformer_vit_tiny_patch16_224",
        num_classes=10,
        image_size=8,
        overrides=TINY,
        schedule=LRSchedule("constant"),
    )
    task.bad = bad
    weights = Weights()
    fit = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        callbacks=[*callbacks, guard or LossGuard(), weights],
        **trainer,
    )
    data = ImageDataModule("digits", batch_size=16, seed=3, num_workers=0)
    fit.weights, fit.data = weights, data
    try:
        fit.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    except NonFiniteLoss as error:
        fit.error = str(error)
    return fit


def equal(some, others):
    return len(some) == len(others) and all(map(torch.equal, some, others))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_fit_stops_before_the_step_and_names_the_batch(tmp_path, value):
    growth = ParameterGrowthCallback({1: 8})
    stopped = fit(tmp_path, {11: value}, growth, enable_checkpointing=False)
    assert re.match(r"non-finite loss at epoch 1, step 11 \(process 0: loss (nan|inf) in batch 3 of", stopped.error)
    for part in ("norm of weights of old rows", "of weights of new rows", "norm of gradients of old rows"):
        number = re.search(rf"{part} (\S+?),", stopped.error)[1]
        assert math.isfinite(float(number)) == ("weights" in part)
    last = [tensor.detach() for tensor in stopped.lightning_module.state_dict().values()]
    assert equal(last, stopped.weights.before[-1][: len(last)])
    named = [int(one) for one in re.search(r"of samples ([\d, ]+)\)", stopped.error)[1].split(",")]
    keys = list(stopped.data._train_loader.sampler)
    assert named == [index for _, _, index in keys][3 * 16 : 4 * 16]


class Rooted(Task):
    """Its loss is finite and its gradient is not: the root of zero has none."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.fit_loop.epoch_loop.total_batch_idx in self.roots:
            loss = loss + (self.backbone.norm.weight * 0).sum().sqrt()
        return loss


def test_a_gradient_that_is_not_finite_stops_the_fit_before_the_step(tmp_path):
    Rooted.roots = {11}
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, save_last=True)
    stopped = fit(tmp_path, {}, save, task=Rooted)
    assert re.match(
        r"non-finite gradient at epoch 1, step 11 \(process 0: loss \d\S+ in batch 3 of samples", stopped.error
    )
    assert "norm of gradients of old rows" in stopped.error and "of other gradients nan" in stopped.error
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 11
    assert all(bool(tensor.isfinite().all()) for tensor in kept["state_dict"].values())


@pytest.mark.parametrize(("number", "finite"), [(1e30, True), (math.inf, False), (-math.inf, False), (math.nan, False)])
def test_gradients_whose_squares_overflow_are_finite(number, finite):
    gradients = [torch.ones(3), torch.tensor([[1.0, number]])]
    assert bool(_norm(gradients).isfinite()) == finite


@pytest.mark.parametrize(("fault", "task"), [("loss", Task), ("gradient", Rooted)])
@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_a_verdict_that_is_read_a_step_later_lets_no_number_reach_the_weights(
    tmp_path, monkeypatch, action, fault, task
):
    """As on a GPU, where the host does not wait for the device."""
    monkeypatch.setattr("callbacks.loss_guard._lags", lambda verdict: True)
    Rooted.roots = {6}
    guard, bad = LossGuard(action, every_n_steps=4), {6: math.nan} if fault == "loss" else {}
    found = fit(tmp_path, bad, guard=guard, task=task, enable_checkpointing=False)
    assert all(bool(tensor.isfinite().all()) for state in found.weights.before for tensor in state)
    if action == "stop":
        assert len(found.weights.before) == 8  # batch 7 was computed, and no step taken with it
        assert f"non-finite {fault} at epoch 0, step 6 (process 0: loss" in found.error
        assert "in batch 6 of samples" in found.error and "gradients" not in found.error
    else:
        assert guard.rollbacks == 1 and found.global_step == 16
        assert equal(found.weights.before[8], found.weights.before[4])


@pytest.mark.parametrize(("fused", "skipped"), [(True, True), (False, False)])
def test_a_fused_optimizer_skips_the_wrong_step_before_the_verdict_is_read(tmp_path, monkeypatch, fused, skipped):
    monkeypatch.setattr("callbacks.safeguard._lags", lambda verdict: True)
    task = partial(Task, optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=fused))
    before = fit(tmp_path, {6: math.nan}, task=task, enable_checkpointing=False).weights.before
    assert len(before) == 8 and equal(before[7], before[6]) == skipped and not equal(before[6], before[5])


@pytest.mark.parametrize("last", [7, 15])
def test_no_checkpoint_is_saved_after_a_wrong_step_whose_verdict_is_pending(tmp_path, monkeypatch, last):
    monkeypatch.setattr("callbacks.loss_guard._lags", lambda verdict: True)
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    found = fit(tmp_path, {last: math.nan}, save)
    assert f"non-finite loss at epoch {last // 8}, step {last} " in found.error
    assert sorted(int(path.stem.removeprefix("step=")) for path in tmp_path.glob("*.ckpt")) == list(range(1, last + 1))
    found = fit(tmp_path, {15: math.nan}, enable_checkpointing=False)  # the last step of all
    assert "non-finite loss at epoch 1, step 15 " in found.error


def test_a_verdict_that_is_read_a_step_later_changes_no_bit(tmp_path, monkeypatch):
    plain = fit(tmp_path, {}, guard=Callback(), enable_checkpointing=False)
    monkeypatch.setattr("callbacks.loss_guard._lags", lambda verdict: True)
    guarded = fit(tmp_path, {}, guard=LossGuard("rollback", every_n_steps=3), enable_checkpointing=False)
    assert equal(guarded.weights.before[-1], plain.weights.before[-1])


def test_a_sparse_gradient_is_looked_at():
    weight = torch.nn.Parameter(torch.ones(4, 2))
    torch.nn.functional.embedding(torch.tensor([1, 1]), weight, sparse=True).sqrt().sum().backward()
    optimizer, trainer = torch.optim.SGD([weight]), SimpleNamespace(precision_plugin=None)
    for value, wrong in ((1.0, False), (math.nan, True)):
        weight.grad._values()[0, 0] = value
        assert bool(_non_finite([], _gradients(trainer, optimizer), torch.device("cpu"))) == wrong


def test_samples_of_any_pass_are_those_that_were_loaded():
    data = ImageDataModule("digits", batch_size=16, seed=3, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(2)
    seen = []
    inner = loader.dataset.__class__.__getitem__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loader.dataset.__class__, "__getitem__", lambda self, key: (seen.append(key), inner(self, key))[1]
        )
        for _ in range(2):  # the second pass of the same epoch is in another order
            list(loader)
    for batch in (0, 7, 8, 15):
        assert data.train_samples(batch) == [index for _, _, index in seen[batch * 16 : (batch + 1) * 16]]


def test_a_bad_batch_among_those_that_are_accumulated_is_found(tmp_path):
    stopped = fit(tmp_path, {2: math.nan}, accumulate_grad_batches=4, enable_checkpointing=False)
    assert "epoch 0, step 0 (process 0: loss nan in batch 2 of samples" in stopped.error


def test_a_batch_without_a_loss_is_none_that_is_wrong(tmp_path):
    assert not hasattr(fit(tmp_path, {2: None}, epochs=1, enable_checkpointing=False), "error")


def test_rollback_goes_back_to_the_last_copy_and_on_with_the_next_batch(tmp_path):
    guard = LossGuard("rollback", every_n_steps=4)
    with pytest.warns(UserWarning, match=r"step 6 .*; rolled back to step 4, .*\(rollback 1 of 3\)"):
        went_on = fit(tmp_path, {6: math.nan}, guard=guard, enable_checkpointing=False)
    before = went_on.weights.before
    assert equal(before[7], before[4])
    assert not equal(before[8], before[7])
    assert all(bool(tensor.isfinite().all()) for tensor in before[-1])
    assert went_on.global_step == 16
    assert guard.rollbacks == 1


def test_rollback_right_after_a_growth_keeps_the_grown_model_and_its_average(tmp_path):
    average = GrowingEMA(decay=0.5)
    growth = ParameterGrowthCallback({1: 8})
    with pytest.warns(UserWarning, match="step 8 .*; rolled back to step 8"):
        went_on = fit(tmp_path, {8: math.nan}, growth, average, guard=LossGuard("rollback"), enable_checkpointing=False)
    assert went_on.global_step == 16
    assert len(growth.events) == 1
    assert all(bool(tensor.isfinite().all()) for tensor in average._average_model.state_dict().values())


def test_too_many_rollbacks_stop_the_fit(tmp_path):
    guard = LossGuard("rollback", max_rollbacks=2)
    with pytest.warns(UserWarning, match="rollback 2 of 2"):
        stopped = fit(tmp_path, {3: math.nan, 5: math.inf, 9: math.nan}, guard=guard, enable_checkpointing=False)
    assert "step 9" in stopped.error and "stopped after 2 rollbacks" in stopped.error


def test_a_guard_changes_no_bit_of_a_fit_without_faults(tmp_path):
    guarded = fit(tmp_path, {}, guard=LossGuard("rollback", every_n_steps=3), enable_checkpointing=False)
    plain = fit(tmp_path, {}, guard=Callback(), enable_checkpointing=False)
    assert equal(guarded.weights.before[-1], plain.weights.before[-1])


def test_wrong_settings_are_told():
    with pytest.raises(ValueError, match="action: unknown value 'rolback', did you mean 'rollback'"):
        LossGuard("rolback")
    with pytest.raises(ValueError, match="every_n_steps: expected at least 1, got 0"):
        LossGuard(every_n_steps=0)


def test_summary_tells_every_size_and_survives_a_resume(tmp_path, capsys):
    def callbacks(folder):
        best = ModelCheckpoint(folder, "best{step}", monitor="val/acc1", mode="max")
        every = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=4)
        return ParameterGrowthCallback({1: 8}), TrainingMonitor(), RunSummary(), best, every

    whole = fit(tmp_path / "a", {}, *callbacks(tmp_path / "a"))
    found = json.loads((tmp_path / "a" / "summary.json").read_text())["stages"]
    assert [stage["tokens"] for stage in found] == [{"qkv": n, "proj": n, "ffn": 4 * n} for n in (4, 8)]
    assert [stage["steps"] for stage in found] == [8, 8]
    (monitor,) = (one for one in whole.callbacks if isinstance(one, TrainingMonitor))
    assert sum(stage["training_flops"] for stage in found) == monitor.training_flops
    assert found[0]["training_flops"] < found[1]["training_flops"]
    for stage, steps in zip(found, ("best=8", "best=16"), strict=False):
        assert f"{steps.replace('best=', 'beststep=')}.ckpt" in stage["best"]["path"]
    assert "Run summary" in capsys.readouterr().out

    fit(tmp_path / "b", {}, *callbacks(tmp_path / "b"), ckpt_path=tmp_path / "a" / "step=12.ckpt")
    resumed = json.loads((tmp_path / "b" / "summary.json").read_text())["stages"]
    kept = ("tokens", "steps", "training_flops")
    assert [[stage[name] for name in kept] for stage in resumed] == [[stage[name] for name in kept] for stage in found]
    assert resumed[0] == found[0]
    assert resumed[1]["seconds"] > 0

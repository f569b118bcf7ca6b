"""Random patches are left out in training, fewer of them as training goes on, and what that costs is counted."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.layers import PatchDropout

from callbacks import ParameterGrowthCallback, PatchDropSchedule, TrainingMonitor
from lit_tokenformer.cost import model_cost
from lit_tokenformer.data import Augmentation, ImageDataModule
from lit_tokenformer.models import create_backbone, preset_config
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier

pytestmark = pytest.mark.usefixtures("few_digits")  # 8 batches of 16
PRESET = "tokenformer_vit_tiny_patch16_224"
TINY = {"dim": 8, "depth": 1, "num_heads": 2, "patch_size": 2, "param_tokens": 4}


def make_task(**overrides):
    return LitImageClassifier(PRESET, num_classes=10, image_size=8, overrides={**TINY, **overrides})


def fit(task, *callbacks, max_epochs=2, ckpt_path=None, **settings):
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        limit_val_batches=0,
        **settings,
    )
    data = ImageDataModule("digits", batch_size=16, seed=3, num_workers=0, augmentation=Augmentation())
    trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.mark.parametrize("prefix", [{}, {"class_token": False, "global_pool": "avg"}], ids=["class token", "none"])
def test_a_model_sees_what_patch_dropout_of_timm_leaves_and_all_of_it_out_of_training(prefix):
    model = create_backbone(PRESET, **TINY, **prefix, image_size=8, patch_drop_rate=0.7)
    image, seen = torch.randn(3, 3, 8, 8), []
    model.blocks[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model.eval()(image)
    model.train()(image)
    torch.manual_seed(5)
    model(image)
    torch.manual_seed(5)
    expected = PatchDropout(0.7, model.config.num_prefix_tokens)(seen[0])
    assert torch.equal(seen[2], expected) and not torch.equal(seen[1], seen[2])
    assert seen[0].shape[1] == model.config.num_positions
    assert seen[2].shape[1] == model.config.num_data_tokens == int(16 * 0.3) + model.config.num_prefix_tokens


def test_features_of_all_patches_are_given_in_training_too():
    model = create_backbone(PRESET, **TINY, image_size=8, patch_drop_rate=0.5).train()
    (features,) = model.forward_intermediates(torch.randn(2, 3, 8, 8), indices=1, intermediates_only=True)
    assert features.shape == (2, 8, 4, 4)


def test_a_causal_model_sees_its_patches_in_order():
    model = create_backbone(PRESET, **TINY, image_size=8, patch_drop_rate=0.5, causal=True)
    stem = model.stem
    with torch.no_grad():
        stem.patch_embed.proj.weight.zero_()
        stem.patch_embed.proj.bias.zero_()
        stem.pos_embed[0] = torch.arange(17.0)[:, None]
    seen = []
    model.blocks[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model.train()(torch.zeros(4, 3, 8, 8))
    places = seen[0][..., 0]
    assert (places.diff(dim=1)[:, 1:] > 0).all()


@pytest.mark.parametrize(
    ("unit", "schedule", "rates"),
    [
        ("epoch", {1: 0.25}, [0.5] * 8 + [0.25] * 8),
        ("step", {3: 0.25, 10: 0.0}, [0.5] * 3 + [0.25] * 7 + [0.0] * 6),
    ],
)
def test_the_rate_follows_the_schedule_and_so_does_what_is_counted(unit, schedule, rates):
    seen, tokens = [], []
    task = make_task(patch_drop_rate=0.5)
    task.backbone.blocks[0].register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].shape[1]))

    class Watch(TrainingMonitor):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            super().on_train_batch_end(trainer, pl_module, *rest)
            seen.append((pl_module.backbone.config.patch_drop_rate, self.training_flops, self.data_tokens))

    fit(task, Watch(log_images=0), PatchDropSchedule(schedule, unit))
    assert [rate for rate, *_ in seen] == rates
    configs = [preset_config(PRESET, **TINY, num_classes=10, image_size=8, patch_drop_rate=rate) for rate in rates]
    assert tokens == [config.num_data_tokens for config in configs]
    assert seen[-1][1] == sum(16 * model_cost(config).training_flops for config in configs)
    assert seen[-1][2] == sum(16 * config.num_data_tokens for config in configs)


def test_a_resumed_run_sees_the_same_patches_bit_for_bit(tmp_path):
    def run(ckpt_path=None):
        seed_everything(7 if ckpt_path is None else 99)
        task = make_task(patch_drop_rate=0.5)
        growth = ParameterGrowthCallback({6: 8}, unit="step")
        callbacks = [growth, PatchDropSchedule({6: 0.0}, unit="step")]
        if ckpt_path is None:
            callbacks.append(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1))
        fit(task, *callbacks, ckpt_path=ckpt_path)
        return task

    whole = run()
    for step in (4, 8):
        resumed = run(tmp_path / f"step={step}.ckpt")
        assert resumed.backbone.config.patch_drop_rate == 0
        for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_trigger_goes_by_what_a_step_costs():
    task = make_task(patch_drop_rate=0.75)
    growth = ParameterGrowthCallback({1: 8}, unit="step", trigger="plateau", window=2, cooldown=0, patience=99)
    before = task.cost().training_flops
    fit(task, growth, PatchDropSchedule({1: 0.0}), max_epochs=2)
    assert task.cost().training_flops > 2 * before
    assert growth._signal._costs == {"": task.cost().training_flops}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": [0.5]}, r"schedule: expected a mapping by epoch, got \[0.5\]"),
        ({"schedule": {-1: 0.5}}, "schedule: expected a non-negative integer as epoch, got -1"),
        ({"schedule": {3: 0.5, 2: 0.0}}, "schedule: keys must increase .got epoch 2 after epoch 3."),
        ({"schedule": {3: 1.0}}, "schedule: epoch 3: expected a rate in \\[0, 1\\), got 1.0"),
        ({"schedule": {3: 0.0}, "unit": "batch"}, "unit: .*batch"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PatchDropSchedule(**settings)


def test_what_cannot_be_is_told_before_the_fit():
    with pytest.raises(ValueError, match=r"schedule: epoch 2 is beyond the end of the fit \(trainer.max_epochs=2\)"):
        fit(make_task(patch_drop_rate=0.5), PatchDropSchedule({2: 0.0}))
    with pytest.raises(ValueError, match=r"schedule: step 16 is beyond the end of the fit \(16 optimizer steps\)"):
        fit(make_task(patch_drop_rate=0.5), PatchDropSchedule({16: 0.0}, unit="step"))
    fit(make_task(patch_drop_rate=0.5), PatchDropSchedule({16: 0.0}, unit="step"), fast_dev_run=True)
    text = LitCausalLM("tokenformer_lm_tiny", vocab_size=9, context_length=8)
    with pytest.raises(ValueError, match="schedule: no model has an image stem"):
        PatchDropSchedule({1: 0.0}).setup(Trainer(logger=False, max_epochs=3), text, "fit")
    with pytest.raises(ValueError, match="stem: .*'token' needs patch_drop_rate: 0"):
        preset_config("tokenformer_lm_tiny", patch_drop_rate=0.5)

"""Language modelling: what is predicted from what, scores, growth, checkpoints."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from callbacks import ParameterGrowthCallback, TrainingMonitor
from lit_tokenformer.growth import grow
from lit_tokenformer.models import create_backbone, list_presets, preset_config
from lit_tokenformer.tasks import LitCausalLM, LRSchedule

SIZES = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 8, "rotary_fraction": 0.5}


def make_task(vocab_size=20, context_length=12, **settings):
    return LitCausalLM("tokenformer_lm_tiny", vocab_size, context_length, overrides=SIZES, **settings)


def make_backbone(**settings):
    sizes = {**SIZES, "vocab_size": 20, "context_length": 12, **settings}
    return create_backbone("tokenformer_lm_tiny", **sizes).double().eval()


class Tokenizer:
    def to_json(self):
        return '{"a": "tokenizer"}'


class Data(LightningDataModule):
    """Blocks of a rule that can be learned: each token is the one before it plus one."""

    tokenizer = Tokenizer()
    vocab_size, context_length, separator_id, batch_size = 20, 12, 19, 4
    num_train_samples = 16

    def blocks(self, count):
        return [(torch.arange(13) + start) % 20 for start in range(count)]

    def train_dataloader(self):
        return DataLoader(self.blocks(16), batch_size=4)

    def val_dataloader(self):
        blocks = self.blocks(6)
        blocks[-1][7:] = -100
        return DataLoader(blocks, batch_size=4)

    test_dataloader = val_dataloader

    def bytes_per_token(self, stage):
        return 2.5


def fit(folder, callbacks=(), epochs=2, ckpt_path=None, **settings):
    seed_everything(0)
    task = make_task(schedule=LRSchedule("constant"), **settings)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[ModelCheckpoint(folder, save_last=True), *callbacks],
        logger=CSVLogger(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(task, datamodule=Data(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return task, trainer


# -- the backbone


def test_metrics_that_can_be_monitored_are_those_that_are_logged(tmp_path):
    task, trainer = fit(tmp_path, epochs=1)
    assert {name for name in trainer.callback_metrics if not name.startswith("size/")} == task.logged_metrics()


def test_a_token_sees_none_after_it():
    model = make_backbone()
    tokens = torch.randint(20, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 20
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=0)
    assert (before[:, 7:] != after[:, 7:]).any()


def test_positions_are_relative():
    model = make_backbone()
    tokens = torch.randint(20, (1, 6))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens], dim=1)
    state = model.new_state(10, padding=torch.tensor([4]))
    torch.testing.assert_close(model(padded, state=state)[:, 4:], model(tokens), rtol=0, atol=1e-14)


@pytest.mark.parametrize("parts", [[12], [5, 7], [4, 1, 1, 6], [1] * 12])
def test_reading_in_parts_gives_the_same(parts):
    model = make_backbone()
    tokens = torch.randint(20, (3, 12))
    state = model.new_state(12)
    found = torch.cat([model(part, state=state) for part in tokens.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(found, model(tokens), rtol=0, atol=1e-13)


def test_a_state_that_is_full_or_older_than_a_growth_is_refused():
    model = make_backbone()
    state = model.new_state(4)
    model(torch.zeros(1, 3, dtype=torch.long), state=state)
    with pytest.raises(ValueError, match=r"state: capacity exceeded \(got 5 data tokens, expected at most 4\)"):
        model(torch.zeros(1, 2, dtype=torch.long), state=state)
    grow(model.blocks[1].mlp, 64)
    with pytest.raises(ValueError, match="created before a growth"):
        model(torch.zeros(1, 1, dtype=torch.long), state=state)
    state = model.new_state(4)
    grow(model, 64)
    with pytest.raises(ValueError, match="created before a growth"):
        model(torch.zeros(1, 1, dtype=torch.long), state=state)


def test_documents_do_not_see_each_other():
    model = make_backbone()
    first, second = torch.randint(20, (1, 5)), torch.randint(20, (1, 7))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    both = model(torch.cat([first, second], dim=1), documents=documents)
    torch.testing.assert_close(both[:, :5], model(first), rtol=0, atol=1e-13)
    torch.testing.assert_close(both[:, 5:], model(second), rtol=0, atol=1e-13)  # rotary positions are relative


@pytest.mark.parametrize(
    "name", [name for name in list_presets() if name.startswith("tokenformer") and preset_config(name).causal]
)
def test_head_and_embedding_are_one_parameter_through_growth_and_loading(name):
    small = {**SIZES, "vocab_size": 20, "context_length": 12}
    model, other = create_backbone(name, **small), create_backbone(name, **small)
    grow(model, 16)
    other.load_state_dict(model.state_dict())
    for one in (model, other):
        assert one.head.weight is one.stem.embedding.weight
        assert one.param_tokens == {"qkv": 16, "proj": 16, "ffn": 64}
    assert create_backbone(name, **small, tie_embeddings=False).head.weight is not model.stem.embedding.weight


@pytest.mark.parametrize("method", ["split", "zero_keys"])
def test_growth_keeps_the_logits(method):
    model = make_backbone()
    tokens = torch.randint(20, (2, 12))
    before = model(tokens)
    grow(model, 24, method)
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rotary_fraction": 0.1}, "rotary_fraction: invalid number of rotary dimensions .got 1 = 0.1 of 16"),
        ({"rotary_fraction": 1.5}, "rotary_fraction: expected a share"),
        ({"mixer": "wkv"}, "mixer: unsupported combination: 'wkv' needs positions: none, got rotary"),
        ({"head": "image"}, "head: unsupported combination"),
        ({"vocab_size": 0}, "vocab_size: expected a whole number of at least 1"),
        ({"positions": "rotray"}, "did you mean 'rotary'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_backbone(**settings)


# -- the task


def test_loss_is_that_of_the_next_token_and_padding_does_not_count():
    task = make_task().double()
    batch = torch.randint(20, (3, 13))
    batch[1, 6:] = -100
    logits = task(batch[:, :-1].clamp_min(0))
    expected = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=-100)
    loss, count = task._loss(batch)
    assert count == 12 + 5 + 12
    torch.testing.assert_close(loss / count, expected, rtol=1e-12, atol=0)


def test_scores_cover_every_token_once(tmp_path):
    task = make_task()
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    data = Data()
    (scores,) = trainer.validate(task, datamodule=data, verbose=False)
    blocks = torch.stack(data.val_dataloader().dataset)
    with torch.no_grad():
        logits = task(blocks[:, :-1].clamp_min(0))
    loss = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten(), ignore_index=-100).item()
    assert scores["val/loss"] == pytest.approx(loss, rel=1e-6)
    assert scores["val/perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert scores["val/bits_per_byte"] == pytest.approx(loss / math.log(2) / 2.5, rel=1e-6)
    (scores,) = trainer.test(task, datamodule=data, verbose=False)
    assert scores["test/loss"] == pytest.approx(loss, rel=1e-6)
    Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=5).fit(task, datamodule=data)


def test_without_cross_documents_a_separator_ends_what_is_seen():
    task = make_task(separator_id=19, cross_documents=False).double()
    batch = torch.randint(19, (1, 13))
    batch[0, 5] = 19
    loss, count = task._loss(batch)
    parts = [task._loss(batch[:, :7]), task._loss(batch[:, 6:])]  # the separator predicts the next document's first
    torch.testing.assert_close(loss, sum(part for part, _ in parts), rtol=1e-12, atol=0)
    assert count == sum(number for _, number in parts)


def test_it_learns_grows_by_epoch_and_by_step_and_resumes_exactly(tmp_path):
    for unit, schedule in (("epoch", {2: 16, 4: 24}), ("step", {6: 16, 17: 24})):
        whole, trainer = fit(tmp_path / unit, [ParameterGrowthCallback(schedule, unit=unit)], epochs=6)
        assert whole.backbone.param_tokens["qkv"] == 24
        fit(tmp_path / f"{unit}-part", [ParameterGrowthCallback(schedule, unit=unit)], epochs=5)
        last = tmp_path / f"{unit}-part" / "last.ckpt"
        again, _ = fit(tmp_path / f"{unit}-rest", [ParameterGrowthCallback(schedule, unit=unit)], 6, str(last))
        for name, weight in whole.state_dict().items():
            assert torch.equal(weight, again.state_dict()[name]), name
        assert trainer.callback_metrics["train/loss"] < 2.9 < math.log(20)


def test_tokens_throughput_and_flops_are_told(tmp_path, capsys):
    monitor = TrainingMonitor()
    task, trainer = fit(tmp_path, [monitor])
    assert monitor.data_tokens == 2 * 16 * 12
    assert monitor.training_flops == 2 * 16 * task.cost().training_flops
    trainer.logger.save()
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert "compute/data_tokens_per_second" in text and "compute/training_flops" in text


def test_checkpoints_hold_the_tokenizer(tmp_path):
    fit(tmp_path, epochs=1)
    assert (tmp_path / "tokenizer.json").read_text() == Tokenizer().to_json()
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["tokenizer"] == Tokenizer().to_json()
    task = LitCausalLM.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert task.tokenizer_json == Tokenizer().to_json()
    trainer = Trainer(accelerator="cpu", logger=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert torch.load(tmp_path / "again.ckpt", weights_only=True)["tokenizer"] == Tokenizer().to_json()


def test_a_checkpoint_is_not_read_with_another_tokenizer(tmp_path):
    fit(tmp_path, epochs=1)

    class Other(Data):
        class tokenizer:
            def to_json():
                return '{"another": "tokenizer"}'

    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match="data.tokenizer: does not match the checkpoint's tokenizer"):
        trainer.validate(make_task(), datamodule=Other(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_z_loss_is_added_to_the_training_loss_only():
    batch = torch.randint(20, (2, 13))
    seed_everything(0)
    plain = make_task()
    seed_everything(0)
    with_z = make_task(z_loss=1e-2)
    with_z.log = plain.log = lambda *args, **kwargs: None
    assert with_z.training_step(batch, 0) > plain.training_step(batch, 0)
    assert with_z._loss(batch)[0] == plain._loss(batch)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 30}, "data.tokenizer: .*got 30, expected at most vocab_size 20"),
        ({"context_length": 64}, "data.block_size: expected at most the model's context_length 12, got 64"),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused(change, message):
    data = Data()
    for name, value in change.items():
        setattr(data, name, value)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match=message):
        trainer.validate(make_task(), datamodule=data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "vit_tiny_patch16_224"}, "is not a causal language model"),
        ({"preset": "tokenformer_15m"}, "did you mean"),
        ({"z_loss": -1.0}, "model.z_loss: expected at least 0"),
        ({"cross_documents": False}, "needs separator_id"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LitCausalLM(**settings)


def test_a_model_is_matched_to_another_one():
    sizes = {key: SIZES[key] for key in ("dim", "depth", "num_heads")}

    def blocks(task):
        return sum(parameter.numel() for parameter in task.backbone.blocks.parameters())

    twin = LitCausalLM("transformer_tiny", 20, 12, overrides={**sizes, "rotary_fraction": 0.5})
    wide = {**SIZES, "dim": 64}
    del wide["param_tokens"]
    matched = LitCausalLM("tokenformer_lm_tiny", 20, 12, overrides=wide, match="parameters")
    linear = LitCausalLM(
        "tokenformer_lm_tiny", 20, 12, overrides={**wide, "projection": "linear", "feed_forward": "mlp"}
    )
    assert blocks(matched) == blocks(linear)
    for by in ("parameters", "flops"):
        given = {**sizes, "projection": "pattention", "rotary_fraction": 0.5}
        task = LitCausalLM("gpt2_tiny", 20, 12, overrides=given, match=by, match_to="transformer_tiny")
        assert abs(blocks(task) / blocks(twin) - 1) < 0.05
        again = LitCausalLM(**{**task.hparams})
        assert again.backbone.param_tokens == task.backbone.param_tokens


def test_layerwise_learning_rates_are_multiples_in_groups_of_their_own():
    plain, scaled = (LitCausalLM("rwkv4_tiny", 20, 12, layerwise_lr=wanted) for wanted in (False, True))
    assert {group["lr"] for group in plain.build_optimizer().param_groups} == {6e-4}
    rates = {
        name: group["lr"] / 6e-4
        for group in scaled.build_optimizer().param_groups
        for parameter in group["params"]
        for name, one in scaled.named_parameters()
        if one is parameter
    }
    assert len(rates) == len(list(scaled.parameters()))
    for name, rate in rates.items():
        assert rate == pytest.approx({"time_decay": 2, "time_first": 3}.get(name.split(".")[-1], 1)), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"match": "paramters"}, "model.match: unknown value 'paramters', did you mean 'parameters'"),
        (
            {"match": "flops", "overrides": {"param_tokens": 8}},
            "model.match: conflicts with .*param_tokens",
        ),
        ({"match_to": "gpt2_tiny"}, "model.match_to: needs model.match"),
        ({"match": "flops", "match_to": "gpt3_tiny"}, "did you mean 'gpt2_tiny'"),
        ({"match": "flops", "preset": "gpt2_tiny"}, "model.match: the feed-forward has no Pattention layer"),
        ({"cross_documents": False, "separator_id": 3, "preset": "rwkv4_tiny"}, "model.cross_documents: false needs"),
    ],
)
def test_what_cannot_be_matched_or_kept_apart_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LitCausalLM(**{"preset": "tokenformer_lm_tiny", "vocab_size": 20, "context_length": 12, **settings})

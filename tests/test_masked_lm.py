"""Masked language modelling: what the loss is of, scores, growth, checkpoints."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from callbacks import ParameterGrowthCallback
from lit_tokenformer.data import ImageDataModule, MaskedTextDataModule, MultiTaskDataModule, TextDataModule
from lit_tokenformer.tasks import LitCausalLM, LitMaskedLM, LitMultiTask, LRSchedule

SIZES = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 8, "projection": "pattention", "dropout": 0.0}


def make_task(preset="mosaic_bert_tiny", **overrides):
    return LitMaskedLM(preset, 20, 12, overrides={**SIZES, "attn_dropout": 0.0, **overrides})


def examples(count, seed=0):
    """Rising sequences of different length with a hidden token (id 0) or two in each."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        length = 5 + number % 8
        tokens, labels = torch.zeros(12, dtype=torch.long), torch.full((12,), -100)
        tokens[:length] = torch.arange(length) + 1 + number % 5
        hidden = torch.randperm(length, generator=generator)[: 1 + number % 2]
        labels[hidden] = tokens[hidden]
        tokens[hidden] = 0
        found.append((tokens, labels, torch.tensor(length)))
    return found


def batch_of(samples):
    return tuple(torch.stack(parts) for parts in zip(*samples, strict=True))


class Data(LightningDataModule):
    vocab_size, context_length, num_train_samples, batch_size = 20, 12, 64, 8

    def train_dataloader(self):
        return DataLoader(examples(64), batch_size=8)

    def val_dataloader(self):
        return DataLoader(examples(13, seed=1), batch_size=4)

    test_dataloader = val_dataloader


def fit(folder, task, steps=4, callbacks=(), ckpt_path=None):
    seed_everything(0)
    trainer = Trainer(
        default_root_dir=folder,
        max_steps=steps,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
        enable_model_summary=False,
    )
    trainer.fit(task, Data(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_metrics_that_can_be_monitored_are_those_that_are_logged(tmp_path):
    task = make_task("bert_tiny")
    trainer = fit(tmp_path, task, steps=8)
    assert {name for name in trainer.callback_metrics if not name.startswith("size/")} == task.logged_metrics()


@pytest.mark.parametrize("preset", ["mosaic_bert_tiny", "bert_tiny", "tokenformer_mlm_tiny"])
def test_the_loss_is_the_cross_entropy_of_all_logits_at_the_hidden_tokens(preset):
    task = make_task(preset).double()
    task.log = lambda *args, **kwargs: None
    task.backbone.head.bias.data.normal_()
    batch = batch_of(examples(6))
    expected = F.cross_entropy(task(batch[0], batch[2]).flatten(0, 1), batch[1].flatten())
    loss = task.training_step(batch, 0)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    parameters = list(task.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(loss, parameters, allow_unused=True),
        torch.autograd.grad(expected, parameters, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_scores_are_means_over_hidden_tokens_whatever_their_batches(tmp_path):
    task = make_task()
    trainer = fit(tmp_path, task)
    (scores,) = trainer.validate(task, Data(), verbose=False)
    tokens, labels, lengths = batch_of(examples(13, seed=1))
    with torch.no_grad():
        logits = task.eval()(tokens, lengths)[labels >= 0]
    labels = labels[labels >= 0]
    assert scores["val/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert scores["val/accuracy"] == pytest.approx((logits.argmax(dim=-1) == labels).float().mean().item())
    assert scores["val/perplexity"] == pytest.approx(F.cross_entropy(logits, labels).exp().item(), rel=1e-5)
    assert "test/accuracy" in trainer.test(task, Data(), verbose=False)[0]


def test_a_batch_without_a_hidden_token_is_worth_nothing():
    task = make_task()
    task.log = lambda *args, **kwargs: None
    tokens, labels, lengths = batch_of(examples(2))
    loss = task.training_step((tokens, torch.full_like(labels, -100), lengths), 0)
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in task.parameters())


@pytest.mark.parametrize("preset", ["mosaic_bert_tiny", "bert_tiny", "tokenformer_mlm_tiny"])
def test_unpadded_a_batch_takes_the_operations_of_its_sequences_alone(preset):
    model = make_task(preset, unpad=True).backbone
    tokens, _, lengths = batch_of(examples(6))

    def operations(tokens, lengths):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model.forward_features(tokens, lengths=lengths)
        return counter.get_total_flops()

    alone = [operations(one[None, :length], length[None]) for one, length in zip(tokens, lengths, strict=True)]
    assert operations(tokens, lengths) == sum(alone)


@pytest.mark.slow
def test_it_learns_grows_and_resumes_bit_for_bit(tmp_path):
    def run(name, ckpt_path=None):
        seed_everything(0)
        task = make_task()
        task.schedule = LRSchedule("constant")
        growth = ParameterGrowthCallback({4: 16, 12: 32}, unit="step")
        keep = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=8, save_top_k=-1)
        return task, fit(tmp_path / name, task, 24, [growth, keep], ckpt_path)

    task, trainer = run("one")
    assert task.backbone.param_tokens == {"qkv": 32, "proj": 32, "ffn": 128}
    assert trainer.callback_metrics["val/loss"] < 2.9  # ln 20 = 3.0
    rest, _ = run("two", tmp_path / "one" / "step=8.ckpt")  # the end of an epoch, between the growths
    for name, tensor in task.state_dict().items():
        assert torch.equal(tensor, rest.state_dict()[name]), name


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model.preset: 'gpt2_tiny' is not a masked language model"):
        LitMaskedLM("gpt2_tiny", 20, 12)
    with pytest.raises(ValueError, match="head: unsupported combination: .* needs causal: false, got true"):
        LitMaskedLM("bert_tiny", 20, 12, overrides={"causal": True})
    task = LitMaskedLM("bert_tiny", 19, 12, overrides=SIZES)
    with pytest.raises(ValueError, match=r"data.tokenizer: .*got 20, expected at most vocab_size 19"):
        fit(tmp_path, task)
    with pytest.raises(ValueError, match=r"data.block_size: expected at most the model's context_length 8, got 12"):
        fit(tmp_path, LitMaskedLM("bert_tiny", 20, 8, overrides=SIZES))


@pytest.mark.parametrize("task", [make_task(), LitCausalLM("gpt2_tiny", 320, 16, overrides={"dim": 32})])
def test_data_of_another_kind_are_refused(task, tmp_path):
    data = {True: TextDataModule, False: MaskedTextDataModule}[task.masked]("python_docs", block_size=8, batch_size=2)
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, max_steps=1)
    with pytest.raises(ValueError, match=r"^data: Lit\w+ needs \w*TextDataModule, got \w*TextDataModule"):
        trainer.fit(task, data)


def test_masked_text_is_no_part_of_several_tasks(tmp_path):
    text = MaskedTextDataModule("python_docs", block_size=8, batch_size=2)
    data = MultiTaskDataModule(ImageDataModule("digits"), text)
    sizes = {"dim": 32, "depth": 1, "num_heads": 2, "rotary_fraction": 0.5}
    task = LitMultiTask("tokenformer_lm_tiny", 10, 8, 320, 8, overrides=sizes, image={"patch_size": 4})
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, max_steps=1)
    with pytest.raises(ValueError, match="^data: LitCausalLM needs TextDataModule"):
        trainer.fit(task, data)


def test_compiled_it_is_not_compiled_anew_for_each_batch(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "cache_size_limit", 8)
    torch._dynamo.reset()
    task = make_task("bert_tiny")
    task.log = lambda *args, **kwargs: None
    counts = torch._dynamo.testing.CompileCounter()
    task.backbone.compile(dynamic=task.dynamic_shapes, backend=counts)
    made = []
    for seed in range(6):
        tokens, labels, lengths = batch_of(examples(8, seed))
        labels[: seed % 4] = -100  # fewer tokens to be told
        task.training_step((tokens, labels, lengths), 0)
        made.append(counts.frame_count)
    assert made[-1] == made[2]

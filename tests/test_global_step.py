"""The gradient of an optimizer step is that of the mean over all its items, whatever micro-batches they are in."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, default_collate

from callbacks import PreemptionCheckpoint
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier, LitMaskedLM, LitMultiTask, LRSchedule

SIZES = {"dim": 16, "depth": 1, "num_heads": 2, "param_tokens": 8, "rotary_fraction": 0.5}
MASKED = {"dim": 16, "depth": 1, "num_heads": 2, "param_tokens": 8, "projection": "pattention", "dropout": 0.0}
FIXED = {"schedule": LRSchedule("constant"), "optimizer": lambda params: torch.optim.SGD(params, lr=0.5)}
IMAGES = {"num_classes": 10, "image_size": 8}


def causal():
    return LitCausalLM("tokenformer_lm_tiny", 17, 6, overrides=SIZES, z_loss=0.01, **FIXED)


def masked():
    return LitMaskedLM("mosaic_bert_tiny", 17, 6, overrides=MASKED, **FIXED)


def image():
    sizes = {**SIZES, "patch_size": 4}
    return LitImageClassifier("tokenformer_vit_tiny_patch16_224", **IMAGES, overrides=sizes, **FIXED)


def several(weights=None):
    given = {**IMAGES, "vocab_size": 17, "context_length": 6, "overrides": SIZES, "image": {"patch_size": 4}}
    return LitMultiTask("tokenformer_lm_tiny", **given, loss_weights=weights, **FIXED)


TASKS = {
    "causal": causal,
    "masked": masked,
    "image": image,
    "several": several,
    "several, learned weights": lambda: several("uncertainty"),
}


def samples(kind, equal=False):
    """24 of them; of texts, another number of tokens has a label in each unless they are to be equal."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(24):
        picture = (
            torch.randn(3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(10, (), generator=generator),
        )
        tokens = torch.randint(17, (7,), generator=generator)
        length = 5 if equal else int(torch.randint(1, 7, (), generator=generator))
        ragged = tokens.where(torch.arange(7) <= length, -100)
        labels = tokens[:6].where(torch.arange(6) < length, -100)
        found.append({"image": picture, "causal": ragged, "masked": (tokens[:6], labels, torch.tensor(6))}.get(kind))
        if kind.startswith("several"):
            found[-1] = {"image": picture, "text": ragged}
    return found


class Gradients(Callback):
    """Keeps what callbacks see of the gradient before each optimizer step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]).clone())


def fit(kind, batch_sizes, accumulate, data=None, **settings):
    """Weights and gradients after the samples were read once, in batches of these sizes."""
    torch.manual_seed(0)
    task, gradients = TASKS[kind]().double(), Gradients()
    task.setup = lambda stage: None
    numbers = iter(range(24))
    batches = [[next(numbers) for _ in range(size)] for size in batch_sizes]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        precision="64-true",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.3,
        limit_val_batches=0,
        callbacks=[gradients],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(task, DataLoader(samples(kind) if data is None else data, batch_sampler=batches))
    return torch.cat([parameter.detach().flatten() for parameter in task.parameters()]), gradients.seen


@pytest.mark.parametrize("kind", TASKS)
def test_accumulated_micro_batches_train_as_one_large_batch(kind):
    large, gradients = fit(kind, [8, 8, 8], 1)
    small, accumulated = fit(kind, [2] * 12, 4)
    torch.testing.assert_close(accumulated, gradients, rtol=1e-10, atol=1e-12)  # as LossGuard and clipping see it
    torch.testing.assert_close(small, large, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", TASKS)
def test_a_step_of_fewer_micro_batches_at_the_end_of_an_epoch_is_a_mean_too(kind):
    large, _ = fit(kind, [16, 8], 1)
    small, _ = fit(kind, [4] * 6, 4)
    torch.testing.assert_close(small, large, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["image", "several"])
def test_batches_of_different_size_count_by_their_samples(kind):
    large, _ = fit(kind, [12, 12], 1)
    small, _ = fit(kind, [2, 10, 5, 7], 2)
    torch.testing.assert_close(small, large, rtol=1e-10, atol=1e-12)


def test_equal_micro_batches_are_averaged_bit_for_bit_as_lightning_does():
    data = samples("causal", equal=True)
    ours, _ = fit("causal", [4] * 6, 2, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LitCausalLM, "training_step", lambda task, batch, batch_idx: task.training_loss(batch)[0])
        theirs, _ = fit("causal", [4] * 6, 2, data)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_a_micro_batch_without_a_label_adds_nothing(kind):
    data = samples(kind)
    empty = (
        torch.full((7,), -100) if kind == "causal" else (torch.zeros(6).long(), torch.full((6,), -100), torch.tensor(6))
    )
    with_empty = [empty, empty, *data[:6], *data[:16]]
    large, _ = fit(kind, [8, 16], 1, with_empty)
    small, _ = fit(kind, [2, 2, 2, 2, 4, 4, 4, 4], 4, with_empty)
    assert large.isfinite().all()
    torch.testing.assert_close(small, large, rtol=1e-10, atol=1e-12)


class Batches:
    """Batches of these sizes, from where a checkpoint was saved."""

    def __init__(self, data, sizes):
        numbers = iter(data)
        self.batches = [default_collate([next(numbers) for _ in range(size)]) for size in sizes]
        self.place = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        while self.place < len(self.batches):
            self.place += 1
            yield self.batches[self.place - 1]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


class SavesWithin(Callback):
    """Save between the micro-batches of a step."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 5:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("kind", TASKS)
def test_a_resume_within_a_step_counts_the_items_before_it(kind, tmp_path):
    def train(*callbacks, ckpt_path=None):
        torch.manual_seed(0)
        task = TASKS[kind]().double()
        task.setup = lambda stage: None
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            precision="64-true",
            accumulate_grad_batches=4,
            limit_val_batches=0,
            callbacks=[PreemptionCheckpoint(), *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(task, Batches(samples(kind), [2] * 12), ckpt_path=ckpt_path, weights_only=True)
        assert trainer.global_step == 3
        return torch.cat([parameter.detach().flatten() for parameter in task.parameters()])

    whole = train(SavesWithin(tmp_path / "within.ckpt"))
    assert torch.equal(train(ckpt_path=tmp_path / "within.ckpt"), whole)

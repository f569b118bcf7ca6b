"""Muon for matrices and AdamW for the rest: the formula, which parameters it takes, growth, resume, command line."""

import copy
import math
import re
from functools import partial

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from callbacks import GrowingEMA, ParameterGrowthCallback
from lit_tokenformer.cli.main import main
from lit_tokenformer.errors import UserError
from lit_tokenformer.growth import grow
from lit_tokenformer.models import Pattention
from lit_tokenformer.optim import MuonWithAuxAdam, orthogonalize
from lit_tokenformer.tasks import LitCausalLM, LRSchedule


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def orthogonalized(g, steps=5):
    """Keller Jordan's Newton-Schulz iteration, https://kellerjordan.github.io/posts/muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if len(g) <= g.shape[1] else g.bfloat16().T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        xx = x @ x.T
        x = a * x + (b * xx + c * xx @ xx) @ x
    return (x if len(g) <= g.shape[1] else x.T).float()


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_matrices_take_the_published_step(shape, nesterov):
    weight = nn.Parameter(matrix(*shape))
    expected, momentum = weight.detach().clone(), torch.zeros(shape)
    optimizer = MuonWithAuxAdam([weight], lr=0.1, weight_decay=0.2, momentum=0.9, nesterov=nesterov)
    for seed in range(1, 4):
        gradient = weight.grad = matrix(*shape, seed)
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        update = orthogonalized(0.1 * gradient + 0.9 * momentum if nesterov else momentum)
        expected = (1 - 0.1 * 0.2) * expected - 0.1 * 0.2 * math.sqrt(max(shape)) * update
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=0.01)  # bfloat16; weights move by 0.3
    values = torch.linalg.svdvals(orthogonalized(gradient))
    assert values.min() > 0.5 and values.max() < 1.5


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
def test_steps_equal_those_of_torchs_muon_and_adamw(adjust_lr_fn):
    pytest.importorskip("torch", "2.9", reason="torch.optim.Muon")
    ours = [nn.Parameter(matrix(6, 4)), nn.Parameter(matrix(5, 4, 1)), nn.Parameter(matrix(1, 4, 2)[0])]
    theirs = copy.deepcopy(ours)
    groups = [
        {"params": [ours[0], ours[2]], "weight_decay": 0.3},
        {"params": [ours[1]], "use_muon": False, "weight_decay": 0.0},
    ]
    optimizer = MuonWithAuxAdam(groups, 0.02, adjust_lr_fn=adjust_lr_fn, aux_lr_scale=0.5, ns_dtype="bfloat16")
    muon = torch.optim.Muon(theirs[:1], 0.02, 0.3, adjust_lr_fn=adjust_lr_fn)
    settings = [{"params": theirs[2:], "weight_decay": 0.3}, {"params": theirs[1:2], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(settings, 0.01, (0.9, 0.95))
    for step in range(4):
        for seed, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            one.grad = matrix(len(one), one.numel() // len(one), 9 * step + seed).view_as(one)
            other.grad = one.grad.clone()
        for each in (optimizer, muon, adam):
            each.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_copy_and_a_restored_optimizer_continue_bit_equal():
    def trained(optimizer, weight, seeds):
        for seed in seeds:
            weight.grad = matrix(6, 4, seed)
            assert optimizer.step(lambda: torch.ones(())) == 1
        return weight.detach()

    weight = nn.Parameter(matrix(6, 4))
    optimizer = MuonWithAuxAdam([weight])
    trained(optimizer, weight, [1, 2])
    both = copy.deepcopy((optimizer, weight))
    fresh = nn.Parameter(weight.detach().clone())
    restored = MuonWithAuxAdam([fresh])
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = trained(optimizer, weight, [3, 4])
    assert torch.equal(trained(*both, [3, 4]), expected) and torch.equal(trained(restored, fresh, [3, 4]), expected)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"momentum": 1.0}, "^momentum: expected at least 0 and less than 1, got 1.0$"),
        ({"ns_steps": 0}, "^ns_steps: expected at least 1, got 0$"),
        ({"adjust_lr_fn": "orginal"}, "^adjust_lr_fn: .*original"),
        ({"ns_dtype": "float16"}, "^ns_dtype: .*float32"),
        ({"aux_lr_scale": -1}, "^aux_lr_scale: expected at least 0, got -1$"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(setting, message):
    with pytest.raises(UserError, match=message):
        MuonWithAuxAdam([nn.Parameter(matrix(2, 2))], **setting)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_newton_schulz_keeps_the_singular_vectors(shape, dtype):
    given = matrix(*shape)
    found = orthogonalize(given, dtype=dtype)
    assert found.dtype == dtype and found.shape == shape
    u, values, v = torch.linalg.svd(given, full_matrices=False)
    a, b, c = 3.4445, -4.775, 2.0315
    values /= given.norm()
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5  # the iteration on the singular values
    torch.testing.assert_close(found.float(), u * values @ v, rtol=0, atol=0.03 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize(("capability", "dtype"), [("AVX512", torch.bfloat16), ("AVX2", torch.float32)])
def test_the_precision_follows_the_processor(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert orthogonalize(matrix(3, 2)).dtype == dtype


def test_a_checkpoint_without_the_precision_is_read():
    weight = nn.Parameter(matrix(3, 2))
    state = MuonWithAuxAdam([weight]).state_dict()
    for group in state["param_groups"]:
        del group["ns_dtype"]
    optimizer = MuonWithAuxAdam([weight])
    optimizer.load_state_dict(state)
    weight.grad = matrix(3, 2, 1)
    optimizer.step()


@pytest.mark.parametrize("make", [MuonWithAuxAdam, getattr(torch.optim, "Muon", MuonWithAuxAdam)])
def test_identical_copies_are_refused(make):
    layer = Pattention(8, 8, num_tokens=4)
    before = layer.key_tokens
    with pytest.raises(UserError, match="^noise: 0 keeps the copies of a split identical under Muon.*expected more"):
        grow(layer, 8, noise=0, optimizer=make(layer.parameters()))
    assert layer.key_tokens is before
    grow(layer, 8, noise=0, optimizer=torch.optim.AdamW(layer.parameters()))
    grow(layer, 12, "zero", noise=0, optimizer=make(layer.parameters()))


def test_identical_rows_get_identical_updates_and_others_do_not():
    weight = nn.Parameter(matrix(4, 8).repeat_interleave(2, dim=0))
    optimizer = MuonWithAuxAdam([weight])
    for gradient in (matrix(4, 8, 1).repeat_interleave(2, dim=0), matrix(8, 8, 2)):
        before = weight.detach().clone()
        weight.grad = gradient
        optimizer.step()
        pairs = (weight.detach() - before).unflatten(0, (4, 2))
        same = torch.allclose(pairs[:, 0], pairs[:, 1], atol=1e-7)
        assert same == torch.equal(gradient[::2], gradient[1::2])


def task(**settings):
    sizes = {"dim": 16, "depth": 1, "num_heads": 2, "param_tokens": 8}
    optimizer = partial(MuonWithAuxAdam, lr=3e-3)
    given = {"schedule": LRSchedule("constant"), "optimizer": optimizer, "overrides": sizes, **settings}
    return LitCausalLM("tokenformer_lm_tiny", 17, 6, **given)


def test_muon_takes_the_matrices_of_the_blocks_alone():
    model = task()
    optimizer = model.build_optimizer()
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [
        (one["use_muon"], one["weight_decay"], [names[p] for p in one["params"]]) for one in optimizer.param_groups
    ]
    assert [one[:2] for one in found] == [(True, 0.1), (False, 0.1), (False, 0.0)]
    (_, _, muon), (_, _, rest), (_, _, bare) = found
    assert muon and all(re.search(r"\.blocks\.0\..*\.(key|value)_tokens$", name) for name in muon)
    assert all(".head." in name or ".stem." in name for name in rest) and all("norm" in name for name in bare)
    assert len(muon + rest + bare) == len(names)
    assert "use_muon" not in task(optimizer=torch.optim.AdamW).build_optimizer().param_groups[0]
    model.learning_rate = 1e-2
    assert {one["lr"] for one in model.build_optimizer().param_groups} == {1e-2}


def fit(folder, ckpt_path=None):
    seed_everything(0)
    growth = ParameterGrowthCallback({2: 16, 4: {"depth": 2}}, unit="step", ramp_steps=2)
    kept = ModelCheckpoint(folder, "end{epoch}", save_top_k=-1, auto_insert_metric_name=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=6,  # of one step
        callbacks=[growth, GrowingEMA(decay=0.9), kept],
        accumulate_grad_batches=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    tokens = torch.randint(17, (4, 7), generator=torch.Generator().manual_seed(1))
    model = task()
    trainer.fit(model, DataLoader(tokens, 2), ckpt_path=ckpt_path, weights_only=True)
    return model, trainer.optimizers[0]


def test_a_growing_fit_resumes_bit_equal(tmp_path):
    whole, optimizer = fit(tmp_path / "whole")
    for epoch in (0, 2, 4):  # before, between and after the growths
        model, other = fit(tmp_path / f"from-{epoch}", tmp_path / "whole" / f"end{epoch}.ckpt")
        weights = model.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in whole.state_dict().items())
        states = [[one.state[p] for group in one.param_groups for p in group["params"]] for one in (optimizer, other)]
        for ours, theirs in zip(*states, strict=True):
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_config_names_it(tmp_path, text_cache, capsys):
    growth = {"class_path": "ParameterGrowthCallback", "init_args": {"unit": "step", "schedule": {1: 16}}}
    settings = {"lr": 3e-3, "adjust_lr_fn": "original", "aux_lr_scale": 0.5}
    optimizer = {"class_path": "lit_tokenformer.optim.MuonWithAuxAdam", "init_args": settings}
    overrides = {"dim": 16, "depth": 1, "num_heads": 2, "param_tokens": 8}
    model = {"preset": "tokenformer_lm_tiny", "overrides": overrides, "optimizer": optimizer}
    data = {"block_size": 16, "batch_size": 4, "cache_dir": str(text_cache)}
    config = {
        "trainer": {"accelerator": "cpu", "max_steps": 2, "limit_val_batches": 1, "callbacks": [growth]}
        | {"default_root_dir": str(tmp_path), "logger": False, "enable_progress_bar": False},
        "model": {"class_path": "LitCausalLM", "init_args": model},
        "data": {"class_path": "TextDataModule", "init_args": data},
    }
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "one.yaml")]) == 0
    (saved,) = torch.load(next(tmp_path.glob("**/*.ckpt")), weights_only=True)["optimizer_states"]
    assert [one["use_muon"] for one in saved["param_groups"]] == [True, False, False]
    assert {one["aux_lr_scale"] for one in saved["param_groups"]} == {0.5}
    capsys.readouterr()
    settings["adjust_lr_fn"] = "other"
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "two.yaml")]) == 2
    assert re.search(
        r"^error: model.optimizer: adjust_lr_fn: unknown value 'other'", capsys.readouterr().err, re.MULTILINE
    )

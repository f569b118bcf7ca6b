"""Growth of hidden units and attention heads, and of axes that a user's own part declares."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from callbacks import GrowingEMA, ParameterGrowthCallback, TrainingMonitor
from lit_tokenformer.growth import Axis, grow, input_units, output_units
from lit_tokenformer.models import Tokenformer, create_backbone, model_size
from lit_tokenformer.models.config import MAY_CHANGE, config_changes
from lit_tokenformer.tasks import LitCausalLM, LitMaskedLM, LRSchedule

SIZES = {"dim": 32, "depth": 2, "num_heads": 2, "vocab_size": 17, "context_length": 12}
MODELS = {
    **{name: {} for name in ("gpt2", "pythia", "bert", "roberta", "mosaic_bert", "rwkv4", "transformer")},
    "pangu_pi": {"shortcut_reduction": 4},
    "vit": {},
    "tokenformer_lm": {"feed_forward": "mlp", "param_tokens": 6},
    "tokenformer_mlm": {"feed_forward": "glu", "series": 2, "param_tokens": 6, "positions": "alibi"},
}


def make(name, **more):
    """A model with weights that are all random, as after some training: zeros hide errors."""
    torch.manual_seed(0)
    if name == "vit":
        sizes = {"dim": 32, "depth": 2, "num_heads": 2, "image_size": 8, "patch_size": 4, "num_classes": 3}
        model = create_backbone("vit_tiny_patch16_224", **sizes, **more)
    else:
        model = create_backbone(f"{name}_tiny", **{**SIZES, **MODELS.get(name, {}), **more})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.double().eval()


def batch_for(model, size=16):
    generator = torch.Generator().manual_seed(1)
    if model.config.stem == "patch":
        return torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64)
    return torch.randint(17, (size, 10), generator=generator)


def larger(model, factor=2, more=1):
    """Totals of hidden units and heads; the remainder of a factor that is not whole is made by ``zero``."""
    kinds = [kind for kind in ("hidden", "heads") if kind in model_size(model)]
    return {kind: factor * model_size(model)[kind] + more for kind in kinds}


WRITES = {"gpt2": ("proj", "fc2"), "tokenformer_lm": ("proj", "fc2"), "rwkv4": ("value",)}
"""The layers whose weights are what units write."""


def relative(one, other):
    return float(((one - other).norm() / one.norm()).detach())


@pytest.mark.parametrize("method", ["split", "zero"])
@pytest.mark.parametrize("name", MODELS)
class TestEveryFamily:
    def test_the_output_does_not_change(self, name, method):
        model = make(name)
        x, wanted = batch_for(model), larger(model)
        before = model(x)
        grow(model, wanted, method=method)
        assert model_size(model).items() >= wanted.items() and model.grown
        assert relative(before, model(x)) <= 1e-12

    def test_new_units_move_within_two_steps(self, name, method):
        model = make(name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        grown = grow(model, larger(model), method=method, optimizer=optimizer)
        initial = {one.name: one.new.detach().clone() for one in grown}
        for _ in range(2):
            optimizer.zero_grad()
            model(batch_for(model)).square().mean().backward()
            optimizer.step()
        for one in grown:
            if one.name.endswith("attn.key.bias"):
                continue  # a constant in all keys changes no attention weight
            moved = (one.new.detach() != initial[one.name]) & one.grown.new(one.new)
            others = tuple(dim for dim in range(one.new.ndim) if dim != one.grown.dim)
            share = float(moved.any(dim=others).sum() / one.grown.mask().sum()) if others else float(moved.any())
            assert share > (0.85 if name == "rwkv4" else 0.999), one.name  # a ReLU that no token switches on stays

    def test_checkpoints_of_any_size_load(self, name, method):
        model = make(name)
        grow(model, larger(model), method=method)
        fresh = make(name)
        fresh.load_state_dict(copy.deepcopy(model.state_dict()))
        assert model_size(fresh) == model_size(model)
        assert torch.equal(fresh(batch_for(model)), model(batch_for(model)))


@pytest.mark.parametrize("name", ["gpt2", "tokenformer_lm", "rwkv4"])
def test_moments_of_old_units_are_kept_or_scaled_exactly(name):
    model = make(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    model(batch_for(model)).square().mean().backward()
    optimizer.step()
    moments = {key: dict(optimizer.state[parameter]) for key, parameter in model.named_parameters()}
    grown = grow(model, larger(model, more=0), optimizer=optimizer, noise=0.5)
    optimizer.zero_grad()
    model(batch_for(model)).square().mean().backward()
    for one in grown:
        state, before = optimizer.state[one.new], moments[one.name]
        source = torch.arange(one.grown.rows.after).div(2, rounding_mode="floor")
        block = torch.arange(one.grown.block)
        index = (source[:, None] * one.grown.block + block).flatten()
        for key, degree in (("exp_avg", 1), ("exp_avg_sq", 2)):
            wanted = before[key].index_select(one.grown.dim, index) * one.gradient_scale**degree
            assert torch.equal(state[key], wanted), (one.name, key)
        assert one.gradient_scale == (1.0 if one.name.split(".")[-2] in WRITES[name] else 0.5)


@pytest.mark.parametrize("name", ["gpt2", "mosaic_bert"])
def test_an_architecture_at_the_final_size_equals_the_grown_one(name):
    """``at_size`` gives the config from which a model has the shapes that growth leads to."""
    model = make(name)
    grow(model, larger(model, more=0))
    config = model.config.at_size(model.size)
    shapes = {key: value.shape for key, value in Tokenformer(config).state_dict().items()}
    assert shapes == {key: value.shape for key, value in model.state_dict().items() if "slope_of_head" not in key}


@pytest.mark.parametrize(("name", "found"), [("gpt2", set()), ("mosaic_bert", {"num_heads", "head_dim"})])
def test_another_initial_number_of_heads_is_another_size_but_with_slopes(name, found):
    """ALiBi's slopes depend on the initial number of heads, so the same weights would compute something else."""
    config = make(name).config
    assert config_changes(config, config.at_size({"heads": 4})).keys() - MAY_CHANGE == found


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("rwkv4", {"heads": 4}, "unknown value 'heads'"),
        ("gpt2", {"heads": 1}, r"tokens: heads would shrink from 2 to 1; heads can only be appended"),
        ("gpt2", {"hidden": 9.5}, r"tokens: hidden: expected a whole number of hidden units, got 9\.5"),
        ("gpt2", {"hiden": 512}, "did you mean 'hidden'"),
    ],
)
def test_bad_totals_are_one_line_that_names_the_kind(name, size, message):
    model = make(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        grow(model, size)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


GROUPED = {"num_heads": 4, "num_kv_heads": 2}


@torch.no_grad()
def test_grouped_queries_are_heads_whose_keys_and_values_are_equal():
    """arXiv 2305.13245, section 2.2; the KV cache keeps the smaller heads."""
    grouped, plain = make("llama", **GROUPED), make("llama", num_heads=4)
    weights = grouped.state_dict()
    for name, tensor in weights.items():
        if ".attn.key." in name or ".attn.value." in name:  # two heads of 8 for the queries of four
            weights[name] = tensor.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    plain.load_state_dict(weights)
    x = batch_for(grouped)
    torch.testing.assert_close(grouped(x), plain(x), rtol=1e-12, atol=1e-12)
    state = grouped.new_state(10)
    steps = torch.cat([grouped(part, state=state) for part in x.split([6, 1, 3], dim=1)], dim=1)
    torch.testing.assert_close(steps, grouped(x), rtol=1e-12, atol=1e-12)
    assert state.blocks[0][0].key.shape == (16, 2, 10, 8)


@torch.no_grad()
@pytest.mark.parametrize(("method", "total"), [("split", 4), ("split", 5), ("zero", 3)])
@pytest.mark.parametrize("more", [{}, {"projection": "pattention", "param_tokens": 6}, {"positions": "alibi"}])
def test_grouped_queries_grow_with_their_keys(method, total, more):
    model = make("llama", **GROUPED, **more)
    assert model.size.keys() >= {"kv_heads"} and "heads" not in model.size and not model.grown
    x = batch_for(model)
    before = model(x)
    grow(model, {"kv_heads": total}, method)
    assert relative(before, model(x)) < 1e-12 and model.grown
    config = model.config.at_size(model.size)
    assert (config.num_heads, config.num_kv_heads, config.head_width) == (2 * total, total, 8)
    assert config_changes(model.config, config).keys() - MAY_CHANGE == (
        {"num_heads", "head_dim", "num_kv_heads"} if more.get("positions") == "alibi" else set()
    )
    again = Tokenformer(model.config).double().eval()  # adopts the sizes of the weights
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x)) and again.size == model.size
    with pytest.raises(ValueError, match="unknown value 'heads', did you mean 'kv_heads'"):
        grow(model, {"heads": 16})


def task_of(name):
    kind = LitMaskedLM if name in ("bert", "mosaic_bert") else LitCausalLM
    return kind(
        f"{name}_tiny",
        vocab_size=17,
        context_length=12,
        overrides={**SIZES, **MODELS[name], "vocab_size": None, "context_length": None, "dropout": 0.0},
        schedule=LRSchedule("constant"),
    )


def fit(task, folder, schedule, ckpt_path=None, **callbacks):
    torch.manual_seed(3)
    tokens = torch.randint(17, (16, 13), generator=torch.Generator().manual_seed(2))
    if isinstance(task, LitMaskedLM):
        labels = tokens[:, :12].where(torch.arange(12) % 3 == 0, torch.tensor(-100))
        tokens = zip(tokens[:, :12], labels, torch.full((16,), 12), strict=True)
    growth = ParameterGrowthCallback(schedule, ramp_steps=2, freeze_old_steps=1, rewarm_steps=2)
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[
            growth,
            GrowingEMA(decay=0.9),
            TrainingMonitor(log_images=0),
            ModelCheckpoint(folder, "end{epoch}", save_top_k=-1, auto_insert_metric_name=False),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(task, DataLoader(list(tokens), 4), ckpt_path=ckpt_path, weights_only=True)
    return growth, trainer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "mosaic_bert", "pangu_pi", "rwkv4", "tokenformer_lm"])
def test_a_killed_fit_that_grew_resumes_bit_equal(name, tmp_path):
    units = {"hidden": 130} if name == "rwkv4" else {"hidden": 130, "heads": 5}
    deeper = {} if name == "mosaic_bert" else {"depth": 3}  # whose norms come after the sums
    schedule = {1: units, 2: {**units, "hidden": 200, **deeper}}
    whole = task_of(name)
    growth, trainer = fit(whole, tmp_path, schedule)
    assert model_size(whole).items() >= schedule[2].items()
    assert all(event["output_difference"] < 1e-5 for event in growth.events)
    for epoch in (0, 1):
        resumed = task_of(name)
        _, other = fit(resumed, tmp_path / "resumed", schedule, ckpt_path=tmp_path / f"end{epoch}.ckpt")
        assert other.global_step == trainer.global_step
        for key, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), key
        pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
        for one, two in pairs:
            state, again = trainer.optimizers[0].state[one], other.optimizers[0].state[two]
            assert all(torch.equal(state[key], again[key]) for key in state)


class OwnPart(nn.Module):
    """A part as a user writes it, which declares what of it can grow."""

    def __init__(self):
        super().__init__()
        self.read, self.write = nn.Linear(6, 8), nn.Linear(8, 6)

    def axes(self):
        return [Axis("channels", (*output_units("read", self.read), *input_units("write", self.write)))]

    def forward(self, x):
        return self.write(self.read(x).relu())


class OwnModule(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.part, self.head = OwnPart(), nn.Linear(6, 1)

    def forward(self, x):
        return self.head(x + self.part(x))

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def test_an_axis_of_a_users_own_part_grows_in_their_own_module(tmp_path):
    def run(task, ckpt_path=None):
        growth = ParameterGrowthCallback({1: {"channels": 16}, 2: {"channels": 20}})
        keep = ModelCheckpoint(tmp_path, "end{epoch}", save_top_k=-1, auto_insert_metric_name=False)
        trainer = Trainer(
            max_epochs=3, accelerator="cpu", logger=False, callbacks=[growth, keep], enable_progress_bar=False
        )
        data = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
        trainer.fit(task, DataLoader(data, 4), ckpt_path=ckpt_path, weights_only=True)
        return growth.events

    task, again = OwnModule(), OwnModule()
    first, second = run(task)
    assert first["after"] == {"channels": 16} and second["after"] == {"channels": 20}
    assert task.part.read.weight.shape == (20, 6) and task.part.read.out_features == 20
    assert max(first["output_difference"], second["output_difference"]) < 1e-6
    assert first["rows"]["part.write.weight"] == [8, 16, 2, 1, 1]
    run(again, tmp_path / "end1.ckpt")
    assert all(torch.equal(one, two) for one, two in zip(task.parameters(), again.parameters(), strict=True))


def test_a_schedule_that_names_a_kind_that_no_part_has_is_refused_at_the_start():
    with pytest.raises(ValueError, match=r"schedule: epoch 1: unknown value 'chanels', did you mean 'channels'"):
        growth = ParameterGrowthCallback({1: {"chanels": 16}})
        Trainer(max_epochs=2, accelerator="cpu", logger=False, callbacks=[growth], enable_progress_bar=False).fit(
            OwnModule(), DataLoader(torch.randn(8, 6), 4)
        )

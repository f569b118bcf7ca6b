"""Smaller models inside a model: prefixes, shrinking, order by importance, and training of nested sizes."""

import copy
import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, TensorDataset

from callbacks import GrowingEMA, NestedSizes, ParameterGrowthCallback
from callbacks.nested_sizes import distillation_loss
from lit_tokenformer.checkpoints.load import read_checkpoint
from lit_tokenformer.cli.commands import shrink_checkpoint
from lit_tokenformer.growth import grow, prefix, shrink
from lit_tokenformer.growth.shrink import reorder_units, unit_importance
from lit_tokenformer.inspection.origins import trace
from lit_tokenformer.models import Pattention, create_backbone, model_size, param_tokens
from lit_tokenformer.models.axes import find_axes
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier, LitMaskedLM, LitMultiTask
from lit_tokenformer.tasks.rebuild import rebuild_task

TINY = {"dim": 16, "depth": 2, "num_heads": 4, "rotary_fraction": 0.5, "vocab_size": 32, "context_length": 16}
PRESETS = {
    "tokens": ("tokenformer_lm_tiny", {"param_tokens": 16}, 4),
    "share": ("tokenformer_lm_tiny", {"param_tokens": 16}, 0.25),
    "heads": ("tokenformer_lm_tiny", {"param_tokens": 16}, {"qkv": 8, "heads": 2}),
    "alibi": ("tokenformer_lm_tiny", {"param_tokens": 16, "positions": "alibi"}, {"ffn": 0.5, "heads": 1}),
    "hidden": ("gpt2_tiny", {}, 0.5),
    "fc_tokens": ("tokenformer_lm_tiny", {"feed_forward": "mlp", "param_tokens": 8}, {"hidden": 0.5, "ffn": 16}),
    "series": ("tokenformer_lm_tiny", {"param_tokens": 16, "series": 2, "feed_forward": "pattention"}, 8),
    "softmax": ("tokenformer_lm_tiny", {"param_tokens": 16, "score_norm": "softmax"}, 8),
    "rwkv": ("rwkv4_tiny", {}, {"hidden": 0.25}),
}
TOKENS = torch.arange(24).view(2, 12) * 7 % 32


def made(name, **more):
    preset, given, tokens = PRESETS[name]
    return create_backbone(preset, **{**TINY, **given, **more}).double(), tokens


def randomized(model):
    """Weights of a trained model: none is zero, and no two units are alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", PRESETS)
def test_a_prefix_is_the_shrunk_model_bit_for_bit(name):
    model, tokens = made(name)
    randomized(model).float()
    before, whole = model_size(model), model(TOKENS)
    with prefix(model, tokens):
        nested = model(TOKENS)
    assert model_size(model) == before and torch.equal(model(TOKENS), whole)
    shrink(model, tokens)
    assert model_size(model) != before and torch.equal(model(TOKENS), nested)
    assert not torch.equal(nested, whole)
    empty, _ = made(name)
    empty.float().load_state_dict(model.state_dict())  # adopts the size
    assert torch.equal(empty(TOKENS), nested)


def test_a_prefix_is_the_formula_on_the_first_rows():
    layer, x = Pattention(8, 6, num_tokens=16).double(), torch.randn(5, 8, dtype=torch.double)
    with prefix(layer, 0.25):
        found = layer(x)
    scores = x @ layer.key_tokens[:4].T
    weights = F.gelu(2 * scores / scores.norm(dim=-1, keepdim=True))  # tau sqrt(n/N) = 4 / 2
    torch.testing.assert_close(found, weights @ layer.value_tokens[:4])


def test_gradients_of_a_prefix_reach_the_first_units_of_the_whole_model():
    model, tokens = made("heads")
    with prefix(model, tokens):
        loss = model(TOKENS).square().mean()
    loss.backward()
    layer = model.blocks[0].attn.query
    assert layer.key_tokens.grad[:8].abs().sum(dim=1).all() and not layer.key_tokens.grad[8:].any()
    width = 2 * model.blocks[0].attn.head_dim
    assert layer.value_tokens.grad[:8, :width].any() and not layer.value_tokens.grad[:, width:].any()
    smaller, _ = made("heads")
    smaller.load_state_dict(model.state_dict())
    shrink(smaller, tokens)
    smaller(TOKENS).square().mean().backward()
    assert torch.equal(smaller.blocks[0].attn.query.key_tokens.grad, layer.key_tokens.grad[:8])


@pytest.mark.parametrize(("method", "exact"), [("split", (0.5, 0.25)), ("zero", (16,))])
def test_growth_and_nested_sizes(method, exact):
    """A split by a whole factor preserves every share; after ``zero`` the model before it is a prefix, tau included."""
    model, _ = made("tokens")
    randomized(model)
    before = []
    for size in exact:
        with prefix(model, size):
            before.append(model(TOKENS))
    grow(model, 32, method)
    for size, output in zip(exact, before, strict=True):
        with prefix(model, size):
            torch.testing.assert_close(model(TOKENS), output, rtol=1e-9, atol=1e-9)
    if method == "zero":
        shrink(model, 16)
        assert torch.equal(model(TOKENS), before[0]) and model.blocks[0].mlp.tau == 8


def test_shrinking_keeps_the_square_root_of_the_number_as_tau():
    layer = Pattention(4, 4, num_tokens=7)
    shrink(layer, 3)
    assert layer.tau == torch.tensor(math.sqrt(3))
    layer = Pattention(4, 4, num_tokens=8)
    layer.tau.fill_(2 * math.sqrt(8))  # of other origin: scaled
    shrink(layer, 2)
    assert layer.tau.item() == pytest.approx(2 * math.sqrt(2))


def importance_of(model, kinds):
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())
    gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = {one: grad for one, grad in zip(parameters, gradient, strict=True) if grad is not None}
    return unit_importance(model, kinds, found)


@pytest.mark.parametrize("name", ["tokens", "heads", "hidden", "fc_tokens", "series"])
def test_an_order_preserves_the_function_and_the_next_steps(name):
    model, _ = made(name)
    randomized(model)
    twin, _ = made(name)
    twin.load_state_dict(model.state_dict())
    kinds = {"qkv", "proj", "ffn", "heads", "hidden"}
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-2) for one in (model, twin)]

    def two_steps():
        for one, optimizer in zip((model, twin) * 2, optimizers * 2, strict=True):
            optimizer.zero_grad()
            one(TOKENS).square().mean().backward()
            optimizer.step()

    two_steps()
    importance = importance_of(model, kinds)
    assert len(importance) == sum(axis.kind in kinds for _, _, axis in find_axes(model))
    before = model(TOKENS)
    reorder_units(model, {key: one.argsort(descending=True) for key, one in importance.items()}, optimizers[:1])
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-9, atol=1e-9)
    two_steps()
    torch.testing.assert_close(model(TOKENS), twin(TOKENS), rtol=1e-9, atol=1e-9)


def test_importance_is_the_formula_of_the_contributions():
    """The sum over data tokens of ``w (V . dL/dy)``, with its sign turned: removing a token takes this from y."""
    layer, x = Pattention(8, 6, num_tokens=5).double(), torch.randn(7, 8, dtype=torch.double)
    y = layer(x)
    loss = y.cos().sum()
    slope, grad = torch.autograd.grad(loss, [y, layer.value_tokens])
    scores = x @ layer.key_tokens.T
    weights = F.gelu(layer.tau * scores / scores.norm(dim=-1, keepdim=True))
    expected = -(weights * (slope @ layer.value_tokens.T)).sum(dim=0)
    torch.testing.assert_close(unit_importance(layer, ["other"], {layer.value_tokens: grad})["/other"], expected)


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        (17, "tokens: qkv of layer 'blocks.0.attn.query' would grow from 16 to 17; use grow"),
        (0, "tokens: expected at least 1 token, got 0"),
        (0.05, "tokens: 0.05 of 16 qkv of layer 'blocks.0.attn.query' leaves none"),
        (1.5, "tokens: qkv: expected a share above 0 and below 1, got 1.5"),
        (True, "tokens: expected totals or a share below 1, got True"),
        ({"ffn": -2}, "tokens: ffn: expected a whole number of at least 1 or a share, got -2"),
        ({"fnn": 2}, "did you mean 'ffn'"),
        ({"depth": 1}, "tokens: depth cannot shrink"),
        ({"heads": 0.1}, "leaves none"),
    ],
)
def test_impossible_sizes_are_one_line_and_change_nothing(tokens, problem):
    model, _ = made("tokens")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=problem) as error:
        shrink(model, tokens)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert param_tokens(model) == {"qkv": 16, "proj": 16, "ffn": 64}


def test_heads_with_slopes_keep_their_order():
    model, _ = made("alibi")
    with pytest.raises(ValueError, match="sort: the order of heads is fixed by slope_of_head"):
        reorder_units(model, {"blocks.0.attn/heads": torch.tensor([3, 2, 1, 0])})


def test_a_parameter_of_two_layers_is_not_sorted_twice():
    model, _ = made("tokens")
    model.blocks[1].mlp.key_tokens = model.blocks[0].mlp.key_tokens
    order = {f"blocks.{i}.mlp/ffn": torch.arange(63, -1, -1) for i in (0, 1)}
    with pytest.raises(ValueError, match="shared by several layers"):
        reorder_units(model, order)


SIZES = {key: TINY[key] for key in ("dim", "depth", "num_heads", "rotary_fraction")} | {"param_tokens": 8}
adamw = partial(torch.optim.AdamW, lr=1e-2)


TEXTS = (torch.arange(32)[:, None] + 5 * torch.arange(13)) % 32
"""Texts in which each token follows from the one before it."""


def loader(batch_size=8):
    return DataLoader(TEXTS, batch_size=batch_size)


def text_task(optimizer=adamw, trained=True, **settings):
    seed_everything(0, verbose=False)
    sizes = {"vocab_size": 32, "context_length": 16, "overrides": {**SIZES, **settings.pop("overrides", {})}}
    task = LitCausalLM("tokenformer_lm_tiny", **sizes, optimizer=optimizer, **settings)
    return randomized(task) if trained else task


def fitted(task, folder, *callbacks, data=None, ckpt_path=None, **settings):
    plain = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    plain |= {"max_steps": 4, "max_epochs": -1, "enable_checkpointing": False, "limit_val_batches": 2}
    trainer = Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**plain, **settings})
    train, val = data or (loader(), loader())
    trainer.fit(task, train, val, ckpt_path=ckpt_path)
    return trainer


def test_the_logged_loss_of_a_size_is_that_of_the_shrunk_model(tmp_path):
    task = text_task()
    trainer = fitted(task, tmp_path, NestedSizes([0.5, 0.25]), max_steps=8, max_epochs=2)
    logged = dict(trainer.callback_metrics)
    trainer.callbacks.pop(0)
    assert {"val/loss", "val/loss@0.25", "val/loss@0.5", "train/nested@0.25"} <= logged.keys()
    for size in (0.25, 0.5):
        smaller = copy.deepcopy(task)
        shrink(smaller, size)
        found = trainer.validate(smaller, loader(), verbose=False)[0]
        assert found["val/loss"] == logged[f"val/loss@{size}"].item() != logged["val/loss"].item()


@pytest.mark.parametrize("per_step", [1, 2])
def test_a_step_descends_the_sum_of_the_losses_of_its_sizes(per_step, tmp_path):
    task = text_task(partial(torch.optim.SGD, lr=0.1))
    expected = copy.deepcopy(task)
    fitted(task, tmp_path, NestedSizes([0.25, 0.5], 0.0, sort=False, per_step=per_step), max_steps=1)
    batch = next(iter(loader()))
    expected.feature_loss(*expected.batch_features(batch))[0].backward()
    for size in (0.25, 0.5)[:per_step]:
        with prefix(expected.backbone, size):
            loss = expected.feature_loss(*expected.batch_features(batch))[0]
        loss.backward()
    for name, parameter in task.named_parameters():
        old = expected.get_parameter(name)
        torch.testing.assert_close(parameter, old - 0.1 * old.grad, msg=name)


def test_sorting_preserves_the_model_and_its_average(tmp_path):
    task = text_task(partial(torch.optim.SGD, lr=0.0, momentum=0.9))
    before, order = copy.deepcopy(task), {}
    ema = GrowingEMA(decay=0.5)

    class Remember(Callback):
        def on_unit_order(self, trainer, pl_module, new):
            order.update(new)

    nested = NestedSizes([0.5])
    fitted(task, tmp_path, nested, ema, Remember(), max_steps=2)
    assert len(order) == 10 and any((one != torch.arange(len(one))).any() for one in order.values())
    torch.testing.assert_close(task(TOKENS), before(TOKENS), rtol=1e-4, atol=1e-4)
    for name, value in ema._average_model.module.state_dict().items():
        assert torch.equal(value, task.state_dict()[name])
    rows = order["backbone.blocks.0.mlp/ffn"]
    assert torch.equal(task.backbone.blocks[0].mlp.value_tokens, before.backbone.blocks[0].mlp.value_tokens[rows])
    assert nested.state_dict() == {"sorted": True}


def test_the_most_important_units_come_first(tmp_path):
    """Units that write next to nothing move behind all others, in each layer."""
    task = text_task(partial(torch.optim.SGD, lr=0.0))
    planted = {}
    for name, layer in task.named_modules():
        if isinstance(layer, Pattention):
            idle = torch.randperm(layer.num_tokens)[: layer.num_tokens // 2]
            layer.value_tokens.data[idle] *= 1e-4
            planted[name] = set(idle.tolist())
    order = {}

    class Remember(Callback):
        def on_unit_order(self, trainer, pl_module, new):
            order.update(new)

    fitted(task, tmp_path, NestedSizes([0.5]), Remember(), max_steps=1)
    for name, idle in planted.items():
        assert set(order[f"{name}/{task.get_submodule(name).kind}"][-len(idle) :].tolist()) == idle, name


def test_origins_follow_a_sort_after_a_growth(tmp_path):
    task = text_task(partial(torch.optim.SGD, lr=0.0))
    before = copy.deepcopy(task)
    growth = ParameterGrowthCallback({0: {"qkv": 16, "ffn": 48}}, unit="step")  # 8 -> 16, 32 -> 32 + 16 zero units
    fitted(task, tmp_path, growth, NestedSizes([0.5]), max_steps=1)
    for name, layer in task.named_modules():
        if isinstance(layer, Pattention):
            found, keys = trace(growth.events, name, layer.num_tokens), layer.key_tokens
            old, copies = found.source >= 0, found.original >= 0
            assert torch.equal(keys[old], before.get_submodule(name).key_tokens[found.source[old]])
            assert torch.equal(keys[copies], keys[found.original[copies]])
            assert (found.growth == 0).sum() == before.get_submodule(name).num_tokens
    order = growth.events[-1]["kept"]["backbone.blocks.0.attn.query.key_tokens"]
    assert order != sorted(order)


def test_nested_training_teaches_the_small_size(tmp_path):
    task = text_task(trained=False)
    trainer = fitted(task, tmp_path, NestedSizes([0.25], distill=0.5), max_steps=40, check_val_every_n_epoch=10)
    alone = text_task(trained=False)
    fitted(alone, tmp_path, max_steps=40)
    with prefix(alone.backbone, 0.25):
        loss = alone.feature_loss(*alone.batch_features(TEXTS))[0]
    assert trainer.callback_metrics["val/loss@0.25"] < loss - 0.3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_with_nested_sizes_resumes_bit_for_bit(tmp_path, accumulate):
    def callbacks():
        growth = ParameterGrowthCallback({3: 16}, unit="step")
        return NestedSizes([0.25, 0.5], distill=0.7), growth, GrowingEMA(0.9)

    settings = {"accumulate_grad_batches": accumulate, "enable_checkpointing": True}
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    whole, again = text_task(), text_task()
    first = fitted(whole, tmp_path, *callbacks(), keep, max_steps=8, **settings)
    assert param_tokens(whole)["qkv"] == 16
    second = fitted(again, tmp_path, *callbacks(), max_steps=8, ckpt_path=tmp_path / "step=4.ckpt", **settings)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    names = {"val/loss", "val/loss@0.25", "val/loss@0.5"}
    assert all(first.callback_metrics[name] == second.callback_metrics[name] for name in names)


def shrunk_alike(task, trainer, folder, tokens):
    """The command writes the weights of the function, as a checkpoint from which its task can be rebuilt."""
    source = folder / f"{type(task).__name__}{len(list(folder.iterdir()))}.ckpt"
    trainer.save_checkpoint(source)
    path = shrink_checkpoint(str(source), tokens)
    rebuilt = rebuild_task(path, read_checkpoint(path))
    shrink(task, tokens)
    assert all(torch.equal(value, rebuilt.state_dict()[name]) for name, value in task.state_dict().items())
    assert not any(model.grown for model in rebuilt.backbones.values())


def test_images_and_masked_text_and_several_tasks(tmp_path):
    images = TensorDataset(torch.randn(16, 3, 8, 8), torch.randint(10, (16,)))
    image = {"num_classes": 10, "image_size": 8}
    given = {"overrides": {**SIZES, "patch_size": 4}, "optimizer": adamw}
    masked = [(torch.arange(12), torch.where(torch.arange(12) % 3 == 0, 7, -100), torch.tensor(10))] * 16
    hidden = {"dim": 16, "depth": 1, "num_heads": 4, "patch_size": 4}
    cases = [
        (LitImageClassifier("tokenformer_vit_tiny_patch16_224", **image, **given), images, None, "val/loss@0.5"),
        (
            LitImageClassifier("vit_tiny_patch16_224", **image, overrides=hidden),
            images,
            ["hidden", "heads"],
            "val/acc1",
        ),
        (
            LitMaskedLM("tokenformer_mlm_tiny", 32, 16, overrides=SIZES, optimizer=adamw, grad_checkpointing=True),
            masked,
            ["ffn"],
            "val/loss@0.5",
        ),
    ]
    for task, data, kinds, name in cases:
        data = DataLoader(data, batch_size=8)
        trainer = fitted(task, tmp_path, NestedSizes([0.5], kinds=kinds), data=(data, data), max_epochs=2)
        assert trainer.callback_metrics[name].isfinite(), type(task)
        shrunk_alike(task, trainer, tmp_path, 0.5 if kinds is None else dict.fromkeys(kinds, 0.5))
    prose = partial(LitCausalLM, vocab_size=32, context_length=16)
    tasks = {"digits": partial(LitImageClassifier, **image), "prose": prose}
    task = LitMultiTask("tokenformer_lm_tiny", tasks=tasks, **given)
    shared = {"digits": DataLoader(images, batch_size=8), "prose": loader()}
    val = CombinedLoader(list(shared.values()), "sequential")
    data = CombinedLoader(shared, "min_size"), val
    trainer = fitted(task, tmp_path, NestedSizes([0.5]), data=data, max_epochs=1, max_steps=2)
    assert {"val/digits/loss@0.5", "val/prose/loss@0.5"} <= trainer.callback_metrics.keys()
    shrunk_alike(task, trainer, tmp_path, 0.5)


def test_the_distillation_loss_is_the_divergence_at_the_known_targets(monkeypatch):
    task = text_task()
    batch = TEXTS[:4].clone()
    batch[1, 5:] = -100
    features, target = task.batch_features(batch)
    teacher = torch.randn_like(features)
    own, others = task.feature_logits(features).softmax(-1), task.feature_logits(teacher).softmax(-1)
    expected = (others * (others / own).log()).sum(-1)[target >= 0].mean()
    found = distillation_loss(task, features, teacher, target)
    torch.testing.assert_close(found, expected)
    slope = torch.autograd.grad(found, task.backbone.head.weight, retain_graph=True)[0]
    monkeypatch.setattr("callbacks.nested_sizes.ROWS_BYTES", 4 * 32 * 7)  # several chunks
    in_chunks = distillation_loss(task, features, teacher, target)
    torch.testing.assert_close(in_chunks, expected)
    torch.testing.assert_close(torch.autograd.grad(in_chunks, task.backbone.head.weight)[0], slope)


@pytest.mark.slow
def test_a_compiled_task_compiles_once_per_size(tmp_path):
    from torch._dynamo.testing import CompileCounter  # imported late: it costs a second

    counter = CompileCounter()
    task = text_task()
    task.backbone.compile(dynamic=False, backend=counter)
    fitted(task, tmp_path, NestedSizes([0.25, 0.5]), max_steps=6, limit_val_batches=0)
    frames = counter.frame_count
    fitted(task, tmp_path, NestedSizes([0.25, 0.5]), max_steps=6, limit_val_batches=0)
    assert frames == counter.frame_count == 3


def test_a_cloud_model_contains_the_device_model(tmp_path):
    """Growth by ``zero`` with everything else frozen: the device needs no update, and it is the cloud's draft."""
    device = text_task()
    cloud = copy.deepcopy(device)
    growth = ParameterGrowthCallback({0: 16}, method="zero", freeze_old_steps=-1, freeze_rest=True)
    fitted(cloud, tmp_path, growth, max_steps=8)
    assert not torch.allclose(cloud(TOKENS), device(TOKENS), atol=1e-3)
    with prefix(cloud.backbone, 8):
        assert torch.equal(cloud(TOKENS), device(TOKENS))
    shrink(cloud, 8)
    assert all(torch.equal(value, cloud.state_dict()[name]) for name, value in device.state_dict().items())
    with pytest.raises(ValueError, match="freeze_rest: true needs freeze_old_steps"):
        ParameterGrowthCallback({0: 16}, freeze_rest=True)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"sizes": []}, "sizes: expected different shares"),
        ({"sizes": [0.5, 1.0]}, r"sizes: expected different shares above 0 and below 1, got \[0.5, 1.0\]"),
        ({"sizes": [0.5, 0.5]}, "sizes: expected different shares"),
        ({"sizes": [0.5], "distill": 1.5}, "distill: expected a weight from 0 to 1, got 1.5"),
        ({"sizes": [0.5], "per_step": 2}, "per_step: expected a number from 1 to 1, that of sizes, got 2"),
        ({"sizes": [0.1]}, "sizes: 0.1 of 8 qkv of layer .* leaves none"),
        ({"sizes": [0.5], "kinds": ["fnn"]}, "sizes: unknown value 'fnn', did you mean 'ffn'"),
    ],
)
def test_impossible_settings_are_one_line(settings, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        fitted(text_task(), tmp_path, NestedSizes(**settings))


def test_averages_and_growth_that_cannot_follow_the_order_are_refused(tmp_path):
    with pytest.raises(ValueError, match="WeightAveraging cannot follow the order of the units"):
        fitted(text_task(), tmp_path, NestedSizes([0.5]), WeightAveraging())
    growth = ParameterGrowthCallback({0: 16}, freeze_old_steps=-1)
    with pytest.raises(ValueError, match="sort: the rows of an earlier growth are in use"):
        fitted(text_task(), tmp_path, growth, NestedSizes([0.5]))


@pytest.mark.slow
@pytest.mark.usefixtures("text_cache")
def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    from benchmarks import nested_sizes

    monkeypatch.setattr("sys.argv", ["nested_sizes", "--smoke", "--output", str(tmp_path / "found.json")])
    nested_sizes.main()
    found = json.loads((tmp_path / "found.json").read_text())["seeds"]["0"]
    alone = {f"{name}@{size}" for name in ("alone", "alone, own steps") for size in (0.25, 0.5)}
    assert {"base", "whole", "nested, 1 per step", "nested, 2 per step"} | alone == found.keys()
    assert found["nested, 1 per step"]["flops"] < found["nested, 2 per step"]["flops"] == pytest.approx(1.0)
    assert "val/loss@0.25" in found["nested, 1 per step"] and "seed 0 whole: val/loss" in capsys.readouterr().out

"""A growth changes the parameters and not the function, in every case it does not refuse."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from lit_tokenformer.growth import Rows, grow, target_sizes
from lit_tokenformer.growth.optimizer import grow_optimizer
from lit_tokenformer.models import Pattention, Tokenformer, TokenformerConfig, param_tokens

NORMS = ["l2_gelu", "gelu_l2", "softmax", "gelu"]
ZERO_KEY_NORMS = ["l2_gelu", "gelu_l2", "gelu"]  # exp(0) = 1: under softmax a zero key takes part
TINY = TokenformerConfig(dim=16, depth=2, num_heads=2, param_tokens=8, image_size=8, patch_size=4, num_classes=5)


def trained(score_norm="l2_gelu", dtype=torch.float32, steps=4, **settings):
    """A backbone after a few optimizer steps large enough to move every weight, and images."""
    model = Tokenformer(dataclasses.replace(TINY, score_norm=score_norm, **settings)).to(dtype)
    images = torch.randn(4, 3, 8, 8, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.arange(4)).backward()
        optimizer.step()
    return model.eval(), images


@torch.no_grad()
def difference(model, images, tokens, **settings):
    """How much a growth changes the features, relative to them (L2 norms)."""
    before = model.forward_features(images)
    grown = grow(model, tokens, **settings)
    assert grown
    return float((model.forward_features(images) - before).double().norm() / before.double().norm())


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, Pattention)]


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("score_norm", NORMS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_split_preserves_output(score_norm, factor, dtype, bound):
    model, images = trained(score_norm, dtype)
    assert difference(model, images, 8 * factor) < bound
    assert model.param_tokens == {"qkv": 8 * factor, "proj": 8 * factor, "ffn": 32 * factor}


@pytest.mark.parametrize("score_norm", ZERO_KEY_NORMS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("method", ["zero_keys", "split"])
def test_any_number_of_tokens_preserves_output(score_norm, dtype, bound, method):
    """From 8 to 20: twelve zero keys, or a split by two and four zero keys."""
    model, images = trained(score_norm, dtype)
    assert difference(model, images, 20, method=method) < bound
    layer = model.blocks[0].attn.key
    zeros = (layer.key_tokens == 0).all(dim=1)
    assert zeros.tolist() == [False] * (20 - zeros.sum()) + [True] * (12 if method == "zero_keys" else 4)
    assert layer.value_tokens[zeros].abs().min() > 0  # both zero would never train


@pytest.mark.parametrize("score_norm", NORMS)
def test_several_growths_in_a_row_preserve_output(score_norm):
    model, images = trained(score_norm, torch.float64)
    before = model(images)
    for stage, tokens in enumerate((16, {"ffn": 128}, {"qkv": 48, "proj": 32}, 96)):
        grow(model, tokens, seed=stage)
    assert model.param_tokens == {"qkv": 96, "proj": 96, "ffn": 384}
    torch.testing.assert_close(model(images), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["split", "zero_keys"])
def test_softmax_refuses_zero_keys_and_nothing_changes(method):
    """The feed-forward alone cannot be split by a whole factor; no other layer may have grown when that is found."""
    model, _ = trained("softmax")
    state, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    with pytest.raises(ValueError, match="zero keys change the output under score_norm 'softmax'") as error:
        grow(model, {"qkv": 16, "proj": 16, "ffn": 40}, method=method)
    assert "\n" not in str(error.value)
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("score_norm", NORMS)
def test_random_changes_output_and_takes_tau_of_the_new_number(score_norm):
    model, images = trained(score_norm)
    assert difference(model, images, 16, method="random") > 0.02
    for layer in layers(model):
        assert layer.tau.item() == pytest.approx(math.sqrt(layer.num_tokens), rel=1e-7)
        assert layer.key_tokens[layer.num_tokens // 2 :].std().item() == pytest.approx(layer.key_std, rel=0.3)


def test_tau_follows_the_split_and_stays_for_zero_keys():
    model, _ = trained()
    grow(model, 24)
    assert all(layer.tau.item() == pytest.approx(math.sqrt(layer.num_tokens), rel=1e-7) for layer in layers(model))
    before = [layer.tau.item() for layer in layers(model)]
    grow(model, 30, "zero_keys")
    assert [layer.tau.item() for layer in layers(model)] == before
    mixed, _ = trained()
    grow(mixed, 20)
    assert mixed.blocks[0].attn.query.tau.item() == pytest.approx(math.sqrt(16), rel=1e-7)


@pytest.mark.parametrize("score_norm", NORMS)
def test_split_weights_are_published_format_weights(score_norm):
    """The published formula, tau from the current number of tokens, gives the same output for the grown weights."""
    torch.set_default_dtype(torch.float64)
    try:
        layer = Pattention(6, 5, 8, score_norm)
    finally:
        torch.set_default_dtype(torch.float32)
    nn.init.normal_(layer.key_tokens, std=0.5)
    nn.init.normal_(layer.value_tokens, std=0.5)
    x = torch.randn(3, 6, dtype=torch.float64)
    before = layer(x)
    grow(layer, 24)
    scores = x @ layer.key_tokens.T
    if score_norm == "l2_gelu":
        weights = F.gelu(scores / scores.norm(dim=-1, keepdim=True) * math.sqrt(24))
    elif score_norm == "gelu_l2":
        weights = F.gelu(scores) / F.gelu(scores).norm(dim=-1, keepdim=True) * math.sqrt(24)
    elif score_norm == "softmax":
        weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True) * 24
    else:
        weights = F.gelu(scores)
    torch.testing.assert_close(weights @ layer.value_tokens, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("score_norm", NORMS)
@pytest.mark.parametrize("factor", [2, 4])
def test_bf16_split_changes_output_by_rounding_only(score_norm, factor):
    """The last copy makes up for the rounding of the others, so one rounding (2^-9) for each value is left.

    bf16 itself makes one for each number, so the difference is of the size that bf16 makes to float32.
    """
    model, images = trained(score_norm)
    wide = model.forward_features(images)
    model.bfloat16()
    half = model.forward_features(images.bfloat16()).float()
    rounding = (half - wide).norm() / wide.norm()
    grow(model, 8 * factor)
    grown = model.forward_features(images.bfloat16()).float()
    assert (grown - half).norm() / half.norm() < 3 * rounding


def test_copies_lie_beside_their_originals():
    layer = Pattention(4, 3, 5)
    keys, values = layer.key_tokens.detach().clone(), layer.value_tokens.detach().clone()
    (grown_keys, grown_values) = grow(layer, 17)
    assert grown_keys.grown.rows == grown_values.grown.rows == Rows(before=5, after=17, copies=3)
    assert torch.equal(layer.key_tokens[:15].unflatten(0, (5, 3)), keys[:, None].expand(5, 3, 4))
    torch.testing.assert_close(layer.value_tokens[:15].unflatten(0, (5, 3)).sum(dim=1), values)
    mask = grown_keys.grown.rows.new()
    assert mask.tolist() == [False, True, True] * 5 + [True, True]
    assert (grown_keys.gradient_scale, grown_values.gradient_scale) == (1 / 3, 1.0)


def test_noise_is_measured_in_values_at_birth():
    for factor in (2, 3, 4):
        for noise in (1.0, 0.25):
            layer = Pattention(8, 256, 64, value_std=0.1)
            values = layer.value_tokens.detach().clone()
            grow(layer, 64 * factor, noise=noise)
            spread = layer.value_tokens.unflatten(0, (64, factor)) - values[:, None] / factor
            assert spread.std().item() == pytest.approx(0.1 * noise, rel=0.02)


def test_without_noise_copies_are_equal():
    layer = Pattention(8, 8, 4, "softmax").double()
    values = layer.value_tokens.detach().clone()
    grow(layer, 12, noise=0)
    torch.testing.assert_close(layer.value_tokens, values.repeat_interleave(3, dim=0) / 3, rtol=0, atol=1e-16)


@pytest.mark.parametrize("score_norm", NORMS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_copies_differ_after_one_step(score_norm, optimizer):
    model, images = trained(score_norm)
    grow(model, 16)
    F.cross_entropy(model(images), torch.arange(4)).backward()
    optimizer(model.parameters(), lr=0.1, weight_decay=0).step()
    for layer in layers(model):
        pairs = layer.key_tokens.unflatten(0, (-1, 2))
        assert (pairs[:, 0] != pairs[:, 1]).any(dim=1).all()


@pytest.mark.parametrize("score_norm", ZERO_KEY_NORMS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_zero_keys_move_first_and_their_values_second(score_norm, optimizer):
    model, images = trained(score_norm, torch.float64)  # in float32 some steps are below the last digit
    grow(model, 12, method="zero_keys")
    stepper = optimizer(model.parameters(), lr=0.1, weight_decay=0)

    def moved():
        before = copy.deepcopy(model.state_dict())
        stepper.zero_grad()
        F.cross_entropy(model(images), torch.arange(4)).backward()
        stepper.step()
        for name, layer in model.named_modules():
            if isinstance(layer, Pattention):
                new = slice(layer.num_tokens * 2 // 3, None)
                for part in ("key_tokens", "value_tokens"):
                    yield part, (getattr(layer, part)[new] != before[f"{name}.{part}"][new]).any(dim=1)

    for part, rows in moved():
        assert rows.all() if part == "key_tokens" else not rows.any()
    for _, rows in moved():
        assert rows.all()


@pytest.mark.parametrize("method", ["split", "zero_keys", "random"])
def test_growing_to_the_same_total_does_nothing(method):
    model, _ = trained()
    assert grow(model, 16, method)
    state, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    assert grow(model, 16, method) == grow(model, {"ffn": 64}, method) == []
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_kinds_that_are_left_out_stay():
    model, _ = trained()
    grown = grow(model, {"ffn": 64})
    assert model.param_tokens == {"qkv": 8, "proj": 8, "ffn": 64}
    assert [one.name for one in grown] == [f"blocks.{i}.mlp.{p}_tokens" for i in range(2) for p in ("key", "value")]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (4, "tokens: qkv would shrink from 8 to 4"),
        ({"qkv": 16, "ffn": 31}, "tokens: ffn would shrink from 32 to 31"),
        ({"fnn": 64}, "tokens: unknown value 'fnn', did you mean 'ffn'"),
        ({"ffn": 0}, "tokens: .*at least 1, got 0"),
        ({"ffn": True}, "tokens: .*at least 1, got True"),
        ({"ffn": 64.0}, "tokens: .*at least 1, got 64.0"),
        (True, "tokens: expected a whole number or totals for each kind, got True"),
        ("16", "tokens: expected a whole number or totals for each kind, got '16'"),
        (None, "tokens: expected a whole number or totals for each kind, got None"),
    ],
)
def test_totals_that_do_not_fit_raise_and_nothing_changes(tokens, message):
    model, _ = trained()
    with pytest.raises(ValueError, match=message) as error:
        grow(model, tokens)
    assert "\n" not in str(error.value)
    assert model.param_tokens == {"qkv": 8, "proj": 8, "ffn": 32}


@pytest.mark.parametrize("settings", [{"method": "splt"}, {"noise": -1.0}, {"noise": math.nan}, {"noise": math.inf}])
def test_other_settings_that_do_not_fit_raise(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        grow(Pattention(4, 4, 4), 8, **settings)


def test_target_sizes_names_the_setting():
    with pytest.raises(ValueError, match="schedule: epoch 3: ffn would shrink from 32 to 16"):
        target_sizes({"ffn": 16}, {"qkv": 8, "ffn": 32}, setting="schedule: epoch 3")
    assert target_sizes(16, {"ffn": 32}) == {"ffn": 64}


def new_values(seed=0, generator=None, dtype=torch.float32, order=("a", "b"), draw_before=0):
    torch.manual_seed(9)
    parts = {name: Pattention(32, 32, 4).to(dtype) for name in ("a", "b")}
    torch.rand(draw_before)
    model = nn.ModuleDict({name: parts[name] for name in order})
    grow(model, 8, "zero_keys", generator=generator, seed=seed)
    return {name: model[name].value_tokens[4:].detach() for name in ("a", "b")}


def test_rows_depend_on_seed_name_and_size_alone():
    rows = new_values()
    assert all(torch.equal(rows[name], new_values()[name]) for name in rows)
    assert all(torch.equal(rows[name], new_values(draw_before=3)[name]) for name in rows)
    assert all(torch.equal(rows[name], new_values(order=("b", "a"))[name]) for name in rows)
    assert not torch.equal(rows["a"], rows["b"])
    assert not torch.equal(rows["a"], new_values(seed=1)["a"])
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(rows["a"].to(dtype), new_values(dtype=dtype)["a"])
    torch.testing.assert_close(new_values(dtype=torch.float64)["a"].float(), rows["a"])


def test_a_given_generator_is_used():
    rows = new_values(generator=torch.Generator().manual_seed(5))
    again = new_values(generator=torch.Generator().manual_seed(5), seed=7)
    other = new_values(generator=torch.Generator().manual_seed(6))
    assert torch.equal(rows["b"], again["b"]) and not torch.equal(rows["b"], other["b"])
    generator = torch.Generator().manual_seed(5)
    new_values(generator=generator)
    assert not torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())


@pytest.mark.parametrize("method", ["split", "zero_keys", "random"])
def test_global_generator_is_left_alone(method):
    model, _ = trained()
    before = torch.get_rng_state()
    grow(model, 20, method)
    assert torch.equal(torch.get_rng_state(), before)


def test_frozen_parameters_stay_frozen():
    model, _ = trained()
    model.blocks[0].attn.key.key_tokens.requires_grad_(False)
    model.blocks[1].mlp.requires_grad_(False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    grow(model, 16)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    assert len(frozen) == 3


def test_names_lead_to_the_new_parameters():
    model, _ = trained()
    before = dict(model.named_parameters())
    grown = grow(model, 16)
    now = dict(model.named_parameters())
    assert len(grown) == 2 * len(layers(model)) == len({one.name for one in grown})
    for one in grown:
        assert now[one.name] is one.new and before[one.name] is one.old and one.new.is_leaf
    assert list(now) == list(before)  # the order, and so an optimizer's, is the same
    assert [one.name for one in grow(Pattention(4, 4, 4), 8)] == ["key_tokens", "value_tokens"]


def test_a_layer_in_two_places_grows_once():
    shared = Pattention(6, 6, 4).double()
    model = nn.Sequential(shared, nn.Tanh(), shared)
    x = torch.randn(3, 6, dtype=torch.float64)
    before = model(x)
    assert len(grow(model, 8)) == 2
    assert model[0] is model[2] and shared.num_tokens == 8
    assert shared.tau.item() == pytest.approx(math.sqrt(8), rel=1e-7)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", ["key_tokens", "value_tokens"])
@pytest.mark.parametrize("method", ["split", "zero_keys"])
def test_tied_parameters_stay_tied(part, method):
    model = nn.Sequential(Pattention(6, 6, 4), nn.Tanh(), Pattention(6, 6, 4, "gelu")).double()
    setattr(model[2], part, getattr(model[0], part))
    x = torch.randn(3, 6, dtype=torch.float64)
    before = model(x)
    assert len(grow(model, 10, method)) == 3
    assert getattr(model[2], part) is getattr(model[0], part)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


def tie_to_linear():
    model = nn.ModuleList([Pattention(6, 6, 4), nn.Linear(6, 4, bias=False)])
    model[1].weight = model[0].key_tokens
    return model, 8


def tie_keys_to_values():
    model = nn.ModuleList([Pattention(6, 6, 4), Pattention(6, 6, 4)])
    model[1].value_tokens = model[0].key_tokens
    return model, 8


def tie_keys_to_own_values():
    model = nn.ModuleList([Pattention(6, 6, 4)])
    model[0].value_tokens = model[0].key_tokens
    return model, 8


def tie_kinds_of_different_totals():
    model = nn.ModuleList([Pattention(6, 6, 4, kind="qkv"), Pattention(6, 6, 4, kind="ffn")])
    model[1].key_tokens = model[0].key_tokens
    return model, 8  # qkv 8, ffn 32


def tie_to_a_kind_that_stays():
    model, _ = tie_kinds_of_different_totals()
    return model, {"ffn": 8}


@pytest.mark.parametrize(
    "tie",
    [
        tie_to_linear,
        tie_keys_to_values,
        tie_keys_to_own_values,
        tie_kinds_of_different_totals,
        tie_to_a_kind_that_stays,
    ],
)
def test_ties_that_a_growth_would_cut_are_refused(tie):
    model, tokens = tie()
    before = dict(model.named_parameters(remove_duplicate=False))
    with pytest.raises(ValueError, match="is tied to a parameter that grows differently") as error:
        grow(model, tokens)
    assert "\n" not in str(error.value)
    now = dict(model.named_parameters(remove_duplicate=False))
    assert now.keys() == before.keys() and all(now[name] is before[name] for name in now)


def parametrized(layer):
    parametrize.register_parametrization(layer, "key_tokens", nn.Identity())


def weight_normed(layer):
    nn.utils.parametrizations.weight_norm(layer, "value_tokens")


def hooked(layer):
    layer.value_tokens.register_hook(lambda gradient: gradient)


def post_hooked(layer):
    layer.key_tokens.register_post_accumulate_grad_hook(lambda parameter: None)


@pytest.mark.parametrize("spoil", [parametrized, weight_normed, hooked, post_hooked])
def test_what_a_growth_would_lose_is_refused_and_nothing_changes(spoil):
    """The last layer is the one that refuses; the others must not have grown by then."""
    model = nn.Sequential(Pattention(4, 4, 4), nn.Tanh(), Pattention(4, 4, 4))
    spoil(model[2])
    parameters = list(model.parameters())
    with pytest.raises(ValueError, match=r"2\.(key|value)_tokens (is parametrized|has hooks)"):
        grow(model, 8)
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert model[0].num_tokens == model[2].num_tokens == 4 and model[0].tau.item() == model[2].tau.item() == 2
    assert grow(model, 4) == []  # what does not grow loses nothing


def test_layers_without_a_kind_take_a_number():
    model = nn.Sequential(Pattention(6, 8, 4), nn.Tanh(), Pattention(8, 2, 8, kind="ffn")).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    before = model(x)
    grow(model, 8)
    assert (model[0].num_tokens, model[2].num_tokens) == (8, 32)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    grow(model, {"ffn": 64})
    assert (model[0].num_tokens, model[2].num_tokens) == (8, 64)
    grow(model, {"other": 12})
    assert (model[0].num_tokens, model[2].num_tokens) == (12, 64)
    with pytest.raises(ValueError, match="tokens: unknown value 'qkv'.* Known: ffn, other"):
        grow(model, {"qkv": 16})


def test_grown_state_loads_into_a_model_at_birth_size():
    model, images = trained()
    newborn = Tokenformer(TINY).eval()
    grow(model, 20)
    newborn.load_state_dict(model.state_dict())
    assert newborn.param_tokens == model.param_tokens
    assert torch.equal(newborn(images), model(images))
    grow(newborn, 40)
    grow(model, 40)
    assert all(torch.equal(t, newborn.state_dict()[name]) for name, t in model.state_dict().items())


def test_growth_on_the_meta_device_has_the_right_shapes():
    with torch.device("meta"):
        model = Tokenformer(TINY)
    grow(model, 16)
    assert model.param_tokens == {"qkv": 16, "proj": 16, "ffn": 64}
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_training_step_follows_a_growth_in_every_precision():
    for dtype in (torch.float32, torch.bfloat16):
        model, images = trained(dtype=torch.float32)
        model.to(dtype)
        grow(model, 16)
        model(images.to(dtype)).float().square().sum().backward()
        assert all(p.grad.isfinite().all() and p.dtype == dtype for p in model.parameters())


def test_an_old_gradient_is_not_carried_along():
    model, images = trained()
    model(images).sum().backward()
    assert all(one.new.grad is None for one in grow(model, 16))


@pytest.mark.parametrize(("method", "total"), [("zero_keys", 8), ("split", 10)])
def test_new_tokens_with_both_key_and_value_zero_are_refused(method, total):
    layer = Pattention(8, 8, num_tokens=4, value_std=0.0)
    with pytest.raises(ValueError, match="would have zero input and output weights, and never train"):
        grow(layer, total, method)
    assert layer.num_tokens == 4


def own_model():
    return nn.Sequential(nn.Linear(6, 8), Pattention(8, 8, 4), nn.Tanh(), Pattention(8, 2, 4))


def step(model, optimizer):
    model(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_grow_hands_new_parameters_and_their_state_to_the_optimizer():
    model = own_model()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    grow(model, 8, optimizer=optimizer)
    assert [id(one) for one in optimizer.param_groups[0]["params"]] == [id(one) for one in model.parameters()]
    assert all(optimizer.state[one]["exp_avg"].shape == one.shape for one in model.parameters())
    before = model[1].key_tokens.detach().clone()
    step(model, optimizer)
    assert not torch.equal(model[1].key_tokens, before)


def test_an_optimizer_that_a_growth_left_behind_raises_at_its_next_step():
    model = own_model()
    kept, left = torch.optim.AdamW(model[1].parameters()), torch.optim.SGD(model[3].parameters(), lr=0.1)
    grown = grow(model, 8, optimizer=kept)
    step(model, kept)
    with pytest.raises(
        RuntimeError, match=r"SGD: stale after a growth \(got 2 replaced parameters, .* grow\(..., optimizer="
    ):
        step(model, left)
    grow_optimizer(left, grown)
    step(model, left)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_no_optimizer_is_watched_once_the_old_parameters_are_gone():
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    model = own_model()
    hooks = len(_global_optimizer_pre_hooks)
    grow(model, 8)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert len(_global_optimizer_pre_hooks) <= hooks


def test_a_model_that_is_grown_in_part_counts_its_smallest_layers():
    model = own_model()
    grow(model[1], 8)
    assert param_tokens(model) == {"other": 4}
    grow(model, 8)
    assert model[1].num_tokens == model[3].num_tokens == 8
    grow(model[3], 32)
    with pytest.raises(ValueError, match="tokens: layer '3' would shrink from 32 to 16"):
        grow(model, 16)
    assert model[1].num_tokens == 8


def test_a_growth_beyond_the_memory_is_refused_in_one_line():
    model = own_model()
    with pytest.raises(
        ValueError, match=r"tokens: not enough memory for .* \(got [\d,.]+ GiB .* expected at least [\d,.]+ GiB\)"
    ):
        grow(model, 10**12)
    assert model[1].num_tokens == 4

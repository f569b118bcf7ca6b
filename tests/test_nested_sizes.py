"""Smaller models inside a model: prefixes, shrinking, order by importance, and training of nested sizes."""

import math

import pytest
import torch

from lit_tokenformer.growth import grow, prefix, shrink
from lit_tokenformer.growth.shrink import reorder_units, unit_importance
from lit_tokenformer.models import Pattention, create_backbone, model_size, param_tokens
from lit_tokenformer.models.axes import find_axes

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
    weights = torch.nn.functional.gelu(2 * scores / scores.norm(dim=-1, keepdim=True))  # tau sqrt(n/N) = 4 / 2
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
    loss = torch.nn.functional.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())
    gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = {one: grad for one, grad in zip(parameters, gradient, strict=True) if grad is not None}
    return unit_importance(model, kinds, found), loss


@pytest.mark.parametrize("name", ["tokens", "heads", "hidden", "fc_tokens", "series"])
def test_an_order_preserves_the_function_and_the_next_steps(name):
    model, _ = made(name)
    randomized(model)
    twin, _ = made(name)
    twin.load_state_dict(model.state_dict())
    kinds = {"qkv", "proj", "ffn", "heads", "hidden"}
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-2) for one in (model, twin)]

    def step(one, optimizer):
        optimizer.zero_grad()
        one(TOKENS).square().mean().backward()
        optimizer.step()

    for _ in range(2):
        step(model, optimizers[0]), step(twin, optimizers[1])
    importance, _ = importance_of(model, kinds)
    assert len(importance) == sum(axis.kind in kinds for _, _, axis in find_axes(model))
    before = model(TOKENS)
    reorder_units(model, {key: one.argsort(descending=True) for key, one in importance.items()}, optimizers[:1])
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-9, atol=1e-9)
    for _ in range(2):
        step(model, optimizers[0]), step(twin, optimizers[1])
    torch.testing.assert_close(model(TOKENS), twin(TOKENS), rtol=1e-9, atol=1e-9)
    sorted_now, _ = importance_of(model, kinds)
    assert sorted_now.keys() == importance.keys()


def test_importance_is_the_formula_of_the_contributions():
    """The sum over data tokens of ``w (V . dL/dy)``, with its sign turned: removing a token takes this from y."""
    layer, x = Pattention(8, 6, num_tokens=5).double(), torch.randn(7, 8, dtype=torch.double)
    y = layer(x)
    loss = y.cos().sum()
    slope, grad = torch.autograd.grad(loss, [y, layer.value_tokens])
    scores = x @ layer.key_tokens.T
    weights = torch.nn.functional.gelu(layer.tau * scores / scores.norm(dim=-1, keepdim=True))
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

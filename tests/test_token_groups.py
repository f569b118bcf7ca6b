"""Groups of parameter tokens: the sum of their outputs, the gate, and what else reaches into a layer's tokens."""

import copy
import math

import pytest
import torch
from torch import nn

from lit_tokenformer.cost import model_cost
from lit_tokenformer.errors import UserError
from lit_tokenformer.growth import grow
from lit_tokenformer.interop.timm_format import write_timm
from lit_tokenformer.interop.tokenformer import write_published
from lit_tokenformer.interop.transformers_format import write_transformers
from lit_tokenformer.models import Pattention, as_linear, as_pattention, create_backbone
from lit_tokenformer.models.modalities import ModalityGate
from lit_tokenformer.models.token_groups import (
    BASE,
    NamedGate,
    Share,
    add_group,
    check_group_name,
    group_layers,
    group_sizes,
    remove_group,
)
from lit_tokenformer.registry import SCORE_NORMS

SIZES = {"dim": 16, "depth": 2, "num_heads": 2, "param_tokens": 8}


def formula(x, group):
    """The published equation in plain lines."""
    scores = x @ group.key_tokens.T
    normalized = group.tau * scores / scores.norm(dim=-1, keepdim=True)
    return 0.5 * normalized * (1 + torch.erf(normalized / math.sqrt(2))) @ group.value_tokens


def layer_with_groups(gate, names=("a", "b"), dtype=torch.float64, **settings):
    layer = Pattention(6, 5, num_tokens=7, **settings).to(dtype)
    for number, name in enumerate(names):
        nn.init.normal_(add_group(layer, name, 3 + number, gate).value_tokens)
    return layer


def language_model(**more):
    return create_backbone("tokenformer_lm_tiny", **{**SIZES, "vocab_size": 19, "context_length": 12, **more})


def with_groups(model, kinds=("qkv", "proj", "ffn"), tokens=4):
    """A group ``docs`` with random values in all layers of these kinds, selected."""
    gate = NamedGate()
    for _, layer in list(group_layers(model)):
        if layer.kind in kinds:
            nn.init.normal_(add_group(layer, "docs", tokens, gate).value_tokens)
    gate.select("docs", torch.device("cpu"))
    return gate


@pytest.mark.parametrize("score_norm", SCORE_NORMS)
def test_a_layer_without_groups_or_with_groups_off_is_the_layer_alone(score_norm):
    layer, x = Pattention(6, 5, num_tokens=7, score_norm=score_norm), torch.randn(2, 3, 6)
    names, before = [*layer.state_dict()], layer(x)
    gate = NamedGate()
    nn.init.normal_(add_group(layer, "docs", 2, gate).value_tokens)
    assert names == ["key_tokens", "value_tokens", "tau"]
    assert torch.equal(layer(x), before)
    gate.select("docs", x.device)
    assert not torch.allclose(layer(x), before)
    remove_group(layer, "docs")
    assert torch.equal(layer(x), before)
    assert [*layer.state_dict()] == names and layer.gate is None


@pytest.mark.parametrize("series", [1, 3])
@pytest.mark.parametrize("score_norm", ["l2_gelu", "gelu_l2", "gelu"])
def test_a_new_group_adds_exactly_zero_and_trains(score_norm, series):
    layer, x = Pattention(6, 5, num_tokens=7, score_norm=score_norm, series=series), torch.randn(2, 3, 6)
    before, gate = layer(x), NamedGate()
    group = add_group(layer, "docs", 2, gate)
    gate.select("docs", x.device)
    assert torch.equal(layer(x), before)
    layer(x).square().sum().backward()
    assert group.value_tokens.grad.abs().sum() > 0


def test_groups_sum_up_each_with_its_own_norm_and_tau():
    layer = layer_with_groups(lambda x: {BASE: Share(), "a": Share(), "b": Share(weight=torch.tensor(0.5))})
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    wanted = formula(x, layer) + formula(x, layer.groups["a"]) + 0.5 * formula(x, layer.groups["b"])
    torch.testing.assert_close(layer(x), wanted)
    assert [group.tau.item() for group in layer.groups.values()] == pytest.approx([3**0.5, 2.0])


def test_a_gate_assigns_single_data_tokens_with_weights():
    weights = torch.rand(2, 1, dtype=torch.float64, requires_grad=True)
    layer = layer_with_groups(lambda x: {BASE: Share(torch.tensor([0, 4])), "b": Share(torch.tensor([4, 5]), weights)})
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    base, group = (formula(x, one).flatten(0, 1) for one in (layer, layer.groups["b"]))
    wanted = torch.zeros(6, 5, dtype=torch.float64)
    wanted[[0, 4]] += base[[0, 4]]
    wanted[[4, 5]] += weights * group[[4, 5]]
    found = layer(x)
    torch.testing.assert_close(found, wanted.view(2, 3, 5))
    parameters = [weights, layer.key_tokens, layer.groups["b"].key_tokens, layer.groups["b"].value_tokens]
    gradients = (torch.autograd.grad(one.square().sum(), parameters) for one in (found, wanted.view(2, 3, 5)))
    torch.testing.assert_close(*gradients)


class Router(nn.Module):
    """Top-1 of the layer's own tokens and a copy, with the gate p / p.detach()."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Linear(6, 2, dtype=torch.float64)

    def forward(self, x):
        shares = self.scores(x).flatten(0, -2).softmax(-1)
        best, chosen = shares.max(-1)
        places = [(chosen == number).nonzero()[:, 0] for number in range(2)]
        gates = [(best / best.detach())[one, None] for one in places]
        return {name: Share(*pair) for name, *pair in zip((BASE, "a"), places, gates, strict=True)}


def test_a_router_is_a_gate_and_copies_behind_it_are_the_layer():
    layer, x = Pattention(6, 5, num_tokens=7).double(), torch.randn(2, 8, 6, dtype=torch.float64)
    before = layer(x)
    group = add_group(layer, "a", 7, Router())
    group.load_state_dict({name: tensor for name, tensor in layer.state_dict().items() if name in group.state_dict()})
    torch.testing.assert_close(layer(x), before)
    layer(x).square().sum().backward()
    assert layer.gate.scores.weight.grad.abs().sum() > 0
    assert "gate.scores.weight" in layer.state_dict()
    assert 0 < (layer.gate(x)["a"].places.numel()) < 16


def test_each_sample_of_a_batch_uses_its_own_group():
    gate = NamedGate()
    layer, x = layer_with_groups(gate), torch.randn(4, 3, 6, dtype=torch.float64)
    gate.select(["a", None, "b", "a"], x.device)
    base, a, b = (formula(x, one) for one in (layer, layer.groups["a"], layer.groups["b"]))
    wanted = base + torch.stack([a[0], torch.zeros(3, 5), b[2], a[3]])
    torch.testing.assert_close(layer(x), wanted)
    with pytest.raises(UserError, match="one name for each of 3 samples, got 4"):
        layer(x[:3])


@pytest.mark.slow
def test_groups_compile_without_a_graph_break():
    layer = layer_with_groups(gate := NamedGate(), dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 2, 6)
    for names in (None, "a", ["a", "b", None], ["b", None, "a"]):
        gate.select(names, x.device)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("method", ["split", "zero"])
@pytest.mark.parametrize("sizes", [{"ffn:docs": 8}, {"ffn": 64, "qkv:docs": 8}, {"depth": 4}])
def test_groups_grow_and_leave_the_output(method, sizes):
    model = language_model().double()
    with_groups(model)
    tokens = torch.randint(19, (2, 9))
    before = model(tokens)
    optimizer = torch.optim.AdamW(model.parameters())
    before.square().mean().backward()
    optimizer.step()
    before = model(tokens)
    grow(model, sizes, method, optimizer=optimizer)
    torch.testing.assert_close(model(tokens), before)
    assert {kind: model.size[kind] for kind in sizes} == sizes
    model(tokens).square().mean().backward()
    optimizer.step()


def test_a_single_number_of_tokens_grows_the_layers_own_tokens_only():
    model = language_model()
    with_groups(model)
    grow(model, 16)
    assert model.param_tokens == {
        **{"qkv": 16, "qkv:docs": 4, "proj": 16, "proj:docs": 4},
        **{"ffn": 64, "ffn:docs": 4},
    }


def test_a_group_takes_the_size_of_the_weights_it_loads():
    model, larger = language_model(), language_model()
    with_groups(model, tokens=2)
    with_groups(larger, tokens=6)
    model.load_state_dict(larger.state_dict())
    assert group_sizes(model) == {"docs": {"qkv": 6, "proj": 6, "ffn": 6}}
    tokens = torch.randint(19, (2, 9))
    assert torch.equal(model(tokens), larger(tokens))


def test_a_copy_of_a_model_has_a_gate_of_its_own():
    model = language_model()
    gate, tokens = with_groups(model), torch.randint(19, (2, 9))
    twin, on = copy.deepcopy(model), model(tokens)
    gate.select(None, torch.device("cpu"))
    assert torch.equal(twin(tokens), on) and not torch.equal(model(tokens), on)


def test_cost_counts_the_tokens_of_groups():
    model = language_model()
    plain = model_cost(model.config, model.size)
    with_groups(model, kinds=("qkv", "ffn"))
    cost = model_cost(model.config, model.size)
    assert cost.parameters == sum(one.numel() for one in model.parameters()) > plain.parameters
    assert cost.flops - plain.flops == 4 * 2 * 12 * 4 * 2 * 32  # 4 layers in 2 blocks, 12 data and 4 parameter tokens


@pytest.mark.parametrize("write", [write_published, write_transformers, write_timm])
def test_formats_with_one_group_per_layer_reject_several(write, tmp_path):
    model = language_model()
    with_groups(model)
    with pytest.raises(UserError, match=r"state: blocks\.0.* is of a group of parameter tokens"):
        write(tmp_path, model.config, model.state_dict())
    assert not [*tmp_path.iterdir()]


def test_conversion_to_transformers_rejects_groups():
    transformers = pytest.importorskip("lit_tokenformer.interop.auto_models")
    model = language_model()
    with_groups(model)
    with pytest.raises(UserError, match="is of a group of parameter tokens"):
        transformers.to_transformers(model)


@pytest.mark.parametrize("name", ["a/b", "..", "", "a.b", "a b", "forward", "keys"])
def test_names_that_are_no_folder_or_reserved_are_rejected(name):
    with pytest.raises(UserError, match="name: "):
        check_group_name(name)


def test_bad_groups_are_rejected():
    layer = Pattention(6, 5, num_tokens=7)
    with pytest.raises(UserError, match="num_tokens: expected at least 1, got 0"):
        add_group(layer, "docs", 0, NamedGate())
    assert layer.groups is None
    add_group(layer, "docs", 1, NamedGate())
    with pytest.raises(UserError, match="has a group 'docs' already"):
        add_group(layer, "docs", 1, NamedGate())
    with pytest.raises(UserError, match="gate: expected the NamedGate of the layer, got a ModalityGate"):
        add_group(layer, "image", 1, ModalityGate())


def test_groups_have_a_linear_form_too():
    torch.manual_seed(0)
    layer, gate, x = Pattention(6, 5, num_tokens=7, kind="ffn").double(), NamedGate(), torch.randn(2, 3, 6).double()
    nn.init.normal_(add_group(layer, "docs", 4, gate).value_tokens)
    gate.select(["docs", None], x.device)
    before, names = layer(x), sorted(layer.state_dict())
    as_linear(layer)
    torch.testing.assert_close(layer(x), before)
    assert len(layer.outputs()) == 2
    assert sorted(as_pattention(layer).state_dict()) == names and torch.equal(layer(x), before)

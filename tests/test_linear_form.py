"""Linear form of Pattention: equal outputs, found by tools that look for ``nn.Linear``, exact on the way back."""

import copy

import pytest
import torch
from torch import nn

from lit_tokenformer.errors import UserError
from lit_tokenformer.growth import grow
from lit_tokenformer.inference.sampling import Sampling, generate_tokens
from lit_tokenformer.models import SCORE_NORMS, Pattention, as_linear, as_pattention, create_backbone, list_presets

SIZES = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 8, "vocab_size": 50, "context_length": 64}
SIZES |= {"image_size": 16, "patch_size": 4, "num_classes": 5}


def model(preset="tokenformer_lm_tiny", **overrides):
    torch.manual_seed(0)
    made = create_backbone(preset, **{**SIZES, **overrides}).eval()
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def inputs(made):
    generator = torch.Generator().manual_seed(1)
    if made.config.stem == "patch":
        return torch.randn(3, 3, 16, 16, generator=generator)
    return torch.randint(0, 50, (3, 17), generator=generator)


@pytest.mark.parametrize("preset", [name for name in list_presets() if name.endswith("tiny") or "vit_tiny" in name])
def test_outputs_are_equal_to_the_bit_and_the_way_back_is_exact(preset):
    made = model(preset, projection="pattention")
    before, x = copy.deepcopy(made.state_dict()), inputs(made)
    with torch.no_grad():
        expected = made(x)
        assert as_linear(made) is made
        assert not any("tokens" in name for name, _ in made.named_parameters())
        assert torch.equal(made(x), expected)
        as_pattention(made)
        assert torch.equal(made(x), expected)
    assert list(made.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    assert {type(layer).__name__ for layer in made.modules()} == {
        type(layer).__name__ for layer in model(preset, projection="pattention").modules()
    }


@pytest.mark.parametrize("score_norm", SCORE_NORMS)
@pytest.mark.parametrize("series", [1, 2])
def test_gradients_are_equal(score_norm, series):
    if series > 1 and score_norm == "softmax":
        pytest.skip("softmax has no activation")
    torch.manual_seed(0)
    layer = Pattention(6, 5, 20, score_norm=score_norm, series=series, key_std=1.0, value_std=1.0).double()
    linear, x = as_linear(copy.deepcopy(layer)), torch.randn(4, 6, dtype=torch.float64)
    for one in (layer, linear):
        one(x).square().sum().backward()
    torch.testing.assert_close(linear.keys.weight.grad, layer.key_tokens.grad)
    torch.testing.assert_close(linear.values.weight.grad.T, layer.value_tokens.grad)


def test_linear_form_grows_loads_and_decodes_as_before():
    made, linear = model(), as_linear(model())
    for one in (made, linear):
        grow(one, {"qkv": 12, "ffn": 40, "depth": 4, "heads": 4}, generator=torch.Generator().manual_seed(3))
    assert linear.size == made.size
    torch.testing.assert_close(linear(inputs(made)), model()(inputs(made)))
    torch.testing.assert_close(as_linear(model())(inputs(made)), linear(inputs(made)))
    fresh = as_linear(model(depth=4))
    fresh.load_state_dict(linear.state_dict())
    torch.testing.assert_close(fresh(inputs(made)), linear(inputs(made)), rtol=0, atol=0)
    greedy = Sampling(temperature=0.0)
    texts = [list(generate_tokens(one, [[3], [7, 8, 9]], 12, greedy)) for one in (fresh, as_pattention(linear))]
    assert torch.equal(*map(torch.stack, texts))


def test_adapters_find_both_halves_and_merge():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(as_linear(model()), peft.LoraConfig(r=2, target_modules=r".*\.(keys|values)"))
    assert sum(".lora_A" in name for name, _ in adapted.named_parameters()) == 2 * 5 * 2  # blocks, layers, halves
    with pytest.raises(UserError, match=r"^as_pattention: .*query.keys: unsupported layer"):
        as_pattention(adapted)
    merged = as_pattention(adapted.merge_and_unload())
    torch.testing.assert_close(merged(inputs(merged)), model()(inputs(merged)))


def test_what_cannot_be_converted_is_refused_before_a_change():
    made = as_linear(model())
    made.blocks[1].mlp.values = nn.Linear(32, 32)
    with pytest.raises(UserError, match=r"^as_pattention: blocks.1.mlp.values: unsupported layer"):
        as_pattention(made)
    assert hasattr(made.blocks[0].mlp, "keys")
    made = model()
    made.blocks[1].mlp.key_tokens = nn.Parameter(torch.ones(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"^as_linear: blocks.1.mlp.key_tokens: unsupported tensor"):
        as_linear(made)
    assert hasattr(made.blocks[0].mlp, "key_tokens") and not hasattr(made.blocks[0].mlp, "keys")


def test_a_model_without_parameter_tokens_is_unchanged():
    made = model("gpt2_tiny")
    names = list(made.state_dict())
    assert list(as_linear(made).state_dict()) == names == list(as_pattention(made).state_dict())

"""The published sizes, to the last parameter, and what a wrong setting is told."""

import dataclasses

import pytest
import timm
import torch

from lit_tokenformer.models import (
    BackboneOverrides,
    ParamTokens,
    TokenformerConfig,
    create_backbone,
    list_presets,
    preset_config,
)

PUBLISHED = {
    "tokenformer_vit_base_matched_patch16_224": 86_447_848,
    "tokenformer_vit_base_patch16_224": 114_759_400,
    "tokenformer_vit_large_matched_patch16_224": 304_007_144,
    "tokenformer_vit_large_patch16_224": 404_670_440,
    "vit_base_patch16_224": 86_567_656,
    "tokenformer_150m": 151_881_216,
    "tokenformer_450m": 454_166_528,
    "tokenformer_900m": 903_252_480,
    "tokenformer_1_5b": 1_587_219_456,
    "tokenformer_owt_124m": 123_569_664,
    "tokenformer_owt_354m": 354_190_848,
    "tokenformer_owt_757m": 753_796_608,
    "tokenformer_owt_1_4b": 1_309_705_728,
    "tokenformer_owt2_354m": 353_503_232,
    "tokenformer_owt2_757m": 756_156_416,
}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(name, parameters):
    with torch.device("meta"):
        assert count(create_backbone(name)) == parameters


@pytest.mark.parametrize("name", [name for name in list_presets() if name.startswith("vit_")])
def test_vit_presets_count_as_timm_does(name):
    with torch.device("meta"):
        model, vit = create_backbone(name), timm.create_model(name)
    assert count(model) == count(vit)
    assert model.config.norm_eps == vit.norm.eps


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_runs_when_shrunk(name):
    small = {"depth": 1, "dim": 48, "num_heads": 3, "param_tokens": 6}
    model = create_backbone(name, **small, image_size=32, num_classes=4, vocab_size=7, context_length=5)
    inputs = {"patch": torch.zeros(1, 3, 32, 32), "token": torch.zeros(1, 5, dtype=torch.long)}
    assert model(inputs[model.config.stem]).shape == {"patch": (1, 4), "token": (1, 5, 7)}[model.config.stem]


def test_overrides_replace_and_none_keeps():
    config = preset_config("tokenformer_vit_tiny_patch16_224", depth=2, dim=None)
    assert (config.depth, config.dim) == (2, 192)
    assert {field.name for field in dataclasses.fields(BackboneOverrides)} == {
        field.name for field in dataclasses.fields(TokenformerConfig)
    }
    assert set(dataclasses.asdict(BackboneOverrides()).values()) == {None}


def test_unknown_names_are_told_the_nearest_right_one():
    with pytest.raises(ValueError, match="did you mean 'tokenformer_vit_base_patch16_224'"):
        create_backbone("tokenformer_vit_base_patch16_22")
    with pytest.raises(ValueError, match=r"overrides: unknown value 'num_head', did you mean 'num_heads'"):
        create_backbone("vit_tiny_patch16_224", num_head=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 30, "num_heads": 4}, r"num_heads: not a divisor of dim 30 \(got 4\)"),
        ({"image_size": 30, "patch_size": 4}, r"image_size: not divisible by patch_size 4 \(got 30\)"),
        ({"depth": 0}, "depth: expected a whole number of at least 1, got 0"),
        ({"dim": 32.0}, "dim: expected a whole number"),
        ({"num_heads": True}, "num_heads: expected a whole number"),
        ({"num_kv_heads": 4}, r"num_kv_heads: not a divisor of num_heads \d+ \(got 4\)"),
        ({"num_kv_heads": 0}, "num_kv_heads: expected a whole number of at least 1, got 0"),
        ({"patch_size": "4"}, "patch_size: expected a whole number"),
        ({"in_chans": -3}, "in_chans: expected a whole number"),
        ({"num_classes": -1}, "num_classes: expected a whole number of at least 0"),
        ({"num_classes": "10"}, "num_classes: expected a whole number of at least 0"),
        ({"drop_path": 1.0}, r"drop_path: expected a rate in \[0, 1\)"),
        ({"patch_drop_rate": 1.0}, r"patch_drop_rate: expected a rate in \[0, 1\)"),
        ({"drop_path": -0.1}, r"drop_path: expected a rate in \[0, 1\)"),
        ({"drop_path": float("nan")}, r"drop_path: expected a rate in \[0, 1\)"),
        ({"mlp_ratio": 0.0}, "mlp_ratio: expected"),
        ({"mlp_ratio": 1e-4}, "mlp_ratio: expected"),
        ({"norm_eps": 0.0}, "norm_eps: expected a positive number"),
        ({"projection": "patention"}, "projection: unknown value 'patention', did you mean 'pattention'"),
        ({"feed_forward": "linear"}, "feed_forward: unknown value 'linear'"),
        ({"score_norm": "l2"}, "score_norm: unknown value 'l2'"),
        ({"global_pool": "max"}, "global_pool: unknown value 'max'"),
        ({"class_token": False}, "global_pool: 'token' needs class_token: true"),
        ({"param_tokens": 0}, "param_tokens.qkv: expected a whole number of at least 1, got 0"),
        ({"param_tokens": True}, "param_tokens: expected a whole number or totals for each kind, got True"),
        ({"param_tokens": "96"}, "param_tokens: expected a whole number or totals for each kind, got '96'"),
        ({"param_tokens": 9.5}, "param_tokens: expected a whole number or totals for each kind, got 9.5"),
        ({"param_tokens": {"qkv": 8, "ffn": 32}}, "param_tokens: missing totals: proj"),
        ({"param_tokens": {"qkv": 8, "proj": 8, "fnn": 32}}, "param_tokens: unknown value 'fnn', did you mean 'ffn'"),
        ({"param_tokens": {"qkv": 8, "proj": 8, "ffn": True}}, "param_tokens.ffn: expected a whole number"),
        ({"param_tokens": {"qkv": 8, "proj": "8", "ffn": 8}}, "param_tokens.proj: expected a whole number"),
        ({"param_tokens": {"qkv": 8, "proj": 8, "ffn": -1}}, "param_tokens.ffn: expected a whole number"),
    ],
)
def test_settings_that_do_not_fit_raise_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        TokenformerConfig(**settings)
    assert "\n" not in str(error.value)


def test_param_tokens_are_totals_for_each_kind():
    assert ParamTokens.parse(6) == ParamTokens(qkv=6, proj=6, ffn=24)
    assert ParamTokens.parse({"qkv": 1, "proj": 2, "ffn": 3}).items() == [("qkv", 1), ("proj", 2), ("ffn", 3)]
    model = create_backbone(
        "tokenformer_vit_tiny_patch16_224", depth=1, param_tokens={"qkv": 5, "proj": 6, "ffn": 7}, image_size=32
    )
    assert model.param_tokens == {"qkv": 5, "proj": 6, "ffn": 7}
    assert create_backbone("vit_tiny_patch16_224", depth=1).param_tokens == {}

"""Parameters and operations in closed form, against counting them."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_tokenformer.cost import ModelCost, model_cost
from lit_tokenformer.growth import grow
from lit_tokenformer.models import Tokenformer, TokenformerConfig, list_presets, preset_config
from lit_tokenformer.planning import plan_stages

TINY = TokenformerConfig(dim=16, depth=2, num_heads=2, param_tokens=8, image_size=16, patch_size=4, num_classes=5)
LANGUAGE = {
    "stem": "token",
    "head": "language",
    "positions": "rotary",
    "rotary_fraction": 0.5,
    "causal": True,
    "vocab_size": 19,
    "context_length": 9,
}
CONFIGS = {
    "pattention": {},
    "vit": {"projection": "linear", "feed_forward": "mlp", "bias": True, "norm_affine": True},
    "vit-bare": {"projection": "linear", "feed_forward": "mlp"},
    "pattention-mlp": {"feed_forward": "mlp", "mlp_ratio": 2.5, "norm_affine": True},
    "linear-pattention": {"projection": "linear", "bias": True},
    "avg": {"global_pool": "avg"},
    "no-class-token": {"global_pool": "avg", "class_token": False},
    "no-head": {"num_classes": 0},
    "grey-uneven": {"in_chans": 1, "param_tokens": {"qkv": 7, "proj": 5, "ffn": 11}, "score_norm": "softmax"},
    "drop-path": {"drop_path": 0.1},
    "patch-drop": {"patch_drop_rate": 0.6},
    "patch-drop-avg": {"patch_drop_rate": 0.9, "global_pool": "avg", "class_token": False},
    "one-block-drop-path": {"drop_path": 0.1, "depth": 1},
    "language": LANGUAGE,
    "language-grouped": {**LANGUAGE, "num_kv_heads": 1, "param_tokens": {"qkv": 7, "proj": 5, "ffn": 11}},
    "language-untied": {**LANGUAGE, "tie_embeddings": False, "projection": "linear", "feed_forward": "mlp"},
}
EVERY_CONFIG = pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)


def counted(model, training):
    """Operations for one sample as torch counts them; the input needs no gradient."""
    config = model.config
    inputs = {
        "patch": torch.randn(1, config.in_chans, config.image_size, config.image_size),
        "token": torch.randint(config.vocab_size, (1, config.context_length)),
    }
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(inputs[config.stem])
        if training:
            output.sum().backward()
    return counter.get_total_flops()


def assert_cost_is_right(model, cost):
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.flops == counted(model.eval(), training=False)
    assert cost.training_flops == counted(model.train(), training=True)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@EVERY_CONFIG
def test_cost_equals_counting_at_every_size(settings, checkpointing):
    model = Tokenformer(dataclasses.replace(TINY, **settings)).train()
    model.set_grad_checkpointing(checkpointing)
    assert_cost_is_right(model, model_cost(model.config, checkpointing=checkpointing))
    for factor in (2, 6) if model.param_tokens else ():
        totals = {kind: total * factor for kind, total in model.config.tokens.items()}
        grow(model, {kind: totals[kind] for kind in model.param_tokens})
        cost = model_cost(model.config, model.param_tokens, checkpointing)
        assert_cost_is_right(model, cost)
        assert cost == model_cost(model.config, totals, checkpointing)


def kept_for_backward(config, checkpointing):
    """Bytes of the tensors, weights aside, that autograd keeps from a forward pass over eight samples."""
    torch.manual_seed(0)
    model, kept = Tokenformer(config).train(), {}
    model.set_grad_checkpointing(checkpointing)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # which is kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randint(config.vocab_size, (8, config.context_length)))
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in own)


ROOT = Path(__file__).parents[1]
LANGUAGE_CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*lm*.yaml"))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("name", LANGUAGE_CONFIGS)
def test_plan_of_a_shipped_language_model_equals_counting_and_measuring(name, checkpointing):
    arguments = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["model"]["init_args"]
    config = preset_config(arguments["preset"], vocab_size=31, context_length=64)
    config = dataclasses.replace(config, dim=32, depth=3, num_heads=2, param_tokens=32)
    cost = model_cost(config, checkpointing=checkpointing)
    model = Tokenformer(config).train()
    model.set_grad_checkpointing(checkpointing)
    assert_cost_is_right(model, cost)
    config = dataclasses.replace(config, dropout=0.0)  # a CPU keeps its masks as floats, a GPU as bytes
    measured = kept_for_backward(config, checkpointing)
    if checkpointing:  # at most one block at once is computed again, and keeps what it keeps without
        sizes = [kept_for_backward(dataclasses.replace(config, depth=depth), False) for depth in (2, 3)]
        measured += sizes[1] - sizes[0]
    planned = cost.training_memory(8) - cost.training_memory(0)
    assert planned == pytest.approx(measured, rel=0.05)  # without statistics of norms and position biases


@pytest.mark.parametrize("preset", ["tokenformer_lm_tiny", "gpt2_tiny"])
@pytest.mark.parametrize("experts", [2, 4])
def test_experts_keep_what_a_single_one_keeps_and_a_copy_of_their_weights(preset, experts):
    sizes = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 32, "vocab_size": 31, "context_length": 64}
    config = preset_config(preset, **sizes, experts=experts, dropout=0.0)
    cost = model_cost(config)
    weights = [one for name, one in Tokenformer(config).named_parameters() if ".experts." in name]
    planned = cost.training_memory(8) - cost.training_memory(0) + sum(one.nbytes for one in weights)
    assert planned == pytest.approx(kept_for_backward(config, False), rel=0.03)


@pytest.mark.parametrize("preset", ["gpt2_tiny", "pangu_pi_tiny", "rwkv4_tiny", "bert_tiny", "tokenformer_lm_tiny"])
def test_cost_is_right_at_every_size(preset):
    """Hidden units, heads and blocks, as growth leads to them."""
    sizes = {"dim": 16, "depth": 2, "num_heads": 2, "param_tokens": 8, "vocab_size": 19, "context_length": 9}
    config = preset_config(preset, **sizes, rotary_fraction=0.5, dropout=0.0, shortcut_reduction=0)
    for size in ({"hidden": 40}, {"heads": 3}, {"hidden": 72, "heads": 4, "depth": 3, "ffn": 40}):
        model = Tokenformer(config.at_size(size))
        found = model_cost(config, size)
        assert found == model_cost(model.config)
        assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert found.flops == counted(model.eval(), training=False)


def test_every_part_declares_its_cost(recwarn):
    for preset in list_presets():
        model_cost(preset_config(preset))
    assert not [warning for warning in recwarn if "declares no cost" in str(warning.message)]


def test_tokens_at_birth_are_the_default():
    assert model_cost(TINY) == model_cost(TINY, {"qkv": 8, "proj": 8, "ffn": 32})


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tokenformer_vit_base_matched_patch16_224", 86_447_848),
        ("tokenformer_vit_large_patch16_224", 404_670_440),
        ("vit_base_patch16_224", 86_567_656),
    ],
)
def test_published_parameter_counts(name, parameters):
    assert model_cost(preset_config(name)).parameters == parameters


def test_published_formula():
    """arXiv 2410.23168, Table 3: N = 2 L d (3 n_qkv + n_o + n_ffn), operations 2 N T + 4 L d T^2."""
    config = preset_config("tokenformer_vit_base_patch16_224")
    length, dim, depth = config.num_data_tokens, config.dim, config.depth
    weights = 2 * depth * dim * (3 * 768 + 768 + 3072)
    stem_and_head = 2 * 196 * 3 * 16**2 * dim + 2 * dim * 1000
    assert model_cost(config).flops == 2 * weights * length + 4 * depth * dim * length**2 + stem_and_head


def test_published_formula_for_language():
    """As above with the product that gives logits, 2 V d for each token; the embedding is a look-up."""
    config = preset_config("tokenformer_150m")
    length, dim, depth = 2048, 768, 12
    weights = 2 * depth * dim * (3 * 768 + 768 + 3072)
    cost = model_cost(config)
    assert cost.data_tokens == length
    assert cost.flops == 2 * weights * length + 4 * depth * dim * length**2 + 2 * 50304 * dim * length


def test_training_memory_counts_weights_gradients_states_and_activations():
    cost = ModelCost(parameters=10, data_tokens=1, flops=0, training_flops=0, kept=3)
    assert cost.training_memory(batch_size=5) == 4 * (10 * 4 + 3 * 5)
    assert cost.training_memory(batch_size=5, bytes_per_number=2, states=1) == 2 * (10 * 3 + 3 * 5)
    assert model_cost(TINY, checkpointing=True).kept < model_cost(TINY).kept


def test_stages_add_up_to_the_run():
    growths = [(3, 30, {"qkv": 16, "proj": 16, "ffn": 64}), (5, 50, {"qkv": 16, "proj": 16, "ffn": 96})]
    stages = plan_stages(TINY, growths, total_steps=80, samples_per_step=4)
    assert [stage.start for stage in stages] == [0, 3, 5]
    assert [stage.steps for stage in stages] == [30, 20, 30]
    assert [stage.tokens["ffn"] for stage in stages] == [32, 64, 96]
    for stage in stages:
        assert stage.cost == model_cost(TINY, stage.tokens)
        assert stage.training_flops == stage.cost.training_flops * stage.steps * 4
    without = plan_stages(TINY, [], total_steps=80, samples_per_step=4)
    assert [stage.steps for stage in without] == [80]
    assert without[0].training_flops == 80 * 4 * model_cost(TINY).training_flops


@pytest.mark.parametrize("due", [[0, 20], [20, 20], [20, 80], [20, 200], [100, 200]])
def test_stages_add_up_whenever_growths_are_due(due):
    growths = [(i, step, {"qkv": 16 * i, "proj": 16 * i, "ffn": 64 * i}) for i, step in enumerate(due, start=1)]
    stages = plan_stages(TINY, growths, total_steps=80, samples_per_step=4)
    assert sum(stage.steps for stage in stages) == 80
    assert stages[0].steps == min(due[0], 80)

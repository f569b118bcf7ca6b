"""One contract for every architecture, with linear and with Pattention projections."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_tokenformer.cost import match_tokens, model_cost
from lit_tokenformer.growth import grow
from lit_tokenformer.growth.optimizer import grow_optimizer
from lit_tokenformer.inference.sampling import Sampling, generate_tokens
from lit_tokenformer.models import Tokenformer, create_backbone, list_presets, preset_config

LENGTH, VOCAB, IMAGE = 12, 19, 16
LENGTHS = torch.tensor([12, 5, 9])
SIZES = {
    **{"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 8, "dropout": 0.0, "attn_dropout": 0.0},
    **{"vocab_size": VOCAB, "context_length": LENGTH, "image_size": IMAGE, "patch_size": 4, "num_classes": 5},
}
PRESETS = [name for name in list_presets() if name.endswith("_tiny") or name.endswith("vit_tiny_patch16_224")]
PROJECTIONS = ("linear", "pattention")
CASES = {f"{preset}-{kind}": (preset, {"projection": kind}) for preset in PRESETS for kind in PROJECTIONS}
for kind in PROJECTIONS:  # the series of PanGu-pi inside of Pattention, and parts in company that no preset has
    CASES[f"pangu_pi_ffn-{kind}"] = ("pangu_pi_tiny", {"projection": kind, "feed_forward": "pattention"})
    CASES[f"causal_alibi-{kind}"] = ("pangu_pi_tiny", {"projection": kind, "positions": "alibi"})
    CASES[f"attention_channel_mix-{kind}"] = ("gpt2_tiny", {"projection": kind, "feed_forward": "channel_mix"})
    CASES[f"wkv_pattention-{kind}"] = ("rwkv4_tiny", {"projection": kind, "feed_forward": "pattention"})
    CASES[f"hybrid_tiny-{kind}"] = ("hybrid_tiny", {"projection": kind, "depth": 3})
    CASES[f"wkv_post-{kind}"] = ("rwkv4_tiny", {"projection": kind, "norm_position": "post", "feed_forward": "glu"})
CONFIGS = {name: preset_config(preset, **{**SIZES, **overrides}) for name, (preset, overrides) in CASES.items()}


def every(condition=lambda config: True):
    """Parametrises by the cases whose config has something."""
    return pytest.mark.parametrize("case", [name for name, config in CONFIGS.items() if condition(config)])


def grows(config):
    return "pattention" in (config.projection, config.feed_forward)


def causal(config):
    return config.stem == "token" and config.causal


def masked(config):
    return config.head == "masked_language"


def make(case, dtype=torch.float64, random=True, **overrides) -> Tokenformer:
    """A model all of whose parameters are random: zeros and ones at birth would hide what they are multiplied by."""
    preset, settings = CASES[case]
    model = create_backbone(preset, **{**SIZES, **settings, **overrides}).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters() if random else ():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def make_inputs(model, batch=3):
    if model.config.stem == "token":
        return torch.randint(VOCAB, (batch, LENGTH))
    return torch.randn(batch, 3, IMAGE, IMAGE, dtype=next(model.parameters()).dtype)


def present(x):
    return torch.arange(x.shape[1]) < LENGTHS[:, None]


def loss_of(model, x, **settings):
    logits = model(x, **settings)
    targets = torch.arange(logits[..., 0].numel()) % logits.shape[-1]
    return F.cross_entropy(logits.flatten(0, -2), targets)


def train(model, optimizer, x, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def difference(one, other):
    return ((one - other).norm() / other.norm()).item()


# --- Growth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("random", [True, False], ids=["trained", "birth"])
@every(grows)
@torch.no_grad()
def test_growth_preserves_output(case, random):
    """From 8 to 16 and 48 by whole factors, with zero keys to 52, and by two with a rest of zero keys to 110."""
    model = make(case, random=random)
    x = make_inputs(model)
    settings = [{}, {"lengths": LENGTHS}] if masked(model.config) else [{}]
    before = [model(x, **more) for more in settings]
    for tokens, method in ((16, "split"), (48, "split"), (52, "zero_keys"), (110, "split")):
        assert grow(model, tokens, method)
        assert model.param_tokens["ffn"] == 4 * tokens
        for more, expected in zip(settings, before, strict=True):
            assert difference(model(x, **more), expected) <= 1e-12


@every(lambda config: not grows(config))
def test_what_has_no_parameter_tokens_does_not_grow(case):
    model = make(case)
    parameters = list(model.parameters())
    assert model.param_tokens == {} and grow(model, 16) == []
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))


@every(lambda config: grows(config) and causal(config))
@torch.no_grad()
def test_growth_ends_what_is_being_decoded(case):
    model = make(case)
    x, state = make_inputs(model), model.new_state(LENGTH)
    model(x[:, :4], state=state)
    grow(model, 16)
    with pytest.raises(ValueError, match="state: created before a growth of the model"):
        model(x[:, 4:], state=state)


@pytest.mark.parametrize(("method", "tokens"), [("split", 16), ("zero_keys", 20)], ids=str)
@every(grows)
def test_new_tokens_move_at_the_first_steps(case, method, tokens):
    """Keys and shifts at the first; values and scales, whose gradients zero scores make zero, at the second."""
    model = make(case).train()
    x, optimizer = make_inputs(model), torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    train(model, optimizer, x, steps=2)
    grown = grow(model, tokens, method)
    grow_optimizer(optimizer, grown)
    born = {one.name: one.new.detach()[one.grown.rows.new()].clone() for one in grown}
    for late in (("value_tokens", "scale_tokens"), ()):
        train(model, optimizer, x)
        for one in grown:
            moved = (one.new.detach()[one.grown.rows.new()] != born[one.name]).any(dim=1)
            assert one.name.endswith(late) or moved.all(), one.name


@every(grows)
@torch.no_grad()
def test_grown_weights_load_into_a_fresh_model(case):
    model, fresh = make(case), make(case)
    grow(model, 20)
    fresh.load_state_dict(model.state_dict(), strict=True)
    x = make_inputs(model)
    assert fresh.param_tokens == model.param_tokens and torch.equal(fresh(x), model(x))


@every()
def test_weights_of_the_other_projection_are_refused(case):
    model = make(case)
    other = make(case, projection="linear" if model.config.projection == "pattention" else "pattention")
    with pytest.raises(RuntimeError, match="Missing key.*attn.query|Missing key.*attn.key"):
        model.load_state_dict(other.state_dict())


# --- Reading from left to right ---------------------------------------------------------------------------------------


@every(causal)
@torch.no_grad()
def test_no_token_sees_the_future(case):
    model = make(case)
    x = make_inputs(model)
    before = model(x)
    for place in (LENGTH - 1, 5, 1):
        changed = x.clone()
        changed[:, place] = (x[:, place] + 1) % VOCAB
        after = model(changed)
        assert (after[:, :place] - before[:, :place]).abs().max() <= 1e-12
        assert ((after - before)[:, place:].abs().amax(dim=-1) > 1e-6).all()  # and all that come later see it


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [5, 1, 4, 2], [LENGTH]], ids=["steps", "chunks", "whole"])
@every(causal)
@torch.no_grad()
def test_decoding_equals_the_whole_forward(case, chunks):
    model = make(case)
    x, state = make_inputs(model), model.new_state(LENGTH)
    found = torch.cat([model(chunk, state=state) for chunk in x.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(found, model(x), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="state: capacity exceeded|learned positions"):
        model(x[:, :1], state=state)


@pytest.mark.parametrize("chunks", [[8, 1, 1, 2], [1] * LENGTH], ids=["prompt", "steps"])
@every(causal)
@torch.no_grad()
def test_padding_at_the_left_changes_nothing(case, chunks):
    model = make(case)
    x, padding = make_inputs(model), torch.tensor([0, 3, 9])  # of the last row nothing stands in the first chunk
    state = model.new_state(LENGTH, padding)
    found = torch.cat([model(chunk, state=state) for chunk in x.split(chunks, dim=1)], dim=1)
    assert found.isfinite().all()
    for row, skip in enumerate(padding.tolist()):
        alone = model(x[row : row + 1, skip:])[0]
        torch.testing.assert_close(found[row, skip:], alone, rtol=1e-10, atol=1e-10)


@every(causal)
def test_text_goes_on_the_same_with_and_without_a_state(case):
    model = make(case)
    prompts, new = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [4] * 7, [5, 6, 7, 8, 9, 1, 2, 3, 4]], 6
    greedy = Sampling(temperature=0)
    texts = [
        torch.stack(list(generate_tokens(model, prompts, new, greedy, cache=cache)), dim=1) for cache in (True, False)
    ]
    assert torch.equal(*texts)
    ends = [(row >= 0).sum().item() for row in texts[0]]
    endless = model.config.length_limit is None
    assert endless == (model.config.positions in ("none", "alibi"))
    assert ends == [new] * 3 if endless else ends == [LENGTH - len(prompt) for prompt in prompts]


@every(lambda config: config.stem == "token")
@torch.no_grad()
def test_documents_are_kept_apart_or_refused(case):
    model = make(case)
    x = make_inputs(model)
    documents = (torch.arange(LENGTH) >= 5).long().expand(3, -1)
    if not model.keeps_documents_apart:
        with pytest.raises(ValueError, match="documents: unsupported by a model with a token shift"):
            model(x, documents=documents)
        return
    before, changed = model(x, documents=documents), x.clone()
    changed[:, 2] = (x[:, 2] + 1) % VOCAB
    after = model(changed, documents=documents)
    torch.testing.assert_close(after[:, 5:], before[:, 5:], rtol=0, atol=1e-12)
    assert ((after - before)[:, 2:5].abs().amax(dim=-1) > 1e-6).all()


# --- Padding at the right ---------------------------------------------------------------------------------------------


@every(lambda config: config.stem == "token")
@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(case):
    model = make(case)
    x = make_inputs(model)
    real = present(x)
    found = [model(x.where(real, filler), lengths=LENGTHS)[real] for filler in (0, 7)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    alone = [model(x[row : row + 1, :length])[0] for row, length in enumerate(LENGTHS.tolist())]
    torch.testing.assert_close(found[0], torch.cat(alone), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("documents", [None, (torch.arange(LENGTH) >= 4).long().expand(3, -1)], ids=["", "documents"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "together"])
@every(masked)
def test_unpadding_changes_nothing(monkeypatch, case, documents, alone):
    """Whether attention takes one sequence after the other, as on a processor, or all at once."""
    if not alone:
        packing = Tokenformer._packing
        together = staticmethod(lambda *args: packing(*args)._replace(lengths=None))
        monkeypatch.setattr(Tokenformer, "_packing", together)
    models = [make(case, unpad=unpad) for unpad in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    x = make_inputs(models[0])
    seen, outputs = [], []
    for model in models:
        for block in model.blocks:
            block.mlp.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
        outputs.append(model(x, documents=documents, lengths=LENGTHS)[present(x)])
    assert seen == [(3, LENGTH, 32)] * 2 + [(1, LENGTHS.sum(), 32)] * 2
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    targets = torch.arange(len(outputs[0])) % VOCAB
    given = [gradients(m, F.cross_entropy(o, targets)) for m, o in zip(models, outputs, strict=True)]
    for name, gradient in given[0].items():
        torch.testing.assert_close(given[1][name], gradient, rtol=1e-8, atol=1e-10)


# --- Training ---------------------------------------------------------------------------------------------------------


@every()
def test_checkpointing_changes_no_gradient(case):
    model = make(case).train()
    x, found = make_inputs(model), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        found.append(gradients(model, loss_of(model, x)))
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


@every()
def test_every_parameter_learns(case):
    """At birth; maps that begin at zero keep gradients from what stands before them for two steps."""
    model = make(case, random=False).train()
    x, born = make_inputs(model), copy.deepcopy(model.state_dict())
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), x, steps=3)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter != born[name]).any(), name


@every()
def test_names_of_special_parameters_exist(case):
    model = make(case)
    names = set(dict(model.named_parameters()))
    assert model.no_weight_decay() <= names and set(model.lr_scales()) <= names
    mixers = {model.config.parts_of(layer)[0] for layer in range(model.config.depth)}
    assert bool(model.lr_scales()) == ("wkv" in mixers)
    series = {name for name in names if name.endswith((".scale", ".shift", "scale_tokens", "shift_tokens"))}
    assert series <= model.no_weight_decay() and bool(series) == (model.config.series > 1)


@every()
def test_bfloat16_is_finite(case):
    model = make(case, torch.float32, low_precision_norm=CONFIGS[case].norm == "layer_norm").train()
    x = make_inputs(model)
    more = {"lengths": LENGTHS} if masked(model.config) else {}
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, x, **more)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients(model, loss).values())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    assert half.dtype == torch.bfloat16 and difference(half.float(), model(x)) < 0.1


# --- What it costs ----------------------------------------------------------------------------------------------------


def counted(model, training):
    """Operations for one sample as torch counts them; the input needs no gradient."""
    x = make_inputs(model, batch=1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(x)
        if training:
            output.sum().backward()
    return counter.get_total_flops()


@every()
def test_cost_equals_counting(case):
    config = make(case, torch.float32).config
    settings = [{}, {"dropout": 0.1, "attn_dropout": 0.1}, {"drop_path": 0.1, "unpad": False}]
    for checkpointing, more in ((False, {}), *((True, more) for more in settings)):
        model = make(case, torch.float32, **more).train()
        model.set_grad_checkpointing(checkpointing)
        cost = model_cost(model.config, checkpointing=checkpointing)
        assert cost.training_flops == counted(model, training=True), (checkpointing, more)
        if not checkpointing:
            assert cost.flops == counted(model, training=False)
            assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
            assert cost == model_cost(config)


@pytest.mark.parametrize("name", list_presets())
def test_cost_of_every_preset_has_its_parameters(name):
    with torch.device("meta"):
        model = create_backbone(name, depth=2)
    assert model_cost(model.config).parameters == sum(parameter.numel() for parameter in model.parameters())


SMALL = {name: {} for name in list_presets() if name.endswith("_small")}
GROWING_SMALL = {
    **{(name, None): {"projection": "pattention"} for name in SMALL},
    ("pangu_pi_small", "series in Pattention"): {"projection": "pattention", "feed_forward": "pattention"},
}


def cost_of_blocks(config, by):
    """What as many blocks again add: no stem, no head."""
    one, two = (model_cost(replace(config, depth=depth)) for depth in (config.depth, 2 * config.depth))
    return getattr(two, by) - getattr(one, by)


@pytest.mark.parametrize("by", ["parameters", "flops"])
@pytest.mark.parametrize("family", GROWING_SMALL, ids=str)
def test_matched_models_cost_the_same(family, by):
    """Within 1 % without the embedding, with texts so short that attention costs less than what it is matched to."""
    config = preset_config(family[0], depth=6, context_length=128, **GROWING_SMALL[family])
    for name in SMALL:
        reference = preset_config(name, depth=6, context_length=128)
        matched = replace(config, param_tokens=match_tokens(config, reference, by))
        assert cost_of_blocks(matched, by) == pytest.approx(cost_of_blocks(reference, by), rel=0.01), name


def test_matched_images_cost_the_same():
    config, reference = preset_config("tokenformer_vit_small_patch16_224"), preset_config("vit_small_patch16_224")
    for by in ("parameters", "flops"):
        matched = replace(config, param_tokens=match_tokens(config, reference, by))
        assert cost_of_blocks(matched, by) == pytest.approx(cost_of_blocks(reference, by), rel=0.01)


def test_what_cannot_be_matched_is_told():
    linear, pattention = (preset_config("rwkv4_small", projection=kind) for kind in PROJECTIONS)
    with pytest.raises(ValueError, match="match: the model without its feed-forward has more flops than the reference"):
        match_tokens(preset_config("tokenformer_lm_small"), linear, "flops")  # scores of 1024 x 1024 data tokens
    with pytest.raises(ValueError, match="match: the feed-forward has no Pattention layer"):
        match_tokens(linear, pattention)


# --- What does not go together ----------------------------------------------------------------------------------------

REFUSED = [
    ("rwkv4_tiny", {"positions": "alibi"}, "mixer: unsupported combination: 'wkv' needs positions: none, got alibi"),
    ("rwkv4_tiny", {"causal": False}, "mixer: unsupported combination: 'wkv' needs causal: true, got false"),
    ("bert_tiny", {"causal": True}, "head: unsupported combination: 'masked_language' needs causal: false, got true"),
    ("bert_tiny", {"positions": "none"}, "'masked_language' needs positions: learned or rotary or alibi, got none"),
    ("bert_tiny", {"mixer": "wkv", "positions": "none", "causal": True}, "head: unsupported combination"),
    ("bert_tiny", {"head": "image"}, "head: unsupported combination: 'image' needs stem: patch, got token"),
    ("vit_tiny_patch16_224", {"mixer": "wkv"}, "mixer: unsupported combination: 'wkv' needs stem: token, got patch"),
    ("vit_tiny_patch16_224", {"positions": "rotary"}, "'patch' needs positions: learned, got rotary"),
    ("vit_tiny_patch16_224", {"head": "masked_language"}, "'masked_language' needs stem: token, got patch"),
    ("bert_tiny", {"feed_forward": "channel_mix"}, "feed_forward: .*'channel_mix' needs causal: true, got false"),
    ("rwkv4_tiny", {"series": 2}, "feed_forward: .*'channel_mix' needs series: 1, got 2"),
    (
        "tokenformer_lm_tiny",
        {"series": 2, "score_norm": "softmax"},
        r"series: .* score_norm 'softmax' has no .* \(got 2",
    ),
    ("pangu_pi_tiny", {"series": 0}, "series: expected a whole number of at least 1, got 0"),
    ("pangu_pi_tiny", {"shortcut_reduction": 33}, "shortcut_reduction: expected at most dim 32, got 33"),
    ("pangu_pi_tiny", {"low_precision_norm": True}, "norm: .*'rms_norm' needs low_precision_norm: false"),
    ("rwkv4_tiny", {"unpad": True}, "mixer: .*'wkv' needs unpad: false, got true"),
    ("gpt2_tiny", {"feed_forward": "channel_mix", "unpad": True}, "feed_forward: .*'channel_mix' needs unpad: false"),
    ("mosaic_bert_tiny", {"drop_path": 0.1}, "unpad: true needs drop_path: 0, got 0.1"),
    (
        "pythia_tiny",
        {"rotary_fraction": 0.1},
        "rotary_fraction: invalid number of rotary dimensions .got 1 = 0.1 of 16",
    ),
    ("gpt2_tiny", {"mlp_ratio": 0.01}, "mlp_ratio: expected at least 1 / dim"),
    ("gpt2_tiny", {"norm_eps": 0.0}, "norm_eps: expected a positive number"),
    ("gpt2_tiny", {"attn_dropout": 1.0}, "attn_dropout: expected a rate in"),
    ("gpt2_tiny", {"activation": "gelu_new"}, "activation: unknown value 'gelu_new', did you mean 'gelu_tanh'"),
    ("gpt2_tiny", {"mixer": "atention"}, "mixer: unknown value 'atention', did you mean 'attention'"),
]


@pytest.mark.parametrize(("preset", "settings", "message"), REFUSED, ids=[f"{r[0]}-{'-'.join(r[1])}" for r in REFUSED])
def test_impossible_models_are_refused_before_they_are_built(preset, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        preset_config(preset, **{**SIZES, **settings})
    assert "\n" not in str(error.value)


def test_pattern_of_blocks_is_checked():
    with pytest.raises(ValueError, match="mixer: unknown value 'wky', did you mean 'wkv'"):
        preset_config("hybrid_tiny", layers=["wky"])
    with pytest.raises(ValueError, match="feed_forward: unsupported combination: 'channel_mix' needs causal: true"):
        preset_config("bert_tiny", layers=["attention", "attention+channel_mix"])
    with pytest.raises(ValueError, match=r"layers: expected names of mixers, or mixer\+feed_forward, got \(\)"):
        preset_config("hybrid_tiny", layers=[])
    listed = preset_config("hybrid_tiny", layers=["wkv", "wkv", "attention+mlp"])
    assert hash(listed) == hash(preset_config("hybrid_tiny")) and listed.parts_of(5) == ("attention", "mlp")

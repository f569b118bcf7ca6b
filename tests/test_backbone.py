"""The backbone under timm's contract, against timm's ViT with copied weights, and its parts as published."""

import dataclasses
import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

from lit_tokenformer.models import Pattention, Tokenformer, TokenformerConfig, create_backbone
from lit_tokenformer.models.config import config_changes

TINY = TokenformerConfig(dim=32, depth=3, num_heads=2, param_tokens=8, image_size=16, patch_size=4, num_classes=5)
AVG = dataclasses.replace(TINY, class_token=False, global_pool="avg")
LINEAR = dataclasses.replace(TINY, projection="linear", feed_forward="mlp", bias=True, norm_affine=True)
CONFIGS = pytest.mark.parametrize("config", [TINY, AVG, LINEAR], ids=["token", "avg", "linear"])
IMAGE = (2, 3, 16, 16)


@CONFIGS
def test_features_head_and_logits_have_timms_shapes(config):
    model = Tokenformer(config).eval()
    image = torch.randn(IMAGE)
    features = model.forward_features(image)
    assert features.shape == (2, 16 + config.num_prefix_tokens, 32)
    assert model.num_prefix_tokens == config.num_prefix_tokens
    assert model.num_features == model.head_hidden_size == model.embed_dim == 32
    assert model.forward_head(features, pre_logits=True).shape == (2, 32)
    logits = model.forward_head(features)
    assert logits.shape == (2, 5) and logits.isfinite().all()
    assert torch.equal(model(image), logits)


@CONFIGS
def test_every_parameter_gets_a_gradient(config):
    model = Tokenformer(config)
    model(torch.randn(IMAGE)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@CONFIGS
def test_reset_classifier(config):
    model = Tokenformer(config).double().eval()
    image = torch.randn(IMAGE).double()
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(0)
    assert model.num_classes == 0 and isinstance(model.get_classifier(), nn.Identity)
    assert model(image).shape == (2, 32)
    model.reset_classifier(0, "")
    assert torch.equal(model(image), model.forward_features(image))
    model.reset_classifier(7, "avg")
    assert model.num_classes == 7 and model(image).shape == (2, 7)
    assert model.get_classifier().weight.dtype == torch.float64


def test_reset_classifier_refuses_an_unknown_pool_and_keeps_the_head():
    model = Tokenformer(TINY)
    with pytest.raises(ValueError, match="global_pool: unknown value 'average'"):
        model.reset_classifier(3, "average")
    with pytest.raises(ValueError, match="global_pool: 'token' needs class_token"):
        Tokenformer(AVG).reset_classifier(3, "token")
    assert model.num_classes == 5 and model.get_classifier().out_features == 5


@CONFIGS
def test_no_weight_decay_names_parameters(config):
    model = Tokenformer(config)
    expected = {"stem.pos_embed"} | ({"stem.cls_token"} if config.class_token else set())
    assert model.no_weight_decay() == expected <= set(dict(model.named_parameters()))


def test_layer_decay_sorts_every_parameter():
    model = Tokenformer(TINY)
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5, verbose=False)
    scales = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    depths = {"stem": 4, "blocks.0": 3, "blocks.1": 2, "blocks.2": 1, "norm": 1, "head": 0}
    for name, parameter in model.named_parameters():
        assert scales[parameter] == 0.5 ** depths[next(start for start in depths if name.startswith(start))], name


@CONFIGS
def test_grad_checkpointing_changes_nothing(config):
    model = Tokenformer(config).train()
    image = torch.randn(IMAGE)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        output = model(image)
        output.square().sum().backward()
        found.append([output.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


@CONFIGS
def test_intermediates_equal_hooks(config):
    model = Tokenformer(config).eval()
    image = torch.randn(IMAGE)
    seen = []
    hooks = [block.register_forward_hook(lambda module, args, output: seen.append(output)) for block in model.blocks]
    with torch.no_grad():
        expected = model.forward_features(image)
    for hook in hooks:
        hook.remove()
    prefix = config.num_prefix_tokens

    final, maps = model.forward_intermediates(image)
    assert torch.equal(final, expected) and len(maps) == 3
    for own, hooked in zip(maps, seen, strict=True):
        assert own.shape == (2, 32, 4, 4)
        assert torch.equal(own.flatten(2).transpose(1, 2), hooked[:, prefix:])

    tokens = model.forward_intermediates(image, indices=[0, 2], output_fmt="NLC", intermediates_only=True, norm=True)
    assert len(tokens) == 2
    assert torch.equal(tokens[1], expected[:, prefix:])
    assert torch.equal(tokens[0], model.norm(seen[0])[:, prefix:])

    pairs = model.forward_intermediates(image, indices=2, return_prefix_tokens=True, intermediates_only=True)
    assert len(pairs) == 2 and torch.equal(pairs[1][1], seen[2][:, :prefix])

    early, first = model.forward_intermediates(image, indices=[0], stop_early=True, output_fmt="NLC")
    assert torch.equal(first[0], seen[0][:, prefix:]) and torch.equal(early, model.norm(seen[0]))

    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(image, output_fmt="NHWC")


@pytest.mark.parametrize("prune_norm", [False, True])
def test_pruned_model_gives_the_same_intermediates(prune_norm):
    model = Tokenformer(TINY).eval()
    image = torch.randn(IMAGE)
    expected = model.forward_intermediates(image, indices=[0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1], prune_norm=prune_norm) == [0, 1]
    assert len(model.blocks) == 2 and model.num_classes == 0
    assert isinstance(model.norm, nn.Identity) is prune_norm
    found = model.forward_intermediates(image, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert model(image).shape == (2, 17, 32)


@CONFIGS
@pytest.mark.parametrize("size", [(24, 24), (8, 16), (8, 32)])  # the last has as many patches in another shape
def test_images_of_another_size(config, size):
    model = Tokenformer(config).eval()
    image = torch.randn(2, 3, *size)
    assert model(image).shape == (2, 5)
    assert model.forward_intermediates(image, intermediates_only=True)[0].shape == (2, 32, size[0] // 4, size[1] // 4)
    timm_vit = timm_like(config, dynamic_img_size=True)
    copy_to_timm(Tokenformer(dataclasses.replace(LINEAR, **pool_of(config))), timm_vit)
    with torch.no_grad():
        timm_vit.pos_embed.copy_(model.stem.pos_embed)
    theirs = timm_vit._pos_embed(timm_vit.patch_embed(image))
    with torch.no_grad():
        model.stem.patch_embed.proj.weight.copy_(timm_vit.patch_embed.proj.weight)
        model.stem.patch_embed.proj.bias.copy_(timm_vit.patch_embed.proj.bias)
        if config.class_token:
            model.stem.cls_token.copy_(timm_vit.cls_token)
    torch.testing.assert_close(model.stem(image), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [TINY, AVG], ids=["token", "avg"])
def test_loading_positions_of_another_image_size(config):
    small, large = Tokenformer(config), Tokenformer(dataclasses.replace(config, image_size=32))
    state = small.state_dict()
    large.load_state_dict(state)
    assert state["stem.pos_embed"].shape == small.stem.pos_embed.shape  # the caller's dict is left alone
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(large.eval()(image), small.eval()(image), rtol=0, atol=1e-6)
    small.load_state_dict(large.state_dict())
    assert small.stem.pos_embed.shape == (1, config.num_data_tokens, 32)


def test_images_need_not_be_square():
    wide = dataclasses.replace(TINY, image_size=[16, 32])  # as from YAML
    assert wide.image_size == (16, 32) and wide.patch_grid == (4, 8) and wide.num_positions == 33
    assert dataclasses.replace(TINY, image_size=(16, 16)) == TINY
    square, model = Tokenformer(TINY).eval(), Tokenformer(wide).eval()
    model.load_state_dict(square.state_dict())  # positions are resampled
    image = torch.randn(1, 3, 16, 32)
    torch.testing.assert_close(model(image), square(image), rtol=0, atol=1e-6)
    assert config_changes(wide, dataclasses.replace(TINY, image_size=(32, 16))).keys() == {"image_size", "patch_grid"}
    with pytest.raises(RuntimeError, match="size mismatch"):
        square.load_state_dict(model.state_dict())
    for size, message in (((16, 30), "not divisible by patch_size 4"), ((16,), "expected one or two whole numbers")):
        with pytest.raises(ValueError, match=f"^image_size: {message}"):
            dataclasses.replace(TINY, image_size=size)


def test_loading_positions_with_another_prefix_raises():
    with pytest.raises(RuntimeError):
        Tokenformer(AVG).load_state_dict(Tokenformer(TINY).state_dict(), strict=False)


def test_drop_path_acts_in_training_only():
    model = Tokenformer(dataclasses.replace(TINY, drop_path=0.5))
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == [0.0, 0.25, 0.5]
    plain = Tokenformer(TINY).eval()
    plain.load_state_dict(model.state_dict())
    image = torch.randn(8, 3, 16, 16)
    assert torch.equal(model.eval()(image), plain(image))
    model.train()
    assert not torch.equal(model(image), model(image))
    assert torch.equal(plain.train()(image), plain.eval()(image))


def test_norms_and_biases_are_where_they_were_published():
    model = Tokenformer(TINY)
    for block in model.blocks:
        assert list(block.norm1.parameters()) == list(block.norm2.parameters()) == []
    assert model.norm.weight.shape == model.norm.bias.shape == (32,)
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert biases == {"stem.patch_embed.proj.bias", "norm.bias", "head.fc.bias"}
    kinds = [layer.kind for layer in model.blocks[0].modules() if isinstance(layer, Pattention)]
    assert kinds == ["qkv", "qkv", "qkv", "proj", "ffn"]
    assert model.param_tokens == {"qkv": 8, "proj": 8, "ffn": 32}


@pytest.mark.parametrize(("dim", "depth"), [(128, 2), (64, 4)])
def test_birth_statistics_are_the_published_ones(dim, depth):
    config = TokenformerConfig(
        dim=dim, depth=depth, num_heads=2, param_tokens=64, image_size=32, patch_size=4, num_classes=100
    )
    model = Tokenformer(config)
    layers = [layer for layer in model.modules() if isinstance(layer, Pattention)]
    keys = torch.cat([layer.key_tokens.detach() for layer in layers])
    values = torch.cat([layer.value_tokens.detach() for layer in layers])
    assert keys.std().item() == pytest.approx(0.02, rel=0.02)
    assert values.std().item() == pytest.approx(2 / (depth * math.sqrt(dim)), rel=0.02)
    assert all(layer.tau.item() == pytest.approx(math.sqrt(layer.num_tokens)) for layer in layers)
    assert model.stem.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.get_classifier().weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.get_classifier().bias.any()


def test_same_seed_gives_same_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(Tokenformer(TINY).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_whole_model_runs_in_half_precision():
    model = Tokenformer(TINY).eval()
    image = torch.randn(IMAGE)
    wide = model(image)
    half = model.bfloat16()(image.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - wide).norm() / wide.norm() < 0.05


def pool_of(config):
    return {"class_token": config.class_token, "global_pool": config.global_pool}


def timm_like(config, **settings):
    """timm's ViT of the same sizes; its final norm stands before the pooling, as ours does."""
    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.num_heads,
        num_classes=config.num_classes,
        class_token=config.class_token,
        global_pool=config.global_pool,
        fc_norm=False,
        **settings,
    )


@torch.no_grad()
def copy_to_timm(model, vit):
    """Copies our weights into timm's ViT, our three projections into its fused one."""
    state = {}
    for name, tensor in model.state_dict().items():
        state[name.removeprefix("stem.").replace("head.fc.", "head.")] = tensor
    for i in range(len(model.blocks)):
        for part in ("weight", "bias"):
            parts = [state.pop(f"blocks.{i}.attn.{name}.{part}") for name in ("query", "key", "value")]
            state[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(parts)
    vit.load_state_dict(state)


@pytest.mark.parametrize(
    "pool",
    [
        {"class_token": True, "global_pool": "token"},
        {"class_token": True, "global_pool": "avg"},
        {"class_token": False, "global_pool": "avg"},
    ],
    ids=["token", "token-avg", "avg"],
)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_linear_projections_equal_timms_vit(pool, dtype, atol):
    sizes = {"dim": 48, "depth": 3, "num_heads": 3, "image_size": 16, "patch_size": 4, "num_classes": 7}
    model = create_backbone("vit_tiny_patch16_224", **sizes, **pool).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing at its default: weights of norms, biases, class token
            parameter.add_(torch.randn_like(parameter) * 0.1)
    vit = timm_like(model.config).to(dtype).eval()
    copy_to_timm(model, vit)
    image = torch.randn(2, 3, 16, 16, dtype=dtype)
    torch.testing.assert_close(model.forward_features(image), vit.forward_features(image), rtol=0, atol=atol)
    torch.testing.assert_close(model(image), vit(image), rtol=0, atol=atol)
    ours = torch.autograd.grad(model(image).square().sum(), model.blocks[0].attn.key.weight)[0]
    theirs = torch.autograd.grad(vit(image).square().sum(), vit.blocks[0].attn.qkv.weight)[0][48:96]
    assert (ours - theirs).norm() / theirs.norm() < atol

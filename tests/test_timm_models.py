"""Tokenformer vision transformers as timm's models: timm's own functions create, resize, save and optimize them."""

import subprocess
import sys

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2

import lit_tokenformer.interop.timm as registered
from lit_tokenformer.growth import grow
from lit_tokenformer.models import create_backbone

NAME = "tokenformer_vit_tiny_patch16_224"
SIZES = {"img_size": 32, "patch_size": 8, "depth": 4, "num_classes": 7}


def model(**arguments):
    torch.manual_seed(0)
    return timm.create_model(NAME, **{**SIZES, **arguments}).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_timm_lists_every_image_preset_and_leaves_its_own_alone():
    assert timm.list_models("tokenformer_*") == sorted(registered.NAMES)
    assert timm.is_model_pretrained(NAME) is False
    assert type(timm.create_model("vit_tiny_patch16_224", depth=1)).__module__ == "timm.models.vision_transformer"
    assert timm.data.resolve_data_config({}, model=model())["input_size"] == (3, 224, 224)


def test_the_model_equals_the_preset_of_its_name(images):
    torch.manual_seed(0)
    ours = create_backbone(NAME, image_size=32, patch_size=8, depth=4, num_classes=7).eval()
    torch.testing.assert_close(model()(images), ours(images), rtol=0, atol=0)


def test_arguments_have_timms_names(images):
    made = model(
        img_size=(32, 32), in_chans=1, drop_rate=0.5, drop_path_rate=0.2, proj_drop_rate=0.1, global_pool="avg"
    )
    assert made(images[:, :1]).shape == (2, 7) and made.global_pool == "avg"
    config = made.config
    assert (config.in_chans, config.drop_path, config.dropout, config.image_size) == (1, 0.2, 0.1, 32)
    torch.manual_seed(0)
    dropped, kept = made.train()(images[:, :1]), made.eval()(images[:, :1])
    assert made.head_drop.p == 0.5 and not torch.equal(dropped, kept)
    assert model(num_classes=0, global_pool="")(images).shape == (2, 17, 192)
    assert next(model(dtype=torch.float64, device="cpu").parameters()).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": (32, 24)}, r"^image_size: expected a square, got \(32, 24\)"),
        ({"embed_dims": 3}, "unknown value 'embed_dims'"),
        ({"global_pool": "map"}, "global_pool: unknown value 'map'"),
        ({"reg_tokens": 4}, "reg_tokens"),
    ],
)
def test_what_the_model_has_not_is_one_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)


@pytest.mark.parametrize("kind", ["getter", "hook", "fx"])
def test_features(kind, images):
    made = model(features_only=True, out_indices=(1, 3), feature_cls=kind)
    assert made.feature_info.channels() == [192, 192] and made.feature_info.reduction() == [8, 8]
    assert len(made(images)) == 2


def test_intermediate_layers_are_those_of_the_blocks(images):
    made, outputs = model(), []
    made.blocks[2].register_forward_hook(lambda module, args, output: outputs.append(output))
    ((patches, prefix),) = made.get_intermediate_layers(images, [2], return_prefix_tokens=True)
    torch.testing.assert_close(torch.cat([prefix, patches], dim=1), outputs[0], rtol=0, atol=0)
    named = made.forward_intermediates(images, indices=[2], output_dict=True, output_fmt="NLC")
    torch.testing.assert_close(named["image_intermediates"][0], patches, rtol=0, atol=0)
    torch.testing.assert_close(named["image_features"], made.forward_features(images), rtol=0, atol=0)
    assert made.get_intermediate_layers(images, 2, reshape=True)[0].shape == (2, 192, 4, 4)
    with pytest.raises(ValueError, match="^attn_mask: unsupported"):
        made.forward_intermediates(images, attn_mask=torch.ones(1))


@pytest.mark.parametrize("totals", [{"qkv": 250, "ffn": 800}, {"depth": 6}])
def test_a_grown_model_is_saved_and_loaded_by_timm(totals, images, tmp_path):
    made = model()
    before = made(images)
    grow(made, totals)
    torch.testing.assert_close(made(images), before, rtol=0, atol=2e-6)
    assert len(made.feature_info) == len(made.blocks)
    save_for_hf(made, str(tmp_path), model_args=SIZES)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded(images), made(images), rtol=0, atol=0)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, in_chans=1, img_size=48).eval()
    assert other(torch.zeros(1, 1, 48, 48)).shape == (1, 3)


def test_layer_decay_counts_the_blocks():
    made = model()
    groups = create_optimizer_v2(made, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5).param_groups
    assert sorted({group["lr_scale"] for group in groups}) == [0.5**power for power in range(5, -1, -1)]
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    undecayed = {names[id(one)] for group in groups if group["weight_decay"] == 0 for one in group["params"]}
    assert {"stem.cls_token", "stem.pos_embed"} <= undecayed


def test_input_size_is_changed_as_in_timms_vision_transformer(images):
    made, theirs = model(), timm.create_model("vit_tiny_patch16_224", **SIZES).eval()
    with torch.no_grad():
        theirs.pos_embed.copy_(made.stem.pos_embed)
        theirs.patch_embed.proj.load_state_dict(made.stem.patch_embed.proj.state_dict())
    for one in (made, theirs):
        one.set_input_size(img_size=48, patch_size=16)
    torch.testing.assert_close(made.stem.pos_embed, theirs.pos_embed)
    torch.testing.assert_close(made.stem.patch_embed.proj.weight, theirs.patch_embed.proj.weight)
    assert made(torch.zeros(1, 3, 48, 48)).shape == (1, 7)


@pytest.mark.slow
def test_a_script_of_timm_finds_the_models(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, timm\nprint(sys.argv[1], len(timm.list_models(sys.argv[1])))\n")
    command = [sys.executable, "-m", registered.__name__, str(script), "tokenformer_*"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tokenformer_*", str(len(registered.NAMES))]

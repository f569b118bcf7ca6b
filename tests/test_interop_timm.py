"""Vision transformers of timm, in and out: equal logits, and what is rejected."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_oracles import everywhere
from timm.models._hub import save_for_hf
from transformers import pipeline

from lit_tokenformer.checkpoints.load import read_checkpoint, write_checkpoint
from lit_tokenformer.cli.commands import export_weights, grow_checkpoint, import_weights
from lit_tokenformer.data.images.transforms import Augmentation, eval_transform
from lit_tokenformer.interop import read_timm
from lit_tokenformer.models import Tokenformer
from lit_tokenformer.tasks import LitImageClassifier
from lit_tokenformer.tasks.rebuild import fresh_checkpoint, rebuild_task

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
VIT, DEIT = "vit_tiny_patch16_224", "deit_tiny_patch16_224"
MODELS = {
    "vit": (VIT, {}),
    "deit": (DEIT, {"mlp_ratio": 2.3}),
    "gelu_tanh": (VIT, {"act_layer": "gelu_tanh", "dynamic_img_size": True, "drop_path_rate": 0.1}),
    "odd_patches": (VIT, {"patch_size": 5, "img_size": 15}),
    "average": (VIT, {"global_pool": "avg", "fc_norm": False, "class_token": False, "in_chans": 1}),
}


@torch.no_grad()
def random_model(name, arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SIZES, **arguments})
    for parameter in model.parameters():
        parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def saved(folder, name=VIT, arguments=None, **changes):
    """A folder that timm writes, with changes of its config.json."""
    save_for_hf(random_model(name, arguments or {}), folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def difference(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def load(path):
    return rebuild_task(path, read_checkpoint(path)).backbone.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_theirs(name, tmp_path):
    folder = saved(tmp_path / "one", *MODELS[name])
    theirs = random_model(*MODELS[name])
    x = torch.randn(2, theirs.in_chans, *theirs.patch_embed.img_size)
    path = import_weights(str(folder), str(tmp_path / "base.ckpt"))
    single = difference(load(path)(x), theirs(x))
    back = export_weights(str(path), str(tmp_path / "back"), format="timm")
    again = timm.create_model(f"local-dir:{back}", pretrained=True).eval()
    assert again.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in again.state_dict().items())
    assert difference(again(x), theirs(x)) <= 1e-6
    config, state, _ = read_timm(folder)
    with everywhere(torch.float64):
        ours = Tokenformer(config).eval()
        ours.load_state_dict(state)
        double = difference(ours(x.double()), theirs.double()(x.double()))
    print(f"\n{name}: relative difference {single:.1e} (float32), {double:.1e} (float64)")  # of docs/interop.md
    assert single <= 1e-5 and double <= 1e-10


@torch.no_grad()
def test_a_grown_model_is_exported_with_the_same_logits(tmp_path):
    path = import_weights(str(saved(tmp_path / "one")), str(tmp_path / "base.ckpt"))
    grown = grow_checkpoint(str(path), {"hidden": 333, "depth": 5})
    back = export_weights(str(grown), str(tmp_path / "back"), format="timm", dtype="float32")
    theirs, x = timm.create_model(f"local-dir:{back}", pretrained=True).eval(), torch.randn(2, 3, 16, 16)
    assert len(theirs.blocks) == 5 and theirs.blocks[0].mlp.fc1.out_features == 333
    assert difference(theirs(x), load(path)(x)) <= 1e-5
    more = grow_checkpoint(str(path), {"heads": 4}, str(tmp_path / "heads.ckpt"))
    with pytest.raises(ValueError, match=r"config: timm has no head_width 16 \(only 12\)"):
        export_weights(str(more), str(tmp_path / "other"), format="timm")
    assert not (tmp_path / "other").exists()


def test_class_names_and_transform_are_exported(tmp_path):
    look, mean, std = Augmentation(crop_pct=0.8, interpolation="bicubic"), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    task = LitImageClassifier(VIT, num_classes=2, image_size=16, overrides={"patch_size": 4})
    task.image_data = {"class_names": ["cat", "dog"], "image_size": 16, "in_chans": 3, "mean": mean, "std": std}
    task.image_data |= {"crop_pct": look.crop_pct, "interpolation": look.interpolation}
    write_checkpoint(fresh_checkpoint(task, task.state_dict()), tmp_path / "one.ckpt")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    ours = eval_transform(look, 16, mean, std)(image)

    back = export_weights(str(tmp_path / "one.ckpt"), str(tmp_path / "timm"), format="timm")
    theirs = timm.create_model(f"local-dir:{back}", pretrained=True)
    assert torch.equal(timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))(image), ours)
    assert json.loads((back / "config.json").read_text())["label_names"] == ["cat", "dog"]

    back = export_weights(str(tmp_path / "one.ckpt"), str(tmp_path / "transformers"), format="transformers")
    classifier = pipeline("image-classification", str(back))
    pixels = classifier.image_processor(image, return_tensors="pt")["pixel_values"][0]
    assert (pixels - ours).abs().max() <= 0.03  # one of 255 levels
    with torch.no_grad():
        shares = task.backbone.eval()(ours[None]).softmax(-1)[0]
    found = {one["label"]: one["score"] for one in classifier(image)}
    assert found == pytest.approx({"cat": shares[0].item(), "dog": shares[1].item()}, abs=1e-2)


def test_a_model_without_a_head_gets_a_new_one(tmp_path, capsys):
    path = import_weights(str(saved(tmp_path / "one", arguments={"num_classes": 0})), str(tmp_path / "base.ckpt"))
    assert load(path).num_classes == 1000
    assert "newly initialized: head.fc.bias, head.fc.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "changes", "message"),
    [
        (VIT, {"reg_tokens": 2}, {}, "architecture: unsupported: model: num_prefix_tokens: got 3, expected 1"),
        (VIT, {"init_values": 0.1}, {}, "architecture: unsupported: blocks.0.ls1 is a LayerScale, expected Identity"),
        (VIT, {"qk_norm": True}, {}, "architecture: unsupported: blocks.0.attn.q_norm is a LayerNorm"),
        (VIT, {"no_embed_class": True}, {}, "architecture: unsupported: model: no_embed_class: got True"),
        (VIT, {"global_pool": "avg"}, {}, "architecture: unsupported: norm is a Identity, expected LayerNorm"),
        (VIT, {}, {"architecture": "resnet18", "model_args": {}}, r"architecture: .*'resnet18', a ResNet"),
        (VIT, {}, {"architecture": "hf-hub:someone/model"}, r"architecture: unknown to timm \(got 'hf-hub:"),
        (VIT, {}, {"model_args": {"checkpoint_path": "x"}}, r"model_args: checkpoint_path: unsupported \(got 'x'\)"),
        (VIT, {}, {"model_args": {**SIZES, "depth": 10**9}}, "model_args: depth: 1000000000 blocks, but only"),
        (VIT, {}, {"model_args": {**SIZES, "embed_dim": "48"}}, f"model_args: timm cannot build {VIT}"),
        (VIT, {}, {"model_args": {**SIZES, "img_size": [16, 32]}}, "img_size: expected a square, got 16 x 32"),
        ("deit_tiny_distilled_patch16_224", {}, {}, r"architecture: .*, a VisionTransformerDist"),
    ],
)  # fmt: skip
def test_other_architectures_are_rejected(name, arguments, changes, message, tmp_path):
    folder = saved(tmp_path / "one", name, arguments, **changes)
    with pytest.raises(ValueError, match=f"config_json: .*config.json: {message}") as error:
        import_weights(str(folder), str(tmp_path / "base.ckpt"))
    assert "\n" not in str(error.value) and not list(tmp_path.glob("base*"))


def test_tensors_of_another_size_are_rejected(tmp_path):
    folder = saved(tmp_path / "one", model_args={**SIZES, "mlp_ratio": 2.0})
    with pytest.raises(
        ValueError, match=r"source: .*blocks.0.mlp.fc1.weight has shape \(192, 48\), expected \(96, 48\)"
    ):
        import_weights(str(folder), str(tmp_path / "base.ckpt"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"norm_eps": 1e-5}, "norm_eps 1e-05 .only 1e-06."), ({"projection": "pattention"}, "projection 'pattention'")],
)
def test_what_timm_has_not_is_rejected(overrides, message, tmp_path):
    sizes = {"depth": 1, "patch_size": 4}
    task = LitImageClassifier(VIT, num_classes=3, image_size=8, overrides={**sizes, **overrides})
    write_checkpoint(fresh_checkpoint(task, task.state_dict()), tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=f"config: timm has no .*{message}") as error:
        export_weights(str(tmp_path / "one.ckpt"), str(tmp_path / "back"), format="timm")
    assert "\n" not in str(error.value) and not (tmp_path / "back").exists()

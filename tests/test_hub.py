"""Models as folders and repositories of the Hugging Face hub: equal to the bit, at any size."""

import copy
import json
import pickle
import shutil

import huggingface_hub.hub_mixin
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from test_linear_form import inputs, model

import lit_tokenformer.models.hub
from lit_tokenformer.checkpoints.load import read_checkpoint
from lit_tokenformer.cli.commands import import_weights
from lit_tokenformer.errors import UserError
from lit_tokenformer.growth import grow
from lit_tokenformer.interop.native import load_native
from lit_tokenformer.models import Tokenformer, as_linear
from lit_tokenformer.tasks.rebuild import rebuild_task


def assert_equal(one, other):
    assert one.size == other.size
    states = one.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert [tensor.dtype for tensor in states[0].values()] == [tensor.dtype for tensor in states[1].values()]


@pytest.mark.parametrize(
    ("preset", "growth"),
    [
        ("tokenformer_lm_tiny", {"qkv": 12, "ffn": 40, "depth": 4, "heads": 4}),
        ("tokenformer_mlm_tiny", {"proj": 12}),
        ("tokenformer_vit_tiny_patch16_224", {"ffn": 48, "depth": 3}),
        ("gpt2_tiny", {"hidden": 160, "depth": 4}),  # tied embeddings
        ("rwkv4_tiny", {"depth": 4}),
        ("bert_tiny", {"hidden": 160}),
    ],
)
def test_a_grown_model_comes_back_equal_to_the_bit(preset, growth, tmp_path):
    made = model(preset)
    grow(made, growth)
    made.save_pretrained(tmp_path / "model")
    assert {file.name for file in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    found = Tokenformer.from_pretrained(tmp_path / "model")
    assert_equal(found, made)
    assert not found.training and not found.grown
    assert_equal(load_native(tmp_path / "model"), made)
    with torch.no_grad():
        assert torch.equal(found(inputs(made)), made.eval()(inputs(made)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision_is_kept(dtype, tmp_path):
    made = model().to(dtype)
    made.save_pretrained(tmp_path)
    assert_equal(Tokenformer.from_pretrained(tmp_path), made)


def test_a_saved_model_is_imported(tmp_path):
    made = model("gpt2_tiny")
    made.save_pretrained(tmp_path / "model")
    path = import_weights(str(tmp_path / "model"), str(tmp_path / "base.ckpt"))
    assert_equal(rebuild_task(path, read_checkpoint(path)).backbone, made)


def test_the_linear_form_is_saved_as_parameter_tokens(tmp_path):
    made = as_linear(model())
    made.save_pretrained(tmp_path)
    assert_equal(Tokenformer.from_pretrained(tmp_path), model())
    assert any(name.endswith("keys.weight") for name in made.state_dict())


def test_a_model_goes_to_a_repository_and_back(tmp_path, monkeypatch):
    class Hub:
        def __init__(self, **_): ...

        def create_repo(self, repo_id, **_):
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **_):
            shutil.copytree(folder_path, tmp_path / repo_id)
            return repo_id

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Hub)

    def download(repo_id, filename, **_):
        return str(tmp_path / repo_id / filename)

    for module in (huggingface_hub.hub_mixin, lit_tokenformer.models.hub):
        monkeypatch.setattr(module, "hf_hub_download", download)
    made = model()
    made.push_to_hub("me/small")
    card = (tmp_path / "me" / "small" / "README.md").read_text()
    assert "library_name: lit-tokenformer" in card and "2410.23168" in card
    assert_equal(Tokenformer.from_pretrained("me/small", revision="main"), made)


def test_other_folders_are_rejected_in_one_line(tmp_path):
    model().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**settings, "config": {**settings["config"], "hidden_act": "gelu"}})
    )
    with pytest.raises(UserError, match=r"^config.json: .*: not an architecture of lit-tokenformer .*hidden_act"):
        Tokenformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "config": {**settings["config"], "dim": 48}}))
    with pytest.raises(UserError, match=r"^model.safetensors: .*size mismatch"):
        Tokenformer.from_pretrained(tmp_path)


def test_the_mixin_leaves_copies_and_pickles_as_they_were():
    made = model()
    assert isinstance(made, PyTorchModelHubMixin)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert_equal(twin, made)
        assert twin.config == made.config

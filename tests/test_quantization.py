"""Weight-only quantization: close outputs for every architecture, smaller weights, one-line refusals."""

import builtins
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lit_tokenformer.cli.main import main
from lit_tokenformer.data import ImageDataModule
from lit_tokenformer.data.text.tokenizer import Tokenizer
from lit_tokenformer.errors import UserError
from lit_tokenformer.growth import grow
from lit_tokenformer.growth.axes import quantized_parameters
from lit_tokenformer.models import as_linear, create_backbone, list_presets
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier

pytest.importorskip("torchao")

from lit_tokenformer.inference.quantization import quantize
from lit_tokenformer.inference.text import TextGenerator

SIZES = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 16, "vocab_size": 50, "context_length": 64}
SIZES |= {"image_size": 16, "patch_size": 4, "num_classes": 5}


def model(preset="tokenformer_lm_tiny", **overrides):
    torch.manual_seed(0)
    made = create_backbone(preset, **{**SIZES, **overrides}).eval()
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def inputs(made):
    generator = torch.Generator().manual_seed(1)
    if made.config.stem == "patch":
        return torch.randn(3, 3, 16, 16, generator=generator)
    return torch.randint(0, 50, (3, 17), generator=generator)


@pytest.mark.parametrize("preset", list_presets())
def test_every_preset_computes_nearly_the_same_from_int8(preset):
    made = model(preset)
    with torch.no_grad():
        expected = made(inputs(made))
        error = (quantize(made)(inputs(made)) - expected).norm() / expected.norm()
    assert 0 < error < 0.05
    for name, layer in made.blocks.named_modules():
        if isinstance(layer, nn.Linear) and layer.in_features > 1:
            weight = layer.weight
            assert weight.qdata.dtype == torch.int8 and weight.qdata.is_contiguous(), name
    assert type(made.head) is type(model(preset).head) and type(next(made.stem.parameters()).data) is torch.Tensor


def test_the_quantized_weights_are_those_of_the_formula():
    made, quantized = as_linear(model()), quantize(model())
    for layer, twin in zip(made.blocks.modules(), quantized.blocks.modules(), strict=True):
        if isinstance(layer, nn.Linear):
            scale = layer.weight.abs().amax(dim=1, keepdim=True) / 127.5
            expected = (layer.weight / scale).round().clamp(-128, 127)
            difference = (twin.weight.qdata.float() - expected).abs()
            assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_for_few_rows_computes_what_torchao_does_for_many(dtype):
    quantized = quantize(model().to(dtype))
    layer = quantized.blocks[0].mlp.keys
    rows = torch.randn(40, 32, dtype=dtype)
    few = torch.cat([layer(part) for part in rows.split(2)])
    weight = layer.weight.qdata.float() * layer.weight.scale.float()
    for found in (few, layer(rows)):
        torch.testing.assert_close(found.float(), rows.float() @ weight.T, rtol=0.02, atol=0.02)


def test_int4_weights_are_those_of_the_formula():
    sizes = {"dim": 64, "param_tokens": 96}
    made, quantized = as_linear(model(**sizes)), quantize(model(**sizes), "int4")
    assert any(quantized_parameters(quantized))
    for layer, twin in zip(made.blocks.modules(), quantized.blocks.modules(), strict=True):
        if isinstance(layer, nn.Linear):
            group = 64 if layer.in_features % 64 == 0 else 32
            groups = layer.weight.unflatten(1, (-1, group))
            low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
            scale = ((high - low) / 15).bfloat16().float()
            zero = (low + 8 * scale).bfloat16().float()
            weight = ((((groups - zero) / scale).round().clamp(-8, 7)) * scale + zero).flatten(1)
            x = torch.randn(5, layer.in_features)
            expected = x @ weight.T
            assert (twin(x) - expected).norm() < 0.01 * expected.norm()
            assert (weight - layer.weight).abs().max() < 0.6 * scale.max()
            assert twin.weight.qdata.nbytes * 8 == layer.weight.nbytes


@pytest.mark.parametrize("preset", ["rwkv4_tiny", "tokenformer_lm_tiny", "gpt2_tiny"])
def test_int4_computes_roughly_the_same(preset):
    made = model(preset, dim=64)
    with torch.no_grad():
        expected = made(inputs(made))
        error = (quantize(made, "int4")(inputs(made)) - expected).norm() / expected.norm()
    kinds = {type(layer.weight.data).__name__ for layer in made.blocks.modules() if isinstance(layer, nn.Linear)}
    assert 0.01 < error < 0.5 and "Int4Tensor" in kinds


def test_int4_is_for_cpus():
    with pytest.raises(UserError, match=r"^quantize: int4 is for CPUs \(got meta\); use int8"):
        quantize(model().to("meta"), "int4")


@pytest.mark.slow
def test_digits_are_classified_as_before():
    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 16, "patch_size": 2}
    fast = partial(torch.optim.AdamW, lr=5e-3)
    task = LitImageClassifier("tokenformer_vit_tiny_patch16_224", 10, 8, optimizer=fast, overrides=sizes)
    data = ImageDataModule("digits", batch_size=64, num_workers=0)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, **quiet)
    trainer.fit(task, datamodule=data)
    (before,) = trainer.validate(task, datamodule=data, verbose=False)
    quantize(task.backbone)
    (after,) = trainer.validate(task, datamodule=data, verbose=False)
    assert after["val/loss"] == pytest.approx(before["val/loss"], rel=0.02)
    with pytest.raises(UserError, match=r"^model: backbone.blocks.0.attn.query.keys.weight is quantized, for inf"):
        trainer.fit(task, datamodule=data)


def test_generate_takes_quantized_weights(tmp_path, capsys):
    torch.manual_seed(0)
    task = LitCausalLM("tokenformer_lm_tiny", 257, 32, overrides={"dim": 32, "depth": 1, "num_heads": 2})
    trainer = Trainer(accelerator="cpu", logger=False)
    trainer.strategy.connect(task)
    task.tokenizer_json = Tokenizer.bytes().to_json()
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = TextGenerator.load(tmp_path / "one.ckpt", quantize="int8")
    expected = loaded.generate("Once", 6, temperature=0)
    assert any(quantized_parameters(loaded.backbone))
    args = ["generate", "--ckpt_path", str(tmp_path / "one.ckpt"), "--prompt", "Once", "--max_new_tokens", "6"]
    with pytest.raises(SystemExit, match="0"):
        main([*args, "--temperature", "0", "--quantize", "int8"])
    assert capsys.readouterr().out == f"{expected}\n"
    assert main([*args, "--quantize", "int5"]) == 2
    assert capsys.readouterr().err.startswith("error: quantize: unknown value 'int5'")


@pytest.mark.parametrize("totals", [32, {"depth": 4}])
def test_a_quantized_model_does_not_grow(totals):
    made = quantize(model())
    before = {name: tensor.shape for name, tensor in made.state_dict().items()}
    with pytest.raises(UserError, match=r"^tokens: blocks.0.attn.query.keys.weight is quantized"):
        grow(made, totals)
    assert {name: tensor.shape for name, tensor in made.state_dict().items()} == before
    with pytest.raises(UserError, match=r"^quantize: the model is quantized already"):
        quantize(made)


def test_a_grown_model_is_quantized_at_its_size():
    made = model()
    grow(made, {"qkv": 24, "ffn": 72, "depth": 4})
    with torch.no_grad():
        expected = made(inputs(made))
        error = (quantize(made)(inputs(made)) - expected).norm() / expected.norm()
    assert 0 < error < 0.05 and made.size["qkv"] == 24


def test_unknown_schemes_and_a_missing_library_are_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"^quantize: unknown value 'int9', did you mean 'int8'"):
        quantize(model(), "int9")
    found = builtins.__import__

    def without_torchao(name, *given, **more):
        if name.startswith("torchao"):
            raise ModuleNotFoundError("No module named 'torchao'")
        return found(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", without_torchao)
    with pytest.raises(UserError, match=r"^quantize: torchao is not installed .*; pip install 'lit-tokenformer\[quant"):
        quantize(model())


def test_float8_training_finds_the_halves_of_every_layer():
    float8 = pytest.importorskip("torchao.float8")
    made = as_linear(model())
    linear = sum(isinstance(layer, nn.Linear) for layer in made.blocks.modules())
    float8.convert_to_float8_training(made.blocks, config=float8.Float8LinearConfig(emulate=True))
    kinds = [type(layer).__name__ for layer in made.blocks.modules() if isinstance(layer, nn.Linear)]
    assert kinds == ["Float8Linear"] * linear and linear == 2 * 5 * 2  # blocks, layers, halves
    made.train()(inputs(made)).square().mean().backward()
    expected = as_linear(model()).train()
    expected(inputs(expected)).square().mean().backward()
    for one, other in zip(made.parameters(), expected.parameters(), strict=True):
        assert torch.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0) > 0.9

"""Adapters: what they leave untouched, what is saved of them, and which sample uses which."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import adapters as adapters_benchmark
from callbacks import AdapterCallback, GrowingEMA, ParameterGrowthCallback
from lit_tokenformer.adapters import (
    add_adapter,
    base_hash,
    delete_adapter,
    list_adapters,
    load_adapter,
    save_adapter,
    set_adapter,
)
from lit_tokenformer.cli.main import main
from lit_tokenformer.data.text.tokenizer import Tokenizer
from lit_tokenformer.errors import UserError
from lit_tokenformer.inference.text import TextGenerator
from lit_tokenformer.models import create_backbone
from lit_tokenformer.models.modalities import add_modalities
from lit_tokenformer.models.pattention import Pattention
from lit_tokenformer.models.token_groups import group_layers
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier

SIZES = {"dim": 16, "depth": 2, "num_heads": 2, "param_tokens": 8}
TOKENS = {"qkv": 2, "ffn": 4}
PRESETS = {  # every mixer and feed-forward whose projections can be Pattention
    "tokenformer_lm_tiny": {},
    "tokenformer_mlm_tiny": {},
    "tokenformer_vit_tiny_patch16_224": {"image_size": 16, "patch_size": 8, "num_classes": 5},
    "llama_tiny": {"projection": "pattention"},
    "rwkv4_tiny": {"projection": "pattention"},
    "hybrid_tiny": {"projection": "pattention"},
    "pangu_pi_tiny": {"projection": "pattention", "shortcut_reduction": 4},
    "mosaic_bert_tiny": {"projection": "pattention"},
}


def language_model(preset="tokenformer_lm_tiny", **more):
    return create_backbone(preset, **{**SIZES, "vocab_size": 257, "context_length": 32, **more})


def words(batch=3, length=9):
    return torch.randint(257, (batch, length), generator=torch.Generator().manual_seed(3))


def randomize(model):
    """Give the trained parameters values as after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.5)


def adapted(name="docs", model=None, **settings):
    model = language_model().eval() if model is None else model
    add_adapter(model, name, **{"tokens": TOKENS, **settings})
    randomize(model)
    return model


# the model


@pytest.mark.parametrize("preset", PRESETS)
def test_every_pattention_preset_takes_an_adapter_that_starts_at_zero_and_leaves_no_trace(preset):
    given = {"vocab_size": 257, "context_length": 32} if "vit" not in preset else {}
    model = create_backbone(preset, **{**SIZES, **given, **PRESETS[preset]}).eval()
    inputs = torch.randn(2, 3, 16, 16) if "vit" in preset else words(2)
    kinds = {layer.kind for layer in model.modules() if isinstance(layer, Pattention)}
    names, before, hashed = [*model.state_dict()], model(inputs), base_hash(model)
    add_adapter(model, "docs", dict.fromkeys(kinds, 2))
    assert (model(inputs) - before).abs().max() == 0.0
    optimizer = torch.optim.AdamW((one for one in model.parameters() if one.requires_grad), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        model(inputs).square().mean().backward()
        optimizer.step()
    assert not torch.allclose(model(inputs), before)
    set_adapter(model, None)
    assert torch.equal(model(inputs), before)
    assert base_hash(model) == hashed
    delete_adapter(model, "docs")
    assert torch.equal(model(inputs), before)
    assert [*model.state_dict()] == names


def test_only_the_adapter_is_trained():
    model = language_model()
    task_like = torch.nn.ModuleDict({"backbone": model, "other": torch.nn.Linear(2, 2)})
    add_adapter(task_like, "docs", TOKENS)
    trained = {name for name, parameter in task_like.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in task_like.named_parameters() if ".groups.docs." in name}
    assert list_adapters(task_like) == {"docs": TOKENS}


def test_a_single_number_of_tokens_is_four_times_as_many_in_the_feed_forward():
    model = language_model()
    add_adapter(model, "docs", 2)
    assert list_adapters(model) == {"docs": {"qkv": 2, "proj": 2, "ffn": 8}}


def test_two_adapters_in_a_batch_equal_each_alone():
    model, x = language_model().eval(), words()
    base = model(x)
    alone = {None: base}
    for name in ("docs", "law"):
        alone[name] = adapted(name, model)(x)
    names = ["law", None, "docs"]
    set_adapter(model, names)
    for number, (name, found) in enumerate(zip(names, model(x), strict=True)):
        torch.testing.assert_close(found, alone[name][number], atol=1e-6, rtol=0)
    set_adapter(model, "docs")
    assert torch.equal(model(x), alone["docs"])


def test_prompts_of_a_batch_are_continued_as_alone_each_with_its_adapter():
    model = language_model(context_length=64).eval()
    for name in ("docs", "law"):
        adapted(name, model)
    generator, prompts, names = TextGenerator(model, Tokenizer.bytes()), ["One", "Two of", "3"], ["law", None, "docs"]
    settings = {"max_new_tokens": 8, "temperature": 0}
    generator.set_adapter(names)
    together, alone = generator.generate(prompts, **settings), []
    for prompt, name in zip(prompts, names, strict=True):
        generator.set_adapter(name)
        alone.append(generator.generate(prompt, **settings))
    assert together == alone
    assert len({*alone}) == 3


def test_the_adapter_with_the_least_loss_is_found():
    model, generator = language_model(), None
    texts = {"ones": "1 1 1 1 1 1 1 1", "twos": "2,2,2,2,2,2,2,2"}
    for name, text in texts.items():
        add_adapter(model, name, {"qkv": 4, "proj": 4, "ffn": 16})
        ids = torch.tensor(Tokenizer.bytes().encode(text))[None]
        optimizer = torch.optim.Adam((one for one in model.parameters() if one.requires_grad), lr=0.05)
        for _ in range(15):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:]).backward()
            optimizer.step()
    generator = TextGenerator(model.eval(), Tokenizer.bytes())
    assert generator.best_adapters(["1 1 1 1", "2,2,2", "2", ""]) == ["ones", "twos", None, None]


@pytest.mark.slow
def test_five_tasks_in_sequence_are_not_forgotten(tmp_path):
    arguments = ["--steps", "40", "--base_steps", "75", "--seeds", "1", "--parts", "forgetting"]
    adapters_benchmark.main([*arguments, "--output", str(tmp_path / "found.json")])
    matrix = json.loads((tmp_path / "found.json").read_text())["forgetting"]["results"]["adapters"]
    assert [len(row) for row in matrix] == [1, 2, 3, 4, 5]
    assert all(row == matrix[-1][: len(row)] for row in matrix)


# its files


def test_files_hold_the_adapter_alone_and_restore_it(tmp_path):
    model = adapted()
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    save_adapter(model, tmp_path, base="base.ckpt", tokenizer='{"model": 1}')
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "PARAM_TOKENS" and config["tokens"] == TOKENS and config["name"] == "docs"
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4 * trained + 20_000
    twin = language_model().eval()
    twin.load_state_dict({key: one for key, one in model.state_dict().items() if ".groups." not in key})
    before, state = twin(words()), [*twin.state_dict()]
    assert load_adapter(twin, tmp_path, "law", tokenizer='{"model":1}') == "law"
    assert torch.equal(twin(words()), before)  # not selected
    set_adapter(twin, "law")
    assert torch.equal(twin(words()), model(words()))
    assert all(one.requires_grad == (".groups." not in name) for name, one in twin.named_parameters())
    delete_adapter(twin, "law")
    assert [*twin.state_dict()] == state


def damaged(tensors):
    return {key: one[:-1] if key.endswith("mlp.value_tokens") else one for key, one in tensors.items()}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors: {key: torch.zeros(2, 3) for key in tensors}, r"another width: .* expected \(any, 16\)"),
        (lambda tensors: {**tensors, "head.weight": torch.zeros(2, 3)}, "head.weight is not a tensor of"),
        (damaged, "is damaged: keys and values of blocks.0.mlp do not match"),
        (lambda tensors: {**tensors, "tau": torch.ones(3)}, r"tau has shape \(3,\), expected \(8,\)"),
    ],
)
def test_files_that_do_not_fit_are_rejected(change, problem, tmp_path):
    model = adapted()
    save_adapter(model, tmp_path)
    delete_adapter(model, "docs")
    path, names = tmp_path / "adapter_model.safetensors", [*model.state_dict()]
    save_file(change(load_file(path)), path)
    with pytest.raises(UserError, match=problem):
        load_adapter(model, tmp_path)
    assert [*model.state_dict()] == names


@pytest.mark.parametrize("config", ["[]", "{}", "{", '{"peft_type": "IA3"}', '{"peft_type": "LORA", "name": 3}'])
def test_a_config_of_something_else_is_rejected(config, tmp_path):
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(UserError, match=r"adapter: .*adapter_config\.json"):
        load_adapter(language_model(), tmp_path)


def test_another_base_or_tokenizer_is_rejected(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path, base="base.ckpt", tokenizer='{"model": 1}')
    with pytest.raises(UserError, match=r"is of another base \(expected base.ckpt\)"):
        load_adapter(language_model(), tmp_path)
    with pytest.raises(UserError, match="already"):
        load_adapter(model, tmp_path)
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        load_adapter(model, tmp_path, "law", tokenizer='{"model": 2}')
    with pytest.raises(UserError, match=r"another width: blocks.0.*key_tokens has shape \(2, 16\), expected \(any, 8"):
        load_adapter(language_model(dim=8, num_heads=1), tmp_path)


def test_bad_settings_are_rejected_in_one_line():
    model = adapted()
    for call, problem in [
        (lambda: add_adapter(model, "docs", TOKENS), "has an adapter 'docs' already"),
        (lambda: add_adapter(model, "a/b", TOKENS), "without a path separator, got 'a/b'"),
        (lambda: add_adapter(model, "auto", TOKENS), "'auto' is reserved"),
        (lambda: add_adapter(model, "law", {"fnn": 2}), "tokens: unknown value 'fnn', did you mean 'ffn'"),
        (lambda: add_adapter(model, "law", {"ffn": 0}), "tokens: "),
        (lambda: add_adapter(model, "law"), "expected either tokens or lora"),
        (lambda: add_adapter(model, "law", 2, ["haed"]), "also_train: unknown value 'haed', did you mean 'head'"),
        (lambda: add_adapter(model, "law", 2, ["blocks"]), "also_train: blocks has parameter tokens"),
        (lambda: add_adapter(model, "law", 2, ["head"]), r"also_train: head shares stem.* \(tie_embeddings\)"),
        (lambda: set_adapter(model, "dosc"), "adapter: unknown value 'dosc', did you mean 'docs'"),
        (lambda: set_adapter(model, ["docs", "x"]), "adapter: unknown value 'x'"),
        (lambda: set_adapter(model, []), "expected at least one name"),
        (lambda: delete_adapter(model, "law"), "adapter: unknown value 'law'"),
        (lambda: save_adapter(model, "x", "law"), "adapter: unknown value 'law'"),
        (lambda: add_adapter(language_model("transformer_tiny"), "law", 2), "no parameter tokens"),
        (lambda: AdapterCallback(tokens=2, name="../x"), "without a path separator"),
        (lambda: AdapterCallback(), "expected either tokens"),
    ]:
        with pytest.raises(UserError, match=problem) as error:
            call()
        assert "\n" not in str(error.value)
    assert list_adapters(model) == {"docs": TOKENS} and not Path("x").exists()


def test_tokens_by_modality_are_not_replaced_by_an_adapter(tmp_path):
    plain = language_model(stem="image_text", image_size=16, patch_size=8, rotary_fraction=0.5)
    model = copy.deepcopy(plain)
    add_modalities(model, 4)
    save_adapter(adapted(model=plain), tmp_path)
    state, gates = model.state_dict(), [layer.gate for _, layer in group_layers(model)]
    for call in (lambda: add_adapter(model, "docs", TOKENS), lambda: load_adapter(model, tmp_path)):
        with pytest.raises(UserError, match="has a ModalityGate, which no adapter can extend"):
            call()
        assert [layer.gate for _, layer in group_layers(model)] == gates and model.state_dict().keys() == state.keys()


def test_a_head_of_other_classes_comes_and_goes_with_its_adapter(tmp_path):
    sizes = {**SIZES, "image_size": 16, "patch_size": 8}
    base = create_backbone("tokenformer_vit_tiny_patch16_224", num_classes=5, **sizes).eval()
    other = create_backbone("tokenformer_vit_tiny_patch16_224", num_classes=3, **sizes).eval()
    images, state = torch.randn(2, 3, 16, 16), base.state_dict()
    other.load_state_dict({**other.state_dict(), **{key: one for key, one in state.items() if "head" not in key}})
    adapted("three", other, also_train=["head"])
    assert {"head.fc.weight", "head.fc.bias"} < {n for n, one in other.named_parameters() if one.requires_grad}
    save_adapter(other, tmp_path)
    five, before = base.head.fc.weight, base(images)
    load_adapter(base, tmp_path)
    assert torch.equal(base(images), before)
    set_adapter(base, "three")
    assert torch.equal(base(images), other(images)) and base(images).shape == (2, 3)
    with pytest.raises(UserError, match="'three' replaces head, and cannot share a batch"):
        set_adapter(base, ["three", None])
    delete_adapter(base, "three")
    assert torch.equal(base(images), before) and base.head.fc.weight is five


# LoRA


def test_lora_for_linear_projections_behind_the_same_functions(tmp_path):
    pytest.importorskip("peft")
    model, x = language_model("transformer_tiny").eval(), words()
    names, before, hashed = [*model.state_dict()], model(x), base_hash(model)
    add_adapter(model, "docs", lora={"r": 2})
    assert torch.equal(model(x), before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    randomize(model)
    on = model(x)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    set_adapter(model, None)
    assert torch.equal(model(x), before) and base_hash(model) == hashed
    delete_adapter(model, "docs")
    assert torch.equal(model(x), before) and [*model.state_dict()] == names
    load_adapter(model, tmp_path)
    assert list_adapters(model) == {"docs": {"r": 2}} and torch.equal(model(x), before)
    set_adapter(model, "docs")
    assert torch.equal(model(x), on)
    with pytest.raises(UserError, match="'docs' is a LoRA, and cannot share a batch"):
        set_adapter(model, ["docs", None, None])
    with pytest.raises(UserError, match="lora: "):
        add_adapter(model, "law", lora={"rank": 2})


def test_peft_puts_lora_on_parameter_tokens():
    peft = pytest.importorskip("peft")
    model, x = language_model().eval(), words()
    before = model(x)
    targets = [f"mlp.{part}" for part in ("key_tokens", "value_tokens")]
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=targets))
    assert torch.equal(lora(x), before)
    randomize(lora)
    on = lora(x)
    with lora.disable_adapter():
        assert torch.equal(lora(x), before)
    merged = lora.merge_and_unload()
    assert [*merged.state_dict()] == [*language_model().state_dict()]
    torch.testing.assert_close(merged(x), on)


# the fit


def text_task(**settings):
    overrides = {**SIZES, **settings.pop("overrides", {})}
    preset = settings.pop("preset", "tokenformer_lm_tiny")
    return LitCausalLM(
        preset,
        vocab_size=257,
        context_length=8,
        overrides=overrides,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
        **settings,
    )


def batches(data=None):
    data = words(32) if data is None else data
    return DataLoader(data, batch_size=8)


def trainer(folder, *callbacks, **settings):
    defaults = {"max_steps": 8, "max_epochs": -1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    keep = ModelCheckpoint(folder, "step{step}", save_top_k=-1, every_n_train_steps=4, auto_insert_metric_name=False)
    settings = {**defaults, "enable_model_summary": False, "default_root_dir": folder, **settings}
    return Trainer(callbacks=[*callbacks, keep], **settings)


def base_checkpoint(folder, task=None, *callbacks):
    task = text_task() if task is None else task
    run = trainer(folder, *callbacks, max_steps=4)
    run.fit(task, batches())
    return str(folder / "step4.ckpt"), task.backbone.eval()


def fit_adapter(folder, base, *callbacks, task=None, ckpt_path=None, **settings):
    seed_everything(1, verbose=False)
    task = text_task() if task is None else task
    made = {"tokens": TOKENS, "output": str(folder / "adapter"), **settings}
    run = trainer(folder, AdapterCallback(base, "docs", **made), *callbacks)
    run.fit(task, batches(), ckpt_path=ckpt_path)
    return run, task


def test_a_fit_trains_and_saves_the_adapter_alone(tmp_path):
    base, model = base_checkpoint(tmp_path / "base")
    before = model(words())
    run, task = fit_adapter(tmp_path, base)
    trained = [one for one in task.parameters() if one.requires_grad]
    count = sum(one.numel() for one in trained)
    assert count < 0.1 * sum(one.numel() for one in task.parameters())
    assert {*run.optimizers[0].state} == {*trained}
    saved = torch.load(tmp_path / "step8.ckpt", weights_only=True)
    assert all(".groups.docs." in name for name in saved["state_dict"])
    assert sum(one.numel() for one in saved["state_dict"].values()) == count + 8  # and tau of 8 layers
    files = [path.stat().st_size for path in (tmp_path / "adapter").iterdir()]
    assert len(files) == 2 and sum(files) <= 4 * count + 20_000
    on = task.backbone.eval()(words())
    set_adapter(task, None)
    assert torch.equal(task.backbone(words()), before) and not torch.equal(on, before)
    load_adapter(model, tmp_path / "adapter")
    set_adapter(model, "docs")
    assert torch.equal(model(words()), on)


def test_adapters_are_trained_one_after_the_other_on_the_same_model(tmp_path):
    _, model = base_checkpoint(tmp_path / "base", task := text_task())
    outputs = {None: model(words())}
    for name in ("docs", "law"):
        made = AdapterCallback(name=name, tokens=TOKENS, output=str(tmp_path / name))
        trainer(tmp_path / f"{name}_kept", made).fit(task, batches())
        outputs[name] = model.eval()(words())
    for name, output in outputs.items():
        set_adapter(model, name)
        assert torch.equal(model(words()), output)
    assert len({*map(str, outputs.values())}) == 3
    delete_adapter(model, "docs")
    delete_adapter(model, "law")
    load_adapter(model, tmp_path / "docs")
    set_adapter(model, "docs")
    assert torch.equal(model(words()), outputs["docs"])
    assert len(task.state_dict()) > 34  # of the whole model again


def test_a_fit_of_an_adapter_resumes_bit_for_bit(tmp_path):
    base, _ = base_checkpoint(tmp_path / "base")
    fit_adapter(tmp_path / "whole", base)
    fit_adapter(tmp_path / "again", base, ckpt_path=str(tmp_path / "whole" / "step4.ckpt"))
    one, two = (torch.load(tmp_path / name / "step8.ckpt", weights_only=True) for name in ("whole", "again"))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert all(torch.equal(tensor, two["state_dict"][name]) for name, tensor in one["state_dict"].items())
    files = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "again")]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())


def test_a_checkpoint_of_an_adapter_is_evaluated_on_its_base(tmp_path):
    base, _ = base_checkpoint(tmp_path / "base")
    run, task = fit_adapter(tmp_path, base)
    (fitted,) = run.validate(task, batches(), verbose=False)
    found = [
        trainer(tmp_path, AdapterCallback(given, "docs", TOKENS)).validate(
            text_task(), batches(), ckpt_path=path, verbose=False
        )[0]["val/loss"]
        for given, path in ((base, tmp_path / "step8.ckpt"), (None, base))
    ]
    assert found[0] == fitted["val/loss"] != found[1]


def test_the_moving_average_of_base_and_adapter_is_used(tmp_path):
    base, _ = base_checkpoint(tmp_path / "base", None, GrowingEMA(0.5, warmup=False))
    saved = torch.load(base, weights_only=True)
    assert "current_model_state" in saved
    _, task = fit_adapter(tmp_path, base, GrowingEMA(0.5, warmup=False))
    state = task.backbone.state_dict()
    assert torch.equal(state["blocks.0.mlp.key_tokens"], saved["state_dict"]["backbone.blocks.0.mlp.key_tokens"])
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    average = torch.load(tmp_path / "step8.ckpt", weights_only=True)["state_dict"]
    name = "blocks.0.mlp{}.value_tokens"
    assert torch.equal(written[name.format("")], average["backbone." + name.format(".groups.docs")])
    assert all(".groups.docs." in name for name in average)


def test_an_image_model_learns_other_classes_with_a_new_head(tmp_path):
    def images(classes):
        return TensorDataset(torch.randn(16, 3, 16, 16), torch.randint(classes, (16,)))

    def task(classes):
        overrides = {**SIZES, "patch_size": 8}
        return LitImageClassifier(
            "tokenformer_vit_tiny_patch16_224", num_classes=classes, image_size=16, overrides=overrides
        )

    first = task(5)
    trainer(tmp_path / "base", max_steps=4).fit(first, DataLoader(images(5), batch_size=4))
    base, pictures = str(tmp_path / "base" / "step4.ckpt"), torch.randn(2, 3, 16, 16)
    made = AdapterCallback(base, "docs", TOKENS, ["head"], output=str(tmp_path / "adapter"))
    second = task(3)
    trainer(tmp_path, made).fit(second, DataLoader(images(3), batch_size=4))
    load_adapter(first.eval(), tmp_path / "adapter")
    before = first(pictures)
    set_adapter(first, "docs")
    assert torch.equal(first(pictures), second.eval()(pictures)) and before.shape == (2, 5)
    with pytest.raises(UserError, match=r"also_train: backbone.head.fc.weight is not in .* expected its part"):
        trainer(tmp_path, AdapterCallback(base, "law", TOKENS)).fit(task(3), DataLoader(images(3)))


def test_the_callback_trains_lora_on_linear_projections(tmp_path):
    pytest.importorskip("peft")
    base, model = base_checkpoint(tmp_path / "base", text_task(preset="transformer_tiny"))
    before = model(words())
    _, task = fit_adapter(
        tmp_path, base, task=text_task(preset="transformer_tiny"), tokens=None, lora={"r": 2, "lora_alpha": 2}
    )
    assert all(".lora_" in name for name in torch.load(tmp_path / "step8.ckpt", weights_only=True)["state_dict"])
    on = task.backbone.eval()(words())
    set_adapter(task, None)
    assert torch.equal(task.backbone(words()), before)
    load_adapter(model, tmp_path / "adapter")
    set_adapter(model, "docs")
    assert torch.equal(model(words()), on)
    _, again = fit_adapter(
        tmp_path / "again",
        base,
        task=text_task(preset="transformer_tiny"),
        tokens=None,
        lora={"r": 2, "lora_alpha": 2},
        ckpt_path=str(tmp_path / "step4.ckpt"),
    )
    assert torch.equal(again.backbone.eval()(words()), on)


def test_a_fit_rejects_what_contradicts_an_adapter(tmp_path):
    base, _ = base_checkpoint(tmp_path / "base")
    fit_adapter(tmp_path, base)
    for problem, call in [
        ("output: .* exists already", lambda: fit_adapter(tmp_path, base)),
        ("cannot grow the frozen base", lambda: fit_adapter(tmp_path / "b", base, ParameterGrowthCallback({1: 16}))),
        ("of another architecture", lambda: fit_adapter(tmp_path / "b", base, ckpt_path=base)),
        ("base: .* is the checkpoint of an adapter", lambda: fit_adapter(tmp_path / "b", str(tmp_path / "step8.ckpt"))),
        ("base: nowhere.ckpt is not a file", lambda: fit_adapter(tmp_path / "b", "nowhere.ckpt")),
        (
            "base: .* is of another architecture",
            lambda: fit_adapter(tmp_path / "b", base, task=text_task(overrides={"dim": 8, "num_heads": 1})),
        ),
        (
            "expected AdapterCallback before",
            lambda: trainer(tmp_path / "b", GrowingEMA(), AdapterCallback(base, "docs", TOKENS)).fit(
                text_task(), batches()
            ),
        ),
    ]:
        with pytest.raises(UserError, match=problem):
            call()
    other, _ = base_checkpoint(tmp_path / "other", text_task(z_loss=1.0))
    with pytest.raises(UserError, match=r"base: .* is not the base of the adapter in"):
        fit_adapter(tmp_path / "c", other, ckpt_path=str(tmp_path / "step4.ckpt"))
    assert not os.path.exists(tmp_path / "c" / "adapter")


# the command line


def run(*args):
    """Run a command in this process and return its exit status."""
    try:
        return main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code


def write_config(folder, name, *callbacks):
    keep = {"filename": "last", "dirpath": str(folder / name), "every_n_train_steps": 2}
    keep = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keep}
    given = {
        "trainer": {
            "max_steps": 4,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "limit_val_batches": 1,
            "default_root_dir": str(folder),
            "callbacks": [*callbacks, keep],
        },
        "model": {
            "class_path": "LitCausalLM",
            "init_args": {
                "preset": "tokenformer_lm_tiny",
                "overrides": SIZES,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}},
                "schedule": {"name": "constant"},
            },
        },
        "data": {"class_path": "TextDataModule", "init_args": {"block_size": 16, "batch_size": 4}},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("text_cache")
def test_fit_and_generate_with_an_adapter_from_the_command_line(tmp_path, capsys):
    made = {"name": "docs", "tokens": TOKENS, "output": str(tmp_path / "adapters" / "docs")}
    adapter = {"class_path": "callbacks.AdapterCallback", "init_args": made}
    first, second = write_config(tmp_path, "base"), write_config(tmp_path, "adapted", adapter)
    base, last = tmp_path / "base" / "last.ckpt", tmp_path / "adapted" / "last.ckpt"
    bpe = ["--data.tokenizer", "bpe:280"]
    assert run("fit", "--config", first, *bpe) == 0
    assert run("fit", "--config", second) == 2
    assert "base: expected the checkpoint of a trained model" in capsys.readouterr().err
    # the tokenizer of the base, not one of another size trained on the documents of the adapter
    assert run("fit", "--config", second, "--ckpt_path", base, "--data.tokenizer", "bpe:290") == 0
    saved = torch.load(last, weights_only=True)
    assert saved["adapter"]["base"] == str(base) and saved["global_step"] == 4
    assert run("fit", "--config", second, "--ckpt_path", last, *bpe, "--trainer.max_steps", "6") == 0  # resumes
    assert torch.load(last, weights_only=True)["global_step"] == 6
    capsys.readouterr()
    losses = []
    for path in (last, base):
        assert run("validate", "--config", second, "--ckpt_path", path) == 0
        losses.append(capsys.readouterr().out)
    assert "val/loss" in losses[0] and losses[0] != losses[1]

    folder = tmp_path / "adapters" / "docs"
    settings = ["--ckpt_path", base, "--max_new_tokens", "6", "--device", "cpu", "--format", "json"]

    def completions(*args):
        assert run("generate", *settings, *args) == 0
        found = capsys.readouterr()
        return [json.loads(line)["completion"] for line in found.out.splitlines()], found.err

    plain, _ = completions("--prompt", "The import")
    on, _ = completions("--prompt", "The import", "--adapter", f"docs={folder}")
    both, _ = completions("--prompt", "The import", "--adapter", "none", "--prompt", "The import", "--adapter", folder)
    assert both[0] == plain[0]
    assert on != plain
    _, note = completions("--prompt", "The import statement", "--adapter", folder, "--adapter", "auto")
    assert "adapters picked: docs" in note or "adapters picked: none" in note
    for args, problem in [
        (["--adapter", "nowhere"], "adapter: cannot read nowhere"),
        (["--adapter", f"a/b={folder}"], "adapter: expected letters, digits"),
        (["--adapter", "auto"], "adapter: auto picks from adapters"),
        (["--adapter", folder, "--adapter", "none"], "adapter: expected one, or one for each of 1 prompts, got 2"),
        (["--ckpt_path", last], "is the checkpoint of an adapter, expected that of its base"),
    ]:
        assert run("generate", *settings, "--prompt", "x", *args) == 2
        assert problem in capsys.readouterr().err


# several processes


@pytest.mark.slow
def test_adapters_train_on_several_processes_as_on_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).parent / "adapter_scenarios.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for arguments in (["prepare", "one"], ["ddp", "fsdp", "tensor_parallel", "resumed"]):
        processes = launcher if "ddp" in arguments else []
        command = [sys.executable, *processes, script, str(tmp_path), *arguments]
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    one = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 1e-3 for name, tensor in one.items() if "value" in name)
    for name in ("ddp", "fsdp", "tensor_parallel", "resumed"):
        found = load_file(tmp_path / name / "adapter_model.safetensors")
        torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config == json.loads((tmp_path / "one" / "adapter_config.json").read_text())

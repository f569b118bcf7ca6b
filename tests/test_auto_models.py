"""TokenFormer as models of transformers: its own functions load, generate, train and adapt them."""

import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

from lit_tokenformer.growth import grow
from lit_tokenformer.inference.sampling import Sampling, generate_tokens
from lit_tokenformer.interop.model_card import write_card
from lit_tokenformer.interop.transformers import (
    MODELS,
    from_transformers,
    save_transformers,
    to_transformers,
)
from lit_tokenformer.interop.transformers_format import read_transformers, write_transformers
from lit_tokenformer.models import Tokenformer, create_backbone

SIZES = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 8}
TEXT = {"vocab_size": 50, "context_length": 64}
KINDS = {
    "tokenformer_lm_tiny": TEXT,
    "tokenformer_mlm_tiny": TEXT,
    "tokenformer_vit_tiny_patch16_224": {"image_size": 16, "patch_size": 4, "num_classes": 5},
}


def model(preset="tokenformer_lm_tiny", dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    made = create_backbone(preset, **{**SIZES, **KINDS[preset], **overrides}).to(dtype).eval()
    for name, parameter in made.named_parameters():  # not the initial values, of which many are equal
        parameter.data += 0.1 * torch.randn_like(parameter) if "tokens" not in name else 0
    return made


def inputs(made):
    generator = torch.Generator().manual_seed(1)
    if made.config.stem == "patch":
        return torch.randn(3, 3, 16, 16, generator=generator, dtype=next(made.parameters()).dtype)
    return torch.randint(0, 50, (3, 17), generator=generator)


@pytest.mark.parametrize("preset", KINDS)
@pytest.mark.parametrize("totals", [{}, {"qkv": 12, "proj": 16, "ffn": 40, "depth": 4}, {"heads": 4}])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_logits_are_equal_and_the_way_back_is_exact(preset, totals, dtype, most):
    made = model(preset, dtype)
    if totals:
        grow(made, totals)
    x = inputs(made)
    twin = to_transformers(made)
    torch.testing.assert_close(twin(x).logits, made(x), rtol=0, atol=most)
    eager = to_transformers(made)
    eager.set_attn_implementation("eager")
    torch.testing.assert_close(eager(x).logits, made(x), rtol=0, atol=most)
    back = from_transformers(twin)
    torch.testing.assert_close(back(x), made(x), rtol=0, atol=0)
    assert back.size == made.size


@pytest.mark.parametrize("preset", KINDS)
def test_auto_classes_load_an_exported_folder(preset, tmp_path):
    made = model(preset)
    grow(made, {"ffn": 40, "depth": 3})
    save_transformers(made, tmp_path)
    loaded = getattr(transformers, MODELS[made.config.head][2]).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(inputs(made)).logits, made(inputs(made)), rtol=0, atol=1e-6)
    half = type(loaded).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {one.dtype for name, one in half.state_dict().items() if name.endswith("tau")} == {torch.float32}
    torch.testing.assert_close(half(inputs(made)).logits.float(), made(inputs(made)), rtol=0.1, atol=0.1)


@pytest.mark.slow
def test_the_written_code_needs_nothing_of_this_project(tmp_path):
    made = model()
    save_transformers(made, tmp_path / "folder")
    torch.save((inputs(made), made(inputs(made)).detach()), tmp_path / "expected.pt")
    script = f"""
import sys, torch
sys.modules["lit_tokenformer"] = None
from transformers import AutoModelForCausalLM
x, logits = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "folder")!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
torch.testing.assert_close(model(x).logits, logits, rtol=0, atol=1e-6)
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": ""}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_greedy_text_equals_ours_in_left_padded_batches():
    made = model()
    twin = to_transformers(made)
    prompts = [[3], [7, 8, 9, 1, 2], [5] * 11]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    found = twin.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)[:, width:]
    expected = torch.stack(list(generate_tokens(made, prompts, 20, Sampling(temperature=0.0))), dim=1)
    assert found.tolist() == expected.tolist() and len(expected.unique()) > 3


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
    ],
)
def test_every_way_of_generating(settings):
    twin = to_transformers(model())
    ids = inputs(model())[:1, :5]
    found = twin.generate(ids, max_new_tokens=8, pad_token_id=0, **settings)
    assert found.shape == (settings.get("num_return_sequences", 1), 13)
    if "cache_implementation" in settings or "use_cache" in settings or "prompt_lookup_num_tokens" in settings:
        assert torch.equal(found, twin.generate(ids, max_new_tokens=8, pad_token_id=0))


def test_gradients_and_checkpointing_equal_ours():
    made = model().train()
    twin = to_transformers(made).train()
    x = inputs(made)
    made(x).logsumexp(-1).sum().backward()
    for checkpointing in (False, True):
        twin.zero_grad()
        if checkpointing:
            twin.gradient_checkpointing_enable()
        twin(x).logits.logsumexp(-1).sum().backward()
        gradient = twin.model.layers[0].attn.q_proj.values.weight.grad.T
        torch.testing.assert_close(gradient, made.blocks[0].attn.query.value_tokens.grad, rtol=1e-4, atol=1e-5)


def test_vocabulary_is_resized_and_tied():
    twin = to_transformers(model())
    twin.resize_token_embeddings(60)
    assert twin(inputs(model())).logits.shape[-1] == 60
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("tokenformer_lm_tiny", {"score_norm": "softmax"}, "score_norm: not in TokenFormer's class"),
        ("tokenformer_lm_tiny", {"positions": "learned"}, "positions: not in"),
        ("tokenformer_lm_tiny", {"norm_affine": True}, "norm_affine: not in"),
        ("gpt2_tiny", {}, "projection: not in"),
    ],
)
def test_what_the_class_has_not_is_refused_by_name(preset, overrides, message, tmp_path):
    made = create_backbone(preset, **{**SIZES, **TEXT, **overrides})
    with pytest.raises(ValueError, match=f"^{message}"):
        save_transformers(made, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_lora_finds_every_projection():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(to_transformers(model()), peft.LoraConfig(r=2, target_modules="all-linear"))
    names = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
    assert len(names) == 2 * 5 * 2  # blocks, Pattention layers, keys and values
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(inputs(model())).logits, model()(inputs(model())), rtol=0, atol=1e-5)


def test_lora_on_parameter_tokens_learns_and_merges():
    peft = pytest.importorskip("peft")
    made = model()
    targets = [f"{part}_tokens" for part in ("key", "value")]
    config = peft.LoraConfig(r=2, target_parameters=[f"query.{one}" for one in targets], target_modules=[])
    adapted = peft.get_peft_model(made, config)
    trained = [one for one in adapted.parameters() if one.requires_grad]
    optimizer, x = torch.optim.AdamW(trained, lr=0.05), inputs(made)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(adapted(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        before = adapted(x)
        torch.testing.assert_close(adapted.merge_and_unload()(x), before, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_trainer_trains_it(tmp_path):
    pytest.importorskip("accelerate")
    twin = to_transformers(model()).train()
    x = inputs(model())
    rows = [{"input_ids": one, "labels": one} for one in x for _ in range(4)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    trainer = transformers.Trainer(model=twin, args=arguments, train_dataset=rows)
    before = twin(x, labels=x).loss.item()
    trainer.train()
    assert twin.eval()(x, labels=x).loss.item() < before


@pytest.mark.parametrize("preset", KINDS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_weights_of_our_class_come_back_without_its_code(preset, dtype, tmp_path):
    made = model(preset)
    grow(made, {"ffn": 40, "depth": 3})
    write_transformers(tmp_path, made.config.at_size(made.size), made.state_dict(), dtype)
    (tmp_path / "modeling_tokenformer.py").write_text("raise SystemExit")
    found = read_transformers(tmp_path)
    back = Tokenformer(found.config).eval()
    back.load_state_dict(found.state)
    x = inputs(made)
    torch.testing.assert_close(back.float()(x), made(x), rtol=0, atol=1e-6 if dtype is None else 0.1)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("mlp.keys.weight"))
    save_file({**weights, name: weights[name][:3].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"^source: .*{name} has shape \(3, 32\), expected \(40, 32\)$"):
        read_transformers(tmp_path)


def test_what_no_class_expresses_is_refused_with_both_reasons(tmp_path):
    made = model(score_norm="softmax")
    with pytest.raises(ValueError, match="no architecture of transformers fits.*; as TokenFormer: score_norm: not in"):
        write_transformers(tmp_path, made.config, made.state_dict())
    made = model(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="as TokenFormer: format: only 'safetensors' .got 'bin'.$"):
        write_transformers(tmp_path, made.config, made.state_dict(), format="bin")
    assert not list(tmp_path.iterdir())
    write_transformers(tmp_path, made.config, made.state_dict())  # in its own precision
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_a_model_card_tells_size_training_growth_and_metrics(tmp_path):
    made = model()
    event = {"step": 8, "epoch": 1, "method": "split", "before": made.size, "after": {"ffn": 40}, "parameters": 12345}
    checkpoint = {
        "hyper_parameters": {"preset": "tokenformer_lm_tiny"},
        "global_step": 20,
        "epoch": 3,
        "callbacks": {
            "growth": {"events": [event]},
            "monitor": {"training_flops": 2 * 10**9, "data_tokens": 640},
            "best": {"monitor": "val/loss", "current_score": torch.tensor(1.5), "best_model_score": torch.tensor(1.25)},
        },
    }
    write_card(tmp_path, made, checkpoint)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-generation", "transformers")
    assert "license" not in card.data.to_dict()
    lines = (tmp_path / "README.md").read_text().splitlines()
    for line in (
        "# tokenformer_lm_tiny",
        f"| parameters | {sum(one.numel() for one in made.parameters()):,} |",
        "| optimizer steps | 20 |",
        "| 8 | 1 | split | ffn 32 to 40 | 12,345 |",
        "| val/loss | 1.5 | 1.25 |",
    ):
        assert line in lines
    save_transformers(made, tmp_path)
    assert (tmp_path / "README.md").read_text().splitlines() == lines  # kept
    save_transformers(made, tmp_path / "other")
    assert "trust_remote_code=True" in (tmp_path / "other" / "README.md").read_text()


@pytest.mark.parametrize("growing", [False, True])
def test_push_to_hub_uploads_what_from_pretrained_loads(growing, tmp_path, monkeypatch):
    class Hub:
        def create_repo(self, repo_id, **_):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def create_commit(self, repo_id, operations, **_):
            for one in operations:
                shutil.copy(one.path_or_fileobj, tmp_path / one.path_in_repo)

    def no_card(*_, **__):
        raise EntryNotFoundError("no card")

    monkeypatch.setattr(transformers.utils.hub, "hf_api", Hub)
    monkeypatch.setattr(transformers.utils.hub.ModelCard, "load", no_card)
    made = model()
    to_transformers(made, growing).push_to_hub("someone/small")
    assert {"README.md", "config.json", "model.safetensors"} <= {one.name for one in tmp_path.iterdir()}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(inputs(made)).logits, made(inputs(made)), rtol=0, atol=1e-6)

"""Our backbone as models of transformers: every architecture, growth, generation, adapters and training."""

import pytest
import torch
import transformers

from lit_tokenformer.errors import UserError
from lit_tokenformer.growth import grow
from lit_tokenformer.inference.sampling import Sampling, generate_tokens
from lit_tokenformer.interop.transformers import (
    MODELS,
    GrowingTokenformerConfig,
    GrowingTokenformerForCausalLM,
    from_transformers,
    read_transformers,
    to_transformers,
)
from lit_tokenformer.models import Tokenformer, create_backbone, list_presets

SIZES = {"dim": 32, "depth": 3, "num_heads": 2, "param_tokens": 8, "vocab_size": 50, "context_length": 64}
SIZES |= {"image_size": 16, "patch_size": 4, "num_classes": 5}
PRESETS = [name for name in list_presets() if "tiny" in name]


def model(preset="tokenformer_lm_tiny", **overrides):
    torch.manual_seed(0)
    made = create_backbone(preset, **{**SIZES, **overrides}).eval()
    for parameter in made.parameters():  # not the initial values, of which many are equal
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def inputs(made):
    generator = torch.Generator().manual_seed(1)
    if made.config.stem == "patch":
        return torch.randn(3, 3, 16, 16, generator=generator)
    return torch.randint(0, 50, (3, 17), generator=generator)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_architecture_grows_and_is_saved_and_loaded(preset, tmp_path):
    made = model(preset)
    x, twin = inputs(made), to_transformers(made, growing=True)
    torch.testing.assert_close(twin(x).logits, made(x), rtol=0, atol=1e-5)
    deeper = {"depth": 6} if made.config.norm_position != "post" else {}
    grown = {**{kind: 2 * n for kind, n in made.size.items() if kind in ("qkv", "ffn", "hidden")}, **deeper}
    grow(twin, grown)
    logits = twin(x).logits
    torch.testing.assert_close(logits, made(x), rtol=1e-4, atol=1e-4)
    back = from_transformers(twin)
    assert back.size == {**made.size, **grown}
    twin.save_pretrained(tmp_path)
    loaded = getattr(transformers, MODELS[made.config.head][2]).from_pretrained(tmp_path)
    found = read_transformers(tmp_path)
    imported = Tokenformer(found.config).eval()
    imported.load_state_dict(found.state)
    for other in (back(x), loaded(x).logits, imported(x)):
        torch.testing.assert_close(other, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", ["tokenformer_lm_tiny", "gpt2_tiny", "llama_tiny", "rwkv4_tiny", "hybrid_tiny"])
def test_greedy_text_equals_ours_in_left_padded_batches(preset):
    made = model(preset)
    twin, prompts = to_transformers(made, growing=True), [[3], [7, 8, 9, 1, 2], [5] * 11]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    given = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, "do_sample": False}
    expected = torch.stack(list(generate_tokens(made, prompts, 8, Sampling(temperature=0.0))), dim=1)
    assert twin.generate(ids, **given)[:, width:].tolist() == expected.tolist()
    if made.config.norm_position != "post":
        grow(twin, {"depth": 6})
        assert twin.generate(ids, **given)[:, width:].tolist() == expected.tolist()


@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"cache": "static"}]
)
def test_beams_and_static_caches_equal_those_of_the_self_contained_class(settings):
    made = model()
    settings = {"cache_implementation": settings["cache"]} if "cache" in settings else settings
    texts = [
        to_transformers(made, growing).generate(inputs(made)[:2], max_new_tokens=8, pad_token_id=0, **settings)
        for growing in (False, True)
    ]
    assert torch.equal(*texts)


def test_sampling_and_prompt_lookup_generate():
    twin = to_transformers(model(), growing=True)
    ids = inputs(model())[:1, :5]
    assert twin.generate(ids, max_new_tokens=4, do_sample=True, num_return_sequences=2, pad_token_id=0).shape == (2, 9)
    greedy = twin.generate(ids, max_new_tokens=8, pad_token_id=0)
    assert torch.equal(twin.generate(ids, max_new_tokens=8, pad_token_id=0, prompt_lookup_num_tokens=3), greedy)


@pytest.mark.parametrize("preset", ["rwkv4_tiny", "hybrid_tiny"])
def test_recurrent_parts_refuse_a_cache(preset):
    twin = to_transformers(model(preset), growing=True)
    with pytest.raises(UserError, match="^use_cache: unsupported with recurrent parts and ALiBi"):
        twin(inputs(model()), use_cache=True)


def test_activation_checkpointing_and_attentions():
    made = model().train()
    twin = to_transformers(made, growing=True).train()
    x = inputs(made)
    made(x).logsumexp(-1).sum().backward()
    twin.activation_checkpointing_enable()
    twin(x).logits.logsumexp(-1).sum().backward()
    expected = dict(made.named_parameters())
    for name, parameter in twin.model.backbone.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5)
    twin.eval().set_attn_implementation("eager")
    found = twin(x, output_attentions=True, output_hidden_states=True)
    assert [one.shape for one in found.attentions] == [(3, 2, 17, 17)] * 3 and len(found.hidden_states) == 4
    torch.testing.assert_close(found.attentions[0].sum(-1), torch.ones(3, 2, 17))


def test_lora_on_parameter_tokens_learns_saves_and_merges(tmp_path):
    peft = pytest.importorskip("peft")
    targets = [f"{layer}.{part}_tokens" for layer in ("query", "value", "mlp") for part in ("key", "value")]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(to_transformers(model(), growing=True), config)
    assert sum(".lora_A" in name for name, _ in adapted.named_parameters()) == 3 * len(targets)  # blocks
    trained = [one for one in adapted.parameters() if one.requires_grad]
    optimizer, x = torch.optim.AdamW(trained, lr=0.05), inputs(model())
    losses = []
    for _ in range(10):
        loss = adapted(x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(to_transformers(model(), growing=True), tmp_path).eval()
    with torch.no_grad():
        expected = adapted(x).logits
        torch.testing.assert_close(loaded(x).logits, expected, rtol=0, atol=1e-5)
        merged = from_transformers(adapted.merge_and_unload())
        torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_trainer_trains_it_grown_in_between(tmp_path):
    pytest.importorskip("accelerate")
    twin, x = to_transformers(model(), growing=True).train(), inputs(model())
    rows = [{"input_ids": one, "labels": one} for one in x for _ in range(4)]
    losses = []
    for totals in ({}, {"ffn": 64, "depth": 6}):
        if totals:
            grow(twin, totals)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True
        )
        losses.append(twin(x, labels=x).loss.item())
        trainer = transformers.Trainer(model=twin, args=arguments, train_dataset=rows)
        trainer.train()
        losses.append(twin(x, labels=x).loss.item())
    assert losses[0] > losses[1] > losses[3] and losses[2] == pytest.approx(losses[1], rel=1e-4)
    trainer.save_model(tmp_path / "grown")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    assert loaded(x, labels=x).loss.item() == pytest.approx(twin.eval()(x, labels=x).loss.item())


def test_new_models_are_initialized_as_ours():
    torch.manual_seed(0)
    made = GrowingTokenformerForCausalLM(GrowingTokenformerConfig.of(model().config))
    torch.manual_seed(0)
    ours = Tokenformer(model().config)
    for name, parameter in made.model.backbone.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name))


def test_bad_configs_are_refused_by_name():
    with pytest.raises(UserError, match=r"^parts: not those of an architecture \(.*'colour'"):
        GrowingTokenformerForCausalLM(GrowingTokenformerConfig(parts={"stem": "token", "colour": 1}))
    made = create_backbone("mosaic_bert_tiny", **SIZES)
    grow(made, {"heads": 4})
    with pytest.raises(UserError, match="^heads: a model with positions 'alibi' cannot be saved after their growth$"):
        to_transformers(made, growing=True)


def test_auxiliary_losses_are_not_dropped_in_training():
    twin = to_transformers(model(), growing=True)
    twin.model.backbone.loss_names = ["balance"]
    twin(inputs(model()))
    with pytest.raises(UserError, match="^aux_losses: balance not in the losses of transformers"):
        twin.train()(inputs(model()))

"""Continuous batching and compiled decoding: the tokens of each prompt alone, whatever shares its batch."""

import json

import pytest
import torch

from lit_tokenformer.cli.generate import generate_text
from lit_tokenformer.data.text.tokenizer import Tokenizer
from lit_tokenformer.errors import UserError
from lit_tokenformer.growth import grow
from lit_tokenformer.inference.batching import SlotDecoder
from lit_tokenformer.inference.readers import compile_step
from lit_tokenformer.inference.sampling import Sampling, generate_tokens
from lit_tokenformer.inference.text import TextGenerator
from lit_tokenformer.models import create_backbone, list_presets, preset_config
from lit_tokenformer.models.mixers import attend_wide

GREEDY, FREE = Sampling(temperature=0), Sampling(temperature=1.5, top_k=40, top_p=0.95, repetition_penalty=1.3)
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [3, 3], [8, 1, 4, 4, 2], [6], [2, 9, 9, 9]]
SEEDS = list(range(10, 10 + len(PROMPTS)))
CAUSAL = [name for name in list_presets() if preset_config(name).causal]


def make(preset="tokenformer_lm_tiny", **overrides):
    """Model in float64 with random weights that are large enough for no rounding to decide a token."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 16, "vocab_size": 264, "context_length": 24}
    pattern = preset_config(preset).layers
    sizes |= {"depth": len(pattern)} if pattern else {}
    model = create_backbone(preset, **{**sizes, **overrides}).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.4)
    return model.requires_grad_(False)


def alone(model, sampling, new=6, **settings):
    """Tokens of each prompt continued alone."""
    return [
        [int(step) for step in generate_tokens(model, [prompt], new, sampling, seed=[seed], **settings)]
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]


def together(model, sampling, slots, new=6, **settings):
    """Tokens of each prompt, decoded in slots."""
    found = [[] for _ in PROMPTS]
    for pairs in SlotDecoder(model, PROMPTS, slots, new, sampling, seed=SEEDS, **settings):
        for row, token in pairs:
            found[row].append(token)
    return found


@pytest.mark.parametrize("preset", CAUSAL)
def test_every_architecture_continues_each_prompt_as_alone(preset):
    model = make(preset)
    assert together(model, GREEDY, 3) == alone(model, GREEDY)


@pytest.mark.parametrize("overrides", [{"positions": "alibi"}, {"positions": "learned"}, {"positions": "none"}])
@pytest.mark.parametrize("slots", [2, 50])
def test_every_position_encoding_and_number_of_slots(overrides, slots):
    model = make(**overrides)
    assert together(model, GREEDY, slots) == alone(model, GREEDY)
    assert together(model, FREE, slots, 4) == alone(model, FREE, 4)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_one_query_in_half_precision_is_that_of_float32(masked):
    query, key, value = torch.randn(3, 4, 1, 8), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    mask = torch.arange(9) <= torch.tensor([3, 8, 0])[:, None, None, None] if masked else None
    scores = query.float() @ key.float().repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ value.float().repeat_interleave(2, 1)).bfloat16()
    torch.testing.assert_close(attend_wide(query, key, value, mask, enable_gqa=True), expected, rtol=0.01, atol=1e-3)


def test_slots_are_refilled_at_stop_tokens_and_at_the_end_of_the_context():
    model = make()
    stop = [alone(model, GREEDY)[2][1], alone(model, GREEDY)[0][4]]
    prompts_in_steps = list(SlotDecoder(model, PROMPTS, 2, 30, GREEDY, stop))
    assert together(model, GREEDY, 2, 30, stop=stop) == alone(model, GREEDY, 30, stop=stop)
    assert max(map(len, prompts_in_steps)) == 2
    first = {row: number for number, pairs in reversed(list(enumerate(prompts_in_steps))) for row, _ in pairs}
    assert sorted(first, key=lambda row: (first[row], row))[:2] == [2, 4]  # the longest prompts


def test_a_growth_and_more_than_one_token_are_rejected():
    model = make()
    decoder = SlotDecoder(model, PROMPTS, 2, 9, GREEDY, seed=SEEDS)
    next(decoder)
    grow(model, 32)
    with pytest.raises(UserError, match="^state: created before a growth"):
        next(decoder)
    state = model.new_slots(2, 9)
    with pytest.raises(UserError, match=r"^state: slots read one data token at a time \(got 2\)"):
        model(torch.ones(2, 2, dtype=torch.int64), state=state)
    with pytest.raises(UserError, match="^state: slots cannot be cropped"):
        state.crop(1)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "quantization"), [("hybrid_tiny", None), ("tokenformer_lm_tiny", "int8")])
def test_a_compiled_step_writes_the_same_text_and_compiles_once(preset, quantization):
    model = make(preset)
    if quantization:
        pytest.importorskip("torchao")
        from lit_tokenformer.inference.quantization import quantize

        model = quantize(model.float(), quantization)
    torch._dynamo.utils.counters.clear()
    step = compile_step(model)
    assert together(model, GREEDY, 3, 4, step=step) == alone(model, GREEDY, 4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    steps = generate_tokens(model, PROMPTS[:3], 6, FREE, seed=SEEDS[:3], step=step)  # another sampling and length
    assert torch.stack(list(steps), 1).tolist() == alone(model, FREE)[:3]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compile_rejects_a_draft_and_states_without_slots(monkeypatch):
    generator = TextGenerator(make(), Tokenizer.bytes())
    generator.use_draft(0.5)
    with pytest.raises(UserError, match="^compile: unsupported with a draft"):
        generator.compile()
    model = make()
    monkeypatch.setattr(type(model.blocks[0].attn), "new_state", lambda self, length: object())
    with pytest.raises(UserError, match="^state: object has no form with slots"):
        compile_step(model)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_completions_come_in_order_with_stop_texts_and_adapters(batch_size):
    from lit_tokenformer.adapters import add_adapter

    model = make()
    for name in ("docs", "law"):
        add_adapter(model, name, 4)
    for name, parameter in model.named_parameters():
        if "groups" in name:
            parameter.data.normal_(std=0.4)
    generator = TextGenerator(model.eval(), Tokenizer.bytes())
    prompts = ["One", "", "Two of them", "3", "a" * 24, "Four", "b"]
    names = ["docs", None, "law", None, "docs", "docs", "law"]
    expected = []
    for number, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        generator.set_adapter(name)
        (*_, (one,)) = generator.run([prompt], 9, FREE, None, [5 + number])
        expected.append(one)
    stop = next(one.text[2:4] for one in expected if len(one.text) > 6)
    for number, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        generator.set_adapter(name)
        (*_, (expected[number],)) = generator.run([prompt], 9, FREE, stop, [5 + number])
    found = list(generator.complete(prompts, batch_size, 9, FREE, stop, 5, names))
    parts = [[(one.prompt, one.text, one.tokens, one.stopped) for one in many] for many in (found, expected)]
    assert parts[0] == parts[1] and {one.stopped for one in found} >= {"stop", "length", "context"}
    with pytest.raises(UserError, match="^batch_size: expected a whole number of at least 1, got 0"):
        next(generator.complete(prompts, 0))


def test_the_output_appears_when_it_is_complete_and_replaces_nothing(tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "id": 1}\n')
    output, found = tmp_path / "out.jsonl", []
    generator = TextGenerator(make(), Tokenizer.bytes())
    complete = TextGenerator.complete

    def watched(self, *given):
        for completion in complete(self, *given):
            found.append(output.exists())
            if len(found) == 4:
                output.write_text("of another process")
            yield completion

    monkeypatch.setattr(TextGenerator, "load", lambda *_, **__: generator)
    monkeypatch.setattr(TextGenerator, "complete", watched)
    given = {"prompts": str(tmp_path / "in.jsonl"), "max_new_tokens": 2, "output": str(output)}
    generate_text("a.ckpt", **given)
    assert [json.loads(row).get("id") for row in output.read_text().splitlines()] == [None, 1] and found == [False] * 2
    output.unlink()
    with pytest.raises(UserError, match="^output: cannot write .*out.jsonl .File exists"):
        generate_text("a.ckpt", **given)
    assert output.read_text() == "of another process"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_the_command_compiles(tmp_path, monkeypatch):
    generator, compiled = TextGenerator(make(), Tokenizer.bytes()), []
    monkeypatch.setattr(TextGenerator, "load", lambda *_, **__: generator)
    monkeypatch.setattr(TextGenerator, "compile", lambda self: compiled.append(self))
    generate_text("a.ckpt", prompt="a", max_new_tokens=1, output=str(tmp_path / "out"))
    assert not compiled
    generate_text("a.ckpt", prompt="a", max_new_tokens=1, output=str(tmp_path / "out2"), compile=True)
    assert compiled == [generator]

"""Attention masks, positions and embeddings given to a model, and decoding states that are reordered and cropped."""

import pytest
import torch
import transformers

from lit_tokenformer.errors import UserError
from lit_tokenformer.interop import write_transformers
from lit_tokenformer.models import create_backbone

SIZES = {"dim": 32, "depth": 3, "num_heads": 2, "param_tokens": 8, "vocab_size": 50, "context_length": 64}
CAUSAL = ["tokenformer_lm_tiny", "gpt2_tiny", "pythia_tiny", "llama_tiny", "pangu_pi_tiny", "rwkv4_tiny", "hybrid_tiny"]
BIDIRECTIONAL = ["tokenformer_mlm_tiny", "bert_tiny", "mosaic_bert_tiny"]
RECURRENT = ["rwkv4_tiny", "hybrid_tiny"]
LENGTHS = torch.tensor([3, 9, 6])


def model(preset, **overrides):
    torch.manual_seed(0)
    made = create_backbone(preset, **{**SIZES, **overrides}).double().eval()
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def positions(made, mask):
    """Positions of a padded batch; nothing for a model without positions."""
    return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if made.config.positions in ("learned", "rotary") else {}


@pytest.fixture
def tokens():
    return torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("preset", [*CAUSAL, *BIDIRECTIONAL])
def test_padding_on_any_side_does_not_change_a_sequence(preset, side, tokens):
    made, offset = model(preset), (0 if side == "right" else 9 - LENGTHS) // (2 if side == "both" else 1)
    index = torch.arange(9) - torch.as_tensor(offset)[..., None]
    mask = ((index >= 0) & (index < LENGTHS[:, None])).long()
    assert mask.sum(1).tolist() == LENGTHS.tolist()
    found = made(tokens, attention_mask=mask, **positions(made, mask))
    for row, given in enumerate(mask.bool()):
        torch.testing.assert_close(found[row, given], made(tokens[row, given][None])[0])


@pytest.mark.parametrize("preset", [name for name in [*CAUSAL, *BIDIRECTIONAL] if name not in RECURRENT])
def test_a_mask_with_holes_is_the_sequence_without_them(preset, tokens):
    made = model(preset)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 0]]).expand(3, -1)
    if made.config.positions == "alibi":
        pytest.skip("distances count the holes")
    found = made(tokens, attention_mask=mask, **positions(made, mask))
    kept = mask[0].bool()
    torch.testing.assert_close(found[:, kept], made(tokens[:, kept]))


@pytest.mark.parametrize("preset", [name for name in [*CAUSAL, *BIDIRECTIONAL] if name not in RECURRENT])
def test_masks_of_four_dimensions(preset, tokens):
    made = model(preset)
    documents = torch.arange(9).expand(3, 9) // 4
    allowed = (documents[:, :, None] == documents[:, None])[:, None]
    if made.config.causal:
        allowed = allowed & torch.ones(9, 9, dtype=torch.bool).tril()
    expected = made(tokens, documents=documents)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for mask in (allowed, additive, allowed.expand(3, 2, 9, 9)):
        torch.testing.assert_close(made(tokens, attention_mask=mask), expected)


@pytest.mark.parametrize("preset", [*CAUSAL, *BIDIRECTIONAL])
def test_embeddings_and_default_positions_given_explicitly_change_no_bit(preset, tokens):
    made, whole = model(preset), torch.ones(3, 9, dtype=torch.long)
    expected = made(tokens)
    embeds = made.stem.embedding(tokens)
    assert torch.equal(made(inputs_embeds=embeds, **positions(made, whole)), expected)
    torch.testing.assert_close(made(tokens, attention_mask=whole), expected)


@pytest.mark.parametrize("preset", ["gpt2_tiny", "pythia_tiny", "llama_tiny", "bert_tiny"])
def test_logits_equal_those_of_transformers(preset, tokens, tmp_path):
    made = model(preset).float()
    write_transformers(tmp_path, made.config, made.state_dict())
    auto = transformers.AutoModelForCausalLM if made.config.causal else transformers.AutoModelForMaskedLM
    theirs = auto.from_pretrained(tmp_path, attn_implementation="eager")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9, [1, 1, 1, 0, 1, 1, 1, 0, 0]])
    given = {"attention_mask": mask, "position_ids": torch.randint(0, 60, (3, 9))}
    found = made(tokens, **given), theirs(tokens, **given).logits
    torch.testing.assert_close(found[0][mask.bool()], found[1][mask.bool()], rtol=1e-5, atol=1e-5)
    embeds = made.stem.embedding(tokens.flip(1))
    found = made(inputs_embeds=embeds, **given), theirs(inputs_embeds=embeds, **given).logits
    torch.testing.assert_close(found[0][mask.bool()], found[1][mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", CAUSAL)
def test_a_state_follows_an_attention_mask(preset, tokens):
    made = model(preset)
    mask = (torch.arange(9) >= 6 - LENGTHS.clamp_max(6)[:, None]).long()  # 6 padded data tokens, and 3 to decode
    expected, state = made(tokens, attention_mask=mask, **positions(made, mask)), made.new_state(9)
    for begin, end in ((0, 6), (6, 7), (7, 9)):
        given = {name: one[:, begin:end] for name, one in positions(made, mask).items()}
        found = made(tokens[:, begin:end], state=state, attention_mask=mask[:, :end], **given)
        kept = mask[:, begin:end].bool()
        torch.testing.assert_close(found[kept], expected[:, begin:end][kept])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("preset", CAUSAL)
def test_a_state_can_be_reordered_and_repeated(preset, padded, tokens):
    made = model(preset)
    padding, rows = torch.tensor([4, 0, 2]) if padded else None, torch.tensor([2, 2, 0, 1])
    state, expected = (made.new_state(9, one) for one in (padding, padding if padding is None else padding[rows]))
    state.select(torch.arange(3))  # before the first data token too
    made(tokens[:, :5], state=state)
    state.select(rows)
    made(tokens[rows, :5], state=expected)
    found = made(tokens[rows, 5:], state=state)
    torch.testing.assert_close(found, made(tokens[rows, 5:], state=expected))
    assert state.start == expected.start == 9


@pytest.mark.parametrize("length", [5, -3])
@pytest.mark.parametrize("preset", [name for name in CAUSAL if name not in RECURRENT])
def test_a_state_can_be_cropped(preset, length, tokens):
    made = model(preset)
    state = made.new_state(9)
    made(tokens[:, :8].flip(1), state=made.new_state(9))
    made(torch.cat([tokens[:, :5], tokens[:, :3]], dim=1), state=state)
    state.crop(length)
    torch.testing.assert_close(made(tokens[:, 5:], state=state), made(tokens)[:, 5:])


@pytest.mark.parametrize(
    ("preset", "given", "message"),
    [
        (
            "gpt2_tiny",
            {"attention_mask": torch.ones(3, 8)},
            r"attention_mask: unexpected shape .got \(3, 8\), expected",
        ),
        ("gpt2_tiny", {"attention_mask": torch.ones(3, 1, 9, 9).long()}, "attention_mask: unsupported dtype"),
        ("gpt2_tiny", {"position_ids": torch.ones(3, 8).long()}, r"position_ids: unexpected shape .got \(3, 8\)"),
        ("gpt2_tiny", {"position_ids": torch.full((1, 9), 64)}, r"context_length: more data tokens .* .got 65,"),
        ("gpt2_tiny", {"inputs_embeds": torch.ones(3, 9, 32)}, "inputs_embeds: expected either token ids or embed"),
        (
            "mosaic_bert_tiny",
            {"position_ids": torch.ones(3, 9).long()},
            "position_ids: unsupported by positions 'alibi'",
        ),
        ("rwkv4_tiny", {"position_ids": torch.ones(3, 9).long()}, "position_ids: unsupported by positions 'none'"),
        (
            "rwkv4_tiny",
            {"attention_mask": torch.ones(3, 1, 9, 9)},
            "attention_mask: unexpected shape .* recurrent parts",
        ),
        ("hybrid_tiny", {"attention_mask": torch.arange(27).view(3, 9) % 3}, "attention_mask: recurrent parts support"),
    ],
)
def test_what_a_model_cannot_do_is_refused(preset, given, message, tokens):
    with pytest.raises(UserError, match=f"^{message}"):
        model(preset)(tokens, **given)


def test_images_have_neither_positions_nor_embeddings():
    made = model("tokenformer_vit_tiny_patch16_224", image_size=16, patch_size=4)
    with pytest.raises(UserError, match=r"^inputs_embeds: unsupported by stem 'patch'$"):
        made(inputs_embeds=torch.ones(1, 17, 32))


def test_states_refuse_to_go_where_they_cannot(tokens):
    made = model("rwkv4_tiny")
    state = made.new_state(9)
    made(tokens, state=state)
    state.crop(9)
    with pytest.raises(UserError, match=r"^state: a recurrent state cannot be cropped \(to 4 data tokens\)$"):
        state.crop(4)
    with pytest.raises(UserError, match=r"^state: cannot crop to 12 data tokens \(got 9 so far\)$"):
        state.crop(12)
    state = model("gpt2_tiny").new_state(9, padding=torch.tensor([1, 0, 0]))
    with pytest.raises(UserError, match="^attention_mask: cannot be combined with the padding of the state$"):
        model("gpt2_tiny")(tokens, state=state, attention_mask=torch.ones(3, 9))

"""The architectures against implementations nobody here wrote, their weights copied into ours, and plain formulas."""

import math
import re
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from lit_tokenformer.interop.architectures import Architecture
from lit_tokenformer.interop.timm_format import VIT
from lit_tokenformer.models import Tokenformer, create_backbone
from lit_tokenformer.models.block import AugmentedShortcut
from lit_tokenformer.models.pattention import series_activation
from lit_tokenformer.models.positions import alibi_bias, alibi_slopes
from lit_tokenformer.registry import TRANSFORMERS_MODELS

DIM, DEPTH, HEADS, VOCAB, LENGTH = 48, 3, 3, 29, 12  # heads of 16, of which Pythia turns 4; 3 is no power of 2
SIZES = {"dim": DIM, "depth": DEPTH, "num_heads": HEADS, "vocab_size": VOCAB, "context_length": LENGTH}
LENGTHS = torch.tensor([12, 5, 9])
Weights = dict[str, Tensor]


@contextmanager
def everywhere(dtype):
    """Their code casts to float32 by name in many places; those casts are to float64 while it is compared in it."""
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            patch.setattr(torch, "float32", torch.float64)
            patch.setattr(torch, "float", torch.float64)
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


# --- Theirs, ours, and how the weights of the one are called in the other ---------------------------------------------


class Pair(NamedTuple):
    theirs: nn.Module
    ours: Tokenformer
    renamed: Callable[[Weights], Weights]  # also takes gradients


def rename(weights: Weights, names: dict[str, str | None]) -> Weights:
    """By the first pattern that matches the whole name; ``None`` leaves a tensor out."""
    found = {}
    for name, tensor in weights.items():
        pattern, ours = next((p, ours) for p, ours in names.items() if re.fullmatch(p, name))
        if ours is not None:
            found[re.sub(pattern, ours, name)] = tensor
    return found


def split(weights: Weights, name: str, parts: tuple[str, ...] = ("query", "key", "value"), heads: int = 1) -> Weights:
    """One map as several: each ``{name}`` in the names becomes these parts, which stand side by side in each head."""
    found = {}
    for key, tensor in weights.items():
        if name in key:
            pieces = tensor.unflatten(0, (heads, len(parts), -1)).unbind(1)
            found.update({key.replace(name, part): one.flatten(0, 1) for part, one in zip(parts, pieces, strict=True)})
        else:
            found[key] = tensor
    return found


def by_table(table: Architecture, ours: Tokenformer, settings: dict | None = None) -> Callable[[Weights], Weights]:
    """By a table of ``import``, without the rows of which ``weights`` has no tensors."""

    def renamed(weights):
        found = {}
        for row in table.expanded(ours.config, ours.state_dict()):
            if all(name in weights for name in row.theirs):
                tensors = row.transform.ours([weights[name] for name in row.theirs], settings or {})
                found |= dict(zip(row.ours, tensors, strict=True))
        if ours.config.tie_embeddings and ours.config.stem == "token":
            found["head.weight"] = found["stem.embedding.weight"]
        return found

    return renamed


def gpt2() -> Pair:
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB, n_positions=LENGTH, n_embd=DIM, n_layer=DEPTH, n_head=HEADS, attn_implementation="eager"
        )
    )
    ours = create_backbone("gpt2_tiny", **SIZES)
    return Pair(theirs, ours, by_table(TRANSFORMERS_MODELS["gpt2"], ours))


def neox(preset: str, parallel: bool, **overrides) -> Pair:
    theirs = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=DIM,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            intermediate_size=4 * DIM,
            max_position_embeddings=LENGTH,
            use_parallel_residual=parallel,
            tie_word_embeddings=not parallel,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
            attn_implementation="eager",
        )
    )

    ours = create_backbone(preset, **SIZES, **overrides)
    renamed = by_table(TRANSFORMERS_MODELS["gpt_neox"], ours, {"num_attention_heads": HEADS})
    saved = {"lm_head.weight": "embed_out.weight"}  # in files
    return Pair(theirs, ours, lambda weights: renamed({saved.get(name, name): w for name, w in weights.items()}))


def bert_config(kind, extra_positions=0, **settings):
    return kind(
        vocab_size=VOCAB,
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * DIM,
        max_position_embeddings=LENGTH + extra_positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
        **settings,
    )


def without_segments(renamed: Callable[[Weights], Weights]) -> Callable[[Weights], Weights]:
    """Without the segment embeddings, which a gradient must not add to the positions."""
    return lambda weights: renamed({k: w * ("token_type" not in k) for k, w in weights.items()})


def bert(unpad: bool = False) -> Pair:
    ours = create_backbone("bert_tiny", unpad=unpad, **SIZES)
    renamed = by_table(TRANSFORMERS_MODELS["bert"], ours)
    return Pair(transformers.BertForMaskedLM(bert_config(transformers.BertConfig)), ours, without_segments(renamed))


def roberta(unpad: bool = False) -> Pair:
    config = bert_config(transformers.RobertaConfig, 2, pad_token_id=1, type_vocab_size=1, layer_norm_eps=1e-5)
    ours = create_backbone("roberta_tiny", unpad=unpad, **SIZES)
    renamed = by_table(TRANSFORMERS_MODELS["roberta"], ours)
    return Pair(transformers.RobertaForMaskedLM(config), ours, without_segments(renamed))


class Gate(nn.Module):
    """MosaicBERT's way into the feed-forward (arXiv 2312.17482, section 3.1.3): one map without bias, halved."""

    def __init__(self):
        super().__init__()
        self.both = nn.Linear(DIM, 8 * DIM, bias=False)

    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)
        return 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))) * up


def mosaic_bert(unpad: bool = True) -> Pair:
    theirs = transformers.BertForMaskedLM(bert_config(transformers.BertConfig))
    for layer in theirs.bert.encoder.layer:
        layer.intermediate = Gate()
    names = {
        r"bert\.encoder\.layer\.(\d+)\.intermediate\.(gate|up)\.weight": r"blocks.\1.mlp.\2.weight",
        r"bert\.encoder\.layer\.(\d+)\.output\.dense\.(\w+)": r"blocks.\1.mlp.down.\2",
        r".*": None,
    }
    ours = create_backbone("mosaic_bert_tiny", unpad=unpad, **SIZES)
    table = by_table(TRANSFORMERS_MODELS["bert"], ours)
    return Pair(theirs, ours, lambda w: {**table(w), **rename(split(w, "both", ("gate", "up")), names)})


class TheirAttention(nn.Module):
    """PyTorch's attention in the place of RWKV's time mix."""

    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(DIM, HEADS, bias=False, batch_first=True)

    def forward(self, x, state=None, use_cache=False):
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.mha(x, x, x, attn_mask=future, need_weights=False)[0], state


class TheirMLP(nn.Sequential):
    """An MLP in the place of RWKV's channel mix."""

    def forward(self, x, state=None):
        return super().forward(x), state


def hybrid() -> Pair:
    theirs, _, renamed = rwkv()
    block = theirs.rwkv.blocks[2]
    block.attention = TheirAttention()
    block.feed_forward = TheirMLP(nn.Linear(DIM, 4 * DIM, bias=False), nn.GELU(), nn.Linear(4 * DIM, DIM, bias=False))
    names = {
        r"rwkv\.blocks\.2\.attention\.mha\.(query|key|value)_weight": r"blocks.2.attn.\1.weight",
        r"rwkv\.blocks\.2\.attention\.mha\.out_proj\.weight": "blocks.2.attn.proj.weight",
        r"rwkv\.blocks\.2\.feed_forward\.0\.weight": "blocks.2.mlp.fc1.weight",
        r"rwkv\.blocks\.2\.feed_forward\.2\.weight": "blocks.2.mlp.fc2.weight",
    }

    def split_and_rename(weights: Weights) -> Weights:
        weights = split(weights, "in_proj")
        own = {name for name in weights if any(re.fullmatch(pattern, name) for pattern in names)}
        rest = renamed({name: tensor for name, tensor in weights.items() if name not in own})
        return {**rest, **rename({name: weights[name] for name in own}, names)}

    return Pair(theirs, create_backbone("hybrid_tiny", **SIZES), split_and_rename)


def rwkv() -> Pair:
    theirs = transformers.RwkvForCausalLM(
        transformers.RwkvConfig(
            vocab_size=VOCAB, context_length=LENGTH, hidden_size=DIM, num_hidden_layers=DEPTH, rescale_every=0
        )
    )
    ours = create_backbone("rwkv4_tiny", **SIZES)
    return Pair(theirs, ours, by_table(TRANSFORMERS_MODELS["rwkv"], ours))


def llama(preset: str = "pangu_pi_tiny", **overrides) -> Pair:
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=DIM,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            intermediate_size=DIM * 8 // 3,
            max_position_embeddings=LENGTH,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    ours = create_backbone(preset, **SIZES, **overrides)
    return Pair(theirs, ours, by_table(TRANSFORMERS_MODELS["llama"], ours))


def vit() -> Pair:
    theirs = VisionTransformer(16, 4, num_classes=5, embed_dim=DIM, depth=DEPTH, num_heads=HEADS)
    ours = create_backbone(
        "vit_tiny_patch16_224", dim=DIM, depth=DEPTH, num_heads=HEADS, image_size=16, patch_size=4, num_classes=5
    )
    return Pair(theirs, ours, by_table(VIT, ours))


SEQUENTIAL = {"bias": True, "norm_affine": True}  # what the `transformer` twin leaves out of GPT-NeoX
BUILDERS = {
    "vit": vit,
    "gpt2": gpt2,
    "pythia": lambda: neox("pythia_tiny", parallel=True),
    "transformer": lambda: neox("transformer_tiny", parallel=False, **SEQUENTIAL),
    "bert": bert,
    "bert-unpad": lambda: bert(unpad=True),
    "roberta": roberta,
    "roberta-unpad": lambda: roberta(unpad=True),
    "mosaic_bert": mosaic_bert,
    "mosaic_bert-padded": lambda: mosaic_bert(unpad=False),
    "rwkv4": rwkv,
    "hybrid": hybrid,
    "llama": lambda: llama("llama_tiny"),
    "pangu_pi-degenerate": lambda: llama(shortcut_reduction=4),
}
EVERY_PAIR = pytest.mark.parametrize("name", BUILDERS)


@torch.no_grad()
def build(name: str) -> Pair:
    """Both with the same weights, all random: neither a bias nor a norm is as it is born."""
    pair = BUILDERS[name]()
    for parameter in pair.theirs.parameters():
        parameter.add_(0.25 * torch.randn_like(parameter))
    if name.startswith("mosaic_bert"):
        pair.theirs.bert.embeddings.position_embeddings.weight.zero_()
        pair.theirs.bert.embeddings.token_type_embeddings.weight.zero_()
    weights = pair.renamed(pair.theirs.state_dict())
    if name.startswith(("bert", "roberta")):  # all text is of the first segment
        stem = pair.theirs.base_model.embeddings
        weights["stem.positions"] = weights["stem.positions"] + stem.token_type_embeddings.weight[0]
    if name == "pangu_pi-degenerate":  # with parts that contribute nothing: SiLU(0) = 0
        for number, block in enumerate(pair.ours.blocks):
            places = f"blocks.{number}.mlp.activation", f"blocks.{number}.shortcut"
            weights[f"{places[0]}.scale"] = torch.tensor([1.0, 0.0]).expand(DIM * 8 // 3, 2)
            weights[f"{places[0]}.shift"] = torch.zeros(DIM * 8 // 3, 2)
            weights[f"{places[1]}.down.weight"] = torch.randn_like(block.shortcut.down.weight)
            weights[f"{places[1]}.up.weight"] = torch.zeros_like(block.shortcut.up.weight)
    pair.ours.load_state_dict(weights, strict=True)
    pair.theirs.eval(), pair.ours.eval()
    return pair


def compare(name: str, dtype: torch.dtype, gradients: bool = False):
    """Logits of both for the same input, where they mean something; with gradients, those of a cross-entropy."""
    with everywhere(dtype):
        pair = build(name)
        x, present = torch.randint(3, VOCAB, (3, LENGTH)), torch.ones(3, LENGTH, dtype=torch.bool)
        if name == "vit":
            x, present = torch.randn(3, 3, 16, 16), present[:, 0]
            found = pair.ours(x), pair.theirs(x)
        elif "bert" in name:
            present = torch.arange(LENGTH) < LENGTHS[:, None]
            x = x.where(present, 1)  # RoBERTa does not count its padding
            mask = alibi(present) if "mosaic" in name else present.long()
            found = pair.ours(x, lengths=LENGTHS), pair.theirs(x, attention_mask=mask).logits
        else:
            found = pair.ours(x), pair.theirs(x, use_cache=False).logits
        targets = torch.randint(5, present.shape)
        found = found[0][present], found[1][present]
        if not gradients:
            return found
        for logits in found:
            F.cross_entropy(logits, targets[present]).backward()
    both = dict(pair.theirs.named_parameters(remove_duplicate=False))
    expected = pair.renamed({k: p.grad for k, p in both.items() if p.grad is not None})
    given = {k: p.grad for k, p in pair.ours.named_parameters(remove_duplicate=False)}
    return given, expected


def alibi(present):
    """(B, H, T, T): minus slope times distance, by transformers' slopes, and nothing for the padding."""
    slopes = build_alibi_tensor(torch.ones(1, 2), HEADS, torch.float64)[:, 0, 1]
    places = torch.arange(LENGTH)
    bias = -slopes[:, None, None] * (places[:, None] - places).abs()
    return bias.masked_fill(~present[:, None, None], -1e9).to(torch.get_default_dtype())


def difference(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@EVERY_PAIR
def test_logits_equal_theirs(name, dtype, bound):
    ours, theirs = compare(name, dtype)
    assert ours.dtype == theirs.dtype == dtype and theirs.std() > 0.5
    assert difference(ours, theirs) <= bound


@EVERY_PAIR
def test_gradients_equal_theirs(name):
    ours, theirs = compare(name, torch.float64, gradients=True)
    extra = {"activation", "shortcut"} if name == "pangu_pi-degenerate" else set()
    assert {key for key in ours if not any(part in key for part in extra)} == set(theirs)
    for key, expected in theirs.items():
        assert expected.abs().max() > 0 or ".key.bias" in key, key  # a softmax does not see the bias of keys
        torch.testing.assert_close(
            ours[key], expected, rtol=1e-8, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
        )


# --- What RWKV remembers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@torch.no_grad()
def test_state_of_rwkv_goes_on_as_theirs(dtype, bound):
    """In chunks of at least two data tokens: with one at a time their batches are broken."""
    with everywhere(dtype):
        theirs, ours, _ = build("rwkv4")
        x = torch.randint(VOCAB, (2, LENGTH))
        state, remembered = ours.new_state(LENGTH), None
        for chunk in x.split([5, 2, 3, 2], dim=1):
            out = theirs(chunk, state=remembered, use_cache=True)
            remembered = out.state
            assert difference(ours(chunk, state=state), out.logits) <= bound
    ffn_last, att_last, numerator, denominator, log_scale = remembered  # (B, D, L)
    for layer, (mixer, feed_forward) in enumerate(state.blocks):
        sums = mixer.sums
        for mine, other in (
            (mixer.last[:, 0], att_last),
            (feed_forward.last[:, 0], ffn_last),
            (sums.numerator / sums.denominator, numerator / denominator),
            (sums.denominator.log() + sums.log_scale, denominator.log() + log_scale),
        ):
            assert difference(mine, other[:, :, layer]) <= bound


# --- Formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", range(1, 21))
def test_alibi_slopes_are_those_of_bloom_and_mpt(heads):
    slopes = alibi_slopes(heads, torch.float64)
    bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float64)[:, 0, 1]
    mpt = -build_mpt_alibi_tensor(heads, 2)[:, 0, 0].double()
    torch.testing.assert_close(slopes, bloom, rtol=1e-6, atol=0)
    torch.testing.assert_close(slopes, mpt, rtol=1e-6, atol=0)


def test_alibi_bias_falls_with_the_distance_on_both_sides():
    bias = alibi_bias(4, 2, 3, torch.zeros(()))  # the third to the fifth data token
    assert bias.shape == (1, 4, 3, 5)
    assert bias[0, 0].tolist() == [
        [-0.5, -0.25, 0, -0.25, -0.5],
        [-0.75, -0.5, -0.25, 0, -0.25],
        [-1, -0.75, -0.5, -0.25, 0],
    ]


def test_series_activation_is_the_published_sum():
    """arXiv 2312.17276, eq. 7."""
    x, a, b = torch.randn(2, 5, 7), torch.randn(7, 3), torch.randn(7, 3)
    expected = torch.empty_like(x)
    for channel in range(7):
        terms = [x[..., channel] * a[channel, i] + b[channel, i] for i in range(3)]
        expected[..., channel] = sum(term * torch.sigmoid(term) for term in terms)
    torch.testing.assert_close(series_activation(x, a, b, F.silu), expected)
    plain = torch.ones(7, 1), torch.zeros(7, 1)
    torch.testing.assert_close(series_activation(x, *plain), 0.5 * x * (1 + torch.erf(x / math.sqrt(2))))


@torch.no_grad()
def test_block_of_pangu_pi_is_its_formulas():
    """arXiv 2312.17276, eq. 4 and 7, with SwiGLU: the shortcut reads what the attention reads."""
    model = create_backbone("pangu_pi_tiny", **{**SIZES, "shortcut_reduction": 8}).double()
    for parameter in model.parameters():
        parameter.add_(0.25 * torch.randn_like(parameter))
    block, x = model.blocks[0], torch.randn(2, 1, DIM, dtype=torch.float64)

    def rms(x, norm):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    shortcut = block.shortcut
    assert isinstance(shortcut, AugmentedShortcut) and shortcut.down.weight.shape == (DIM // 8, DIM)
    z = rms(x, block.norm1)
    narrow = z @ shortcut.down.weight.T
    narrow = 0.5 * narrow * (1 + torch.erf(narrow / math.sqrt(2)))
    attention = z @ block.attn.value.weight.T @ block.attn.proj.weight.T  # one data token attends to itself
    x_after = x + attention + narrow @ shortcut.up.weight.T
    z, mlp = rms(x_after, block.norm2), block.mlp
    gate, a, b = z @ mlp.gate.weight.T, mlp.activation.scale, mlp.activation.shift
    series = sum((gate * a[:, i] + b[:, i]) * torch.sigmoid(gate * a[:, i] + b[:, i]) for i in range(2))
    expected = x_after + (series * (z @ mlp.up.weight.T)) @ mlp.down.weight.T
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


def test_series_starts_near_the_plain_activation_with_unequal_terms():
    glu = create_backbone("pangu_pi_tiny", **SIZES).blocks[0].mlp.activation
    token = create_backbone("pangu_pi_tiny", feed_forward="pattention", **SIZES).blocks[0].mlp
    for scale, shift in ((glu.scale, glu.shift), (token.scale_tokens, token.shift_tokens)):
        assert (scale[:, 0] == 1).all() and (shift == 0).all()
        assert 0.01 < scale[:, 1].std() < 0.03


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 4])
def test_rwkv_is_born_as_published(depth):
    """The official code of RWKV-v4neo, channel by channel."""
    dim, vocab = 12, 40
    model = create_backbone("rwkv4_tiny", dim=dim, num_heads=1, depth=depth, vocab_size=vocab)
    for layer, block in enumerate(model.blocks):
        to_one = layer / (depth - 1) if depth > 1 else 0.0
        to_zero = 1 - layer / depth
        time, channel = block.attn, block.mlp
        expected = {
            time.time_decay: [-5 + 8 * (h / (dim - 1)) ** (0.7 + 1.3 * to_one) for h in range(dim)],
            time.time_first: [math.log(0.3) + 0.5 * ((h + 1) % 3 - 1) for h in range(dim)],
            time.mix_key: [(i / dim) ** to_zero for i in range(dim)],
            time.mix_value: [(i / dim) ** to_zero + 0.3 * to_one for i in range(dim)],
            time.mix_receptance: [(i / dim) ** (0.5 * to_zero) for i in range(dim)],
            channel.mix_key: [(i / dim) ** to_zero for i in range(dim)],
            channel.mix_receptance: [(i / dim) ** to_zero for i in range(dim)],
        }
        for parameter, numbers in expected.items():
            torch.testing.assert_close(parameter, torch.tensor(numbers))
        for zero in (time.key, time.receptance, time.proj, channel.value, channel.receptance):
            assert (zero.weight == 0).all()
        torch.testing.assert_close(time.value.weight.T @ time.value.weight, torch.eye(dim), atol=1e-5, rtol=0)
        torch.testing.assert_close(channel.key.weight.T @ channel.key.weight, 4 * torch.eye(dim), atol=1e-5, rtol=0)
    head = model.head.weight  # orthogonal, of gain sqrt(V / D) / 2
    torch.testing.assert_close(head.T @ head, 0.25 * vocab / dim * torch.eye(dim), atol=1e-5, rtol=0)
    assert 9e-5 < model.stem.embedding.weight.abs().max() <= 1e-4
    x = torch.randint(vocab, (1, 5))
    torch.testing.assert_close(model.forward_features(x), model.norm(model.stem(x)))  # every block adds nothing


PUBLISHED = {  # what transformers and timm count, less what we leave out
    "gpt2_124m": 124_439_808,
    "pythia_160m": 162_322_944,
    "rwkv4_169m": 169_342_464,
    "bert_base": 109_514_298 - 2 * 768,  # segments
    "roberta_base": 124_697_433 - (2 + 1) * 768,  # two positions for padding, one segment
    "mosaic_bert_base": 137_400_384 - 2 * 768,  # segments
    "vit_base_patch16_224": 86_567_656,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(name, parameters):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in create_backbone(name).parameters()) == parameters

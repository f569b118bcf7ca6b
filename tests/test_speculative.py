"""Speculative decoding: the text of the model alone, in fewer of its forward passes."""

import copy
import itertools
import json

import pytest
import torch

from lit_tokenformer.data import Tokenizer
from lit_tokenformer.growth import shrink
from lit_tokenformer.inference.sampling import ENDED, Sampling, generate_tokens
from lit_tokenformer.inference.speculative import Speculation, _Row, speculate_tokens
from lit_tokenformer.inference.text import TextGenerator
from lit_tokenformer.models import create_backbone

TINY = {"dim": 16, "depth": 2, "num_heads": 2, "rotary_fraction": 0.5, "vocab_size": 24, "context_length": 40}
GREEDY = Sampling(temperature=0)


def made(preset="tokenformer_lm_tiny", scale=0.3, **more):
    """A model of random weights, in double precision: no two tokens tie."""
    given = {**TINY, "param_tokens": 16, **more}
    model = create_backbone(preset, **given).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def prefix_of(model, tokens):
    draft = copy.deepcopy(model)
    shrink(draft, tokens)
    return draft


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize(
    ("preset", "size"),
    [("tokenformer_lm_tiny", 8), ("gpt2_tiny", 0.5), ("llama_tiny", 0.5), ("tokenformer_lm_tiny", 1)],
)
def test_greedy_text_is_that_without_a_draft(preset, size, penalty):
    model = made(preset)
    prompts, sampling, counts = (
        [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]],
        Sampling(0, repetition_penalty=penalty),
        Speculation(),
    )
    alone = list(generate_tokens(model, prompts, 50, sampling, stop=[0], vocab_size=22))
    found = list(speculate_tokens(model, prefix_of(model, size), prompts, 50, sampling, [0], 22, counts=counts))
    assert torch.equal(torch.stack(found), torch.stack(alone))
    assert counts.tokens == sum((step != ENDED).sum().item() for step in alone) >= counts.calls
    assert counts.calls + counts.accepted >= counts.tokens and 0 <= counts.accepted <= counts.drafted


def test_a_draft_that_is_the_model_saves_all_calls_but_one_in_five():
    model, counts = made(), Speculation()
    list(speculate_tokens(model, copy.deepcopy(model), [[1]], 30, GREEDY, counts=counts))
    assert counts == Speculation(tokens=30, calls=6, drafted=24, accepted=24)
    counts = Speculation()
    list(speculate_tokens(model, model, [[1]], 30, Sampling(0.9), seed=0, draft_length=2, counts=counts))
    assert counts == Speculation(tokens=30, calls=10, drafted=20, accepted=20)
    assert str(counts).startswith("33.3 calls of the model per 100 tokens (10 for 30), 100 %")


def test_accepted_and_replaced_tokens_have_the_distribution_of_the_model():
    p, q = torch.randn(2, 5, dtype=torch.double).softmax(dim=-1)
    row = _Row(made(), made(), [1], 4, Sampling(), 5, torch.Generator().manual_seed(0), 4, Speculation())
    drawn = torch.multinomial(q, 6000, replacement=True).tolist()
    found = torch.tensor([row._check(token, p.log(), q.log()) for token in drawn]).bincount(minlength=5)
    chi_square = ((found - 6000 * p).square() / (6000 * p)).sum()
    assert chi_square < 18.5  # 99.9 % of draws, 4 degrees of freedom


@pytest.mark.parametrize("sampling", [Sampling(1.5), Sampling(1.0, top_k=3, top_p=0.8)])
def test_sampled_texts_have_the_distribution_of_the_model(sampling):
    """All texts of two tokens, with their probabilities under the model."""
    model = made(depth=1, dim=8, vocab_size=4, scale=1.0)
    draft, rows = prefix_of(model, 4), 300
    found = torch.stack(list(speculate_tokens(model, draft, [[1, 2]] * rows, 2, sampling, seed=3, draft_length=1)))
    texts = list(itertools.product(range(4), repeat=2))
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, first] for first in range(4)]))
    one, two = (sampling.scores(logits[:, i]).softmax(dim=-1) for i in (1, 2))
    expected = rows * torch.tensor([one[0, a] * two[a, b] for a, b in texts], dtype=torch.double)
    counts = torch.tensor([found.T.eq(torch.tensor(text)).all(dim=1).sum() for text in texts])
    likely = expected > 0
    assert not counts[~likely].any()
    chi_square = ((counts - expected)[likely].square() / expected[likely]).sum()
    assert chi_square < 2 * likely.sum() + 12


def test_a_row_depends_on_its_own_seed_only():
    model, sampling = made(), Sampling(1.0)
    draft = prefix_of(model, 4)
    both = torch.stack(list(speculate_tokens(model, draft, [[1, 2], [3]], 12, sampling, seed=[7, 8])))
    alone = torch.stack(list(speculate_tokens(model, draft, [[3]], 12, sampling, seed=[8])))
    assert torch.equal(both[:, 1], alone[:, 0])


@pytest.mark.parametrize(
    ("draft", "problem"),
    [
        ({"vocab_size": 20}, "draft: its vocabulary has 20 tokens \\(expected 24, as the model's\\)"),
        ({"preset": "gpt2_tiny", "context_length": 20}, "draft: its context_length is 20"),
        ({"preset": "rwkv4_tiny"}, "draft: unsupported by a recurrent model \\(draft has RecurrentState\\)"),
        ({"preset": "tokenformer_mlm_tiny"}, "model: not a causal language model"),
    ],
)
def test_a_draft_that_does_not_match_is_refused(draft, problem):
    with pytest.raises(ValueError, match=problem) as error:
        speculate_tokens(made("gpt2_tiny"), made(**draft), [[1]], 4)
    assert "\n" not in str(error.value)


def test_draft_length_and_weights_are_checked():
    model = made()
    with pytest.raises(ValueError, match="draft_length: expected a whole number of at least 1, got 0"):
        speculate_tokens(model, model, [[1]], 4, draft_length=0)
    broken = copy.deepcopy(model)
    broken.stem.embedding.weight.data.fill_(torch.nan)
    for pair, name in (((model, broken), "draft"), ((broken, model), "model")):
        for sampling in (GREEDY, Sampling()):
            with pytest.raises(ValueError, match=f"{name}: non-finite logits"):
                list(speculate_tokens(*pair, [[1]], 4, sampling, seed=0))


def test_a_generator_writes_the_same_text_with_a_draft():
    model = made(vocab_size=257).float()
    generator = TextGenerator(model, Tokenizer.bytes())
    expected = generator.generate(["Once", "Twice upon"], 20, temperature=0)
    assert generator.speculation.calls == 0
    generator.use_draft(0.5, length=3)
    assert generator.generate(["Once", "Twice upon"], 20, temperature=0) == expected
    assert 0 < generator.speculation.calls <= generator.speculation.tokens
    generator.use_draft(TextGenerator(prefix_of(model, 4), Tokenizer.bytes()))
    assert generator.generate(["Once", "Twice upon"], 20, temperature=0) == expected
    other = json.loads(Tokenizer.bytes().to_json())
    vocabulary = other["model"]["vocab"]
    other["model"]["vocab"] = {piece: 255 - number if number < 256 else number for piece, number in vocabulary.items()}
    with pytest.raises(ValueError, match="draft: its tokenizer differs from the model's"):
        generator.use_draft(TextGenerator(model, Tokenizer.from_json(json.dumps(other), 256)))
    with pytest.raises(ValueError, match="draft_tokens: .* would grow from 16 to 32"):
        generator.use_draft(32)

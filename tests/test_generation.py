"""Token ids from a language model: what is chosen, when it ends, and that the cache changes nothing."""

import math
from itertools import pairwise

import pytest
import torch

from lit_tokenformer.errors import UserError
from lit_tokenformer.growth import grow
from lit_tokenformer.inference.sampling import Sampling, draw, generate_tokens, keep_top_k, keep_top_p, penalize
from lit_tokenformer.models import Tokenformer, create_backbone

VOCAB, CONTEXT = 61, 24
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
FREE = Sampling(temperature=0.7, top_k=40, top_p=0.95, repetition_penalty=1.2)
GREEDY = Sampling(temperature=0)


def make_model(**overrides) -> Tokenformer:
    """A language model with opinions; in float64, so that no rounding decides between two tokens."""
    sizes = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 16, "vocab_size": VOCAB, "context_length": CONTEXT}
    sizes["tie_embeddings"] = False  # tied, random weights repeat what they read
    model = create_backbone("tokenformer_lm_tiny", **{**sizes, **overrides}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    return model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return make_model()


def rows(model, prompts, max_new_tokens=12, sampling=GREEDY, seed=0, **settings):
    """The new ids of each row, a list of lists, without what stands for an end."""
    steps = list(generate_tokens(model, prompts, max_new_tokens, sampling, seed=seed, **settings))
    assert all(step.shape == (len(prompts),) and step.dtype == torch.int64 for step in steps)
    texts = torch.stack(steps, dim=1).tolist() if steps else [[] for _ in prompts]
    for text in texts:  # what has ended stays so
        assert all(after == -1 for before, after in pairwise(text) if before == -1)
    return [[token for token in text if token != -1] for text in texts]


# --- Choosing --------------------------------------------------------------------------------------------------------


def probabilities(sampling, logits, seen=()):
    """The distribution in plain lines, one row of numbers at a time."""
    scores = list(logits)
    for i in seen:
        scores[i] = (
            scores[i] / sampling.repetition_penalty if scores[i] > 0 else scores[i] * sampling.repetition_penalty
        )
    scores = [score / sampling.temperature for score in scores]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: sampling.top_k]
    weights = {i: math.exp(scores[i] - scores[order[0]]) for i in order}
    total, reached, kept = sum(weights.values()), 0.0, []
    for i in order:
        if reached >= (sampling.top_p or 1.0):
            break
        kept.append(i)
        reached += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(scores))]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.3),
        Sampling(top_k=1),
        Sampling(top_k=7),
        Sampling(top_k=10**6),
        Sampling(top_p=0.5),
        Sampling(top_p=1e-9),
        Sampling(repetition_penalty=1.3),
        Sampling(repetition_penalty=0.7),
        Sampling(temperature=1.5, top_k=20, top_p=0.8, repetition_penalty=1.1),
    ],
)
def test_distribution_is_that_of_plain_lines(sampling):
    logits = 3 * torch.randn(4, 50, dtype=torch.float64)
    seen = torch.rand(4, 50) < 0.3
    before = logits.clone()
    given = sampling.scores(logits, seen).softmax(dim=-1)
    told = [
        probabilities(sampling, row.tolist(), mask.nonzero()[:, 0].tolist())
        for row, mask in zip(logits, seen, strict=True)
    ]
    torch.testing.assert_close(given, torch.tensor(told, dtype=torch.float64))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("sampling", [FREE, Sampling(top_p=0.6), Sampling(top_k=5), Sampling(repetition_penalty=1.7)])
def test_distribution_is_that_of_transformers(sampling):
    hf = pytest.importorskip("transformers.generation.logits_process")
    logits, seen = 3 * torch.randn(4, 50, dtype=torch.float64), torch.randint(0, 50, (4, 9))
    expected = hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(seen, logits.clone())
    expected = hf.TemperatureLogitsWarper(float(sampling.temperature))(seen, expected)
    if sampling.top_k:
        expected = hf.TopKLogitsWarper(sampling.top_k)(seen, expected)
    if sampling.top_p:
        expected = hf.TopPLogitsWarper(sampling.top_p)(seen, expected)
    mask = torch.zeros(4, 50, dtype=torch.bool).scatter(1, seen, True)
    torch.testing.assert_close(sampling.scores(logits, mask).softmax(dim=-1), expected.softmax(dim=-1))


def test_each_warper_alone():
    logits = torch.tensor([[2.0, -1.0, 1.0, 0.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalize(logits, seen, 2.0).tolist() == [[1.0, -2.0, 1.0, 0.0]]
    assert keep_top_k(logits, 2).tolist() == [[2.0, -math.inf, 1.0, -math.inf]]
    halves = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for p, kept in ((0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (0.9, 4)):
        assert int(keep_top_p(halves, p).isfinite().sum()) == kept


def test_a_nucleus_of_more_tokens_than_are_looked_at_first():
    flat = 0.01 * torch.randn(2, 5000, dtype=torch.float64)
    order = flat.softmax(-1).sort(descending=True)
    for row, kept in enumerate(keep_top_p(flat, 0.9).isfinite().sum(dim=-1).tolist()):
        reached = order.values[row].cumsum(0)
        assert reached[kept - 2] < 0.9 <= reached[kept - 1]


def test_a_low_temperature_does_not_overflow():
    logits = torch.tensor([[10.0, 30.0, -5.0]])
    assert Sampling(temperature=1e-30).scores(logits).softmax(dim=-1).tolist() == [[0.0, 1.0, 0.0]]


def test_draws_follow_the_distribution():
    wanted = torch.tensor([0.5, 0.0, 0.2, 0.3])
    uniform = (torch.arange(1000) + 0.5) / 1000
    drawn = draw(wanted.log().expand(1000, 4), uniform)
    assert torch.bincount(drawn, minlength=4).tolist() == [500, 0, 200, 300]
    edges = torch.tensor([[-math.inf, 0.0, -math.inf]]).expand(2, 3)
    assert draw(edges, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 1]
    assert draw(torch.full((1, 3), torch.nan), torch.tensor([0.5])).tolist() == [-2]


def test_half_precision_logits_are_sampled_in_float32():
    assert Sampling(top_k=2).scores(torch.randn(1, 5).bfloat16()).dtype == torch.float32


# --- The cache changes nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, FREE, Sampling(temperature=0, repetition_penalty=1.5)])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], [[5, 9], [3, 4]], PROMPTS], ids=["one", "equal", "different"])
def test_cached_decoding_gives_the_tokens_of_recomputing_everything(model, prompts, sampling):
    given = rows(model, prompts, 15, sampling)
    assert given == rows(model, prompts, 15, sampling, cache=False)
    assert [len(row) for row in given] == [min(15, CONTEXT - len(prompt)) for prompt in prompts]
    assert len({token for row in given for token in row}) > 3  # it says something


def test_greedy_decoding_is_the_most_probable_token_of_the_plain_model(model):
    text = list(PROMPTS[2])
    for _ in range(10):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert rows(model, PROMPTS, 10)[2] == text[len(PROMPTS[2]) :]


@pytest.mark.parametrize("sampling", [GREEDY, FREE])
def test_a_row_does_not_depend_on_the_others(model, sampling):
    together = rows(model, PROMPTS, 15, sampling)
    for number in range(len(PROMPTS)):
        others = [PROMPTS[number] if row == number else [11] for row in range(len(PROMPTS))]
        assert rows(model, others, 15, sampling)[number] == together[number]


def test_cached_decoding_in_float32_and_with_other_parts():
    torch.manual_seed(1)
    for overrides in ({"projection": "linear", "feed_forward": "mlp", "bias": True}, {"tie_embeddings": True}):
        model = make_model(**overrides).float()
        assert rows(model, PROMPTS) == rows(model, PROMPTS, cache=False)


def test_keys_and_values_get_memory_once(model, monkeypatch):
    states = []
    new_state = Tokenformer.new_state
    monkeypatch.setattr(Tokenformer, "new_state", lambda *args: states.append(new_state(*args)) or states[-1])
    places = set()
    for _ in generate_tokens(model, PROMPTS, 6, GREEDY):
        places.add(states[0].blocks[0][0].key.data_ptr())
    assert len(states) == len(places) == 1 and states[0].blocks[0][0].key.shape[2] == 9 + 6


@pytest.mark.parametrize("method", ["split", "random"])
def test_a_cache_from_before_a_growth_is_refused(method):
    model = make_model()
    steps = generate_tokens(model, PROMPTS, 6, GREEDY)
    next(steps)
    grow(model, 32, method=method)
    with pytest.raises(ValueError, match="state: created before a growth"):
        next(steps)
    assert rows(model, PROMPTS) == rows(model, PROMPTS, cache=False)  # a new one knows the new size


def test_a_split_does_not_change_the_text():
    model = make_model()
    before = rows(model, PROMPTS)
    grow(model, 32, method="split")
    assert rows(model, PROMPTS) == before


# --- Seeds -----------------------------------------------------------------------------------------------------------


def test_a_seed_decides_the_text(model):
    free = Sampling(temperature=2.0)
    same = [[1, 2]] * 3
    first = rows(model, same, sampling=free, seed=3)
    assert rows(model, same, sampling=free, seed=3) == first != rows(model, same, sampling=free, seed=4)
    assert len({tuple(row) for row in first}) == 3  # rows draw for themselves
    torch.manual_seed(5)
    drawn = rows(model, same, sampling=free, seed=None)
    assert rows(model, same, sampling=free, seed=None) != drawn
    torch.manual_seed(5)
    assert rows(model, same, sampling=free, seed=None) == drawn


def test_seeds_of_rows_decide_their_texts_wherever_they_are(model):
    free, prompts = Sampling(temperature=2.0), [[3, 4], [9], [3, 4]]
    found = rows(model, prompts, sampling=free, seed=[7, 8, 9])
    assert found[0] != found[2]
    assert rows(model, prompts[::-1], sampling=free, seed=[9, 8, 7]) == found[::-1]
    for prompt, seed, row in zip(prompts, [7, 8, 9], found, strict=True):
        assert rows(model, [prompt], sampling=free, seed=seed) == [row]
    with pytest.raises(UserError, match="seed: expected one, or one for each of the 3 prompts, got 2"):
        rows(model, prompts, sampling=free, seed=[7, 8])


def test_a_seed_leaves_the_global_generator_alone(model):
    before = torch.get_rng_state()
    rows(model, PROMPTS, sampling=FREE)
    assert torch.equal(torch.get_rng_state(), before)


# --- Ends ------------------------------------------------------------------------------------------------------------


def test_stop_tokens_end_a_row_and_are_given(model):
    free = rows(model, PROMPTS, 12, FREE)
    stop = free[0][4]
    ended = rows(model, PROMPTS, 12, FREE, stop=[stop])
    for whole, cut in zip(free, ended, strict=True):
        assert cut == (whole[: whole.index(stop) + 1] if stop in whole else whole)


def test_generation_ends_when_every_row_has(model):
    first = [row[0] for row in rows(model, PROMPTS, 1)]
    assert len(list(generate_tokens(model, PROMPTS, 12, GREEDY, stop=first))) == 1


def test_prompt_and_new_tokens_fill_the_context_and_no_more(model):
    prompts = [[1] * CONTEXT, [1] * (CONTEXT - 1), [1]]
    assert [len(row) for row in rows(model, prompts, 1000)] == [0, 1, CONTEXT - 1]
    assert rows(model, prompts[:1]) == [[]]


def test_ids_of_a_padded_vocabulary_are_never_chosen(model):
    for sampling in (GREEDY, Sampling(temperature=50.0)):
        assert max(max(row) for row in rows(model, PROMPTS, 15, sampling)) >= 10
        assert max(max(row) for row in rows(model, PROMPTS, 15, sampling, vocab_size=10)) < 10


def test_padding_is_not_seen_by_the_repetition_penalty(model):
    strong = Sampling(temperature=0, repetition_penalty=1e6)
    alone = [rows(model, [prompt], sampling=strong)[0] for prompt in PROMPTS]
    assert rows(model, PROMPTS, sampling=strong) == alone


def test_a_strong_repetition_penalty_never_repeats(model):
    given = rows(model, [[1, 2, 3]], 15, Sampling(temperature=0, repetition_penalty=1e9))[0]
    assert len({1, 2, 3, *given}) == 3 + len(given)


# --- The model is left as it was -------------------------------------------------------------------------------------


def test_training_mode_is_restored_and_gradients_still_flow():
    model = make_model(drop_path=0.5).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    list(generate_tokens(model, PROMPTS, 2))
    assert [module.training for module in model.modules()] == modes
    steps = generate_tokens(model, PROMPTS, 5)
    next(steps)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not model.training
    steps.close()  # given up in the middle
    assert [module.training for module in model.modules()] == modes
    model(torch.tensor(PROMPTS[:1])).sum().backward()


def test_given_ids_can_be_used_in_training(model):
    (ids,) = generate_tokens(model, PROMPTS, 1)
    assert not ids.is_inference()
    ids += 1


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected a number of at least 0, got -0.1"),
        ({"temperature": math.nan}, "temperature: expected a number of at least 0, got nan"),
        ({"temperature": math.inf}, "temperature: expected a number of at least 0, got inf"),
        ({"top_k": 0}, "top_k: expected a whole number of at least 1, got 0"),
        ({"top_k": 2.5}, "top_k: expected a whole number of at least 1, got 2.5"),
        ({"top_p": 0.0}, "top_p: expected a probability in"),
        ({"top_p": 1.01}, "top_p: expected a probability in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a number above 0, got 0.0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty: expected a number above 0, got nan"),
    ],
)
def test_bad_sampling_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "prompts: expected at least one"),
        ([[]], {}, "prompt: expected at least one token id"),
        ([[1], []], {}, "prompt 2: expected at least one token id"),
        ([[[1]]], {}, "prompt: expected at least one token id, got shape"),
        ([[1] * 25], {}, "prompt: 25 tokens, the model's context_length is 24"),
        ([[1], [1] * 30], {}, "prompt 2: 30 tokens, the model's context_length is 24"),
        ([[1, 61]], {}, "prompt: token id 61 is not in the model's vocabulary of 61"),
        ([[-1]], {}, "prompt: token id -1 is not in the model's vocabulary of 61"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: expected a whole number of at least 1, got 0"),
        ([[1]], {"vocab_size": 62}, "vocab_size: expected 1 to the model's 61, got 62"),
    ],
)
def test_bad_input_is_refused_at_the_call(model, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate_tokens(model, prompts, **{"max_new_tokens": 5, **settings})


@pytest.mark.parametrize("kind", ["tokenformer_vit_tiny_patch16_224", "tokenformer_lm_tiny"])
def test_models_that_cannot_write_are_refused(kind):
    with torch.device("meta"):
        model = create_backbone(kind, depth=1, causal=False)
    with pytest.raises(ValueError, match="model: not a causal language model .*causal: false"):
        generate_tokens(model, [[1]], 5)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling()])
def test_a_model_of_nan_is_told(sampling):
    model = make_model()
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="model: non-finite logits"):
        next(generate_tokens(model, PROMPTS, 5, sampling))


def test_nothing_that_grows_with_the_length_is_made_for_a_recurrent_model():
    model = create_backbone("rwkv4_tiny", dim=32, depth=1, num_heads=2, vocab_size=20, context_length=12)
    state = model.new_state(1000, padding=torch.tensor([3, 0]))
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with torch.inference_mode():
        model(torch.randint(20, (2, 500)), state=state)
        with Watch():
            model(torch.randint(20, (2, 1)), state=state)
    assert sizes and max(sizes) <= 32 * 4 * 32  # the largest weight

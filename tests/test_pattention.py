"""Pattention against the published formula, and where it is meant to differ from the published code."""

import math

import pytest
import torch
import torch.nn.functional as F

from lit_tokenformer.models import SCORE_NORMS, Pattention, pattention

NORMS = ["l2_gelu", "gelu_l2", "softmax", "gelu"]
L2_NORMS = ["l2_gelu", "gelu_l2"]


def published(x, key_tokens, value_tokens, score_norm):
    """arXiv 2410.23168, eq. 4 and 16, and the other forms of the published code, with tau = sqrt(current N)."""
    scores = x @ key_tokens.T
    n = scores.shape[-1]
    if score_norm == "l2_gelu":
        weights = F.gelu(scores / torch.norm(scores, p=2, dim=-1, keepdim=True) * math.sqrt(n))
    elif score_norm == "gelu_l2":
        activated = F.gelu(scores)
        weights = activated / torch.norm(activated, p=2, dim=-1, keepdim=True) * math.sqrt(n)
    elif score_norm == "softmax":
        exponentials = torch.exp(scores)
        weights = exponentials / torch.norm(exponentials, p=1, dim=-1, keepdim=True) * n
    else:
        weights = F.gelu(scores)
    return weights @ value_tokens


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trained_like(score_norm, dim_in=6, dim_out=5, num_tokens=12):
    layer = Pattention(dim_in, dim_out, num_tokens, score_norm)
    torch.nn.init.normal_(layer.key_tokens, std=0.5)
    torch.nn.init.normal_(layer.value_tokens, std=0.5)
    return layer


def test_every_score_norm_is_tested():
    assert set(NORMS) == set(SCORE_NORMS)


@pytest.mark.parametrize("score_norm", NORMS)
def test_output_and_gradients_equal_published_formula(float64, score_norm):
    layer = trained_like(score_norm)
    x = torch.randn(2, 3, 6, requires_grad=True)
    probe = torch.randn(2, 3, 5)
    inputs = (x, layer.key_tokens, layer.value_tokens)
    ours = layer(x)
    theirs = published(*inputs, score_norm)
    assert ours.shape == (2, 3, 5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for own, other in zip(
        torch.autograd.grad((ours * probe).sum(), inputs),
        torch.autograd.grad((theirs * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("score_norm", NORMS)
def test_gradients_equal_finite_differences(float64, score_norm):
    layer = trained_like(score_norm, num_tokens=4)
    x = torch.randn(3, 6, requires_grad=True)
    keys, values = layer.key_tokens.detach().requires_grad_(), layer.value_tokens.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: pattention(*t, layer.tau, score_norm), (x, keys, values))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score_norm", L2_NORMS)
def test_zero_row_gives_zeros_where_published_gives_nan(score_norm, dtype):
    layer = trained_like(score_norm).to(dtype)
    x = torch.randn(3, 6).to(dtype)
    x[1] = 0
    assert published(x.float(), layer.key_tokens.float(), layer.value_tokens.float(), score_norm)[1].isnan().all()
    x.requires_grad_()
    y = layer(x)
    y.float().sum().backward()
    assert (y[1] == 0).all() and y.isfinite().all()
    assert (y[[0, 2]] != 0).all()
    for gradient in (x.grad, layer.key_tokens.grad, layer.value_tokens.grad):
        assert gradient.isfinite().all() and gradient.abs().max() < 1e3  # the epsilon is not divided by


@pytest.mark.parametrize("score_norm", L2_NORMS)
def test_zero_row_under_autocast_is_finite(score_norm):
    layer = trained_like(score_norm)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype):
            y = layer(torch.zeros(2, 6))
        assert y.dtype == dtype and (y == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_softmax_of_huge_scores_does_not_overflow(dtype):
    layer = trained_like("softmax").to(dtype)
    x = (torch.randn(4, 6) * 1000).to(dtype).requires_grad_()
    assert not published(x, layer.key_tokens, layer.value_tokens, "softmax").isfinite().all()
    y = layer(x)
    y.float().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and layer.key_tokens.grad.isfinite().all()


@pytest.mark.parametrize("score", [300.0, 3000.0])
@pytest.mark.parametrize("score_norm", L2_NORMS)
def test_norm_of_large_fp16_scores_does_not_overflow(score_norm, score):
    """Scores of 300 and 3000 for 4096 tokens: sum of squares, and then the norm too, lie beyond fp16's 65504."""
    layer = Pattention(1, 1, 4096, score_norm)
    torch.nn.init.ones_(layer.key_tokens)
    torch.nn.init.constant_(layer.value_tokens, 1 / 4096)
    wide = layer(torch.full((1, 1), score))
    half = layer.half()(torch.full((1, 1), score).half())
    torch.testing.assert_close(half.float(), wide, rtol=2e-3, atol=0)


@pytest.mark.parametrize("score_norm", NORMS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.float16, 0.0025)])
def test_half_precision_norm_does_not_stall(score_norm, dtype, bound):
    """4096 equal scores: a bf16 sum of squares would stall at 256 terms and be off by a factor of 4.

    The bound is five rounding steps of the format (2^-8 and 2^-11): product, scale, scaled score, GELU, output.
    """
    layer = Pattention(4, 3, 4096, score_norm)
    torch.nn.init.constant_(layer.key_tokens, 0.25)
    torch.nn.init.constant_(layer.value_tokens, 2**-12)
    x = torch.ones(2, 4)
    wide = layer(x)
    half = layer.to(dtype)(x.to(dtype)).float()
    assert ((half - wide).norm() / wide.norm()) < bound


@pytest.mark.parametrize(
    ("convert", "weights", "tau"),
    [
        (lambda m: m.bfloat16(), torch.bfloat16, torch.float32),
        (lambda m: m.half(), torch.float16, torch.float32),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16, torch.float32),
        (lambda m: m.to(device="cpu", dtype=torch.float16), torch.float16, torch.float32),
        (lambda m: m.half().float(), torch.float32, torch.float32),
        (lambda m: m.double(), torch.float64, torch.float64),
        (lambda m: m.double().bfloat16(), torch.bfloat16, torch.float64),
    ],
)
def test_tau_keeps_its_precision_through_conversions(convert, weights, tau):
    model = torch.nn.Sequential(Pattention(4, 4, num_tokens=7))
    before = model[0].tau.item()
    convert(model)
    assert model[0].key_tokens.dtype == weights
    assert model[0].tau.dtype == tau and model[0].tau.item() == before
    assert model.state_dict()["0.tau"].dtype == tau


def test_tau_is_wide_under_a_half_precision_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = Pattention(4, 4, num_tokens=7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.key_tokens.dtype == torch.bfloat16
    assert layer.tau.dtype == torch.float32 and layer.tau.item() == pytest.approx(math.sqrt(7), rel=1e-7)


def test_state_dict_round_trip():
    first, second = trained_like("l2_gelu"), Pattention(6, 5, 12)
    with torch.no_grad():
        first.tau.fill_(1.5)
    assert set(first.state_dict()) == {"key_tokens", "value_tokens", "tau"}
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 6)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("num_tokens", [3, 12, 30])
def test_loading_takes_the_size_of_the_checkpoint(num_tokens, assign):
    saved = trained_like("l2_gelu", num_tokens=num_tokens)
    model = torch.nn.Sequential(Pattention(6, 5, 12))
    key_tokens = model[0].key_tokens
    x = torch.randn(2, 6)
    model(x).sum().backward()  # a gradient of the old size must not stand in the way
    model.load_state_dict({f"0.{name}": tensor for name, tensor in saved.state_dict().items()}, assign=assign)
    assert model[0].num_tokens == num_tokens
    assert (model[0].key_tokens is key_tokens) is not assign  # an optimizer built before still holds it
    assert torch.equal(model(x), saved(x))
    model.zero_grad()
    model(x).sum().backward()
    assert model[0].key_tokens.grad.shape == (num_tokens, 6)


@pytest.mark.parametrize("wrong", [Pattention(7, 5, 20), Pattention(6, 4, 20)])
def test_loading_another_width_raises(wrong):
    layer = Pattention(6, 5, 12)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(wrong.state_dict())


def test_loading_different_numbers_of_keys_and_values_raises():
    layer = Pattention(6, 5, 12)
    state = Pattention(6, 5, 20).state_dict() | {"value_tokens": torch.zeros(18, 5)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({"key_tokens": torch.zeros(20, 6)}, strict=False)
    layer(torch.randn(2, 6))


def test_birth():
    layer = Pattention(64, 48, num_tokens=256, key_std=0.1, value_std=0.3)
    assert layer.tau.item() == 16 and not layer.tau.requires_grad
    assert layer.key_tokens.shape == (256, 64) and layer.value_tokens.shape == (256, 48)
    assert layer.key_tokens.std().item() == pytest.approx(0.1, rel=0.03)
    assert layer.value_tokens.std().item() == pytest.approx(0.3, rel=0.03)
    assert [name for name, _ in layer.named_parameters()] == ["key_tokens", "value_tokens"]  # no bias


def test_settings_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="num_tokens: expected at least 1, got 0"):
        Pattention(4, 4, num_tokens=0)
    with pytest.raises(ValueError, match="score_norm: unknown value 'l2gelu', did you mean 'l2_gelu'"):
        Pattention(4, 4, num_tokens=4, score_norm="l2gelu")

"""WKV in parallel against the published formula, the recurrent cell, and the implementation of transformers."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from lit_tokenformer.models.wkv import EMPTY, WKVState, initial_state, wkv, wkv_recurrent

LENGTHS = [1, 2, 3, 7, 64, 100, 257]


def draw(length, key_std=1.0, batch=2, dim=5, dtype=torch.float64):
    """Time decay, time first, key and value; the decays per data token reach from hardly any to nearly all."""
    decay, first = torch.linspace(-5, 2, dim, dtype=dtype), torch.randn(dim, dtype=dtype)
    key, value = torch.randn(2, batch, length, dim, dtype=dtype)
    return decay, first, key_std * key, value


def draw_state(key_std=1.0, batch=2, dim=5):
    numerator, denominator, log_scale = torch.randn(3, batch, dim, dtype=torch.float64)
    return WKVState(numerator, denominator.abs() + 0.1, key_std * log_scale)


def published(time_decay, time_first, key, value, state=None):
    """arXiv 2305.13048v2, eq. 16, over all pairs of data tokens; a state is one more of them, before the first."""
    if state is not None:
        key = torch.cat(((state.log_scale + state.denominator.log())[:, None], key), dim=1)
        value = torch.cat(((state.numerator / state.denominator)[:, None], value), dim=1)
    t = torch.arange(key.shape[1])
    distance = (t[:, None] - 1 - t)[..., None]  # (T, T, 1)
    exponents = -distance * time_decay.exp() + key[:, None]  # (B, T, T, D)
    exponents = torch.where(distance == -1, time_first + key[:, None], exponents)
    output = (exponents.masked_fill(distance < -1, -torch.inf).softmax(dim=2) * value[:, None]).sum(dim=2)
    return output if state is None else output[:, 1:]


def results(function, inputs, state, probe):
    """The output and the four gradients."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*inputs, state)
    output = output[0] if isinstance(output, tuple) else output
    gradients = torch.autograd.grad(output, inputs, probe.to(output.dtype), materialize_grads=True)
    return [output.detach(), *gradients]


def error(ours, theirs):
    """Largest difference, relative to the largest entry."""
    return ((ours.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()


def sums(state):
    """A mean and the logarithm of a denominator, which do not depend on the scale."""
    return state.numerator / state.denominator, state.log_scale + state.denominator.log()


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("key_std", [1, 8])
@pytest.mark.parametrize("length", LENGTHS)
def test_output_and_gradients_equal_published_formula_and_recurrent_form(length, key_std, with_state):
    inputs, state = draw(length, key_std), draw_state(key_std) if with_state else None
    if length <= 2 and not with_state:  # nothing decays: its gradient is exactly 0
        assert not results(wkv, inputs, state, torch.ones_like(inputs[2]))[1].any()
    probe = torch.randn_like(inputs[2])
    ours = results(wkv, inputs, state, probe)
    for reference in (published, wkv_recurrent):
        for own, other in zip(ours, results(reference, inputs, state, probe), strict=True):
            assert error(own, other) < 1e-12 or other.abs().max() < 1e-15  # rounding where 0 is the exact gradient
    for own, other in zip(sums(wkv(*inputs, state)[1]), sums(wkv_recurrent(*inputs, state)[1]), strict=True):
        assert error(own, other) < 1e-12


@pytest.mark.parametrize("key_std", [1, 8])
@pytest.mark.parametrize("first", [1, 40, 99])
def test_sequence_goes_on_from_state(first, key_std):
    decay, bonus, key, value = draw(100, key_std)
    whole, state = wkv(decay, bonus, key, value)
    begin, middle = wkv(decay, bonus, key[:, :first], value[:, :first])
    end, last = wkv(decay, bonus, key[:, first:], value[:, first:], middle)
    assert error(torch.cat((begin, end), dim=1), whole) < 1e-12
    for own, other in zip(sums(last), sums(state), strict=True):
        assert error(own, other) < 1e-12


def test_token_by_token_equals_whole_sequence():
    decay, first, key, value = draw(30)
    for generating in (True, False):
        state, outputs = initial_state(2, 5, dtype=torch.float64), []
        for t in range(30):
            with torch.set_grad_enabled(not generating):
                output, state = wkv(decay, first, key[:, t : t + 1], value[:, t : t + 1], state)
            outputs.append(output)
        assert error(torch.cat(outputs, dim=1), wkv(decay, first, key, value)[0]) < 1e-12


@pytest.mark.parametrize("with_state", [False, True])
def test_equals_transformers(with_state):
    inputs = draw(150, dim=16, dtype=torch.float32)
    state = WKVState(*(tensor.float() for tensor in draw_state(dim=16))) if with_state else None
    theirs, last = rwkv_linear_attention_cpu(*inputs, state=state, return_state=True)
    ours, own = wkv(*inputs, state)
    assert error(ours, theirs.double()) < 1e-5
    for one, other in zip(sums(own), sums(WKVState(*last)), strict=True):
        assert error(one, other.double()) < 1e-5


@pytest.mark.parametrize("length", [1, 2, 11])
@pytest.mark.parametrize("with_state", [False, True])
def test_gradients_equal_finite_differences(length, with_state):
    inputs = [tensor.requires_grad_() for tensor in draw(length, batch=2, dim=3)]
    state = draw_state(dim=3) if with_state else None
    assert torch.autograd.gradcheck(lambda *args: wkv(*args, state)[0], inputs)


@pytest.mark.parametrize(("key_std", "most"), [(1, 2.5e-6), (8, 4e-5), (40, 2e-4)])
def test_float32_is_accurate_and_no_worse_than_recurrent_form(key_std, most):
    inputs = draw(1024, key_std, dim=32, dtype=torch.float32)
    exact, _ = wkv(*(tensor.double() for tensor in inputs))
    ours, recurrent = ((function(*inputs)[0] - exact).abs().max().item() for function in (wkv, wkv_recurrent))
    assert ours < most
    assert ours < recurrent


@pytest.mark.parametrize("key_std", [1, 8])
def test_float32_gradients_are_accurate(key_std):
    inputs, probe = draw(512, key_std, dim=32, dtype=torch.float32), torch.randn(2, 512, 32)
    exact = results(wkv, [tensor.double() for tensor in inputs], None, probe)
    for ours, other in zip(results(wkv, inputs, None, probe), exact, strict=True):
        assert ours.dtype == torch.float32
        assert error(ours, other) < 1e-4


def test_fast_decay_has_a_gradient_of_its_own_size():
    """No cancellation of large terms: it would be noise where the true gradient is tiny, and Adam would scale it up."""
    inputs, probe = draw(256, dtype=torch.float32), torch.randn(2, 256, 5)
    inputs[0].fill_(3.0)  # e^-20 per data token
    exact = results(wkv, [tensor.double() for tensor in inputs], None, probe)[1]
    ours = results(wkv, inputs, None, probe)[1]
    assert 0 < exact.abs().max() < 1e-4
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missing", [1, 5, 16, 37])
def test_missing_tokens_at_the_left_change_nothing(missing, dtype):
    decay, first, key, value = draw(40, dtype=torch.float64)
    key, value = key.to(dtype), value.to(dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    decay, first = decay.to(exact), first.to(exact)
    key[0, :missing], value[0, :missing] = EMPTY, 0  # the other sequence is whole
    probe = torch.randn(2, 40, 5)
    padded = results(wkv, (decay, first, key, value), None, probe)
    assert all(tensor.isfinite().all() for tensor in padded)
    output, _, _, grad_key, grad_value = padded
    assert not output[0, :missing].any() and not grad_key[0, :missing].any() and not grad_value[0, :missing].any()
    cut = results(wkv, (decay, first, key[:1, missing:], value[:1, missing:]), None, probe[:1, missing:])
    whole = results(wkv, (decay, first, key[1:], value[1:]), None, probe[1:])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for ours, other in zip((output[:1], grad_key[:1], grad_value[:1]), (cut[0], *cut[3:]), strict=True):
        assert error(ours[:, missing:], other.double()) < tolerance
    for ours, one, other in zip(padded[1:3], cut[1:3], whole[1:3], strict=True):
        assert error(ours, one.double() + other.double()) < tolerance
    recurrent = results(wkv_recurrent, (decay, first, key, value), None, probe)
    assert all(tensor.isfinite().all() for tensor in recurrent)
    assert error(output, recurrent[0].double()) < tolerance


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("with_state", [False, True])
def test_only_missing_tokens(length, with_state):
    decay, first, key, value = draw(length)
    key, value = torch.full_like(key, -torch.inf), torch.zeros_like(value)  # as half precision writes -1e38
    state = draw_state() if with_state else None
    ours = results(wkv, (decay, first, key, value), state, torch.ones_like(value))
    assert all(tensor.isfinite().all() for tensor in ours)
    expected = sums(state)[0][:, None].expand_as(value) if with_state else torch.zeros_like(value)
    torch.testing.assert_close(ours[0], expected, rtol=1e-12, atol=0)
    after = wkv(decay, first, key, value, state)[1]  # what comes now finds what was there before, or nothing
    _, _, key, value = draw(3)
    output = wkv(decay, first, key, value, after)[0]
    if not with_state:
        torch.testing.assert_close(output, wkv(decay, first, key, value)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_of_output_state_and_gradients(dtype):
    decay, first, key, value = draw(20, dtype=torch.float32)
    inputs = [decay, first, key.to(dtype), value.to(dtype)]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for length in (1, 20):
        output, state = wkv(decay, first, inputs[2][:, :length], inputs[3][:, :length])
        assert output.dtype == dtype and all(tensor.dtype == exact for tensor in state)
    for ours, tensor in zip(results(wkv, inputs, None, torch.ones(2, 20, 5))[1:], inputs, strict=True):
        assert ours.dtype == tensor.dtype
    wide = wkv(*(tensor.double() for tensor in inputs))[0]
    assert error(output, wide) < {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 1e-6)


def test_autocast_changes_nothing():
    inputs, probe = draw(20, dtype=torch.float32), torch.randn(2, 20, 5)
    plain = results(wkv, inputs, None, probe)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = results(wkv, inputs, None, probe)
    assert all(map(torch.equal, plain, cast))


def test_inference_mode_and_no_grad_give_the_same():
    inputs = draw(20)
    expected, state = wkv(*inputs)
    for context in (torch.inference_mode(), torch.no_grad()):
        with context:
            output, after = wkv(*inputs)
        assert torch.equal(output, expected) and all(map(torch.equal, after, state))


def test_activation_checkpointing_gives_the_same():
    def again(*args):
        return checkpoint(wkv, *args, use_reentrant=False)

    inputs, probe = draw(20), torch.randn(2, 20, 5)
    assert all(map(torch.equal, results(again, inputs, None, probe), results(wkv, inputs, None, probe)))


def test_strides_of_inputs_do_not_matter():
    def strided(decay, first, key, value, state):
        return wkv(decay, first, key.mT.contiguous().mT, value.mT.contiguous().mT, state)

    inputs, probe = draw(20), torch.randn(2, 20, 5)
    for ours, other in zip(results(strided, inputs, None, probe), results(wkv, inputs, None, probe), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-14)
    one_for_all = inputs[3][:1, :1].expand(2, 20, 5)
    torch.testing.assert_close(wkv(*inputs[:3], one_for_all)[0], one_for_all, rtol=1e-12, atol=0)


def test_runs_agree_bit_for_bit():
    inputs, probe = draw(100, dtype=torch.float32), torch.randn(2, 100, 5)
    assert all(map(torch.equal, results(wkv, inputs, None, probe), results(wkv, inputs, None, probe)))


@pytest.mark.parametrize("length", [1, 4])
def test_second_derivative_is_refused(length):
    inputs = [tensor.requires_grad_() for tensor in draw(length)]
    output, _ = wkv(*inputs)
    for loss in (output.sum(), output.square().sum()):
        with pytest.raises(RuntimeError, match="wkv: double backward is not supported"):
            torch.autograd.grad(loss, inputs, create_graph=True)


def test_state_is_a_constant():
    inputs = [tensor.requires_grad_() for tensor in draw(4)]
    for length in (1, 4):
        _, state = wkv(inputs[0], inputs[1], inputs[2][:, :length], inputs[3][:, :length])
        assert not any(tensor.requires_grad for tensor in state)
    _, state = wkv_recurrent(*inputs)
    with pytest.raises(ValueError, match="state: requires a gradient"):
        wkv(*inputs, state)


def test_backward_keeps_four_numbers_per_channel_of_a_token():
    kept = []
    inputs = [tensor.clone().requires_grad_() for tensor in draw(64, batch=3, dtype=torch.float32)]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        wkv(*inputs)
    assert sum(tensor.untyped_storage().nbytes() // 4 for tensor in kept) == 4 * inputs[2].numel() + 2 * 5


def test_compiled_module_gives_the_same():
    inputs, probe = draw(20), torch.randn(2, 20, 5)

    @torch.compile(backend="aot_eager")
    def compiled(decay, first, key, value, state):
        output, after = wkv(decay, first, key * 1.0, value, state)
        return output * 1.0, after

    try:
        ours = results(compiled, inputs, None, probe)
    finally:
        torch.compiler.reset()
    for own, other in zip(ours, results(wkv, inputs, None, probe), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-14)

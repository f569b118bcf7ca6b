"""The cross-entropy in pieces, against torch's."""

import pytest
import torch
import torch.nn.functional as F

from lit_tokenformer.tasks import losses
from lit_tokenformer.tasks.losses import linear_cross_entropy


def inputs(dtype, rows=37, vocabulary=50, dim=8):
    x = torch.randn(rows, dim, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, dim, dtype=dtype, requires_grad=True)
    target = torch.randint(vocabulary, (rows,))
    target[::5] = -100
    return x, weight, target


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_loss_and_gradients_are_those_of_torch(monkeypatch, rows, z_loss):
    monkeypatch.setattr(losses, "CHUNK_BYTES", rows * 50 * 8)
    monkeypatch.setitem(losses.CACHED_ROWS, "cpu", 2)
    x, weight, target = inputs(torch.float64)
    total, count = linear_cross_entropy(x, weight, target, z_loss)
    logits = x @ weight.T
    partition = logits[target >= 0].logsumexp(dim=1)
    expected = F.cross_entropy(logits, target, reduction="sum") + z_loss * partition.square().sum()
    assert count == (target >= 0).sum()
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=0)
    found = torch.autograd.grad(total / count, (x, weight))
    for mine, theirs in zip(found, torch.autograd.grad(expected / count, (x, weight)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_a_bias_is_added_to_the_logits():
    x, weight, target = inputs(torch.float64)
    bias = torch.randn(50, dtype=torch.float64, requires_grad=True)
    total, _ = linear_cross_entropy(x, weight, target, bias=bias)
    expected = F.cross_entropy(x @ weight.T + bias, target, reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=0)
    found = torch.autograd.grad(total, (x, weight, bias))
    for mine, theirs in zip(found, torch.autograd.grad(expected, (x, weight, bias)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    (alone,) = torch.autograd.grad(linear_cross_entropy(x.detach(), weight.detach(), target, bias=bias)[0], bias)
    torch.testing.assert_close(alone, found[2])


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has it from 2.14 on")
def test_agrees_with_torchs_own_in_pieces():
    x, weight, target = inputs(torch.float64)
    theirs = F.linear_cross_entropy(x, weight, target, options=torch.nn.LinearCrossEntropyOptions())
    total, count = linear_cross_entropy(x, weight, target)
    torch.testing.assert_close(total / count, theirs, rtol=1e-13, atol=0)


def test_a_scaled_loss_scales_the_gradient_and_parts_can_be_frozen():
    x, weight, target = inputs(torch.float64)
    (once,) = torch.autograd.grad(linear_cross_entropy(x, weight.detach(), target)[0], x)
    (scaled,) = torch.autograd.grad(1000 * linear_cross_entropy(x, weight.detach(), target)[0], x)
    torch.testing.assert_close(scaled, 1000 * once)
    (weights_only,) = torch.autograd.grad(linear_cross_entropy(x.detach(), weight, target)[0], weight)
    assert weights_only.shape == weight.shape
    total, _ = linear_cross_entropy(x, weight, target)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="were already consumed"):
        total.backward()
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, target)[0].requires_grad


def test_under_autocast_only_products_are_in_half_precision():
    x, weight, target = inputs(torch.float32, rows=200, vocabulary=300, dim=64)
    expected = F.cross_entropy(x.bfloat16().float() @ weight.bfloat16().float().T, target, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = linear_cross_entropy(x, weight, target)
    assert total.dtype == torch.float32
    assert abs(total - expected) / expected < 3e-3
    grads = torch.autograd.grad(total, (x, weight))
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]
    for mine, theirs in zip(grads, torch.autograd.grad(expected, (x, weight)), strict=True):
        assert (mine - theirs).norm() / theirs.norm() < 0.02


def test_no_target_gives_zero():
    x, weight, _ = inputs(torch.float32)
    total, count = linear_cross_entropy(x, weight, torch.full((37,), -100))
    assert total == 0 and count == 0


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_made_where_none_is_wanted(without):
    x, weight, target = inputs(torch.float32)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.append((function, getattr(out, "shape", None)))
            return out

    with without(), Watch():
        linear_cross_entropy(x, weight, target)
    assert made and (torch.ops.aten.zeros_like.default, weight.shape) not in made

"""Triton kernels in Triton's interpreter, on the CPU; ``test_l2_gelu.py`` runs this file with TRITON_INTERPRET=1."""

import math

import pytest
import torch
import torch.nn.functional as F

from lit_tokenformer.models import Pattention, kernel_choice, pattention


@pytest.fixture(scope="module")
def kernels():
    return pytest.importorskip("lit_tokenformer.models.triton_l2_gelu")


@pytest.fixture
def forced(monkeypatch):
    return lambda form: monkeypatch.setattr(kernel_choice, "form", form)


def formula(scores, tau):
    """Compute eq. 4 of arXiv 2410.23168 without its products; zeros for a row of zeros."""
    norm = scores.norm(dim=-1, keepdim=True)
    return F.gelu(torch.where(norm > 0, scores / norm.clamp_min(1e-12) * tau, 0.0))


def draw(*size, seed=0, **options):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(**options)


TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 100), (5, 7), (4, 64), (3, 1536), (2, 8560)])
def test_weights_and_gradients_equal_the_formula_in_float64(kernels, dtype, rows, size):
    exact = draw(rows, size).to(dtype).double()
    if rows > 2:
        exact[1] = 0
    exact.requires_grad_()
    tau = torch.tensor(math.sqrt(size), dtype=torch.float64, requires_grad=True)
    probe = draw(rows, size, seed=1).to(dtype)
    expected = formula(exact, tau)
    expected_grads = torch.autograd.grad(expected, (exact, tau), probe.double())

    scores, own_tau = exact.detach().to(dtype).requires_grad_(), tau.detach().float().requires_grad_()
    weights, scale = kernels.l2_gelu_rows(scores, own_tau)
    grads = torch.autograd.grad(weights, (scores, own_tau), probe)
    replaced, grad = scores.detach().clone(), probe.clone()
    kernels.l2_gelu_rows_(replaced, own_tau.detach())
    again, dots = kernels.l2_gelu_rows_backward_(grad, scores.detach(), scale, own_tau.detach(), True)
    assert torch.equal(replaced, weights) and torch.equal(grad, grads[0]) and dots.dtype == scale.dtype == torch.float32
    assert weights.dtype == grads[0].dtype == dtype and not scale.requires_grad

    def off(one, other):
        return ((one.double() - other).norm() / other.norm().clamp_min(1e-30)).item()

    errors = [off(weights, expected), off(again, expected), off(grads[0], expected_grads[0])]
    assert max(errors[: 2 if size == 1 else 3]) < TOLERANCES[dtype], errors  # a single score has the gradient 0
    torch.testing.assert_close(grads[1].double(), expected_grads[1], rtol=1e-5, atol=1e-5)
    if rows > 2:
        assert (weights[1] == 0).all() and (grads[0][1] == 0).all()


def test_transposed_scores_and_no_rows(kernels):
    scores, tau = draw(6, 4, dtype=torch.float32).T, torch.tensor(1.7)
    torch.testing.assert_close(kernels.l2_gelu_rows(scores, tau)[0], formula(scores, tau), rtol=0, atol=1e-6)
    assert kernels.l2_gelu_rows(scores[:0], tau)[0].shape == (0, 6)


def test_the_operators_are_declared_right(kernels):
    """Fake tensors and graphs need a kernel that is not interpreted, see ``test_l2_gelu.py``."""
    scores, grad, tau = draw(3, 10).float(), draw(3, 10, seed=1).float(), torch.tensor(1.7)
    checks = ("test_schema", "test_autograd_registration")
    differentiable = (scores.clone().requires_grad_(), tau.clone().requires_grad_())
    torch.library.opcheck(kernels.l2_gelu_rows, differentiable, test_utils=checks)
    torch.library.opcheck(kernels.l2_gelu_rows_, (scores, tau), test_utils=checks)
    for with_weights in (False, True):
        given = (grad, scores, torch.rand(3), tau, with_weights)
        torch.library.opcheck(kernels.l2_gelu_rows_backward_, given, test_utils=checks)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", [(), ("value_tokens",), ("key_tokens", "value_tokens")])
def test_a_layer_computes_the_same_with_the_kernels(kernels, forced, autocast, frozen):
    torch.manual_seed(0)
    layer, x = Pattention(12, 9, num_tokens=20), draw(2, 5, 12).float().requires_grad_()
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    found = {}
    for form in ("plain", "triton"):
        forced(form)
        x.grad = None
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
            with torch.no_grad():
                alone = layer(x)
        y.square().sum().backward()
        own = [one.grad for one in layer.parameters() if one.requires_grad]
        found[form] = [y.detach(), alone, x.grad, *own]
    assert len(found["triton"]) == 5 - len(frozen)
    for one, other in zip(found["triton"], found["plain"], strict=True):
        torch.testing.assert_close(one, other, rtol=0.02 if autocast else 1e-4, atol=2e-2 if autocast else 1e-6)


def test_a_learned_tau_and_second_derivatives(kernels, forced):
    tensors = [draw(*size, seed=n).float().requires_grad_() for n, size in enumerate([(3, 5), (7, 5), (7, 4)])]
    tensors.append(torch.tensor(1.7, requires_grad=True))
    found = {}
    for form in ("plain", "triton"):
        forced(form)
        first = torch.autograd.grad(pattention(*tensors).square().sum(), tensors)
        (graph,) = torch.autograd.grad(pattention(*tensors).square().sum(), tensors[0], create_graph=True)
        found[form] = [*first, *torch.autograd.grad(graph.square().sum(), tensors)]
    torch.testing.assert_close(found["triton"], found["plain"], rtol=1e-4, atol=1e-4)


def test_one_tensor_of_scores_and_one_number_for_each_data_token_are_kept(kernels, forced):
    forced("triton")
    x, layer, extra = draw(64, 8).float(), Pattention(8, 8, num_tokens=48), {}
    own = {one.untyped_storage().data_ptr() for one in (x, *layer.parameters(), layer.tau)}

    def keep(tensor):
        extra[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert sorted(one.numel() for pointer, one in extra.items() if pointer not in own) == [64, 64 * 48]


@pytest.mark.parametrize("faster", ["plain", "kernel", "neither", "broken"])
@pytest.mark.parametrize("training", [True, False])
def test_the_faster_form_is_taken_and_remembered(kernels, forced, monkeypatch, caplog, faster, training):
    """The forms run for real; only the clock is made up."""
    forced("auto")
    taken = {"plain": (1.0, 2.0), "kernel": (1.0, 0.9), "neither": (1.0, 0.98), "broken": (1.0, 0.5)}[faster]
    used, timed = [], []

    def clock(function):
        before = len(used)
        function()
        timed.append("kernel" if len(used) > before else "plain")
        return taken[timed[-1] == "kernel"]

    def counted(name):
        operator = getattr(kernels, name)

        def call(*inputs):
            used.append(name)
            if faster == "broken":
                raise RuntimeError("no kernel image")
            return operator(*inputs)

        monkeypatch.setattr(kernels, name, call)

    for name in ("l2_gelu_rows", "l2_gelu_rows_", "l2_gelu_rows_backward_"):
        counted(name)
    monkeypatch.setattr(kernel_choice, "_kernel_is_faster", {})
    monkeypatch.setattr(kernel_choice, "_milliseconds", clock)
    layer, x = Pattention(6, 6, num_tokens=10).requires_grad_(training), draw(9, 6).float()
    with torch.set_grad_enabled(training):
        before = layer(x)  # not measurable: no CUDA
        assert not used and not kernel_choice._kernel_is_faster
        monkeypatch.setattr(kernel_choice, "_measurable", lambda x: True)
        state = torch.get_rng_state()
        torch.testing.assert_close(layer(x), before)
        assert torch.equal(torch.get_rng_state(), state)
        assert timed.count("kernel") == timed.count("plain") == (0 if faster == "broken" else 5)
        assert ("no kernel image" in caplog.text) == (faster == "broken")
        used.clear()
        timed.clear()
        y = layer(x[:8])  # of the same bucket, 8 to 15 rows
        assert not timed and len(kernel_choice._kernel_is_faster) == 1
        kept = {"kernel": ["l2_gelu_rows" if training else "l2_gelu_rows_"]}.get(faster, [])
        assert used == kept
        if training:
            y.sum().backward()
            assert used == [*kept, *(["l2_gelu_rows_backward_"] if kept else [])]
        layer(x[:4])
        assert len(kernel_choice._kernel_is_faster) == 2


def test_no_time_decides_under_a_compiler_or_with_deterministic_algorithms(kernels, forced, monkeypatch):
    forced("auto")
    monkeypatch.setattr(kernel_choice, "_measurable", lambda x: True)
    monkeypatch.setattr(kernel_choice, "_measure", lambda *_: pytest.fail("timed"))
    layer, x = Pattention(6, 6, num_tokens=10), draw(9, 6).float()
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x).sum(), layer_with(forced, "plain", layer, x).sum())
    forced("auto")
    torch.use_deterministic_algorithms(True)
    try:
        layer(x)
    finally:
        torch.use_deterministic_algorithms(False)


def layer_with(forced, form, layer, x):
    forced(form)
    return layer(x)


def test_an_unknown_setting_is_rejected(kernels, forced, monkeypatch):
    layer, x = Pattention(6, 6, num_tokens=10), torch.zeros(2, 6)
    forced("tritn")
    with pytest.raises(ValueError, match=r"LIT_TOKENFORMER_KERNELS: .*'tritn'.*did you mean 'triton'"):
        layer(x)
    forced("triton")
    monkeypatch.setattr(kernel_choice, "_installed", False)
    with pytest.raises(ValueError, match="LIT_TOKENFORMER_KERNELS: 'triton' requires the package triton"):
        layer(x)

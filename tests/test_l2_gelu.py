"""The backward pass by hand: what it keeps, what it computes in every precision, and what a compiler makes of it."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lit_tokenformer.models import Pattention, create_backbone, kernel_choice, pattention, pattention_kernels


def formula(x, key_tokens, value_tokens, tau):
    """arXiv 2410.23168, eq. 4 with appendix A, eq. 16."""
    scores = x @ key_tokens.T
    return F.gelu(scores / torch.norm(scores, p=2, dim=-1, keepdim=True) * tau) @ value_tokens


def given(length=7, dim_in=5, dim_out=6, num_tokens=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((length, dim_in), (num_tokens, dim_in), (num_tokens, dim_out))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [
        *(one.requires_grad_() for one in tensors),
        torch.tensor(1.7, dtype=torch.promote_types(dtype, torch.float)),
    ]


def kept(function):
    """What autograd keeps, each storage once."""
    found = {}

    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return list(found.values())


@pytest.mark.parametrize("leading", [(), (1,), (3, 2), (0,)])
def test_every_number_of_leading_dimensions(leading):
    _, keys, values, tau = given()
    x = torch.randn(*leading, 5, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(*leading, 6, dtype=torch.float64)
    ours, theirs = pattention(x, keys, values, tau), formula(x, keys, values, tau)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for own, other in zip(
        torch.autograd.grad((ours * probe).sum(), (x, keys, values)),
        torch.autograd.grad((theirs * probe).sum(), (x, keys, values)),
        strict=True,
    ):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


def test_one_tensor_of_scores_and_one_number_for_each_data_token_are_kept():
    x, keys, values, tau = given(length=64, num_tokens=48, dtype=torch.float32)
    own = {one.untyped_storage().data_ptr() for one in (x, keys, values, tau)}
    extra = [
        one for one in kept(lambda: pattention(x, keys, values, tau)) if one.untyped_storage().data_ptr() not in own
    ]
    assert sorted(one.numel() for one in extra) == [64, 64 * 48]
    plain = [one for one in kept(lambda: formula(x, keys, values, tau)) if one.numel() >= 64 * 48]
    assert len(plain) == 3


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_data_token_without_gradients_as_with_them(dtype, threads):
    x, keys, values, tau = given(length=4, num_tokens=80, dtype=dtype)
    with torch.no_grad():
        x[3] = 0
    together, before = pattention(x, keys, values, tau).detach(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            alone = torch.cat([pattention(one, keys, values, tau) for one in x.split(1)])
    finally:
        torch.set_num_threads(before)
    assert alone.dtype == dtype and (alone[3] == 0).all()
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 0.002, torch.bfloat16: 0.015}[dtype]
    assert ((alone - together).norm() / together.norm()).item() < bound


def test_nothing_is_kept_without_gradients():
    x, keys, values, tau = given()
    with torch.no_grad():
        y = pattention(x, keys, values, tau)
        assert kept(lambda: pattention(x, keys, values, tau)) == []
    torch.testing.assert_close(y, pattention(x, keys, values, tau).detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_gradients_of_some_inputs_alone(wanted):
    """Frozen keys, frozen values, a tau that learns."""
    everything = [one.detach() for one in given()]
    for number in wanted:
        everything[number].requires_grad_()
    inputs = [everything[number] for number in wanted]
    ours = torch.autograd.grad(pattention(*everything).square().sum(), inputs)
    theirs = torch.autograd.grad(formula(*everything).square().sum(), inputs)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-11)


def test_second_derivatives_are_right():
    tensors = given(length=3, num_tokens=4)
    tensors[3] = tensors[3].double().requires_grad_()
    assert torch.autograd.gradgradcheck(pattention, tensors)
    penalties = []
    for function in (pattention, formula):  # of the gradient's size, beside the loss itself
        y = function(*tensors).square().sum()
        (gradient,) = torch.autograd.grad(y, tensors[0], create_graph=True)
        penalties.append(torch.autograd.grad(y + gradient.square().sum(), tensors))
    for own, other in zip(*penalties, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_no_further_from_the_truth_than_the_formula(dtype, autocast):
    """Output and gradients against float64, beside those of the plain lines in the same precision."""
    if autocast and dtype == torch.float16:
        pytest.skip("the CPU's autocast has no use for it")
    exact = given(length=64, dim_in=32, dim_out=24, num_tokens=80)
    exact[3] = torch.tensor(math.sqrt(80), dtype=torch.float64)
    probe = torch.randn(64, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def errors(function, dtype, autocast):
        inputs = [one.detach().to(torch.float32 if autocast else dtype).requires_grad_() for one in exact[:3]]
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            y = function(*inputs, exact[3].float())
        assert y.dtype == dtype
        y.backward(probe.to(dtype))
        return [y.detach(), *(one.grad for one in inputs)]

    truth = [formula(*exact), *torch.autograd.grad((formula(*exact) * probe).sum(), exact[:3])]
    ours, theirs = errors(pattention, dtype, autocast), errors(formula, dtype, autocast)
    for own, other, true in zip(ours, theirs, truth, strict=True):
        off = [((one.double() - true).norm() / true.norm()).item() for one in (own, other)]
        assert off[0] < max(1.1 * off[1], 0.002), off


def test_checkpointed_gradients_are_the_same():
    x, keys, values, tau = given()
    plain = torch.autograd.grad(pattention(x, keys, values, tau).square().sum(), (x, keys, values))
    again = checkpoint(pattention, x, keys, values, tau, use_reentrant=False)
    for one, other in zip(plain, torch.autograd.grad(again.square().sum(), (x, keys, values)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_compiled_it_is_one_graph_that_keeps_as_little_and_is_compiled_once():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pattention, backend=counter, fullgraph=True)
    x, keys, values, tau = given(length=64, num_tokens=48, dtype=torch.float32)
    for _ in range(3):
        ours = torch.autograd.grad(compiled(x, keys, values, tau).square().sum(), (x, keys, values))
    assert counter.frame_count == 1
    theirs = torch.autograd.grad(formula(x, keys, values, tau).square().sum(), (x, keys, values))
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    large = sum(one.numel() >= 64 * 48 for one in kept(lambda: compiled(x, keys, values, tau)))
    newest = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
    assert large == 1 if newest else large <= 2  # the partitioner of torch 2.11 keeps the GELU, as for an MLP


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tokenformer_vit_tiny_patch16_224", "tokenformer_lm_tiny", "pangu_pi_tiny"])
def test_a_model_has_no_graph_breaks(preset):
    torch.compiler.reset()
    image = "vit" in preset
    small = {"image_size": 32, "num_classes": 7, "depth": 2} if image else {"vocab_size": 50, "context_length": 16}
    model = create_backbone(preset, **small)
    x = torch.randn(2, 3, 32, 32) if image else torch.randint(50, (2, 16))
    explained = torch._dynamo.explain(model)(x)
    assert explained.graph_break_count == 0 and explained.graph_count == 1


def test_exported_it_gives_the_same():
    class Layer(torch.nn.Module):
        def forward(self, x, keys, values, tau):
            return pattention(x, keys, values, tau)

    tensors = [one.detach() for one in given(dtype=torch.float32)]
    program = torch.export.export(Layer(), tuple(tensors))
    torch.testing.assert_close(program.module()(*tensors), pattention(*tensors), rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", ["tokenformer_vit_tiny_patch16_224", "vit_tiny_patch16_224"])
def test_gradients_of_single_samples_by_vmap(preset):
    from torch.func import functional_call, grad, vmap

    torch.manual_seed(0)
    model = create_backbone(preset, depth=1, image_size=32, num_classes=5)
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([1, 0, 4])
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(weights, image, label):
        return F.cross_entropy(functional_call(model, (weights, buffers), (image[None],)), label[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))(weights, images, labels)
    for number in range(3):
        model.zero_grad()
        F.cross_entropy(model(images[number : number + 1]), labels[number : number + 1]).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][number], parameter.grad, rtol=1e-4, atol=1e-5)


def test_forward_mode_equals_reverse_mode():
    from torch.func import jacfwd, jacrev, jvp

    torch.manual_seed(0)
    layer, x = Pattention(4, 3, num_tokens=8).double(), torch.randn(5, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer, x)
    for transform in (jacfwd, jacrev):
        torch.testing.assert_close(transform(layer)(x), jacobian)
    tangent = torch.randn_like(x)
    output, moved = jvp(layer, (x,), (tangent,))
    torch.testing.assert_close(output, layer(x))
    torch.testing.assert_close(moved, torch.einsum("abcd,cd->ab", jacobian, tangent))


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not hasattr(torch._library.triton, "_is_interpreted_triton_kernel"),
    reason="needs Triton, and a torch whose wrap_triton accepts interpreted kernels",
)


@needs_triton
@pytest.mark.slow
def test_triton_kernels_in_the_interpreter():
    """The variable has to be set before Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "tests/triton_scenarios.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]


def test_a_cpu_uses_no_triton_even_if_forced(monkeypatch):
    monkeypatch.setattr(kernel_choice, "form", "triton")
    monkeypatch.setattr(kernel_choice, "INTERPRETED", False)
    monkeypatch.setattr(pattention_kernels, "_triton", lambda: pytest.fail("loaded"))
    pattention(*given(dtype=torch.float32)).sum().backward()


@needs_triton
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # without a GPU, the graph cannot tell which tensors a kernel writes
def test_export_and_compile_see_the_triton_kernels(monkeypatch):
    """Traced as on a GPU, but never run: one kernel in each pass, between which the scores and their scale are kept."""
    from torch._dynamo.backends.common import aot_autograd

    monkeypatch.setattr(kernel_choice, "form", "triton")
    monkeypatch.setattr(kernel_choice, "INTERPRETED", True)
    layer, x = Pattention(6, 4, num_tokens=10), torch.zeros(3, 6, requires_grad=True)
    for grad, name in (True, "l2_gelu"), (False, "l2_gelu_"):
        with torch.set_grad_enabled(grad):
            program = torch.export.export(layer, (x,))
        names = [str(node.target) for node in program.graph.nodes]
        assert f"lit_tokenformer.{name}.default" in names and not any("aten.gelu" in one for one in names)

    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        values = [None if one is None else one.meta["val"] for one in outputs]

        def run(inputs):
            return [None if one is None else torch.zeros(tuple(one.shape), dtype=one.dtype) for one in values]

        run._boxed_call = True
        return run

    torch.compiler.reset()
    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler), fullgraph=True)
    compiled(x).sum().backward()
    assert len(graphs) == 2
    for graph in graphs:
        targets = [str(node.target) for node in graph.graph.nodes]
        assert targets.count("triton_kernel_wrapper_functional") == 1 and not any("gelu" in one for one in targets)
    outputs = next(node for node in graphs[0].graph.nodes if node.op == "output").args[0]
    shapes = sorted(tuple(one.meta["val"].shape) for one in outputs if not one.name.startswith(("primals", "view")))
    assert [shape for shape in shapes if shape] == [(3,), (3, 10)]

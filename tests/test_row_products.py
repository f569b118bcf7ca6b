"""Products of one row in compiled decoding steps: the numbers of a matrix product, read in one pass."""

import copy

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from lit_tokenformer.growth import grow
from lit_tokenformer.inference.quantization import quantize
from lit_tokenformer.inference.readers import SlotReader, compile_step
from lit_tokenformer.inference.row_products import cpu_options, store_by_rows
from lit_tokenformer.models import create_backbone


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_of_one_row_is_a_loop_of_its_own_and_equals_the_matrix_product(dtype):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(48, 80), nn.GELU(), nn.Linear(80, 24, bias=False)).to(dtype).requires_grad_(False)
    compiled = torch.compile(layers, options=cpu_options(), dynamic=False)
    exact = copy.deepcopy(layers).double()
    for rows, calls in (1, False), (3, True):
        x = torch.randn(rows, 48, dtype=dtype)
        found, (code,) = run_and_get_code(compiled, x)
        assert ("mm(" in code or "_linear_pointwise" in code or "cpp_gemm" in code) is calls
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.double(), exact(x.double()), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [None, "int8"])
@pytest.mark.parametrize("preset", ["tokenformer_lm_tiny", "gpt2_tiny", "llama_tiny"])
def test_a_compiled_step_computes_the_logits_of_the_model(preset, scheme):
    torch.manual_seed(0)
    model = create_backbone(preset, vocab_size=96, context_length=32).eval().requires_grad_(False)
    if scheme:
        quantize(model, scheme)
    tokens = torch.randint(96, (1, 12))
    expected = model(tokens)[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()} if scheme is None else {}
    assert_step_equals(compile_step(model), model, tokens, expected)
    for name, tensor in before.items():
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.slow
def test_a_compiled_step_notices_a_growth():
    torch.manual_seed(0)
    model = create_backbone("tokenformer_lm_tiny", vocab_size=96, context_length=32, param_tokens=16)
    model.eval().requires_grad_(False)
    tokens = torch.randint(96, (1, 6))
    step = compile_step(model)
    assert_step_equals(step, model, tokens, model(tokens)[0])
    grow(model, 32, method="random")
    store_by_rows(model)
    assert_step_equals(step, model, tokens, model(tokens)[0])


@torch.inference_mode()
def assert_step_equals(step, model, tokens, expected):
    """Read a text token by token, and compare each prediction."""
    reader = SlotReader(model, 1, tokens.shape[1], step, [tokens[0, :1]])
    assert_close(reader(None)[0], expected[0])
    for place in range(1, tokens.shape[1]):
        assert_close(reader(tokens[:, place : place + 1])[0], expected[place])


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

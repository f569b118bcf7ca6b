"""Numerics, growth and fits on the CPU and, where there is one, on a CUDA device (marker ``gpu``)."""

import contextlib
import math
import os
import signal
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset

from callbacks import GrowingEMA, LossGuard, ParameterGrowthCallback, PreemptionCheckpoint
from lit_tokenformer.growth import grow
from lit_tokenformer.inference.sampling import Sampling, generate_tokens
from lit_tokenformer.models import Pattention, create_backbone, kernel_choice
from lit_tokenformer.models.pattention import pattention
from lit_tokenformer.tasks import LitImageClassifier, LRSchedule

TOLERANCES = {"float32": 1e-5, "tf32": 2e-3, "bfloat16": 1e-2, "float16": 5e-3}
"""Largest ``||y - y_64|| / ||y_64||`` in each precision; float16 and bfloat16 by autocast."""

TINY = {"dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4, "param_tokens": 8}
GROWTHS = {3: 16, 6: 32}
"""Optimizer step: parameter tokens."""

CPU_AND_CUDA = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=CPU_AND_CUDA)
def device(request):
    yield request.param
    if request.param == "cuda":
        torch.cuda.empty_cache()


def precision(name, device):
    """Autocast for the half precisions, nothing for those of float32."""
    if name in ("bfloat16", "float16"):
        return torch.autocast(device, getattr(torch, name))
    return contextlib.nullcontext()


def relative_error(found, expected):
    found = found.detach().cpu().double()
    assert found.isfinite().all()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(768, 96, 384), (97, 64, 41)], ids=["multiples", "odd"])
@pytest.mark.parametrize("name", TOLERANCES)
@pytest.mark.parametrize("form", ["plain", pytest.param("triton", marks=pytest.mark.gpu)])
def test_pattention_and_its_gradients_equal_float64(device, form, name, shape, seed, record_property, monkeypatch):
    monkeypatch.setattr(kernel_choice, "form", form)
    if name == "tf32" and device == "cpu":
        pytest.skip("TF32 exists on CUDA only")
    length, dim, tokens = shape
    draw = torch.Generator().manual_seed(seed)
    x, keys, values, grad = (
        torch.randn(*size, generator=draw) for size in ((length, dim), (tokens, dim), (tokens, dim), (length, dim))
    )
    tau = torch.tensor(math.sqrt(tokens))

    exact = [one.double().requires_grad_() for one in (x, keys, values)]
    scores = exact[0] @ exact[1].T  # (T, N)
    weights = F.gelu(tau.double() * scores / scores.norm(dim=-1, keepdim=True))
    expected = weights @ exact[2]  # (T, D)
    expected.backward(grad.double())

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        ours = [one.to(device).requires_grad_() for one in (x, keys, values)]
        with precision(name, device):
            out = pattention(*ours, tau.to(device))
        out.backward(grad.to(device, out.dtype))
    finally:
        torch.set_float32_matmul_precision(before)
    errors = {"output": relative_error(out, expected.detach())}
    for part, mine, theirs in zip(("input", "keys", "values"), ours, exact, strict=True):
        errors[f"gradient of {part}"] = relative_error(mine.grad, theirs.grad)
    for part, error in errors.items():
        record_property(f"relative error of Pattention in {name}, {part}{', Triton' * (form == 'triton')}", error)
    assert max(errors.values()) <= TOLERANCES[name], errors


@pytest.mark.gpu
def test_the_faster_form_is_chosen_once_and_never_in_a_graph_capture(monkeypatch):
    monkeypatch.setattr(kernel_choice, "form", "auto")
    monkeypatch.setattr(kernel_choice, "_kernel_is_faster", chosen := {})
    layer, x = Pattention(64, 64, num_tokens=256).cuda(), torch.randn(512, 64, device="cuda")
    with torch.no_grad():
        expected, state = layer(x), torch.cuda.get_rng_state()
        assert len(chosen) == 1
        layer(x)
        assert len(chosen) == 1 and torch.equal(torch.cuda.get_rng_state(), state)
        chosen.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        graph.replay()
    assert not chosen
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ("split", "zero", "random"))
def test_growth_preserves_output_unless_it_is_random(device, dtype, method):
    model = create_backbone("tokenformer_lm_tiny", vocab_size=97, param_tokens=16).to(device)
    tokens = torch.randint(97, (4, 32), device=device)
    with torch.no_grad():
        exact = model(tokens).double().cpu()
        with precision(dtype, device):
            rounding = relative_error(model(tokens), exact)  # of the precision itself; 0 in float32
            grow(model, 40, method=method)
            change = relative_error(model(tokens), exact)
    assert all(layer.num_tokens >= 40 for layer in model.modules() if isinstance(layer, Pattention))
    assert all(parameter.device.type == device for parameter in model.parameters())
    if method == "random":
        assert change > 0.05
    else:
        assert change <= 1e-5 + 1.5 * rounding
    assert rounding <= 0.02


def fit(device, *callbacks, precision="32-true", compile=None, ckpt_path=None, strategy="auto", root=None, clip=None):
    """Train two epochs of four steps on noise with fused AdamW, growing at the steps of GROWTHS."""
    seed_everything(1)
    task = LitImageClassifier(
        "tokenformer_vit_tiny_patch16_224",
        num_classes=10,
        image_size=8,
        overrides=TINY,
        optimizer=partial(torch.optim.AdamW, lr=3e-4, fused=True),
        schedule=LRSchedule("cosine", warmup=1),
    )
    if compile is not None:
        task.backbone.compile(dynamic=False, **compile)
    trainer = Trainer(
        accelerator=device,
        devices=1,
        strategy=strategy,
        use_distributed_sampler=False,  # Lightning's shuffles
        precision=precision,
        gradient_clip_val=clip,
        max_epochs=2,
        logger=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        callbacks=[ParameterGrowthCallback(GROWTHS, unit="step"), *callbacks],
    )
    draw = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(32, 3, 8, 8, generator=draw), torch.randint(10, (32,), generator=draw))
    with contextlib.suppress(SIGTERMException):
        trainer.fit(task, DataLoader(data, 8), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def state(trainer):
    """Weights, buffers and moments of a fit, on the CPU."""
    task, (optimizer,) = trainer.lightning_module, trainer.optimizers
    moments = [value for one in optimizer.state.values() for value in one.values() if isinstance(value, torch.Tensor)]
    return [tensor.detach().cpu().clone() for tensor in (*task.state_dict().values(), *moments)]


def assert_same_state(found, expected, device):
    """Bit-equal on a CPU; a GPU's atomics sum in another order each time."""
    tolerance = 0 if device == "cpu" else 1e-2
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def tokens_of(trainer):
    return {layer.num_tokens for layer in trainer.lightning_module.modules() if isinstance(layer, Pattention)}


@pytest.mark.parametrize("mode", ["bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("clip", [None, 1.0], ids=["", "clipped"])
def test_fit_in_reduced_precision_grows_twice_and_resumes(device, tmp_path, mode, clip):
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(device, saves, precision=mode, clip=clip)
    assert tokens_of(whole) == {32, 128} and whole.global_step == 8
    resumed = fit(device, precision=mode, clip=clip, ckpt_path=tmp_path / "step=4.ckpt")
    assert tokens_of(resumed) == {32, 128} and resumed.global_step == 8
    assert_same_state(state(resumed), state(whole), device)
    scaler = whole.precision_plugin.scaler if hasattr(whole.precision_plugin, "scaler") else None
    assert (scaler is not None) == (mode == "16-mixed" and device == "cuda")
    if scaler is not None:
        assert resumed.precision_plugin.scaler.get_scale() == scaler.get_scale()


COMPILED = [
    pytest.param("cpu", {"backend": "aot_eager"}, id="cpu"),
    pytest.param("cuda", {}, marks=pytest.mark.gpu, id="cuda"),
    pytest.param("cuda", {"mode": "reduce-overhead"}, marks=pytest.mark.gpu, id="cuda-graphs"),
]


@pytest.mark.parametrize(("device", "compile"), COMPILED)
def test_fit_is_compiled_once_for_each_size(device, compile):
    torch.compiler.reset()
    counters.clear()
    compiled = fit(device, compile=compile)
    assert tokens_of(compiled) == {32, 128}
    assert counters["stats"]["unique_graphs"] == 3
    for mine, theirs in zip(state(compiled), state(fit(device)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3)
    torch.compiler.reset()


STRATEGIES = {
    "ddp": lambda device: DDPStrategy(process_group_backend="nccl" if device == "cuda" else "gloo"),
    "fsdp2": lambda device: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_distributed_strategy_of_one_process_equals_none(device, strategy):
    distributed = fit(device, strategy=STRATEGIES[strategy](device))
    assert tokens_of(distributed) == {32, 128}
    whole = [one.full_tensor() if hasattr(one, "full_tensor") else one for one in state(distributed)]
    for mine, theirs in zip(whole, state(fit(device)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


class Poison(Callback):
    """Make the loss of one step non-finite."""

    done = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 4 and not self.done:
            self.done = True
            batch[0].fill_(math.nan)


def test_moving_average_and_loss_guard_stay_finite_on_the_device(device):
    guard, average = LossGuard(action="rollback", every_n_steps=1), GrowingEMA(decay=0.9)
    trainer = fit(device, average, guard, Poison())
    assert guard.rollbacks == 1
    assert all(tensor.isfinite().all() for tensor in state(trainer))
    assert tokens_of(trainer) == {32, 128}
    assert all(parameter.device.type == device for parameter in trainer.lightning_module.parameters())


class Terminate(Callback):
    """Send SIGTERM to the process in a step."""

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 3:  # the last batch of an epoch: the data of this test resume there only
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_and_the_fit_resumes(device, tmp_path):
    whole = fit(device)
    stopped = fit(device, Terminate(), PreemptionCheckpoint(), root=tmp_path)
    assert stopped.global_step == 4
    (path,) = tmp_path.rglob("*.ckpt")
    resumed = fit(device, PreemptionCheckpoint(), root=tmp_path, ckpt_path=path)
    assert_same_state(state(resumed), state(whole), device)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation_with_cache_equals_generation_without(device, dtype):
    model = create_backbone("tokenformer_lm_tiny", vocab_size=97).to(device, getattr(torch, dtype))
    prompts = [torch.randint(97, (length,)) for length in (3, 11, 7)]
    texts = [
        torch.stack(list(generate_tokens(model, prompts, 24, Sampling(temperature=0), cache=cache)))
        for cache in (True, False)
    ]
    if dtype == "float32":
        assert torch.equal(*texts)
    else:  # a rounded tie may go either way, and then the text goes on from there
        assert (texts[0] == texts[1]).float().mean() > 0.5

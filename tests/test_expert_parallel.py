"""Expert parallelism on gloo processes: equal to one process, whole checkpoints, and what is refused."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from callbacks import ParameterGrowthCallback
from lit_tokenformer.checkpoints.load import read_checkpoint
from lit_tokenformer.distributed import GrowingModelParallelStrategy
from lit_tokenformer.distributed.expert_parallel import expert_mesh
from lit_tokenformer.models import create_backbone
from tests.expert_parallel_scenarios import SIZES, fit


def run(folder, processes, *scenarios):
    script = Path(__file__).parent / "expert_parallel_scenarios.py"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(script), str(folder), *scenarios]
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_equal(path, expected):
    found, wanted = (read_checkpoint(one)["state_dict"] for one in (path, expected))
    assert found.keys() == wanted.keys()
    limit = 5e-6 if path.name.startswith("mlp") else 1e-11  # float32 or float64
    torch.testing.assert_close(found, wanted, rtol=0, atol=limit, msg=lambda text: f"{path.name}: {text}")


def logged(folder):
    """Return the norms and loads of each optimizer step; the same on all processes."""
    with open(folder / "metrics.csv") as file:
        steps = [step for step in csv.DictReader(file) if step["experts/load_max"]]
    return [
        {name: float(value) for name, value in step.items() if value and name.startswith(("rows/", "experts/"))}
        for step in steps
    ]


@pytest.mark.slow
def test_two_processes_with_half_of_the_experts_train_as_one_does(tmp_path):
    """Gradients have the scale of one process (SGD), an expert is idle, or a process has no data tokens."""
    for name in ("tokens", "mlp", "grown"):
        fit(tmp_path, name)
    fit(tmp_path, "tokens", 2, tmp_path / "tokens-1.ckpt")
    run(
        tmp_path,
        2,
        "forward",
        "tokens",
        "mlp",
        "grown",
        *(f"tokens:ckpt_path=tokens-{processes}.ckpt" for processes in (1, 2)),
    )
    for name in ("tokens", "mlp", "grown"):
        assert_equal(tmp_path / f"{name}-2.ckpt", tmp_path / f"{name}-1.ckpt")
        own, other = (logged(tmp_path / f"{name}-{processes}") for processes in (1, 2))
        assert len(own) == len(other) == 3
        assert ({"rows/grad_norm_old", "rows/update_norm_old"} <= {*own[-1]}) == (name != "mlp")
        for one, two in zip(own, other, strict=True):
            assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    fit(tmp_path, "tokens", 2, tmp_path / "tokens-2.ckpt")  # a process with all experts
    whole = tmp_path / "tokens-1-from-tokens-1.ckpt.ckpt"
    for resumed in ("1-from-tokens-2.ckpt", "2-from-tokens-2.ckpt", "2-from-tokens-1.ckpt"):
        assert_equal(tmp_path / f"tokens-{resumed}.ckpt", whole)


@pytest.mark.slow
def test_owners_of_the_same_experts_shard_them_by_data_or_tensor_parallelism(tmp_path):
    run(tmp_path, 4, "tokens", "grown:tensor=2")
    for name, division in (("tokens", "4"), ("grown", "2x2")):
        fit(tmp_path, name)
        assert_equal(tmp_path / f"{name}-{division}.ckpt", tmp_path / f"{name}-1.ckpt")
        expected = [pytest.approx(one, rel=1e-4) for one in logged(tmp_path / f"{name}-1")]
        assert logged(tmp_path / f"{name}-{division}") == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_parallel_size": 0}, "expected a number of at least 1, got 0"),
        ({"expert_parallel_size": 2, "save_distributed_checkpoint": False}, "each process saves its experts"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(ValueError, match=rf"^trainer.strategy.expert_parallel_size: {message}"):
        GrowingModelParallelStrategy(**settings)


def test_growth_into_experts_is_refused_before_the_fit():
    model = create_backbone("tokenformer_lm_tiny", vocab_size=31, context_length=12, **SIZES, experts=4)
    trainer = SimpleNamespace(strategy=GrowingModelParallelStrategy(expert_parallel_size=2))
    stages = [(10, {"experts": 8})]
    with pytest.raises(ValueError, match=r"^schedule: experts cannot be inserted under ModelParallelStrategy; use"):
        ParameterGrowthCallback({10: {"experts": 8}})._check_modules(trainer, model, {"experts": 4}, stages)


def test_processes_must_divide_data_parallel_size():
    strategy = GrowingModelParallelStrategy(data_parallel_size=4, expert_parallel_size=3)
    with pytest.raises(ValueError, match=r"expected a divisor of data_parallel_size 4, got 3$"):
        strategy.setup_environment()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, "the model has no experts"),
        ({"experts": 3}, "expected a divisor of 3 experts, got 2"),
        ({"experts": 4, "expert_groups": 2}, "expert_groups share a norm over their experts"),
    ],
)
def test_models_without_divisible_experts_are_refused(overrides, message):
    model = create_backbone("tokenformer_lm_tiny", vocab_size=31, context_length=12, **SIZES, **overrides)
    with pytest.raises(ValueError, match=rf"^trainer.strategy.expert_parallel_size: {message}"):
        expert_mesh(model, None, 2)  # rejected before the mesh is read

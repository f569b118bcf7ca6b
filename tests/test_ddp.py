"""Growth under DDP, on two processes of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

SCRIPT = """
import os
import sys
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from callbacks import ParameterGrowthCallback
from lit_tokenformer.tasks import LitImageClassifier, LRSchedule

torch.set_num_threads(1)
devices, output, method, accumulate = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
seed_everything(0)
task = LitImageClassifier(
    "tokenformer_vit_tiny_patch16_224", num_classes=10, image_size=8,
    overrides={"dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "param_tokens": 8},
    schedule=LRSchedule("constant"),
)
images, labels = torch.randn(96, 3, 8, 8), torch.randint(10, (96,))
data = TensorDataset(images, labels)
rank = int(os.environ.get("LOCAL_RANK", 0))
sampler = DistributedSampler(data, num_replicas=devices, rank=rank, shuffle=False)  # else Lightning's, which shuffles
loader = DataLoader(data, batch_size=16 // devices, sampler=sampler)
growth = ParameterGrowthCallback({1: 16, 2: 20} if method == "zero_keys" else {1: 16, 2: 32}, method=method)
trainer = Trainer(
    max_epochs=4, accelerator="cpu", devices=devices, logger=False, enable_checkpointing=False,
    strategy=DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True) if devices > 1 else "auto",
    precision="64-true",
    enable_progress_bar=False, enable_model_summary=False, callbacks=[growth], accumulate_grad_batches=accumulate,
)
trainer.fit(task, loader)
moments = {n: trainer.optimizers[0].state[p] for n, p in task.named_parameters()}
found = {"weights": task.state_dict(), "moments": moments, "events": len(growth.events)}
torch.save(found, f"{output}-{trainer.global_rank}")
"""


def run(folder, devices, method, accumulate):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    output = folder / f"out-{devices}"
    command = [sys.executable, str(script), str(devices), str(output), method, str(accumulate)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{output}-{rank}", weights_only=True) for rank in range(devices)]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "accumulate"), [("split", 1), ("zero_keys", 2)])
def test_ddp_ranks_agree_after_growth_and_equal_one_process(tmp_path, method, accumulate):
    first, second = run(tmp_path, 2, method, accumulate)
    (alone,) = run(tmp_path, 1, method, accumulate)
    assert first["events"] == second["events"] == alone["events"] == 2
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
        # the order of summation differs between one batch of 16 and two of 8
        torch.testing.assert_close(weight, alone["weights"][name], rtol=1e-6, atol=1e-8)
    for name, state in first["moments"].items():
        assert torch.equal(state["exp_avg"], second["moments"][name]["exp_avg"]), name
        torch.testing.assert_close(state["exp_avg"], alone["moments"][name]["exp_avg"], rtol=1e-6, atol=1e-8)
        assert state["step"] == alone["moments"][name]["step"] == 24 / accumulate


VALIDATION = """
import sys
from lightning.pytorch import Trainer, seed_everything
from lit_tokenformer.data import TextDataModule
from lit_tokenformer.tasks import LitCausalLM

devices, folder = int(sys.argv[1]), sys.argv[2]
seed_everything(0)
sizes = {"dim": 32, "depth": 1, "num_heads": 2, "rotary_fraction": 0.5, "param_tokens": 8}
task = LitCausalLM("tokenformer_lm_tiny", vocab_size=257, context_length=16, overrides=sizes)
data = TextDataModule("files", val_files=[folder + "/a.txt"], block_size=16, batch_size=2, cache_dir=folder)
trainer = Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
                  enable_progress_bar=False)
(scores,) = trainer.validate(task, datamodule=data, verbose=False)
if trainer.is_global_zero:
    print("scores", scores["val/loss"], scores["val/bits_per_byte"])
"""


@pytest.mark.slow
def test_two_processes_score_text_as_one_does(tmp_path):
    (tmp_path / "a.txt").write_text("An odd number of tokens, in blocks that two do not share evenly")
    (tmp_path / "script.py").write_text(VALIDATION)
    scores = []
    for devices in (1, 2):
        command = [sys.executable, str(tmp_path / "script.py"), str(devices), str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("scores")]
        scores.append([float(score) for score in line.split()[1:]])
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)

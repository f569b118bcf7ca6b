"""Throughput of two DDP processes, pinned to a core each, against one process on one core.

    python -m benchmarks.speed.ddp [--config causal_lm_small] [--tokens 32] [--steps 30] [--rounds 2]

Three things are run in turn, so that other work on the machine disturbs all alike: ``one`` process; ``apart``, two at
the same time that know nothing of each other; ``ddp``, two that average their gradients. Every process trains on the
config's batch, so with perfect scaling all steps would take equally long. What ``apart`` takes longer than ``one`` is
lost to what cores share, what ``ddp`` takes longer than ``apart`` to DDP. ``bare`` is one all-reduce of as many bytes.
Figures are medians over steps, then over processes and rounds. Needs two cores and Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.speed.lines import Line
from benchmarks.speed.timing import arguments, main, median, seconds

CASES = {"one": 1, "apart": 2, "ddp": 2}
"""Number of processes of each case."""
FIRST = 6
"""Steps that are skipped."""


class StepTimes(Callback):
    """Write the median seconds of a training step as JSON to $STEP_TIMES."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._marks = [time.perf_counter()]

    def on_train_batch_end(self, *_: Any) -> None:
        self._marks.append(time.perf_counter())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gradients = torch.zeros(sum(parameter.numel() for parameter in pl_module.parameters()))
        steps = [after - before for before, after in pairwise(self._marks[FIRST:])]
        found = {"step": median(steps), "parameters": len(gradients)}
        if trainer.world_size > 1:
            times = []
            for _ in range(20):
                trainer.strategy.barrier()
                times.append(seconds(lambda: dist.all_reduce(gradients)))
            found["bare"] = median(times)
        Path(os.environ["STEP_TIMES"]).write_text(json.dumps(found))


def run(case: str, config: str, tokens: int, steps: int, folder: Path) -> list[dict[str, float]]:
    """Measure each process of a case."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # rendezvous of the processes
    cores = sorted(os.sched_getaffinity(0))
    processes, files = [], []
    for rank in range(CASES[case]):
        files.append(folder / f"{case}-{rank}.json")
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "STEP_TIMES": str(files[-1])}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        settings: dict[str, Any] = {
            **{"trainer.accelerator": "cpu", "trainer.default_root_dir": folder / f"{case}-{rank}"},
            **{"trainer.logger": "false", "trainer.enable_checkpointing": "false"},
            **{"trainer.enable_progress_bar": "false", "trainer.limit_val_batches": 0},
            **{"trainer.max_steps": -1, "trainer.max_epochs": 1, "trainer.limit_train_batches": steps},
            "model.init_args.schedule.warmup": 0,
            "trainer.callbacks": json.dumps([{"class_path": "benchmarks.speed.ddp.StepTimes"}]),
            "model.init_args.overrides.param_tokens": tokens,
        }
        if case == "ddp":
            settings |= {"trainer.devices": 2, "trainer.strategy": "ddp"}
            environment |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "NODE_RANK": "0"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # as torchrun: they are all clients of it
        options = [f"--{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "lit_tokenformer", "fit", "--config", config, *options]
        with (folder / f"{case}-{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        os.sched_setaffinity(processes[-1].pid, {cores[rank]})
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise SystemExit((folder / f"{case}-{codes.index(max(codes, key=abs))}.log").read_text()[-3000:])
    return [json.loads(file.read_text()) for file in files]


def measure(given: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Run the cases in turn, and split the step into what is lost where."""
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed")
    measured: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(given.rounds):
            for case, found in measured.items():
                found += run(case, given.config, given.tokens, given.steps, Path(folder))
    medians = {
        case: {name: median(one[name] for one in found) for name in found[0]} for case, found in measured.items()
    }
    one, apart, ddp = (medians[case]["step"] for case in CASES)
    speeds = {case: CASES[case] * given.batch_tokens / found["step"] for case, found in medians.items()}
    bare, size = medians["ddp"]["bare"], 4 * medians["ddp"]["parameters"] / 1e6
    lines = [
        Line("two processes under DDP", "one process", speeds["ddp"], speeds["one"], "tokens/s", one / ddp),
        Line("two unrelated processes", "one process", speeds["apart"], speeds["one"], "tokens/s", one / apart),
        Line(f"all-reduce of {size:.1f} MB alone", "a step under DDP", 1e3 * bare, 1e3 * ddp, "ms", bare / ddp),
    ]
    return lines, [
        "Ratios of processes are shares of perfect scaling.",
        f"Of a step under DDP {(apart - one) / ddp:.0%} is lost to shared hardware, {(ddp - apart) / ddp:.0%} to DDP.",
    ]


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=2)
    parser.add_argument("--config", default="causal_lm_small", help="config of a causal language model")
    parser.add_argument("--tokens", type=int, default=32, help="parameter tokens of q, k, v and proj each")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch_tokens", type=int, default=8 * 256, help="tokens of a batch in the config")
    main("ddp", parser, measure)

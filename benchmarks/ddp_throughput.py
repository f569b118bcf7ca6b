"""What two DDP processes, pinned to a core each, train on in a second against one process on one core.

    python benchmarks/ddp_throughput.py [--config causal_lm_small] [--tokens 32] [--steps 30] [--rounds 2] [--json FILE]

Three things are run in turn, so that other work on the machine disturbs all alike: ``one`` process; ``apart``, two at
the same time that know nothing of each other; ``ddp``, two that average their gradients. Every process trains on the
config's batch, so with perfect scaling all steps would take equally long. What ``apart`` takes longer than ``one`` is
lost to what cores share (memory, caches, clock), what ``ddp`` takes longer than ``apart`` to DDP: to the all-reduce, as
far as it is not hidden behind the backward pass, to filling buckets, and to waiting for the slower process. ``bare``
is one all-reduce of as many bytes by itself. Figures are medians over steps, then over processes and rounds; the first
steps are left out. Needs two cores and Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

CASES = {"one": 1, "apart": 2, "ddp": 2}
"""Processes of each case."""
PARTS = ("data", "forward", "backward", "optimizer")
FIRST = 6
"""Steps that are left out."""


class StepTimes(Callback):
    """Writes the medians of what each part of a training step takes, in seconds, as JSON to $STEP_TIMES.

    ``backward`` holds the all-reduce, ``optimizer`` the clipping of gradients.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._times: list[list[float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._marks = [time.perf_counter()]

    def on_train_batch_start(self, *_: Any) -> None:
        self._marks.append(time.perf_counter())

    def on_before_backward(self, *_: Any) -> None:
        self._marks.append(time.perf_counter())

    def on_after_backward(self, *_: Any) -> None:
        self._marks.append(time.perf_counter())

    def on_train_batch_end(self, *_: Any) -> None:
        self._marks.append(time.perf_counter())
        self._times.append([after - before for before, after in zip(self._marks, self._marks[1:], strict=False)])
        self._marks = self._marks[-1:]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        kept = self._times[FIRST:]
        found = {part: statistics.median(times) for part, times in zip(PARTS, zip(*kept, strict=True), strict=True)}
        found["step"] = statistics.median(map(sum, kept))
        gradients = torch.zeros(sum(parameter.numel() for parameter in pl_module.parameters()))
        found["parameters"] = len(gradients)
        if trainer.world_size > 1:
            times = []
            for _ in range(20):
                trainer.strategy.barrier()
                start = time.perf_counter()
                dist.all_reduce(gradients)
                times.append(time.perf_counter() - start)
            found["bare"] = statistics.median(times)
        Path(os.environ["STEP_TIMES"]).write_text(json.dumps(found))


def run(case: str, config: str, tokens: int, steps: int, folder: Path) -> list[dict[str, float]]:
    """What each process of a case measured."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where the processes meet
    cores = sorted(os.sched_getaffinity(0))
    processes, files = [], []
    for rank in range(CASES[case]):
        files.append(folder / f"{case}-{rank}.json")
        paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "STEP_TIMES": str(files[-1])}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        settings: dict[str, Any] = {
            **{"trainer.accelerator": "cpu", "trainer.default_root_dir": folder / f"{case}-{rank}"},
            **{"trainer.logger": "false", "trainer.enable_checkpointing": "false"},
            **{"trainer.enable_progress_bar": "false", "trainer.limit_val_batches": 0},
            **{"trainer.max_steps": -1, "trainer.max_epochs": 1, "trainer.limit_train_batches": steps},
            "model.init_args.schedule.warmup": 0,
            "trainer.callbacks": json.dumps([{"class_path": "ddp_throughput.StepTimes"}]),
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


def main(config: str, tokens: int, steps: int, rounds: int, batch_tokens: int, output: str | None) -> None:
    """Prints a line for each case, and where the rest goes."""
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed")
    measured: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for case, found in measured.items():
                found += run(case, config, tokens, steps, Path(folder))
    medians = {
        case: {name: statistics.median(one[name] for one in found) for name in found[0]}
        for case, found in measured.items()
    }
    for case, found in medians.items():
        found["tokens_per_second"] = CASES[case] * batch_tokens / found["step"]
        parts = ", ".join(f"{part} {1000 * found[part]:.1f}" for part in PARTS)
        print(f"{case:5s} {found['tokens_per_second']:7.0f} tokens/s  step {1000 * found['step']:6.1f} ms: {parts}")
    one, apart, ddp = (medians[case]["step"] for case in CASES)
    summary = {
        "efficiency": one / ddp,
        "lost_to_shared_hardware": (apart - one) / ddp,
        "lost_to_ddp": (ddp - apart) / ddp,
        "bare_all_reduce": medians["ddp"]["bare"] / ddp,
    }
    print(
        f"two processes do {2 * summary['efficiency']:.2f} times the work of one: {summary['efficiency']:.0%} of "
        f"perfect scaling; {summary['lost_to_shared_hardware']:.0%} of a step is lost to what cores share, "
        f"{summary['lost_to_ddp']:.0%} to DDP; a bare all-reduce of "
        f"{4 * medians['ddp']['parameters'] / 1e6:.1f} MB takes {1000 * medians['ddp']['bare']:.1f} ms "
        f"({summary['bare_all_reduce']:.0%})"
    )
    if output:
        settings = {"config": config, "tokens": tokens, "steps": steps, "rounds": rounds, "torch": torch.__version__}
        Path(output).write_text(json.dumps({"settings": settings, **medians, **summary}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="causal_lm_small", help="a config of a causal language model")
    parser.add_argument("--tokens", type=int, default=32, help="parameter tokens of q, k, v and proj each")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch_tokens", type=int, default=8 * 256, help="tokens of a batch in the config")
    parser.add_argument("--json", help="where the figures go")
    given = parser.parse_args()
    main(given.config, given.tokens, given.steps, given.rounds, given.batch_tokens, given.json)

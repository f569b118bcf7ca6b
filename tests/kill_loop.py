"""Kill a training run at random moments, resume it, and compare its end bit by bit with an undisturbed run.

    python tests/kill_loop.py --runs 50 [--config vit_small] [--seed 0] [--logs FOLDER] [--output JSON] [OPTION ...]

The run is a short form of a config that grows: a tiny model, 40 optimizer steps, two growths; it saves checkpoints as
the config says. Unknown options go to ``lit-tokenformer fit`` (``--trainer.max_epochs 8``). Each gets SIGKILL
once or twice: at any time, between two parameters of a growth, after some bytes of a checkpoint, or just before or
after the checkpoint gets its name; then ``fit --ckpt_path last`` resumes it. Compared bit by bit are weights, their
moving average, optimizer, schedule, parameter tokens and random generators in the last checkpoint.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_tokenformer.checkpoints import checkpoint_io
from lit_tokenformer.checkpoints.checkpoint_io import last_checkpoint
from lit_tokenformer.checkpoints.load import read_checkpoint
from lit_tokenformer.cli.main import main as lit_tokenformer
from lit_tokenformer.cli.parser import shipped_configs
from lit_tokenformer.comparison.meter import environment

COMPARED = (
    *("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"),
    *("param_tokens", "global_step", "rng_states"),  # not "epoch": a fit resumed after its last step increments it
)
SHORT = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 8}
SCHEDULE = {1: 16, 3: 32}
OPTIONS = [
    *("--trainer.max_epochs", "4", "--trainer.limit_train_batches", "10", "--trainer.limit_val_batches", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0"),
    *("--trainer.enable_model_summary", "false"),
]


@dataclass
class Ending:
    """End of a killed run."""

    kills: list[str] = field(default_factory=list)
    """Moments of the kills; ``not reached`` if the run ended earlier."""
    resumed_at: list[int] = field(default_factory=list)
    """Optimizer step of the checkpoint that each start resumed from; 0 for a fresh start."""
    status: int = -1
    """Exit status of the last start."""
    differing: list[str] = field(default_factory=list)
    """Parts of the last checkpoint that differ from those of the undisturbed run."""

    @property
    def equal(self) -> bool:
        """Whether it finished with the same checkpoint."""
        return self.status == 0 and not self.differing


def short_config(name: str, folder: Path) -> Path:
    """Write a short form of a shipped config; only its sizes and its growth schedule change."""
    config = yaml.safe_load(shipped_configs()[name].read_text(encoding="utf-8"))
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"] == "callbacks.ParameterGrowthCallback":
            callback["init_args"]["schedule"] = SCHEDULE
    config["model"]["init_args"]["overrides"] |= SHORT
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def start(args: list[str], output: Path, prepare: Callable[[], None], kill_after: float | None = None) -> int:
    """Run the command line in a fork of this process, which has imported the slow packages.

    Args:
        args: Arguments of ``fit``.
        output: File that its output is appended to.
        prepare: Called in the fork before.
        kill_after: Seconds until it gets SIGKILL.

    Returns:
        Its exit status; -9 if it was killed.
    """
    child = os.fork()
    if not child:
        status = 1
        try:
            with output.open("a", encoding="utf-8") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                prepare()
                status = lit_tokenformer(["fit", *args])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    timer = threading.Timer(kill_after or 0, os.kill, (child, signal.SIGKILL)) if kill_after is not None else None
    if timer is not None:
        timer.start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if timer is not None:
        timer.cancel()
    return status


def die() -> None:
    """Kill this process, as a power failure does."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_growth(draw: random.Random) -> None:
    """Arrange for a kill between two parameters of a growth."""
    left = draw.randrange(1, 40)
    module: Any = importlib.import_module("lit_tokenformer.growth.grow")  # the package exports a function of this name
    grow = module.grow_optimizer

    def counted(*args: Any, **settings: Any) -> Any:
        nonlocal left
        grow(*args, **settings)
        left -= 1
        if left == 0:
            die()

    module.grow_optimizer = counted


def die_in_writing(draw: random.Random) -> None:
    """Arrange for a kill after some bytes of a checkpoint."""
    left = draw.randrange(1, 2_000_000)
    save = torch.save

    def counted(checkpoint: Any, file: Any) -> None:
        class Counted:
            def write(self, data: bytes) -> int:
                nonlocal left
                left -= len(data)
                if left < 0:
                    file.write(data[: len(data) // 2])
                    file.flush()
                    die()
                return file.write(data)

            def flush(self) -> None:
                file.flush()

        save(checkpoint, Counted())

    checkpoint_io.torch.save = counted


def die_in_naming(draw: random.Random) -> None:
    """Arrange for a kill just before or after a checkpoint is renamed."""
    left, before = draw.randrange(1, 8), draw.random() < 0.5
    replace = os.replace

    def counted(*paths: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0 and before:
            die()
        replace(*paths)
        if left == 0:
            die()

    checkpoint_io.os.replace = counted


MOMENTS: dict[str, Callable[[random.Random], None]] = {
    "growing": die_in_growth,
    "writing": die_in_writing,
    "naming": die_in_naming,
}
"""Moments of a kill, in addition to any time."""


def differences(one: Any, other: Any) -> bool:
    """Whether two parts of checkpoints differ in any bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype != other.dtype or not torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() != other.keys() or any(differences(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) != len(other) or any(map(differences, one, other))
    return one != other


def kill_and_resume(args: list[str], folder: Path, whole: dict[str, Any], seconds: float, moments: list[str]) -> Ending:
    """Kill a run at each of the moments, then let it finish.

    Args:
        args: Arguments of ``fit``.
        folder: Folder of its checkpoints.
        whole: Last checkpoint of the undisturbed run.
        seconds: Duration of that run.
        moments: Keys of :data:`MOMENTS`, or ``any time``.
    """
    ending, draw = Ending(), random.Random(str(folder.name))
    where = ["--trainer.default_root_dir", str(folder), "--ckpt_path", "last"]
    for moment in [*moments, ""]:
        found = last_checkpoint(folder)
        ending.resumed_at.append(int(read_checkpoint(found, "meta")["global_step"]) if found else 0)
        prepare = MOMENTS.get(moment, lambda _: None)
        after = draw.uniform(0, seconds) if moment == "any time" else None
        ending.status = start([*args, *where], folder / "output.txt", lambda prepare=prepare: prepare(draw), after)
        if moment:
            ending.kills.append(moment if ending.status == -signal.SIGKILL else f"{moment}, not reached")
        if moment and ending.status == 0:
            break
        if ending.status not in (0, -signal.SIGKILL):
            break
    found = last_checkpoint(folder)
    last = read_checkpoint(found) if found else {}
    ending.differing = [name for name in COMPARED if differences(last.get(name), whole.get(name))]
    return ending


def report(endings: list[Ending]) -> str:
    """Count bit-equal runs by the moment of their first kill, in Markdown, and describe the others."""
    lines = ["| first kill | runs | bit-equal |", "|---|---:|---:|"]
    counts = Counter(ending.kills[0] for ending in endings)
    for moment, count in sorted(counts.items()):
        equal = sum(ending.equal for ending in endings if ending.kills[0] == moment)
        lines.append(f"| {moment} | {count} | {equal} |")
    kills = sum("not reached" not in kill for ending in endings for kill in ending.kills)
    lines += ["", f"{sum(ending.equal for ending in endings)} of {len(endings)} runs, killed {kills} times"]
    for number, ending in enumerate(endings):
        if not ending.equal:
            lines.append(f"run {number}: exit status {ending.status}, differs in {', '.join(ending.differing)}")
    return "\n".join(lines)


def main(runs: int, config: str, seed: int, logs: str | None, output: str | None, options: list[str]) -> int:
    """Run the loop; 0 if all runs end bit-equal."""
    torch.set_num_threads(1)
    folder = Path(logs or tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    args = ["--config", str(short_config(config, folder)), *OPTIONS, *options]
    alone = folder / "alone"
    alone.mkdir()
    begun = time.perf_counter()
    status = start([*args, "--trainer.default_root_dir", str(alone)], alone / "output.txt", lambda: None)
    seconds = time.perf_counter() - begun
    found = last_checkpoint(alone)
    if status or found is None:
        print((alone / "output.txt").read_text(encoding="utf-8"), file=sys.stderr)
        return 1
    whole, draw, endings = read_checkpoint(found), random.Random(seed), []
    print(f"undisturbed: {whole['global_step']} steps, {seconds:.1f} s", flush=True)
    kinds = ["any time", "growing", "writing", "any time", "naming"]
    for number in range(runs):
        place = folder / f"{seed}-{number}"
        place.mkdir()
        moments = [kinds[number % len(kinds)], *(["any time"] if draw.random() < 0.5 else [])]
        endings.append(kill_and_resume(args, place, whole, seconds, moments))
        ending = endings[-1]
        print(f"{number}: {'; '.join(ending.kills)}; from steps {ending.resumed_at}: ", end="")
        print("bit-equal" if ending.equal else f"status {ending.status}, differs: {ending.differing}", flush=True)
        if ending.equal:
            shutil.rmtree(place)
    print(report(endings))
    if output:
        results = {
            "config": config,
            "seed": seed,
            "steps": whole["global_step"],
            "seconds_alone": round(seconds, 1),
            "equal": sum(ending.equal for ending in endings),
            "runs": [asdict(ending) for ending in endings],
            "environment": environment(torch.device("cpu")),
        }
        Path(output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if logs is None and all(ending.equal for ending in endings):
        shutil.rmtree(folder)
    return 0 if all(ending.equal for ending in endings) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--config", default="vit_small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", help="folder for the runs; bit-equal ones are removed")
    parser.add_argument("--output", help="JSON file of the results")
    known, rest = parser.parse_known_args()
    sys.exit(main(**vars(known), options=rest))

"""Start-up of the command line: ``--help``, and ``generate`` up to its first token.

Both are compared with the import of Lightning, which they cannot do without: ``python -c "import lightning.pytorch"``.
Each is a process of its own; they take turns, with the files in the page cache and the modules compiled, as after a
first use. ``generate`` writes with a tiny model of random weights, whose checkpoint is made here. It is timed until the
first character behind the prompt arrives at the other end of a pipe, and is ended then; the others are timed until they
end.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.speed.lines import Line
from benchmarks.speed.timing import arguments, main, median, ratio, take_turns
from lit_tokenformer.checkpoints.load import write_checkpoint
from lit_tokenformer.data.text.tokenizer import Tokenizer
from lit_tokenformer.tasks import LitCausalLM
from lit_tokenformer.tasks.rebuild import fresh_checkpoint

PROMPT = "Once"
GOALS = {"--help": "<= 1.5", "generate, first token": "<= 1.6"}


def measure(args: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Time the commands in turn."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny_checkpoint(Path(folder))
        # compiled modules go to a folder of their own, whether or not the environment lets Python keep them
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPYCACHEPREFIX": f"{folder}/compiled"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        generate = ["-m", "lit_tokenformer", "generate", f"--ckpt_path={checkpoint}", f"--prompt={PROMPT}"]
        commands = {
            "import lightning.pytorch": partial(until_end, ["-c", "import lightning.pytorch"], environment),
            "--help": partial(until_end, ["-m", "lit_tokenformer", "--help"], environment),
            "generate, first token": partial(
                until_written, [*generate, f"--device={args.device}"], environment, len(PROMPT) + 1
            ),
            "import torch": partial(until_end, ["-c", "import torch"], environment),
        }
        taken = take_turns(commands, args.rounds, warmup=1)
    base = taken.pop("import lightning.pytorch")
    lines = [
        Line(name, "import lightning.pytorch", median(own), median(base), "s", ratio(own, base), GOALS.get(name, ""))
        for name, own in taken.items()
    ]
    return lines, []


def tiny_checkpoint(folder: Path) -> Path:
    """Write a checkpoint of the tiny language preset with random weights and a byte tokenizer."""
    tokenizer = Tokenizer.bytes()
    task = LitCausalLM("tokenformer_lm_tiny", vocab_size=tokenizer.size, context_length=128)
    task.tokenizer_json = tokenizer.to_json()
    path = folder / "tiny.ckpt"
    write_checkpoint(fresh_checkpoint(task, task.state_dict()), path)
    return path


def until_end(command: list[str], environment: dict[str, str]) -> None:
    """Run Python to its end."""
    subprocess.run([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, check=True)


def until_written(command: list[str], environment: dict[str, str], size: int) -> None:
    """Run Python until it has written ``size`` bytes.

    Raises:
        RuntimeError: If it ends earlier.
    """
    with subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        written = process.stdout.read(size)
        process.kill()
    if len(written) < size:
        raise RuntimeError(f"{' '.join(command)} ended with {written!r}")


if __name__ == "__main__":
    main("startup", arguments(__doc__, rounds=7), measure)

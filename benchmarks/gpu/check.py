"""Run the parts of the GPU check, each within the time that is left, and print a table.

    python -m benchmarks.gpu [--device cuda] [--budget 420] [--parts right speed profile] [--output FOLDER] [--tiny]

This process imports no PyTorch. A worker runs part after part and writes ``PART.json`` as soon as a part ends; where it
dies or overruns the budget, the parts that it finished are kept, and another worker takes those that are left. The exit
status is 0 if no part failed, else 1; a part skipped for lack of time does not count as a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.lines import table

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"right": 80, "pattention": 60, "training": 60, "decode": 40, "growth": 30, "profile": 40, "study": 300}
"""Parts in the order of their importance, and the seconds that must be left on an H100 for one to be started."""
GROUPS = {"speed": ("pattention", "training", "decode", "growth")}
DEFAULT = ("right", "speed", "profile")
WORKER = (sys.executable, "-m", "benchmarks.gpu")
"""The command of a worker."""
POLL = 1.0
"""Seconds between two looks at a worker."""
RESTART = 3
"""Exit status of a worker that wrote down a failed part and leaves the others to a new process."""
RUNNING = "running"
"""Status of a part that has begun."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; 0 if no part failed."""
    options = arguments().parse_args(args)
    parts = [part for part in PARTS if part in {one for name in options.parts for one in GROUPS.get(name, (name,))}]
    if options.work:
        from benchmarks.gpu.parts import work

        return work(parts, options)
    options.output.mkdir(parents=True, exist_ok=True)
    for part in parts:  # of an earlier run
        (options.output / f"{part}.json").unlink(missing_ok=True)
    deadline = time.time() + options.budget
    with tempfile.TemporaryFile("w+b") as output:
        while left := [part for part in parts if status_of(options.output, part) is None]:
            ended = run_worker(left, deadline, options, output)
            stopped = next((part for part in left if status_of(options.output, part) in (None, RUNNING)), None)
            if ended is None:  # the budget is used up
                for part in left:
                    if (status := status_of(options.output, part)) in (None, RUNNING):
                        mark(options.output, part, "cut off" if status else "skipped")
            elif ended != RESTART and stopped is not None:
                output.seek(0)
                error = f"the worker ended with status {ended}: " + output.read().decode(errors="replace")[-2000:]
                mark(options.output, stopped, "failed", error)
    found = [json.loads((options.output / f"{part}.json").read_text(encoding="utf-8")) for part in parts]
    text = make_table(found)
    (options.output / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    return int(any(one["status"] == "failed" for one in found))


def arguments() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--budget", type=float, default=420, help="seconds; parts that no longer fit are skipped")
    parser.add_argument("--parts", nargs="+", default=DEFAULT, choices=[*PARTS, *GROUPS], help="default: all but study")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to rehearse on a CPU")
    parser.add_argument("--work", type=float, default=0, help=argparse.SUPPRESS)  # the deadline of a worker
    return parser


def run_worker(parts: list[str], deadline: float, options: argparse.Namespace, output: Any) -> int | None:
    """Run parts in a process of their own and show what it prints.

    Returns:
        Its exit status; ``None`` if it was killed at the deadline.
    """
    command = [*WORKER, "--work", str(deadline), "--device", options.device]
    command += ["--output", str(options.output.resolve()), "--parts", *parts, *(["--tiny"] if options.tiny else [])]
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "PYTHONUNBUFFERED": "1"}
    environment.setdefault("HF_HUB_OFFLINE", "1")
    shown = output.tell()
    worker = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    status: int | None = None
    while status is None and time.time() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = worker.wait(POLL)
        shown = show(output, shown)
    if status is None:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    show(output, shown)
    return status


def show(output: Any, shown: int) -> int:
    """Copy what a worker printed since the last look to the standard output."""
    text = os.pread(output.fileno(), 2**20, shown)
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    output.seek(0, os.SEEK_END)
    return shown + len(text)


def write(folder: Path, part: str, found: dict[str, Any]) -> None:
    """Write ``PART.json``, whole or not at all."""
    unfinished = folder / f".{part}.json.part"
    unfinished.write_text(json.dumps({"part": part, **found}, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / f"{part}.json")


def status_of(folder: Path, part: str) -> str | None:
    """The status in ``PART.json``; ``None`` where there is none yet."""
    file = folder / f"{part}.json"
    return json.loads(file.read_text(encoding="utf-8"))["status"] if file.exists() else None


def mark(folder: Path, part: str, status: str, error: str = "") -> None:
    """Set the status of a part, and keep what it found."""
    file = folder / f"{part}.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    write(folder, part, {**found, "status": status, "error": error})


def make_table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each part, then the environment, and for each part its figures and notes."""
    rows = ["| part | status | seconds | |", "|---|---|---:|---|"]
    for one in found:
        error = one.get("error", "").strip().splitlines()
        remark = error[-1][:150] if error else "; ".join(one.get("skipped", []))
        rows.append(f"| {one['part']} | {one['status']} | {one.get('seconds', 0):.0f} | {remark} |")
    blocks = ["\n".join(rows)]
    environment: dict[str, Any] = next((one["environment"] for one in found if "environment" in one), {})
    blocks.append(", ".join(f"{name} {value}" for name, value in environment.items()))
    for one in found:
        if one.get("lines"):
            blocks.append(table(one["part"], one["lines"]))
        if one.get("notes"):
            blocks.append("\n".join(f"- {note}" for note in one["notes"]))
    return "\n\n".join(block for block in blocks if block) + "\n"

"""The GPU check: its command at tiny sizes on the CPU, its budget, and what it keeps of parts that fail."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import check

ROOT = Path(__file__).parents[1]

PARTS = ["right", "pattention", "training", "decode", "growth", "profile"]


def run(folder, *options):
    environment = {**os.environ, "PYTHON": sys.executable}
    words = ["benchmarks/gpu/check.sh", "--device", "cpu", "--tiny", "--output", str(folder), *options]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


def found(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.slow
def test_every_part_runs_at_tiny_sizes_within_the_budget(tmp_path):
    begun = time.monotonic()
    done = run(tmp_path, "--budget", "900")
    assert time.monotonic() - begun < 910
    parts = found(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert {name: one["status"] for name, one in parts.items()} == dict.fromkeys(PARTS, "ok")
    assert all(one["environment"]["torch"] for one in parts.values())
    assert all(line["ours"] > 0 for name in PARTS[1:] for line in parts[name]["lines"])
    assert any("Pattention in bfloat16" in note for note in parts["right"]["notes"])
    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout and all(f"| {name} | ok |" in table for name in PARTS)


@pytest.mark.slow
def test_the_study_trains_from_scratch_and_grown(tmp_path):
    done = run(tmp_path, "--budget", "1800", "--parts", "study")
    assert done.returncode == 0, done.stdout[-3000:]
    scratch, grown = found(tmp_path)["study"]["lines"]
    assert scratch["what"].startswith("from scratch") and grown["what"].startswith("grown")
    assert 0 < scratch["ours"] < 5.6 and 0 < grown["ours"] < 5.6  # log(257) = 5.55 nats


def test_parts_that_do_not_fit_into_the_budget_are_named(tmp_path):
    done = run(tmp_path, "--budget", "0.1", "--parts", "decode", "right")
    assert done.returncode == 0
    assert [one["status"] for one in found(tmp_path).values()] == ["skipped", "skipped"]
    assert "| right | skipped |" in done.stdout and "| decode | skipped |" in done.stdout


WORKER = """
import os, sys, time
sys.path.insert(0, {root!r})
from benchmarks.gpu.check import RESTART, RUNNING, arguments, write

options = arguments().parse_args()
for part in options.parts:
    write(options.output, part, {{"status": RUNNING, "lines": [], "notes": ["kept"]}})
    if part == "right":
        write(options.output, part, {{"status": "failed", "error": "no kernel image"}})
        sys.exit(RESTART)
    if part == "pattention":
        print("illegal memory access", flush=True)
        os._exit(9)
    if part == "growth":
        time.sleep(600)
    write(options.output, part, {{"status": "ok"}})
"""


def test_a_part_that_fails_dies_or_hangs_leaves_the_others(tmp_path, monkeypatch, capsys):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT)))
    monkeypatch.setattr(check, "WORKER", (sys.executable, str(script)))
    chosen = ["--parts", "right", "pattention", "decode", "growth", "profile"]
    assert check.main(["--device", "cpu", "--budget", "20", "--output", str(tmp_path), *chosen]) == 1
    parts = found(tmp_path)
    assert {name: one["status"] for name, one in parts.items()} == {
        "right": "failed",
        "pattention": "failed",
        "decode": "ok",
        "growth": "cut off",
        "profile": "skipped",
    }
    assert "no kernel image" in parts["right"]["error"]
    assert "status 9" in parts["pattention"]["error"] and "illegal memory access" in parts["pattention"]["error"]
    assert parts["pattention"]["notes"] == parts["growth"]["notes"] == ["kept"]
    assert "illegal memory access" in capsys.readouterr().out


def test_a_worker_writes_down_an_error_and_leaves_the_rest_to_another(tmp_path, monkeypatch):
    from benchmarks.gpu import parts

    def fails(findings):
        findings.add(parts.Line("first", "", 1, 1, "ms", 1))
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(parts.RUN, "decode", fails)
    options = check.arguments().parse_args(["--device", "cpu", "--tiny", "--output", str(tmp_path)])
    assert parts.work(["decode", "growth"], options) == check.RESTART
    (one,) = found(tmp_path).values()
    assert one["status"] == "failed" and "no kernel image" in one["error"] and len(one["lines"]) == 1

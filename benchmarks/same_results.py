"""Compare the results of this working tree with those of another commit, bit by bit.

In a temporary git worktree of BASE and in the working tree, every architecture of the preset table is trained in a tiny
size on the CPU: a few optimizer steps, a growth, a checkpoint, and the rest of the fit again in a fresh process, in the
working tree from its own checkpoint and from that of BASE. Losses, validation scores, weights, optimizer state,
generated text, the numbers of ``plan``, and what the other commands write have to be equal.

    python benchmarks/same_results.py origin/main
    python benchmarks/same_results.py HEAD~3 --only 'gpt2*'

The jobs are in ``same_results_jobs.py``. Times, paths, versions and class names are ignored. Exit status 1 if anything
differs.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from same_results_jobs import Found, all_jobs

ROOT = Path(__file__).resolve().parents[1]


def difference(base: Found, own: Found) -> str | None:
    """The first result that differs, and by how much; ``None`` where all are equal to the last bit."""
    for name in [*base, *(name for name in own if name not in base)]:
        if name not in own or name not in base:
            return f"{name}: only in {'BASE' if name in base else 'the working tree'}"
        if message := _differs(base[name], own[name]):
            return f"{name}: {message}"
    return None


def _differs(base: Any, own: Any) -> str | None:
    if not isinstance(base, torch.Tensor) or not isinstance(own, torch.Tensor):
        return None if repr(base) == repr(own) else f"{base!r} -> {own!r}"
    if base.dtype != own.dtype or base.shape != own.shape:
        return f"{base.dtype} {tuple(base.shape)} -> {own.dtype} {tuple(own.shape)}"
    first, second = (one.contiguous().flatten().view(torch.uint8) for one in (base, own))
    if torch.equal(first, second):
        return None
    gap = (own.double() - base.double()).abs()
    return f"{int((gap != 0).sum())} of {gap.numel()} numbers differ by at most {gap.max().item():.3g}"


def work(tree: str, phase: str, output: Path, only: str, shard: int, shards: int) -> None:
    """Run a share of the jobs in this process, with the packages of one tree.

    Args:
        tree: Folder of the tree, which is first in ``PYTHONPATH``.
        phase: ``start``, or ``resume=FOLDER`` with the folder whose checkpoints are resumed.
        output: Folder for the results and the files of the jobs.
        only: Pattern of the jobs.
        shard: Number of the share.
        shards: How many shares there are.
    """
    import callbacks
    import lit_tokenformer

    for package in (callbacks, lit_tokenformer):
        assert Path(str(package.__file__)).is_relative_to(tree), f"{package.__file__} is not in {tree}"
    torch.set_num_threads(1)
    results: dict[str, Found] = {}
    jobs = {name: job for name, job in all_jobs().items() if fnmatch.fnmatch(name, only)}
    for name, job in [*jobs.items()][shard::shards]:
        place = re.sub(r"\W+", "_", name)
        started = time.monotonic()
        try:
            if phase == "start":
                results[name] = job.start(output / place)
            else:
                results[name] = job.resume(output / place, Path(phase.removeprefix("resume=")) / place)
        except Exception as error:
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        print(f"{name}: {time.monotonic() - started:.1f} s", file=sys.stderr)
    torch.save(results, f"{output}-{shard}.pt")


def run_tree(tree: Path, folder: Path, phase: str, output: str, only: str, shards: int, pool: Any) -> list[Any]:
    """Start the processes of a tree; each returns its share of the results."""

    def share(shard: int) -> dict[str, Found]:
        place = folder / output
        own = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        own |= {"XDG_CACHE_HOME": str(folder / f"cache-{tree.name}-{shard}"), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, __file__, "--work", str(tree), phase, str(place), only, str(shard), str(shards)]
        log = Path(f"{place}-{shard}.log")
        with log.open("w") as file:
            done = subprocess.run(command, env=own, cwd=folder, stdout=file, stderr=file)
        if done.returncode:
            raise RuntimeError(f"the jobs of {tree} ended with status {done.returncode}:\n{log.read_text()[-4000:]}")
        return torch.load(f"{place}-{shard}.pt", weights_only=True)

    return [pool.submit(share, shard) for shard in range(shards)]


def gather(shares: list[Any]) -> dict[str, Found]:
    """Join the shares of the results of a tree."""
    return {name: found for share in shares for name, found in share.result().items()}


def verdict(name: str, phases: dict[str, tuple[dict[str, Found], dict[str, Found]]]) -> tuple[bool, str]:
    """Comparison of the results of a job: equal or not, and a line about them."""
    count = 0
    for phase, (base, own) in phases.items():
        if name not in base or name not in own:
            return name not in base, f"only in {'BASE' if name in base else 'the working tree'}"
        trees = {"BASE": base[name], "the working tree": own[name]}
        errors = [f"failed in {tree}: {one['error']}" for tree, one in trees.items() if "error" in one]
        message = errors[0] if errors else difference(base[name], own[name])
        if message:
            return False, f"{phase}: {message}"
        count += len(own[name])
    return count > 0, f"equal ({count} results)" if count else "no results"


def main(base: str, only: str, jobs: int, keep: str | None) -> int:
    """Run all jobs in both trees.

    Returns:
        0 where all results are equal, else 1.
    """
    shards = max(1, jobs // 2)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        folder = Path(keep or scratch).resolve()
        folder.mkdir(parents=True, exist_ok=keep is None)
        tree = Path(scratch).resolve() / "tree"
        git = ("git", "-C", str(ROOT), "worktree")
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), base], check=True)
        try:
            more = (only, shards, pool)
            ours = run_tree(ROOT, folder, "start", "own", *more)
            theirs = run_tree(tree, folder, "start", "base", *more)
            phases = {"trained": (gather(theirs), gather(ours))}
            theirs = run_tree(tree, folder, f"resume={folder / 'base'}", "base-resumed", *more)
            ours = run_tree(ROOT, folder, f"resume={folder / 'own'}", "own-resumed", *more)
            across = run_tree(ROOT, folder, f"resume={folder / 'base'}", "across", *more)
            resumed = gather(theirs)
            phases |= {"resumed": (resumed, gather(ours)), "resumed from BASE": (resumed, gather(across))}
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    names = list({**phases["trained"][0], **phases["trained"][1]})
    verdicts = {name: verdict(name, phases) for name in names}
    width = max(map(len, names), default=0)
    for name, (_, message) in verdicts.items():
        print(f"{name:{width}}  {message}")
    wrong = sum(not equal for equal, _ in verdicts.values())
    print(f"{len(names) - wrong} of {len(names)} jobs equal")
    return int(wrong > 0 or not names)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose files have the names of modules
    if sys.argv[1:2] == ["--work"]:
        tree, phase, output, only, shard, shards = sys.argv[2:]
        work(tree, phase, Path(output), only, int(shard), int(shards))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", metavar="BASE", help="commit whose results are expected")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="run jobs whose name matches, such as 'gpt2*'")
    parser.add_argument("--jobs", metavar="N", type=int, default=2, help="processes at once (default: 2)")
    parser.add_argument("--keep", metavar="FOLDER", help="new folder for checkpoints and logs (default: temporary)")
    sys.exit(main(**vars(parser.parse_args())))

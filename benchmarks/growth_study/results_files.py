"""Result files of the study: fits, curves, settings with versions, tables, pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.growth_study import kept_images
from benchmarks.growth_study.arms import Domain
from benchmarks.growth_study.outcome import Findings, Outcome, report
from benchmarks.plots import search_picture, sizes_picture, study_picture
from lit_tokenformer.comparison.fits import NOT_RUN
from lit_tokenformer.comparison.results import write_csv


def write(folder: Path, name: str, domain: Domain, outcomes: list[Outcome], options: argparse.Namespace) -> None:
    """Write ``NAME_fits.csv``, ``NAME_curves.csv``, ``NAME.md``, ``NAME.json`` and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    run = [one for one in outcomes if one.result["failed"] != NOT_RUN]
    unique = list({(one.phase, one.arm.name, one.arm.share, one.arm.lr, one.seed): one for one in run}.values())
    columns = ("phase", "arm", "seed", "share_of_budget", "tflop", "loss")
    curves = [
        dict(zip(columns, (one.phase, one.arm.name, one.seed, one.arm.share, place, loss), strict=True))
        for one in unique
        if "curve" in one.result and one.phase in ("final", "family")
        for place, loss in zip(one.result["curve"]["tflops"], one.result["curve"]["losses"], strict=True)
    ]
    write_csv(folder / f"{name}_fits.csv", [one.row() for one in unique])
    write_csv(folder / f"{name}_curves.csv", curves)
    environments = [one.result["environment"] for one in unique if "environment" in one.result]
    root = domain.data["init_args"].get("root")  # of images
    record = {
        "command": {"reduced": options.reduced, "seeds": options.seeds, "jobs": options.jobs},
        "domain": {key: value for key, value in vars(domain).items() if key != "data"},
        "data": {key: value for key, value in domain.data["init_args"].items() if key != "root"},
        "corpus": kept_images.summary(root) if root else corpus(unique),
        "environments": [one for i, one in enumerate(environments) if one not in environments[:i]],
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1, default=list) + "\n", encoding="utf-8")
    found = Findings(domain, unique)
    text = report(found)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    study_picture(found, folder / f"{name}.png", f"{name}: loss against all training compute, seeds {options.seeds}")
    sizes_picture(found, folder / f"{name}_sizes.png")
    search_picture(found, folder / f"{name}_search.png")
    print(f"\n{text}")


def corpus(outcomes: Sequence[Outcome]) -> str | None:
    """Find the summary of the text in the output of the fits: documents, bytes and SHA-256."""
    for one in outcomes:
        file = one.folder / "output.txt"
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
            if "sha256" in line:
                return line
    return None

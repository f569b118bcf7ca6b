"""Stronger baselines of the growth study: short image sequences for most of the steps, and Muon in place of AdamW.

    python -m benchmarks.baselines {all,patches,patches_muon,muon,family,family_images,late} OUTPUT [--reduced]
        [--root FOLDER] [--seeds 0 1 2] [--jobs 2] [--logs FOLDER] [--tables FOLDER] [--draw-only]

Data, architectures and budgets C are those of ``benchmarks.growth_study``, and so is the order of the work: every arm
tries the domain's learning rates on a quarter of its budget, then the best of them and half of it on all of its budget
(one seed), then trains with every seed at several budgets. FLOPs of all stages count.

``patches`` (Fashion-MNIST, read from ``--root``): 2, 4 or 6 of 16 patches for 50 to 90 % of the steps, then all. The
six best at a quarter of the budget train on all of it, and the two best of those with every seed. Two controls: all
patches, and the dropping of the best arm at full cost. Masked patches that are computed but excluded from attention and
pooling give the run of dropped patches, so the second control is that run with as many steps as the first, charged with
the FLOPs of all patches. It has the same regularization. ``patches_muon`` is the best of them and both
controls with Muon, every arm and budget at the better of two rates by the mean of all seeds.

``muon`` (text): AdamW and :class:`~lit_tokenformer.optim.MuonWithAuxAdam`, from scratch and grown, with learning-rate
decay over 40 and 65 % of the steps; each keeps the decay that is better at a quarter of the budget, and then halves its
learning rate for as long as that helps. The search also has a model of twice the tokens, with Muon, and half and twice
the batch with both optimizers; a batch size that wins is another control.

``family`` (text) and ``family_images``: three sizes by a ladder of growths, and nested (:mod:`benchmarks.family`).

``late`` (text): one block to eight late in training, at equal steps (:mod:`benchmarks.late_growth`).

``--reduced`` takes the most important arms, one seed, one learning rate and two thirds of C.
Results are written after each phase. Finished fits in ``--logs`` are reused, so an interrupted study resumes. So are
those in the tables of ``--tables``, such as ``benchmarks/results/baselines``: a study continues on another machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import family, late_growth
from benchmarks.growth_study import kept_images
from benchmarks.growth_study.__main__ import Study, best, read_recorded
from benchmarks.growth_study.arms import DOMAINS, Arm, Domain, controls, load_arms
from benchmarks.growth_study.outcome import Curve, Findings, Outcome, Recorded, compute_for, mean_loss, spread
from benchmarks.growth_study.results_files import corpus
from lit_tokenformer.comparison.fits import NOT_RUN, UNFINISHED, Runner
from lit_tokenformer.comparison.results import table, write_csv

KEPT = (2, 4, 6)
"""Patches, of 16, in the short sequences."""
PHASE_SHARES = (0.5, 0.65, 0.75, 0.85, 0.9)
"""Shares of the steps with short sequences."""
SHARES = (0.35, 0.45, 0.55)
"""Budgets of short sequences, as shares of C."""
FULL_COST = ", at full cost"
"""Suffix of arms that are charged with the FLOPs of all patches."""
REDUCED = 2 / 3
"""Budget C of ``--reduced``, as a share of the usual one."""
MUON = {"class_path": "lit_tokenformer.optim.MuonWithAuxAdam"}


def with_few(control: Arm, kept: int, at: float) -> Arm:
    """Keep ``kept`` of 16 patches for a share ``at`` of the steps."""
    name = f"{kept} of 16 patches for {at:.0%}"
    return replace(control, name=name, sizes=2 * control.sizes, at=(at,), dropped=1 - kept / 16, share=SHARES[1])


def at_full_cost(study: Study, arm: Arm, control: Arm, share: float) -> Arm:
    """Give an arm the steps that ``control`` has on a share of C."""
    steps = replace(control, share=share).steps(study.domain)
    return replace(arm, name=arm.name + FULL_COST, share=share, length=steps)


def patches(study: Study) -> Iterator[None]:
    """Train the arms of short sequences; yields after each phase."""
    control = controls(study.domain)[0]
    seeds = study.options.seeds
    if study.options.reduced:
        control = replace(control, lr=study.domain.rates[0])
        few = [with_few(control, 4, at) for at in (0.5, 0.75)]
        masked = [at_full_cost(study, few[1], control, share) for share in (0.5, 1.0)]
        study.train("final", [*few, *(replace(control, share=share) for share in (0.5, 1.0)), *masked], seeds)
        return
    control = train_control(study, control)
    yield
    tried = study.with_rates([with_few(control, kept, at) for kept in KEPT for at in PHASE_SHARES])
    yield
    winners = lowest(study, study.halved(lowest(study, tried, 6)), 2)
    yield
    yield from train_few(study, winners, control)


def patches_muon(study: Study) -> Iterator[None]:
    """Train the best arm of :func:`patches` and its controls with Muon, each at two rates with every seed."""
    adamw = controls(study.domain)[0]
    control = with_muon(adamw)
    few = with_muon(with_few(control, 4, 0.65))
    if study.options.reduced:
        few, *both = (replace(arm, lr=study.domain.rates[0]) for arm in (few, adamw, control))
        both = [replace(arm, share=share) for arm in both for share in (0.5, 1.0)]
        study.train("final", [*both, few], study.options.seeds)
        return
    masked = [at_full_cost(study, few, control, share) for share in (0.5, 1.0)]
    ours, theirs = ([replace(arm, share=share) for share in (1.0, 0.5)] for arm in (control, adamw))
    arms = [*ours, *(replace(few, share=share) for share in SHARES), *masked, *theirs]
    rates = study.domain.rates[0], study.domain.rates[0] / 2
    for arm in arms:
        found = study.train("learning rate", [replace(arm, lr=rate) for rate in rates], study.options.seeds)
        study.train("final", [best(found)], study.options.seeds)
        yield


def with_muon(arm: Arm) -> Arm:
    """Train an arm with Muon."""
    return replace(arm, name=f"{arm.name}, Muon", optimizer=MUON)


def train_control(study: Study, control: Arm) -> Arm:
    """Train the control at half and all of C, each with its own learning rate; return the latter."""
    (control,) = study.halved(study.with_rates([control]))
    (half,) = study.halved([replace(control, share=0.5)], evaluations=2)
    study.train("final", [control, half], study.options.seeds)
    return control


def train_few(study: Study, arms: Sequence[Arm], control: Arm) -> Iterator[None]:
    """Train arms of short sequences at all budgets, and the best one at full cost; yields after each phase."""
    seeds = study.options.seeds
    runs = study.train("final", [replace(arm, share=share) for arm in arms for share in SHARES], seeds)
    yield
    winner = min(arms, key=lambda arm: mean_loss([one for one in runs if one.arm.name == arm.name]))
    (longest,) = study.halved([at_full_cost(study, winner, control, 1.0)])
    shorter = replace(at_full_cost(study, winner, control, 0.5), lr=longest.lr)
    study.train("final", [longest, shorter], seeds)


def lowest(study: Study, arms: Sequence[Arm], count: int) -> list[Arm]:
    """Find the arms with the lowest loss so far, the best first."""
    losses = {
        arm.name: min(one.loss for one in study.outcomes if one.arm.name == arm.name and one.arm.lr == arm.lr)
        for arm in arms
    }
    return sorted(arms, key=lambda arm: losses[arm.name])[:count]


def refined(study: Study, arms: Sequence[Arm]) -> list[Arm]:
    """Halve the learning rate of each arm at the end of its budget for as long as that lowers the loss."""
    found = study.halved(arms)
    halved = [one for one, arm in zip(found, arms, strict=True) if one.lr < arm.lr]
    again = {arm.name: arm for arm in refined(study, halved)} if halved else {}
    return [again.get(arm.name, arm) for arm in found]


def muon(study: Study) -> Iterator[None]:
    """Train the arms of both optimizers; yields after each phase."""
    scratch, grown = controls(study.domain)[0], load_arms(study.domain)["grown"][0]
    arms = [scratch, replace(grown, name="grown")]
    arms += [replace(arm, name=f"{arm.name}, decay over 65 %", schedule={"decay": 0.65}) for arm in arms]
    arms += [with_muon(arm) for arm in arms]
    seeds = study.options.seeds
    if study.options.reduced:
        rate = study.domain.rates[1]
        few = [replace(arm, lr=rate, share=share) for arm in (arms[0], arms[4]) for share in (0.5, 1.0)]
        study.train("final", [*few, replace(arms[5], lr=rate, share=0.65)], seeds)
        return
    found = study.with_rates(arms)
    pairs = [found[first : first + 3 : 2] for first in (0, 1, 4, 5)]  # that differ in the decay
    yield
    better = [lowest(study, pair, 1)[0] for pair in pairs]
    for arm in refined(study, better):
        shares = (0.65, 0.85) if arm.at else (0.5, 1.0)
        study.train("final", [replace(arm, share=share) for share in shares], seeds)
        yield
    tokens = 2 * study.domain.ladder[-1]
    larger = replace(scratch, name=f"from scratch, {tokens} tokens", sizes=({"param_tokens": tokens},))
    study.halved(study.with_rates([with_muon(larger)]))  # is the final size the right one for C?
    yield
    for arm in (better[0], better[2]):
        for factor in (0.5, 2):
            train_with_batch(study, arm, int(factor * study.domain.batch_size))
            yield


def train_with_batch(study: Study, arm: Arm, size: int) -> None:
    """Train an arm with another batch size, further for as long as that lowers the loss.

    It trains on a quarter of the budget, then on all of it, then with every seed on half and all of C.
    """
    domain = copy.deepcopy(study.domain)
    domain.data["init_args"]["batch_size"] = size
    other = Study(study.name, domain, study.options, study.runner, study.recorded)

    def wins(share: float) -> bool:
        runs = [one for one in (*study.outcomes, *other.outcomes) if one.arm.share == share and one.seed == first]
        ours, theirs = ([one.loss for one in runs if one.arm.name == name] for name in (found[0].name, arm.name))
        return min(ours) < min(theirs)

    first, *_ = study.options.seeds
    found = other.with_rates([replace(arm, name=f"{arm.name}, batches of {size}")])
    if wins(arm.share / 4):
        found = refined(other, found)
        if wins(arm.share):
            other.train("final", [replace(found[0], share=share) for share in (0.5, 1.0)], study.options.seeds)
    study.outcomes += other.outcomes


def cost(found: Findings, one: Outcome) -> float:
    """FLOPs of a run in TFLOP, those of Muon's updates included; those of all patches for a control at full cost."""
    if not one.arm.name.endswith(FULL_COST):
        return family.tflops(one, found.domain)
    control = f"{found.final}, Muon" if one.arm.optimizer else found.final
    whole = [family.tflops(run, found.domain) / run.arm.share for run in found.of(control)]
    return one.arm.share * statistics.mean(whole)


def curve_of(found: Findings, name: str) -> Curve:
    """Mean final loss of an arm by its cost, from short runs to long ones."""
    shares = sorted({one.arm.share for one in found.of(name)})
    runs = [found.of(name, share=share) for share in shares]
    return [(statistics.mean(cost(found, one) for one in each), mean_loss(each)) for each in runs]


def report(found: Findings) -> tuple[list[dict[str, Any]], str]:
    """Build one row per arm and budget, with the cost of its loss relative to each control, and notes."""
    whole = statistics.mean(one.tflops for one in found.of(found.final, share=1.0))
    references = [
        name
        for name in found.names("final")
        if len({one.arm.share for one in found.of(name)}) > 1
        and (name.startswith("from scratch") or name.endswith(FULL_COST))
    ]
    rows = []
    for name in found.names("final"):
        for share in sorted({one.arm.share for one in found.of(name)}):
            runs = found.of(name, share=share)
            ratios = {}
            for reference in references:
                needed = [(cost(found, one), compute_for(curve_of(found, reference), one.loss)) for one in runs]
                ratios[f"ratio to {reference}"] = spread([spent / most for spent, most in needed if most], 2)
            rows.append(
                {
                    "arm": name,
                    "FLOPs": f"{cost(found, runs[0]) / whole:.2f} C",
                    "validation loss": spread([one.loss for one in runs], 4),
                    **ratios,
                    "learning rate": f"{runs[0].arm.lr:g}",
                    "seeds": len(runs),
                }
            )
    searched: dict[tuple[str, float, float], list[Outcome]] = {}
    for one in found.outcomes:
        if one.phase == "learning rate":
            searched.setdefault((one.arm.name, one.arm.share, one.arm.lr), []).append(one)
    tried = [
        {
            "arm": name,
            "share of C": share,
            "learning rate": lr,
            "validation loss": spread([one.loss for one in runs], 4),
            "seeds": len(runs),
        }
        for (name, share, lr), runs in searched.items()
    ]
    text = f"C = {whole:.3g} TFLOP. Ratio: FLOPs over those of that control at equal loss; all stages count.\n"
    return rows, "\n".join([text, *(["Search of learning rates:\n", table(tried)] if tried else [])])


STUDIES = {
    "patches": ("images", DOMAINS["images"], patches, report),
    "patches_muon": ("images", DOMAINS["images"], patches_muon, report),
    "muon": ("text", DOMAINS["text"], muon, report),
    "family": ("text", DOMAINS["text"], family.family, family.report),
    "family_images": ("images", DOMAINS["images"], family.family, family.report),
    "late": ("deep text", late_growth.DOMAIN, late_growth.late, late_growth.report),
}
"""Name of the domain, the domain, function and report of each study."""


def write(folder: Path, name: str, study: Study) -> None:
    """Write ``NAME.csv``, ``NAME.json`` and, once the control is trained, ``NAME.md``."""
    run = [one for one in study.outcomes if not str(one.result["failed"]).startswith((NOT_RUN, UNFINISHED))]
    unique = list({(one.phase, one.arm.name, one.arm.share, one.arm.lr, one.seed): one for one in run}.values())
    if not unique:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / f"{name}.csv", [one.row() for one in unique])
    earlier = earlier_record(study.options, name)
    environments = earlier.get("environments", [])
    environments += [one.result["environment"] for one in unique if "environment" in one.result]
    root = study.domain.data["init_args"].get("root")  # of images
    record: dict[str, Any] = {
        "command": {"reduced": study.options.reduced, "seeds": study.options.seeds},
        "domain": settings_of(study.domain),
        "corpus": earlier.get("corpus") or (kept_images.summary(root) if root else corpus(unique)),
        "environments": [one for i, one in enumerate(environments) if one not in environments[:i]],
    }
    found = Findings(study.domain, unique)
    if found.of(found.final, share=1.0):
        record["table"], notes = STUDIES[name][3](found)
        text = f"{table(record['table'])}\n{notes}"
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
        print(f"\n{text}", flush=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1, default=list) + "\n", encoding="utf-8")


def settings_of(domain: Domain) -> dict[str, Any]:
    """Settings of a domain in the form of its JSON, without the data."""
    return json.loads(json.dumps({key: value for key, value in vars(domain).items() if key != "data"}))


def earlier_record(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Read ``NAME.json`` in the folder of earlier tables; empty without one."""
    if not options.tables:
        return {}
    return json.loads(Path(options.tables, f"{name}.json").read_text(encoding="utf-8"))


def main(args: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["all", *STUDIES])
    parser.add_argument("output", help="folder of the results")
    parser.add_argument("--reduced", action="store_true", help="the most important arms, one seed, two thirds of C")
    parser.add_argument("--root", default="data", help="folder with FashionMNIST/raw")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="fits at a time")
    parser.add_argument("--logs", default="lightning_logs/baselines", help="folder of the fits")
    parser.add_argument("--tables", help="folder with the tables of an earlier run, whose fits are not repeated")
    parser.add_argument("--draw-only", action="store_true", help="train nothing; tables of the finished fits")
    options = parser.parse_args(args)
    names = list(STUDIES) if options.study == "all" else [options.study]
    domains = {name: copy.deepcopy(STUDIES[name][1]) for name in names}
    for domain in domains.values():
        if "root" in domain.data["init_args"]:
            domain.data["init_args"]["root"] = options.root
    recorded: dict[str, dict[tuple[Any, ...], Recorded]] = {name: {} for name in names}
    for name in names if options.tables else []:
        file = Path(options.tables, f"{name}.csv")
        if not file.exists() or not file.with_suffix(".json").exists():
            parser.error(f"--tables: {options.tables} has no {file.name} with its .json")
        if earlier_record(options, name)["domain"] != settings_of(domains[name]):
            parser.error(f"--tables: the domain of {file.with_suffix('.json')} has other settings than this version's")
        recorded[name] = read_recorded(file)
    if options.reduced:
        options.seeds = options.seeds[:1]
        domains = {name: replace(domain, budget=REDUCED * domain.budget) for name, domain in domains.items()}
    for name, domain in domains.items():
        with Runner(Path(options.logs), options.jobs, options.draw_only) as runner:
            study = Study(STUDIES[name][0], domain, options, runner, recorded[name])
            for _ in STUDIES[name][2](study):
                write(Path(options.output), name, study)
        write(Path(options.output), name, study)
    return 0


if __name__ == "__main__":
    sys.exit(main())

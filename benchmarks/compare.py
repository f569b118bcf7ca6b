"""Does TokenFormer pay, on my data, against what else I could train? Trains any list of architectures on the same data
with the same optimizer, schedule and budget, with several seeds; writes a table (``OUTPUT.md``, ``.csv``, ``.json``)
and a picture of validation loss against training FLOPs (``OUTPUT.png``).

    python benchmarks/compare.py CONFIG OUTPUT --arms ARM [ARM ...] [--budget steps | flops | wall=SECONDS]
        [--match parameters | flops] [--to ARM] [--seeds 0 1 2] [--lrs RATE [RATE ...]] [--set KEY=VALUE ...]
        [--change KEY.KEY=VALUE ...]

CONFIG is any YAML of an image classifier, a causal or a masked language model, or the name of one that ships. Its model
is left out but for its overrides, which hold for all arms, as ``--set`` does. ``--change`` replaces
anything else in it, such as ``data.init_args.batch_size=4``. All is trained on one device.

An ARM is a preset and what replaces fields of its architecture, in quotes: ``'gpt2_small projection=pattention'``. Its
own words are ``label='a name'``, ``lr=1e-3`` and ``grow``: alone for the growth schedule of CONFIG, or
``grow={0.3: 64, 0.6: matched}``, totals of parameter tokens by the share of the steps (or by the step of CONFIG's own
length) where it grows to them; ``matched`` are those that ``--match`` finds.

``--match`` gives all arms with Pattention layers, unless they name ``param_tokens`` themselves, those at which their
blocks cost what the blocks of ``--to`` cost (default: the first arm). ``--budget steps=N`` trains all arms for N steps
(default: those of CONFIG); ``flops=F`` for as many steps as F training FLOPs allow (default: those of ``--to``);
``wall=S`` for as many as fit into S seconds by a short measurement at each size, validation not counted. Warm-up, decay
and growths keep their share of the run, so every schedule ends where the run does.

Each fit is a process of its own that runs the project's command line. One that is found in ``--logs`` with the same
settings is not repeated, so an interrupted comparison goes on where it stood. Needs matplotlib
(``pip install -e '.[dev]'``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from comparison_arms import Setting, parse_arm, parse_settings
from comparison_fits import Runner
from comparison_plan import plan_arms, set_rates, set_steps, told_plan
from comparison_results import write

from lit_tokenformer.cli.main import shipped_configs


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Plans, trains, and writes table and picture.

    Raises:
        ValueError: In one line, before anything is trained.
    """
    path = Path(options.config)
    path = path if path.exists() else shipped_configs().get(options.config, path)
    if not path.exists():
        raise ValueError(f"CONFIG: {options.config} is neither a file nor one of {', '.join(shipped_configs())}")
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in parse_settings(options.change, "--change").items():
        place, last = given, key.split(".")[-1]
        for part in key.split(".")[:-1]:
            place = place.setdefault(part, {})
        place[last] = value
    arms = [parse_arm(text) for text in options.arms]
    setting = Setting(given, parse_settings(options.set, "--set"), options.evaluations)
    planned = plan_arms(setting, arms, options.match, options.to)
    reading = options.draw_only or options.plan_only
    if not reading:
        setting.data.prepare_data()  # once, and not by several fits at a time
    with Runner(Path(options.logs), options.jobs, reading) as runner:
        set_steps(setting, planned, options.budget, options.to, runner)
        print(told_plan(setting, planned), flush=True)
        if options.plan_only:
            return []
        search = options.search_steps or max(2, max(one.steps for one in planned) // 4)
        set_rates(setting, planned, options.lrs, search, options.seeds[0], runner)
        ready = [one for one in planned if one.steps and (one.lr is not None or not options.lrs)]
        fits = {
            (one.arm.label, seed): runner.fit(one, f"seed {seed}", setting.fit_config(one, one.steps, seed, one.lr))
            for seed in options.seeds
            for one in ready
        }
        runner.run(list(fits.values()))
    return write(setting, planned, fits, options)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; 2 after an error in what the user gave, which is told in one line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("config")
    parser.add_argument("output", help="path of the results without an extension")
    parser.add_argument("--arms", nargs="+", required=True, help="presets with overrides")
    parser.add_argument("--budget", default="steps", help="steps[=N], flops[=F] or wall=SECONDS")
    parser.add_argument("--match", choices=("parameters", "flops"), help="what parameter tokens are chosen by")
    parser.add_argument("--to", help="label or preset that sizes and budget refer to; default: the first arm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lrs", type=float, nargs="+", default=[], help="learning rates that each arm tries")
    parser.add_argument("--search-steps", type=int, help="steps of each try; default: a quarter of the longest fit")
    parser.add_argument("--set", nargs="+", default=[], help="KEY=VALUE of the architecture, for all arms")
    parser.add_argument(
        "--change", nargs="+", default=[], help="KEY.KEY=VALUE of CONFIG, as data.init_args.batch_size=4"
    )
    parser.add_argument("--evaluations", type=int, default=10, help="validations in each fit")
    parser.add_argument("--logs", default="lightning_logs/compare", help="folder of the fits")
    parser.add_argument("--jobs", type=int, default=1, help="fits at a time")
    parser.add_argument("--plan-only", action="store_true", help="tell what would be trained, and stop")
    parser.add_argument("--draw-only", action="store_true", help="train nothing; table and picture of what is there")
    options = parser.parse_args(args)
    try:
        for name in ("evaluations", "jobs"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name}: expected at least 1, got {getattr(options, name)}")
        rows = compare(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(bool(rows) and all(one["loss"] is None for one in rows))


if __name__ == "__main__":
    sys.exit(main())

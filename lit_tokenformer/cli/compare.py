"""The ``compare`` command: presets on the same data, optimizer, schedule and budget."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Literal

import yaml

from lit_tokenformer.cli.parser import load_settings
from lit_tokenformer.errors import UserError


def compare_presets(
    config: list[str],
    presets: list[str | dict[str, Any]] | str,
    output: str,
    seeds: int = 1,
    budget: str = "steps",
    match: Literal["parameters", "flops"] | None = "parameters",
    reference: str | None = None,
    overrides: dict[str, Any] = {},  # noqa: B006 (never changed)
    lrs: list[float] = [],  # noqa: B006
    search_steps: int | None = None,
    evaluations: int = 10,
    jobs: int = 1,
    plan_only: bool = False,
    draw_only: bool = False,
) -> None:
    """Train presets on the same data, optimizer, schedule and budget, and write a table and a plot of the results.

    The output folder contains ``comparison.md``, ``.csv`` and ``.json`` (with versions, settings and curves),
    ``comparison.png`` (validation loss against training FLOPs; needs matplotlib) and the folder ``fits``. Each fit is
    a separate process that runs ``lit-tokenformer fit`` on one device. A finished fit with the same settings is reused,
    so an interrupted comparison resumes.

    Args:
        config: Config of an image classifier, a causal or a masked language model: a YAML file or the name of a shipped
            config (repeatable; later ones override). Its preset is ignored.
        presets: Presets to compare: a list of names, or of mappings {preset: NAME, label: TEXT, overrides: {FIELD:
            VALUE}, lr: RATE, grow: true or {SHARE: TOKENS}}, or a YAML file with such a list. "grow: true" uses the
            growth schedule of the config; {0.3: 64, 0.6: matched} grows to these totals of parameter tokens at these
            shares of the steps, where "matched" is the result of "match"; {0.3: {depth: 12}} inserts blocks. A mapping
            can also contain "growth" (settings of the growth callback), "patch_drop" ({SHARE: RATE}), "optimizer",
            "schedule" (of the learning rate, lengths as shares) and "callbacks" (in addition to those of the config).
        output: Output folder.
        seeds: Number of seeds per preset: 0, 1, ...
        budget: Budget per fit: "steps=N" optimizer steps (default N: those of the config), "flops=F" training FLOPs
            (default F: those of the reference), or "wall=S" seconds, measured briefly at each size. Warm-up, decay
            and growths keep their share of the run.
        match: Match the "parameters" or "flops" of the reference's blocks by the number of parameter tokens, unless a
            preset overrides "param_tokens"; null keeps the presets' own.
        reference: Label or preset to match; defaults to the first one.
        overrides: Architecture overrides for all presets.
        lrs: Learning rates to search for each preset without "lr"; defaults to that of the config.
        search_steps: Optimizer steps per trial of the search; defaults to a quarter of the longest fit.
        evaluations: Number of validations per fit.
        jobs: Number of parallel fits.
        plan_only: Print sizes, steps and FLOPs without training.
        draw_only: Write the table and the plot of the finished fits without training.

    Raises:
        UserError: If a setting is invalid, before any training, or if every fit fails.
    """
    settings = dict(locals())
    from lit_tokenformer.comparison.arms import parse_arm
    from lit_tokenformer.comparison.fits import Runner
    from lit_tokenformer.comparison.plan import describe_plan, plan_arms, set_rates, set_steps
    from lit_tokenformer.comparison.results import write
    from lit_tokenformer.comparison.setting import Setting

    for name, least in {"seeds": 1, "evaluations": 1, "jobs": 1, "search_steps": 1}.items():
        if settings[name] is not None and settings[name] < least:
            raise UserError(f"{name}: expected at least {least}, got {settings[name]}")
    if not all(rate > 0 for rate in lrs):
        raise UserError(f"lrs: expected positive numbers, got {lrs}")
    folder = next(one for one in (Path(output), *Path(output).absolute().parents) if one.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"output: cannot write to {output}: {folder} is not a writable folder")
    if not config:
        raise UserError("--config: expected a config with model and data")
    if isinstance(presets, str):
        presets = _read(presets, "presets") if Path(presets).is_file() else [presets]
    if not isinstance(presets, list) or not presets:
        raise UserError(f"presets: expected a list of at least one, got {presets!r}")
    given: dict[str, Any] = {}
    for path in config:
        given = _merged(given, _read(path, "--config"))
    setting = Setting(given, overrides, evaluations)
    planned = plan_arms(setting, [parse_arm(entry) for entry in presets], match, reference)
    reading = draw_only or plan_only
    if not reading:
        setting.data.prepare_data()  # once, before parallel fits
    with Runner(Path(output) / "fits", jobs, reading) as runner:
        set_steps(setting, planned, budget, reference, runner)
        print(describe_plan(setting, planned), flush=True)
        if plan_only:
            return
        search = search_steps or max(2, max(one.steps for one in planned) // 4)
        set_rates(setting, planned, lrs, search, 0, runner)
        ready = [one for one in planned if one.steps and (one.lr is not None or not lrs)]
        fits = {
            (one.arm.label, seed): runner.fit(
                one.arm.label, f"seed {seed}", setting.fit_config(one, one.steps, seed, one.lr)
            )
            for seed in range(seeds)
            for one in ready
        }
        runner.run(list(fits.values()))
    rows = write(setting, planned, fits, settings)
    if all(one["loss"] is None for one in rows):
        raise UserError(f"presets: every fit failed; see {output}")


def _read(path: str, setting: str) -> Any:
    """Read a YAML file."""
    try:
        return load_settings(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{setting}: cannot read {path}: {' '.join(str(error).split())}") from None


def _merged(one: Any, other: Any) -> Any:
    """Merge two configs; lists and values of the second replace those of the first."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one | {key: _merged(one.get(key), value) for key, value in other.items()}
    return other


def serve_fits() -> None:
    """Run ``fit`` with the ``given.yaml`` in each folder read from the standard input, one per line.

    Every fit is a fork of this process, so slow packages are imported once. Its output is written to ``output.txt``,
    and its exit status to the standard output. A fit ends with the command that asked for it.
    """
    from lit_tokenformer.cli.main import main

    command = os.getppid()
    for line in sys.stdin:
        folder = line.rstrip("\n")
        child = os.fork()
        if not child:
            status = 1
            try:
                with open(f"{folder}/output.txt", "w", encoding="utf-8") as output:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                    status = main(["fit", "--config", f"{folder}/given.yaml", "--trainer.default_root_dir", folder])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if os.getppid() != command:
                os.kill(child, signal.SIGTERM)
                return
            time.sleep(0.1)
        print(ended[1], flush=True)

"""The documents: the site builds, links work, and every command, Python block and config in them runs or parses."""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Trainer

from callbacks import ParameterGrowthCallback
from lit_tokenformer import data, models, registry, tasks
from lit_tokenformer.cli.main import COMMANDS, TEXTS, TokenformerCLI
from lit_tokenformer.cli.parser import shipped_configs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
DOCUMENTS = [
    *PAGES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
NOT_RUN = "<!-- not run: "
"""Mark before a block of Python that needs files, services or minutes: it is compiled, and its imports run."""


def of(path):
    return str(path.relative_to(ROOT))


def blocks(path, *languages):
    """Blocks of code: the line before each, and its text without indentation."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"--8<--\n(.*)\n--8<--", lambda match: (ROOT / match[1]).read_text().rstrip(), text)
    pattern = r"(?:^|\n)([^\n]*)\n+( *)```(\w+)\n(.*?)\n\2```"
    for before, indent, language, code in re.findall(pattern, text, flags=re.DOTALL):
        if language in languages:
            yield before, re.sub(rf"(?m)^{indent}", "", code)


def prose(path):
    """The text without blocks of code."""
    return re.sub(r"(?ms)^ *```.*?^ *```", "", path.read_text(encoding="utf-8"))


def slugs(path):
    """Anchors of the headings, as mkdocs and code hosts form them."""
    found = []
    for title in re.findall(r"(?m)^#+ (.*)$", prose(path)):
        title = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title)
        found.append(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()))
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=of)
def test_links_point_to_files_and_headings(path):
    text = prose(path)
    links = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'(?:src|srcset)="([^"]+)"', text)]
    for link in links:
        if re.match(r"https?:|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{of(path)}: {link}"
        if path.is_relative_to(DOCS) and file:
            assert target.is_file(), f"{of(path)}: {link} is a folder, which the site cannot show"
        if anchor:
            assert anchor in slugs(target), f"{of(path)}: {link}"


def test_each_page_is_in_the_navigation():
    def pages(part):
        if isinstance(part, str):
            return [part]
        return [page for one in (part.values() if isinstance(part, dict) else part) for page in pages(one)]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages(nav)) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_without_network(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason=f"{package}: not installed (pip install -e '.[docs]')")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("index.html")}
    for name, page in pages.items():
        loaded = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]+)', page)
        assert not loaded, f"{name} loads {loaded}"
    commands = pages["command_line/index.html"]
    assert all(f"lit-tokenformer [options] {name}" in commands for name in ("fit", *COMMANDS.keys() - {"list"}))
    assert "ParameterGrowthCallback" in pages["api/callbacks/index.html"]
    assert not any(re.search(r":(class|func|mod|meth):", page) for name, page in pages.items() if "api/" in name)


@pytest.mark.parametrize("path", [path for path in PAGES if list(blocks(path, "python"))], ids=of)
def test_python_runs(path, tmp_path, monkeypatch, text_cache, few_digits):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    names = {"__name__": "document"}  # examples do not start
    for one in vars(registry).values():
        if isinstance(one, registry.Registry):
            monkeypatch.setattr(one, "entries", dict(one.entries))
    for before, code in blocks(path, "python"):
        tree = ast.parse(code)
        if before.startswith(NOT_RUN):
            tree.body = [one for one in tree.body if isinstance(one, (ast.Import, ast.ImportFrom))]
        exec(compile(tree, of(path), "exec"), names)


@pytest.mark.parametrize("path", [path for path in PAGES if list(blocks(path, "yaml"))], ids=of)
def test_configs_name_classes_and_their_arguments(path):
    def check(part):
        if isinstance(part, dict) and "class_path" in part:
            module, _, name = part["class_path"].rpartition(".")
            known = inspect.signature(getattr(importlib.import_module(module), name)).parameters
            flat = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
            assert flat or set(part.get("init_args", {})) <= set(known), part
        for one in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            check(one)

    for _, code in blocks(path, "yaml"):
        check(yaml.safe_load(code))


def commands():
    """Every command of lit-tokenformer in the documents, once."""
    found = {}
    for path in DOCUMENTS:
        for _, code in blocks(path, "bash"):
            code = re.sub(r"\\\n\s*", " ", code)
            for line in code.splitlines():
                line = re.sub(r"\s#.*$", "", line)
                for match in re.finditer(r"(?:lit-tokenformer|python -m lit_tokenformer) (.+?)(?=&&|$)", line):
                    found[match[1].strip()] = None
    return found


OPTIONS = "config ckpt_path run_name init_from init_ema init_resize_vocab seed_everything plugins images output budget"


def known_options(command):
    names = [*OPTIONS.split(), "model", "data", "batch_size", "help", "help-all", "print_config"]
    if command in COMMANDS:
        names = [*inspect.signature(COMMANDS[command]).parameters, *TEXTS]
    return {f"--{name}" for name in names}


def arguments(kinds):
    """Names of the arguments of classes and of their base classes."""
    names = set()
    for kind in kinds:
        for one in inspect.getmro(kind):
            with contextlib.suppress(ValueError, TypeError):
                names |= set(inspect.signature(one).parameters)
    return names


MODEL = arguments(getattr(tasks, name) for name in tasks.__all__)
DATA = arguments(getattr(data, name) for name in data.__all__) | {"hf_name", "tokenizer"}
FIELDS = set(inspect.signature(models.TokenformerConfig).parameters)
CONFIGS = {"CONFIG", "base.yaml", "joint.yaml"} | set(shipped_configs())


@pytest.mark.parametrize("command", commands(), ids=lambda one: one[:60])
def test_commands_exist_with_their_options_and_configs(command):
    given = shlex.split(re.sub(r"[$]\{?\w+\}?", "VALUE", command))
    if given[0] in ("--version", "--help", "COMMAND"):
        return
    assert given[0] in {*COMMANDS, *TokenformerCLI.subcommands(), "plan"}
    known = known_options(given[0])
    for i, argument in enumerate(given[1:], start=1):
        option = argument.partition("=")[0].rstrip("+")
        if not option.startswith("--"):
            continue
        part, _, rest = option.removeprefix("--").partition(".")
        name = rest.partition(".")[0]
        if part == "trainer" and name:
            assert name in inspect.signature(Trainer).parameters, option
        elif part == "model" and name:
            assert name == "help" or name in MODEL or "--plugins" in given, option
            assert name != "overrides" or rest.partition(".")[2] in FIELDS, option
        elif part == "growth":
            assert name in inspect.signature(ParameterGrowthCallback).parameters, option
        elif part == "data" and name:
            assert name == "help" or name in DATA, option
        else:
            assert option in known, f"{option}: {sorted(known)}"
        if option == "--config" and "=" not in argument:
            config = given[i + 1]
            assert config in CONFIGS or (ROOT / config).exists(), config


@pytest.mark.parametrize("path", DOCUMENTS, ids=of)
def test_scripts_exist(path):
    text = re.sub(r"[0-9a-f]{7}:\S+", "", path.read_text(encoding="utf-8"))  # a script at a commit
    for module in re.findall(r"python -m ((?:benchmarks|examples)[a-z0-9_.]*)", text):
        assert module.endswith("speed.") or importlib.util.find_spec(module.rstrip(".")), module
    for file in re.findall(
        r"python ([\w/]+\.py)|((?:benchmarks|examples|\.ci)/[a-z_/]+\.(?:py|sh|json|yaml|png))", text
    ):
        name = next(filter(None, file))
        assert (ROOT / name).exists(), name


def test_the_first_screen_is_short_and_has_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert "pip install -e . && python -m lit_tokenformer fit --config configs/vit_small.yaml\n" in text
    assert "pip install -e '.[test]' && pytest\n" in text

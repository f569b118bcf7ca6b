"""Who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lit_tokenformer"

FORBIDDEN = {  # what may not be imported, by the place that may not
    "errors.py": ["torch", "timm", "lightning", "lit_tokenformer", "callbacks"],
    "models": ["lightning", "callbacks", "torchvision", "torchmetrics", "lit_tokenformer.[^em]"],
    "token_growth.py": ["lightning", "callbacks", "lit_tokenformer.[^emp]"],
    "depth_growth.py": ["lightning", "callbacks", "lit_tokenformer.[^emt]", "lit_tokenformer.tasks"],
    "optimizer_growth.py": ["lightning", "callbacks", "lit_tokenformer.[^ept]", "lit_tokenformer.tasks"],
    "growth.py": ["lightning", "callbacks", "lit_tokenformer.[^dmot]", "lit_tokenformer.(data|tasks)"],
    "parallel.py": ["lightning", "callbacks", "lit_tokenformer.[^em]"],
    "compute.py": ["lightning", "callbacks", "lit_tokenformer.[^em]"],
    "data": ["callbacks", "lit_tokenformer.[^aed]"],
    "tasks": ["callbacks", "lit_tokenformer.data", "lit_tokenformer.interop", "lit_tokenformer.cli"],
    "interop": ["callbacks", "lightning", "lit_tokenformer.tasks", "lit_tokenformer.data", "lit_tokenformer.cli"],
    "checkpoints.py": ["callbacks", "lit_tokenformer.cli", "lit_tokenformer.commands", "lit_tokenformer.data"],
    "text_generation.py": ["callbacks", "lit_tokenformer.cli", "lit_tokenformer.commands"],
    "evaluation.py": ["callbacks", "lit_tokenformer.cli", "lit_tokenformer.commands"],
    "checkpoint_io.py": ["callbacks", "lit_tokenformer.cli", "lit_tokenformer.commands", "lit_tokenformer.data"],
    "trainer.py": ["callbacks", "lit_tokenformer.cli", "lit_tokenformer.commands", "lit_tokenformer.data"],
    "../callbacks": ["lit_tokenformer.tasks", "lit_tokenformer.data", "lit_tokenformer.interop", "lit_tokenformer.cli"],
}


def sources(place):
    """The files of a room; an empty list where it is not built."""
    path = PACKAGE / place
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def imported(path):
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module


def stands_in(name, prefix):
    """Whether the dotted ``name`` is ``prefix`` or lies in it; ``[^em]`` stands for any first letter but these."""
    if "[^" not in prefix:
        return name == prefix or name.startswith(prefix + ".")
    stem, letters = prefix.removesuffix("]").split("[^")
    return name.startswith(stem) and len(name) > len(stem) and name[len(stem)] not in letters


@pytest.mark.parametrize("place", FORBIDDEN)
def test_imports_go_one_way(place):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(place)
        for name in imported(path.resolve())
        for prefix in FORBIDDEN[place]
        if stands_in(name, prefix)
    ]
    assert not wrong


def test_the_rooms_that_are_checked_exist():
    for place in ("models", "growth.py", "compute.py", "data", "tasks", "interop", "../callbacks"):
        assert sources(place)


def test_lightning_has_one_name():
    """``pytorch_lightning`` and ``lightning.pytorch`` never mix."""
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        assert not any(stands_in(name, "pytorch_lightning") for name in imported(path)), path


def test_models_and_growth_load_without_lightning():
    modules = "lit_tokenformer, lit_tokenformer.models, lit_tokenformer.growth, lit_tokenformer.compute"
    code = f"import sys, {modules}; print([m for m in sys.modules if m.split('.')[0].endswith('lightning')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_no_branch_on_the_name_of_an_architecture():
    names = {"architecture", "arch", "preset", "model_name"}
    for path in sources("models"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.If):
                found = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
                found |= {n.attr for n in ast.walk(node.test) if isinstance(n, ast.Attribute)}
                assert not found & names, f"{path.name}:{node.lineno}"

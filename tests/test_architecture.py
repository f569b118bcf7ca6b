"""Who may import whom."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lit_tokenformer"


def imported(path):
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def test_imports_follow_the_layers():
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_every_module_is_in_a_layer():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(re.findall(r"[\w.]+", setup["importlinter:contract:layers"]["layers"]))
    found = {path.stem if path.suffix else path.name for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    found -= {"__init__", "__pycache__", "configs"}
    assert listed == {f"lit_tokenformer.{name}" for name in found} | {"callbacks"}


def test_lightning_has_one_name():
    """``pytorch_lightning`` and ``lightning.pytorch`` never mix."""
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        assert not any(name.split(".")[0] == "pytorch_lightning" for name in imported(path)), path


def test_models_and_growth_load_without_lightning():
    modules = "lit_tokenformer, lit_tokenformer.models, lit_tokenformer.growth, lit_tokenformer.cost"
    code = f"import sys, {modules}; print([m for m in sys.modules if m.split('.')[0].endswith('lightning')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_no_branch_on_the_name_of_an_architecture():
    names = {"architecture", "arch", "preset", "model_name"}
    for path in (PACKAGE / "models").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.If):
                found = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
                found |= {n.attr for n in ast.walk(node.test) if isinstance(n, ast.Attribute)}
                assert not found & names, f"{path.name}:{node.lineno}"

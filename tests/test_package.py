"""What ships: packages, notebooks, and what the README says."""

import configparser
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_setup_lists_every_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    found = {
        str(init.parent.relative_to(ROOT)).replace("/", ".")
        for room in ("lit_tokenformer", "callbacks")
        for init in (ROOT / room).rglob("__init__.py")
    }
    assert listed == found | {"lit_tokenformer.configs"}


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run_and_are_stored_without_output(notebook, few_digits):
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    exec("\n".join("".join(cell["source"]) for cell in cells), {})


def test_python_in_the_readme_runs():
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(block, {})


def test_configs_and_files_that_the_readme_names_exist():
    for path in re.findall(r"\]\(((?!http)[\w./]+)\)|(configs/[\w.]+yaml)", README):
        assert (ROOT / next(filter(None, path))).exists(), path
    for name in re.findall(r"--config (\w+)", README):
        assert name in ("configs", "CONFIG", "base") or (ROOT / "configs" / f"{name}.yaml").exists()


def test_scripts_that_the_documents_name_exist():
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "benchmarks").rglob("README.md")):
        text = re.sub(r"[0-9a-f]{7}:\S+", "", file.read_text(encoding="utf-8"))  # a script at a commit
        for module in re.findall(r"python -m (benchmarks[a-z_.]*)", text):
            assert importlib.util.find_spec(module.rstrip(".")), f"{file}: {module}"
        for path in re.findall(r"python ([\w/]+\.py)|(benchmarks/[\w/]+\.\w+)", text):
            assert (ROOT / next(filter(None, path))).exists(), f"{file}: {path}"


@pytest.mark.slow
def test_a_wheel_holds_code_and_configs(tmp_path):
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    import shutil

    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", "*.egg-info", "lightning_logs", ".*_cache"))
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    import zipfile

    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "lit_tokenformer/configs/vit_small.yaml",
        "lit_tokenformer/inspection/report.html",
        "callbacks/parameter_growth.py",
        "lit_tokenformer/cli/main.py",
    ):
        assert name in names
    assert not any(name.startswith(("tests/", "configs/", "benchmarks/")) for name in names)

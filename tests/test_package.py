"""What ships: packages, notebooks and the wheel."""

import configparser
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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
        "callbacks/parameter_growth.py",
        "lit_tokenformer/cli/main.py",
    ):
        assert name in names
    assert not any(name.startswith(("tests/", "configs/", "benchmarks/")) for name in names)

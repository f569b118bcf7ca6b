"""What ships: packages, notebooks and the wheel."""

import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_tokenformer import __version__

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


def test_one_version_everywhere():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"## {__version__} - {citation['date-released']}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert setup["metadata"]["version"] == "attr: lit_tokenformer.version.__version__"
    recipe = (ROOT / "conda" / "meta.yaml").read_text()
    assert f'version = "{__version__}"' in recipe
    needed = {re.match(r"[\w-]+", line)[0] for line in setup["options"]["install_requires"].split("\n") if line}
    listed = set(re.findall(r"(?m)^    - ([\w-]+)", recipe.partition("  run:")[2]))
    assert {{"torch": "pytorch"}.get(name, name) for name in needed} <= listed


def test_workflows_call_scripts_that_exist():
    for path in (*(ROOT / ".github").rglob("*.yml"), *(ROOT / ".github").rglob("*.yaml")):
        text = path.read_text()
        assert isinstance(yaml.safe_load(text), dict), path
        for script in re.findall(r"\.ci/\w+", text):
            assert os.access(ROOT / script, os.X_OK), f"{path.name}: {script}"


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run_and_are_stored_with_outputs(notebook, few_digits):
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(cell["execution_count"] for cell in cells)
    assert not any(output["output_type"] == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not re.search(r"/(tmp|home|root|work)/", json.dumps(outputs))
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
        "lit_tokenformer/inspection/report.html",
        "callbacks/parameter_growth.py",
        "lit_tokenformer/cli/main.py",
    ):
        assert name in names
    assert not any(name.startswith(("tests/", "configs/", "benchmarks/")) for name in names)

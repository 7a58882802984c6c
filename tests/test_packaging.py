"""The wheel: exactly the package, with its data, and a console script that works from it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import channelfold
from channelfold import models

ROOT = Path(__file__).parents[1]
NEEDED = 77  # setuptools; pyproject.toml says so as well


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of this checkout, built with the setuptools at hand and without the network."""
    try:
        if int(importlib.metadata.version("setuptools").partition(".")[0]) < NEEDED:
            pytest.skip(f"needs setuptools {NEEDED} or later")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "venv")
    source = shutil.copytree(ROOT, folder / "any-name", symlinks=True, ignore=ignore)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", folder)
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel's contents and its script, as pip lays them out."""
    target = tmp_path_factory.mktemp("installed")
    options = ("--no-deps", "--no-index", "--quiet", "--no-warn-script-location", "--target", target)
    subprocess.run([sys.executable, "-m", "pip", "install", *options, wheel], check=True, timeout=120)
    return target


def test_the_wheel_is_exactly_the_package(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    code = {f"channelfold/{path.name}" for path in ROOT.glob("*.py")}
    for package in ("passes", "runtime", "models"):
        code |= {f"channelfold/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / package).rglob("*.py")}
    data = {f"channelfold/models/{name}" for model in models.MODELS.values() for name in model.files}
    metadata = f"channelfold-{channelfold.__version__}.dist-info"
    data |= {f"channelfold/runtime/report/assets/{name}" for name in ("page.css", "page.js", "report.schema.json")}
    assert {name for name in names if not name.startswith(metadata)} == code | data
    assert f"{metadata}/licenses/LICENSE" in names


def test_only_the_command_line_lies_at_the_top():
    """Every module at the root ships in the wheel."""
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py"}


@pytest.mark.parametrize("command", [["bin/channelfold"], [sys.executable, "-m", "channelfold"]], ids=["script", "-m"])
def test_the_installed_command_runs_from_the_wheel(command, installed, tmp_path):
    command = [str(installed / command[0]), *command[1:]] if command[0].startswith("bin") else command
    environment = os.environ | {"PYTHONPATH": str(installed)}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([*command, "inspect", models.path("digits_cnn.onnx"), "--debug"], **run)
    assert (done.returncode, done.stderr) == (0, "")
    assert "5 of 7 linear nodes" in done.stdout
    where = subprocess.run([sys.executable, "-c", "import channelfold; print(channelfold.__file__)"], **run)
    assert where.stdout.startswith(str(installed))


def test_the_shipped_models_are_found_in_the_wheel(installed, tmp_path):
    files = [name for model in models.MODELS.values() for name in model.files]
    code = f"from channelfold import models; print(*(models.path(name).stat().st_size for name in {files}))"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    found = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True)
    assert found.split() == [str(models.path(name).stat().st_size) for name in files]


def test_every_import_of_the_package_is_declared():
    """Third-party modules that the package imports, against the dependencies and extras of pyproject.toml."""
    declared = {
        "click", "google", "ml_dtypes", "numpy", "onnx", "onnx_graphsurgeon", "onnxruntime", "polygraphy", "rich",
        "tensorrt", "tensorrt_rtx",
    }  # fmt: skip
    found = set()
    for path in [*ROOT.glob("*.py"), *(ROOT / "passes").glob("*.py"), *(ROOT / "runtime").glob("*.py")]:
        found |= set(re.findall(r"^ *(?:import|from) (\w+)", path.read_text(), re.MULTILINE))
    assert found - declared - set(sys.stdlib_module_names) == {"channelfold"}


def test_the_link_for_type_checkers_is_there():
    assert (ROOT / "typings" / "channelfold").resolve() == ROOT

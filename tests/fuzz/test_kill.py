"""Commands killed at the events at which they change files: nothing is lost, and the next run leaves nothing behind."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest

from channelfold.runtime.errors import ChannelfoldError
from channelfold.runtime.io import files
from channelfold.tests.fuzz.harness import Case, budget, contents, run_all, started
from channelfold.tests.fuzz.seeds import seeds

RECIPE = '[[pass]]\nname = "fold-constants"\n[[pass]]\nname = "fold-affine"\n[[pass]]\nname = "quantize"\n'
COMMANDS: dict[str, list[str]] = {
    "fold": ["fold", "{in}/model.onnx", "-o", "{out}/m.onnx"],
    "smooth": ["smooth", "{in}/model.onnx", "-o", "{out}/m.onnx", "--calibration", "{in}/c.npz"],
    "quantize": ["quantize", "{in}/model.onnx", "-o", "{out}/m.onnx", "--calibration", "{in}/s.py", "--allow-script"],
    "compress": [
        "compress",
        "{in}/model.onnx",
        "-o",
        "{out}/m",
        "--recipe",
        "{in}/r.toml",
        "--calibration",
        "{in}/c.npz",
    ],
}
SCRIPT = "import numpy\ndef load_data():\n    for i in range(3):\n        yield {'x': numpy.ones((1, 8), 'f4') * i}\n"


def _prepared(folder: Path, old: bool) -> None:
    """Inputs, and where ``old`` the output of an earlier run, whose weights lie in a file beside it."""
    given, out = folder / "in", folder / "out"
    given.mkdir(parents=True)
    out.mkdir()
    (folder / "tmp").mkdir()
    model = onnx.ModelProto.FromString(seeds()["data"])
    onnx.save(model, given / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    np.savez(given / "c.npz", x=np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32))
    (given / "r.toml").write_text(RECIPE)
    (given / "s.py").write_text(SCRIPT)
    if old:
        graph = files.load(given / "model.onnx")
        files.save(graph, out / "m.onnx", external=True)


def _args(name: str, folder: Path) -> list[str]:
    return [part.replace("{in}", str(folder / "in")).replace("{out}", str(folder / "out")) for part in COMMANDS[name]]


@cache
def _undisturbed(name: str, old: bool, root: Path) -> tuple[int, Counter]:
    """The number of events of a run that nothing disturbs, and the names of the files after it."""
    folder = root / f"{name}-{old}"
    _prepared(folder, old)
    result = started(folder, _args(name, folder), kill_at=0)
    assert result["code"] == 0, result
    return result["events"], _names(folder)


def _names(folder: Path) -> Counter:
    """The names of the files. Which of its names for weights a model has depends on the names that were taken.

    Python itself tries out the temporary folder with a file that has eight letters for a name.
    """
    names = (re.sub(r"\.\d+\.data$", ".data", name) for name in contents(folder))
    return Counter(name for name in names if not re.fullmatch(r"tmp/\w{8}", name))


def _sound(path: Path) -> bool:
    try:
        graph = files.load(path)
        files.check(graph)
        return bool(graph.nodes)
    except ChannelfoldError:
        return False


def _killed(name: str, old: bool, whole: Counter) -> Callable[[Case, Path], None]:
    def judge(case: Case, folder: Path) -> None:
        _prepared(folder, old)
        before = contents(folder)
        result = started(folder, _args(name, folder), kill_at=int(case.name.rpartition("-")[2]))
        case.code = result["code"]
        if case.code != "signal 9":
            case.faults.append(f"was not killed: {result}")
        after = contents(folder)
        case.faults += [f"lost: {n}" for n in before if n.startswith("in/") and after.get(n) != before[n]]
        written = folder / "out" / ("m/model.onnx" if name == "compress" else "m.onnx")
        if (written.exists() or old) and name != "compress" and not _sound(written):
            case.faults.append("the output is neither the old one nor the new one")
        again = started(folder, _args(name, folder), kill_at=0)
        if again["code"] != 0:
            case.faults.append(f"the next run fails: {again['err'][-300:]}")
        if (found := _names(folder)) != whole:
            case.faults.append(f"files are {found - whole} more and {whole - found} less")
        shutil.rmtree(folder, ignore_errors=True)

    return judge


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("old", [False, True], ids=["new", "replaced"])
def test_killed_at_every_event(name, old, tmp_path):
    events, whole = _undisturbed(name, old, tmp_path)
    assert events >= 3
    moments = budget(2)
    places = sorted({*np.linspace(1, events, min(len(moments), events)).astype(int).tolist()})
    cases = [Case(f"{name}-{place}", lambda folder: []) for place in places]
    run_all(cases, _killed(name, old, whole))

"""Runs command lines on hostile input, each in a process of its own, and holds every run to the same rules.

No traceback and no internal error; no more than a minute and 4 GB; an exit code that the help names; a refusal is one
line of at most 500 characters; inputs stay as they were and nothing is left behind; what a command wrote with exit code
0 is a model that runs, and computes what the original computes where the command promises that.

``CHANNELFOLD_FUZZ=5000 pytest tests/fuzz`` runs 5,000 cases of each kind, ``CHANNELFOLD_FUZZ_SEED`` begins with another
one, and ``CHANNELFOLD_FUZZ_MODELS`` names a folder of more small models to start from.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest

FIRST = int(os.environ.get("CHANNELFOLD_FUZZ_SEED", 0))
SECONDS = 60
MEMORY = 4 << 30
EXACT = ("fold", "smooth", "reparam", "inspect")  # commands whose result computes the same function
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["channelfold.tests.fuzz.preload"])


_STARTING = threading.Lock()


def _start_server() -> None:
    """Starts the process that runs are forked from. Python gives it the import path of this process too late."""
    with _STARTING, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()


def budget(usual: int) -> range:
    """The seeds of the cases of one kind."""
    return range(FIRST, FIRST + int(os.environ.get("CHANNELFOLD_FUZZ", usual)))


@dataclass
class Case:
    """A command line in a folder. ``make`` fills the folder and returns the command line."""

    name: str
    make: Callable[[Path], list[str]]
    faults: list[str] = field(default_factory=list)
    code: int | str = "not run"
    error: str = ""


def run_all(cases: Iterable[Case], judge: Callable[[Case, Path], None] | None = None) -> collections.Counter:
    """Runs the cases, two at a time; raises AssertionError with the faults, else counts the exit codes."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root, ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda case: _noted(case, judge or run, Path(root, case.name)), cases))
    counts = collections.Counter(case.code for case in done)
    bad = [f"{case.name}: {fault}" for case in done for fault in case.faults]
    assert not bad, f"{len(bad)} faults in {len(done)} cases:\n" + "\n".join(bad)
    return counts


def _noted(case: Case, judge: Callable[[Case, Path], None], folder: Path) -> Case:
    judge(case, folder)
    if report := os.environ.get("CHANNELFOLD_FUZZ_REPORT"):
        with Path(report).open("a") as file:
            file.write(f"{case.name}\t{case.code}\t{case.error}\t{case.faults}\n")
    return case


def run(case: Case, folder: Path) -> None:
    """Runs one case in a new folder, which is removed where no fault was found."""
    folder.mkdir(parents=True)
    (folder / "tmp").mkdir()
    args = case.make(folder)
    before = contents(folder)
    result = started(folder, args)
    judge(case, args, result, before, folder)
    kept = os.environ.get("CHANNELFOLD_FUZZ_KEEP")
    if case.faults and kept:
        (folder / "command").write_text(" ".join(map(str, args)))
        shutil.copytree(folder, Path(kept, case.name), dirs_exist_ok=True, symlinks=True)
    shutil.rmtree(folder, ignore_errors=True)


def judge(case: Case, args: list[str], result: dict, before: dict[str, str], folder: Path) -> None:
    code, err = result["code"], result["err"]
    case.code = code
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    case.error = errors[-1] if errors else ""
    say = case.faults.append
    if any(words in err for words in ("Traceback", "This is a bug", "broke its contract")):
        say(f"an internal error: {err[-300:]}")
    if code not in (0, 1, 2, 3):
        say(f"exit code {code} after {result['seconds']:.0f} s: {err[-300:]}")
    if result.get("memory", 0) > MEMORY:
        say(f"{result['memory'] / 1e9:.1f} GB of memory")
    if code in (1, 2, 3) and (len(errors) != 1 or not err.rstrip("\n").endswith(errors[0])):
        say(f"a refusal is one line: {err[-300:]!r}")
    if any(len(line) > 500 for line in err.splitlines()):
        say(f"a line of {max(map(len, err.splitlines()))} characters")
    if any(not char.isprintable() and char != "\n" for char in err + result["out"]):
        say("control characters reach the terminal")
    after = contents(folder)
    say_changed(case, before, after)
    allowed = {args[args.index("-o") + 1]} if "-o" in args else set()
    for name in sorted(after.keys() - before.keys()):
        path = str(folder / name)
        if not any(path == out or path.startswith((f"{out}/", f"{out}.data")) for out in allowed):
            say(f"left behind: {name}")
        elif code in (1, 2) and args[0] != "compress":
            say(f"written by a command that failed: {name}; {case.error}")
    if code == 0 and result.get("wrong"):
        say(f"wrong result: {result['wrong']}")


def say_changed(case: Case, before: dict[str, str], after: dict[str, str]) -> None:
    case.faults += [f"input changed or lost: {name}" for name, value in before.items() if after.get(name) != value]


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file of a folder, by its name."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if name.startswith("."):
            name = "./" + name
        if path.is_symlink() or not path.exists():
            found[name] = "link"
        elif path.is_file():
            found[name] = hashlib.md5(path.read_bytes()).hexdigest()
        elif not path.is_dir():
            found[name] = "special"
    return {name: value for name, value in found.items() if not name.startswith("./.fuzz")}


def started(folder: Path, args: list[str], kill_at: int | None = None) -> dict:
    """Runs a command line in a process forked from one that has everything loaded: what came of it."""
    _start_server()
    begin = time.monotonic()
    process = FORKS.Process(target=_child, args=(str(folder), list(map(str, args)), kill_at))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        result = {"code": "hang"}
    else:
        result = {"code": f"signal {-process.exitcode}" if process.exitcode < 0 else "no result"}
        with contextlib.suppress(OSError, ValueError):
            result = json.loads((folder / ".fuzz.json").read_text())
    for name in ("out", "err"):
        with contextlib.suppress(OSError):
            result[name] = (folder / f".fuzz.{name}").read_text(errors="replace")
        result.setdefault(name, "")
    for file in folder.glob(".fuzz*"):
        file.unlink()
    return result | {"seconds": time.monotonic() - begin}


def _child(folder: str, args: list[str], kill_at: int | None) -> None:
    import resource

    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (2 * MEMORY, 2 * MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ |= {"TMPDIR": f"{folder}/tmp", "COLUMNS": "100"}
    tempfile.tempdir = None
    for name, target in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{folder}/.fuzz.{name}", os.O_WRONLY | os.O_CREAT), target)
    from channelfold import cli
    from channelfold.runtime import shell

    counted = [0]
    if kill_at is not None:
        _count_events(folder, counted, kill_at)
    code = shell.run(cli.cli, args)
    events, counted[0] = counted[0], -(1 << 40)  # no kill from here on
    result = {"code": code, "events": events, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if code == 0 and kill_at is None:
        result["wrong"] = _wrong(folder, args)
    Path(folder, ".fuzz.json").write_text(json.dumps(result))


def _count_events(folder: str, counted: list[int], kill_at: int) -> None:
    """Kills this process at the ``kill_at``-th event (0: never) at which it changes files in a folder.

    Weights of any size lie outside the model's file and in scratch files, so that all that writes them is met.
    """
    import sys

    from channelfold.runtime.io import files, wire

    files.EXTERNAL_LIMIT, files.SPILL_LIMIT = 0, 64

    def count() -> None:
        counted[0] += 1
        if counted[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            path = args[0] if args else ""
            writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")
        if writes and isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(folder):
            count()

    def fsync(handle: int, real=os.fsync) -> None:  # between writing and renaming
        count()
        real(handle)

    sys.addaudithook(hook)
    os.fsync = fsync

    def write_array(values, file, chunk: int = 1 << 24, real=wire.write_array) -> None:
        count()
        real(values, file, chunk)

    wire.write_array = write_array


# ---- what a command wrote ------------------------------------------------------------------------------------------


def _wrong(folder: str, args: list[str]) -> str:
    """What is wrong with the model that a command wrote; empty where nothing is, or where the original does not run."""
    if "-o" not in args:
        return ""
    out = Path(args[args.index("-o") + 1])
    out = out / "model.onnx" if args[0] == "compress" else out
    if not out.is_file():
        return f"there is no {out.name}"
    from channelfold.runtime.errors import ChannelfoldError, LimitError
    from channelfold.runtime.io.session import Session

    exact = args[0] in EXACT or "--dead" in args or (args[0] == "compress" and "fold" in args)
    for feed in _feeds(Path(args[1])):
        try:
            before = Session(args[1], optimize=False).run(feed)
        except LimitError:
            return ""
        except ChannelfoldError:
            continue
        try:
            session = Session(out, optimize=False)
            after = session.run(session.accepted(feed))
        except ChannelfoldError as error:
            return f"the original runs, the result does not: {error}"
        if found := _differs(before, after, exact):
            return found
    return ""


def _differs(before: dict, after: dict, exact: bool) -> str:
    for name, old in before.items():
        if name not in after:
            return f"output {name} is gone"
        new = after[name]
        if not isinstance(old, np.ndarray) or old.dtype.kind not in "fiub":
            continue
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            return f"output {name} was {old.dtype}{old.shape} and is {new.dtype}{new.shape}"
        if not exact or not old.size:
            continue
        a, b = old.astype(np.float64), new.astype(np.float64)
        if not np.isfinite(a).all() or np.abs(a).max() > 1e30:
            continue
        limit = {"f2": 5e-2, "f4": 2e-3, "f8": 1e-6}.get(old.dtype.str[1:])
        if limit is not None and not np.abs(a - b).max() <= limit * max(np.abs(a).max(), 1e-6):
            return f"output {name} is off by {np.abs(a - b).max():.3g} of {np.abs(a).max():.3g}"
    return ""


def _feeds(model: Path) -> Iterator[dict[str, np.ndarray]]:
    """Random feeds for a model, in two sizes."""
    from channelfold.runtime.errors import ChannelfoldError
    from channelfold.runtime.io.session import Session

    try:
        inputs = Session(model, optimize=False).inputs
    except ChannelfoldError:
        return
    for size, seed in ((8, 1), (4, 2)):
        rng, feed = np.random.default_rng(seed), {}
        for spec in inputs:
            shape = [d if isinstance(d, int) else 2 if axis == 0 else size for axis, d in enumerate(spec.shape)]
            if spec.dtype is None or spec.dtype.kind == "O" or np.prod(shape) > 1e7:
                return
            kind = spec.dtype.kind
            values = rng.standard_normal(shape) if kind == "f" else rng.integers(0, 2, shape)
            feed[spec.name] = values.astype(spec.dtype)
        yield feed

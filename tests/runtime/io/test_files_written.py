"""Files that are written: what a failed or interrupted save leaves behind, and what no save may replace."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from channelfold.runtime.errors import ModelError, OutputError
from channelfold.runtime.io.files import import_model, load, read, save, session, stored, writing
from channelfold.tests.runtime.io.model_files import files_beside, model_of, weights_in


def test_save_over_every_form(path):
    """Whatever was there before, only what the new model needs is there after; foreign files stay."""
    path.with_name("model.onnx.notes").write_text("mine")
    path.with_name("model.onnx.data").write_text("mine")
    for round_, (external, files) in enumerate(
        [
            (True, ["model.onnx.1.data"]),  # a free name: the file that is there belongs to somebody else
            (True, ["model.onnx.2.data"]),
            (False, []),
            (True, ["model.onnx.1.data"]),
            (None, []),
        ]
    ):
        save(import_model(model_of(round_)), path, external=external)
        assert files_beside(path) == ["model.onnx", *files, "model.onnx.data", "model.onnx.notes"]
        assert weights_in(path) == {round_}
    assert path.with_name("model.onnx.data").read_text() == "mine"


def test_save_in_place(path):
    save(import_model(model_of(0)), path, external=True)
    for external in (True, False, False, True):
        loaded = load(path)
        weights = loaded.nodes[0].inputs[1:]
        for tensor in weights:
            tensor.values = stored(loaded, read(tensor) + 1)
        save(loaded, path, external=external)
        assert weights_in(path) == {float(read(weights[0])[0])}
        assert len(files_beside(path)) == 1 + external
    assert weights_in(path) == {4}


def test_data_of_another_exporter(path):
    """A file that onnx itself has written beside the model goes when the model that uses it is replaced."""
    onnx.save(model_of(5), path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    loaded = load(path)
    save(loaded, path)
    assert files_beside(path) == ["model.onnx"]
    onnx.save(model_of(6), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    save(load(path), path)
    assert files_beside(path) == ["model.onnx", "weights.bin"]  # another model may use it too
    assert weights_in(path) == {6}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_text(path, graph):
    odd = path.parent / os.fsdecode(b"\xffmodel.onnx")
    save(graph, odd)
    assert weights_in(odd) == {1}
    assert session(load(odd)).run({"x": np.zeros(300, np.float32)})["y"][0] == 3
    with pytest.raises(OutputError, match=r"ONNX cannot refer to .*Give another output path"):
        save(graph, odd, external=True)
    assert len(files_beside(path)) == 1


def test_more_than_one_file_can_hold(path, graph, monkeypatch):
    monkeypatch.setattr("channelfold.runtime.io.files.PROTOBUF_LIMIT", 3000)
    monkeypatch.setattr("channelfold.runtime.io.files.EXTERNAL_LIMIT", 2500)
    with pytest.raises(OutputError, match=r"too many for one file. Let it have external data"):
        save(graph, path, external=False)
    save(graph, path)
    assert files_beside(path) == ["model.onnx", "model.onnx.data"]


def test_large_weights_are_aligned(path, graph):
    for tensor in graph.nodes[0].inputs[1:]:
        tensor.values = np.full(300_000, 2, np.float32)
    save(graph, path, external=True)
    model = onnx.load(path, load_external_data=False)
    offsets = [int(e.value) for t in model.graph.initializer for e in t.external_data if e.key == "offset"]
    assert offsets[0] == 0
    assert all(offset % 4096 == 0 for offset in offsets)


def test_the_mode_of_a_file_that_is_replaced_stays(path, graph):
    save(graph, path)
    path.chmod(0o600)
    save(graph, path)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "it is a folder. Give the path of a file"),
        ("..", "it is a folder"),
        ("pipe", "it is not a regular file"),
        ("missing/deep/m.onnx", r"No such file or directory.* Create the folder .*missing/deep first"),
        ("file/m.onnx", r"Not a directory.* Create the folder .*file first"),
        ("x" * 300, "File name too long"),
    ],
)
@pytest.mark.parametrize("external", [False, True])
def test_paths_that_cannot_be_written(path, graph, name, message, external):
    os.mkfifo(path.with_name("pipe"))
    path.with_name("file").write_text("")
    with pytest.raises(OutputError, match=f"Cannot write {re.escape(str(path.parent / name))}.*{message}"):
        save(graph, path.parent / name, external=external)
    assert files_beside(path) == ["file", "pipe"]


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_no_name_at_all(graph, name):
    with pytest.raises(OutputError, match="it is a folder"):
        save(graph, name)
    with pytest.raises(ModelError, match="is not a file"):
        load(name)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="/proc is a folder that nobody may write to")
def test_a_folder_that_cannot_be_written(graph):
    with pytest.raises(OutputError, match=r"Cannot write /proc/m.onnx .*Give another output path"):
        save(graph, "/proc/m.onnx")


def test_devices_are_never_replaced(graph):
    with pytest.raises(OutputError, match="Cannot write /dev/null: it is not a regular file"):
        save(graph, "/dev/null")


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("before", [None, False, True], ids=["new", "over inline", "over external"])
def test_a_full_disk(path, external, before):
    """The kernel refuses to write in the middle of a weight."""
    if before is not None:
        save(import_model(model_of(1)), path, external=before)
    files = {file: file.read_bytes() for file in path.parent.iterdir()}
    large = import_model(model_of(2, size=1 << 20))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, hard))
    try:
        with pytest.raises(OutputError, match=r"Cannot write .*File too large"):
            save(large, path, external=external)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == files


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("failing", range(3))
def test_errors_at_any_flush_leave_nothing(path, graph, monkeypatch, external, failing):
    calls = []

    def fsync(_):
        calls.append(1)
        if len(calls) == failing + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    if failing < 1 + external:  # one for each file
        with pytest.raises(OutputError, match=r"No space left on device\). Free some space, or give a path on another"):
            save(graph, path, external=external)
        assert files_beside(path) == []
    else:
        save(graph, path, external=external)


def test_what_killed_processes_left_is_removed(path, graph):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, written = (path.with_name(f".channelfold-{pid}-0a.tmp") for pid in (dead.pid, os.getpid()))
    for file in (left, written):
        file.write_bytes(b"half")
    save(graph, path)
    assert files_beside(path) == [written.name, "model.onnx"]


def test_writing_vanishes_on_any_error(path):
    path.write_text("old")

    def interrupted():
        with writing(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert files_beside(path) == ["model.onnx"]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from channelfold.runtime.io import files, wire
    from channelfold.runtime.io.files import load, read, save

    folder, external, before = Path(sys.argv[1]), sys.argv[2] == "True", sys.argv[3] == "True"
    old, new = load(folder / "old.onnx"), load(folder / "new.onnx")
    path = folder / "target" / "model.onnx"
    steps = [(os, "fsync"), (Path, "replace"), (Path, "unlink"), (wire, "write_array")]
    for deadly in range(100):
        for file in path.parent.iterdir():
            file.unlink()
        save(old, path, external=before)
        child = os.fork()
        if child == 0:
            count = 0
            def before_step(function):
                def step(*args, **kwargs):
                    global count
                    if count == deadly:
                        os.kill(os.getpid(), signal.SIGKILL)
                    count += 1
                    return function(*args, **kwargs)
                return step
            for holder, name in steps:
                setattr(holder, name, before_step(getattr(holder, name)))
            save(new, path, external=external)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        values = {float(v) for tensor in load(path).nodes[0].inputs[1:] for v in read(tensor)}
        assert values in ({1.0}, {2.0}), values
        print(deadly, values.pop(), os.WIFSIGNALED(status))
        if not os.WIFSIGNALED(status):
            break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills copies of the process")
@pytest.mark.parametrize("before", [False, True], ids=["over inline", "over external"])
@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
def test_killed_at_any_step(path, external, before):
    """The file is the old model or the new one, with the weights that belong to it."""
    for name, value in (("old", 1), ("new", 2)):
        path.with_name(f"{name}.onnx").write_bytes(model_of(value).SerializeToString())
    path.with_name("target").mkdir()
    arguments = [str(path.parent), str(external), str(before)]
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), *arguments], capture_output=True, text=True, check=False
    )
    assert output.returncode == 0, output.stderr
    steps = [line.split()[1:] for line in output.stdout.splitlines()]
    assert len(steps) >= 6
    assert steps[0] == ["1.0", "True"]
    assert steps[-1] == ["2.0", "False"]
    assert [step[0] for step in steps] == sorted(step[0] for step in steps)  # once new, it stays new

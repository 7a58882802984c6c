"""Files: what is read, what is refused, what a failed or interrupted save leaves behind, and what memory it takes."""

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
import onnx_graphsurgeon as gs
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from channelfold.runtime.errors import ModelError, OutputError, VerificationError
from channelfold.runtime.io.files import (
    check,
    constant,
    import_model,
    infer_shapes,
    load,
    read,
    save,
    session,
    stored,
    weightless,
    writing,
)
from channelfold.runtime.io.session import Session
from channelfold.runtime.io.weights import MappedValues


def _model(value: float = 1.0, weights: int = 3, size: int = 300) -> onnx.ModelProto:
    """y = x + w0 + w1 + …, every weight full of ``value``."""
    names = [f"w{i}" for i in range(weights)]
    initializers = [numpy_helper.from_array(np.full(size, value, np.float32), name) for name in names]
    x, y = (helper.make_tensor_value_info(name, 1, [size]) for name in "xy")
    nodes = [helper.make_node("Sum", ["x", *names], ["y"], "sum")]
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "dir").mkdir()
    return tmp_path / "dir" / "model.onnx"


@pytest.fixture
def graph() -> gs.Graph:
    return import_model(_model())


def _weights(path: Path) -> set[float]:
    """The different values in the weights of a file."""
    tensors = load(path).nodes[0].inputs[1:]
    assert len(tensors) == 3
    return {float(v) for tensor in tensors for v in np.unique(read(tensor))}


def _files(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


# ---- reading -----------------------------------------------------------------------------------------------------


def test_load_and_save(path, canonical):
    model = _model()
    path.write_bytes(model.SerializeToString())
    for external in (False, True, None):
        loaded = load(path)
        assert all(isinstance(t._values, MappedValues) for t in loaded.nodes[0].inputs[1:])
        save(loaded, path, external=external)
        onnx.checker.check_model(path, full_check=True)
        assert canonical(onnx.load(path)) == canonical(model)
        assert _files(path) == (["model.onnx", "model.onnx.data"] if external else ["model.onnx"])
        x = np.arange(300, dtype=np.float32)
        for run in (Session(path), session(load(path))):
            assert np.array_equal(run.run({"x": x})["y"], x + 3)


def test_relative_paths(path, monkeypatch):
    path.write_bytes(_model().SerializeToString())
    monkeypatch.chdir(path.parent)
    loaded = load("model.onnx")
    monkeypatch.chdir("/")
    assert np.array_equal(session(loaded).run({"x": np.zeros(300, np.float32)})["y"], np.full(300, 3))
    monkeypatch.chdir(path.parent)
    save(loaded, "other.onnx", external=True)
    assert _weights(path.with_name("other.onnx")) == {1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty. Export the model again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "is a Git LFS pointer.* git lfs pull"),
        (b"PK\x03\x04" + bytes(99), "is truncated or not an ONNX file"),
        (b"not a model", "is truncated or not an ONNX file"),
        (b"\x08\x08", "has no graph or no opset: it is not an ONNX model"),
        (_model().SerializeToString()[:-1], "is truncated or not an ONNX file"),
        (_model(size=10).SerializeToString()[:-1], "is truncated or not an ONNX file"),
    ],
)
def test_files_that_are_no_models(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"^{re.escape(str(path))} {message}"):
        load(path)


def test_paths_that_are_no_files(path):
    os.mkfifo(path.with_name("pipe"))
    for name, message in [
        ("", "is not a file. Give the path of an .onnx file"),
        ("pipe", "is not a file"),  # opening it would wait for ever
        ("missing.onnx", "does not exist. Check the path"),
        ("missing/m.onnx", "does not exist"),
        ("x" * 300, "cannot be read .File name too long"),
    ]:
        with pytest.raises(ModelError, match=message):
            load(path.parent / name)
    with pytest.raises(ModelError, match="is not a file"):
        load("/dev/zero")


def _field(number: int, content: bytes) -> bytes:
    length, size = len(content), b""
    while length >= 0x80:
        size, length = size + bytes([length & 0x7F | 0x80]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


def _nested(levels: int) -> bytes:
    graph = onnx.GraphProto(name="g").SerializeToString()
    for _ in range(levels):
        branch = onnx.AttributeProto(name="then_branch", type=onnx.AttributeProto.GRAPH).SerializeToString()
        node = onnx.NodeProto(op_type="If").SerializeToString() + _field(5, branch + _field(6, graph))
        graph = onnx.GraphProto(name="g").SerializeToString() + _field(1, node)
    return helper.make_model(onnx.GraphProto()).SerializeToString() + _field(7, graph)


@pytest.mark.parametrize("levels", [34, 400, 5000])
def test_subgraphs_nested_too_deep(path, levels):
    """Protobuf reads 100 messages inside each other, which is 33 subgraphs; Python would end at about 300."""
    path.write_bytes(_nested(levels))
    with pytest.raises(ModelError, match="is truncated or not an ONNX file"):
        load(path)


def test_subgraphs_nested_as_deep_as_can_be(path):
    path.write_bytes(_nested(32))
    loaded = load(path)
    save(loaded, path)
    assert load(path).nodes[0].op == "If"


def _small_model() -> bytes:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "local" : 1]> g (bool c, float[N,2] x) => (float[N,2] y)
        <float[2] w = {1, 2}> {
            k = Constant<value = float {2}>()
            z = If (c) <then_branch = t () => (float[N,2] a) <float[1] v = {3}> { a = Mul(x, v) },
                        else_branch = e () => (float[N,2] b) { b = local.f<alpha = 0.5>(x) }>
            y = Add(z, w)
        }
        <opset_import: ["" : 17], domain: "local"> f <alpha> (p) => (q) { q = LeakyRelu<alpha : float = @alpha>(p) }"""
    )
    large = numpy_helper.from_array(np.ones(300, np.float32), "large")
    model.graph.initializer.append(large)
    model.graph.node.append(helper.make_node("Neg", ["large"], ["n"], "neg"))
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(np.ones(1, np.float32), "sparse"), numpy_helper.from_array(np.array([1])), [2]
        )
    )
    model.graph.node.append(helper.make_node("Abs", ["sparse"], ["s"]))
    model.graph.metadata_props.add(key="k", value="v")
    return model.SerializeToString()


def _load_and_use(path: Path) -> None:
    """Either ModelError, or a graph that works as far as this package goes."""
    try:
        loaded = load(path)
        for tensor in loaded.tensors().values():
            if isinstance(tensor, gs.Constant):
                read(tensor)
    except ModelError as error:
        assert str(path) in str(error) or "tensor" in str(error)  # noqa: PT017
        return
    infer_shapes(loaded)
    save(loaded, path)
    load(path)


fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(content=st.binary(max_size=200))
@example(content=b"\x3a\x00\x42\x00")
def test_any_bytes(path, content):
    path.write_bytes(content)
    _load_and_use(path)


@settings(fuzz, max_examples=400)
@given(data=st.data())
def test_any_change_to_a_model(path, data):
    content = bytearray(_small_model())
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(content)
    _load_and_use(path)


def test_a_model_cut_anywhere(path):
    content = _small_model()
    for end in range(len(content)):
        if end < 300 or end % 7 == 0 or end > len(content) - 300:
            path.write_bytes(content[:end])
            _load_and_use(path)


# ---- writing -----------------------------------------------------------------------------------------------------


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
        save(import_model(_model(round_)), path, external=external)
        assert _files(path) == ["model.onnx", *files, "model.onnx.data", "model.onnx.notes"]
        assert _weights(path) == {round_}
    assert path.with_name("model.onnx.data").read_text() == "mine"


def test_save_in_place(path):
    save(import_model(_model(0)), path, external=True)
    for external in (True, False, False, True):
        loaded = load(path)
        weights = loaded.nodes[0].inputs[1:]
        for tensor in weights:
            tensor.values = stored(loaded, read(tensor) + 1)
        save(loaded, path, external=external)
        assert _weights(path) == {float(read(weights[0])[0])}
        assert len(_files(path)) == 1 + external
    assert _weights(path) == {4}


def test_data_of_another_exporter(path):
    """A file that onnx itself has written beside the model goes when the model that uses it is replaced."""
    onnx.save(_model(5), path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    loaded = load(path)
    save(loaded, path)
    assert _files(path) == ["model.onnx"]
    onnx.save(_model(6), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    save(load(path), path)
    assert _files(path) == ["model.onnx", "weights.bin"]  # another model may use it too
    assert _weights(path) == {6}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_text(path, graph):
    odd = path.parent / os.fsdecode(b"\xffmodel.onnx")
    save(graph, odd)
    assert _weights(odd) == {1}
    assert session(load(odd)).run({"x": np.zeros(300, np.float32)})["y"][0] == 3
    with pytest.raises(OutputError, match=r"ONNX cannot refer to .*Give another output path"):
        save(graph, odd, external=True)
    assert len(_files(path)) == 1


def test_more_than_one_file_can_hold(path, graph, monkeypatch):
    monkeypatch.setattr("channelfold.runtime.io.files.PROTOBUF_LIMIT", 3000)
    monkeypatch.setattr("channelfold.runtime.io.files.EXTERNAL_LIMIT", 2500)
    with pytest.raises(OutputError, match=r"too many for one file. Let it have external data"):
        save(graph, path, external=False)
    save(graph, path)
    assert _files(path) == ["model.onnx", "model.onnx.data"]


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
    assert _files(path) == ["file", "pipe"]


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
        save(import_model(_model(1)), path, external=before)
    files = {file: file.read_bytes() for file in path.parent.iterdir()}
    large = import_model(_model(2, size=1 << 20))
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
        assert _files(path) == []
    else:
        save(graph, path, external=external)


def test_what_killed_processes_left_is_removed(path, graph):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, written = (path.with_name(f".channelfold-{pid}-0a.tmp") for pid in (dead.pid, os.getpid()))
    for file in (left, written):
        file.write_bytes(b"half")
    save(graph, path)
    assert _files(path) == [written.name, "model.onnx"]


def test_writing_vanishes_on_any_error(path):
    path.write_text("old")

    def interrupted():
        with writing(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert _files(path) == ["model.onnx"]


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
        path.with_name(f"{name}.onnx").write_bytes(_model(value).SerializeToString())
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


# ---- checking, inference, sessions --------------------------------------------------------------------------------


def test_check(graph):
    check(graph)
    graph.nodes[0].inputs[0] = gs.Variable("nothing")
    with pytest.raises(VerificationError, match=r"The graph is no longer valid ONNX: .*nothing"):
        check(graph)


def test_weightless(graph):
    model = weightless(graph)
    assert [value.name for value in model.graph.input] == ["x", "w0", "w1", "w2"]
    assert not model.graph.initializer


def test_infer_shapes():
    graph = import_model(
        onnx.parser.parse_model(
            """<ir_version: 8, opset_import: ["" : 17]> g (float[N,4,6] x, int64[2] s) => (y, float[A,B] z) {
                a = Transpose<perm = [0, 2, 1]>(x)  b = Cast<to = 11>(a)  c = Abs(s)  d = Reshape(x, c)
                y = NonZero(d)  z = ReduceSum(x) }"""
        )
    )
    infer_shapes(graph)
    tensors = graph.tensors()
    assert (tensors["a"].shape, tensors["a"].dtype) == (["N", 6, 4], np.float32)
    assert (tensors["b"].shape, tensors["b"].dtype) == (["N", 6, 4], np.float64)
    assert tensors["d"].shape == [None, None]  # no names for sizes that inference invents
    assert (tensors["y"].shape, tensors["y"].dtype) == ([2, None], np.int64)
    assert tensors["z"].shape == ["A", "B"]  # as declared


def test_sessions_on_inner_tensors(graph):
    graph.nodes[0].outputs[0].name = "sum"
    run = session(graph, ["sum", "x", "w1"], threads=1).run({"x": np.zeros(300, np.float32)})
    assert list(run) == ["sum", "x", "w1"]
    assert [values[0] for values in run.values()] == [3, 0, 1]
    with pytest.raises(ModelError, match="ONNX Runtime cannot open"):
        session(graph, ["nothing"])


def test_sessions_take_every_type(tmp_path):
    """Weights in memory, in a scratch file and in the model file; also such that numpy has no word for."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
        g (float[1] x) => (float[3000] y, float[3000] z, float[3000] v) {
        y = DequantizeLinear(q, s)  h = Cast<to = 1>(b)  z = Add(h, x)  v = Mul(w, x) }"""
    model = onnx.parser.parse_model(text)
    numbers = np.arange(3000) % 7 - 3
    for name, kind in (("q", "INT4"), ("b", "BFLOAT16"), ("w", "FLOAT")):
        dtype = helper.tensor_dtype_to_np_dtype(onnx.TensorProto.DataType.Value(kind))
        model.graph.initializer.append(numpy_helper.from_array(numbers.astype(dtype), name))
    model.graph.initializer.append(numpy_helper.from_array(np.array(2, np.float32), "s"))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    for made in (import_model(model), load(tmp_path / "m.onnx")):
        out = session(made).run({"x": np.ones(1, np.float32)})
        assert np.array_equal(out["y"], numbers * 2)
        assert np.array_equal(out["z"], numbers + 1)
        assert np.array_equal(out["v"], numbers)
        made.nodes[-1].inputs[0] = constant(made, "w", np.full(3000, 5, np.float32))
        assert np.array_equal(session(made).run({"x": np.ones(1, np.float32)})["v"], np.full(3000, 5))


# ---- memory ------------------------------------------------------------------------------------------------------

MEMORY = """
    import re, sys, threading, time
    from pathlib import Path
    import numpy as np
    from channelfold.runtime.io.files import load, read, save, session, stored
    from channelfold.runtime.io.session import onnxruntime

    def anonymous():
        return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    onnxruntime()
    start = peak = anonymous()
    stop = False
    def watch():
        global peak
        while not stop:
            peak = max(peak, anonymous())
            time.sleep(0.002)
    watcher = threading.Thread(target=watch)
    watcher.start()
    graph = load(sys.argv[1])
    {work}
    stop = True
    watcher.join()
    print(start, peak)
"""
REWRITE = """
    for node in graph.nodes[:-1]:
        values = read(node.inputs[0])
        node.inputs[0].values = stored(graph, values + np.float16(1))
        del values
    save(graph, sys.argv[2])
"""
RUN = """
    for step in range(2):  # first the weights of the file, then new ones
        out = session(graph, threads=1).run({"x": np.array([0, 1])})["y"]
        assert (out == step).all()
        for node in graph.nodes[:-1]:
            node.inputs[0].values = stored(graph, read(node.inputs[0]) + np.float16(1))
"""


def _huge(path: Path, tables: int, rows: int) -> None:
    """Rows of fp16 tables [rows, 1024], one below the other; the tables are a hole in a file."""
    nodes, weights = [], []
    for i in range(tables):
        weight = onnx.TensorProto(name=f"w{i}", data_type=onnx.TensorProto.FLOAT16, dims=[rows, 1024], data_location=1)
        for key, value in (("location", "hole"), ("offset", 2048 * rows * i), ("length", 2048 * rows)):
            weight.external_data.add(key=key, value=str(value))
        weights.append(weight)
        nodes.append(helper.make_node("Gather", [f"w{i}", "x"], [f"rows{i}"], f"table{i}"))
    nodes.append(helper.make_node("Concat", [f"rows{i}" for i in range(tables)], ["y"], "concat", axis=0))
    x = helper.make_tensor_value_info("x", onnx.TensorProto.INT64, ["N"])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, ["M", 1024])
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    with path.with_name("hole").open("wb") as file:
        file.truncate(2048 * rows * tables)


def _measured(work: str, path: Path) -> tuple[float, float]:
    """Peaks of anonymous memory in MiB, after the imports and in the end."""
    program = textwrap.dedent(MEMORY.replace("{work}", work.strip()))
    command = [sys.executable, "-c", program, str(path), str(path.with_name("out.onnx"))]
    scratch = path.parent.parent
    environment = os.environ | {"TMPDIR": str(scratch)}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert not list(scratch.glob("channelfold-*"))
    start, peak = map(float, output.stdout.split())
    return start, peak


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory in /proc")


@needs_proc
def test_rewriting_weights_takes_the_memory_of_one(path):
    _huge(path, tables=24, rows=4096)  # 200 MB, 8 MiB each
    start, peak = _measured(REWRITE, path)
    assert peak - start < 40  # two or three weights
    assert _files(path) == ["hole", "model.onnx", "out.onnx"]
    assert float(read(load(path.with_name("out.onnx")).nodes[-2].inputs[0])[-1, -1]) == 1


@needs_proc
def test_sessions_do_not_copy_weights(path):
    _huge(path, tables=24, rows=4096)  # 200 MB
    start, peak = _measured(RUN, path)
    assert peak - start < 50  # ONNX Runtime itself takes half of that
    assert _files(path) == ["hole", "model.onnx"]


def test_sessions_on_weights_whose_file_was_replaced(path):
    large = 1 << 19
    path.write_bytes(_model(1, size=large).SerializeToString())
    loaded = load(path)
    save(import_model(_model(9, weights=5, size=large)), path)
    assert session(loaded).run({"x": np.zeros(large, np.float32)})["y"][-1] == 3


@needs_proc
@pytest.mark.skipif("CHANNELFOLD_LARGE" not in os.environ, reason="writes 5 GB; set CHANNELFOLD_LARGE=1")
def test_a_model_of_more_than_2_gb(path):
    _huge(path, tables=36, rows=32768)  # 2.4 GB, 67 MB each
    try:
        start, peak = _measured(REWRITE, path)
        print(f"2.4 GB: anonymous memory {start:.0f} MiB after imports, {peak:.0f} MiB at most")
        assert peak < 600
        assert _files(path) == ["hole", "model.onnx", "out.onnx", "out.onnx.data"]
        out = load(path.with_name("out.onnx"))
        check(out)
        feed = {"x": np.array([0, 32767])}
        for run in (session(out), Session(path.with_name("out.onnx"))):
            assert np.array_equal(run.run(feed)["y"], np.ones((72, 1024), np.float16))
            del run
    finally:
        for file in path.parent.iterdir():
            file.unlink()

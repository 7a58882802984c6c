"""The memory that models in files take: weights are mapped, not copied."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper

from channelfold.runtime.io.files import check, import_model, load, read, save, session
from channelfold.runtime.io.session import Session
from channelfold.tests.runtime.io.model_files import files_beside, model_of

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
    assert files_beside(path) == ["hole", "model.onnx", "out.onnx"]
    assert float(read(load(path.with_name("out.onnx")).nodes[-2].inputs[0])[-1, -1]) == 1


@needs_proc
def test_sessions_do_not_copy_weights(path):
    _huge(path, tables=24, rows=4096)  # 200 MB
    start, peak = _measured(RUN, path)
    assert peak - start < 50  # ONNX Runtime itself takes half of that
    assert files_beside(path) == ["hole", "model.onnx"]


def test_sessions_on_weights_whose_file_was_replaced(path):
    large = 1 << 19
    path.write_bytes(model_of(1, size=large).SerializeToString())
    loaded = load(path)
    save(import_model(model_of(9, weights=5, size=large)), path)
    assert session(loaded).run({"x": np.zeros(large, np.float32)})["y"][-1] == 3


@needs_proc
@pytest.mark.skipif("CHANNELFOLD_LARGE" not in os.environ, reason="writes 5 GB; set CHANNELFOLD_LARGE=1")
def test_a_model_of_more_than_2_gb(path):
    _huge(path, tables=36, rows=32768)  # 2.4 GB, 67 MB each
    try:
        start, peak = _measured(REWRITE, path)
        print(f"2.4 GB: anonymous memory {start:.0f} MiB after imports, {peak:.0f} MiB at most")
        assert peak < 600
        assert files_beside(path) == ["hole", "model.onnx", "out.onnx", "out.onnx.data"]
        out = load(path.with_name("out.onnx"))
        check(out)
        feed = {"x": np.array([0, 32767])}
        for run in (session(out), Session(path.with_name("out.onnx"))):
            assert np.array_equal(run.run(feed)["y"], np.ones((72, 1024), np.float16))
            del run
    finally:
        for file in path.parent.iterdir():
            file.unlink()

"""Channel groups for people: the entries, their table, and what prune says it has cut."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from channelfold.passes import pipeline
from channelfold.passes.base import Context
from channelfold.passes.prune import Prune
from channelfold.runtime.jobs.inspect_groups import describe
from channelfold.runtime.report import inspection
from channelfold.runtime.report.tables import Page
from channelfold.tests.graphs import build, positive
from channelfold.tests.pruning import cnn, ffn, mlp

FIXED = "(float[1,3,12,12] x) => (float[1,10] y)"


def printed(entries, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=True)
    inspection.show_groups(entries, Page(console))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    return text


def test_entries():
    first, second, third = describe(cnn(signature=FIXED))
    assert first == {
        "node": "Conv_0",
        "channels": 16,
        "units": 16,
        "prunable": 16,
        "writers": ["Conv_0"],
        "readers": ["Conv_2"],
        "reduced": "",
        "stay": {},
        "macs": 144 * 27 * 16 + 36 * 9 * 16 * 24,
        "parameters": 16 * 27 + 16 + 16 * 24 * 9,
    }
    assert (second["node"], second["readers"]) == ("Conv_2", ["Gemm_6"])
    assert third["stay"] == {"it is the output 'y' of the model": 10}
    assert third["prunable"] == 0


def test_it_is_the_graph_after_the_folds():
    body = "a = Conv(x, A) n = BatchNormalization(a, g, b, m, v) r = Relu(n) y = Conv(r, B)"
    graph = build(
        "(float[1,3,5,5] x) => (float[] y)", body, kind="float",
        A=(8, 3, 1, 1), g=8, b=8, m=8, v=positive(8), B=(2, 8, 1, 1),
    )  # fmt: skip
    (entry, _) = describe(graph)
    assert entry["parameters"] == 8 * 3 + 8 + 2 * 8


def test_the_table():
    text = printed(describe(ffn("(float[1,6,8] x) => (float[1,6,4] y)")))
    assert "32 of 52" not in text
    assert "48 of 52 channels can be cut, 92.3%" in text
    assert "width: a norm works on the channels, cut only with --width" in text
    assert "4 x stays: it is the output 'y' of the model" in text
    assert "in: of how many units" not in text


def test_units_of_several_channels_are_explained():
    graph = build(
        "(float[1,3,4,4] x) => (float[] y)", "a = Conv(x, A) b = Conv<group=4>(a, B) y = Conv(b, C)", kind="float",
        A=(8, 3, 1, 1), B=(8, 2, 1, 1), C=(2, 8, 1, 1),
    )  # fmt: skip
    entries = describe(graph)
    assert any(entry["units"] < entry["channels"] for entry in entries)
    assert "in: of how many units that go as a whole" in printed(entries)


def test_a_graph_without_weights():
    assert describe(build("(float[2,3] x) => (float[] y)", "y = Relu(x)", kind="float")) == []
    assert "No channel group was found." in printed([])


def test_long_names_leave_room_for_the_figures():
    long = mlp()
    for index, node in enumerate(long.nodes):
        node.name = f"/model/encoder/layer.{index}/attention/self/query/MatMul"
    text = printed(describe(long), 80)
    assert "1,312  1,280        1        1" in text
    assert "layer.0/" in text


def test_what_goes_when_all_of_a_group_goes():
    entries = describe(mlp())
    graph, (step,) = pipeline.run(mlp(), [Prune(ratio=0.5, include=("Gemm_0",))], Context())
    (group,) = step["facts"]["groups"]
    assert entries[0]["parameters"] == 32 * 16 + 32 + 24 * 32
    assert group["parameters_saved"] == entries[0]["parameters"] / 2
    assert group["macs_saved"] * 2 == entries[0]["macs"]
    assert np.prod(graph.outputs[0].shape[1:]) == 5

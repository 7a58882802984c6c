"""Engine builds: shapes, the choice of a TensorRT, what a crash says, and small real builds on the CPU."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from channelfold.passes.base import Context
from channelfold.passes.quantize import QuantizeWeights
from channelfold.runtime.engine import build as tensorrt
from channelfold.runtime.engine.build import (
    ShapeRange,
    backend,
    build,
    default_shapes,
    default_values,
    no_shapes,
    parse_shape,
)
from channelfold.runtime.engine.repair import name_apart, name_unequal_sizes, put_codes_inside
from channelfold.runtime.errors import BuildError, DataError, DependencyError, ModelError, OutputError, UsageError
from channelfold.runtime.io.bodies import bodies
from channelfold.runtime.io.files import check, import_model
from channelfold.runtime.io.session import TensorSpec
from channelfold.tests import decoders, graphs

FLOAT = np.dtype("float32")


# ---- shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("image:1x3x8:2x3x8:4x3x8", "image"),
        ("image:1,3,8:2, 3, 8:4x3x8", "image"),
        ("scope/ids:0:1x3x8:2x3x8:4x3x8", "scope/ids:0"),
    ],
)
def test_parse_shape(text: str, name: str) -> None:
    assert parse_shape(text) == (name, ShapeRange((1, 3, 8), (2, 3, 8), (4, 3, 8)))


def test_shapes_print_as_the_option_takes_them() -> None:
    shape = ShapeRange((1, 0), (2, 64), (4, 512))
    assert parse_shape(f"x:{shape}") == ("x", shape)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("image", "is not of the form NAME:MIN:OPT:MAX"),
        ("image:1x3:2x3", "is not of the form NAME:MIN:OPT:MAX"),
        (":1x3:2x3:4x3", "is not of the form NAME:MIN:OPT:MAX"),
        ("image:1x3:2xN:4x3", "OPT is '2xN', which is not a shape"),
        ("image:1x3:2x3:", "MAX is '', which is not a shape"),
        ("image:1x-3:2x3:4x3", "MIN is '1x-3', which is not a shape"),
        ("image:1x3:2x3:4x3x5", "differ in rank"),
        ("image:1x3:8x3:4x3", "are not in order on axis 0"),
    ],
)
def test_parse_shape_says_which_part_is_wrong(text: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_shape(text)
    assert says in str(error.value)
    assert repr(text) in str(error.value)


def test_default_shapes_are_smallest_median_and_largest_per_axis() -> None:
    inputs = [
        TensorSpec("ids", FLOAT, ("batch", "seq")),
        TensorSpec("mask", FLOAT, (None, 1, "seq")),
        TensorSpec("fixed", FLOAT, (4, 4)),
    ]
    sizes = [(8, 20), (8, 7), (8, 64), (3, 9)]
    feeds = [{"ids": np.zeros((n, s)), "mask": np.zeros((n, 1, s)), "fixed": np.zeros((4, 4))} for n, s in sizes]
    assert default_shapes(inputs, feeds) == {
        "ids": ShapeRange((1, 7), (8, 9), (8, 64)),
        "mask": ShapeRange((1, 1, 7), (8, 1, 9), (8, 1, 64)),
    }


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1))
def test_default_shapes_hold_every_feed(sizes: list[tuple[int, int]]) -> None:
    (shape,) = default_shapes([TensorSpec("x", FLOAT, ("n", "s"))], [{"x": np.zeros(size)} for size in sizes]).values()
    assert all(
        low <= size <= high for dims in sizes for low, size, high in zip(shape.min, dims, shape.max, strict=True)
    )
    assert shape.min[0] == 1


def test_default_shapes_of_static_inputs_need_no_data() -> None:
    assert default_shapes([TensorSpec("x", FLOAT, (1, 3))], None) == {}


def test_values_of_inputs_that_may_be_sizes() -> None:
    whole = np.dtype("int64")
    inputs = [
        TensorSpec("size", whole, (2,)), TensorSpec("k", np.dtype("int32"), ()), TensorSpec("signed", whole, (1,)),
        TensorSpec("ids", whole, (1, 8)), TensorSpec("tokens", whole, ("n",)), TensorSpec("x", FLOAT, (2,)),
    ]  # fmt: skip
    feeds = [
        {"size": np.array(size), "k": np.array(k), "signed": np.array([-1]), "x": np.zeros(2)}
        for size, k in (([12, 12], 3), ([20, 16], 1), ([14, 90], 2))
    ]
    expected = {"size": ShapeRange((12, 12), (14, 16), (20, 90)), "k": ShapeRange((1,), (2,), (3,))}
    assert default_values(inputs, feeds) == expected
    assert default_values(inputs, None) == {}


def test_the_example_says_where_it_takes_values() -> None:
    assert "of 'size', which holds sizes, the values" in str(no_shapes({"size": (None, None)}, ["size"]))


def test_unequal_sizes_of_one_name_get_names_of_their_own() -> None:
    shapes = {"a": ["N", 1, "?", "?"], "b": ["N", "?"], "c": ["N", "M"]}
    inputs = [gs.Variable(name, np.float32, shape) for name, shape in shapes.items()]
    graph = gs.Graph([], inputs, [])
    ranges = {"a": (1, 1, 48, 192), "b": (1, 10), "c": (1, 10)}
    assert name_unequal_sizes(graph, {name: ShapeRange(dims, dims, dims) for name, dims in ranges.items()})
    assert {t.name: t.shape for t in inputs} == {"a": ["N", 1, "?_a_2", "?_a_3"], "b": ["N", "?_b_1"], "c": ["N", "M"]}


def test_codes_stand_in_the_bodies_that_read_them_and_nodes_have_names_of_their_own() -> None:
    graph = import_model(decoders.merged())
    QuantizeWeights().apply(graph, Context())
    feed = decoders.steps(1)[0]
    before = graphs.run(graph, feed)
    for body in bodies(graph):
        body.graph.nodes[0].name = "same"
    assert put_codes_inside(graph)
    assert name_apart(graph)
    check(graph)
    for body in bodies(graph):
        held = [node for node in body.graph.nodes if node.op == "DequantizeLinear"]
        assert len(held) == 5
        assert {node.inputs[0].inputs[0].op for node in held} == {"Constant"}
        assert body.graph.nodes[1].name == f"same in {body.place}"
    np.testing.assert_array_equal(before["y"], graphs.run(graph, feed)["y"])
    assert not name_apart(graph)
    assert not put_codes_inside(graph)
    assert not name_apart(import_model(decoders.loop()))


def test_dynamic_inputs_without_data_name_the_option_to_give() -> None:
    inputs = [TensorSpec("ids", FLOAT, ("batch", "seq")), TensorSpec("img", FLOAT, (None, 3, 8))]
    with pytest.raises(UsageError) as error:
        default_shapes(inputs, None)
    assert "'ids' [batch, seq], 'img' [?, 3, 8]" in str(error.value)
    option = str(error.value).split("--shape '")[1].split("'")[0]
    assert parse_shape(option) == ("ids", ShapeRange((1, 1), (8, 128), (16, 256)))


@pytest.mark.parametrize(
    ("feed", "says"),
    [({"y": np.zeros(3)}, "lacks input 'x'"), ({"x": np.zeros((2, 4))}, "shape (2, 4) for input 'x', which is [n, 3]")],
)
def test_feeds_that_do_not_fit(feed: dict, says: str) -> None:
    with pytest.raises(DataError) as error:
        default_shapes([TensorSpec("x", FLOAT, ("n", 3))], [feed])
    assert says in str(error.value)


# ---- which TensorRT ----------------------------------------------------------------------------------------------


def machine(monkeypatch: pytest.MonkeyPatch, *packages: str, gpu: int | None = None, env: str | None = None) -> None:
    monkeypatch.setattr(tensorrt, "_installed", lambda name: name in {*packages, "polygraphy"})
    monkeypatch.setattr(tensorrt, "local_gpu", lambda: (gpu, "" if gpu else "there is no NVIDIA driver"))
    if env is None:
        monkeypatch.delenv("POLYGRAPHY_USE_TENSORRT_RTX", raising=False)
    else:
        monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", env)


BOTH = ("tensorrt", "tensorrt_rtx")


@pytest.mark.parametrize(
    ("packages", "gpu", "env", "sm", "chosen", "target"),
    [
        (BOTH, 89, None, None, "tensorrt", "gpu"),
        (BOTH, 90, None, 90, "tensorrt", "gpu"),
        (BOTH, 89, None, 120, "tensorrt_rtx", 120),
        (BOTH, 89, "1", None, "tensorrt_rtx", 89),
        (BOTH, 89, "0", 89, "tensorrt", "gpu"),
        (BOTH, None, None, 86, "tensorrt_rtx", 86),
        (("tensorrt_rtx",), None, None, None, "tensorrt_rtx", None),
        (("tensorrt_rtx",), 90, None, None, "tensorrt_rtx", "gpu"),
        (("tensorrt_rtx",), 90, None, 75, "tensorrt_rtx", 75),
    ],
)
def test_backend(monkeypatch, packages, gpu, env, sm, chosen, target) -> None:
    machine(monkeypatch, *packages, gpu=gpu, env=env)
    found = backend(sm)
    assert (found.name, found.target) == (chosen, target)


@pytest.mark.parametrize(
    ("packages", "gpu", "env", "sm", "kind", "says"),
    [
        ((), None, None, 89, DependencyError, "pip install polygraphy tensorrt-rtx-cu12"),
        (("tensorrt",), None, None, 89, DependencyError, "tensorrt needs a GPU, and there is no NVIDIA driver"),
        (("tensorrt",), None, "0", 89, DependencyError, "tensorrt cannot build here: there is no NVIDIA driver"),
        (("tensorrt",), 89, None, 86, UsageError, "only for the GPU of this machine (SM 89), not for SM 86"),
        (BOTH, None, None, 90, UsageError, "SM 90 can be built only on a machine with such a GPU"),
        (BOTH, None, None, 100, UsageError, "75 (RTX 20, T4), 80 (A100), 86"),
        (BOTH, None, None, 8, UsageError, "Possible here: 75"),
    ],
)
def test_no_backend(monkeypatch, packages, gpu, env, sm, kind, says) -> None:
    machine(monkeypatch, *packages, gpu=gpu, env=env)
    with pytest.raises(kind) as error:
        backend(sm)
    assert says in str(error.value)


def test_missing_polygraphy(monkeypatch) -> None:
    machine(monkeypatch, "tensorrt_rtx")
    monkeypatch.setattr(tensorrt, "_installed", lambda name: name == "tensorrt_rtx")
    with pytest.raises(DependencyError, match="The package polygraphy is missing"):
        backend()


# ---- the child's end ---------------------------------------------------------------------------------------------


def run(code: str, progress=lambda *_: None) -> dict:
    command = (sys.executable, "-c", "import json, os, sys; " + code)
    return tensorrt._run({"backend": "tensorrt_rtx", "x": 'a "quoted" ☃'}, "m.onnx", progress, command)


def test_request_progress_and_result() -> None:
    seen = []
    code = """r = json.load(sys.stdin); print('{"progress": ["Phase", 1, 2]}')
print("native noise", file=sys.stderr)
print(json.dumps({"result": [r["x"], os.environ["POLYGRAPHY_USE_TENSORRT_RTX"]]}), flush=True); os.abort()"""
    assert run(code, lambda *step: seen.append(step)) == ['a "quoted" ☃', "1"]  # a crash after the result is none
    assert seen == [("Phase", 1, 2)]


def test_errors_of_the_child_are_raised_as_they_were() -> None:
    with pytest.raises(UsageError, match=r"^no such shape\. Give one$"):
        run("""print('{"error": ["UsageError", "no such shape. Give one"]}')""")


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("os.abort()", "was ended by SIGABRT on m.onnx in phase 'Tuning'; its last words: corrupted list"),
        ("os.kill(os.getpid(), 9)", "lack of memory"),
        ("sys.exit(3)", "ended with status 3"),
    ],
)
def test_a_crash_is_one_line(end: str, says: str) -> None:
    code = f"""sys.stdin.close(); print('{{"progress": ["Tuning", 1, 2]}}', flush=True)
print("corrupted list", file=sys.stderr, flush=True); {end}"""
    with pytest.raises(BuildError) as error:
        run(code)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_stopping_the_build_stops_the_child() -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # and does not wait for the child's hour
        run("""import time; print('{"progress": ["Tuning", 1, 2]}', flush=True); time.sleep(3600)""", stop)


# ---- builds ------------------------------------------------------------------------------------------------------


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "1")


def save(path, *nodes: onnx.NodeProto, opset: int = 17, x=(4, 16), inputs=(), **weights: np.ndarray) -> None:
    """A model of ``nodes`` from input ``x`` (float32) to output ``y``."""
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x), *inputs]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "net", values, out, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)


MATMUL = helper.make_node("MatMul", ["x", "w"], ["y"], "mm")
W = np.ones((16, 8), np.float32)


@pytest.mark.rtx
def test_build(rtx, tmp_path, monkeypatch, capfd) -> None:
    """A build from another folder, with external data beside the model; all that a report needs comes back."""
    save(tmp_path / "m.onnx", MATMUL, w=W)
    model = onnx.load(tmp_path / "m.onnx")
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    phases = []
    built = build("../m.onnx", "m.engine", sm=89, progress=lambda *step: phases.append(step))
    assert (built.path, built.sm, built.backend) == ("m.engine", 89, "tensorrt_rtx")
    assert built.version.count(".") >= 2
    assert built.size == (tmp_path / "elsewhere/m.engine").stat().st_size > W.nbytes
    assert built.seconds > 0
    assert built.warnings == ()
    assert json.loads(json.dumps(dataclasses.asdict(built)))["plan"]["nodes"]["mm"]["arithmetic"] == "float"
    assert phases[0] == ("Reading the model", 0, 1)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["m.engine"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.rtx
def test_builds_are_repeatable(rtx, tmp_path) -> None:
    save(tmp_path / "m.onnx", MATMUL, w=W)
    engines = [tmp_path / name for name in ("a", "b", "c")]
    assert [
        build(tmp_path / "m.onnx", engine, sm=sm).sm for engine, sm in zip(engines, (120, 120, None), strict=True)
    ] == [
        120,
        120,
        tensorrt.local_gpu()[0],
    ]
    assert engines[0].read_bytes() == engines[1].read_bytes()


@pytest.mark.rtx
def test_a_failed_build_leaves_the_old_engine(rtx, tmp_path) -> None:
    save(tmp_path / "m.onnx", helper.make_node("Unique", ["x"], ["y"], "a/b: uniq"))
    (tmp_path / "m.engine").write_text("old")
    with pytest.raises(BuildError, match=r"refuses node 'a/b: uniq' \(Unique\) of m\.onnx: unknown op"):
        build(tmp_path / "m.onnx", tmp_path / "m.engine", sm=89)
    assert (tmp_path / "m.engine").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.engine", "m.onnx"]


@pytest.mark.rtx
def test_sm_75_has_no_float_product(rtx, tmp_path) -> None:
    save(tmp_path / "m.onnx", MATMUL, w=W)
    with pytest.raises(BuildError, match=r"FP32 GEMM is not supported\. Cast the model to fp16 for SM 75"):
        build(tmp_path / "m.onnx", tmp_path / "m.engine", sm=75)


@pytest.mark.rtx
def test_uint8_is_built_but_warned_of(rtx, tmp_path) -> None:
    quantize = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"], "mm"),
    ]
    save(tmp_path / "m.onnx", *quantize, w=W, s=np.float32(0.1), z=np.uint8(0))
    warnings = build(tmp_path / "m.onnx", tmp_path / "m.engine", sm=89).warnings
    assert [text[:34] for text in warnings] == ["uint8 quantization runs as int8: v"]


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({}, "'x[0]*' [N, 16]. Give calibration data, or for each input an option such as --shape 'x[0]*:1x16:8x16:16"),
        ({"y": "1x16:2x16:4x16"}, "The model has no input 'y' to give shapes to"),
        ({"x[0]*": "1x15:2x15:4x15"}, "do not fit input 'x[0]*', which is [N, 16]"),
        ({"x[0]*": "1x16:2x16:4x16"}, None),
    ],
)  # fmt: skip
def test_dynamic_shapes(rtx, tmp_path, shapes, says) -> None:
    """The name has characters that file patterns use, which must not be taken for one."""
    save(tmp_path / "m.onnx", MATMUL, w=W)
    model = onnx.load(tmp_path / "m.onnx")
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x[0]*", TensorProto.FLOAT, ["N", 16]))
    model.graph.node[0].input[0] = "x[0]*"
    onnx.save(model, tmp_path / "m.onnx")
    ranges = dict(parse_shape(f"{name}:{text}") for name, text in shapes.items())
    if says is None:
        assert build(tmp_path / "m.onnx", tmp_path / "m.engine", sm=86, shapes=ranges).warnings == ()
    else:
        with pytest.raises(UsageError) as error:
            build(tmp_path / "m.onnx", tmp_path / "m.engine", sm=86, shapes=ranges)
        assert says in str(error.value)


@pytest.mark.rtx
def test_shapes_that_come_in_as_values(rtx, tmp_path) -> None:
    target = helper.make_tensor_value_info("dims", TensorProto.INT64, [2])
    save(tmp_path / "m.onnx", helper.make_node("Reshape", ["x", "dims"], ["y"]), inputs=[target])
    with pytest.raises(UsageError, match=r"'dims' \[\?, \?\]"):
        build(tmp_path / "m.onnx", tmp_path / "m.engine", sm=86)
    values = {"dims": ShapeRange((8, 8), (8, 8), (8, 8))}
    assert build(tmp_path / "m.onnx", tmp_path / "m.engine", sm=86, shapes=values).size > 0


@pytest.mark.rtx
def test_attention_without_a_fused_kernel_is_built_from_its_parts(rtx, tmp_path) -> None:
    others = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 2, 8, 16)) for name in ("k", "v")]
    attention = helper.make_node("Attention", ["x", "k", "v"], ["y"], "attention")
    save(tmp_path / "m.onnx", attention, x=(1, 2, 8, 16), inputs=others, opset=23)
    assert build(tmp_path / "m.onnx", tmp_path / "m.engine", sm=89).size > 0


def test_what_is_wrong_before_a_build(tmp_path, monkeypatch) -> None:
    machine(monkeypatch, "tensorrt_rtx")
    save(tmp_path / "m.onnx", helper.make_node("Relu", ["x"], ["y"]), opset=26)
    with pytest.raises(BuildError, match="has opset 26; TensorRT knows up to 25"):
        build(tmp_path / "m.onnx", tmp_path / "m.engine")
    save(tmp_path / "m.onnx", helper.make_node("Relu", ["x"], ["y"]))
    with pytest.raises(OutputError, match="is a folder"):
        build(tmp_path / "m.onnx", tmp_path)
    with pytest.raises(OutputError):
        build(tmp_path / "m.onnx", tmp_path / "none" / "m.engine")
    with pytest.raises(ModelError):
        build(tmp_path / "none.onnx", tmp_path / "m.engine")


@pytest.mark.rtx
def test_an_engine_that_cannot_be_loaded_is_not_readable(rtx, tmp_path) -> None:
    (tmp_path / "m.engine").write_bytes(b"not an engine")
    report = tensorrt.inspect(tmp_path / "m.engine", {"mm": "y"}, "tensorrt_rtx")
    assert (report.readable, report.source, report.nodes) == (False, "inspector", {})
    assert "cannot be loaded" in report.reason

"""Graphs in 16 bits: which type every node has, and what the graph computes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes import pipeline
from channelfold.passes.base import Context
from channelfold.passes.cast import Cast
from channelfold.passes.layers.switchboard import dequantized
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import raise_opset
from channelfold.tests.graphs import build, data_from, feeds, listing, node, ops, random, reasons
from channelfold.tests.passes.cast.casts import EPSILON, cast, computed, error, twin

HALF = {"float16": np.float16, "bfloat16": "bfloat16"}


def mlp(**more) -> gs.Graph:
    body = "h = MatMul(x, A)  r = Relu(h)  y = MatMul(r, B)"
    return build("(float[N,16] x) => (float[] y)", body, A=(16, 32), B=(32, 4), kind="float", **more)


def test_a_network_has_one_type_between_its_borders():
    graph = mlp()
    feed = feeds(graph)
    before = computed(graph, feed)
    outcome = cast(graph)
    assert listing(graph).splitlines() == [
        "x_float16 = Cast<to=10>(x)",
        "h = MatMul(x_float16, A)",
        "r = Relu(h)",
        "y_float16 = MatMul(r, B)",
        "y = Cast<to=1>(y_float16)",
    ]
    assert [t.dtype for t in graph.tensors().values() if isinstance(t, gs.Constant)] == [np.float16] * 2
    assert outcome.facts["bytes"] == [4 * (16 * 32 + 32 * 4), 2 * (16 * 32 + 32 * 4)]
    assert [change.what for change in outcome.changed] == ["MatMul: float16", "Relu: float16", "MatMul: float16"]
    assert 0 < error(before, computed(graph, feed)) < 2 * EPSILON["float16"]
    assert not cast(graph).changed


def test_bfloat16_raises_the_opset_where_operators_take_the_type_late(tmp_path):
    signature, body = "(float[1,16,8,8] x) => (float[] y)", "h = Conv(x, W)  y = Relu(h)"
    graph = build(signature, body, W=(16, 16, 3, 3), kind="float")
    feed = feeds(graph)
    before = computed(graph, feed)
    step = Cast(type="bfloat16")
    assert (step.opset_for(graph), Cast().opset_for(graph)) == (22, 0)
    assert "ONNX has no bfloat16 Conv before opset 22" in reasons(cast(build(signature, body, W=(16, 16, 3, 3),
                                                                            kind="float"), step))[0]  # fmt: skip
    graph = raise_opset(graph, 22)
    assert not cast(graph, step).refused
    assert 0 < error(before, twin(graph, tmp_path, feed)) < 2 * EPSILON["bfloat16"]


def test_onnxruntime_has_no_bfloat16():
    with pytest.raises(UsageError, match="bfloat16"):
        Cast(type="bfloat16", target="onnxruntime")
    assert "no faster" in cast(mlp(), Cast(target="onnxruntime")).warnings[-1]


@pytest.mark.parametrize("op", ["ConvTranspose", "Mish", "HardSwish", "LpNormalization"])
def test_what_tensorrt_does_not_build_in_bfloat16_stays(op):
    inputs, more = ("x, W", {"W": (16, 16, 3, 3)}) if op == "ConvTranspose" else ("x", {})
    graph = build("(float[1,16,8,8] x) => (float[] y)", f"a = Relu(x) y = {op}({inputs})", opset=22, kind="float",
                  **more)  # fmt: skip
    outcome = cast(graph, Cast(type="bfloat16"))
    assert reasons(outcome) == [f"{op} stays float32: TensorRT has no bfloat16 {op}"]


def test_nodes_stay_by_name_and_by_operator():
    graph = mlp()
    name = graph.nodes[0].name
    outcome = cast(graph, Cast(exclude=(name,), exclude_ops=("Relu",)))
    assert reasons(outcome) == [
        f"MatMul stays float32: excluded by pattern {name!r}",
        "Relu stays float32: excluded by operator type Relu",
    ]
    assert ops(graph) == ["MatMul", "Relu", "Cast", "MatMul", "Cast"]


def test_a_tensor_is_cast_once_for_all_its_readers_and_moves_follow_the_islands():
    body = """
        h = MatMul(x, A)
        s = Exp(h)  t = Transpose(s)  u = Transpose(t)  e = Exp(u)
        a = MatMul(e, B)  b = MatMul(e, C)  y = Add(a, b)
    """
    graph = build("(float[N,8] x) => (float[] y)", body, A=(8, 8), B=(8, 4), C=(8, 4), kind="float")
    cast(graph, Cast(exclude_ops=("Exp",)))
    casts = [(n.inputs[0].name, n.outputs[0].name) for n in graph.nodes if n.op == "Cast"]
    assert casts == [("x", "x_float16"), ("h", "h_float32"), ("e", "e_float16"), ("y_float16", "y")]
    assert edit.dtype(graph.tensors()["t"]) == np.float32


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_inputs_and_outputs_take_the_type_where_asked(kind, tmp_path):
    body = "h = MatMul(x, A)  r = Exp(h)  s = Transpose(r)  y = Transpose(s)  z = MatMul(h, A)"
    graph = build("(float[N,8] x) => (float[] y, float[] z, float[] r)", body, A=(8, 8), kind="float")
    feed = feeds(graph)
    before = computed(graph, feed)
    step = Cast(type=kind, io_type="cast", exclude_ops=("Exp",))
    (record,) = pipeline.run(graph, [step], Context())[1]
    assert not record.get("warnings") or kind == "float16"
    assert {edit.dtype(t).name for t in (*graph.inputs, *graph.outputs)} == {kind}
    assert [n.op for n in graph.nodes if n.op == "Cast"] == ["Cast", "Cast"]
    after = computed(graph, feed) if kind == "float16" else twin(graph, tmp_path, feed)
    assert error(before, after) < 16 * EPSILON[kind]


def test_an_input_that_overflows_keeps_its_type():
    graph = build("(float[4,8] x) => (float[] y)", "h = Mul(x, c)  y = MatMul(h, A)", A=(8, 8), c=np.array(1e-3),
                  kind="float")  # fmt: skip
    outcome = cast(graph, Cast(io_type="cast"), data_from({"x": np.full((4, 8), 1e5, np.float32)}))
    assert [edit.dtype(t) for t in (*graph.inputs, *graph.outputs)] == [np.float32, np.float16]
    assert [r.code for r in outcome.refused] == ["a value overflows"]


def test_an_output_inside_the_graph_keeps_its_type():
    graph = build("(float[N,8] x) => (float[] h, float[] y)", "h = MatMul(x, A)  y = MatMul(h, B)", A=(8, 8), B=(8, 4),
                  kind="float")  # fmt: skip
    cast(graph)
    assert listing(graph).splitlines()[1:] == [
        "h_float16 = MatMul(x_float16, A)",
        "h = Cast<to=1>(h_float16)",
        "y_float16 = MatMul(h_float16, B)",
        "y = Cast<to=1>(y_float16)",
    ]


def test_weights_that_do_not_survive_are_named():
    weights = {"A": random((8, 8)), "B": 1e5 * random((8, 8)), "C": 1e-7 * random((8, 8)), "D": random((8, 8))}
    weights["D"][0] *= 1e-6
    body = "a = MatMul(x, A)  b = MatMul(a, B)  c = MatMul(b, C)  y = MatMul(c, D)"
    graph = build("(float[N,8] x) => (float[] y)", body, kind="float", **weights)
    feed = feeds(graph)
    before = computed(graph, feed)
    outcome = cast(graph)
    assert [(r.code, r.reason.split("(")[1].split()[0]) for r in outcome.refused] == [
        ("a constant overflows", "B"),
        ("a constant falls below the normal numbers", "C"),
    ]
    assert outcome.facts["subnormal"] == 8
    assert outcome.facts["float32_nodes"] == [graph.tensors()[t].inputs[0].name for t in ("b", "c")]
    assert error(before, computed(graph, feed)) < 3 * EPSILON["float16"]


ROOT_MEAN_SQUARE = """
    h = MatMul(x, A)
    q = Pow(h, two)  m = ReduceMean<axes=[-1], keepdims=1>(q)  v = Add(m, eps)  s = Sqrt(v)  n = Div(h, s)
    y = MatMul(n, B)
"""


def rms_norm(scale: float, eps: float = 1e-5) -> gs.Graph:
    return build("(float[4,16] x) => (float[] y)", ROOT_MEAN_SQUARE, A=scale * random((16, 16)), B=(16, 8),
                 two=np.array(2.0), eps=np.array(eps), kind="float")  # fmt: skip


def test_a_square_that_overflows_stays_and_is_named():
    """Activations of 300: their squares are 90,000, and float16 ends at 65,504."""
    graph = rms_norm(100.0)
    feed = feeds(graph)
    before = computed(graph, feed)
    assert 300 < np.abs(feed["x"] @ (100.0 * random((16, 16), "")).astype(np.float32)).max() < 3e4
    outcome = cast(graph, data=data_from(feed))
    kept = {r.node.split("_")[0]: r.code for r in outcome.refused}
    assert kept == {
        "Pow": "a value overflows",
        "ReduceMean": "a value overflows",
        "Add": "a value overflows",
        "Sqrt": "a value overflows",
        "Div": "a norm takes a difference, which 16 bits would round",
    }
    after = computed(graph, feed)
    assert np.isfinite(after["y"]).all()
    assert error(before, after) < 4 * EPSILON["float16"]


def test_with_data_a_norm_stays_only_where_it_must():
    small, blind = rms_norm(1.0), rms_norm(1.0)
    assert not cast(small, data=data_from(feeds(small))).refused
    outcome = cast(blind)
    assert {r.code for r in outcome.refused} == {"it may overflow, and no data tell"}
    assert len(outcome.refused) == 5
    assert "give --calibration" in outcome.warnings[0]
    assert not cast(rms_norm(1.0), Cast(exclude=("none",), type="bfloat16")).warnings[1:]


def test_a_small_epsilon_keeps_the_division(tmp_path):
    """1e-12 is zero in float16: rows of zeros would become NaN."""
    for step in (Cast(), Cast(type="bfloat16")):
        graph = rms_norm(1.0, eps=1e-12)
        feed = feeds(graph)
        data = data_from(feed)
        feed = {"x": np.where(np.arange(4)[:, None] == 1, 0, feed["x"]).astype(np.float32)}
        before = computed(graph, feed)
        outcome = cast(graph, step, data)
        after = computed(graph, feed) if step.type == "float16" else twin(graph, tmp_path, feed)
        assert error(before, after) < 4 * EPSILON[step.type]
        assert "Div" in {r.node.split("_")[0] for r in outcome.refused}


def test_a_small_divisor_stays():
    graph = build("(float[4,16] x) => (float[] y)", "h = Mul(x, c)  y = Reciprocal(h)", c=np.array(1e-3), kind="float")
    feed = {"x": np.full((4, 16), 0.01, np.float32)}
    before = computed(graph, feed)
    outcome = cast(graph, data=data_from(feed))
    assert {r.code for r in outcome.refused} == {"a divisor falls below the normal numbers", "a value overflows"}
    assert error(before, computed(graph, feed)) < 2 * EPSILON["float16"]


MASKED = """
    q = MatMul(x, A)  k = MatMul(x, B)  t = Transpose<perm=[0,2,1]>(k)  s = MatMul(q, t)
    f = Cast<to=1>(mask)  g = Sub(one, f)  m = Mul(g, low)  n = Unsqueeze(m, axes)
    z = Add(s, n)  p = Softmax(z)  y = MatMul(p, x)
"""


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_masks_are_limited_and_no_infinity_comes_up(kind, tmp_path):
    """-3.4e38 is the usual mask; a row that is masked as a whole must not become NaN."""
    low = np.array(np.finfo(np.float32).min)
    graph = build("(float[2,4,16] x, int64[2,4] mask) => (float[] y)", MASKED, A=(16, 16), B=(16, 16), low=low,
                  one=np.array(1.0), axes=np.array([1]), kind="float")  # fmt: skip
    feed = {"x": random((2, 4, 16)).astype(np.float32) / 4, "mask": np.array([[1, 1, 1, 0], [0, 0, 0, 0]])}
    before = computed(graph, feed)
    for data in (None, data_from(feed)):
        copy = build("(float[2,4,16] x, int64[2,4] mask) => (float[] y)", MASKED, A=(16, 16), B=(16, 16), low=low,
                     one=np.array(1.0), axes=np.array([1]), kind="float")  # fmt: skip
        outcome = cast(copy, Cast(type=kind, max_error=0), data)  # a row that is masked as a whole changes
        assert list(outcome.facts["limited"]) == ["low"]
        assert "low" in " ".join(outcome.warnings)
        assert edit.dtype(copy.tensors()["z"]).name == kind
        after = computed(copy, feed) if kind == "float16" else twin(copy, tmp_path, feed)
        assert np.isfinite(after["y"]).all()
        first = {"y": before["y"][:1]}, {"y": after["y"][:1]}
        assert error(*first) < 8 * EPSILON[kind]


def test_a_large_factor_of_scores_is_no_mask():
    body = "s = MatMul(x, A)  z = Mul(s, c)  y = Softmax(z)"
    graph = build("(float[4,16] x) => (float[] y)", body, A=(16, 16), c=np.array(1e6), kind="float")
    assert [r.code for r in cast(graph).refused] == ["a constant overflows"]


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_the_angles_of_positions_stay_exact(kind, tmp_path):
    """Position 4,097 is 4,096 in float16: a rotary embedding would turn by another angle."""
    body = """
        p = Cast<to=1>(positions)  u = Unsqueeze(p, axes)  a = MatMul(u, rates)
        c = Cos(a)  s = Sin(a)  b = Concat<axis=-1>(c, s)  h = MatMul(x, A)  y = Mul(h, b)
    """
    graph = build("(float[3,16] x, int64[3] positions) => (float[] y)", body, A=(16, 16), axes=np.array([1]),
                  rates=np.array([[10.0**-i for i in range(8)]]), kind="float")  # fmt: skip
    feed = {"x": random((3, 16)).astype(np.float32), "positions": np.array([4097, 70001, 3])}
    before = computed(graph, feed)
    outcome = cast(graph, Cast(type=kind))
    assert {r.node.split("_")[0] for r in outcome.refused} == {"MatMul", "Cos", "Sin"}
    after = computed(graph, feed) if kind == "float16" else twin(graph, tmp_path, feed)
    assert error(before, after) < 4 * EPSILON[kind]


def test_sizes_that_become_integers_stay_exact():
    body = (
        "s = Shape(x)  f = Cast<to=1>(s)  g = Mul(f, c)  h = Floor(g)  i = Cast<to=7>(h)  r = Reshape(x, i)  y = Neg(r)"
    )
    graph = build("(float[1,4099] x) => (float[] y)", body, c=np.array([1.0, 1.0]), kind="float")
    outcome = cast(graph)
    assert {r.node.split("_")[0] for r in outcome.refused} == {"Mul", "Floor", "Cast"}
    assert computed(graph, feeds(graph))["y"].shape == (1, 4099)


def test_attributes_that_say_a_type_follow():
    body = """
        i = Cast<to=1>(n)  z = ConstantOfShape(shape)  e = EyeLike<dtype=1>(x)
        a = MatMul(x, e)  b = Add(a, z)  c = Mul(b, x)  d = Cast<to=11>(c)  f = Cast<to=1>(d)  y = Add(f, i)
    """
    graph = build("(float[4,4] x, bool[4] n) => (float[] y)", body, shape=np.array([4]), kind="float")
    feed = {"x": random((4, 4)).astype(np.float32), "n": np.array([True, False, True, True])}
    before = computed(graph, feed)
    cast(graph)
    assert [n.attrs["to"] for n in graph.nodes if n.op == "Cast"] == [10, 10, 11, 10, 1]
    assert node(graph, "EyeLike").attrs["dtype"] == 10
    assert node(graph, "ConstantOfShape").attrs["value"].dtype == np.float16
    assert error(before, computed(graph, feed)) < 4 * EPSILON["float16"]


def test_casts_of_the_model_between_float16_and_float32_go():
    body = """
        h = Cast<to=10>(x)  a = Relu(h)  f = Cast<to=1>(a)
        b = MatMul(f, A)  c = Cast<to=10>(b)  d = Neg(c)  y = Cast<to=1>(d)
    """
    graph = build("(float[4,16] x) => (float[] y)", body, A=(16, 16), kind="float")
    cast(graph)
    assert ops(graph) == ["Cast", "Relu", "MatMul", "Neg", "Cast"]


def test_inputs_that_must_be_float32_stay():
    body = 'a = Relu(x)  y = Resize<mode="linear">(a, roi, scales)'
    graph = build("(float[1,2,4,4] x) => (float[] y)", body, roi=np.zeros(0, np.float32),
                  scales=np.array([1, 1, 2, 2], np.float32), kind="float")  # fmt: skip
    cast(graph)
    resize = node(graph, "Resize")
    assert [edit.dtype(t) for t in resize.inputs] == [np.float16, np.float32, np.float32]


def test_what_onnx_has_in_float32_alone_is_named():
    body = "a = Relu(x)  r = Range(zero, limit, one)  y = Mul(a, r)"
    graph = build("(float[4] x) => (float[] y)", body, zero=np.array(0.0), limit=np.array(4.0), one=np.array(1.0),
                  kind="float")  # fmt: skip
    assert reasons(cast(graph)) == ["Range stays float32: ONNX has no float16 Range"]


def test_norms_and_their_statistics():
    body = """
        a, mean, deviation = LayerNormalization(x, g, b)  c = MatMul(a, A)
        y = BatchNormalization(c, g, b, m, v)  z = Add(mean, deviation)
    """
    vectors = {"g": 8, "b": 8, "m": 8, "v": np.full(8, 1e-3)}
    graph = build("(float[4,8] x) => (float[] y, float[] z)", body, A=(8, 8), kind="float", **vectors)
    feed = feeds(graph)
    before = computed(graph, feed)
    cast(graph)
    norm = node(graph, "LayerNormalization")
    assert [edit.dtype(t) for t in norm.outputs] == [np.float16, np.float32, np.float32]
    assert {edit.dtype(t) for t in node(graph, "BatchNormalization").inputs} == {np.dtype(np.float16)}
    assert error(before, computed(graph, feed)) < 8 * EPSILON["float16"]


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_int8_graphs_take_scales_of_the_type(kind, tmp_path):
    from channelfold.passes.quantize import Quantize

    graph = build("(float[8,32] x) => (float[] y)", "h = MatMul(x, A)  r = Relu(h)  y = MatMul(r, B)", A=(32, 32),
                  B=(32, 32), opset=19, kind="float")  # fmt: skip
    feed = feeds(graph)
    data = data_from(feed)
    Quantize().apply(graph, Context(calibration=data))
    before = computed(graph, feed)
    outcome = cast(graph, Cast(type=kind), data)
    assert not outcome.refused
    for found in (n for n in graph.nodes if n.op in ("QuantizeLinear", "DequantizeLinear")):
        assert edit.dtype(found.inputs[1]).name == kind
    after = computed(graph, feed) if kind == "float16" else twin(graph, tmp_path, feed)
    assert error(before, after) < 16 * EPSILON[kind]


@pytest.mark.parametrize(
    ("codes", "attrs", "scale", "zero"),
    [
        ("int8", "axis = 1", [1e-2, 1e-6, 0.0, 3e-8], None),
        ("uint8", "axis = 1", [1e-2, 1e-6, 1e-9, 3e-8], [128, 120, 0, 255]),
        ("int4", "axis = 0, block_size = 4", np.full((2, 4), 1e-7), None),
        ("int8", "axis = 1", 1e-12, None),
        ("float8_e4m3fn", "axis = -1", [1e-2, 1e-6, 1e-9, 3e-8], None),
    ],
)
def test_scales_below_float16_are_raised_and_codes_follow(codes, attrs, scale, zero):
    """A weight moves by half a step of its new scale at most, which is 2^-17 where that is larger than the old one."""
    kind = getattr(ml_dtypes, codes, codes)
    constants = {"W": np.arange(32).reshape(8, 4) % 8, "s": np.array(scale)} | ({} if zero is None else {"z": zero})
    held = {name: np.asarray(v).astype("f4" if name == "s" else kind) for name, v in constants.items()}
    body = f"w = DequantizeLinear<{attrs}>({', '.join(constants)})  y = MatMul(x, w)"
    graph = build("(float[3,8] x) => (float[3,4] y)", body, opset=21, kind="float", **held)

    def weight() -> np.ndarray:
        found = node(graph, "DequantizeLinear")
        stored, scales, *zeros = (tensor.values for tensor in found.inputs)
        return dequantized(stored, scales.astype(np.float32), zeros[0] if zeros else None, found.attrs)

    before = weight()
    cast(graph)
    scales = node(graph, "DequantizeLinear").inputs[1].values
    assert (scales.dtype, scales.min()) == (np.float16, 2.0**-17)
    assert np.all(np.abs(weight() - before) <= 2.0**-18 + 2.0**-11 * np.abs(before))


def test_scales_need_opset_19():
    graph = build("(float[8,32] x) => (float[] y)", "q = QuantizeLinear(x, s)  y = DequantizeLinear(q, s)",
                  s=np.array(0.01), opset=13, kind="float")  # fmt: skip
    assert Cast().opset_for(graph) == 19
    assert Cast(type="bfloat16").opset_for(graph) == 19


def test_a_cache_grows_in_its_own_type():
    """What is new is converted, and what the products read: the cache itself is not rounded."""
    graph = build("(float[1,3,8] past, float[1,1,8] x) => (float[] present, float[] y)",
                  "k = MatMul(x, W)  present = Concat<axis=1>(past, k)  t = Transpose<perm=[0,2,1]>(present)"
                  "  y = MatMul(x, t)", W=(8, 8), kind="float")  # fmt: skip
    outcome = cast(graph)
    (concat,) = (node for node in graph.nodes if node.op == "Concat")
    assert {str(edit.dtype(t)) for t in (*concat.inputs, *concat.outputs)} == {"float32"}
    assert outcome.facts["casts"] == 4  # of x, of the new key, of the keys that are multiplied, of y

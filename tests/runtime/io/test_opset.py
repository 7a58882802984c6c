# ruff: noqa: E501 - the table of cases has one case a line
"""Raising opsets: the same outputs before and after, or a clear refusal."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

from channelfold.runtime.errors import ModelError
from channelfold.runtime.io.files import check, export, import_model, load, raise_opset, session
from channelfold.runtime.io.session import Session
from channelfold.runtime.io.weights import MappedValues

# name of the operator, opset, inputs, outputs, nodes
CASES = [
    ("ArgMax", 7, "float[2,3] x", "int64[2,1] y", "y = ArgMax<axis = 1>(x)"),
    ("AveragePool", 7, "float[1,1,6,6] x", "float[1,1,6,6] y", "y = AveragePool<kernel_shape = [3,3], pads = [1,1,1,1]>(x)"),
    ("BatchNormalization", 7, "float[2,3,4] x, float[3] a", "float[2,3,4] y", "v = Abs(a) y = BatchNormalization(x, a, a, a, v)"),
    ("BatchNormalization", 9, "float[2,3,4] x, float[3] a", "float[2,3,4] y", "v = Abs(a) y = BatchNormalization(x, a, a, a, v)"),
    ("Cast", 7, "float[2,3] x", "int32[2,3] y", "y = Cast<to = 6>(x)"),
    ("Clip", 7, "float[2,3] x", "float[2,3] y", "y = Clip<min = -0.5, max = 0.5>(x)"),
    ("Clip min", 10, "float[2,3] x", "float[2,3] y", "y = Clip<min = 0.0>(x)"),
    ("Clip max", 10, "float[2,3] x", "float[2,3] y", "y = Clip<max = 0.0>(x)"),
    ("Clip bare", 10, "float[2,3] x", "float[2,3] y", "y = Clip(x)"),
    ("Clip float16", 10, "float16[2,3] x", "float16[2,3] y", "y = Clip<min = -0.5, max = 0.5>(x)"),
    ("ConvTranspose", 7, "float[1,2,4,4] x, float[2,3,3,3] w", "float[1,3,9,9] y", "y = ConvTranspose<strides = [2,2]>(x, w)"),
    ("CumSum", 11, "float[2,3] x", "float[2,3] y", "a = Constant<value = int64 {1}>() y = CumSum(x, a)"),
    ("custom domain", 11, "float[2,3] x", "float[1,2,3] y", "z = com.microsoft.Gelu(x) y = Unsqueeze<axes = [0]>(z)"),
    ("DepthToSpace", 7, "float[1,8,2,2] x", "float[1,2,4,4] y", "y = DepthToSpace<blocksize = 2>(x)"),
    ("DFT", 17, "float[1,4,1] x", "float[1,4,2] y", "y = DFT<axis = 1>(x)"),
    ("Dropout", 7, "float[2,3] x", "float[2,3] y", "y = Dropout<ratio = 0.3>(x)"),
    ("Dropout mask unread", 7, "float[2,3] x", "float[2,3] y", "y, m = Dropout<ratio = 0.3>(x)"),
    ("Equal", 7, "int32[3] a, int32[3] b", "bool[3] y", "y = Equal(a, b)"),
    ("Flatten", 7, "float[2,3,4] x", "float[6,4] y", "y = Flatten<axis = 2>(x)"),
    ("Gemm", 7, "float[2,3] x, float[4,3] w, float[4] b", "float[2,4] y", "y = Gemm<transB = 1, alpha = 0.5>(x, w, b)"),
    ("GridSample", 16, "float[1,1,4,4] x, float[1,3,3,2] g", "float[1,1,3,3] y", "y = GridSample(x, g)"),
    ("GridSample cubic", 16, "float[1,1,4,4] x, float[1,3,3,2] g", "float[1,1,3,3] y", 'y = GridSample<mode = "bicubic">(x, g)'),
    ("GRU", 7, "float[2,1,3] x, float[1,6,3] w, float[1,6,2] r", "float[2,1,1,2] y", "y = GRU<hidden_size = 2>(x, w, r)"),
    ("If", 9, "bool c, float[2,3] x", "float[2,3] y", """y = If (c) <
        then_branch = t () => (float[2,3] a) { a = Clip<min = 0.0>(x) }, else_branch = e () => (float[2,3] b) { b = Neg(x) }>"""),
    ("If axes", 11, "bool c, float[2,3] x", "float[2] y", """y = If (c) <
        then_branch = t () => (float[2] a) { a = ReduceSum<axes = [1], keepdims = 0>(x) },
        else_branch = e () => (float[2] b) { s = Softmax(x) b = ReduceMean<axes = [1], keepdims = 0>(s) }>"""),
    ("Loop", 10, "float[2] x", "float[2] y", """n = Constant<value = int64 {3}>() t = Constant<value = bool {1}>()
        y = Loop (n, t, x) <body = b (int64 i, bool c, float[2] s) => (bool d, float[2] o) { d = Identity(c) o = Clip<min = -1.0>(s) }>"""),
    ("LogSoftmax", 11, "float[2,3,4] x", "float[2,3,4] y", "y = LogSoftmax(x)"),
    ("LpPool", 11, "float[1,1,6,6] x", "float[1,1,5,5] y", "y = LpPool<kernel_shape = [2,2]>(x)"),
    ("LSTM", 7, "float[2,1,3] x, float[1,8,3] w, float[1,8,2] r", "float[2,1,1,2] y, float[1,1,2] h", "y, h = LSTM<hidden_size = 2>(x, w, r)"),
    ("MaxPool", 8, "float[1,1,6,6] x", "float[1,1,3,3] y, int64[1,1,3,3] i", "y, i = MaxPool<kernel_shape = [2,2], strides = [2,2]>(x)"),
    ("MVN", 9, "float[2,3,2,2] x", "float[2,3,2,2] y", "y = MeanVarianceNormalization(x)"),
    ("OneHot", 9, "int64[3] x", "float[3,4] y", "d = Constant<value = int64[1] {4}>() v = Constant<value = float[2] {0, 1}>() y = OneHot(x, d, v)"),
    ("Pad", 9, "float[2,3] x", "float[4,4] y", "y = Pad<pads = [0,1,2,0], value = 1.5>(x)"),
    ("Pad reflect", 9, "float[4,5] x", "float[6,6] y", 'y = Pad<mode = "reflect", pads = [0,1,2,0]>(x)'),
    ("Pad float16", 9, "float16[2,3] x", "float16[4,4] y", "y = Pad<pads = [0,1,2,0], value = 1.5>(x)"),
    ("QuantizeLinear", 10, "float[2,3] x", "float[2,3] y", """s = Constant<value = float {0.1}>() z = Constant<value = uint8 {128}>()
        q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)"""),
    ("QuantizeLinear axis", 13, "float[2,3] x", "float[2,3] y", """s = Constant<value = float[3] {0.1, 0.2, 0.3}>()
        z = Constant<value = int8[3] {0, 0, 0}>() q = QuantizeLinear<axis = 1>(x, s, z) y = DequantizeLinear<axis = 1>(q, s, z)"""),
    ("ReduceMean", 13, "float[2,3] x", "float[2,1] y", "y = ReduceMean<axes = [-1]>(x)"),
    ("ReduceMean all", 13, "float[2,3] x", "float y", "y = ReduceMean<keepdims = 0>(x)"),
    ("ReduceSum", 11, "float[2,3] x", "float[3] y", "y = ReduceSum<axes = [0], keepdims = 0>(x)"),
    ("ReduceSum all", 11, "float[2,3] x", "float[1,1] y", "y = ReduceSum(x)"),
    ("Reshape", 7, "float[2,3] x", "float[2,3] y", "s = Constant<value = int64[2] {0, -1}>() y = Reshape(x, s)"),
    ("Resize", 10, "float[1,1,3,4] x", "float[1,1,6,8] y", 's = Constant<value = float[4] {1, 1, 2, 2}>() y = Resize(x, s)'),
    ("Resize down", 10, "float[1,1,6,8] x", "float[1,1,3,3] y", 's = Constant<value = float[4] {1, 1, 0.6, 0.4}>() y = Resize(x, s)'),
    ("Resize linear", 10, "float[1,1,6,8] x", "float[1,1,3,12] y", 's = Constant<value = float[4] {1, 1, 0.6, 1.5}>() y = Resize<mode = "linear">(x, s)'),
    ("Resize", 11, "float[1,1,3,4] x", "float[1,1,6,6] y", 'r = Constant<value = float[0] {}>() s = Constant<value = float[4] {1, 1, 2, 1.5}>() y = Resize<mode = "linear">(x, r, s)'),
    ("RNN", 7, "float[2,1,3] x, float[1,2,3] w, float[1,2,2] r", "float[2,1,1,2] y", "y = RNN<hidden_size = 2>(x, w, r)"),
    ("RoiAlign", 10, "float[1,1,6,6] x", "float[1,1,3,3] y", """r = Constant<value = float[1,4] {0, 0, 4, 4}>() b = Constant<value = int64[1] {0}>()
        y = RoiAlign<output_height = 3, output_width = 3>(x, r, b)"""),
    ("Scan", 9, "float[2] i, float[3,2] x", "float[2] y, float[3,2] z", """y, z = Scan<num_scan_inputs = 1,
        body = b (float[2] s, float[2] e) => (float[2] t, float[2] o) { t = Add(s, e) o = Clip<min = 0.0>(t) }>(i, x)"""),
    ("Scatter", 9, "float[3,3] x", "float[3,3] y", "i = Constant<value = int64[1,2] {0, 2}>() u = Constant<value = float[1,2] {9, 8}>() y = Scatter(x, i, u)"),
    ("Slice", 9, "float[4,5] x", "float[2,4] y", "y = Slice<axes = [0,1], starts = [1,0], ends = [3,-1]>(x)"),
    ("Slice bare", 9, "float[4,5] x", "float[2,4] y", "y = Slice<starts = [1,0], ends = [3,4]>(x)"),
    ("Softmax", 9, "float[2,3,4] x", "float[2,3,4] y", "y = Softmax(x)"),
    ("Softmax 0", 9, "float[2,3,4] x", "float[2,3,4] y", "y = Softmax<axis = 0>(x)"),
    ("Softmax -2", 11, "float[2,3,4] x", "float[2,3,4] y", "y = Softmax<axis = -2>(x)"),
    ("Softmax last", 11, "float[2,3,4] x", "float[2,3,4] y", "y = Softmax<axis = 2>(x)"),
    ("Softmax unknown rank", 11, "float[N,3,4] x, int64[3] s", "float[a,b,c] y", "a = Abs(s) r = Reshape(x, a) y = Softmax(r)"),
    ("Split", 11, "float[4,6] x", "float[4,2] y, float[4,4] z", "y, z = Split<axis = 1, split = [2,4]>(x)"),
    ("Split even", 11, "float[4,6] x", "float[4,3] y, float[4,3] z", "y, z = Split<axis = 1>(x)"),
    ("Split even", 13, "float[4,6] x", "float[4,3] y, float[4,3] z", "y, z = Split<axis = 1>(x)"),
    ("Squeeze", 11, "float[1,3,1] x", "float[3,1] y", "y = Squeeze<axes = [0]>(x)"),
    ("Squeeze all", 11, "float[1,3,1] x", "float[3] y", "y = Squeeze(x)"),
    ("TopK", 9, "float[2,5] x", "float[2,2] y, int64[2,2] i", "y, i = TopK<k = 2>(x)"),
    ("TopK", 10, "float[2,5] x", "float[2,2] y, int64[2,2] i", "k = Constant<value = int64[1] {2}>() y, i = TopK(x, k)"),
    ("Unsqueeze", 11, "float[3] x", "float[1,3,1] y", "y = Unsqueeze<axes = [0,2]>(x)"),
    ("Upsample", 7, "float[1,1,2,3] x", "float[1,1,4,6] y", 'y = Upsample<scales = [1.0,1.0,2.0,2.0]>(x)'),
    ("Upsample linear", 7, "float[1,1,2,3] x", "float[1,1,4,6] y", 'y = Upsample<mode = "linear", scales = [1.0,1.0,2.0,2.0]>(x)'),
    ("Upsample", 9, "float[1,1,6,8] x", "float[1,1,9,19] y", "s = Constant<value = float[4] {1, 1, 1.6, 2.4}>() y = Upsample(x, s)"),
    ("Upsample linear", 9, "float[1,1,6,8] x", "float[1,1,9,19] y", 's = Constant<value = float[4] {1, 1, 1.6, 2.4}>() y = Upsample<mode = "linear">(x, s)'),
    ("Upsample by input", 9, "float[1,1,2,3] x, float[4] k", "float[a,b,c,d] y", "s = Div(k, k) y = Upsample(x, s)"),
]  # fmt: skip
REFUSED = [
    ("Scan", 8, "float[1,2] i, float[1,3,2] x", "float[1,2] y, float[1,3,2] z", """y, z = Scan<num_scan_inputs = 1,
        body = b (float[2] s, float[2] e) => (float[2] t, float[2] o) { t = Add(s, e) o = Neg(t) }>("", i, x)"""),
    ("Dropout", 7, "float[2] x", "float[2] y, float[2] m", "y, m = Dropout(x)"),
    ("Hardmax", 12, "float[2,3,4] x", "float[2,3,4] y", "y = Hardmax(x)"),
    ("BatchNormalization", 7, "float[2,3] x, float[3] a", "float[2,3] y", "y = BatchNormalization<spatial = 0>(x, a, a, a, a)"),
    ("BatchNormalization", 9, "float[2,3] x, float[3] a", "float[2,3] y, float[3] m", "y, m = BatchNormalization(x, a, a, a, a)"),
    ("GroupNormalization", 18, "float[1,4,3] x, float[2] s", "float[1,4,3] y", "y = GroupNormalization<num_groups = 2>(x, s, s)"),
    ("Resize", 10, "float[1,1,3,4] x, float[4] s", "float[a,b,c,d] y", "y = Resize(x, s)"),
    ("Resize", 10, "float[1,1,6,8] x", "float[1,1,3,16] y", "s = Constant<value = float[4] {1, 1, 0.5, 2}>() y = Resize(x, s)"),
]  # fmt: skip


def _model(opset: int, inputs: str, outputs: str, nodes: str) -> onnx.ModelProto:
    imports = f'"" : {opset}, "com.microsoft" : 1'
    text = f"<ir_version: 7, opset_import: [{imports}]> g ({inputs}) => ({outputs}) {{ {nodes} }}"
    return onnx.parser.parse_model(text)


def _feed(model: onnx.ModelProto, name: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    feed = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = [dim.dim_value or 2 for dim in tensor.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        feed[value.name] = (rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)).astype(
            dtype
        )
    return feed


def _ids(cases) -> list[str]:
    return [f"{name}-{opset}" for name, opset, *_ in cases]


@pytest.mark.parametrize("new", [13, 17, 21])
@pytest.mark.parametrize(("name", "opset", "inputs", "outputs", "nodes"), CASES, ids=_ids(CASES))
def test_outputs_stay(name, opset, inputs, outputs, nodes, new, tmp_path):
    model = _model(opset, inputs, outputs, nodes)
    feed = _feed(model, name)
    if name == "Softmax unknown rank":
        feed["s"] = np.array([2, 3, 4])
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    before = Session(path, threads=1).run(feed)
    raised = raise_opset(load(path), new)
    assert raised.opset == max(opset, new)
    check(raised)
    after = session(raised, threads=1).run(feed)
    for key, expected in before.items():
        assert (after[key].shape, after[key].dtype) == (expected.shape, expected.dtype)
        # Equal, but for kernels of a new version that add up in another order: a few units in the last place.
        np.testing.assert_allclose(after[key], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "opset", "inputs", "outputs", "nodes"), REFUSED, ids=_ids(REFUSED))
def test_what_would_change_is_refused(name, opset, inputs, outputs, nodes):
    model = _model(opset, inputs, outputs, nodes)
    model.graph.node[-1].name = "the_node"
    with pytest.raises(ModelError, match=rf"from opset {opset} to 21: node 'the_node': .*{name}.* opset_version=21"):
        raise_opset(import_model(model), 21)


def test_the_newest_opset_is_the_limit():
    newest = onnx.defs.onnx_opset_version()
    graph = import_model(_model(17, "float[2] x", "float[2] y", "y = Relu(x)"))
    assert raise_opset(graph, newest).opset == newest
    with pytest.raises(ModelError, match=f"Opset {newest + 1} is not known to onnx .* Update onnx"):
        raise_opset(graph, newest + 1)
    assert raise_opset(graph, 17) is graph
    assert raise_opset(graph, 13) is graph


def test_names_metadata_and_weights_stay(tmp_path):
    model = _model(
        11, "float[N,300] x, float[300] w", "float[N,300] y",
        "[first] a = Mul(x, big) [second] b = Softmax(a) [third] c = Unsqueeze<axes = [0]>(b) [fourth] y = Squeeze<axes = [0]>(c)",
    )  # fmt: skip
    model.ir_version = 10
    for name in ("w", "big"):  # w is the default of an input
        model.graph.initializer.append(numpy_helper.from_array(np.ones(300, np.float32), name))
    for holder in (model, model.graph, *model.graph.node, model.graph.input[0]):
        holder.metadata_props.add(key="k", value="v")
    model.graph.node[2].doc_string = "about it"
    model.graph.value_info.append(helper.make_tensor_value_info("a", 1, ["N", 300], "about a"))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    graph = load(path)
    raised = raise_opset(graph, 17)
    (big,) = (t for t in raised.tensors().values() if t.name == "big")
    assert isinstance(big._values, MappedValues)
    assert raised.carried.path == path
    out, large = export(raised)
    assert [proto.name for proto, _ in large] == ["big"]
    assert [tensor.name for tensor in out.graph.initializer if tensor.name == "w"] == ["w"]
    assert [value.name for value in out.graph.input] == ["x", "w"]
    assert list(out.graph.input) == list(model.graph.input)
    assert out.graph.value_info[0] == model.graph.value_info[0]
    names = [node.name for node in out.graph.node]
    assert [names[0], *names[-2:]] == ["first", "third", "fourth"]
    assert next(node.op_type for node in out.graph.node if node.name == "second") == "Softmax"
    for holder in (out, out.graph, *out.graph.node):
        assert [(entry.key, entry.value) for entry in holder.metadata_props] == [("k", "v")]
    assert next(node for node in out.graph.node if node.name == "third").doc_string == "about it"
    assert graph.opset == 11  # the graph itself is as it was
    assert [node.op for node in graph.nodes] == ["Mul", "Softmax", "Unsqueeze", "Squeeze"]


def test_equal_nodes_do_not_share_what_the_converter_adds():
    nodes = "a = Clip<min = 0.0, max = 6.0>(x) b = Clip<min = 0.0, max = 6.0>(a) y = Clip<min = 0.0, max = 1.0>(b)"
    raised = raise_opset(import_model(_model(10, "float[2] x", "float[2] y", nodes)), 13)
    assert [t.values.tolist() for node in raised.nodes for t in node.inputs[1:]] == [0, 6, 0, 6, 0, 1]
    assert len({t.name for node in raised.nodes for t in node.inputs[1:]}) == 6


def test_a_function_is_raised_with_its_model():
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 11, "local" : 1]> g (float[1,3] x) => (float[3] y) { y = local.f(x) }
        <opset_import: ["" : 11], domain: "local"> f (p) => (q) { s = Squeeze<axes = [0]>(p) q = Softmax<axis = 0>(s) }"""
    )
    raised = raise_opset(import_model(model), 17)
    check(raised)
    x = np.array([[1, 2, 3]], np.float32)
    expected = np.exp(x[0]) / np.exp(x[0]).sum()
    np.testing.assert_allclose(session(raised).run({"x": x})["y"], expected, rtol=1e-6)


def test_an_attribute_that_a_function_is_given_is_refused():
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 11, "local" : 1]> g (float[1,3] x) => (float[3] y) { y = local.f<a = [0]>(x) }
        <opset_import: ["" : 11], domain: "local"> f <a>(p) => (q) { q = Squeeze<axes : ints = @a>(p) }"""
    )
    with pytest.raises(ModelError, match="Squeeze takes an attribute from the function it stands in"):
        raise_opset(import_model(model), 17)


OPEN_SET = Path(os.environ.get("CHANNELFOLD_OPEN_SET", "~/.cache/channelfold-open-set")).expanduser() / "open"


@pytest.mark.open_set
@pytest.mark.skipif(not OPEN_SET.is_dir(), reason="the open set is not there")
@pytest.mark.parametrize("name", ["ocr_rec", "plcmos", "vit_s_focus", "magika"])
def test_real_models(name):
    path = OPEN_SET / f"{name}.onnx"
    graph, run = load(path), Session(path, threads=2)
    rng = np.random.default_rng(0)
    feed = {}
    for spec in run.inputs:
        shape = [d if isinstance(d, int) else {"frames": 300}.get(str(d), 2) for d in spec.shape]
        feed[spec.name] = rng.uniform(0, 1, shape).astype(spec.dtype)
    before = run.run(feed)
    for opset in (13, 17, 21):
        raised = raise_opset(graph, opset)
        check(raised)
        after = session(raised, threads=2).run(feed)
        assert all(np.array_equal(after[key], values) for key, values in before.items())

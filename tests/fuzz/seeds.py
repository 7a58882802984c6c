"""Small models that mutation starts from: each has something that a file can get wrong."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, parser

from channelfold import models

_CNN = """<ir_version: 9, opset_import: ["": 17]> cnn (float[N,3,8,8] x) => (float[N,5] y) {
    c = Conv<pads=[1,1,1,1], kernel_shape=[3,3]>(x, W_8_3_3_3, b_8)
    n = BatchNormalization(c, g_8, s_8, m_8, v_8)
    r = Relu(n)
    d = Conv<group=8, kernel_shape=[3,3]>(r, D_8_1_3_3)
    p = GlobalAveragePool(d)
    f = Flatten(p)
    y = Gemm<transB=1>(f, G_5_8, h_5)
}"""
_ATTENTION = """<ir_version: 9, opset_import: ["": 17]> attention (float[B,S,16] x) => (float[B,S,16] y) {
    n = LayerNormalization<axis=-1>(x, g_16, s_16)
    q = MatMul(n, Q_16_16) k = MatMul(n, K_16_16) v = MatMul(n, V_16_16)
    shape = Constant<value_ints=[0, 0, 4, 4]>()
    back = Constant<value_ints=[0, 0, 16]>()
    qr = Reshape(q, shape) kr = Reshape(k, shape) vr = Reshape(v, shape)
    qh = Transpose<perm=[0,2,1,3]>(qr) kh = Transpose<perm=[0,2,3,1]>(kr) vh = Transpose<perm=[0,2,1,3]>(vr)
    a = MatMul(qh, kh) w = Softmax<axis=-1>(a) o = MatMul(w, vh)
    t = Transpose<perm=[0,2,1,3]>(o) m = Reshape(t, back) z = MatMul(m, O_16_16) r = Add(x, z)
    h = MatMul(r, F_16_32) i = Add(h, b_32) e = Gelu_like(i) u = MatMul(e, U_32_16) y = Add(u, r)
}"""
_SHAPES = """<ir_version: 9, opset_import: ["": 17]> shapes (float[N,4,6] x) => (float[] y, int64[] z) {
    s = Shape(x) zero = Constant<value_int=0>() n = Gather(s, zero) axes = Constant<value_ints=[0]>()
    u = Unsqueeze(n, axes) rest = Constant<value_ints=[24]>() to = Concat<axis=0>(u, rest)
    r = Reshape(x, to) m = MatMul(r, W_24_8) f = ConstantOfShape<value=float[1] {0.5}>(rest)
    e = Expand(f, to) a = Add(r, e) k = MatMul(a, W_24_8) y = Add(m, k) z = ArgMax<axis=1>(y)
}"""
_IF = """<ir_version: 9, opset_import: ["": 17]> branch (float[N,8] x, bool flag) => (float[N,4] y) {
    h = MatMul(x, W_8_8)
    y = If(flag)<
        then_branch = a () => (float[N,4] t) { p = MatMul(h, A_8_4) t = Relu(p) },
        else_branch = b () => (float[N,4] e) { q = MatMul(h, B_8_4) e = Add(q, b_4) }>
}"""
_LOOP = """<ir_version: 9, opset_import: ["": 17]> loop (float[N,8] x) => (float[N,8] y) {
    n = Constant<value_int=3>() go = Constant<value=bool {1}>()
    y = Loop(n, go, x)<body = step (int64 i, bool c, float[N,8] s) => (bool d, float[N,8] t) {
        d = Identity(c) m = MatMul(s, W_8_8) t = Tanh(m)
    }>
}"""
_QDQ = """<ir_version: 9, opset_import: ["": 17]> qdq (float[N,8] x) => (float[N,4] y) {
    s = Constant<value=float {0.05}>() z = Constant<value=int8 {0}>()
    q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
    w = DequantizeLinear<axis=1>(I_8_4, t_4) y = MatMul(d, w)
}"""
_FUNCTION = """<ir_version: 9, opset_import: ["": 17, "own": 1]> outer (float[N,8] x) => (float[N,8] y) {
    h = own.block<alpha=0.5>(x, W_8_8) y = own.block<alpha=0.25>(h, V_8_8)
}
<domain: "own", opset_import: ["": 17]> block <alpha> (x, w) => (y) {
    m = MatMul(x, w) k = Constant<value_float=1.5>() l = Mul(m, k) y = LeakyRelu<alpha: float = @alpha>(l)
}"""
_LSTM = """<ir_version: 9, opset_import: ["": 17]> lstm (float[5,N,4] x) => (float[] y) {
    o, h = LSTM<hidden_size=6>(x, W_1_24_4, R_1_24_6)
    s = Squeeze(h) y = MatMul(s, M_6_3)
}"""
_EMBED = """<ir_version: 9, opset_import: ["": 17]> embed (int64[N,S] ids, int64[N,S] mask) => (float[N,S,4] y) {
    e = Gather(E_32_8, ids) f = Cast<to=1>(mask) axes = Constant<value_ints=[2]>()
    u = Unsqueeze(f, axes) m = Mul(e, u) y = MatMul(m, W_8_4)
}"""
_SEQUENCE = """<ir_version: 9, opset_import: ["": 17]> pieces (float[4,8] x) => (float[] y) {
    l = Constant<value_int=2>() s = SplitToSequence<axis=0>(x, l) i = Constant<value_int=1>()
    a = SequenceAt(s, i) y = MatMul(a, W_8_4)
}"""
_SCAN = """<ir_version: 9, opset_import: ["": 17]> scan (float[4] h, float[5,4] x) => (float[4] last, float[5,4] all) {
    last, all = Scan<num_scan_inputs=1, body = step (float[4] p, float[4] e) => (float[4] n, float[4] o) {
        u = MatMul(p, W_4_4) n = Add(u, e) o = Relu(n)
    }>(h, x)
}"""
_DATA = """<ir_version: 9, opset_import: ["": 17]> data (float[N,8] x) => (float[N,4] y) {
    h = MatMul(x, W_8_64) a = Add(h, b_64) r = Relu(a) y = MatMul(r, V_64_4)
}"""
_GELU = "g = Sigmoid(i) e = Mul(i, g)"


def _model(text: str) -> onnx.ModelProto:
    """A model from text. A name that nothing writes, such as W_8_4, is a weight of these sizes."""
    model = parser.parse_model(text.replace("e = Gelu_like(i)", _GELU))
    graphs, known, weights = [model.graph], set(), {}
    for graph in graphs:
        known |= {v.name for v in graph.input} | {o for node in graph.node for o in node.output}
        graphs += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    for graph in graphs:
        for name in (i for node in graph.node for i in node.input if i and i not in known):
            weights[name] = tuple(int(part) for part in name.split("_")[1:])
    rng = np.random.default_rng(len(text))
    for name, shape in weights.items():
        values = rng.standard_normal(shape).astype(np.float32) / 3
        values = np.abs(values) + np.float32(0.1) if name[0] in "vt" else values
        values = rng.integers(-127, 128, shape).astype(np.int8) if name[0] == "I" else values
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def _sparse() -> onnx.ModelProto:
    values = numpy_helper.from_array(np.array([1.0, 2.0, -1.5], np.float32), "W")
    indices = numpy_helper.from_array(np.array([0, 9, 17], np.int64), "W_indices")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "sparse",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        sparse_initializer=[helper.make_sparse_tensor(values, indices, [6, 4])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@cache
def seeds() -> dict[str, bytes]:
    """The models by name, serialized."""
    texts = {"cnn": _CNN, "attention": _ATTENTION, "shapes": _SHAPES, "if": _IF, "loop": _LOOP, "qdq": _QDQ}
    texts |= {"function": _FUNCTION, "lstm": _LSTM, "embed": _EMBED, "sequence": _SEQUENCE, "scan": _SCAN}
    texts["data"] = _DATA
    found = {name: _model(text) for name, text in texts.items()} | {"sparse": _sparse()}
    found["half"] = _half(found["attention"])
    raw = {name: model.SerializeToString() for name, model in found.items()}
    raw["digits"] = models.path("digits_cnn.onnx").read_bytes()
    folder = os.environ.get("CHANNELFOLD_FUZZ_MODELS")
    raw |= {path.stem: path.read_bytes() for path in sorted(Path(folder).glob("*.onnx"))} if folder else {}
    return raw


def _half(model: onnx.ModelProto) -> onnx.ModelProto:
    out = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in out.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*out.graph.input, *out.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return out

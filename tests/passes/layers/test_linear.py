from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import DoesNotFit, Refused
from channelfold.passes.layers.linear import cast, linears, view
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import check
from channelfold.tests.graphs import assert_same, build, constants, feeds, listing, random, run

X4 = "(float[2,4,5,6] x) => (float[] y)"

# name: (signature, body, constants, (out, in) channels, axis of the input channels, axis of the output channels)
FORMS = {
    "conv": (X4, "y = Conv(x, W, b)", {"W": (3, 4, 2, 3), "b": 3}, (3, 4), 1, 1),
    "conv without bias": (X4, "y = Conv<strides=[2,1]>(x, W)", {"W": (3, 4, 2, 3)}, (3, 4), 1, 1),
    "grouped conv": (X4, "y = Conv<group=2>(x, W, b)", {"W": (6, 2, 3, 3), "b": 6}, (6, 4), 1, 1),
    "depthwise conv": (X4, "y = Conv<group=4>(x, W)", {"W": (8, 1, 3, 3)}, (8, 4), 1, 1),
    "padded conv": (X4, "y = Conv<pads=[1,0,1,0]>(x, W)", {"W": (3, 4, 3, 1)}, (3, 4), 1, 1),
    "conv 1-d": ("(float[2,4,5] x) => (float[] y)", "y = Conv(x, W)", {"W": (3, 4, 2)}, (3, 4), 1, 1),
    "conv 3-d": ("(float[2,4,3,3,3] x) => (float[] y)", "y = Conv(x, W)", {"W": (3, 4, 2, 2, 2)}, (3, 4), 1, 1),
    "transposed conv": (
        X4, "y = ConvTranspose<strides=[2,2], output_padding=[1,0]>(x, W, b)", {"W": (4, 3, 3, 3), "b": 3}, (3, 4), 1, 1
    ),
    "grouped transposed conv": (X4, "y = ConvTranspose<group=2>(x, W)", {"W": (4, 3, 2, 2)}, (6, 4), 1, 1),
    "gemm": ("(float[5,4] x) => (float[] y)", "y = Gemm(x, W, b)", {"W": (4, 3), "b": 3}, (3, 4), 1, 1),
    "gemm transB": (
        "(float[5,4] x) => (float[] y)", "y = Gemm<transB=1, alpha=0.5, beta=2.0>(x, W, b)", {"W": (3, 4), "b": (1, 3)},
        (3, 4), 1, 1,
    ),
    "gemm transA": (
        "(float[4,5] x) => (float[] y)", "y = Gemm<transA=1, beta=2.0>(x, W, b)", {"W": (4, 3), "b": 1}, (3, 4), 0, 1
    ),
    "gemm without C": ("(float[5,4] x) => (float[] y)", "y = Gemm<alpha=-3.0>(x, W)", {"W": (4, 3)}, (3, 4), 1, 1),
    "matmul": ("(float[2,5,4] x) => (float[] y)", "y = MatMul(x, W)", {"W": (4, 3)}, (3, 4), 2, 2),
    "matmul and bias": (
        "(float[2,5,4] x) => (float[] y)", "t = MatMul(x, W)\n y = Add(t, b)", {"W": (4, 3), "b": 3}, (3, 4), 2, 2
    ),
    "bias and matmul": (
        "(float[2,5,4] x) => (float[] y)", "t = MatMul(x, W)\n y = Add(b, t)", {"W": (4, 3), "b": (1, 1, 3)},
        (3, 4), 2, 2,
    ),
    "matmul of a vector": ("(float[4] x) => (float[] y)", "y = MatMul(x, W)", {"W": (4, 3)}, (3, 4), 0, 0),
    "weight on the left": ("(float[2,4,5] x) => (float[] y)", "y = MatMul(W, x)", {"W": (3, 4)}, (3, 4), 1, 1),
    "weight on the left, bias": (
        "(float[4,5] x) => (float[] y)", "t = MatMul(W, x)\n y = Add(t, b)", {"W": (3, 4), "b": (3, 1)}, (3, 4), 0, 0
    ),
    "weight on the left, vector": (
        "(float[4] x) => (float[] y)", "t = MatMul(W, x)\n y = Add(t, b)", {"W": (3, 4), "b": 3}, (3, 4), 0, 0
    ),
    "weight behind a chain": (
        "(float[5,4] x) => (float[] y)",
        "a = Transpose<perm=[1,0]>(W)\n b = Reshape(a, s)\n c = Squeeze(b, k)\n d = Identity(c)\n y = MatMul(x, d)",
        {"W": (3, 4), "s": np.array([0, 1, -1]), "k": np.array([1])}, (3, 4), 1, 1,
    ),
}  # fmt: skip


def linear_of(form):
    signature, body, given, channels, in_axis, out_axis = FORMS[form]
    graph = build(signature, body, **given)
    (linear,) = linears(graph)
    assert linear.channels == channels
    return graph, linear, in_axis, out_axis


def along(vector, axis, ndim):
    return vector.reshape([-1 if i == axis else 1 for i in range(ndim)])


@pytest.mark.parametrize("form", FORMS)
def test_weight_and_bias_written_back_change_nothing(form):
    graph, linear, in_axis, out_axis = linear_of(form)
    feed = feeds(graph)
    before = run(graph, feed)
    weight, bias = linear.weight(), linear.bias()
    assert weight.shape[:2] == (linear.channels[0], linear.channels[1] // linear.groups)
    linear.set_weight(weight.copy())
    linear.set_bias(np.zeros(linear.channels[0]) if bias is None else bias)
    check(graph)
    assert_same(before, run(graph, feed), 1e-15)
    (again,) = linears(graph)
    assert np.array_equal(again.weight(), weight)
    assert again.output.name == "y"
    ndims = {v.ndim for v in (feed["x"], before["y"])}
    assert {again.in_axis % max(ndims), again.out_axis % max(ndims)} == {in_axis, out_axis}


@pytest.mark.parametrize("form", FORMS)
def test_rescaled_is_the_map_around_the_linear(form):
    graph, linear, in_axis, out_axis = linear_of(form)
    outs, ins = linear.channels
    a, c, s = random(outs, "a"), random(outs, "c"), random(ins, "s")
    d = np.zeros(ins) if linear.padded else random(ins, "d")
    x = feeds(graph)["x"]
    y = run(graph, {"x": x * along(s, in_axis, x.ndim) + along(d, in_axis, x.ndim)})["y"]
    linear.install(*linear.rescaled(out_scale=a, out_shift=c, in_scale=s, in_shift=d))
    check(graph)
    assert_same({"y": y * along(a, out_axis, y.ndim) + along(c, out_axis, y.ndim)}, run(graph, {"x": x}), 1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_rescaled_by_nothing_keeps_the_number_of_nodes(form):
    graph, linear, *_ = linear_of(form)
    nodes = len(graph.nodes) - len(linear.chain)
    weight, bias = linear.rescaled()
    assert (bias is None) == (linear.bias() is None)
    linear.install(weight, bias)
    assert len(graph.nodes) == nodes
    assert linear.node.attrs.get("alpha", 1.0) == linear.node.attrs.get("beta", 1.0) == 1.0


def test_respond_is_the_answer_to_a_constant_input():
    graph, linear, *_ = linear_of("grouped conv")
    x = random(4, "level")
    (y,) = run(graph, {"x": np.broadcast_to(x[:, None, None], (2, 4, 5, 6)).copy()}).values()
    expected = linear.respond(linear.weight(), x) + linear.bias()
    assert_same({"y": np.broadcast_to(expected[:, None, None], y.shape)}, {"y": y}, 1e-14)


def test_depthwise_kernel_and_padding_are_told():
    seen = {
        name: view_of(name)
        for name in ("conv", "grouped conv", "depthwise conv", "padded conv", "transposed conv", "gemm")
    }
    assert [name for name, v in seen.items() if v.depthwise] == ["depthwise conv"]
    assert [name for name, v in seen.items() if v.padded] == ["padded conv", "transposed conv"]
    assert [v.kernel for v in seen.values()] == [(2, 3), (3, 3), (3, 3), (3, 1), (3, 3), ()]
    assert [v.is_conv for v in seen.values()] == [True] * 5 + [False]


def view_of(form):
    return linear_of(form)[1]


@pytest.mark.parametrize(
    ("mode", "padded"), [("NOTSET", False), ("VALID", False), ("SAME_UPPER", True), ("SAME_LOWER", True)]
)
def test_automatic_padding_counts(mode, padded):
    graph = build(X4, f'y = Conv<auto_pad="{mode}">(x, W)', W=(3, 4, 3, 3))
    assert view(graph, graph.nodes[0]).padded is padded


def test_a_shift_does_not_enter_a_padded_conv():
    linear = view_of("padded conv")
    with pytest.raises(Refused, match="a shift does not pass the zero padding of Conv"):
        linear.rescaled(in_shift=1.0)


def test_a_shared_weight_is_copied_when_written():
    graph = build(
        "(float[3,4] x, int64[3] i) => (float[] e, float[] y, float[] z)",
        "e = Gather(E, i)\n t = Transpose<perm=[1,0]>(E)\n y = MatMul(x, t)\n z = Gemm<transB=1>(x, E)",
        E=(7, 4),
    )
    feed = {"i": np.array([0, 3, 6]), "x": random((3, 4))}
    before = run(graph, feed)
    matmul, gemm = linears(graph)
    assert (matmul.channels, gemm.channels) == ((7, 4), (7, 4))
    assert matmul.growth == gemm.growth == 7 * 4 * 8
    matmul.set_weight(2 * matmul.weight())
    gemm.set_weight(3 * gemm.weight())
    check(graph)
    after = run(graph, feed)
    assert_same({"e": before["e"], "y": 2 * before["y"], "z": 3 * before["z"]}, after, 1e-15)
    assert listing(graph) == "e = Gather(E, i)\ny = MatMul(x, E_folded)\nz = Gemm<transB=1>(x, E_folded_1)"


def test_a_shared_bias_is_copied_when_written():
    graph = build(
        "(float[3,4] x) => (float[] y, float[] z)", "y = Gemm(x, A, b)\n z = Gemm(x, B, b)", A=(4, 3), B=(4, 3), b=3
    )
    first, second = linears(graph)
    old = second.bias()
    first.set_bias(np.array([1.0, 2.0, 3.0]))
    assert np.array_equal(first.bias(), [1, 2, 3])
    assert np.array_equal(second.bias(), old)


def test_an_own_weight_is_replaced_in_its_place():
    graph, linear, *_ = linear_of("conv")
    old = linear.weight()
    linear.install(*linear.rescaled(out_scale=2.0))
    assert listing(graph) == "y = Conv(x, W, b)"
    assert np.array_equal(constants(graph)["W"], 2 * old)
    assert linear.growth == 0


def test_a_weight_held_in_less_grows_when_written():
    graph = build(
        "(float[5,4] x) => (float[] y)", "h = Cast<to=11>(W)\n y = MatMul(x, h)", W=random((4, 3)).astype("f2")
    )
    (linear,) = linears(graph)
    assert linear.dtype == np.float64
    assert linear.growth == 4 * 3 * (8 - 2)
    linear.set_weight(np.full((3, 4), 1 / 3))
    assert listing(graph) == "y = MatMul(x, W_folded)"
    assert constants(graph)["W_folded"].dtype == np.float64


def test_a_bias_is_added_where_there_was_none():
    graph, linear, *_ = linear_of("weight on the left")
    linear.set_bias(np.array([1.0, 2.0, 3.0]))
    assert listing(graph) == "y_unbiased = MatMul(W, x)\ny = Add(y_unbiased, MatMul_0_bias)"
    assert constants(graph)["MatMul_0_bias"].shape == (3, 1)


# the Add behind a MatMul with 3 output channels that is not its bias: (constant, body)
NO_BIAS = {
    "along another axis": ((5, 1), "t = MatMul(x, W)\n y = Add(t, b)"),
    "of full size": ((5, 3), "t = MatMul(x, W)\n y = Add(t, b)"),
    "of higher rank": ((1, 1, 3), "t = MatMul(x, W)\n y = Add(t, b)"),
    "a scalar": ((), "t = MatMul(x, W)\n y = Add(t, b)"),
    "of a result with other readers": ((3,), "t = MatMul(x, W)\n u = Add(t, b)\n y = Mul(t, u)"),
}


@pytest.mark.parametrize("case", NO_BIAS)
def test_an_add_that_is_no_bias(case):
    shape, body = NO_BIAS[case]
    graph = build("(float[5,4] x) => (float[] y)", body, W=(4, 3), b=shape)
    (linear,) = linears(graph)
    assert linear.bias_node is None
    assert linear.bias() is None


def test_a_bias_of_equal_sides_goes_along_the_columns():
    graph = build("(float[3,4] x) => (float[] y)", "t = MatMul(x, W)\n y = Add(t, b)", W=(4, 3), b=(3, 1))
    assert linears(graph)[0].bias_node is None


@pytest.mark.parametrize("shape", [(3, 1), (3, 3)])
def test_a_gemm_whose_c_is_no_row_has_no_view(shape):
    graph = build("(float[3,4] x) => (float[] y)", "y = Gemm(x, W, c)", W=(4, 3), c=shape)
    with pytest.raises(Refused, match="its bias is not a constant vector over the output channels"):
        view(graph, graph.nodes[0])


REFUSED = {
    "Relu is not a linear operator": ("(float[2] x) => (float[] y)", "y = Relu(x)", {}),
    "it multiplies two activations": ("(float[2,2] x) => (float[] y)", "y = MatMul(x, x)", {}),
    "its weight is computed at run time": ("(float[1,2,5] x, float[3,2,2] w) => (float[] y)", "y = Conv(x, w)", {}),
    "its weight is made at run time by ConstantOfShape, from constants": (
        "(float[1,2,5] x) => (float[] y)", "w = ConstantOfShape(s)\n y = Conv(x, w)", {"s": np.array([3, 2, 2])}
    ),
    "its weight is quantized already": (
        "(float[2,2] x) => (float[] y)", "w = DequantizeLinear(q, s)\n y = MatMul(x, w)",
        {"q": np.ones((2, 2), np.int8), "s": np.array(1, np.float32)},
    ),
    "its weight has 3 axes, expected 2": ("(float[2,3,4] x) => (float[] y)", "y = MatMul(x, W)", {"W": (2, 4, 3)}),
    "its weight has 1 axes, expected 2": ("(float[2,4] x) => (float[] y)", "y = MatMul(x, W)", {"W": (4,)}),
    "its weight is int32, not floating point": (
        "(int32[2,2] x) => (int32[] y)", "y = MatMul(x, W)", {"W": np.ones((2, 2), np.int32)}
    ),
    "its bias is not a constant vector over the output channels": (
        "(float[1,2,5] x, float[3] b) => (float[] y)", "y = Conv(x, W, b)", {"W": (3, 2, 2)}
    ),
    "the rank of its input is unknown": ("(float[] x) => (float[] y)", "y = MatMul(W, x)", {"W": (4, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_nodes_without_a_view_say_why(reason):
    signature, body, given = REFUSED[reason]
    graph = build(signature, body, kind="float", **given)
    with pytest.raises(Refused) as caught:
        view(graph, graph.nodes[-1])
    assert str(caught.value) == reason
    assert linears(graph) == []


def test_a_linear_of_another_domain_has_no_view():
    graph = build("(float[2,2] x) => (float[] y)", "y = com.example.MatMul(x, W)", W=(2, 2), domains='"com.example": 1')
    with pytest.raises(Refused):
        view(graph, graph.nodes[0])


def test_bfloat16_weights_keep_their_type():
    graph = build("(float[3,4] x) => (float[] y)", "y = Gemm<alpha=0.5>(x, W, b)", kind="bfloat16", W=(4, 2), b=2)
    (linear,) = linears(graph)
    assert linear.dtype == linear.weight().dtype == ml_dtypes.bfloat16
    linear.install(*linear.rescaled(out_scale=3.0))
    assert {v.dtype for v in constants(graph).values()} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (1e6, r"a folded value of 1\.36e\+06 does not fit float16"),
        (1e-8, r"the folded weight, 1\.36e-08 at most, is too small for float16"),
        (np.inf, "a folded value is infinite or not a number"),
        (np.nan, "a folded value is infinite or not a number"),
    ],
)
def test_what_does_not_fit_the_type_is_refused_with_nothing_changed(scale, message):
    graph = build("(float[3,4] x) => (float[] y)", "y = Gemm(x, W)", kind="float16", W=(4, 2))
    (linear,) = linears(graph)
    before = linear.weight().copy()
    with pytest.raises(DoesNotFit, match=message):
        linear.install(*linear.rescaled(out_scale=scale))
    assert np.array_equal(linear.weight(), before)
    assert listing(graph) == "y = Gemm(x, W)"


def test_cast_keeps_what_has_the_type_already():
    values = np.ones(3, np.float32)
    assert cast(values, np.dtype(np.float32)) is values


def test_a_chain_that_others_read_stays():
    body = "t = Transpose<perm=[1,0]>(W)\n y = MatMul(x, t)\n z = Relu(t)"
    graph = build("(float[3,4] x) => (float[] y, float[] z)", body, W=(3, 4))
    (linear,) = linears(graph)
    linear.set_weight(linear.weight() * 2)
    assert listing(graph) == "t = Transpose<perm=[1, 0]>(W)\ny = MatMul(x, W_folded)\nz = Relu(t)"
    assert isinstance(edit.producer(graph.tensors()["t"]), gs.Node)

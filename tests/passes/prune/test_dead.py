"""Dead channels, planted in small networks: they go, others stay, and no output changes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from channelfold.passes.base import Context, Outcome
from channelfold.passes.prune import RemoveDeadChannels
from channelfold.runtime import jobs
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io.files import check, import_model, infer_shapes, load, save, session
from channelfold.tests import channel_strategies
from channelfold.tests.graphs import (
    assert_same,
    build,
    changes,
    constants,
    feeds,
    fold,
    listing,
    positive,
    random,
    reasons,
    run,
)


def without(values: np.ndarray, *channels: int, axis: int = 0) -> np.ndarray:
    """With zeros in some channels."""
    values = values.copy()
    np.moveaxis(values, axis, 0)[list(channels)] = 0
    return values


def removed(graph, *, rtol: float | None = None, align: int = 1) -> Outcome:
    """As ``fold``, but a bias may need an Add of its own."""
    feed = feeds(graph)
    before = run(graph, feed)
    outcome = RemoveDeadChannels(align).apply(graph, Context())
    check(graph)
    assert_same(before, run(graph, feed), rtol)
    text = listing(graph)
    assert not RemoveDeadChannels(align).apply(graph, Context()).changed
    assert listing(graph) == text
    return outcome


def shape(graph, name: str) -> tuple[int, ...]:
    """Of a weight, whatever it is called after it was cut."""
    (found,) = (v.shape for k, v in constants(graph).items() if k.split("_")[0] == name and v.ndim > 1)
    return found


# ---- constant channels ---------------------------------------------------------------------------------------------


CONV = """
    c = Conv<pads=[1,1,1,1]>(x, A)
    n = BatchNormalization(c, g, b, m, v)
    r = Relu(n)
    y = Conv<{pads}>(r, B, d)
"""


def conv_net(pads: str = "pads=[0,0,0,0]", **constants):
    given = {"A": (6, 3, 3, 3), "g": without(random(6, "g"), 1, 4), "b": positive(6, "b"), "m": 6, "v": positive(6)}
    given |= {"B": (4, 6, 3, 3), "d": 4}
    return build("(float[N,3,8,8] x) => (float[] y)", CONV.format(pads=pads), **given | constants)


def test_gamma_zero_emits_what_the_activation_makes_of_beta():
    graph = conv_net()
    bias, weight = constants(graph)["d"], constants(graph)["B"]
    outcome = fold(RemoveDeadChannels(), graph)
    assert changes(outcome) == ["6 -> 4 channels, the others were dead"]
    assert shape(graph, "A") == (4, 3, 3, 3)
    assert shape(graph, "B") == (4, 4, 3, 3)
    gain = weight[:, [1, 4]].sum(axis=(2, 3)) @ positive(6, "b")[[1, 4]]
    assert np.allclose(constants(graph)["d"], bias + gain, rtol=1e-14, atol=0)
    assert outcome.facts["parameters"] == {"before": 6 * 27 + 24 + 4 * 54 + 4, "after": 4 * 27 + 16 + 4 * 36 + 4}


def test_zero_padding_keeps_a_constant_that_is_not_zero():
    graph = conv_net("pads=[1,1,1,1]", b=np.array([1.0, 2, 3, 4, -5, 6]))
    outcome = removed(graph)
    assert changes(outcome) == ["6 -> 5 channels, the others were dead"]  # Relu(-5) = 0 needs no bias
    (reason,) = reasons(outcome)
    assert reason.startswith("1 of 5 channels is dead and stays: Conv '")
    assert "pads with zeros" in reason


def test_a_reader_without_a_bias_gets_one():
    graph = build(
        "(float[N,3,8,8] x) => (float[] y)",
        "c = Conv(x, A, a) r = Sigmoid(c) y = Conv(r, B)",
        A=without(random((6, 3, 1, 1)), 0, 5), a=6, B=(4, 6, 3, 3),
    )  # fmt: skip
    removed(graph)
    assert shape(graph, "A") == (4, 3, 1, 1)
    assert len(graph.nodes[-1].inputs) == 3


def test_through_depthwise_pools_and_resizes():
    graph = build(
        "(float[N,3,8,8] x) => (float[] y)",
        """
        c = Conv(x, A, a)
        d = Conv<group=6>(c, D, e)
        h = HardSwish(d)
        p = MaxPool<kernel_shape=[2,2], strides=[2,2], pads=[1,1,1,1]>(h)
        q = AveragePool<kernel_shape=[2,2]>(p)
        s = GlobalAveragePool(q)
        f = Flatten(s)
        y = Gemm<transB=1>(f, W, w)
        """,
        A=without(random((6, 3, 1, 1)), 2), a=6, D=without(random((6, 1, 3, 3), "D"), 3), e=6, W=(5, 6), w=5,
    )  # fmt: skip
    assert changes(removed(graph)) == ["6 -> 4 channels, the others were dead"]
    assert shape(graph, "D") == (4, 1, 3, 3)
    assert shape(graph, "W") == (5, 4)


def test_a_padded_average_mixes_zeros_with_a_constant():
    body = "c = Conv(x, A, a) p = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]{}>(c) y = Conv(p, B)"
    given = {"A": without(random((6, 3, 1, 1)), 2), "a": 6, "B": (4, 6, 1, 1)}
    for option, left in (("", 5), (", count_include_pad=1", 6)):
        graph = build("(float[N,3,8,8] x) => (float[] y)", body.format(option), **given)
        removed(graph)
        assert shape(graph, "A")[0] == left


def test_a_pad_keeps_only_its_own_value():
    body = "c = Conv(x, A, a) p = Pad(c, pads, value) y = Conv(p, B)"
    for value, left in ((0.0, 5), (2.0, 5), (1.0, 6)):
        graph = build(
            "(float[N,3,8,8] x) => (float[] y)", body, value=value, pads=np.array([0, 0, 1, 1, 0, 0, 1, 1]),
            A=without(random((6, 3, 1, 1)), 2, 3), a=np.array([1.0, 2, 0, 2, 5, 6]) if value else 6 * [0.0],
            B=(4, 6, 3, 3),
        )  # fmt: skip
        removed(graph)
        assert shape(graph, "A")[0] == left - (value == 0.0)


def test_a_residual_sum_is_constant_only_if_all_summands_are():
    body = "a = Conv(x, A, u)  b = Conv(a, B, v)  s = Add(a, b)  y = Conv(s, C)"
    given = {"u": 5, "v": 5, "C": (4, 5, 1, 1)}
    graph = build("(float[N,3,8,8] x) => (float[] y)", body, **given,
                  A=without(random((5, 3, 1, 1)), 0, 1), B=without(random((5, 5, 1, 1), "B"), 1, 2))  # fmt: skip
    removed(graph)
    assert shape(graph, "C") == (4, 4, 1, 1)  # channel 1 alone: 0 and 2 have one summand that varies


def test_constants_pass_through_whole_layers():
    """A row that reads constant channels alone is constant itself."""
    second = random((5, 4, 1, 1), "B")
    second[3, 2:] = 0
    graph = build(
        "(float[N,3,8,8] x) => (float[] y)",
        "a = Conv(x, A, u) s = Tanh(a) b = Conv(s, B, v) t = Elu(b) y = Conv(t, C)",
        A=without(random((4, 3, 1, 1)), 0, 1), u=4, B=second, v=5, C=(4, 5, 1, 1),
    )  # fmt: skip
    removed(graph)
    assert shape(graph, "A") == (2, 3, 1, 1)
    assert shape(graph, "B") == (4, 2, 1, 1)
    assert shape(graph, "C")[1] == 4


def test_the_same_of_matmul_and_gelu():
    graph = build(
        "(float[N,7,4] x) => (float[] y)",
        "a = MatMul(x, A) h = Add(a, u) g = Gelu(h) y = MatMul(g, B)",
        opset=20, A=without(random((4, 6), "A"), 0, 4, axis=1), u=6, B=(6, 3),
    )  # fmt: skip
    removed(graph)
    assert [node.op for node in graph.nodes] == ["MatMul", "Add", "Gelu", "MatMul", "Add"]
    assert shape(graph, "A") == (4, 4)
    assert shape(graph, "B") == (4, 3)


def test_a_gated_ffn_loses_channels_whose_gate_or_value_is_zero():
    graph = build(
        "(float[N,7,4] x) => (float[] y)",
        "g = MatMul(x, G) s = Sigmoid(g) w = Mul(g, s) u = MatMul(x, U) m = Mul(w, u) y = MatMul(m, D)",
        G=without(random((4, 6), "G"), 0, axis=1), U=without(random((4, 6), "U"), 5, axis=1), D=(6, 4),
    )  # fmt: skip
    fold(RemoveDeadChannels(), graph)
    assert shape(graph, "G") == (4, 4)
    assert shape(graph, "U") == (4, 4)
    assert shape(graph, "D") == (4, 4)


def test_a_constant_mask_is_a_zero():
    graph = build(
        "(float[N,3,8,8] x) => (float[] y)", "c = Conv(x, A, a) k = Mul(c, mask) y = Conv(k, B)",
        A=(4, 3, 1, 1), a=4, B=(4, 4, 1, 1), mask=np.array([1.0, 0, 1, 0]).reshape(4, 1, 1),
    )  # fmt: skip
    fold(RemoveDeadChannels(), graph)
    assert shape(graph, "A") == (2, 3, 1, 1)
    assert shape(graph, "mask") == (2, 1, 1)


def test_groups_lose_whole_sets_of_channels():
    dead = without(random((6, 3, 1, 1)), 0, 3, 4)  # channel 0 of both groups, and channel 1 of one
    graph = build(
        "(float[N,3,8,8] x) => (float[] y)", "c = Conv(x, A, a) y = Conv<group=2>(c, B, b)",
        A=dead, a=6, B=(4, 3, 3, 3), b=4,
    )  # fmt: skip
    fold(RemoveDeadChannels(), graph)
    assert shape(graph, "A") == (4, 3, 1, 1)
    assert shape(graph, "B") == (4, 2, 3, 3)


def test_concatenated_and_split_channels():
    graph = build(
        "(float[N,3,8,8] x) => (float[] y)",
        """
        a = Conv(x, A, u)
        b = Conv(x, B, v)
        c = Concat<axis=1>(a, b)
        p, q = Split<axis=1>(c, sizes)
        y = Conv(p, C)
        z = Conv(q, D)
        w = Conv(z, E)
        """.replace("y = Conv(p, C)", "h = Conv(p, C)") + "y = Add(h, w)",
        A=without(random((4, 3, 1, 1)), 1), u=4, B=without(random((4, 3, 1, 1), "B"), 0), v=4,
        sizes=np.array([3, 5]), C=(2, 3, 1, 1), D=(2, 5, 1, 1), E=(2, 2, 1, 1),
    )  # fmt: skip
    removed(graph)
    assert shape(graph, "A")[0] == 3
    assert shape(graph, "B")[0] == 3
    assert shape(graph, "C")[1] == 2
    assert shape(graph, "D")[1] == 4


@pytest.mark.parametrize(("scale", "left"), [(1.0, 4), (6e4, 6)])
def test_float16_and_what_its_bias_cannot_hold(scale, left):
    """Of 6e4 two columns of 0.6 make 7.2e4, more than float16 has; the others bring the sum back."""
    columns = np.array([0.6, 0.6, -0.3, -0.3, -0.2, -0.1]).reshape(6, 1, 1)
    graph = build(
        "(float[N,3,8,8] x) => (float[] y)", "c = Conv(x, A, a) r = Relu(c) y = Conv(r, B, b)", kind="float16",
        A=without(random((6, 3, 1, 1)), 0, 1) / 8, a=np.full(6, scale), B=np.broadcast_to(columns, (4, 6, 1, 1)), b=4,
    )  # fmt: skip
    outcome = removed(graph, rtol=4e-3)
    assert shape(graph, "A")[0] == left
    assert ["type of the bias" in reason for reason in reasons(outcome)] == [True] * (left == 6)


# ---- unread channels -----------------------------------------------------------------------------------------------


def test_columns_of_zeros():
    graph = build(
        "(float[N,3,8,8] x) => (float[] y)",
        "c = Conv(x, A, a) r = Relu(c) y = Conv<pads=[1,1,1,1]>(r, B)",
        A=(6, 3, 3, 3), a=6, B=without(random((4, 6, 3, 3), "B"), 1, 2, axis=1),
    )  # fmt: skip
    fold(RemoveDeadChannels(), graph)
    assert shape(graph, "A") == (4, 3, 3, 3)
    assert shape(graph, "B") == (4, 4, 3, 3)


def test_all_readers_must_have_them():
    graph = build(
        "(float[N,4] x) => (float[] y)", "a = Gemm(x, A) b = Gemm(a, B) c = Gemm(a, C) y = Add(b, c)",
        A=(4, 6), B=without(random((6, 3), "B"), 1, 2), C=without(random((6, 3), "C"), 2, 3),
    )  # fmt: skip
    fold(RemoveDeadChannels(), graph)
    assert shape(graph, "A") == (4, 5)


def test_a_chain_is_followed_back():
    """Columns of the first weight that only unread rows use."""
    first, second = random((4, 5), "B"), random((5, 3), "C")
    first[2, 1:] = 0
    graph = build(
        "(float[N,4] x) => (float[] y)", "a = Gemm(x, A) r = Relu(a) b = Gemm(r, B) y = Gemm(b, C)",
        A=(4, 4), B=first, C=without(second, 0),
    )  # fmt: skip
    outcome = fold(RemoveDeadChannels(), graph)
    assert len(outcome.changed) == 2
    assert shape(graph, "A") == (4, 3)
    assert shape(graph, "B") == (3, 4)
    assert shape(graph, "C") == (4, 3)


def test_a_chain_that_empties_keeps_one_channel():
    graph = build(
        "(float[N,4] x) => (float[] y)", "a = Gemm(x, A) b = Gemm(a, B) h = Gemm(b, C) y = Add(h, x)",
        A=(4, 6), B=(6, 5), C=np.zeros((5, 4)),
    )  # fmt: skip
    outcome = fold(RemoveDeadChannels(), graph)
    assert shape(graph, "A") == (4, 1)
    assert shape(graph, "B") == (1, 1)
    assert shape(graph, "C") == (1, 4)
    assert set(reasons(outcome)) == {"1 of 1 channels is dead and stays: a tensor keeps one"}


def test_queries_that_meet_zero_keys():
    graph = build(
        "(float[N,5,4] x) => (float[] y)",
        "q = MatMul(x, Q) k = MatMul(x, K) t = Transpose<perm=[0,2,1]>(k) y = MatMul(q, t)",
        Q=(4, 6), K=without(random((4, 6), "K"), 3, axis=1),
    )  # fmt: skip
    fold(RemoveDeadChannels(), graph)
    assert shape(graph, "Q") == (4, 5)
    assert shape(graph, "K") == (4, 5)


# ---- what stays ----------------------------------------------------------------------------------------------------


def test_outputs_of_the_model_stay():
    graph = build("(float[N,3,8,8] x) => (float[] y)", "y = Conv(x, A, a)", A=np.zeros((4, 3, 1, 1)), a=4)
    outcome = fold(RemoveDeadChannels(), graph)
    assert not outcome.changed


def test_what_is_fixed_stays_with_the_reason():
    graph = build(
        "(float[N,3,8,8] x) => (float[] y, float[] z)", "c = Conv(x, A, a) z = Relu(c) y = Conv(c, B, b)",
        A=without(random((4, 3, 1, 1)), 2), a=4, B=(2, 4, 1, 1), b=2,
    )  # fmt: skip
    outcome = fold(RemoveDeadChannels(), graph)
    assert reasons(outcome) == ["1 of 4 channels is dead and stays: it is the output 'z' of the model"]


def test_normed_channels_stay():
    graph = build(
        "(float[N,7,4] x) => (float[] y)", "a = MatMul(x, A) n = LayerNormalization(a, g, b) y = MatMul(n, B)",
        A=without(random((4, 6), "A"), 2, 3, axis=1), g=6, b=6, B=without(random((6, 3), "B"), 1, 2),
    )  # fmt: skip
    outcome = fold(RemoveDeadChannels(), graph)
    assert not outcome.changed
    assert reasons(outcome) == ["1 of 6 channels is dead and stays: LayerNormalization normalizes over it"]


@pytest.mark.parametrize(("align", "left"), [(1, 5), (2, 6), (4, 8), (8, 8)])
def test_alignment(align, left):
    graph = build(
        "(float[N,4] x) => (float[] y)", "a = Gemm(x, A) y = Gemm(a, B)",
        A=(4, 9), B=without(random((9, 3), "B"), 1, 2, 5, 8),
    )  # fmt: skip
    outcome = removed(graph, align=align)
    assert shape(graph, "A") == (4, left)
    dead = left - 5
    said = f"{dead} of {left} channels {'is dead and stays' if dead == 1 else 'are dead and stay'}: "
    assert reasons(outcome) == ([f"{said}a multiple of {align} channels is kept"] if dead else [])


def test_alignment_of_less_than_one_is_refused():
    with pytest.raises(UsageError, match="'align' is 0"):
        RemoveDeadChannels(align=0)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_verifies_what_it_removes(tmp_path):
    graph = build(
        "(float[N,3,8,8] x) => (float[N,4,6,6] y)", CONV.format(pads="pads=[0,0,0,0]"), kind="float",
        A=(6, 3, 3, 3), g=without(random(6, "g"), 1, 4), b=6, m=6, v=positive(6), B=(4, 6, 3, 3), d=4,
    )  # fmt: skip
    save(graph, tmp_path / "model.onnx")
    record = jobs.prune(tmp_path / "model.onnx", tmp_path / "tidy.onnx", dead=True)
    step = record["steps"][-1]
    assert (step["pass"], step["kind"], step["changed"][0]["node"]) == ("remove-dead-channels", "exact", "Conv_0")
    assert step["verified"]["max_rel_error"] < 1e-6
    tidy = load(tmp_path / "tidy.onnx")
    assert [node.inputs[1].shape[0] for node in tidy.nodes if node.op == "Conv"] == [4, 4]


# ---- random networks -----------------------------------------------------------------------------------------------

_ACTIVATIONS = ("Relu", "Sigmoid", "HardSwish", "Erf", "Softplus", "Identity", "LeakyRelu", "Tanh")


@st.composite
def networks(draw) -> tuple[Callable, int]:
    """A chain of Conv, BatchNormalization, activations and shortcuts with dead channels; how many there are."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    body, given, source, channels, planted = [], {}, "x", 3, 0
    shortcut = ""
    depth = draw(st.integers(2, 5))
    for layer in range(depth):
        last = layer == depth - 1
        wide = channels if shortcut else draw(st.integers(2, 7))
        weight, bias = rng.standard_normal((wide, channels, 1, 1)), rng.standard_normal(wide)
        gamma = rng.uniform(0.5, 2, wide)
        dead = draw(st.sets(st.integers(0, wide - 1), max_size=wide - 1)) if not (last or shortcut) else set()
        for channel in sorted(dead):
            (weight if draw(st.booleans()) else gamma)[channel] = 0
        planted += len(dead)
        given |= {f"W{layer}": weight, f"b{layer}": bias, f"g{layer}": gamma, f"m{layer}": rng.standard_normal(wide)}
        given |= {f"o{layer}": rng.standard_normal(wide), f"v{layer}": rng.uniform(0.5, 2, wide)}
        body.append(f"c{layer} = Conv({source}, W{layer}, b{layer})")
        body.append(f"n{layer} = BatchNormalization(c{layer}, g{layer}, o{layer}, m{layer}, v{layer})")
        body.append(f"a{layer} = {draw(st.sampled_from(_ACTIVATIONS))}(n{layer})")
        source, channels = f"a{layer}", wide
        if shortcut:
            body.append(f"s{layer} = Add(a{layer}, {shortcut})")
            source, shortcut = f"s{layer}", ""
        elif not dead and not last and draw(st.booleans()):
            shortcut = source
    body.append(f"y = Identity({source})")
    return (lambda: build("(float[2,3,4,4] x) => (float[] y)", "\n".join(body), **given)), planted


@given(networks())
def test_planted_channels_go_from_random_networks(case):
    make, planted = case
    graph = make()
    before = sum(t.shape[0] for t in _weights(graph))
    outcome = removed(graph)
    assert before - sum(t.shape[0] for t in _weights(graph)) >= planted
    assert not outcome.refused
    assert bool(outcome.changed) >= bool(planted)


def _weights(graph) -> list:
    return [node.inputs[1] for node in graph.nodes if node.op == "Conv"]


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(channel_strategies.networks(), st.integers(0, 2**16))
def test_zeros_in_any_weights_of_random_networks(model, seed):
    graph = import_model(with_zeros(model, np.random.default_rng(seed)))
    infer_shapes(graph)
    feed = feeds(graph)
    before = session(graph, optimize=False).run(feed)
    if not all(np.isfinite(values).all() for values in before.values()):
        return
    RemoveDeadChannels().apply(graph, Context())
    check(graph)
    assert_same(before, session(graph, optimize=False).run(feed), 1e-5)
    assert not RemoveDeadChannels().apply(graph, Context()).changed


def with_zeros(model: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """Half of the rows or columns of more than half of the weights become zero."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    parameters = {name for node in model.graph.node if node.op_type in ("Resize", "Pad") for name in node.input[1:]}
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if tensor.name not in parameters and values.dtype.kind == "f" and values.ndim and rng.random() < 0.6:
            axis = rng.integers(min(values.ndim, 2))
            dead = np.flatnonzero(rng.random(values.shape[axis]) < 0.5)
            tensor.CopyFrom(onnx.numpy_helper.from_array(without(values, *dead, axis=axis), tensor.name))
    return model

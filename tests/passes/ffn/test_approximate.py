"""FFNs by the graph that is left and by what it computes; the choice of channels against the curves it follows."""

from __future__ import annotations

import re

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.base import Context, Outcome
from channelfold.passes.ffn import ApproximateFfn
from channelfold.passes.ffn.approximate import stand_in
from channelfold.runtime.data.sources import Data, open_data
from channelfold.runtime.errors import DataError, UsageError
from channelfold.runtime.io.files import check
from channelfold.runtime.io.session import TensorSpec
from channelfold.runtime.stats.covariance import Moments
from channelfold.tests.graphs import build, changes, listing, random, reasons, run

TOKENS = 64


def data(graph: gs.Graph, *, count: int = 32) -> Data:
    """Feeds of ``TOKENS`` rows each, or of as many pixels, for the only input of a graph."""
    (tensor,) = graph.inputs
    shape = [d if isinstance(d, int) else TOKENS for d in tensor.shape]
    rng = np.random.default_rng(0)
    kind = np.dtype(tensor.dtype)
    feeds = [{tensor.name: rng.standard_normal(shape).astype(kind)} for _ in range(count)]
    return open_data(feeds, [TensorSpec(tensor.name, kind, tuple(shape))])


def apply(graph: gs.Graph, **options) -> Outcome:
    outcome = ApproximateFfn(**options).apply(graph, Context(data(graph)))
    check(graph)
    return outcome


def error(before: gs.Graph, after: gs.Graph) -> float:
    """The relative error of the output on feeds that calibration has not seen."""
    lost = total = 0.0
    for feed in data(before, count=40):
        old, new = (run(graph, feed)["y"].astype(np.float64) for graph in (before, after))
        lost, total = lost + float(np.sum((new - old) ** 2)), total + float(np.sum(old**2))
    return float(np.sqrt(lost / total))


def plain(hidden: int = 32, activation: str = "Relu", **weights) -> gs.Graph:
    body = f"h = MatMul(x, W1)  b = Add(h, b1)  a = {activation}(b)  m = MatMul(a, W2)  y = Add(m, b2)"
    given = {"W1": (8, hidden), "b1": hidden, "W2": (hidden, 8), "b2": 8} | weights
    return build("(float[N,8] x) => (float[N,8] y)", body, opset=20, kind="float", **given)


def gated() -> gs.Graph:
    body = "g = MatMul(x, Wg)  s = Sigmoid(g)  a = Mul(g, s)  u = MatMul(x, Wu)  h = Mul(a, u)  y = MatMul(h, Wd)"
    return build("(float[N,8] x) => (float[N,8] y)", body, kind="float", Wg=(8, 32), Wu=(8, 32), Wd=(32, 8))


def conv() -> gs.Graph:
    body = "h = Conv(x, W1, b1)  a = Gelu(h)  y = Conv(a, W2)"
    signature = "(float[1,8,8,8] x) => (float[1,8,8,8] y)"
    return build(signature, body, opset=20, kind="float", W1=(32, 8, 1, 1), b1=32, W2=(8, 32, 1, 1))


def idle(theta: float = 0.75) -> gs.Graph:
    """An FFN, the last ``theta`` of whose 32 hidden channels pass a Clip without being clipped."""
    active = round(32 * (1 - theta))
    shift = np.where(np.arange(32) < active, 0.0, 1000.0)
    scale = np.where(np.arange(32) < active, 1.0, 0.1)
    return plain(b1=shift, W1=random((8, 32), "W1") * scale, W2=random((32, 8), "W2"))


class TestGraph:
    def test_plain(self):
        graph = plain()
        outcome = apply(graph, keep_hidden=0.5, branch="never")
        assert listing(graph) == listing(plain())
        assert [tuple(n.inputs[1].shape) for n in graph.nodes if n.op == "MatMul"] == [(8, 16), (16, 8)]
        (change,) = changes(outcome)
        assert change.startswith("32 -> 16 hidden channels, output ")
        (fact,) = outcome.facts["ffns"]
        assert fact["hidden"] == [32, 16]
        assert fact["macs"] == [TOKENS * 512, TOKENS * 256]

    def test_dense_branch(self):
        graph = plain()
        outcome = apply(graph, keep_hidden=0.5, branch="always")
        assert listing(graph) == "\n".join(
            [
                "h = MatMul(x, W1)",
                "b = Add(h, b1)",
                "a = Relu(b)",
                "m = MatMul(a, W2)",
                "MatMul_3_dense_ffn = Add(m, b2)",
                "MatMul_3_dense_output = MatMul(x, MatMul_3_dense_weight)",
                "y = Add(MatMul_3_dense_ffn, MatMul_3_dense_output)",
            ]
        )
        assert outcome.facts["ffns"][0]["macs"] == [TOKENS * 512, TOKENS * (256 + 64)]

    def test_branch_goes_into_a_parallel_linear(self):
        body = "h = MatMul(x, W1)  a = Relu(h)  m = MatMul(a, W2)  p = MatMul(x, P)  pb = Add(p, c)  y = Add(m, pb)"
        signature = "(float[N,8] x) => (float[N,8] y)"
        graph, original = (build(signature, body, kind="float", W1=(8, 32), W2=(32, 8), P=(8, 8), c=8) for _ in "ab")
        outcome = apply(graph, keep_macs=0.5)
        assert "MatMul" in changes(outcome)[0]
        assert sum(n.op == "MatMul" for n in graph.nodes) == 3
        assert outcome.facts["ffns"][0]["branch"]
        assert outcome.facts["ffns"][0]["macs"][1] == TOKENS * 256
        assert error(original, graph) == pytest.approx(outcome.facts["output_error"], rel=0.1)

    def test_gated(self):
        graph = gated()
        apply(graph, keep_hidden=0.25, branch="never")
        assert [tuple(n.inputs[1].shape) for n in graph.nodes if n.op == "MatMul"] == [(8, 8), (8, 8), (8, 8)]

    @pytest.mark.parametrize("branch", ["never", "always"])
    def test_convolutions_with_a_point_for_a_kernel(self, branch):
        graph = conv()
        outcome = apply(graph, keep_hidden=0.5, branch=branch)
        shapes = [tuple(n.inputs[1].shape) for n in graph.nodes if n.op == "Conv"]
        assert shapes == [(16, 8, 1, 1), (8, 16, 1, 1), *([(8, 8, 1, 1)] if branch == "always" else [])]
        assert error(conv(), graph) == pytest.approx(outcome.facts["output_error"], rel=0.1)

    @pytest.mark.parametrize(
        "body",
        [
            "h = Gemm(x, W1, b1)\na = Tanh(h)\ny = Gemm<transB=1>(a, V2, b2)",
            "h = MatMul(x, W1)\nb = Add(h, b1)\nt = Transpose<perm=[1,0]>(b)\na = Relu(t)\nd = MatMul(V2, a)\n"
            "y = Transpose<perm=[1,0]>(d)",
            "h = Gemm<alpha=2.0,beta=0.5>(x, W1, b1)\nc = Cast<to=1>(h)\na = Relu(c)\n"
            "y = Gemm<alpha=3.0,beta=0.5>(a, W2, b2)",
            "h = MatMul(x, W1)\nd = Div(h, r)\ne = Erf(d)\np = Add(e, one)\nq = Mul(h, p)\na = Mul(q, half)\n"
            "y = MatMul(a, W2)",
            "h = MatMul(x, W1)\na = PRelu(h, slope)\ny = MatMul(a, W2)",
        ],
        ids=["gemm", "transposed", "factors", "erf", "prelu"],
    )
    def test_forms(self, body):
        weights = {"W1": (8, 32), "b1": 32, "V2": (8, 32), "W2": (32, 8), "b2": 8, "slope": 32}
        weights |= {"r": np.sqrt(2.0), "one": 1.0, "half": 0.5}
        used = {name: value for name, value in weights.items() if re.search(rf"\b{name}\b", body)}
        original, graph = (build("(float[N,8] x) => (float[N,8] y)", body, kind="float", **used) for _ in "ab")
        outcome = apply(graph, keep_hidden=0.5, branch="never")
        assert outcome.facts["ffns"][0]["hidden"] == [32, 16]
        assert error(original, graph) == pytest.approx(outcome.facts["output_error"], rel=0.1)
        # sensitivities are measured on half of the channels, so only a bias that is not there yet is left to predict
        assert outcome.facts["predicted_output_error"] == pytest.approx(outcome.facts["output_error"], rel=0.03)

    @pytest.mark.parametrize(
        ("signature", "body", "kind"),
        [
            (
                "(float[N,8] x) => (float[N,8] y)",
                "h = Gemm(x, W1, b)\na = Relu(h)\ny = Gemm<transB=1,alpha=2.0>(a, V2, c)",
                "float",
            ),
            ("(float[8,N] x) => (float[8,N] y)", "h = MatMul(V1, x)\na = Relu(h)\ny = MatMul(V2, a)", "float"),
            ("(float[2,N,8] x) => (float[2,N,8] y)", "h = MatMul(x, W1)\na = Relu(h)\ny = MatMul(a, W2)", "float16"),
        ],
        ids=["gemm", "left", "half"],
    )
    def test_branches_of_every_form(self, signature, body, kind):
        weights = {"W1": (8, 32), "V1": (32, 8), "b": 32, "W2": (32, 8), "V2": (8, 32), "c": 8}
        used = {name: value for name, value in weights.items() if re.search(rf"\b{name}\b", body)}
        original, graph = (build(signature, body, kind=kind, **used) for _ in "ab")
        outcome = apply(graph, keep_hidden=0.5, branch="always")
        linears = [n.op for n in graph.nodes if n.op in ("Gemm", "MatMul")]
        assert len(linears) == 3
        assert len(set(linears)) == 1
        assert error(original, graph) == pytest.approx(outcome.facts["output_error"], rel=0.1)
        assert outcome.facts["output_error"] < 0.2


class TestError:
    @pytest.mark.parametrize("make", [plain, gated, conv])
    def test_facts_say_what_it_costs(self, make):
        graph = make()
        outcome = apply(graph, keep_hidden=0.5, ridge=0.0)
        (fact,) = outcome.facts["ffns"]
        measured = error(make(), graph)
        assert measured == pytest.approx(outcome.facts["output_error"], rel=0.1)
        # the output of the FFN is that of the model; its energy is taken about the mean, that of the output is not
        assert measured == pytest.approx(outcome.facts["predicted_output_error"], rel=0.25)
        assert 0 < fact["error"] < 1

    def test_idle_channels_are_recovered(self):
        graph = idle()
        outcome = apply(graph, keep_hidden=0.25, branch="always", ridge=0.0)
        assert outcome.facts["ffns"][0]["hidden"] == [32, 8]
        feed = next(iter(data(graph, count=1)))
        before, after = run(idle(), feed)["y"], run(graph, feed)["y"]
        centred = before - before.mean(axis=0)  # the shift that keeps channels idle is not what counts
        assert np.abs(after - before).max() < 1e-4 * np.abs(centred).max()

    def test_auto_takes_the_branch_where_channels_are_idle_and_not_where_they_are_not(self):
        graph = idle()
        assert apply(graph, keep_macs=0.45).facts["ffns"][0]["branch"]
        graph = plain(W1=20 * random((8, 32), "W1"))
        narrow = apply(graph, keep_macs=0.8).facts["ffns"][0]
        assert not narrow["branch"]
        assert narrow["hidden"] == [32, 24]

    def test_the_joint_stand_in_contains_the_others(self):
        x = random((4000, 8), "x").astype(np.float32)
        a = np.maximum(x @ random((8, 32), "W1").astype(np.float32), 0)
        moments = Moments({"x": -1, "a": -1})
        for name, values in (("x", x), ("a", a)):
            moments.take(name, values)
        matrix, removed = random((8, 32), "W2"), np.arange(0, 32, 2)
        joint, refitted = (stand_in(moments, matrix, removed, branch, 0.0) for branch in (True, False))
        pruned = (a - a.mean(axis=0))[:, removed] @ matrix[:, removed].T
        assert joint.error <= refitted.error <= float(np.mean(np.sum(pruned**2, axis=1)))
        assert joint.dense is not None
        found = a[:, joint.kept] @ joint.matrix.T + x @ joint.dense.T + joint.offset
        assert np.mean(np.sum((found - a @ matrix.T) ** 2, axis=1)) == pytest.approx(joint.error, rel=1e-6)


class TestBudget:
    def two(self) -> gs.Graph:
        """Two FFNs, the second with a hundredth of the first one's say."""
        body = """
            h = MatMul(x, A1)
            a = Relu(h)
            r = MatMul(a, A2)
            s = Add(x, r)
            k = MatMul(x, B1)
            b = Relu(k)
            t = MatMul(b, B2)
            y = Add(s, t)
        """
        weights = {"A1": (8, 64), "A2": (64, 8), "B1": (8, 64), "B2": 0.1 * random((64, 8), "B2")}
        return build("(float[N,8] x) => (float[N,8] y)", body, kind="float", **weights)

    def test_what_counts_less_is_cut_more_and_the_budget_is_kept(self):
        for share in (0.3, 0.5, 0.8):
            facts = apply(self.two(), keep_macs=share).facts["ffns"]
            assert facts[0]["hidden"][1] > facts[1]["hidden"][1]
            assert sum(f["macs"][1] for f in facts) <= share * sum(f["macs"][0] for f in facts)

    def test_channels(self):
        facts = apply(self.two(), keep_hidden=0.5, align=1, branch="never").facts["ffns"]
        assert sum(f["hidden"][1] for f in facts) == 64

    def test_a_chain_of_layers(self):
        body = "h = MatMul(x, A)\na = Relu(h)\nk = MatMul(a, B)\nb = Relu(k)\ny = MatMul(b, C)"
        weights = {"A": (8, 32), "B": (32, 32), "C": (32, 8)}
        original, graph = (build("(float[N,8] x) => (float[N,8] y)", body, kind="float", **weights) for _ in "ab")
        outcome = apply(graph, keep_hidden=0.5)
        first, second = (fact["hidden"][1] for fact in outcome.facts["ffns"])
        assert first + second == 32
        assert [tuple(n.inputs[1].shape) for n in graph.nodes if n.op == "MatMul"][:3] == [
            (8, first),
            (first, second),
            (second, 8),
        ]
        assert error(original, graph) == pytest.approx(outcome.facts["output_error"], rel=0.1)
        refused = reasons(apply(original, keep_hidden=0.5, branch="always"))
        assert refused == 2 * ["no dense branch: another FFN begins where it ends, or ends where it begins"]

    @pytest.mark.parametrize("closing", ["y = ArgMax<axis=1>(k)", "y = Softmax<axis=1>(k)", "y = Sigmoid(k)"])
    def test_what_a_closing_operator_reads_is_measured(self, closing):
        facts = []
        for last in ("y = MatMul(a, B)", f"k = MatMul(a, B)\n{closing}"):
            output = "int64[N,1]" if "ArgMax" in last else "float[N,8]"
            body = f"h = MatMul(x, A)\na = Relu(h)\n{last}"
            graph = build(f"(float[N,8] x) => ({output} y)", body, kind="float", A=(8, 32), B=(32, 8))
            facts.append(apply(graph, keep_hidden=0.5).facts)
        assert facts[1]["output_error"] == pytest.approx(facts[0]["output_error"], rel=1e-5)
        assert facts[1]["ffns"][0]["sensitivity"] == pytest.approx(facts[0]["ffns"][0]["sensitivity"], rel=1e-5)

    def test_outputs_without_floats_count_as_alike(self):
        body = "h = MatMul(x, A)\na = Relu(h)\nk = MatMul(a, B)\ny = Cast<to=7>(k)"
        graph = build("(float[N,8] x) => (int64[N,8] y)", body, kind="float", A=(8, 32), B=(32, 8))
        facts = apply(graph, keep_hidden=0.5).facts["ffns"]
        assert facts[0]["sensitivity"] == 1.0
        assert facts[0]["hidden"] == [32, 16]

    def test_max_error(self):
        widths = []
        for bound in (0.02, 0.1, 0.3):
            facts = apply(self.two(), max_error=bound, align=1).facts
            assert facts["predicted_output_error"] <= bound
            assert facts["output_error"] <= 1.5 * bound
            widths.append(sum(f["macs"][1] for f in facts["ffns"]))
        assert widths == sorted(widths, reverse=True)
        assert widths[0] > widths[-1]

    def test_widths_are_aligned_and_never_zero(self):
        assert apply(plain(), keep_hidden=0.01 + 8 / 32).facts["ffns"][0]["hidden"] == [32, 8]
        assert apply(plain(), keep_hidden=1 / 32, align=1).facts["ffns"][0]["hidden"] == [32, 1]
        with pytest.raises(UsageError, match="cannot be reached"):
            apply(plain(), keep_hidden=0.1)

    def test_all_of_it(self):
        graph = plain()
        outcome = apply(graph, keep_macs=1.0)
        assert not outcome.changed
        assert outcome.facts["output_error"] == 0

    def test_moments_that_do_not_fit_take_another_run(self, monkeypatch):
        one, two = self.two(), self.two()
        expected = apply(one, keep_macs=0.5).facts["ffns"]
        monkeypatch.setattr("channelfold.passes.ffn.approximate.LIMIT", 1)
        assert apply(two, keep_macs=0.5).facts["ffns"] == expected
        for left, right in zip(one.nodes, two.nodes, strict=True):
            if left.op == "MatMul":
                assert np.array_equal(left.inputs[1].values, right.inputs[1].values)


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            (
                "h = MatMul(x, A)\na = Relu(h)\nm = MatMul(a, B)\nz = ReduceMean<axes=[0]>(a)\ny = Mul(m, z)",
                "ReduceMean",
            ),
            ("h = MatMul(x, A)\na = Relu(h)\nm = MatMul(a, B)\nn = MatMul(a, C)\ny = Add(m, n)", "2 linears read"),
            ("a = Relu(x)\ny = MatMul(a, B)", "an input of the graph feeds it"),
            (
                "h = MatMul(x, A)\nn = Neg(x)\nk = MatMul(n, C)\nr = Relu(h)\na = Mul(r, k)\ny = MatMul(a, B)",
                "different tensors",
            ),
        ],
        ids=["reduced", "shared", "input", "sources"],
    )
    def test_reasons(self, body, reason):
        weights = {n: (8, 8) for n in "ABC" if f"{n})" in body}
        graph = build("(float[N,8] x) => (float[N,8] y)", body, opset=13, kind="float", **weights)
        before = listing(graph)
        outcome = apply(graph, keep_hidden=0.5, align=1)
        assert not outcome.changed
        assert reason in reasons(outcome)[0]
        assert listing(graph) == before

    def test_patterns(self):
        assert reasons(apply(plain(), keep_macs=0.5, exclude=("Mat*",))) == ["excluded by pattern 'Mat*'"]
        assert reasons(apply(plain(), keep_macs=0.5, include=("up*",))) == ["not included by any pattern"]

    def test_too_few_positions(self):
        graph = plain(hidden=2560)
        outcome = apply(graph, keep_macs=0.5)
        assert reasons(outcome) == ["2048 positions were seen, too few for 2560 hidden channels"]

    def test_an_output_that_never_changes(self):
        assert "constant" in reasons(apply(plain(W2=np.zeros((32, 8))), keep_macs=0.5))[0]

    def test_no_branch_where_it_is_asked_for(self):
        body = "h = MatMul(x, W1)\na = Relu(h)\nt = Transpose<perm=[1,0]>(a)\nd = MatMul(W2, t)\n"
        body += "y = Transpose<perm=[1,0]>(d)"
        graph = build("(float[N,8] x) => (float[N,8] y)", body, kind="float", W1=(8, 32), W2=(8, 32))
        assert reasons(apply(graph, keep_macs=0.5, branch="always"))[0].startswith("no dense branch: ")

    def test_without_data(self):
        with pytest.raises(DataError, match="needs calibration data"):
            ApproximateFfn(keep_macs=0.5).apply(plain(), Context())

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({}, "the amount to remove is missing"),
            ({"keep_macs": 0.5, "max_error": 0.1}, "'keep_macs' and 'max_error' are given"),
            ({"keep_macs": 0.0}, "'keep_macs' is 0"),
            ({"keep_hidden": 1.5}, "'keep_hidden' is 1.5"),
            ({"max_error": -1.0}, "'max_error' is -1"),
            ({"keep_macs": 0.5, "ridge": -1.0}, "'ridge' is -1"),
            ({"keep_macs": 0.5, "align": 0}, "'align' is 0"),
        ],
    )
    def test_options(self, options, words):
        with pytest.raises(UsageError, match=words):
            ApproximateFfn(**options)

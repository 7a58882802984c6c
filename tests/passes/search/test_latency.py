"""The time of mixes: exact on planted times, and nodes that ONNX Runtime has fused found again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from channelfold.passes.layers.owners import nearest, owners
from channelfold.passes.layers.sensitivity import Site
from channelfold.passes.search import latency
from channelfold.passes.search.front import Point, point
from channelfold.passes.search.latency import Timed
from channelfold.passes.search.tabled import options_in
from channelfold.runtime import jobs
from channelfold.runtime.io import files
from channelfold.runtime.stats.profile import NodeTime, profiles
from channelfold.tests.graphs import build
from channelfold.tests.shipped import CALIBRATION, DIGITS

SITES = 6
WIDTHS = [8, 16, 4, 32, 8, 8]  # of the tensors that the sites read, one after the other
TIMES = [{"float": 4.0 + i, "int8": 2.0 + 0.5 * i, "w8": 3.0} for i in range(SITES)]
TIMES[3] = {"float": 7.0}  # cannot be quantized
REST, RATE, ORIGINAL, BATCH = 5.0, 0.01, 50.0, 10


def sites() -> list[Site]:
    """A chain of sites. The errors are such that no two mixes are alike."""
    made = []
    for place, times in enumerate(TIMES):
        errors = {"int8": 1.3 ** (place + 1), "w8": 0.4 * 1.2 ** (place + 1)}
        own = {option: error for option, error in errors.items() if option in times}
        made.append(Site((f"l{place}",), own, dict.fromkeys(times, 1), costs=dict.fromkeys(times, 0.0)))
    return made


def borders(options: tuple[str, ...]) -> list[float]:
    """The planted times of borders by site: the one of two that is int8 quantizes and dequantizes."""
    found = [0.0] * SITES
    for place in range(1, SITES):
        if (options[place - 1] == "int8") != (options[place] == "int8"):
            found[place if options[place] == "int8" else place - 1] += RATE * BATCH * WIDTHS[place]
    return found


def truth(options: tuple[str, ...]) -> float:
    """The planted time of a mix in milliseconds."""
    return REST + sum(borders(options)) + sum(times[option] for times, option in zip(TIMES, options, strict=True))


@pytest.fixture
def learned() -> latency.Latency:
    """The model of planted times."""
    weights: dict[str, Any] = {f"W{i}": np.ones((w, v)) for i, (w, v) in enumerate(itertools.pairwise([*WIDTHS, 8]))}
    text = "\n".join(f"t{i} = MatMul({'x' if not i else f't{i - 1}'}, W{i})" for i in range(SITES))
    graph = build(f"(float[n,{WIDTHS[0]}] x) => (float[] t{SITES - 1})", text, kind="float", **weights)
    for place, node in enumerate(graph.nodes):
        node.name = f"l{place}"
    mixes: dict[str, Point] = {}

    def file_of(mix: Point) -> Path:
        mixes[f"{len(mixes)}"] = mix
        return Path(f"{len(mixes) - 1}")

    def timer(paths: Mapping[str, Path], nodes: Sequence[Sequence[str]]) -> dict[str, Timed]:
        assert nodes == [(f"l{place}",) for place in range(SITES)]
        found = {}
        for name, path in paths.items():
            options = mixes[path.name].options if name else ("float",) * SITES
            own = (times[option] for times, option in zip(TIMES, options, strict=True))
            whole = truth(options) if name else ORIGINAL
            found[name] = Timed(whole, [ms + border for ms, border in zip(own, borders(options), strict=True)])
        return found

    feed = {"x": np.zeros((BATCH, WIDTHS[0]), np.float32)}
    paths = {name: file_of(point(sites(), mix)) for name, mix in latency.mixes(sites()).items()}
    timed = timer({"": Path("original"), **paths}, [site.nodes for site in sites()])
    return latency.learned(graph, sites(), timed, feed)


def test_every_mix_of_planted_times_is_predicted(learned: latency.Latency) -> None:
    for options in itertools.product(*TIMES):
        assert learned.share(options) * ORIGINAL == pytest.approx(truth(options))
    assert learned.rest == pytest.approx(REST)


@pytest.mark.parametrize("share", [0.56, 0.65, 0.75, 0.85])
def test_the_most_accurate_mix_within_a_limit(learned: latency.Latency, share: float) -> None:
    """The neighbours of a site are chosen one after the other: hardly worse than the best of all mixes."""
    fits = [options for options in itertools.product(*TIMES) if truth(options) <= share * ORIGINAL]
    best = min(point(sites(), options).predicted for options in fits)
    found = learned.within(sites(), share)
    assert truth(found.options) <= share * ORIGINAL
    assert found.predicted <= 1.1 * best


def test_a_limit_that_no_mix_keeps_gives_the_fastest(learned: latency.Latency) -> None:
    found = learned.within(sites(), 0.1)
    assert truth(found.options) == min(map(truth, itertools.product(*TIMES)))


def test_measured_mixes_correct_all_predictions_by_one_factor(learned: latency.Latency) -> None:
    slow = {}

    def clock(mix: Point) -> float:
        slow[mix] = 1.25 * truth(mix.options) / ORIGINAL
        return slow[mix]

    found = learned.search(sites(), 0.8, clock)
    assert found == slow
    assert [share <= 0.8 for share in found.values()] == [False, True]  # too slow first, then with the factor
    assert learned.corrected(found).factor == pytest.approx(1.25)
    mix = random.Random(0).choice(list(itertools.product(*TIMES)))
    assert learned.corrected(found).share(mix) == pytest.approx(1.25 * truth(mix) / ORIGINAL)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_fused_nodes_belong_to_the_site_that_they_were(tmp_path: Path, target: str) -> None:
    path = tmp_path / "int8.onnx"
    jobs.compress(DIGITS, tmp_path, source=jobs.Source(CALIBRATION), overrides={"target": target})
    (tmp_path / "model.onnx").rename(path)
    graph = files.load(path)
    names = [node.name for node in graph.nodes if node.op in ("Conv", "Gemm")]
    assert list(options_in(graph).values()).count("int8") == 5
    feed = {"image": np.zeros((1, 1, 8, 8), np.float32)}
    nodes = profiles({"int8": path}, feed, threads=1, rounds=1)["int8"]
    counted = [NodeTime(node.name, node.op, 1.0) for node in nodes]
    times = owners(path, counted, [[name] for name in names])
    assert sum(times) == len(nodes)  # no node is lost
    alone = [NodeTime(n.name, n.op, 1.0) for n in nodes if "Conv" in n.op or n.op in ("Gemm", "QGemm")]
    assert owners(path, alone, [[name] for name in names]) == [1.0] * len(names)


def test_a_quantizer_belongs_to_the_site_that_reads_it_and_other_nodes_to_the_one_in_front() -> None:
    graph = build(
        "(float[n,8] x) => (float[] y)",
        """
        a = Relu(x) b = MatMul(a, W) c = Relu(b)
        q = QuantizeLinear(c, s, z) d = DequantizeLinear(q, s, z) e = MatMul(d, W) y = Relu(e)
        """,
        kind="float", W=(8, 8), s=np.float32(0.1), z=np.int8(0),
    )  # fmt: skip
    names = [node.name for node in graph.nodes]
    products = [node.name for node in graph.nodes if node.op == "MatMul"]
    found = nearest(graph, {name: place for place, name in enumerate(products)})
    assert [found[name] for name in names] == [0, 0, 0, 1, 0, 1, 1]

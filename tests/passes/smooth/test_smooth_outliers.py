"""Planted outliers ruin int8, smoothing finds them, and a search keeps what it promises."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes.layers.linear import linears
from channelfold.passes.layers.quantization_error import Bits, LayerError
from channelfold.passes.smooth import Smooth
from channelfold.runtime.stats.channels import ChannelStatistics
from channelfold.runtime.stats.observe import by_name, observe
from channelfold.tests.graphs import build, constants, random, run, samples
from channelfold.tests.passes.smooth.blocks import (
    BLOCKS,
    METHODS,
    SEARCHED,
    block,
    int8,
    outputs,
    plant,
    planted,
    smooth,
    snr,
)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_planted_outliers_ruin_int8(name, shifted):
    graph, data, exact, unplanted = planted(name, shifted)
    assert snr(exact, outputs(graph, data)) > 100  # the function is what it was
    assert snr(exact, int8(graph, data)) < unplanted - 25


RECOVERING = ["auto", "smoothquant", "smoothquant, searched", "os-plus", "repq", "repq, median", "outliertune"]


@pytest.mark.parametrize("method", RECOVERING)
@pytest.mark.parametrize("name", BLOCKS)
def test_planted_scales_are_found(name, method):
    """Within 1 dB of the network without outliers, or better. Searches leave convolutions with kernels alone."""
    graph, data, exact, unplanted = planted(name)
    outcome = smooth(graph, METHODS[method], data)
    if name == "conv" and method in SEARCHED:
        assert [site["tensor"] for site in outcome.facts["sites"]] == ["n", "t"]
        return
    assert snr(exact, int8(graph, data)) > unplanted - 1


@pytest.mark.parametrize("method", ["auto", "os-plus", "repq", "repq, median", "outliertune"])
@pytest.mark.parametrize("name", BLOCKS)
def test_planted_shifts_are_found(name, method):
    graph, data, exact, unplanted = planted(name, shifted=True)
    outcome = smooth(graph, METHODS[method], data)
    if name == "conv" and method in SEARCHED:
        assert [site["tensor"] for site in outcome.facts["sites"]] == ["n", "t"]
        return
    assert snr(exact, int8(graph, data)) > unplanted - 1


@pytest.mark.parametrize("method", ["auto", "os-plus", "repq", "outliertune"])
def test_without_shift_planted_shifts_stay(method):
    graph, data, exact, unplanted = planted("pre-LN", shifted=True)
    bias = constants(graph)["qb"]
    smooth(graph, dataclasses.replace(METHODS[method], shift=False), data)
    np.testing.assert_array_equal(constants(graph)["qb"], bias)
    assert snr(exact, int8(graph, data)) < unplanted - 10


def test_powers_of_two_find_what_four_exponents_can():
    """fp4-shift divides the largest channels by 8 at most: 200 becomes 25."""
    graph = block("pre-LN")
    data = samples(graph)
    plant(graph)
    outcome = smooth(graph, METHODS["fp4-shift"], data)
    for site in outcome.facts["sites"]:
        assert np.log2(site["scale"]).tolist() == [-3, 0]
        assert site["outlier_ratio"][1] == pytest.approx(site["outlier_ratio"][0] / 8, rel=0.2)


def test_awq_lowers_the_error_of_four_bits():
    graph = block("pre-LN")
    data = samples(graph, 16)
    plant(graph)
    for site in smooth(graph, METHODS["awq"], data).facts["sites"]:
        before, after = site["output_snr_db"]
        assert after > before


@pytest.mark.parametrize("group", [0, 32])
def test_awq_lowers_the_error_of_three_bits_where_one_channel_of_a_hundred_is_50_times_larger(group):
    """On the outputs of rows that were not calibrated on; without quantization nothing changes."""
    gamma = np.ones(128)
    gamma[[17, 90]] = 50
    body = "n = LayerNormalization(x, g)\n y = MatMul(n, W)"
    signature = "(float[N,T,128] x) => (float[] y)"
    graph = build(signature, body, kind="float", g=gamma, W=(128, 64))
    data, other = samples(graph), {"x": random((9, 16, 128), "other").astype(np.float32)}
    before = run(graph, other)["y"]
    smooth(graph, Smooth("awq", weight_bits=3, group_size=group), data)
    assert snr(before, run(graph, other)["y"]) > 100

    def error(graph: gs.Graph) -> float:
        (linear,) = linears(graph)
        linear.set_weight(Bits(0, 3, group).format.rounded(linear.weight()))
        return -snr(before, run(graph, other)["y"])

    assert error(graph) < error(build(signature, body, kind="float", g=gamma, W=(128, 64))) - 5


# ---- what a search promises ----------------------------------------------------------------------------------------


def site_errors(method: str, name: str, shifted: bool) -> dict[str, float]:
    """The output SNR of every site after a method, by tensor; that before it where it was left alone."""
    graph = block(name)
    plant(graph, shifted)
    return {site["tensor"]: site["output_snr_db"][1] for site in smooth(graph, METHODS[method]).facts["sites"]}


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", ["pre-LN", "RMS, SwiGLU, GQA"])
def test_auto_is_at_least_as_good_as_each_method_it_tries(name, shifted):
    """At the first site, before which nothing differs, and by the numbers at all of them."""
    auto = site_errors("auto", name, shifted)
    for method in ("smoothquant, searched", "os-plus"):
        other = site_errors(method, name, shifted)
        assert set(auto) >= set(other)
        for tensor, decibels in other.items():
            assert auto[tensor] >= decibels - 1e-6, tensor


@pytest.mark.parametrize("method", SEARCHED)
def test_a_search_is_never_worse_than_no_scale(method):
    """The error measured again on the graph as it came out, on all rows.

    Without what would change the outputs that it is a share of: a shift, and the scale between v and o.
    """
    graph = block("pre-LN")
    data = samples(graph, 2)
    (o,) = (linear.name for linear in linears(graph) if linear.data.name == "c")
    step = dataclasses.replace(METHODS[method], exclude=(o,), shift=False)
    bits = Bits(0 if method == "awq" else 8, step.weight_bits, step.group_size)

    def errors() -> dict[str, float]:
        found = {}
        observers = {name: ChannelStatistics(-1, 256) for name in ("n1", "c", "n2")}
        observe(graph, by_name(observers.items()), data)
        for name, observer in observers.items():
            readers = [linear for linear in linears(graph) if linear.data.name == name]
            found[name] = -10 * np.log10(LayerError.of(readers, observer.sample(), bits).error())
        return found

    before = errors()
    sites = {site["tensor"]: site["output_snr_db"] for site in smooth(graph, step, data).facts["sites"]}
    after = errors()
    assert sites
    assert "c" not in sites
    for name, decibels in sites.items():
        assert decibels == pytest.approx([before[name], after[name]], abs=0.05)  # float32 decides some roundings
        assert decibels[1] > decibels[0]
    assert all(after[name] == pytest.approx(before[name], abs=0.05) for name in after if name not in sites)

"""The option profile: what ONNX Runtime runs slower in int8 stays float, where the whole is faster so."""

from __future__ import annotations

import pytest

from channelfold.passes.quantize import Quantize, timed
from channelfold.runtime.errors import ModelError, UsageError
from channelfold.runtime.io import files
from channelfold.runtime.stats.profile import NodeTime
from channelfold.tests.graphs import ops, reasons
from channelfold.tests.passes.quantize.quantized import network, quantize

PROFILE = Quantize(target="onnxruntime", profile=True)
SLOW, *OTHERS = (node.name for node in network().nodes if node.op in ("Conv", "Gemm"))


def told(monkeypatch: pytest.MonkeyPatch, int8: float, mixed: float = 0.0) -> list[list[str]]:
    """Lets profiles tell 1 ms of every site in float and ``int8`` of the first one in int8, .5 of the others.

    ``mixed``: of the mix, where all int8 takes 1 ms. The operators of the files that were run, each time.
    """
    seen = []

    def profiles(paths, feed, progress):
        assert {name: value.shape for name, value in feed.items()} == {"x": (2, 16, 8, 8)}
        seen.extend(ops(files.load(path)) for path in paths.values())
        whole = {"float": 3.0, "int8": 1.0, "mixed": mixed}
        return {kind: [NodeTime("all", "Conv", whole[kind])] for kind in paths}

    def owners(path, nodes, sites):
        return [(1.0 if path.stem == "float" else int8 if name == SLOW else 0.5) for (name,) in sites]

    monkeypatch.setattr(timed, "profiles", profiles)
    monkeypatch.setattr(timed, "owners", owners)
    return seen


def test_a_site_that_is_slower_in_int8_stays_float(monkeypatch):
    graph, seen = network(), told(monkeypatch, 1.5, mixed=0.9)
    outcome = quantize(graph, PROFILE)
    assert outcome.facts["quantized_nodes"] == OTHERS
    reason = "Conv stays float: ONNX Runtime runs it slower in int8 on this machine (1.500 ms, 1.000 in float)"
    assert reasons(outcome) == [reason]
    plain, whole, again, mixed = seen
    assert plain == ops(network())
    assert whole == again
    assert mixed == ops(graph)


@pytest.mark.parametrize(
    ("int8", "mixed", "files_run"),
    [(1.15, 0.5, 2), (1.5, 0.98, 4), (1.5, 1.2, 4)],
    ids=["hardly slower", "a mix as fast", "a slower mix"],
)
def test_where_float_gains_nothing_all_is_int8(monkeypatch, int8, mixed, files_run):
    graph, plain, seen = network(), network(), told(monkeypatch, int8, mixed)
    outcome = quantize(graph, PROFILE)
    quantize(plain, Quantize(target="onnxruntime"))
    assert not outcome.refused
    assert ops(graph) == ops(plain)
    assert len(seen) == files_run


def test_microseconds_do_not_count(monkeypatch):
    told(monkeypatch, 1.0, 0.1)
    monkeypatch.setattr(
        timed, "owners", lambda path, nodes, sites: [0.03 if path.stem == "int8" else 0.02] * len(sites)
    )
    assert not quantize(network(), PROFILE).refused


def test_what_cannot_be_profiled_is_said(monkeypatch):
    def refused(*_, **options):
        raise ModelError("it is refused")

    monkeypatch.setattr(timed, "profiles", refused)
    outcome = quantize(network(), PROFILE)
    assert outcome.facts["quantized"] == 3
    assert outcome.warnings == ["Which nodes are slower in int8 is not known: it is refused"]


def test_a_real_profile_leaves_a_valid_graph():
    """Whichever nodes are slower on this machine: each site is int8, or refused with both times."""
    outcome = quantize(network(), PROFILE)
    assert all("slower in int8 on this machine (" in reason for reason in reasons(outcome))


def test_the_other_target_is_not_profiled():
    with pytest.raises(UsageError, match="profile is for the target onnxruntime, not tensorrt"):
        Quantize(profile=True)

from __future__ import annotations

import numpy as np
import pytest

from channelfold.benchmarks.networks import NETWORKS, agrees, counts, make
from channelfold.passes.base import Context
from channelfold.passes.ffn import ReparameterizeFfn
from channelfold.runtime.io.files import load, save
from channelfold.runtime.io.session import Session


@pytest.mark.parametrize("name", [name for name in NETWORKS if not name.startswith("vit")])  # those have gigabytes
def test_parameters_and_macs_are_those_of_the_paper(name, tmp_path):
    plain, folded = (counts(make(name, form, tmp_path / form, weights=False)) for form in ("plain", "folded"))
    assert agrees(NETWORKS[name], plain, folded)
    assert not agrees(NETWORKS[name], folded, plain)


@pytest.mark.parametrize("name", ["deit_t", "swin_t"])
def test_the_pass_makes_of_an_unfolded_network_what_the_folded_one_is(name, tmp_path):
    unfolded, folded = (make(name, form, tmp_path / f"{form}.onnx") for form in ("unfolded", "folded"))
    graph = load(unfolded)
    outcome = ReparameterizeFfn().apply(graph, Context())
    assert (len(outcome.changed), outcome.refused) == (12, [])
    save(graph, tmp_path / "reparam.onnx")
    assert counts(tmp_path / "reparam.onnx") == counts(folded)
    assert sorted(node.op for node in graph.nodes) == sorted(node.op for node in load(folded).nodes)
    image = {"input": np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)}
    before, after = (Session(path).run(image)["output"] for path in (unfolded, tmp_path / "reparam.onnx"))
    assert np.abs(before - after).max() < 1e-4 * np.abs(before).max()

from __future__ import annotations

import numpy as np
import pytest

from channelfold.benchmarks.networks import NETWORKS, counts, make
from channelfold.passes.base import Context
from channelfold.passes.reparameterize_ffn import ReparameterizeFfn
from channelfold.runtime.graph_io import load, save
from channelfold.runtime.ort import Session

IN_THE_PAPER = [(name, form) for name in NETWORKS if name != "vit_h14" for form in ("plain", "folded")]


@pytest.mark.parametrize(("name", "form"), [pair for pair in IN_THE_PAPER if pair != ("vit_h", "plain")])  # 2.5 GB
def test_parameters_and_macs_are_those_of_the_paper(name, form, tmp_path):
    found = counts(make(name, form, tmp_path / "model.onnx", weights=False))
    column, network = ("plain", "folded").index(form), NETWORKS[name]
    assert abs(found.parameters / 1e6 - network.parameters[column]) < 0.06  # the paper rounds to 0.1 M
    # It rounds to 0.1 G, and seems to count half a percent for norms and biases, which no layer's product contains.
    printed = network.gmacs[column]
    assert 0.995 * printed - 0.05 < found.macs / 1e9 < printed + 0.05


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

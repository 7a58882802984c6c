"""Real topologies: how many of their channels can be cut, why the rest cannot, and that slicing is masking."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold import models
from channelfold.passes.base import Context
from channelfold.passes.channels.cut import cut, mask
from channelfold.passes.fold import FoldConstants, RemoveIdentities
from channelfold.runtime.io.files import check, infer_shapes, load, session
from channelfold.runtime.io.session import Session
from channelfold.tests.channel_cuts import Feed, groups_of, random_keep, regions_of
from channelfold.tests.passes.prune.topologies import (
    COUNTS,
    NORMED,
    counts,
    graph_of,
    image,
    logits,
    random_weights,
    weightless,
)

OPEN_SET = Path(os.environ.get("CHANNELFOLD_OPEN_SET", "~/.cache/channelfold-open-set")).expanduser() / "open"
RATIOS = (0.1, 0.3, 0.5, 0.7)


@pytest.mark.parametrize("name", COUNTS)
def test_light_topologies(name):
    graph = graph_of(name, weightless)
    assert counts(groups_of(graph, image(graph))) == COUNTS[name]


def assert_slice_equals_mask(make: Callable[[], gs.Graph], feed: Feed, output: str, *, width: bool = False) -> None:
    for ratio in RATIOS:
        values = []
        for step in (cut, mask):
            graph = make()
            rng = np.random.default_rng(0)
            regions = [r for r in regions_of(groups_of(graph, feed)) if width or not r.reduced]
            step(graph, [(region, random_keep(region, rng, ratio)) for region in regions])
            check(graph)
            values.append(session(graph, [output], optimize=False, threads=2).run(feed)[output])
        error, peak = np.abs(values[0] - values[1]).max(), np.abs(values[1]).max()
        assert error < 1e-5 * peak, f"{ratio}: error {error:.3g} of {peak:.3g}"


@pytest.mark.parametrize("name", COUNTS)
def test_slicing_light_topologies_is_masking(name):
    def make() -> gs.Graph:
        return graph_of(name, random_weights(1 if name in NORMED else 2))

    graph = make()
    assert_slice_equals_mask(make, image(graph), logits(graph))


def folded(path: Path) -> gs.Graph:
    graph = load(path)
    for step in (FoldConstants(), RemoveIdentities()):
        step.apply(graph, Context())
    infer_shapes(graph)
    return graph


@pytest.mark.parametrize("width", [False, True], ids=["", "width"])
@pytest.mark.parametrize("model", models.MODELS.values(), ids=lambda model: model.name)
def test_slicing_shipped_models_is_masking(model, width):
    path = models.path(model.onnx)
    feed = {model.input: np.load(models.path(model.evaluation))[model.input][:8]}
    assert_slice_equals_mask(lambda: folded(path), feed, model.output, width=width)


def test_all_hidden_channels_of_shipped_models_may_go():
    free = {}
    for model in models.MODELS.values():
        feed = {model.input: np.load(models.path(model.evaluation))[model.input][:1]}
        free[model.name] = counts(groups_of(folded(models.path(model.onnx)), feed))
    classes = {"it is the output 'logits' of the model": 10}
    idle = {"ScatterND reads or writes it": 4 * 192}  # gone once `reparam` has folded them
    assert free == {
        "digits_cnn": (32 + 32 + 64 + 96, classes),
        "digits_vit": (48 + 4 * (3 * 48 + 192), classes),
        "digits_repavit": (48 + 4 * 3 * 48, classes | idle),
        "digits_repavit_ln": (48 + 4 * 3 * 48, classes | idle),
    }


@pytest.mark.open_set
@pytest.mark.skipif(not OPEN_SET.is_dir(), reason="the open set is not there")
@pytest.mark.parametrize("width", [False, True], ids=["", "width"])
@pytest.mark.parametrize(
    "name", ["crepe_tiny", "effnet_lite0.bn", "magika", "minilm", "ocr_rec", "plcmos", "vit_s_focus"]
)
def test_slicing_real_models_is_masking(name, width):
    path = OPEN_SET / f"{name}.onnx"
    rng = np.random.default_rng(0)
    feed = {}
    for spec in Session(path).inputs:
        shape = [d if isinstance(d, int) else {"frames": 300}.get(str(d), 2) for d in spec.shape]
        feed[spec.name] = rng.uniform(0, 1, shape).astype(spec.dtype)
    assert_slice_equals_mask(lambda: folded(path), feed, logits(folded(path)), width=width)

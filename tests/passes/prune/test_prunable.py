"""Real topologies: how many of their channels can be cut, why the rest cannot, and that slicing is masking.

The ONNX package has nine networks without their weights, which ConstantOfShape nodes stand for. Here they get random
ones. A Softmax at the end is left out of the comparison, for it would hide differences.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from channelfold import models
from channelfold.passes.base import Context
from channelfold.passes.channels.cut import cut, mask
from channelfold.passes.channels.groups import Group
from channelfold.passes.fold import FoldConstants, RemoveIdentities
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import check, infer_shapes, load, session
from channelfold.runtime.io.session import Session
from channelfold.tests.channel_cuts import Feed, groups_of, random_keep, regions_of

# Shuffled among 4 groups of 34, which 4 does not divide, all channels come to depend on one another.
TIED = "they go together or not at all"
OPEN_SET = Path(os.environ.get("CHANNELFOLD_OPEN_SET", "~/.cache/channelfold-open-set")).expanduser() / "open"
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
RATIOS = (0.1, 0.3, 0.5, 0.7)
CLASSES = {"Softmax normalizes over it": 1000}
LRN = "LRN mixes neighbouring channels"
COUNTS: dict[str, tuple[int, dict[str, int]]] = {  # channels that may go, and that stay, by reason
    "bvlc_alexnet": (9216, {LRN: 352, **CLASSES}),
    "densenet121": (10240, {"it is the output 'fc6_1' of the model": 1000}),
    "inception_v1": (7024, {LRN: 256, **CLASSES}),
    "inception_v2": (9952, CLASSES),
    "resnet50": (11456, CLASSES),
    "shufflenet": (3944, {TIED: 544, **CLASSES}),
    "squeezenet": (2944, CLASSES),
    "vgg19": (13696, CLASSES),
    "zfnet512": (6656, {LRN: 352, **CLASSES}),
}
NORMED = ("densenet121", "inception_v2", "resnet50", "shufflenet")  # BatchNormalization takes the place of a gain


def graph_of(name: str, weights: Callable[[tuple[int, ...]], np.ndarray]) -> gs.Graph:
    """One of the topologies, with ``weights`` for every shape."""
    graph = load(LIGHT / f"light_{name}.onnx")
    for node in [node for node in graph.nodes if node.op == "ConstantOfShape"]:
        shape = edit.value(node.inputs[0])
        assert shape is not None
        name = f"{node.outputs[0].name}_weight"
        edit.replace_uses(graph, node.outputs[0], gs.Constant(name, weights(tuple(map(int, shape)))))
    edit.remove_dead(graph)
    infer_shapes(graph)
    return graph


def weightless(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.float32(0), shape)


def random_weights(gain: float) -> Callable[[tuple[int, ...]], np.ndarray]:
    """Weights that keep activations near one; layers of 4096 neurons have 64, so that no network has over 30 MB."""
    rng = np.random.default_rng(0)

    def weights(shape: tuple[int, ...]) -> np.ndarray:
        shape = tuple(64 if n == 4096 else n for n in shape)
        if len(shape) == 1:
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(gain / np.prod(shape[1:])))

    return weights


def image(graph: gs.Graph) -> dict[str, np.ndarray]:
    return {t.name: np.random.default_rng(1).standard_normal(t.shape).astype(np.float32) for t in graph.inputs}


def logits(graph: gs.Graph) -> str:
    last = edit.producer(graph.outputs[0])
    assert last is not None
    return last.inputs[0].name if last.op == "Softmax" else graph.outputs[0].name


def counts(groups: list[Group]) -> tuple[int, dict[str, int]]:
    """How many channels may go, and how many stay for which reason."""
    free, stays = 0, {}
    for group in groups:
        for label, channels in zip(group.labels, group.channels.tolist(), strict=True):
            reason = group.region.fixed[label - 1] or (TIED if group.units == 1 else "")
            if reason:
                stays[reason] = stays.get(reason, 0) + channels
            else:
                free += channels
    return free, stays


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

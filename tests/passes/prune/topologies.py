"""The networks without weights that the ONNX package has: random ones for them, and how many channels may go.

ConstantOfShape nodes stand for the weights there. A Softmax at the end is left out of comparisons, for it would hide
differences.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.channels.groups import Group
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import infer_shapes, load

# Shuffled among 4 groups of 34, which 4 does not divide, all channels come to depend on one another.
TIED = "they go together or not at all"
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
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

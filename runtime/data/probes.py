"""Random inputs, and the shapes that a graph has on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.runtime.data.sources import Data, random_data
from channelfold.runtime.errors import DataError, ModelError
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.session import Feed, TensorSpec
from channelfold.runtime.io.shapes import Shape, measured_shapes, shapes_on

SAMPLES = 2  # random feeds for a model whose inputs have fixed shapes
SIZES = ((32, 1), (16, 2), (64, 1), (224, 1), (128, 1), (8, 1), (1, 1), (640, 1), (1024, 1))  # open axes, leading ones


def shapes_of(graph: gs.Graph, data: Data | None = None, seed: int = 0) -> dict[str, Shape]:
    """The shapes of all tensors, on the first sample of ``data`` or else on the first random feed that runs.

    Where no random feed runs, the shapes that ONNX shape inference knows.
    """
    if data is not None and (feed := next(iter(data), None)) is not None:
        return measured_shapes(graph, feed)
    try:
        for feed in random_feeds(required_inputs(graph), seed):
            try:
                return measured_shapes(graph, feed)
            except ModelError:
                continue
    except DataError:  # inputs that cannot be random
        pass
    return shapes_on(graph, {})


def random_feeds(inputs: Sequence[TensorSpec], seed: int, like: Feed | None = None) -> Iterator[Feed]:
    """Random feeds in the shapes of ``like``, or in one size after another where the model leaves sizes open.

    Raises DataError for inputs that cannot be random (strings, sequences).
    """
    if not inputs:
        yield {}
        return
    if like is not None:
        inputs = tuple(dataclasses.replace(spec, shape=np.shape(like[spec.name])) for spec in inputs)
    fixed = all(isinstance(dim, int) for spec in inputs for dim in spec.shape)
    for number, (size, leading) in enumerate(SIZES[:SAMPLES] if fixed else SIZES):
        dims = {spec.shape[0]: leading for spec in inputs if spec.shape and isinstance(spec.shape[0], str)}
        yield from random_data(inputs, 1, seed=seed + number, dims=dims, size=size)

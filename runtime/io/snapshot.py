"""A graph as it was at one moment: passes are undone with a snapshot, compared with it, and run on it.

A snapshot costs the graph without its weights. The large ones are shared with the graph, which is safe because passes
replace weights and never write into them; ``frozen`` holds them to it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.runtime.io.convert import carried, export_skeleton, import_model
from channelfold.runtime.io.files import open_model
from channelfold.runtime.io.session import Session
from channelfold.runtime.io.weights import MappedFile, MappedValues, Values, packed


@dataclass(frozen=True, eq=False)
class Snapshot:
    """``model`` holds no large weights. ``weights`` has their types and dims, ``values`` their values by name."""

    model: onnx.ModelProto
    weights: tuple[onnx.TensorProto, ...]
    values: dict[str, Values]
    path: Path | None

    @classmethod
    def of(cls, graph: gs.Graph) -> Snapshot:
        model, large = export_skeleton(graph)
        values = {proto.name: constant._values for proto, constant in large}
        own = carried(graph)
        return cls(model, tuple(proto for proto, _ in large), values, own.path if own else None)

    def restore(self, graph: gs.Graph) -> None:
        """Gives the object ``graph`` the contents that it had when the snapshot was taken."""
        become(graph, self.graph())

    def graph(self) -> gs.Graph:
        """A new graph with the contents that the graph had when the snapshot was taken."""
        return import_model(deepcopy(self.model), self.path, weights=self.values)

    def session(self, outputs: list[str] | None = None) -> Session:
        """A session that runs every node without optimization. ``outputs`` names any tensors of the main graph."""
        weights = [(deepcopy(w), packed(self.values[w.name])) for w in self.weights]
        return open_model(deepcopy(self.model), weights, outputs, whole=outputs is None, optimize=False)

    def rounded_otherwise(self, seed: int) -> Session:
        """A session of the same graph in which the float weights are off by up to one unit in their last place.

        The steps are random, like the rounding of weights that are computed anew. Whole numbers stay: some, such as
        masks and sizes, are no weights.
        """
        generator = np.random.default_rng(seed)

        def moved(values: np.ndarray) -> np.ndarray:
            if values.dtype.kind != "f":
                return values
            found = np.array(values)  # 0-d as well
            broken = found != np.rint(found)  # whole numbers, masks of -3.4e38 among them, have no room to move
            steps = generator.integers(-1, 2, found.shape, np.int8)[broken]
            found[broken] += np.spacing(found[broken]) * steps.astype(found.dtype)
            return found

        model = deepcopy(self.model)
        for proto in model.graph.initializer:
            if proto.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE):
                proto.CopyFrom(onnx.numpy_helper.from_array(moved(onnx.numpy_helper.to_array(proto)), proto.name))
        large = [(deepcopy(proto), moved(packed(self.values[proto.name]))) for proto in self.weights]
        return open_model(model, large, optimize=False)

    def same(self, other: Snapshot) -> bool:
        """Whether both are the same graph with the same weights. Declared shapes inside the graph do not count."""
        if self.weights != other.weights or _structure(self.model) != _structure(other.model):
            return False
        return all(_same(values, other.values[name]) for name, values in self.values.items())

    def same_constant(self, other: Snapshot, name: str) -> bool:
        """Whether a tensor of the main graph is the same constant in both, or in both no constant."""
        if name in self.values and name in other.values:
            return _same(self.values[name], other.values[name])
        small = [{t.name: t for t in graph.model.graph.initializer}.get(name) for graph in (self, other)]
        return small[0] == small[1] and (name in self.values) is (name in other.values)

    def fingerprint(self) -> str:
        """SHA-256 over the graph and its weights. A weight in a file counts by size and time of the file."""
        digest = hashlib.sha256(_structure(self.model))
        for proto in self.weights:
            values = self.values[proto.name]
            digest.update(proto.SerializeToString(deterministic=True))
            if (
                isinstance(values, MappedValues)
                and isinstance(file := values.file, MappedFile)
                and file.is_at_its_path()
            ):
                stat = file.path.stat()
                digest.update(f"{stat.st_size}|{stat.st_mtime_ns}|{values.offset}".encode())
            else:
                digest.update(_bytes(values).data)
        return digest.hexdigest()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Weights in memory cannot be written while this is open: numpy raises ValueError."""
        arrays = [v for v in self.values.values() if isinstance(v, np.ndarray) and v.flags.writeable]
        for array in arrays:
            array.flags.writeable = False
        try:
            yield
        finally:
            for array in arrays:
                array.flags.writeable = True


def become(graph: gs.Graph, other: gs.Graph) -> None:
    """Makes the object ``graph`` hold everything that ``other`` holds."""
    vars(graph).clear()
    vars(graph).update(vars(other))


def _structure(model: onnx.ModelProto) -> bytes:
    bare = deepcopy(model)
    _forget_shapes(bare.graph)
    return bare.SerializeToString(deterministic=True)


def _forget_shapes(graph: onnx.GraphProto) -> None:
    graph.ClearField("value_info")
    for value in graph.output:
        value.ClearField("type")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _forget_shapes(attribute.g)


def _bytes(values: Values) -> np.ndarray:
    return packed(values).reshape(-1).view(np.uint8)


def _same(a: Values, b: Values) -> bool:
    if a is b:
        return True
    if isinstance(a, MappedValues) and isinstance(b, MappedValues) and a.file is b.file and a.offset == b.offset:
        return True
    return np.array_equal(_bytes(a), _bytes(b))

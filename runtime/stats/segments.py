"""Values of tensors in the order of the graph, each from the values before, while the graph changes behind them.

    values -> segment 1 -> values -> (caller changes nodes of segment 2) -> segment 2 -> values -> …

The data run through the graph once, a segment at a time, all samples through one segment before the next. Between two
segments only those values are kept that later segments read, large ones in a temporary file. So a caller who changes
the layers one after the other, and looks at what they read then, pays for one run of the data and not for one run a
layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import ModelError
from channelfold.runtime.io import edit
from channelfold.runtime.io.convert import all_graphs
from channelfold.runtime.io.files import session
from channelfold.runtime.io.weights import Scratch, out_of_memory


class Segments:
    """The samples of ``data`` on their way through a graph. ``wanted`` names tensors that will be asked for."""

    def __init__(self, graph: gs.Graph, wanted: list[str], data: Data):
        self._graph = graph
        tensors = graph.tensors()
        place = {id(node): index for index, node in enumerate(graph.nodes)}
        self._ends = {
            name: -1 if (node := edit.producer(tensors[name])) is None else place[id(node)] for name in wanted
        }
        self._reads = [_read(node) for node in graph.nodes]
        self._done = 0
        files = Scratch()
        self.samples: list[dict[str, np.ndarray]] = [_on_disk(feed, files) for feed in data]

    @property
    def order(self) -> list[str]:
        """The wanted tensors in the order in which they can be asked for."""
        return sorted(self._ends, key=self._ends.__getitem__)

    def values(self, name: str) -> Iterator[np.ndarray]:
        """The values of a tensor on every sample. Tensors are asked for in ``order``, some may be left out."""
        for end in sorted({place + 1 for place in self._ends.values() if place <= self._ends[name]}):
            if end > self._done:
                self._run(end)
        for sample in self.samples:
            yield sample[name]

    def _run(self, end: int) -> None:
        nodes, rest = self._graph.nodes[self._done : end], self._reads[end : max(self._ends.values()) + 1]
        later = {name for reads in rest for name in reads} | {n for n, place in self._ends.items() if place >= end - 1}
        made = {t.name: t for node in nodes for t in node.outputs if t.name}
        needed = {name for reads in self._reads[self._done : end] for name in reads} - made.keys()
        known = self._graph.tensors()
        inputs = [known[name] for name in needed if name in (self.samples[0] if self.samples else {})]
        for tensor in inputs:
            tensor.dtype, tensor.shape = self.samples[0][tensor.name].dtype, None
        outputs = [made[name] for name in made if name in later]
        if outputs and self.samples:
            part = gs.Graph(
                list(nodes), inputs, outputs, opset=self._graph.opset, import_domains=self._graph.import_domains
            )
            vars(part).update({key: value for key, value in vars(self._graph).items() if key == "ir_version"})
            run = session(part)
        files = Scratch()
        for sample in self.samples:
            if outputs:
                sample |= _on_disk(run.run({tensor.name: sample[tensor.name] for tensor in inputs}), files)
            for name in sample.keys() - later:
                del sample[name]
        self._done = end


def _on_disk(values: Mapping[str, np.ndarray], files: Scratch) -> dict[str, np.ndarray]:
    """The values, large ones on a file. Raises ModelError for sequences."""
    for name, array in values.items():
        if not hasattr(array, "dtype"):
            raise ModelError(
                f"The model cannot be cut where {name!r} is read, which is no tensor", "Use another rounder"
            )
    return out_of_memory(files, values)


def _read(node: gs.Node) -> set[str]:
    """The names of the variables that a node reads, and its bodies."""
    bodies = [value for value in node.attrs.values() if isinstance(value, gs.Graph)]
    inner = [part for body in bodies for part in all_graphs(body)]
    read = [
        *node.inputs,
        *(t for part in inner for n in part.nodes for t in n.inputs),
        *(t for p in inner for t in p.outputs),
    ]
    return {tensor.name for tensor in read if isinstance(tensor, gs.Variable) and tensor.name}

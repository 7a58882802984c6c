"""A model some tensors of which are read, or replaced by given values or by parts of another, without a file."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.runtime.io import edit
from channelfold.runtime.io.files import infer_shapes, open_model
from channelfold.runtime.io.names import in_order, reads, rename
from channelfold.runtime.io.session import Feed, Session
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.io.weights import packed

_SEEN, _OWN, _GIVEN, _FLAG = "{}__seen", "{}__own", "{}__given", "{}__is_replaced"


class Model:
    """The main graph of a model, of which sessions in altered forms are made."""

    def __init__(self, graph: gs.Graph):
        infer_shapes(graph)
        self._snapshot = Snapshot.of(graph)
        self.nodes = list(self._snapshot.model.graph.node)
        self.writers = {name: index for index, node in enumerate(self.nodes) for name in node.output if name}
        self.readers: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in set(reads(node)):
                self.readers.setdefault(name, []).append(index)
        self.inputs = [tensor.name for tensor in graph.inputs]
        self.outputs = [tensor.name for tensor in graph.outputs]
        self.kinds = {name: edit.dtype(tensor) for name, tensor in graph.tensors().items()}

    @cached_property
    def computed(self) -> list[str]:
        """The floating point tensors that depend on an input, in the order of their nodes."""
        known = set(self.inputs)
        found = []
        for index in in_order(self.nodes):
            node = self.nodes[index]
            if any(name in known for name in reads(node)):
                names = [name for name in node.output if name]
                known.update(names)
                found += [name for name in names if self._is_float(name)]
        return found

    def _is_float(self, name: str) -> bool:
        kind = self.kinds.get(name)
        return kind is not None and edit.is_float_type(kind)

    def behind(self, name: str, given: Container[str]) -> tuple[list[int], list[str]]:
        """The nodes that compute a tensor from ``given`` ones and the inputs of the model, and which these are."""
        nodes, used = [], {}
        pending, seen = [self.writers[name]], {self.writers[name]}
        while pending:
            index = pending.pop()
            nodes.append(index)
            for read in reads(self.nodes[index]):
                if read in given or read in self.inputs:
                    used[read] = None
                elif (writer := self.writers.get(read)) is not None and writer not in seen:
                    seen.add(writer)
                    pending.append(writer)
        return sorted(nodes), list(used)

    def open(
        self,
        outputs: Iterable[str],
        *,
        given: Iterable[str] = (),
        grafts: Iterable[Graft] = (),
        before: bool = False,
        optimize: bool = False,
    ) -> Opened:
        """A session that returns ``outputs`` in float32.

        A run may replace ``given`` tensors by values of its own, and parts of the model by ``grafts``. With ``before``
        an output that is replaced is returned as the model computes it.
        """
        model = deepcopy(self._snapshot.model)
        graph, weights, sources = model.graph, self._weights(), {}
        for number, graft in enumerate(grafts):
            sources[graft.second], constants = graft.insert(graph, f"{number}__", self.kinds)
            weights += constants
        for name in given:
            sources[name] = _GIVEN.format(name)
            _default(graph, sources[name], np.zeros((), self.kinds[name]))
        _rename_outputs(graph, sources)
        for name, source in sources.items():
            _default(graph, _FLAG.format(name), np.zeros((), np.bool_))
            graph.node.append(onnx.helper.make_node("Where", [_FLAG.format(name), source, _OWN.format(name)], [name]))
        outputs = list(outputs)
        for name in outputs:
            source = _OWN.format(name) if before and name in sources else name
            graph.node.append(onnx.helper.make_node("Cast", [source], [_SEEN.format(name)], to=onnx.TensorProto.FLOAT))
        _keep(graph, [_SEEN.format(name) for name in outputs])
        names = [_SEEN.format(name) for name in outputs]
        session = open_model(model, weights, names, exact=True, optimize=optimize, arena=False)
        return Opened(session, self, outputs)

    def _weights(
        self, prefix: str = "", names: Container[str] | None = None
    ) -> list[tuple[onnx.TensorProto, np.ndarray]]:
        """The large constants, all or those of some names, with a prefix to their names."""
        wanted = [weight for weight in self._snapshot.weights if names is None or weight.name in names]
        found = [(deepcopy(weight), packed(self._snapshot.values[weight.name])) for weight in wanted]
        for proto, _ in found:
            proto.name = prefix + proto.name
        return found


@dataclass(frozen=True)
class Graft:
    """The nodes of another model, ``first``, that compute its tensor ``end``, in place of what computes ``second``.

    They read tensors of the model that receives them: ``given`` maps the names in ``first`` to those there.
    """

    first: Model
    end: str
    nodes: Sequence[int]
    given: Mapping[str, str]
    second: str

    def insert(
        self, graph: onnx.GraphProto, prefix: str, kinds: Mapping[str, np.dtype | None]
    ) -> tuple[str, list[tuple[onnx.TensorProto, np.ndarray]]]:
        """Adds the nodes and their constants to a graph. Returns the name of the result, and the large constants.

        The graph lacks the large constants. ``kinds``: the types of its tensors, some of which may be of half precision
        in one of both models.
        """
        own_kinds = self.first.kinds
        names = {name: name for name in self.first.inputs}
        for name in {name for index in self.nodes for name in reads(self.first.nodes[index])} & self.given.keys():
            names[name] = _cast(graph, self.given[name], kinds, own_kinds[name], f"{prefix}{name}__cast")
        names[self.end] = result = prefix + self.end
        read = set()
        for index in self.nodes:
            node = deepcopy(self.first.nodes[index])
            read.update(reads(node))
            node.name = prefix + node.name
            rename(node, names, prefix)
            graph.node.append(node)
        for proto in self.first._snapshot.model.graph.initializer:
            if proto.name in read:
                own = graph.initializer.add()
                own.CopyFrom(proto)
                own.name = prefix + proto.name
        end = _cast(graph, result, {result: own_kinds[self.end]}, kinds[self.second], f"{result}__cast")
        return end, self.first._weights(prefix, read)


class Opened:
    """A session of a model some tensors of which a run may replace."""

    def __init__(self, session: Session, model: Model, outputs: list[str]):
        self._session, self._model, self._outputs = session, model, outputs

    def run(
        self, feed: Feed, given: Feed | None = None, *, grafts: Iterable[str] = (), outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The outputs, or some of them, in float32.

        ``given`` has values of tensors that are replaced, ``grafts`` names the tensors that grafts replace.
        """
        whole = self._session.accepted(feed)
        for name, values in (given or {}).items():
            whole[_GIVEN.format(name)] = np.ascontiguousarray(values, self._model.kinds[name])
        whole |= {_FLAG.format(name): np.ones((), np.bool_) for name in (*(given or ()), *grafts)}
        names = self._outputs if outputs is None else outputs
        found = self._session.run(whole, [_SEEN.format(name) for name in names])
        return {name: found[_SEEN.format(name)] for name in names}


def _cast(
    graph: onnx.GraphProto, name: str, kinds: Mapping[str, np.dtype | None], wanted: np.dtype | None, new: str
) -> str:
    """The name of a tensor in the wanted type, which a Cast makes where the tensor has another."""
    if wanted is None or kinds[name] in (None, wanted):
        return name
    kind = onnx.helper.np_dtype_to_tensor_dtype(wanted)
    graph.node.append(onnx.helper.make_node("Cast", [name], [new], to=kind))
    return new


def _default(graph: onnx.GraphProto, name: str, value: np.ndarray) -> None:
    """Adds an input that has a value where none is given."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
    graph.initializer.append(onnx.numpy_helper.from_array(value, name))


def _rename_outputs(graph: onnx.GraphProto, names: Container[str]) -> None:
    for node in graph.node:
        for place, name in enumerate(node.output):
            if name in names:
                node.output[place] = _OWN.format(name)


def _keep(graph: onnx.GraphProto, outputs: Iterable[str]) -> None:
    """Leaves the nodes and inputs on which outputs depend."""
    writers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    needed, pending, read = set(), list(outputs), set()
    while pending:
        name = pending.pop()
        read.add(name)
        if (index := writers.get(name)) is not None and index not in needed:
            needed.add(index)
            pending += reads(graph.node[index])
    for index in reversed(range(len(graph.node))):
        if index not in needed:
            del graph.node[index]
    for index in reversed(range(len(graph.input))):
        if graph.input[index].name not in read:
            del graph.input[index]

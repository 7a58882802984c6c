"""Switches between a tensor and its readers: which option quantizes it on the way, or none.

    reader reads    If(int8, DQ(Q(x)), If(fp8, DQ(Q(x)), … x))

The bodies of the options are what the passes put there. They are in the graph of the first option; those of the others
are copied from theirs. A node of its own operator holds them until ``wire`` knows which switches stay open.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import free_name

FLOAT = "float"
_SWITCH = "channelfold.switch"
_FUSED = ("Relu", "Clip")


@dataclass(frozen=True)
class Switch:
    """A tensor that is called ``result`` behind its quantizer, of which there is one for each of the ``options``.

    It is on where one of the nodes ``readers`` is. ``carried``: tensors that are called so behind their switches; where
    all of them are on, the switch is as well.
    """

    result: str
    readers: tuple[str, ...]
    options: tuple[str, ...]
    carried: tuple[str, ...] = ()

    @property
    def conditions(self) -> dict[str, str]:
        """The inputs of the graph that tell whether the switch is in each of its options."""
        return {option: f"{self.result}_{option}" for option in self.options}


@dataclass(frozen=True)
class Quantizers:
    """What options put between a tensor x and the linears that read x.

    ``options``: by option, its graph and what each of its linears reads there. ``read``: the name of x by linear;
    ``offsets``: the c of those in front of whose switch there is x - c.
    """

    options: Mapping[str, tuple[gs.Graph, Mapping[str, gs.Tensor]]]
    read: Mapping[str, str]
    offsets: Mapping[str, float]

    def of(self, reader: str, tensor: gs.Tensor, result: str) -> Iterator[tuple[str, gs.Graph]]:
        """The options of a linear, each with a body that makes what the linear reads of ``tensor``."""
        for option, (graph, ends) in self.options.items():
            if reader in ends:
                yield option, self._body(graph, ends[reader], reader, tensor, f"{result}_{option}_")

    def _body(self, graph: gs.Graph, end: gs.Tensor, reader: str, tensor: gs.Tensor, prefix: str) -> gs.Graph:
        source, needed, pending = self.read[reader], set[int](), [end]
        while pending:
            node = edit.producer(pending.pop())
            if node is not None and id(node) not in needed:
                needed.add(id(node))
                pending += [other for other in node.inputs if other.name != source]
        copies: dict[str, gs.Tensor] = {source: gs.Variable(tensor.name, tensor.dtype), "": gs.Variable.empty()}

        def copy(old: gs.Tensor) -> gs.Tensor:
            name = f"{prefix}{old.name}"
            new = gs.Constant(name, old.values) if isinstance(old, gs.Constant) else gs.Variable(name, old.dtype)
            return copies.setdefault(old.name, new)

        nodes = []
        if offset := self.offsets.get(reader, 0.0):
            by = gs.Constant(f"{prefix}center", np.array(offset, tensor.dtype))
            moved = gs.Variable(f"{prefix}{source}", tensor.dtype)
            nodes.append(gs.Node("Add", f"{prefix}Add", inputs=[copies[source], by], outputs=[moved]))
            copies[source] = moved
        for node in (node for node in graph.nodes if id(node) in needed):
            ends = [list(map(copy, node.inputs)), list(map(copy, node.outputs))]
            nodes.append(gs.Node(node.op, f"{prefix}{node.name}", node.attrs, *ends, domain=node.domain))
        return gs.Graph(nodes, outputs=[copy(end)])


def insert_switches(graph: gs.Graph, slots: Collection[str], first: str, quantizers: Quantizers) -> Iterator[Switch]:
    """Puts a switch in the place of every pair of QuantizeLinear and DequantizeLinear, which the option ``first`` has.

    The node of a switch has a body for each option, which reads the tensor in front of the switch.
    """
    for after in [node for node in graph.nodes if node.op == "DequantizeLinear"]:
        before = edit.producer(after.inputs[0])
        if before is None or before.op != "QuantizeLinear":
            continue
        restored, tensor = after.outputs[0], before.inputs[0]
        readers = edit.consumers(restored)
        writers, carried = _writers(tensor, slots)
        apart = all(node.op in ("MatMul", "Gemm") for node in readers) and not (writers or carried)
        apart = apart or edit.dtype(before.inputs[2]) == np.int8
        for group in [[node] for node in readers] if apart else [readers]:
            result = gs.Variable(free_name(graph, f"{restored.name}_switched"), restored.dtype, restored.shape)
            owners = tuple(node.name for node in group if node.name in slots)
            bodies = {first: _pair(before, after, f"{result.name}_{first}")}
            bodies |= quantizers.of(owners[0], tensor, result.name) if apart and owners else ()
            edit.insert_after(graph, after, gs.Node(_SWITCH, result.name, bodies, [tensor], [result]))
            for node in group:
                for place in [i for i, own in enumerate(node.inputs) if own is restored]:
                    edit.set_input(node, place, result)
            yield Switch(result.name, owners if apart else (*owners, *writers), tuple(bodies), () if apart else carried)
        edit.detach(after)
        if not edit.consumers(before.outputs[0]):
            edit.detach(before)
    edit.sweep(graph)


def _pair(before: gs.Node, after: gs.Node, name: str) -> gs.Graph:
    """A body with copies of QuantizeLinear and DequantizeLinear."""
    tensor, *parameters = before.inputs[:3]
    read = gs.Variable(tensor.name, tensor.dtype)
    kept = [gs.Constant(f"{name}_{place}", parameter.values) for place, parameter in enumerate(parameters)]
    codes, result = gs.Variable(f"{name}_codes"), gs.Variable(f"{name}_result", after.outputs[0].dtype)
    nodes = [
        gs.Node("QuantizeLinear", f"{name}_Q", before.attrs, [read, *kept], [codes]),
        gs.Node("DequantizeLinear", f"{name}_DQ", after.attrs, [codes, *kept], [result]),
    ]
    return gs.Graph(nodes, outputs=[result])


def _writers(tensor: gs.Tensor, slots: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The convolution that writes a tensor, or else the switches that the operator which writes it reads."""
    writer = edit.producer(tensor)
    while writer is not None and (writer.op in _FUSED or (writer.op == "Sum" and len(writer.inputs) == 1)):
        writer = edit.producer(writer.inputs[0])
    if writer is None or operator(writer).weighted:
        return ((writer.name,) if writer and writer.name in slots and operator(writer).kind == "conv" else ()), ()
    made = map(edit.producer, writer.inputs)
    return (), tuple(node.name for node in made if node is not None and node.op == _SWITCH)


def reached(switches: Sequence[Switch], open: Set[str]) -> dict[str, Switch]:
    """The switches that the options of some nodes can change, by their results."""
    found: dict[str, Switch] = {}
    for switch in switches:
        if open & set(switch.readers) or found.keys() & set(switch.carried):
            found[switch.result] = switch
    return found


def wire(graph: onnx.GraphProto, on: Mapping[str, str], open: Mapping[str, Switch]) -> None:
    """Puts nodes of ONNX in the place of the switches."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != _SWITCH:
            nodes.append(node)
            continue
        (tensor,), (result,) = node.input, node.output
        bodies = {attribute.name: attribute.g for attribute in node.attribute}
        if result in open:
            conditions = open[result].conditions
            graph.input.extend(
                onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, ()) for name in conditions.values()
            )
            nodes.append(_selected(tensor, result, [(conditions[option], bodies[option]) for option in bodies]))
        elif on[result] == FLOAT:
            nodes.append(onnx.helper.make_node("Identity", [tensor], [result], name=result))
        else:
            body = bodies[on[result]]
            body.node[-1].output[0] = result
            graph.initializer.extend(body.initializer)
            nodes += body.node
    del graph.node[:]
    graph.node.extend(nodes)


def _selected(tensor: str, result: str, branches: Sequence[tuple[str, onnx.GraphProto]]) -> onnx.NodeProto:
    """The node that computes the body of the condition that holds, of a tensor, or else gives the tensor."""
    if not branches:
        return onnx.helper.make_node("Identity", [tensor], [result], name=result)
    ((condition, body), *others), left = branches, f"{result}_else"
    other = onnx.helper.make_graph([_selected(tensor, left, others)], "else", [], [onnx.ValueInfoProto(name=left)])
    return onnx.helper.make_node("If", [condition], [result], name=result, then_branch=body, else_branch=other)

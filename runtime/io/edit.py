"""Small questions to a graph, and the edits that keep it whole.

GraphSurgeon compares tensors and nodes by name and contents; here everything goes by identity. ``graph`` is always the
outermost graph: its nodes are in topological order, and its subgraphs (bodies of If, Loop, Scan) may read its tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.runtime.errors import UsageError, nearest
from channelfold.runtime.io.convert import all_graphs, carried
from channelfold.runtime.io.files import constant, read, stored
from channelfold.runtime.io.session import Feed

_STANDARD = (None, "", "ai.onnx")


def is_standard(node: gs.Node) -> bool:
    """Whether a node's operator is one of ONNX itself, not of a vendor's domain or a model's own functions."""
    return node.domain in _STANDARD


def is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    return any(tensor is output for output in graph.outputs)


def in_graph(graph: gs.Graph, node: gs.Node) -> bool:
    """Whether a node stands in the node list of ``graph`` itself, not in that of a subgraph."""
    if vars(node).get("_graph") is not graph:
        for member in graph.nodes:  # marked once, because looking through the list for every node takes quadratic time
            member._graph = graph
    return vars(node).get("_graph") is graph


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes a tensor; None for inputs and constants."""
    return tensor.inputs[0] if len(tensor.inputs) == 1 else None


def consumers(tensor: gs.Tensor) -> list[gs.Node]:
    """The nodes that read a tensor (nodes of subgraphs too), each once, in order."""
    return list({id(node): node for node in tensor.outputs}.values())


def sole_consumer(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """The node that reads a tensor, where one node of ``graph`` itself reads the tensor once; None otherwise."""
    if len(tensor.outputs) != 1 or is_output(graph, tensor) or not in_graph(graph, tensor.outputs[0]):
        return None
    return tensor.outputs[0]


def rank(tensor: gs.Tensor) -> int | None:
    return len(tensor.shape) if tensor.shape is not None else None


def dtype(tensor: gs.Tensor) -> np.dtype | None:
    """The numpy (or ml_dtypes) type of a tensor, None where it is unknown."""
    if isinstance(tensor.dtype, int):
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.dtype)) if tensor.dtype else None
    return np.dtype(tensor.dtype) if tensor.dtype is not None else None


def is_float(tensor: gs.Tensor) -> bool:
    """Whether weights of a tensor's type are folded (``is_float_type``). An unknown type counts as float."""
    kind = dtype(tensor)
    return kind is None or is_float_type(kind)


def is_float_type(kind: np.dtype) -> bool:
    """Whether a type is float16, bfloat16, float32 or float64. The 8-bit and smaller floats only store."""
    return kind.kind == "f" or kind == ml_dtypes.bfloat16


def value(tensor: gs.Tensor) -> np.ndarray | None:
    """The values of a constant, None for anything else. They are not kept."""
    return read(tensor) if isinstance(tensor, gs.Constant) else None


def scalar(tensor: gs.Tensor) -> float | None:
    """The value of a constant with one element, None for anything else."""
    if not isinstance(tensor, gs.Constant) or int(np.prod(tensor.shape)) != 1:
        return None
    return float(read(tensor).reshape(()))


def argument(node: gs.Node, index: int, attribute: str) -> np.ndarray | None:
    """A parameter that is an input or, in older opsets, an attribute, as a 1-d array.

    None where the parameter is missing or not constant.
    """
    found = value(node.inputs[index]) if len(node.inputs) > index else node.attrs.get(attribute)
    return None if found is None else np.asarray(found).reshape(-1)


def constant_input(node: gs.Node) -> int:
    """The position of the first constant among the inputs of a node that has one."""
    return next(i for i, tensor in enumerate(node.inputs) if isinstance(tensor, gs.Constant))


def has_input(node: gs.Node, index: int) -> bool:
    return len(node.inputs) > index and not node.inputs[index].is_empty()


def set_input(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Makes ``tensor`` the input of a node at ``index``, padding with empty inputs where there were none."""
    while len(node.inputs) <= index:
        node.inputs.append(gs.Variable.empty())
    _unlink(node.inputs[index].outputs, node)
    list.__setitem__(node.inputs, index, tensor)
    list.append(tensor.outputs, node)


def set_constant(graph: gs.Graph, node: gs.Node, index: int, values: np.ndarray, name: str) -> gs.Constant:
    """Makes ``values`` the constant input of a node at ``index``.

    The values replace those of the old constant where this node alone reads the constant. Otherwise the node gets a new
    constant, called ``name``, and the other readers keep the old constant. Raises OutputError when the disk is full.
    """
    old = node.inputs[index] if len(node.inputs) > index else None
    if old is not None and isinstance(old, gs.Constant) and len(old.outputs) == 1 and not is_output(graph, old):
        old.values = stored(graph, values, old.name)
        return old
    new = constant(graph, name, values)
    set_input(node, index, new)
    return new


def replace_uses(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    """Lets every reader of ``old`` in the graph and its subgraphs read ``new``. ``old`` must not be a graph output."""
    assert not is_output(graph, old)
    redirect(old, new)


def redirect(old: gs.Tensor, new: gs.Tensor, readers: Iterable[gs.Node] | None = None) -> None:
    """Lets readers of ``old``, by default all of them, read ``new``."""
    for node in consumers(old) if readers is None else readers:
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                set_input(node, index, new)


def see_through_identities(graph: gs.Graph) -> None:
    """Lets the readers of an Identity of a constant read the constant: exporters put one where a weight is shared."""
    for part in list(all_graphs(graph)):
        for node in [node for node in part.nodes if node.op == "Identity" and is_standard(node)]:
            source, result = node.inputs[0], node.outputs[0]
            if isinstance(source, gs.Constant) and not is_output(part, result):
                replace_uses(part, result, source)
                detach(node)
        sweep(part)


def take_defaults(graph: gs.Graph) -> list[str]:
    """Makes constants of the inputs that have default values; returns their names.

    An exporter that keeps initializers as inputs (IR version 4 and later) lets a caller override every weight, which
    nobody does. Nothing can be folded or quantized that may be overridden.
    """
    own = carried(graph)
    if own is None:
        return []
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    defaults = [proto for proto in own.graph.initializer if proto.name in inputs]
    for proto in defaults:
        tensor = inputs[proto.name]
        new = gs.Constant(proto.name, stored(graph, onnx.numpy_helper.to_array(proto), proto.name))
        _replace_input(graph, tensor, new)
        own.graph.initializer.remove(proto)
    return [proto.name for proto in defaults]


def fix_inputs(graph: gs.Graph, given: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Makes constants of inputs, of every element the value that a text says. Returns the values by name.

    Raises UsageError for an unknown input, and for a value that the type of the input does not have.
    """
    values: dict[str, np.ndarray] = {}
    for name, text in given.items():
        tensor = next((tensor for tensor in graph.inputs if tensor.name == name), None)
        if tensor is None:
            raise UsageError(f"--set names {name!r}, which is no input", nearest(name, {t.name for t in graph.inputs}))
        kind, shape = dtype(tensor), [d if isinstance(d, int) else 1 for d in tensor.shape or ()]
        try:
            number = _BOOLS[text.lower()] if kind == np.bool_ else (float if is_float(tensor) else int)(text)
            values[name] = np.full(shape, number, kind)
        except (KeyError, ValueError, TypeError, OverflowError):
            raise UsageError(f"--set gives {name!r} the value {text!r}", f"Expected a value of type {kind}") from None
        new = gs.Constant(name, stored(graph, values[name], name))
        _replace_input(graph, tensor, new)
    return values


_BOOLS = {"true": True, "1": True, "false": False, "0": False}


def _replace_input(graph: gs.Graph, tensor: gs.Tensor, new: gs.Constant) -> None:
    """Lets everything that reads an input read a constant, and takes the input away."""
    redirect(tensor, new)
    graph.outputs = [new if output is tensor else output for output in graph.outputs]
    graph.inputs = [other for other in graph.inputs if other is not tensor]


def set_output(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Makes ``tensor`` the output of a node at ``index``; nothing else may produce it."""
    _unlink(node.outputs[index].inputs, node)
    list.__setitem__(node.outputs, index, tensor)
    list.append(tensor.inputs, node)


def rewrite(node: gs.Node, op: str, inputs: list[gs.Tensor]) -> None:
    """Gives a node another operator and inputs, no attributes, and of its outputs the first alone."""
    output = node.outputs[0]
    detach(node)
    node.op, node.domain, node.attrs = op, None, {}
    if (kept := vars(node).get("carried")) is not None:
        vars(node)["carried"] = onnx.NodeProto(doc_string=kept.doc_string, metadata_props=kept.metadata_props)
    node.inputs.extend(inputs)
    node.outputs.append(output)


def notes(node: gs.Node) -> int:
    """The bytes of a node's documentation and metadata."""
    kept = vars(node).get("carried") or onnx.NodeProto()
    return onnx.NodeProto(doc_string=kept.doc_string, metadata_props=kept.metadata_props).ByteSize()


def drop_notes(node: gs.Node) -> None:
    """Removes a node's documentation and metadata."""
    if (kept := vars(node).get("carried")) is not None:
        kept.ClearField("doc_string")
        kept.ClearField("metadata_props")


def detach(node: gs.Node) -> None:
    """Removes the edges of a node and of its subgraphs. The node is then dead; ``sweep`` removes dead nodes."""
    for attribute in node.attrs.values():
        if isinstance(attribute, gs.Graph):
            for inner in attribute.nodes:
                detach(inner)
    for tensors, field in ((node.inputs, "outputs"), (node.outputs, "inputs")):
        for tensor in tensors:
            _unlink(getattr(tensor, field), node)
        list.clear(tensors)


def sweep(graph: gs.Graph) -> None:
    """Takes detached nodes out of the graph."""
    graph.nodes[:] = [node for node in graph.nodes if node.outputs]


def bypass(graph: gs.Graph, first: gs.Tensor, nodes: list[gs.Node], last: gs.Tensor) -> bool:
    """Detaches a chain of nodes that leads from ``first`` to ``last``: readers of ``last`` read ``first``.

    Names of graph outputs stay: where ``last`` is an output of the graph, the producer of ``first`` writes ``last``.
    Returns False, with nothing changed, where this would rename an input, a constant or another output of the graph.
    ``sweep`` afterwards.
    """
    source = producer(first)
    renamed = is_output(graph, last)
    if renamed and (source is None or is_output(graph, first)):
        return False
    for node in nodes:
        detach(node)
    if not renamed:
        replace_uses(graph, last, first)
        return True
    assert source is not None
    replace_uses(graph, first, last)
    set_output(source, next(i for i, t in enumerate(source.outputs) if t is first), last)
    return True


def remove_dead(graph: gs.Graph) -> list[gs.Node]:
    """Removes the nodes whose results nobody reads. Returns the removed nodes, which have no edges any more."""
    outputs = {id(tensor) for tensor in graph.outputs}
    dead = []
    for node in reversed(graph.nodes):
        if not any(t.outputs or id(t) in outputs for t in node.outputs if not t.is_empty()):
            dead.append(node)
            detach(node)
    sweep(graph)
    return dead


def insert(graph: gs.Graph, new: gs.Node, *, before: gs.Node | None = None) -> None:
    """Puts ``new`` into the node list right in front of ``before``; at the start of the list without ``before``."""
    graph.nodes.insert(0 if before is None else _position(graph, before), new)
    new._graph = graph


def insert_after(graph: gs.Graph, node: gs.Node, new: gs.Node) -> None:
    """Puts ``new`` into the node list right behind ``node``."""
    graph.nodes.insert(_position(graph, node) + 1, new)
    new._graph = graph


def _position(graph: gs.Graph, node: gs.Node) -> int:
    return next(place for place, other in enumerate(graph.nodes) if other is node)


def _unlink(nodes: list[gs.Node], node: gs.Node) -> None:
    for index, other in enumerate(nodes):
        if other is node:
            list.__delitem__(nodes, index)
            return


def alone(
    graph: gs.Graph, node: gs.Node, feed: Mapping[int, np.ndarray], kinds: Sequence[np.dtype]
) -> tuple[gs.Graph, Feed]:
    """A graph that holds a copy of one node, and the feed for this graph.

    ``feed``: the values of the node's inputs by position; the node runs without its other inputs. ``kinds``: the types
    of the first outputs, which are named ``o0``, ``o1`` …
    """
    named = {f"i{place}": np.ascontiguousarray(values) for place, values in feed.items()}
    inputs = [
        gs.Variable(f"i{place}", feed[place].dtype, feed[place].shape) if place in feed else gs.Variable.empty()
        for place in range(len(node.inputs))
    ]
    outputs = [gs.Variable(f"o{place}", kind) for place, kind in enumerate(kinds)]
    copy = gs.Node(node.op, node.name, dict(node.attrs), inputs, outputs, node.domain)
    given = [inputs[place] for place in feed]
    return gs.Graph([copy], given, outputs, opset=graph.opset, import_domains=graph.import_domains), named

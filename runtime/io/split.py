"""A model in two parts: what some of its inputs do not change, and the rest.

x ──▶ stem ──▶ rest ──▶ y            a stem runs once for all values of the inputs that the rest alone reads
                ▲
             changing
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx

from channelfold.runtime.io.names import in_order, reads
from channelfold.runtime.io.session import TensorSpec


def split(model: onnx.ModelProto, changing: Collection[str]) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The stem and the rest, which reads what the stem returns, the other inputs and those called ``changing``.

    Outputs of the model are outputs of one of the two. What the rest reads of the stem has no type yet (``typed``).
    """
    graph, changed = model.graph, set(changing)
    stem, rest = list[onnx.NodeProto](), list[onnx.NodeProto]()
    for node in (graph.node[index] for index in in_order(graph.node)):
        if changed.isdisjoint(reads(node)):
            stem.append(node)
        else:
            rest.append(node)
            changed.update(filter(None, node.output))
    made = {name for node in stem for name in node.output if name}
    between = dict.fromkeys(name for node in rest for name in reads(node) if name in made)
    ends = [output.name for output in graph.output]
    passed = [onnx.ValueInfoProto(name=name) for name in between]
    return (
        _part(model, stem, graph.input, dict.fromkeys([*between, *(name for name in ends if name in made)])),
        _part(model, rest, [*graph.input, *passed], [name for name in ends if name not in made]),
    )


def typed(rest: onnx.ModelProto, passed: Sequence[TensorSpec]) -> bool:
    """Whether a session can pass on what the stem returns. Gives the inputs of the rest their types."""
    kinds = {spec.name: spec.dtype for spec in passed}
    for value in (value for value in rest.graph.input if not value.HasField("type")):
        if (kind := kinds[value.name]) is None:
            return False
        value.type.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(kind)
    return True


def _part(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    inputs: Collection[onnx.ValueInfoProto],
    outputs: Collection[str],
) -> onnx.ModelProto:
    read = {name for node in nodes for name in reads(node)}.union(outputs)  # an output may be an input or a constant
    part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    part.graph.name = model.graph.name
    part.graph.node.extend(nodes)
    part.graph.input.extend(value for value in inputs if value.name in read)
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    part.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in read)
    sparse = (tensor for tensor in model.graph.sparse_initializer if tensor.values.name in read)
    part.graph.sparse_initializer.extend(sparse)
    return part

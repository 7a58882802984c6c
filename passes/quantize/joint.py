"""Products that make queries, keys and values at once, taken apart for TensorRT.

    y = W x   becomes   y = Concat(W_1 x, W_2 x, W_3 x),    one product for each part that later nodes take of y

TensorRT-RTX 1.7 computes a joint product in float behind its QDQ nodes where two of its parts are multiplied with each
other. It sees that a part of a Concat is one of the products, and computes these in int8, in fewer kernels: 11 for an
attention that takes 14 with the joint product, and 12 in float. The linear keeps its name, for the first of the parts.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.layers.linear import Linear
from channelfold.passes.operators import operator
from channelfold.passes.quantize.qdq import MIN_CHANNELS, Inserter
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name, read

_MOST = 4  # parts


def take_apart(inserter: Inserter, linear: Linear) -> None:
    """Makes a Concat of products of a linear whose weight is behind DequantizeLinear, if its result has parts."""
    graph, node = inserter.graph, linear.node
    parts = _parts(linear) if node.op in ("MatMul", "Gemm") and linear.weight_input == 1 else 0
    restore = edit.producer(node.inputs[1])
    if not parts or restore is None or len(restore.outputs[0].outputs) > 1:
        return
    result, width = node.outputs[0], linear.channels[0] // parts
    made = []
    for index in range(parts):
        columns = slice(index * width, (index + 1) * width)

        def part(tensor: gs.Constant, axis: int, columns: slice = columns) -> gs.Constant:
            values = np.asarray(read(tensor))
            own = values if values.size == 1 else np.moveaxis(np.moveaxis(values, axis, 0)[columns], 0, axis)
            return constant(graph, f"{tensor.name}_part", np.ascontiguousarray(own))

        axes = (restore.attrs["axis"], 0, 0)
        stored = [part(tensor, axis) for tensor, axis in zip(restore.inputs, axes, strict=True)]
        inputs = [node.inputs[0], inserter.dequantized(linear.source.name, stored, dict(restore.attrs), node)]
        inputs += [part(bias, -1) for bias in node.inputs[2:]]
        output = gs.Variable(free_name(graph, f"{result.name}_part"), result.dtype)
        made.append(gs.Node(node.op, free_name(graph, f"{node.name}_part"), dict(node.attrs), inputs, [output]))
    name = free_name(graph, f"{node.name}_Concat")
    products = [product.outputs[0] for product in made]
    first = made[0]
    for index, tensor in enumerate(list(first.inputs)):  # the node itself becomes the first part, and keeps its name
        edit.set_input(node, index, tensor)
    edit.detach(first)
    edit.set_output(node, 0, products[0])
    inserter.after(node, [*made[1:], gs.Node("Concat", name, {"axis": -1}, products, [result])])


def _parts(linear: Linear) -> int:
    """How many equal blocks of the output channels later nodes take apart; 0 where they do not."""
    tensor, outs, parts = linear.output, linear.channels[0], 0
    axis = size = edit.rank(tensor) or 0  # of the blocks, once they have an axis of their own
    while (reader := edit.sole_consumer(linear.graph, tensor)) is not None:
        if operator(reader).kind == "reshape" and not parts:
            given = edit.argument(reader, 1, "shape") if reader.op == "Reshape" else None
            shape = [] if given is None else given.tolist()
            size = len(shape)
            axis = next((place for place in range(size) if math.prod(shape[place:]) == outs), size)
            if axis == size:
                return 0
            parts = shape[axis] if axis < size - 1 else 0
        elif reader.op == "Transpose" and parts:
            axis = list(reader.attrs["perm"]).index(axis)
        else:
            break
        tensor = reader.outputs[0]
    readers = edit.consumers(tensor)
    if not parts and [reader.op for reader in readers] == ["Split"]:
        axis, parts = size - 1, _equal_outputs(readers[0])
    taken = bool(readers) and all(_axis(reader) in (axis, axis - size) for reader in readers)
    return parts if taken and 1 < parts <= _MOST and outs % parts == 0 and outs // parts >= MIN_CHANNELS else 0


def _equal_outputs(split: gs.Node) -> int:
    """The number of outputs of a Split; 0 where they differ in size."""
    sizes = edit.argument(split, 1, "split")
    return len(split.outputs) if sizes is None or len(set(sizes.tolist())) == 1 else 0


def _axis(node: gs.Node) -> int | None:
    """The axis along which a node takes a part of its input; None for any other node."""
    if node.op in ("Gather", "Split"):
        return node.attrs.get("axis", 0)
    axes = edit.argument(node, 3, "axes") if node.op == "Slice" else None
    return int(axes[0]) if axes is not None and len(axes) == 1 else None

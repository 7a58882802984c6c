"""Repairs of quantized files for TensorRT. Each returns the names of the nodes that it changed.

    activation   uint8, zero point z, scale s    becomes    int8, 0, s of x - c (see ``center``),
                                                 else       int8, 0, s max(z, 255 - z) / 127
    weight       codes q, zero point z           becomes    int8 codes of (q - z) s, exactly where these fit
    bias         DQ(b_q)                         becomes    the float constant b_q s

Where no bias can take c back, an activation keeps its range, in fewer steps where zero was not in the middle. Where the
zero point was 0 the codes ended at zero, and tools leave out a Relu in front of such a quantizer, so a Relu comes back.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.layers.formats import SCALES, positive_scale, spread
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name
from channelfold.runtime.lint.center import centered
from channelfold.runtime.lint.reading import is_quantizer, kind, linears, origin, pair, quantized, serves_product

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
_NOT_NEGATIVE = ("Relu", "Sigmoid", "Softmax", "HardSigmoid", "Exp", "Abs", "Sqrt", "ReduceL2", "ReduceSumSquare")


def float_biases(graph: gs.Graph) -> list[str]:
    done = []
    for node in [node for node in graph.nodes if is_quantizer(node, _DQ)]:
        codes, scale = edit.value(node.inputs[0]), edit.value(node.inputs[1])
        if codes is None or scale is None or codes.dtype != np.int32 or edit.is_output(graph, node.outputs[0]):
            continue
        values = spread(scale.astype(np.float64), codes.shape, node.attrs) * codes
        new = constant(graph, f"{node.name}_float", values.astype(scale.dtype))
        edit.replace_uses(graph, node.outputs[0], new)
        edit.detach(node)
        done.append(node.name)
    edit.sweep(graph)
    return done


def symmetric_activations(graph: gs.Graph) -> list[str]:
    """Makes int8 with the zero point 0 of quantized activations of any other kind."""
    made: dict[tuple[int, int], tuple[gs.Constant, gs.Constant]] = {}
    done = []
    for node in [node for node in graph.nodes if is_quantizer(node, _Q)]:
        zero = _zero(node)
        if isinstance(node.inputs[0], gs.Constant) or zero is None or not _is_asymmetric(node):
            continue
        group = pair(graph, node)
        if group is not None and not all(map(_is_asymmetric, group)):
            group = None
        if group is None:
            continue
        names = [member.name for member in group]
        if _ends_at_zero(node, zero) and not _not_negative(node.inputs[0]):
            _rectify(graph, node)
        if centered(graph, group):
            done += names
            continue
        for member in group:
            key = id(member.inputs[1]), id(member.inputs[2]) if edit.has_input(member, 2) else 0
            if key not in made:
                made[key] = _symmetric(graph, member)
            member.outputs[0].dtype = np.dtype(np.int8) if member.op == _Q else member.outputs[0].dtype
            for place, tensor in enumerate(made[key], 1):
                edit.set_input(member, place, tensor)
            member.attrs.pop("output_dtype", None) if member.op == _Q else None
        done += names
    return done


def _is_asymmetric(node: gs.Node) -> bool:
    zero = _zero(node)
    if zero is None or edit.value(node.inputs[1]) is None or str(kind(node)) not in ("uint8", "int8"):
        return False
    return kind(node) == np.uint8 or bool(np.any(zero))


def _zero(node: gs.Node) -> np.ndarray | None:
    """The zero point of a quantizer, which is 0 where none is given; None where the zero point is computed."""
    return edit.value(node.inputs[2]) if edit.has_input(node, 2) else np.zeros((), kind(node))


def _symmetric(graph: gs.Graph, node: gs.Node) -> tuple[gs.Constant, gs.Constant]:
    scale, zero = edit.value(node.inputs[1]), _zero(node)
    assert scale is not None
    assert zero is not None
    limits = np.iinfo(zero.dtype)
    middle = zero.astype(np.float64)
    reach = np.maximum(middle - limits.min, limits.max - middle) * scale.astype(np.float64)
    steps = positive_scale(reach, 127, scale.dtype if scale.dtype in SCALES else np.dtype(np.float32))
    codes = np.zeros(np.shape(zero), np.int8)
    return constant(graph, f"{node.name}_scale", steps), constant(graph, f"{node.name}_zero_point", codes)


def _not_negative(tensor: gs.Tensor) -> bool:
    """Whether a tensor is known to have no negative element."""
    node = edit.producer(origin(tensor))
    if node is None:
        return False
    if node.op in _NOT_NEGATIVE:
        return True
    if node.op == "Clip" and edit.has_input(node, 1):
        low = edit.scalar(node.inputs[1])
        return low is not None and low >= 0
    if is_quantizer(node):
        return _not_negative(node.inputs[0])
    joins = node.op in ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "ReduceMean")
    return joins and all(_not_negative(t) for t in node.inputs[: len(node.inputs) if node.op != "ReduceMean" else 1])


def _rectify(graph: gs.Graph, node: gs.Node) -> None:
    tensor = node.inputs[0]
    result = gs.Variable(free_name(graph, f"{tensor.name}_rectified"), tensor.dtype, tensor.shape)
    new = gs.Node("Relu", free_name(graph, f"{node.name}_Relu"), inputs=[tensor], outputs=[result])
    edit.insert(graph, new, before=node)
    edit.set_input(node, 0, result)


def needless_pairs(graph: gs.Graph) -> list[str]:
    """Removes the quantizers through which no product reads. A Relu that such a quantizer stood for comes back."""
    done = []
    for node in [node for node in graph.nodes if is_quantizer(node, _Q)]:
        group, zero = pair(graph, node), _zero(node)
        if group is None or zero is None or isinstance(origin(node.inputs[0]), gs.Constant) or serves_product(group):
            continue
        if any(edit.producer(member.inputs[0]) is not node for member in group[1:]):
            continue
        if _ends_at_zero(node, zero) and not _not_negative(node.inputs[0]):
            _rectify(graph, node)
        returned = [member for member in group[1:] if edit.is_output(graph, member.outputs[0])]
        if returned and (len(group) > 2 or not edit.bypass(graph, node.inputs[0], group, returned[0].outputs[0])):
            continue
        for member in group[1:] if not returned else ():
            edit.replace_uses(graph, member.outputs[0], node.inputs[0])
        for member in group:
            edit.detach(member)
        done.append(node.name)
    edit.sweep(graph)
    return done


def _ends_at_zero(node: gs.Node, zero: np.ndarray) -> bool:
    """Whether the lowest code of a QuantizeLinear stands for zero."""
    codes = kind(node)
    return codes is not None and codes.kind in "iu" and bool(np.all(zero == np.iinfo(codes.name).min))


def signed_weights(graph: gs.Graph) -> list[str]:
    """Makes int8 codes with the zero point 0 of stored weights of 8 bits."""
    done = []
    for node in [node for node in graph.nodes if is_quantizer(node, _DQ)]:
        zero, codes = _zero(node), edit.value(node.inputs[0])
        scale = edit.value(node.inputs[1])
        if codes is None or scale is None or zero is None or not _is_asymmetric(node) or node.attrs.get("block_size"):
            continue
        axis = int(node.attrs.get("axis", 1))
        whole = codes.astype(np.int32) - spread(zero.astype(np.int32), codes.shape, node.attrs)
        if whole.min(initial=0) < -128 or whole.max(initial=0) > 127:
            others = tuple(a for a in range(codes.ndim) if not scale.ndim or a != axis % codes.ndim)
            reach = np.abs(whole).max(axis=others) if scale.ndim else np.abs(whole).max()
            factor = np.maximum(np.reshape(reach, np.shape(scale)) / 127, 1e-30)
            whole = np.rint(whole / spread(factor, codes.shape, node.attrs))
            edit.set_constant(graph, node, 1, (scale * factor).astype(scale.dtype), f"{node.name}_scale")
        edit.set_input(node, 0, constant(graph, f"{node.name}_codes", whole.astype(np.int8)))
        edit.set_input(node, 2, constant(graph, f"{node.name}_zero_point", np.zeros(np.shape(scale), np.int8)))
        done.append(node.name)
    return done


def stored_codes(graph: gs.Graph) -> list[str]:
    """Stores the codes of float weights that a QuantizeLinear rounds on every call, where their zero point is not 0."""
    done = []
    for node in [node for node in graph.nodes if is_quantizer(node, _Q)]:
        values, scale, zero = edit.value(node.inputs[0]), edit.value(node.inputs[1]), _zero(node)
        if values is None or scale is None or zero is None or not _is_asymmetric(node) or node.attrs.get("block_size"):
            continue
        limits = np.iinfo(zero.dtype)
        codes = np.rint(values / spread(scale, values.shape, node.attrs)) + spread(zero, values.shape, node.attrs)
        new = constant(graph, f"{node.name}_codes", np.clip(codes, limits.min, limits.max).astype(zero.dtype))
        edit.replace_uses(graph, node.outputs[0], new)
        edit.detach(node)
        done.append(node.name)
    edit.sweep(graph)
    return done


def scalar_scales(graph: gs.Graph) -> list[str]:
    """Makes scalars of the scales and zero points of shape [1] of activations."""
    done = []
    pairs = {id(pair): pair for node in linears(graph) if (pair := quantized(node.inputs[0])) is not None}
    writers = [edit.producer(origin(pair.inputs[0])) for pair in pairs.values()]
    for node in [*pairs.values(), *(node for node in writers if node is not None and is_quantizer(node, _Q))]:
        changed = False
        for place in (1, 2):
            values = edit.value(node.inputs[place]) if edit.has_input(node, place) else None
            if values is not None and values.shape == (1,):
                new = constant(graph, f"{node.inputs[place].name}_scalar", values.reshape(()))
                edit.set_input(node, place, new)
                changed = True
        if changed:
            done.append(node.name)
    return done


def dead_channels(graph: gs.Graph) -> list[str]:
    """Gives channels of stored weights with the scale 0 the smallest scale, and the codes 0."""
    done = []
    for node in [node for node in graph.nodes if is_quantizer(node, _DQ)]:
        codes, scale = edit.value(node.inputs[0]), edit.value(node.inputs[1])
        if codes is None or scale is None or scale.dtype not in SCALES or not np.any(scale == 0):
            continue
        if node.attrs.get("block_size") or not np.all(scale >= 0) or codes.dtype.kind not in "iu":
            continue
        dead = spread(scale == 0, codes.shape, node.attrs)
        zero = spread(_zero(node), codes.shape, node.attrs)  # pyright: ignore
        edit.set_constant(graph, node, 0, np.where(dead, zero, codes).astype(codes.dtype), f"{node.name}_codes")
        smallest = np.where(scale == 0, positive_scale(0.0, 127, scale.dtype), scale)
        edit.set_constant(graph, node, 1, smallest.astype(scale.dtype), f"{node.name}_scale")
        done.append(node.name)
    return done


def transposed_codes(graph: gs.Graph) -> list[str]:
    """Transposes stored codes in place of what a DequantizeLinear makes of them."""
    done = []
    for node in [node for node in graph.nodes if node.op == "Transpose"]:
        before = edit.producer(node.inputs[0])
        if before is None or not is_quantizer(before, _DQ) or not isinstance(before.inputs[0], gs.Constant):
            continue
        if str(kind(before)) != "int8" or edit.is_output(graph, node.outputs[0]) or graph.opset < 21:
            continue
        codes = edit.value(before.inputs[0])
        assert codes is not None
        perm = list(node.attrs.get("perm", range(codes.ndim)[::-1]))
        attrs, inputs = dict(before.attrs), list(before.inputs)
        scale = edit.value(inputs[1])
        if scale is None or attrs.get("block_size"):
            continue
        if scale.size > 1:
            attrs["axis"] = perm.index(int(attrs.get("axis", 1)) % codes.ndim)
        inputs[0] = constant(graph, f"{inputs[0].name}_transposed", np.ascontiguousarray(codes.transpose(perm)))
        result = gs.Variable(
            free_name(graph, f"{node.name}_dequantized"), edit.dtype(inputs[1]), codes.transpose(perm).shape
        )
        name = free_name(graph, f"{node.name}_DequantizeLinear")
        edit.insert(graph, gs.Node(_DQ, name, attrs, inputs, [result]), before=node)
        edit.replace_uses(graph, node.outputs[0], result)
        edit.detach(node)
        done.append(node.name)
    edit.sweep(graph)
    edit.remove_dead(graph)
    return done


def constants_of_defaults(graph: gs.Graph) -> list[str]:
    return edit.take_defaults(graph)

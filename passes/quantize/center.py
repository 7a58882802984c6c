"""Centers what a quantizer for TensorRT reads, whose zero point has to be 0.

    W x + b  =  W (x - c) + (b + W c)

The range of an input that is never negative (behind ReLU, GELU, Softmax …) fills half of the 8 bits; with c in the
middle of its range the steps are half as wide. The bias of the reader takes c back exactly.

c goes where it costs no kernel of its own: into the bias of the linear in front, through a ReLU or Clip that alone
reads the linear, whose bounds move by c; or into a Sub in front of the quantizer, which TensorRT fuses with what is
elementwise there. Behind a convolution such a Sub would stand between the convolution and its quantizer, so the input
stays as it is.

Zero padding becomes padding with -c. A depthwise convolution, which loses most, gets a Pad of its own for that, which
TensorRT-RTX fuses into the quantizer (an engine of EfficientNet-Lite0 has 101 kernels with and without); others stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import DoesNotFit
from channelfold.passes.layers.linear import Linear
from channelfold.passes.quantize.qdq import Inserter, Range
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name

GAIN = 0.75  # of the width of a step, below which centering pays


def movable(sites: Iterable[Linear]) -> set[str]:
    """The names of the tensors whose readers can all take an offset back."""
    readers: dict[str, list[Linear]] = {}
    for site in sites:
        readers.setdefault(site.data.name, []).append(site)
    return {name for name, own in readers.items() if _take_back(own)}


def _take_back(sites: list[Linear]) -> bool:
    """Whether all sites have a place for a bias, and no padding that stays in them."""
    padded = [site for site in sites if site.padded]
    alone = len(sites) == 1 and sites[0].depthwise and any(_pads(sites[0]))
    return all(map(_has_place, sites)) and (not padded or alone)


def _has_place(linear: Linear) -> bool:
    return linear.node.op != "MatMul" or linear.bias_node is not None


def _pads(site: Linear) -> list[int]:
    """The padding of a Conv, in front of each axis of the kernel and behind it; empty where the node does not say."""
    return list(site.node.attrs.get("pads") or ()) if site.node.attrs.get("auto_pad", "NOTSET") == "NOTSET" else []


def center(
    inserter: Inserter, tensor: gs.Variable, seen: Range, sites: list[Linear], views: Mapping[int, Linear]
) -> gs.Variable | None:
    """The tensor x - c that ``sites`` read now instead of ``tensor``; None where x stays.

    ``views``: the linears of the graph by the id of their output.
    """
    graph, kind = inserter.graph, sites[0].dtype
    offset = seen.offset(kind)
    if not _take_back(sites) or any(_overflows(site, offset) for site in sites):
        return None
    alone = len(edit.consumers(tensor)) == len(sites) and not edit.is_output(graph, tensor)
    if alone and (writer := _lowered(graph, tensor, offset, views)):
        inserter.centered["written"][writer] = offset
        inserter.centered["read"] |= {site.name: offset for site in sites}
        return _padded(graph, tensor, offset, sites[0]) if sites[0].padded else tensor
    if any(site.is_conv for site in sites):
        return None
    moved = gs.Variable(free_name(graph, f"{tensor.name}_centered"), kind, tensor.shape)
    by = constant(graph, f"{tensor.name}_center", np.array(offset, kind))
    sub = gs.Node("Sub", free_name(graph, f"{tensor.name}_Sub"), inputs=[tensor, by], outputs=[moved])
    _put_between(graph, sub, sites)
    inserter.centered["read"] |= {site.name: offset for site in sites}
    return moved


def _padded(graph: gs.Graph, tensor: gs.Variable, offset: float, site: Linear) -> gs.Variable:
    """Takes the padding of a convolution, which stood for x = 0, into a Pad of x - c."""
    pads = _pads(site)
    begins, ends = np.split(np.array([0, 0, *pads[: len(site.kernel)], 0, 0, *pads[len(site.kernel) :]], np.int64), 2)
    result = gs.Variable(free_name(graph, f"{tensor.name}_padded"), tensor.dtype)
    wide = constant(graph, f"{tensor.name}_pads", np.concatenate([begins, ends]))
    fill = constant(graph, f"{tensor.name}_padding", np.array(-offset, site.dtype))
    name = free_name(graph, f"{tensor.name}_Pad")
    site.node.attrs["pads"] = [0] * len(pads)
    _put_between(graph, gs.Node("Pad", name, inputs=[tensor, wide, fill], outputs=[result]), [site])
    return result


def _put_between(graph: gs.Graph, node: gs.Node, sites: list[Linear]) -> None:
    """Lets ``sites`` read the result of a new node instead of its input."""
    for site in sites:
        edit.set_input(site.node, 1 - site.weight_input, node.outputs[0])
    source = edit.producer(node.inputs[0])
    if source is None:
        graph.nodes.insert(0, node)
    else:
        edit.insert_after(graph, source, node)


def _overflows(site: Linear, offset: float) -> bool:
    """Whether the bias of a site may leave its type when it takes the offset back."""
    bias = site.bias()
    largest = site.respond(np.abs(site.weight()), np.full(site.channels[1], abs(offset))).max()
    largest += 0.0 if bias is None else np.abs(bias).max()
    return bool(largest > np.finfo(site.dtype).max / 2)


def _lowered(graph: gs.Graph, tensor: gs.Variable, offset: float, views: Mapping[int, Linear]) -> str:
    """Lets ``tensor`` hold x - c by the bias of the linear that writes it, whose name is returned; "" without one."""
    node, written = edit.producer(tensor), tensor
    bounds = _bounds(node) if node is not None else None
    if node is not None and bounds is not None:
        written = node.inputs[0]
        if edit.sole_consumer(graph, written) is not node:
            return ""
    linear = views.get(id(written))
    if linear is None or not _has_place(linear):
        return ""
    bias = linear.bias()
    try:
        linear.set_bias((np.zeros(linear.channels[0]) if bias is None else bias) - offset)
    except DoesNotFit:
        return ""
    if node is not None and bounds is not None:
        node.op, node.attrs = "Clip", {}
        for index, bound in enumerate(bounds, 1):
            if np.isfinite(bound):
                moved = np.array(bound - offset, linear.dtype)
                edit.set_constant(graph, node, index, moved, f"{node.name}_bound_{index}")
    return linear.name


def _bounds(node: gs.Node) -> tuple[float, float] | None:
    """The bounds of a Relu, or of a Clip with constant bounds; None for other nodes."""
    if node.op == "Relu":
        return 0.0, np.inf
    if node.op != "Clip":
        return None
    ports = [*node.inputs[1:3], gs.Variable.empty(), gs.Variable.empty()]
    low, high = (
        usual if port.is_empty() else edit.scalar(port) for port, usual in zip(ports, (-np.inf, np.inf), strict=False)
    )
    return None if low is None or high is None else (low, high)

"""Embeddings and experts: the tables from which Gather takes rows, stored in the format of the weights.

    y = Gather(E, i)   becomes    tensorrt      y = Gather(DQ(E_q), i)
                                  onnxruntime   y = Gather(E_q, i) Gather(s, i);   in groups GatherBlockQuantized

Rows may be matrices (out, in), the weights of experts: every output channel then has a scale, E (experts, out, in) is
stored as (experts * out, in) for TensorRT, and a GatherND that takes whole rows becomes a Gather.

TensorRT fuses the first form and keeps the table as small as it is stored. ONNX Runtime would expand the whole table on
every call, so there only the rows that were taken are scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.base import Outcome
from channelfold.passes.layers.formats import SCALES, Format, all_finite
from channelfold.passes.layers.tables import table_of
from channelfold.passes.quantize import Quantize, QuantizeWeights
from channelfold.passes.quantize.qdq import MIN_CHANNELS, Inserter, excluded
from channelfold.passes.quantize.rounders import by_scale, rounded
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name, infer_shapes, read


def tables(graph: gs.Graph) -> Iterator[tuple[gs.Node, gs.Constant]]:
    """Every node that takes rows of a constant table of floating point numbers, and the table."""
    for node in graph.nodes:
        if (table := table_of(node)) is not None:
            yield node, table


def _as_gather(inserter: Inserter, node: gs.Node) -> None:
    """Makes a Gather of a GatherND that takes rows."""
    table, index = node.inputs
    axes = constant(inserter.graph, f"{index.name}_axes", np.array([-1], np.int64))
    squeezed = gs.Variable(free_name(inserter.graph, f"{index.name}_squeezed"), index.dtype)
    name = free_name(inserter.graph, f"{node.name}_Squeeze")
    inserter.before(node, [gs.Node("Squeeze", name, {}, [index, axes], [squeezed])])
    edit.rewrite(node, "Gather", [table, squeezed])


def quantize_tables(
    inserter: Inserter, outcome: Outcome, format_of: Callable[[gs.Node], Format], step: Quantize | QuantizeWeights
) -> int:
    """Stores every table in its format, refuses those that it leaves in float; returns how many nodes read one now."""
    graph, done = inserter.graph, 0
    if any(node.op == "GatherND" for node in graph.nodes):
        infer_shapes(graph)  # the shape of the index decides
    for node, table in list(tables(graph)) if step.embeddings else ():
        width, count = table.shape[-1], int(np.prod(table.shape[:-1]))
        own = format_of(node).fitted(width, whole=step.target == "tensorrt")
        odd = own.why_not(width, count) if step.target == "tensorrt" else ""
        if reason := excluded(step, node) or _why_float(table) or odd.replace("inputs", "columns"):
            outcome.refuse(node.name, f"{node.op} stays float: {reason}", reason)
            continue
        op, key = node.op, ("table", id(table), own)
        if key not in inserter.stored:
            rows = np.asarray(read(table)).reshape(-1, width)
            layer = rounded(rows, by_scale(own, np.dtype(table.dtype)), own)
            codes, scales = layer.codes, layer.scales
            if step.target != "tensorrt":
                codes, scales = codes.reshape(table.shape), scales.reshape(*table.shape[:-1], -1)
            inserter.stored[key] = inserter.constants(table.name, codes, scales if own.group else scales[..., 0])
        if op == "GatherND":
            _as_gather(inserter, node)
        if step.target == "tensorrt":
            attrs = {"axis": 1, "block_size": own.group} if own.group else {"axis": 0}
            restored = inserter.dequantized(table.name, inserter.stored[key], attrs, node)
            if len(table.shape) > 2:
                restored = _reshaped(inserter, node, restored, table)
            edit.set_input(node, 0, restored)
        elif own.group:
            _take_from_groups(node, inserter.stored[key], own.group)
        else:
            _scale_rows(inserter, node, inserter.stored[key])
        outcome.change(node.name, f"{op}: table in {own.dtype.name}")
        done += 1
    return done


def _why_float(table: gs.Constant) -> str:
    if np.dtype(table.dtype) not in SCALES:
        return f"its table is {table.dtype}, expected float32 or float16"
    if min(table.shape[-2:]) < MIN_CHANNELS:
        return f"its table has fewer than {MIN_CHANNELS} rows or columns"
    return "" if all_finite(read(table)) else "its table holds infinities or NaN"


def _reshaped(inserter: Inserter, node: gs.Node, restored: gs.Variable, table: gs.Constant) -> gs.Variable:
    """The restored rows of a table of matrices in the shape of the table, in front of the node that reads them."""
    whole = gs.Variable(free_name(inserter.graph, f"{table.name}_restored"), restored.dtype, list(table.shape))
    shape = constant(inserter.graph, f"{table.name}_shape", np.array(table.shape, np.int64))
    name = free_name(inserter.graph, f"{table.name}_Reshape")
    inserter.before(node, [gs.Node("Reshape", name, {}, [restored, shape], [whole])])
    return whole


def _take_from_groups(node: gs.Node, stored: list[gs.Constant], group: int) -> None:
    codes, scales, _ = stored
    edit.rewrite(node, "GatherBlockQuantized", [codes, node.inputs[1], scales])
    node.domain = "com.microsoft"
    node.attrs = {"gather_axis": 0, "quantize_axis": len(codes.shape) - 1, "block_size": group}


def _scale_rows(inserter: Inserter, node: gs.Node, stored: list[gs.Constant]) -> None:
    graph, (codes, scales, _) = inserter.graph, stored
    result, dtype = node.outputs[0], scales.dtype
    column = constant(graph, f"{scales.name}_column", np.asarray(read(scales))[..., None])

    def made(what: str, kind: np.dtype | None = None) -> gs.Variable:
        return gs.Variable(free_name(graph, f"{result.name}_{what}"), kind or dtype)

    taken, converted, factor = made("codes", codes.dtype), made("converted"), made("scale")
    to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    edit.set_input(node, 0, codes)
    edit.set_output(node, 0, taken)
    inserter.after(
        node,
        [
            gs.Node("Cast", free_name(graph, f"{result.name}_Cast"), {"to": to}, [taken], [converted]),
            gs.Node("Gather", free_name(graph, f"{result.name}_Gather"), {}, [column, node.inputs[1]], [factor]),
            gs.Node("Mul", free_name(graph, f"{result.name}_Mul"), {}, [converted, factor], [result]),
        ],
    )

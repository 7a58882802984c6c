"""Embeddings: the tables from which Gather takes rows, stored in the format of the weights.

    y = Gather(E, i)   becomes    tensorrt      y = Gather(DQ(E_q), i)
                                  onnxruntime   y = Gather(E_q, i) Gather(s, i);   in groups GatherBlockQuantized

TensorRT fuses the first form and keeps the table as small as it is stored. ONNX Runtime would expand the whole table on
every call, so there only the rows that were taken are scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.base import Outcome
from channelfold.passes.layers.formats import SCALES, Format
from channelfold.passes.operators import operator
from channelfold.passes.quantize import Quantize, QuantizeWeights
from channelfold.passes.quantize.qdq import MIN_CHANNELS, Inserter, excluded
from channelfold.passes.quantize.rounders import by_scale, rounded
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name, read


def tables(graph: gs.Graph) -> Iterator[tuple[gs.Node, gs.Constant]]:
    """Every Gather that takes rows of a constant table of floating point numbers, and the table."""
    for node in graph.nodes:
        if operator(node).kind != "gather" or not isinstance(node.inputs[0], gs.Constant):
            continue
        table = node.inputs[0]
        if len(table.shape) == 2 and node.attrs.get("axis", 0) in (0, -2) and edit.is_float_type(table.dtype):
            yield node, table


def quantize_tables(
    inserter: Inserter, outcome: Outcome, format_of: Callable[[gs.Node], Format], step: Quantize | QuantizeWeights
) -> int:
    """Stores every table in its format, refuses those that it leaves in float; returns how many nodes read one now."""
    graph, done = inserter.graph, 0
    for node, table in list(tables(graph)) if step.embeddings else ():
        own = format_of(node).fitted(table.shape[1], whole=step.target == "tensorrt")
        odd = own.why_not(table.shape[1], table.shape[0]) if step.target == "tensorrt" else ""
        if reason := excluded(step, node) or _why_float(table) or odd.replace("inputs", "columns"):
            outcome.refuse(node.name, f"{node.op} stays float: {reason}", reason)
            continue
        key = ("table", id(table), own)
        if key not in inserter.stored:
            codes, scales = rounded(read(table), by_scale(own, np.dtype(table.dtype)), own)
            inserter.stored[key] = inserter.constants(table.name, codes, scales if own.group else scales[:, 0])
        if step.target == "tensorrt":
            attrs = {"axis": 1, "block_size": own.group} if own.group else {"axis": 0}
            edit.set_input(node, 0, inserter.dequantized(table.name, inserter.stored[key], attrs, node))
        elif own.group:
            _take_from_groups(node, inserter.stored[key], own.group)
        else:
            _scale_rows(inserter, node, inserter.stored[key])
        outcome.change(node.name, f"{node.op}: table in {own.dtype.name}")
        done += 1
    return done


def _why_float(table: gs.Constant) -> str:
    if np.dtype(table.dtype) not in SCALES:
        return f"its table is {table.dtype}, expected float32 or float16"
    if min(table.shape) < MIN_CHANNELS:
        return f"its table has fewer than {MIN_CHANNELS} rows or columns"
    return "" if np.isfinite(read(table)).all() else "its table holds infinities or NaN"


def _take_from_groups(node: gs.Node, stored: list[gs.Constant], group: int) -> None:
    codes, scales, _ = stored
    edit.rewrite(node, "GatherBlockQuantized", [codes, node.inputs[1], scales])
    node.domain = "com.microsoft"
    node.attrs = {"gather_axis": 0, "quantize_axis": 1, "block_size": group}


def _scale_rows(inserter: Inserter, node: gs.Node, stored: list[gs.Constant]) -> None:
    graph, (codes, scales, _) = inserter.graph, stored
    result, dtype = node.outputs[0], scales.dtype
    column = constant(graph, f"{scales.name}_column", np.asarray(read(scales))[:, None])

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

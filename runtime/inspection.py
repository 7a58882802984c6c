"""What is in a graph: its linear nodes with their shapes and costs, its norms, its parameters, what cannot be int8."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from channelfold.passes import edit
from channelfold.passes.base import Outcome, no_progress
from channelfold.passes.linear import LINEAR_OPS, Linear, NotLinear, linears, view
from channelfold.passes.quantize import Quantize
from channelfold.runtime import report, wire
from channelfold.runtime.calibration import Data
from channelfold.runtime.graph_io import all_graphs, infer_shapes
from channelfold.runtime.names import shorten_all
from channelfold.runtime.ort import TensorSpec
from channelfold.runtime.statistics import ChannelStatistics, observe, outlier_ratio
from channelfold.runtime.weights import MappedFile


def required_inputs(graph: gs.Graph) -> tuple[TensorSpec, ...]:
    """The inputs that a feed must have, as ONNX Runtime would describe them, without opening a session."""
    carried = vars(graph).get("carried")
    defaults = {tensor.name for tensor in carried.graph.initializer} if carried else set()
    return tuple(spec for spec in map(_spec, graph.inputs) if spec.name not in defaults)


def model_facts(path: Path, graph: gs.Graph) -> dict[str, Any]:
    """The ``model`` entry of a report record; ``bytes`` counts the file and its external data."""
    counts = Counter(node.op for part in all_graphs(graph) for node in part.nodes)
    return {
        "path": str(path),
        "bytes": path.stat().st_size + sum(file.stat().st_size for file in external_files(path)),
        "nodes": sum(counts.values()),
        "ops": dict(counts.most_common()),
        "opset": graph.opset,
    }


def external_files(path: Path) -> list[Path]:
    """The files beside a (readable) model that hold its weights."""
    graph = onnx.ModelProto.FromString(wire.skeleton(MappedFile(path).data, path.name)).graph
    names = {e.value for tensor in graph.initializer for e in tensor.external_data if e.key == "location"}
    return [path.parent / name for name in sorted(names - {path.name})]


def int8_nodes(graph: gs.Graph) -> list[str]:
    """The linear nodes that a file asks to be run as int8: both operands come through an int8 DequantizeLinear."""
    return [
        node.name
        for part in all_graphs(graph)
        for node in part.nodes
        if node.op in LINEAR_OPS and all(_is_dequantized(tensor) for tensor in node.inputs[:2])
    ]


def _is_dequantized(tensor: gs.Tensor) -> bool:
    node = edit.producer(tensor)
    zero_point = node.inputs[2] if node is not None and len(node.inputs) > 2 else None
    return node is not None and node.op == "DequantizeLinear" and zero_point is not None and zero_point.dtype == np.int8


def inspect(
    path: Path,
    graph: gs.Graph,
    data: Data | None = None,
    progress: Callable[[str, int, int], None] = no_progress,
) -> dict[str, Any]:
    """The ``inspection`` entry of a report record.

    ``linears``: one entry a Conv, ConvTranspose, Gemm or MatMul, with ``shape`` (out, in / groups, *kernel), ``macs``
    for one sample (a symbolic first dimension counts as 1; None when a shape is unknown), and ``reason`` when the pass
    ``quantize`` would leave it in float. With ``data`` they have ``outlier_ratio``, of the channels of their input: the
    largest magnitude against the median one; None for a product of two activations. ``parameters`` counts the elements
    of constants that are not int32, int64, bool or strings. Fills in the shapes of ``graph``.
    """
    infer_shapes(graph)
    refused = Outcome()
    quantizable = {id(site.node) for site in Quantize()._sites(graph, refused)}
    reasons = {refusal.node: refusal.code or refusal.reason for refusal in refused.refused}
    entries: list[dict[str, Any]] = [
        {**_linear(graph, node), "quantizable": id(node) in quantizable, "reason": reasons.get(node.name, "")}
        for node in graph.nodes
        if node.op in LINEAR_OPS
    ]
    if data is not None:
        ratios = _outlier_ratios(graph, data, progress)
        entries = [entry | {"outlier_ratio": ratios.get(entry["node"])} for entry in entries]
    norms = Counter(n.op for part in all_graphs(graph) for n in part.nodes if n.op.endswith("Normalization"))
    return {
        "inputs": [str(_spec(tensor)) for tensor in graph.inputs],
        "outputs": [str(_spec(tensor)) for tensor in graph.outputs],
        **costs(graph),
        "norms": dict(norms),
        "external_data": [{"path": str(f), "bytes": f.stat().st_size} for f in external_files(path)],
        "linears": entries,
    }


def costs(graph: gs.Graph) -> dict[str, int | None]:
    """``parameters`` and ``macs`` of a graph, as ``inspect`` counts them. Fills in its shapes."""
    infer_shapes(graph)
    macs = [_linear(graph, node)["macs"] for node in graph.nodes if node.op in LINEAR_OPS]
    return {
        "parameters": sum(_elements(c.shape) or 0 for c in _constants(graph) if _is_parameter(c)),
        "macs": sum(macs) if None not in macs else None,
    }


def _outlier_ratios(graph: gs.Graph, data: Data, progress: Callable[[str, int, int], None]) -> dict[str, float | None]:
    """``outlier_ratio`` of what each linear node reads, by the node's name."""
    found = [linear for linear in linears(graph) if isinstance(linear.data, gs.Variable)]
    seen: dict[str, _ByAxis] = {}
    for linear in found:
        seen.setdefault(linear.data.name, _ByAxis()).axes[linear.in_axis] = ChannelStatistics(linear.in_axis)
    observe(graph, seen, data, progress)
    reached = [(linear.name, seen[linear.data.name].axes[linear.in_axis]) for linear in found]
    return {name: outlier_ratio(statistics.amax) for name, statistics in reached if statistics.positions}


@dataclass(frozen=True)
class _ByAxis:
    """Shows a tensor to statistics of each axis that some linear node reads it along."""

    axes: dict[int, ChannelStatistics] = field(default_factory=dict)

    def add(self, values: np.ndarray) -> None:
        for statistics in self.axes.values():
            statistics.add(values)


def render(record: Mapping[str, Any], console: Console) -> None:
    """Prints the record of ``jobs.inspect``: the model, then every linear node."""
    report.render(record, console)
    found = record["inspection"]
    linears = found["linears"]
    facts = Table.grid(padding=(0, 2))
    for label, lines in (
        ("inputs", found["inputs"]),
        ("outputs", found["outputs"]),
        ("parameters", [_count(found["parameters"])]),
        ("MACs per sample", [_count(found["macs"])]),
        ("norms", [f"{count} {op}" for op, count in found["norms"].items()]),
        ("external data", [f"{Path(f['path']).name}, {f['bytes']:,} bytes" for f in found["external_data"]]),
        ("could be int8", [f"{sum(linear['quantizable'] for linear in linears)} of {len(linears)} linear nodes"]),
    ):
        for index, line in enumerate(lines):
            facts.add_row(Text(f"  {label}" if index == 0 else ""), Text(line))
    console.print()
    console.print(facts, highlight=False)
    if linears:
        console.print()
        console.print(_linears_table(linears, console.width), highlight=False)
        if "outlier_ratio" in linears[0]:
            words = "  outliers: the largest channel of what a node reads, against the median channel"
            console.print(Text(words, "dim"), highlight=False)
    if "ffns" in record:
        from channelfold.runtime import idle  # which needs this module

        idle.render(record["ffns"], console)
    if "groups" in record:
        from channelfold.runtime import groups  # which needs this module

        groups.render_groups(record["groups"], console)
    reasons = Counter(linear["reason"] for linear in linears if not linear["quantizable"])
    if reasons:
        console.print()
    for reason, count in reasons.most_common():
        console.print(Text.assemble((f"  {count} x ", "bold"), "not int8: ", reason), highlight=False)


def _linears_table(linears: Sequence[Mapping[str, Any]], width: int) -> Table:
    columns = {
        "op": [linear["op"] for linear in linears],
        "weight": ["x".join(map(str, linear["shape"] or ())) for linear in linears],
        "groups": [str(linear["groups"]) if linear["groups"] != 1 else "" for linear in linears],
        "params": [_count(linear["parameters"]) if linear["shape"] else "" for linear in linears],
        "MACs": [_count(linear["macs"]) for linear in linears],
        "outliers": [report.ratio(linear.get("outlier_ratio")) for linear in linears],
        "int8": ["yes" if linear["quantizable"] else "no" for linear in linears],
    }
    columns = {heading: cells for heading, cells in columns.items() if set(cells) - {"", report.UNKNOWN}}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(Text("Linear nodes", "bold not dim"), no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="left" if heading in ("op", "weight", "int8") else "right", no_wrap=True)
    taken = sum(max(map(len, (heading, *cells))) + 2 for heading, cells in columns.items())
    names = shorten_all([linear["node"] for linear in linears], max(20, width - taken - 4))
    for name, *cells, int8 in zip(names, *columns.values(), strict=True):
        table.add_row(Text(f"  {name}"), *cells, Text(int8, "green" if int8 == "yes" else "yellow"))
    return table


def _count(number: int | None) -> str:
    """``1.40 M`` for 1398912; a dash for what is not known."""
    if number is None:
        return report.UNKNOWN
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return str(number)


def _linear(graph: gs.Graph, node: gs.Node) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "node": node.name,
        "op": node.op,
        "shape": None,
        "groups": 1,
        "parameters": 0,
        "macs": None,
    }
    try:
        linear = view(graph, node)
    except NotLinear:
        return entry | {"macs": _product_macs(node)}
    outs, ins = linear.channels
    shape = [outs, ins // linear.groups, *linear.kernel]
    bias = 0 if linear.bias() is None else outs
    return entry | {
        "shape": shape,
        "groups": linear.groups,
        "parameters": math.prod(shape) + bias,
        "macs": _macs(linear, math.prod(shape)),
    }


def _macs(linear: Linear, weights: int) -> int | None:
    """Every weight is used once for each position: of the output, or of the input for a ConvTranspose."""
    tensor, channels = linear.node.outputs[0], linear.channels[0]
    if linear.node.op == "ConvTranspose":
        tensor, channels = linear.data, linear.channels[1]
    positions = _elements(tensor.shape)
    return None if positions is None else positions // channels * weights


def _product_macs(node: gs.Node) -> int | None:
    """Of a MatMul of two activations: the elements of its output, each a sum over the left operand's last axis."""
    outputs, left = _elements(node.outputs[0].shape), node.inputs[0].shape
    if node.op != "MatMul" or outputs is None or not left or not isinstance(left[-1], int):
        return None
    return outputs * left[-1]


def _elements(shape: Any) -> int | None:
    """How many elements a shape has, a symbolic first dimension counted as 1; None when it is not known."""
    if shape is None:
        return None
    dims = [1 if axis == 0 and not isinstance(dim, int | np.integer) else dim for axis, dim in enumerate(shape)]
    return math.prod(int(d) for d in dims) if all(isinstance(d, int | np.integer) for d in dims) else None


def _constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    found = {id(t): t for part in all_graphs(graph) for t in part.tensors().values() if isinstance(t, gs.Constant)}
    yield from found.values()


def _is_parameter(constant: gs.Constant) -> bool:
    return str(constant.dtype) not in ("int32", "int64", "bool", "object")


def _spec(tensor: Any) -> TensorSpec:
    dtype = tensor.dtype if isinstance(tensor.dtype, np.dtype) and tensor.dtype.kind != "V" else None
    return TensorSpec(tensor.name, dtype, tuple(tensor.shape or ()))

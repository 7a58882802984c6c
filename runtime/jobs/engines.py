"""The record of an engine: how its nodes run, its kernels, what they compute and move, and bounds of its time.

``cost``: {kernels, quantizing: kernels that only quantize or dequantize, unmeasured: kernels of unknown sizes, macs:
{type: count}, constants, traffic: bytes in all, activations: {type: bytes}, modelled: [{card, least, most: seconds}]};
``kernels``: [{name, nodes, arithmetic, macs, traffic}]. Both are empty where the plan does not tell. ``float``: of an
int8 model, the cost of an engine of the model as it was given.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_graphsurgeon as gs

from channelfold.runtime.engine.build import Engine, ShapeRange
from channelfold.runtime.engine.kernels import Kernel
from channelfold.runtime.engine.plan import PlanReport
from channelfold.runtime.engine.repair import plan_of
from channelfold.runtime.engine.roofline import bounds, cards
from channelfold.runtime.errors import BuildError
from channelfold.runtime.io import edit, files
from channelfold.runtime.io.convert import all_graphs
from channelfold.runtime.jobs.inspect_model import int8_nodes
from channelfold.runtime.lint import lint
from channelfold.runtime.lint.rules import RULES
from channelfold.runtime.report import advice

if TYPE_CHECKING:
    from channelfold.runtime.jobs.job import Job

_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_BETWEEN = 4  # nodes at most from a product back to what quantizes its operands


def entry(engine: Engine, graph: gs.Graph) -> dict[str, Any]:
    """The record of an engine of a graph."""
    return {
        "sm": engine.sm,
        "path": engine.path,
        "bytes": engine.size,
        "seconds": engine.seconds,
        "backend": f"{engine.backend} {engine.version}",
        **told(engine.plan, graph, engine.sm),
    }


def weigh(job: Job, shapes: Mapping[str, ShapeRange]) -> None:
    """Compares every engine of an int8 model with one of the given model; warns where int8 may be slower."""
    graph = files.load(job.model) if job.record["engines"] else gs.Graph()
    for engine in job.record["engines"]:
        if not engine["plan"]["int8"] or not engine["cost"]:
            continue
        with contextlib.suppress(BuildError):  # it may be that only the quantized model runs on this GPU
            report = plan_of(graph, engine["sm"], job.calibration, job.progress, shapes)
            engine["float"] = told(report, graph, engine["sm"])["cost"]
        if slower := advice.slower(engine):
            job.warn(slower)
            job.record["next"] = list(dict.fromkeys([*job.record.get("next", ()), *advice.lighter(job.record)]))


def told(report: PlanReport, graph: gs.Graph, sm: int | None) -> dict[str, Any]:
    """What the plan of an engine tells of the nodes of a graph. ``total`` counts those that are int8 in the file."""
    runs = {node: report.nodes[node].arithmetic for node in int8_nodes(graph) if node in report.nodes}
    others = {node: runs_as for node, runs_as in runs.items() if runs_as != "int8"}
    reasons = _reasons(graph, others, sm) if others else {}
    verdicts = {node: run.verdict for node, run in report.nodes.items()}
    quantizers = {node.name for part in all_graphs(graph) for node in part.nodes if node.op in _QUANTIZERS}
    return {
        "verdicts": dict(sorted(Counter(verdicts.values()).items())),
        "dequantized_first": [node for node, verdict in verdicts.items() if verdict == "dequantized first"],
        "plan": {
            "readable": report.readable,
            "reason": report.reason,
            "int8": len(runs) - len(others),
            "total": len(runs),
            "not_int8": [{"node": n, "runs_as": as_, "because": reasons.get(n, "")} for n, as_ in others.items()],
            "nodes": [
                {"node": node, "runs_as": run.verdict, "kernel": run.op, "operands": list(run.operands)}
                for node, run in report.nodes.items()
            ],
        },
        "cost": _cost(report.kernels, quantizers, sm) if report.kernels else {},
        "kernels": [
            {"name": k.name, "nodes": list(k.nodes), "arithmetic": k.arithmetic, "macs": k.macs, "traffic": k.traffic}
            for k in report.kernels
        ],
    }


def _cost(kernels: Sequence[Kernel], quantizers: set[str], sm: int | None) -> dict[str, Any]:
    data = [one for kernel in kernels for one in kernel.data]
    modelled = [(card, bounds(kernels, card)) for card in cards(sm)]
    return {
        "kernels": len(kernels),
        "quantizing": sum(bool(kernel.nodes) and set(kernel.nodes) <= quantizers for kernel in kernels),
        "unmeasured": sum(not kernel.measured for kernel in kernels),
        "macs": _sums((kernel.arithmetic, kernel.macs) for kernel in kernels if kernel.macs),
        "constants": sum(one.bytes for one in data if one.constant),
        "traffic": sum(one.bytes for one in data),
        "activations": _sums((one.type, one.bytes) for one in data if not one.constant),
        "modelled": [{"card": card.name, "least": found.least, "most": found.most} for card, found in modelled],
    }


def _sums(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The sums by key, the largest first."""
    found: dict[str, int] = {}
    for key, count in pairs:
        found[key] = found.get(key, 0) + count
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _reasons(graph: gs.Graph, nodes: Iterable[str], sm: int | None) -> dict[str, str]:
    """The rules of TensorRT that nodes, or what quantizes their operands, break."""
    broken: dict[str, list[str]] = {}
    for finding in lint(graph, RULES, "tensorrt", sm):
        broken.setdefault(finding.node, []).append(finding.rule.checks)
    by_name = {node.name: node for part in all_graphs(graph) for node in part.nodes}
    return {name: _reason(by_name[name], broken) for name in nodes}


def _reason(node: gs.Node, broken: Mapping[str, Sequence[str]]) -> str:
    near, found = [node], [node]
    for _ in range(_BETWEEN):
        before = [edit.producer(tensor) for one in near for tensor in one.inputs[:2]]
        near = [one for one in before if one is not None and (one.op in _QUANTIZERS or len(one.inputs) == 1)]
        found += near
    return " ".join(dict.fromkeys(rule for one in found for rule in broken.get(one.name, ())))

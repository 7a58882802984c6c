"""The explanation of a comparison: which nodes the error comes from, and which to leave in float."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context
from channelfold.passes.fold import InlineFunctions
from channelfold.passes.operators import OPERATORS
from channelfold.runtime.data.sources import Data
from channelfold.runtime.explain.attribute import Explainer, Explanation, Site, decibels
from channelfold.runtime.explain.cut import WEIGHTED
from channelfold.runtime.explain.model import Model
from channelfold.runtime.io import edit, files
from channelfold.runtime.jobs.job import Progress
from channelfold.runtime.lint.unfuse import unfuse
from channelfold.runtime.stats.compare import json_number

_WORTH = 1.0  # dB that the advice recovers at least
_SEEN_THROUGH = {op for (_, op), row in OPERATORS.items() if row.moves} | {
    "QuantizeLinear", "DequantizeLinear", "MaxPool", "Pad",
}  # fmt: skip


def explain(a: Path, b: Path, data: Data, progress: Progress) -> dict[str, Any]:
    """The ``explanation`` entry of a record: see ``report.terminal``. Raises ModelError where a part does not run."""
    second = _opened(b)
    found = Explainer(_opened(a), second, data, progress).explain()
    total = sum(found.contributions.values()) or 1.0
    sites = [_site(site, found, total, second) for site in found.sites if found.contributions[site.pair.second] > 0]
    return {
        "samples": found.samples,
        "aligned": found.aligned,
        "linears": found.linears,
        "covered": found.covered,
        "snr": _snr(found.total),
        "sites": sites,
        "restored": [{"sites": count, "snr": _snr(error)} for count, error in found.restored.items()],
        "depth": [{"node": node, "snr": _snr(error)} for node, error in found.depth],
        "advice": _advice(a, found, sites),
    }


def _opened(path: Path) -> Model:
    graph: gs.Graph = files.load(path)
    edit.take_defaults(graph)
    edit.see_through_identities(graph)
    InlineFunctions().apply(graph, Context())
    unfuse(graph)
    return Model(graph)


def _snr(relative: float) -> float | str | None:
    return json_number(decibels(relative))


def _site(site: Site, found: Explanation, total: float, second: Model) -> dict[str, Any]:
    contribution = found.contributions[site.pair.second]
    return {
        "node": site.node,
        "op": site.op,
        "tensor": site.pair.second,
        "original": site.pair.first,
        "nodes": site.nodes,
        "snr": _snr(contribution),
        "share": contribution / total if math.isfinite(total) else None,
        "own_snr": _snr(site.errors.own),
        "so_far_snr": _snr(site.errors.so_far),
        "products": _products(site, second),
        "served": _served(site, second),
    }


def _products(site: Site, second: Model) -> list[str]:
    """The products of a site; of a site without any, those that read its result."""
    own = [node.name for node in second.nodes if node.name in site.nodes and node.op_type in WEIGHTED]
    return own or [node.name for node in _readers(site.pair.second, second) if node.op_type in WEIGHTED]


def _readers(tensor: str, second: Model) -> Iterator[onnx.NodeProto]:
    """The nodes that read a tensor, seen through quantizers and what only moves elements."""
    pending, seen = [tensor], {tensor}
    while pending:
        for index in second.readers.get(pending.pop(), ()):
            node = second.nodes[index]
            if node.op_type not in _SEEN_THROUGH:
                yield node
                continue
            pending += [name for name in node.output if name not in seen]
            seen.update(node.output)


def _served(site: Site, second: Model) -> list[str]:
    """The nodes in front of the quantizers of a site, and those behind: some tools quantize a tensor for either."""
    found = []
    for node in second.nodes:
        if node.name in site.nodes and node.op_type == "QuantizeLinear":
            writer = second.writers.get(node.input[0])
            found += [second.nodes[writer]] if writer is not None else []
            found += _readers(node.output[0], second)
    return list(dict.fromkeys(node.name for node in found if node.op_type not in _SEEN_THROUGH))


def _advice(a: Path, found: Explanation, sites: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The sites whose restoring pays most for their number; None where no few of them recover much."""
    if not math.isfinite(found.total) or found.total <= 0:
        return None
    gains = {count: decibels(error) - decibels(found.total) for count, error in found.restored.items()}
    few = {count: gain for count, gain in gains.items() if gain >= _WORTH and count <= max(len(sites) // 4, 1)}
    if not few:
        return None
    count = max(few, key=lambda count: min(few[count], 100.0) / math.sqrt(count))
    chosen = sites[:count]
    products = list(dict.fromkeys(name for site in chosen for name in site["products"]))
    others = (name for site in chosen for name in site["served"] or ([] if site["products"] else [site["node"]]))
    names = list(dict.fromkeys([*products, *others]))
    patterns = [f"--exclude {shlex.quote(name.replace('[', '[[]'))}" for name in products]
    command = f"channelfold quantize {shlex.quote(str(a))} -o OUT --calibration DATA {' '.join(patterns)}"
    return {
        "sites": count,
        "nodes": names,
        "gain": json_number(few[count]),
        "command": command if all(site["products"] for site in chosen) else "",
    }

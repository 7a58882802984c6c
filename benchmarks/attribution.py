"""Whether ``diff --explain`` names the node that was damaged: faults planted in quantized models, one at a time.

    python benchmarks/attribution.py [--dir DIR] [--json FILE] [--write]

A model is quantized with default settings. Then one quantizer or weight of one linear layer is damaged, and both files
are explained on calibration data. The rank is that of the first site in the list that holds the damaged node.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from harness import add_results, keep, known, parser, table, write

from channelfold import models
from channelfold.runtime import jobs
from channelfold.runtime.data.sources import open_data
from channelfold.runtime.explain.attribute import Explainer, Explanation
from channelfold.runtime.explain.model import Model
from channelfold.runtime.io import edit
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.files import load
from channelfold.runtime.lint.reading import Weight, quantized, weights

SHIPPED = ("digits_cnn", "digits_vit", "digits_repavit", "digits_repavit_ln")
OPEN_SET = ("crepe_tiny", "magika")
PLACES = 10  # of a model
SAMPLES = 32  # for the ranges


def wrong_scale(graph: gs.Graph, site: Weight) -> gs.Node:
    """Every other channel of the weight is restored half as large again."""
    return _changed(graph, site.node, 1, lambda scale: scale * np.where(np.arange(scale.size) % 2, 1.5, 1.0))


def swapped_axis(graph: gs.Graph, site: Weight) -> gs.Node:
    """The scales belong to other channels."""
    return _changed(graph, site.node, 1, lambda scale: np.roll(scale, scale.size // 2))


def clipped_range(graph: gs.Graph, site: Weight) -> gs.Node:
    """The activation is clipped to an eighth of its range."""
    restore = quantized(site.activation)
    assert restore is not None
    first = edit.producer(restore.inputs[0])
    assert first is not None
    _changed(graph, first, 1, lambda scale: scale / 8)
    return _changed(graph, restore, 1, lambda scale: scale / 8)


def zeroed_channel(graph: gs.Graph, site: Weight) -> gs.Node:
    """The output channels with the largest weights are lost, one in eight."""

    def zero(codes: np.ndarray) -> np.ndarray:
        axis = site.out_axis or 0
        size = np.abs(codes.astype(np.float32)).sum(axis=tuple(a for a in range(codes.ndim) if a != axis))
        lost = np.argsort(-size)[: max(len(size) // 8, 1)]
        kept = np.moveaxis(codes.copy(), axis, 0)
        kept[lost] = 0
        return np.moveaxis(kept, 0, axis)

    return _changed(graph, site.node, 0, zero)


def wrong_zero_point(graph: gs.Graph, site: Weight) -> gs.Node:
    """The activation is restored around another zero."""
    restore = quantized(site.activation)
    assert restore is not None
    return _changed(graph, restore, 2, lambda zero: zero + 25)


def transposed_weight(graph: gs.Graph, site: Weight) -> gs.Node:
    """The codes stand in the order of the transposed weight."""
    return _changed(graph, site.node, 0, lambda codes: codes.T.reshape(codes.shape))


FAULTS: tuple[Callable[[gs.Graph, Weight], gs.Node], ...] = (
    wrong_scale, swapped_axis, clipped_range, zeroed_channel, wrong_zero_point, transposed_weight,
)  # fmt: skip


def _changed(graph: gs.Graph, node: gs.Node, place: int, change: Callable[[np.ndarray], np.ndarray]) -> gs.Node:
    old = edit.value(node.inputs[place])
    assert old is not None
    edit.set_input(node, place, gs.Constant(f"{node.name}_damaged_{place}", np.asarray(change(old), old.dtype)))
    return node


def planted(path: Path, places: int) -> Iterator[tuple[str, gs.Graph, str]]:
    """(fault, damaged graph, damaged node) for layers that lie apart in a quantized model, each fault in turn."""
    names = [site.reader.name for site in _layers(load(path))]
    chosen = [names[i] for i in np.linspace(0, len(names) - 1, min(places, len(names))).astype(int)]
    for number in range(places):
        name, graph = chosen[number % len(chosen)], load(path)
        fault = FAULTS[(number % len(chosen) + number // len(chosen)) % len(FAULTS)]
        site = next(site for site in _layers(graph) if site.reader.name == name)
        yield fault.__name__.replace("_", " "), graph, fault(graph, site).name


def _layers(graph: gs.Graph) -> list[Weight]:
    return [site for site in weights(graph) if quantized(site.activation) is not None]


def explain(model: Path, damaged: gs.Graph, data: Any) -> Explanation:
    graph = load(model)
    return Explainer(Model(graph), Model(damaged), open_data(data, required_inputs(graph))).explain()


def rank(found: Explanation, node: str) -> int:
    """The place in the list of the first site that holds the node; from 1."""
    return next((place for place, site in enumerate(found.sites, 1) if node in site.nodes), 0)


def main() -> None:
    made = parser(__doc__)
    add_results(made, "attribution.md")
    options = made.parse_args()
    rows = known(options.json)
    subjects = {name: (models.path(f"{name}.onnx"), models.path("digits_calibration.npz")) for name in SHIPPED}
    subjects |= {n: (options.dir / f"open/{n}.onnx", options.dir / f"calibration/{n}.npz") for n in OPEN_SET}
    for name, (model, data) in subjects.items():
        if name in rows or not (Path(model).exists() and Path(data).exists()):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            quantized_file = Path(scratch, "int8.onnx")
            jobs.quantize(model, quantized_file, source=jobs.Source(str(data)))
            rows[name] = {
                f"{fault} at {node}": rank(explain(Path(model), graph, str(data)), node)
                for fault, graph, node in planted(quantized_file, PLACES)
            }
        keep(options.json, rows)
        print(f"{name} done", file=sys.stderr)
    text = report(rows)
    print(text)
    if options.write:
        write("attribution.md", "# Planted faults that diff --explain names", text)


def report(rows: dict[str, dict[str, int]]) -> str:
    lines = []
    for name, ranks in [*rows.items(), ("all", {f"{n} {k}": v for n, found in rows.items() for k, v in found.items()})]:
        first, third = (sum(0 < rank <= limit for rank in ranks.values()) for limit in (1, 3))
        others = ", ".join(f"{rank} ({fault})" for fault, rank in ranks.items() if rank != 1) if name != "all" else ""
        lines.append((name, str(len(ranks)), str(first), str(third), others))
    return table(("model", "faults", "named first", "in the first three", "ranks of the others"), lines)


if __name__ == "__main__":
    main()

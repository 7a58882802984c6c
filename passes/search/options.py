"""What a search chooses from: the options of every node, made by the passes themselves, and the recipe of a choice.

float     as it is
int8      quantize          weights by channel and activations in 8 bits
w8, w4    quantize-weights  weights alone: int8 by channel, int4 in groups
"""

from __future__ import annotations

import dataclasses
import glob
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from channelfold.passes import PASSES
from channelfold.passes.base import Context, Pass
from channelfold.passes.layers.linear import linears
from channelfold.passes.layers.sensitivity import Site
from channelfold.passes.layers.switchboard import FLOAT, Board, Configuration, build
from channelfold.passes.operators import operator
from channelfold.passes.options import options as options_of
from channelfold.passes.recipe import QUANTIZATIONS, make
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io.convert import all_graphs
from channelfold.runtime.io.files import raise_opset
from channelfold.runtime.io.session import Feed
from channelfold.runtime.io.shapes import measured_shapes
from channelfold.runtime.io.snapshot import Snapshot

_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("quantize", {"embeddings": False, "min_activation_snr": 0.0}),
    "w8": ("quantize-weights", {"weights": "int8"}),
    "w4": ("quantize-weights", {"weights": "int4"}),
}
ACTING = ("int8",)
LAST = "cast"  # what stays float gets another type
_BITS = 8 / 32  # arithmetic of int8 against float


def in_front(passes: Sequence[Pass]) -> list[Pass]:
    """The passes of a recipe that a search keeps in front of its own; ``LAST`` stays behind them."""
    return [step for step in passes if step.name not in (*QUANTIZATIONS, LAST)]


def steps(given: Mapping[str, Any]) -> dict[str, Pass]:
    """The pass of every option. ``given``: options of passes, each set where a pass has it."""
    if given.get("float_share"):
        raise UsageError("A share of float nodes was given, and the search chooses the nodes", "Give one of the two")
    found = {}
    for option, (name, own) in OPTIONS.items():
        settings = {key: value for key, value in given.items() if key in options_of(PASSES[name]) and key not in own}
        found[option] = make(name, settings | own)
    return found


def board_of(graph: gs.Graph, passes: Mapping[str, Pass], ctx: Context, folder: Path) -> Board:
    """The board of a graph: every pass runs on a copy, on all nodes of the main graph that it takes."""
    before, variants, centered = Snapshot.of(graph), {}, None
    for option, step in passes.items():
        variant = before.graph()
        for part in _comparable(step):
            work = part.work()
            if (needed := work.least_opset(variant)) > variant.opset:
                variant = raise_opset(variant, needed)
            centered = work.apply(variant, ctx).facts.get("centered", centered)
        variants[option] = variant
    return build(graph, variants, folder, ACTING, centered)


def _comparable(step: Pass) -> list[Pass]:
    """The pass; for onnxruntime with tables in the form of tensorrt, which holds the same values at the same node."""
    options = step.options()
    if not options["embeddings"] or options["target"] != "onnxruntime":
        return [step]
    tables = make(step.name, options | {"target": "tensorrt", "exclude_ops": (*options["exclude_ops"], *_LINEAR)})
    return [make(step.name, options | {"embeddings": False}), tables]


def groups(graph: gs.Graph, board: Board) -> list[tuple[str, ...]]:
    """The nodes of each site: linears that read one tensor and have the same options get one option together."""
    read = {linear.name: linear.data.name for linear in linears(graph)}
    found: dict[tuple, list[str]] = {}
    for name in board.slots:
        found.setdefault((read.get(name, ("table", name)), tuple(board.options(name))), []).append(name)
    return [tuple(names) for names in found.values()]


def priced(graph: gs.Graph, sites: Sequence[Site], feed: Feed, minimize: str) -> list[Site]:
    """The sites with the cost of every option: the share of the model's weight bytes, of its arithmetic, or the mean.

    The arithmetic of a node is its multiply-accumulates on a feed times the bits of its factors.
    """
    shapes = measured_shapes(graph, feed)
    macs = {
        linear.name: math.prod(shapes.get(linear.node.outputs[0].name, (0,)))
        * linear.weight().size
        // linear.channels[0]
        for linear in linears(graph)
    }
    work = {site.nodes: sum(macs.get(name, 0) for name in site.nodes) for site in sites}
    weights = {"size": (1.0, 0.0), "arithmetic": (0.0, 1.0), "both": (0.5, 0.5)}[minimize]
    whole = max(sum(site.sizes[FLOAT] for site in sites), 1), max(sum(work.values()), 1)

    def cost(site: Site, option: str) -> float:
        arithmetic = work[site.nodes] / whole[1] * (_BITS if option in ACTING else 1.0)
        return weights[0] * site.sizes[option] / whole[0] + weights[1] * arithmetic

    return [dataclasses.replace(s, costs={option: cost(s, option) for option in s.options()}) for s in sites]


def recipe(
    before: Sequence[Pass], passes: Mapping[str, Pass], graph: gs.Graph, board: Board, chosen: Configuration
) -> list[Pass]:
    """The passes that give every node its option: each excludes the nodes that are for another pass, or for none.

    Nodes in bodies of If, Loop and Scan stay float.
    """
    inside = [node.name for part in list(all_graphs(graph))[1:] for node in part.nodes if _is_weighted(node)]
    made, done = list(before), set()
    for option, step in passes.items():
        mine = {name for name in board.slots if chosen.get(name, FLOAT) == option}
        done |= mine
        if mine:
            others = [name for name, slot in board.slots.items() if name not in done and option in slot.files]
            settings, names = step.options(), dict.fromkeys([*others, *(n for n in inside if n not in mine)])
            made.append(make(step.name, settings | {"exclude": (*settings["exclude"], *map(glob.escape, names))}))
    return made


def _is_weighted(node: gs.Node) -> bool:
    """Whether a node can have a stored weight: a linear, or a Gather of a table."""
    return operator(node).weighted or operator(node).kind == "gather"

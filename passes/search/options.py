"""What a search chooses from: the options of every node, made by the passes themselves, and the recipe of a choice.

float     as it is
int8      quantize          weights by channel and activations in 8 bits
fp8       quantize-weights  the same in E4M3
dgq       quantize-weights  weights in 4 bits, which TensorRT multiplies as int8
w8, w4    quantize-weights  weights alone: int8 by channel, int4 in groups
nvfp4     quantize-weights  weights and activations in 4 bits

fp8, dgq and nvfp4 are for GPUs that are named, where all of them have the format.

One file may hold all of them, node by node: TensorRT-RTX builds such mixes for SM 89 and 120, in float32, float16 and
bfloat16, and every node runs in its own arithmetic. NVFP4 is written behind the cast of what stays float: its scales
are then made in that type. It needs float32 or float16.
"""

from __future__ import annotations

import dataclasses
import glob
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes import PASSES
from channelfold.passes.base import Context, Pass
from channelfold.passes.layers.expansion import codes_behind
from channelfold.passes.layers.formats import FORMATS
from channelfold.passes.layers.linear import linears
from channelfold.passes.layers.sensitivity import Site
from channelfold.passes.layers.switchboard import FLOAT, Board, Configuration, build
from channelfold.passes.layers.tables import table_of
from channelfold.passes.layers.targets import verdict
from channelfold.passes.operators import operator
from channelfold.passes.options import options as options_of
from channelfold.passes.recipe import QUANTIZATIONS, make
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io import edit
from channelfold.runtime.io.convert import all_graphs
from channelfold.runtime.io.files import constant, raise_opset, read
from channelfold.runtime.io.session import Feed
from channelfold.runtime.io.shapes import measured_shapes
from channelfold.runtime.io.snapshot import Snapshot

_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class Option(NamedTuple):
    """A pass with its own settings, and the formats of weights and activations that it gives a node."""

    step: str
    own: dict[str, Any]
    weights: str
    activations: str = "none"


def _of_weights(weights: str, activations: str = "none") -> Option:
    own = {} if activations == "none" else {"activations": activations, "embeddings": False}
    return Option("quantize-weights", {"weights": weights} | own, weights, activations)


OPTIONS: dict[str, Option] = {
    "int8": Option("quantize", {"embeddings": False, "min_activation_snr": 0.0}, "int8", "int8"),
    "fp8": _of_weights("fp8", "fp8"),
    "dgq": _of_weights("dgq", "int8"),
    "w8": _of_weights("int8"),
    "w4": _of_weights("int4"),
    "nvfp4": _of_weights("nvfp4", "fp4"),
}
ACTING = tuple(name for name, option in OPTIONS.items() if option.activations != "none")
LAST = "cast"  # what stays float gets another type
AUTO = "auto"  # the search chooses that type
TYPED = "nvfp4"  # written in that type
_OF_GPUS = ("fp8", "dgq", "nvfp4")  # not for GPUs that are not named, nor for ONNX Runtime
_NODE = 300  # bytes of a node that quantizes or dequantizes, with its names: one for a weight, three for activations


def in_front(passes: Sequence[Pass]) -> list[Pass]:
    """The passes of a recipe that a search keeps in front of its own; ``LAST`` stays behind them."""
    return [step for step in passes if step.name not in (*QUANTIZATIONS, LAST)]


def settled(passes: Sequence[Pass], records: Sequence[Mapping[str, Any]]) -> list[Pass]:
    """The passes of a search, which ran with these ``records``, so that they do the same in front of any mix.

    What a pass has taken back, because it did not pay in front of a quantization, is left out.
    """
    found, ran = list[Pass](), iter(records)
    for step in passes:
        record = next(record for record in ran if record["pass"] == step.name)
        if not step.options().get("roll_back"):
            found.append(step)
            continue
        sites = [change["node"] for change in record["changed"]]
        own = {"include": tuple(map(glob.escape, sites))} if "include" in step.options() else {}
        found += [make(step.name, step.options() | {"roll_back": False} | own)] if sites else []
    return found


def steps(given: Mapping[str, Any], sms: Sequence[int] = ()) -> dict[str, Pass]:
    """The pass of every option that a target and its GPUs run.

    ``given``: options of passes, each set where a pass has it.
    """
    for key, what in {"float_share": "A share of float nodes", "profile": "--profile"}.items():
        if given.get(key):
            raise UsageError(f"{what} was given, and the search chooses the nodes", "Give one of the two")
    found = {}
    for name, option in OPTIONS.items():
        if not runs(name, given.get("target", "tensorrt"), sms):
            continue
        known = options_of(PASSES[option.step])
        settings = {key: value for key, value in given.items() if key in known and key not in option.own}
        found[name] = make(option.step, settings | option.own)
    return found


def cast(passes: Sequence[Pass], given: Mapping[str, Any], kind: str = AUTO) -> Pass | None:
    """The pass that gives what stays float the type ``kind``; by default that of a recipe, or float16 for TensorRT.

    ONNX Runtime computes float16 in float32 on a CPU, so that such a model gains no time there.
    """
    step = next((step for step in passes if step.name == LAST), None)
    if kind == "float32" or (kind == AUTO and step is None and given.get("target", "tensorrt") != "tensorrt"):
        return None
    settings = {key: value for key, value in given.items() if key in options_of(PASSES[LAST])}
    return make(LAST, (step.options() if step else {}) | settings | ({} if kind == AUTO else {"type": kind}))


def runs(option: str, target: str, sms: Sequence[int]) -> bool:
    """Whether the kernels of a target, on all of some GPUs, read the format of an option as it is stored."""
    formats = OPTIONS[option].weights, OPTIONS[option].activations
    if option in _OF_GPUS and (not sms or target == "onnxruntime"):
        return False
    slow = "refused", "wrong", "dequantized first"
    return formats == ("int8", "int8") or all(verdict(*formats, target, sm) not in slow for sm in sms or [None])


def board_of(graph: gs.Graph, passes: Mapping[str, Pass], ctx: Context, folder: Path) -> Board:
    """The board of a graph: every pass runs on a copy, on all nodes of the main graph that it takes."""
    before, variants, centered = Snapshot.of(graph), {}, None
    ctx = dataclasses.replace(ctx, compared=True)
    acting = [option for option in passes if option in ACTING]
    shared = max((passes[option].opset_for(graph) for option in acting), default=0)  # their operators meet in one graph
    for option, step in passes.items():
        variant = before.graph()
        if option in acting and shared > variant.opset:
            variant = raise_opset(variant, shared)
        for part in _comparable(step):
            work = part.work()
            if (needed := work.least_opset(variant)) > variant.opset:
                variant = raise_opset(variant, needed)
            facts = work.apply(variant, ctx).facts
            centered = facts.get("centered", centered)
            _restore(variant, graph, facts.get("expanded", ()))
        variants[option] = variant
    macs = multiplications(before.graph(), next(iter(ctx.data)))
    return dataclasses.replace(build(graph, variants, folder, acting, centered), macs=macs)


def _restore(variant: gs.Graph, graph: gs.Graph, names: Collection[str]) -> None:
    """Gives the nodes ``names`` their weights of ``graph`` again, which a pass stores for nodes that are not its own.

    In the recipe of a mix such nodes are excluded.
    """
    floats = {node.name: node for node in graph.nodes}
    for node in (node for node in variant.nodes if node.name in names and _is_weighted(node)):
        for place, tensor in enumerate(node.inputs):
            if codes_behind(edit.producer(tensor)) is not None:
                weight = floats[node.name].inputs[place]
                edit.set_input(node, place, constant(variant, weight.name, read(weight)))


def multiplications(graph: gs.Graph, feed: Feed) -> dict[str, int]:
    """The multiply-accumulates of every linear on a feed."""
    shapes = measured_shapes(graph, feed)
    return {
        linear.name: math.prod(shapes.get(linear.node.outputs[0].name, (0,)))
        * linear.weight().size
        // linear.channels[0]
        for linear in linears(graph)
    }


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


@dataclasses.dataclass(frozen=True)
class Whole:
    """A network as costs see it: ``bytes`` of its file and ``macs`` of its linears, both of the given model.

    ``minimize``: "size", "arithmetic" or "both".
    """

    bytes: int
    macs: int
    minimize: str = "both"

    def priced(
        self,
        board: Board,
        sites: Sequence[Site],
        size: int,
        error: float = 0.0,
        widths: Mapping[str, int] = MappingProxyType({}),
    ) -> list[Site]:
        """The sites with the cost of every option: the share of the bytes, of the arithmetic, or the mean of both.

        The arithmetic of a node is its multiply-accumulates on a feed times the bits of its activations. ``size`` is
        that of the file in bytes and ``error`` that of the network when all sites are float, with ``widths``: the bytes
        of a number, 4 for nodes that are not named. What belongs to no site becomes a site without options.
        """
        share = {"size": (1.0, 0.0), "arithmetic": (0.0, 1.0), "both": (0.5, 0.5)}[self.minimize]

        def weighed(names: Iterable[str], bits: Mapping[str, int], option: str) -> float:
            whole = 32 * max(self.macs, 1)
            return sum(board.macs.get(name, 0) * bits.get(option, 8 * widths.get(name, 4)) for name in names) / whole

        def priced(site: Site, names: Iterable[str]) -> Site:
            nodes = {o: (4 if o in ACTING else 1) * len(site.nodes) for o in site.sizes if o != FLOAT}
            sizes = {o: own + _NODE * nodes.get(o, 0) for o, own in site.sizes.items()}
            if site.nodes:
                sizes[FLOAT] = sum(board.slots[name].sizes[FLOAT] * widths.get(name, 4) // 4 for name in site.nodes)
            bits = {o: FORMATS[OPTIONS[o].activations].bits for o in sizes if o in ACTING}
            costs = {o: share[0] * n / self.bytes + share[1] * weighed(names, bits, o) for o, n in sizes.items()}
            return dataclasses.replace(site, sizes=sizes, costs=costs)

        known = [priced(site, site.nodes) for site in sites]
        rest = Site((), {FLOAT: error}, {FLOAT: size - sum(site.sizes[FLOAT] for site in known)})
        return [*known, priced(rest, board.macs.keys() - {name for site in sites for name in site.nodes})]


def widths(graph: gs.Graph) -> dict[str, int]:
    """The bytes of a number in the weight of every node that has one."""
    tables = ((node.name, table) for node in graph.nodes if (table := table_of(node)) is not None)
    found = {name: np.dtype(table.dtype).itemsize for name, table in tables}
    return found | {linear.name: linear.dtype.itemsize for linear in linears(graph)}


def recipe(
    before: Sequence[Pass],
    passes: Mapping[str, Pass],
    graph: gs.Graph,
    board: Board,
    chosen: Configuration,
    behind: Sequence[Pass] = (),
) -> list[Pass]:
    """The passes that give every node its option: each excludes the nodes that are for another pass, or for none.

    ``behind``: what gives its type to what stays float. Linears and tables that are not on the board stay float, those
    in bodies of If, Loop and Scan among them.
    """
    weighted = [node.name for part in all_graphs(graph) for node in part.nodes if _is_weighted(node)]
    names = dict.fromkeys([*board.slots, *weighted])
    made, done = dict[str, Pass](), set()
    for option, step in passes.items():
        mine = {name for name in board.slots if chosen.get(name, FLOAT) == option}
        done |= mine
        if mine:
            settings, others = step.options(), (glob.escape(name) for name in names if name not in done)
            made[option] = make(step.name, settings | {"exclude": (*settings["exclude"], *others)})
    last = [made.pop(TYPED)] if TYPED in made else []
    return [*before, *made.values(), *behind, *last]


def _is_weighted(node: gs.Node) -> bool:
    """Whether a node can have a stored weight of its own: a linear, or what takes rows of a table."""
    return operator(node).weighted or operator(node).kind == "gather" or table_of(node) is not None

"""FFN channels that bypass the activation folded into one dense branch (RePaViT, ICML 2025).

    h = W1 (a1 * x + d1) + b1        h' = act(h_i) for active channels i, s_j * h_j + t_j for idle ones j
    y = W2 h' + b2 + x

    F1 = W1 diag(a1),  c1 = b1 + W1 d1
    Wd = W2_j diag(s_j) F1_j + I,    bd = b2 + W2_j (s_j * c1_j + t_j) + W2_i t_i
    y  = Wd x + bd + W2_i diag(s_i) act(F1_i x + c1_i)

a1 and d1 are a norm in front that is affine at inference (BatchNormalization). The shortcut goes into Wd where the
shortcut is the input of this norm. Behind a LayerNormalization both stay: Wd acts on the normalized tensor, and an Add
adds x. s and t are scales and shifts between the activation and W2, such as a second BatchNormalization. Without active
channels one dense layer is left, as of any two linears in a row.

The pass computes which channels are idle (``functions``): with any nodes between two linears each channel is a function
of one channel, and a channel with an affine function is idle. A mask must be the same for all tokens and samples, and
for two sizes of the input where the size is open.

Per position the pair takes C_in H + H C_out multiply-accumulates (MACs), and k (C_in + C_out) + C_in C_out after the
fold, with k active channels. The fold is refused where too few channels are idle to save MACs (theta <= 1 / (2 rho) for
H = rho C), unless ``always``. W2 takes up a LayerScale behind it. ``fold-affine`` may run before or after; after the
fold it rewrites fewer weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.channels.cones import cone
from channelfold.passes.channels.functions import CONSTANT, MIXED, Function, Functions
from channelfold.passes.ffn import ReparameterizeFfn
from channelfold.passes.ffn.pairs import Pair, Pairs
from channelfold.passes.layers.affine import Affine, as_affine
from channelfold.passes.layers.linear import Linear, cast
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, free_name, infer_shapes


class Work(ReparameterizeFfn):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        infer_shapes(graph)
        outcome, pairs, nodes = Outcome(), Pairs(graph, ctx.calibration), list(graph.nodes)
        try:
            for done, node in enumerate(nodes):
                ctx.progress("reparameterize", done, len(nodes))
                pair = None
                try:
                    pair = pairs.at(node)
                    if pair is not None and _has_idle(pair):
                        outcome.change(node.name, self._fold(pairs, pair, outcome))
                except Refused as error:
                    if pair is None or pair.activated:  # two linears in a row are no FFN
                        outcome.refuse(node.name, f"{node.op}: {error}", error.code)
        finally:
            if outcome.changed:
                edit.remove_dead(graph)
        return outcome

    def _fold(self, pairs: Pairs, pair: Pair, outcome: Outcome) -> str:
        """Folds the idle channels of a pair; returns a description. Raises Refused, with nothing changed."""
        _check(pairs.graph, pair)
        idle, hidden, macs = int(pair.idle.sum()), pair.idle.size, f"{pair.macs:,} to {pair.folded_macs:,}"
        if pair.folded_macs >= pair.macs and not self.always:
            raise Refused(f"folding {idle} idle of {hidden} channels would take the MACs per position from {macs}")
        around = _surroundings(pairs, pair, outcome)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused
            weights = _folded(pair, around)
        _Writer(pairs.graph, pair, around, weights).write()
        merged = ", with the shortcut" if around.add is not None else ""
        site = {"node": pair.outer.name, "method": f"dense{merged}", "width": [hidden, int(pair.active.sum())],
                "macs": [pair.macs, pair.folded_macs]}  # fmt: skip
        outcome.facts.setdefault("sites", []).append(site)
        return f"{idle} of {hidden} channels are idle, now one dense layer{merged}: MACs per position {macs}"


def _has_idle(pair: Pair) -> bool:
    """Whether channels are idle. Raises Refused for an idle gate: a product of two channels is not affine."""
    if pair.idle.any():
        return True
    kinds = [pair.functions[f] for f in np.unique(pair.channels["function"])]
    for function in kinds if len(kinds) > 1 else ():
        given = [a.affine for a in function.arguments if isinstance(a, Function)]
        if function.node is not None and function.node.op == "Mul" and len(given) == 2 and None not in given:
            count = int(np.sum(pair.channels["function"] == pair.functions.index(function)))
            raise Refused(f"its gate is idle on {count} channels, but a product of two linears is not linear")
    return False


def _check(graph: gs.Graph, pair: Pair) -> None:
    """Raises Refused where the active channels cannot be computed alone, or other nodes need the idle channels."""
    kinds = np.unique(pair.channels["function"][pair.active])
    if kinds.size > 1 or MIXED in kinds:
        differ = f"have {kinds.size} different activations" if MIXED not in kinds else "each have another activation"
        raise Refused(f"its active channels {differ}")
    if len({linear.dtype for linear in (*pair.inner, pair.outer)}) > 1:
        raise Refused("its linears compute in different types")
    if any(linear.data is not pair.inner[0].data for linear in pair.inner):
        raise Refused("its inner linears read different tensors")
    for tensor in reversed(pair.tensors):  # the last tensor with other readers makes the clearest reason
        if edit.is_output(graph, tensor):
            raise Refused(f"{tensor.name!r} is an output of the graph")
        for node in edit.consumers(tensor):
            if node is not pair.outer.node and _is_needed(graph, node, pair.outer.node):
                what = "the shape of " if operator(node).asks_shape else ""
                raise Refused(f"{what}{tensor.name!r} is also needed elsewhere, by {node.op}")


def _is_needed(graph: gs.Graph, node: gs.Node, besides: gs.Node) -> bool:
    """Whether an output of the graph depends on a node through other nodes than ``besides``."""
    pending, seen = [node], {id(besides)}
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if not edit.in_graph(graph, current) or any(edit.is_output(graph, t) for t in current.outputs):
            return True
        pending += [reader for tensor in current.outputs for reader in edit.consumers(tensor)]
    return False


@dataclass(frozen=True)
class _Surroundings:
    """The nodes around an FFN that are folded with it.

    The FFN reads ``scale`` * ``source`` + ``shift``. ``tail`` is the affine map behind the FFN, such as a LayerScale,
    and ``add`` the Add of the shortcut ``source``.
    """

    source: gs.Tensor
    scale: np.ndarray | float = 1.0
    shift: np.ndarray | float = 0.0
    tail: Affine | None = None
    add: gs.Node | None = None


def _surroundings(pairs: Pairs, pair: Pair, outcome: Outcome) -> _Surroundings:
    """The nodes that can be folded with an FFN; refuses a shortcut that cannot be folded."""
    data, tail = pair.inner[0].data, _tail(pairs.graph, pair)
    out = pair.outer.output if tail is None else tail.output
    add = edit.sole_consumer(pairs.graph, out)
    if add is None or add.op != "Add" or not edit.is_standard(add):
        return _Surroundings(data, tail=tail)
    source = next(t for t in add.inputs if t is not out)
    try:
        if isinstance(source, gs.Constant) or pair.outer.channels[0] != pair.inner[0].channels[1]:
            raise Refused("it adds something else than what the FFN reads")
        if source is data:
            return _Surroundings(data, tail=tail, add=add)
        axis = pair.inner[0].in_axis
        found = cone(pairs.graph, data, lambda tensor: tensor is source, roots=1)
        functions = Functions()
        what, _ = pairs.read(found, {id(source): axis}, axis, functions)
        maps = [(0, 0.0, 0.0) if f == CONSTANT else functions.items[f].affine for f in what["function"]]
        moved = (what["channel"] != np.arange(what.size)) & (what["function"] != CONSTANT)
        if None in maps or moved.any():
            raise Refused("what is in between is not one scale and shift a channel")
    except Refused as error:
        outcome.refuse(add.name, f"Add: the shortcut stays apart: {error}", "shortcut")
        return _Surroundings(data, tail=tail)
    slope, intercept = (np.array([m[i] for m in maps if m is not None]) for i in (1, 2))
    return _Surroundings(source, what["scale"] * slope, what["scale"] * intercept + what["shift"], tail, add)


def _tail(graph: gs.Graph, pair: Pair) -> Affine | None:
    """The affine map right behind an FFN, or None."""
    tail, tensor = None, pair.outer.output
    while (node := edit.sole_consumer(graph, tensor)) is not None and (more := as_affine(node)) is not None:
        if more.axis not in (None, pair.outer.out_axis % (edit.rank(tensor) or 1)):
            break
        tail = more if tail is None else tail.then(more)
        assert tail is not None
        tensor = tail.output
    return tail


_Weight = tuple[np.ndarray, np.ndarray | None]  # a weight (out, in) and a bias (out,)


@dataclass(frozen=True)
class _Weights:
    """The weights of a folded FFN in their type. Without active channels ``dense`` is the only weight."""

    dense: _Weight
    inner: list[_Weight] = field(default_factory=list)
    outer: _Weight | None = None


def _folded(pair: Pair, around: _Surroundings) -> _Weights:
    """The weights of the docstring of this module, computed in float64 and cast once. Raises DoesNotFit."""
    what, active, kind = pair.channels, pair.active, pair.outer.dtype
    second, last = _matrix(pair.outer), pair.outer.bias()
    bias = (0.0 if last is None else last) + second @ what["shift"]
    if around.tail is not None:
        second *= around.tail.scale.reshape(-1, 1)
        bias = around.tail.scale * bias + around.tail.shift
    outs, ins = pair.outer.channels[0], pair.inner[0].channels[1]
    dense = np.zeros((outs, ins)) if around.add is None else np.eye(outs)
    inner: list[_Weight] = []
    for root, linear in enumerate(pair.inner):
        first, old = _matrix(linear), linear.bias()
        offset = (0.0 if old is None else old) + first @ np.broadcast_to(around.shift, (ins,))
        first *= around.scale
        mine = pair.slopes[:, 0] == root
        channels, (slope, intercept) = what["channel"][mine], pair.slopes[mine, 1:].T
        columns = second[:, mine] * what["scale"][mine]
        dense += (columns * slope) @ first[channels]
        bias = bias + columns @ (slope * offset[channels] + intercept)
        rows = what["channel"][active]
        inner.append(
            (cast(first[rows], kind), None if old is None and not np.any(offset) else cast(offset[rows], kind))
        )
    whole = cast(dense, kind), None if last is None and not np.any(bias) else cast(bias, kind)
    if not active.any():
        return _Weights(whole)
    return _Weights(whole, inner, (cast(second[:, active] * what["scale"][active], kind), None))


def _matrix(linear: Linear) -> np.ndarray:
    """A copy of the weight of a pointwise linear, (out, in) float64."""
    return linear.weight().reshape(linear.channels).astype(np.float64)


@dataclass
class _Writer:
    """Replaces an FFN by a folded FFN. New nodes take over the names of the old nodes."""

    graph: gs.Graph
    pair: Pair
    around: _Surroundings
    weights: _Weights
    nodes: list[gs.Node] = field(default_factory=list)
    made: dict[int, gs.Tensor] = field(default_factory=dict)

    def write(self) -> None:
        pair, around, source = self.pair, self.around, self.around.source
        tail = around.tail.nodes if around.tail is not None else ()
        old = [node for node in (pair.outer.node, pair.outer.bias_node, *tail, around.add) if node is not None]
        names, result = [node.name for node in old], old[-1].outputs[0]
        position = next(i for i, node in enumerate(self.graph.nodes) if node is old[0])
        for node in old:
            edit.detach(node)
        first, second, name = pair.inner[0], pair.outer, names[0]
        if self.weights.outer is None:
            self.linear(first, source, self.weights.dense, name, f"{second.source.name}_dense", result)
        else:
            hidden = [
                self.linear(linear, source, weight, linear.name, f"{linear.source.name}_active")
                for linear, weight in zip(pair.inner, self.weights.inner, strict=True)
            ]
            function = pair.functions[pair.channels["function"][pair.active][0]]
            read = self.value(function, hidden)
            kept = self.linear(second, read, self.weights.outer, name, f"{second.source.name}_active")
            dense = self.linear(first, source, self.weights.dense, f"{name}_dense", f"{second.source.name}_dense")
            self.node("Add", names[-1] if len(names) > 1 else f"{name}_sum", [dense, kept], result)
        self.graph.nodes[position:position] = self.nodes

    def node(self, op: str, name: str, inputs: list[gs.Tensor], output: gs.Tensor, like: gs.Node | None = None) -> None:
        attrs, domain = (dict(like.attrs), like.domain) if like is not None else ({}, None)
        self.nodes.append(gs.Node(op, name, attrs, inputs, [output], domain))
        vars(self.nodes[-1])["_graph"] = self.graph

    def linear(
        self, form: Linear, source: gs.Tensor, weights: _Weight, name: str, held: str, result: gs.Tensor | None = None
    ) -> gs.Tensor:
        """Adds a linear like ``form`` with new weights, the weight called ``held``; returns its result."""
        weight, bias = weights
        values = np.ascontiguousarray(form.unorient(weight.reshape(*weight.shape, *form.kernel)))
        inputs: list[gs.Tensor] = [source, constant(self.graph, held, values)]
        if form.weight_input == 0:
            inputs.reverse()
        result = result or self.fresh(source, f"{name}_output", {form.in_axis: len(weight)})
        if bias is not None:
            offset = constant(self.graph, f"{name}_bias", form.shaped_bias(bias))
            if form.node.op == "MatMul":
                product = self.fresh(source, f"{name}_product", {form.in_axis: len(weight)})
                self.node("MatMul", name, inputs, product)
                self.node("Add", f"{name}_bias", [product, offset], result)
                return result
            inputs.append(offset)
        self.node(form.node.op, name, inputs, result, form.node)
        for factor in ("alpha", "beta") if form.node.op == "Gemm" else ():
            self.nodes[-1].attrs.pop(factor, None)
        return result

    def value(self, function: Function, hidden: list[gs.Tensor]) -> gs.Tensor:
        """Adds the nodes of a function of the active channels; returns their result."""
        if function.root is not None:
            return hidden[function.root]
        if id(function) not in self.made:
            assert function.node is not None
            inputs = [
                self.value(a, hidden) if isinstance(a, Function) else gs.Variable.empty() if a is None else a
                for a in function.arguments
            ]
            old = function.node.outputs[0]
            self.made[id(function)] = made = self.fresh(hidden[0], f"{old.name}_active", {})
            made.dtype = old.dtype
            self.node(function.node.op, function.node.name, inputs, made, function.node)
        return self.made[id(function)]

    def fresh(self, near: gs.Tensor, name: str, sizes: dict[int, int]) -> gs.Variable:
        """A new tensor with the type and shape of another tensor, except for the sizes of some axes."""
        shape = None if near.shape is None else list(near.shape)
        if shape is not None:
            for axis, size in sizes.items():
                shape[axis] = size
        return gs.Variable(free_name(self.graph, name), near.dtype, shape)

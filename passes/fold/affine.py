"""Channel-wise scales and shifts folded into weights.

    backward   s * (W x + b) + t          =  (diag(s) W) x + (s * b + t)
    forward    W (s * x + t) + b          =  (W diag(s)) x + (b + W t)
    norm       s * (g * n(x) + e) + t     =  (s * g) n(x) + (s * e + t)
    split      s * x + t                  =  s back, t forward; or s * (x + t / s), shift back, scale forward

BatchNormalization, LayerScale, input normalization and any other constant per-channel Mul, Div, Add or Sub are affine
maps (``layers.affine``). A map is folded into the linear or norm before it, or into *every* linear behind it, through
the operators that commute with the map. The part that cannot move exactly stays as one Mul and one Add at most, and
the refusal names the part and the reason.

Left as they are: the affine part of a decomposed norm (it is the norm's gamma and beta); a scalar factor right behind a
product of two activations (it belongs to GELU or HardSwish, which runtimes fuse); weights that someone else reads too,
where a copy would make the file more than 1 MB larger; folds that would add more nodes than they remove. A scalar that
can move nowhere is part of a formula (the epsilon of a norm, the 1 in GELU) and is not refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.fold import FoldAffine
from channelfold.passes.layers.affine import Affine, Vector, after, as_affine, before, find_affine
from channelfold.passes.layers.linear import Linear, cast, check_growth, norm_parameters, view
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, infer_shapes

_Map = tuple[np.ndarray, np.ndarray]  # scale and shift


@dataclass
class _Way:
    """The path of a map in one direction.

    ``ends``: the linears or norms that take the map up, with its axis there. ``no_scale``, ``no_shift``: why the path
    takes no scale or no shift; empty where the path does.
    """

    ends: list[tuple[Linear | gs.Node, Vector]] = field(default_factory=list)
    no_scale: str = ""
    no_shift: str = ""

    def takes(self, part: _Map) -> bool:
        return not (self.no_scale and np.any(part[0] != 1)) and not (self.no_shift and np.any(part[1] != 0))


class Work(FoldAffine):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        infer_shapes(graph)
        outcome = Outcome()
        try:
            while _fold_everywhere(graph, outcome):  # a map that has moved may have been in the way of another
                outcome.refused.clear()
            _fold_gemm_factors(graph, outcome)
        finally:
            edit.sweep(graph)
        return outcome


def _fold_everywhere(graph: gs.Graph, outcome: Outcome) -> bool:
    """Tries every site once; returns whether any was folded."""
    moved, seen = False, set()
    for node in list(graph.nodes):
        if id(node) in seen or not node.outputs:
            continue
        try:
            site = _site(graph, node)
        except Refused as error:
            outcome.refuse(node.name, f"{node.op}: {error}", error.code)
            continue
        if site is None:
            continue
        seen.update(map(id, site.nodes))
        name, ops = node.name, "+".join(n.op for n in site.nodes)
        try:
            outcome.change(name, f"{ops}: {_fold(graph, site)}")
            moved = True
        except Refused as error:
            if site.axis is not None:
                outcome.refuse(name, f"{ops}: {error}", error.code)
    return moved


def _site(graph: gs.Graph, node: gs.Node) -> Affine | None:
    """The longest map that starts at a node, or None. Raises Refused for a node that only looks like a map."""
    run = find_affine(node) if _biased(graph, node) is None else None
    if run is None or _is_factor(node, run):
        return None
    while (follower := edit.sole_consumer(graph, run.output)) is not None:
        more = as_affine(follower)
        joined = run.then(more) if more is not None else None
        if joined is None:
            break
        run = joined
    return run


def _biased(graph: gs.Graph, node: gs.Node) -> Linear | None:
    """The MatMul whose bias an Add is."""
    for tensor in node.inputs if node.op == "Add" else ():
        source = edit.producer(tensor)
        if source is not None and source.op == "MatMul":
            try:
                linear = view(graph, source)
            except Refused:
                continue
            if linear.bias_node is node:
                return linear
    return None


def _is_factor(node: gs.Node, affine: Affine) -> bool:
    """Whether a node is a scalar factor right behind a product of two activations."""
    source = edit.producer(affine.input)
    return operator(node).multiplies and affine.axis is None and source is not None and _is_product(source)


def _is_product(node: gs.Node) -> bool:
    return operator(node).multiplies and not any(isinstance(tensor, gs.Constant) for tensor in node.inputs)


def is_normalized(tensor: gs.Tensor) -> bool:
    """Whether a tensor is x / root or x * (1 / root), with root the square root of a variance, perhaps plus epsilon."""
    node = edit.producer(tensor)
    if node is None or not _is_product(node):
        return False
    return _is_root(node.inputs[1]) if node.op == "Div" else any(map(_is_inverse_root, node.inputs))


def _is_root(tensor: gs.Tensor) -> bool:
    node = _origin(tensor, "Add")
    return node is not None and node.op in ("Sqrt", "Pow")


def _is_inverse_root(tensor: gs.Tensor) -> bool:
    node = _origin(tensor, "Mul")
    return node is not None and (node.op == "Pow" or (node.op in ("Reciprocal", "Div") and _is_root(node.inputs[-1])))


def _origin(tensor: gs.Tensor, op: str) -> gs.Node | None:
    """The node that computes a tensor; Expand, and ``op`` with a constant, are passed over."""
    node = edit.producer(tensor)
    while node is not None and node.op in (op, "Expand"):
        inner = [t for t in node.inputs if not isinstance(t, gs.Constant)]
        if not inner or (node.op == op and len(inner) > 1):
            break
        node = edit.producer(inner[0])
    return node


def _fold(graph: gs.Graph, site: Affine) -> str:
    """Moves as much of a map as possible; returns a description. Raises Refused, with nothing changed."""
    if site.axis is not None and is_normalized(site.input) and site.nodes[0].op != "BatchNormalization":
        return _shorten(graph, site, "it is the gamma or beta of a norm")
    back, forth = _backward(graph, site), _forward(graph, site)
    reasons = []
    for words, backward, forward, left in _plans(site, back, forth):
        if not back.takes(backward) or not forth.takes(forward):
            continue
        try:
            _move(graph, site, back.ends, backward, forth.ends, forward, left)
        except Refused as error:
            reasons = reasons or [str(error)]
        else:
            return words
    if np.any(site.scale != 1):
        reasons += [back.no_scale, forth.no_scale]
    else:
        reasons += [back.no_shift, forth.no_shift]
    return _shorten(graph, site, "; ".join(dict.fromkeys(r for r in reasons if r)))


def _plans(site: Affine, back: _Way, forth: _Way) -> Iterator[tuple[str, _Map, _Map, _Map]]:
    """The ways to divide a map, the best first: (description, part moved back, part moved forward, part that stays)."""
    scale, shift = site.scale, site.shift
    one, zero = np.ones_like(scale), np.zeros_like(shift)
    nothing = (one, zero)
    yield "into what precedes it", (scale, shift), nothing, nothing
    yield "into what follows it", nothing, (scale, shift), nothing
    if not np.any(scale != 1) or not np.any(shift != 0):
        return
    with np.errstate(over="ignore"):
        ratio = np.divide(shift, scale, out=zero.copy(), where=scale != 0)
    whole = np.isfinite(ratio).all() and not np.any(shift[scale == 0])
    if edit.dtype(site.input) == np.float16:
        whole = False  # x + t / s can be out of its range where s * x + t is not
    yield "scale into what precedes it, shift into what follows it", (scale, zero), (one, shift), nothing
    if whole:
        yield "shift into what precedes it, scale into what follows it", (one, ratio), (scale, zero), nothing
    if len(site.nodes) == 1 and site.nodes[0].op != "BatchNormalization":
        return
    stays = "; ".join(dict.fromkeys(reason for reason in (back.no_shift, forth.no_shift) if reason))
    yield f"scale into what precedes it; the shift stays: {stays}", (scale, zero), nothing, (one, shift)
    if whole:
        yield f"scale into what follows it; the shift stays: {stays}", nothing, (scale, zero), (one, ratio)


def _backward(graph: gs.Graph, site: Affine) -> _Way:
    """The path back to the linear or norm that computes the map's input."""
    way, tensor, v, reader = _Way(), site.input, Vector(site.axis), site.nodes[0]
    try:
        while True:
            node = edit.producer(tensor)
            if node is None:
                raise Refused("an input of the graph precedes it")
            if edit.is_output(graph, tensor) or [id(n) for n in tensor.outputs if not operator(n).asks_shape] != [
                id(reader)
            ]:
                raise Refused(f"{node.op} in front of it has other readers")
            end = _end(graph, node)
            if end is not None:
                break
            reader = node
            tensor, v = before(node, v)
        _check_axis(end, tensor, v.axis)
    except Refused as error:
        way.no_scale = way.no_shift = str(error)
        return way
    way.ends.append((end, v))
    _limit(way, site, v)
    if not isinstance(end, Linear) and not (operator(end).beta and edit.has_input(end, operator(end).gamma + 1)):
        way.no_shift = way.no_shift or f"{end.op} has no bias"
    return way


def _forward(graph: gs.Graph, site: Affine) -> _Way:
    """The path forward to all linears that read the map's output."""
    way, pending = _Way(), [(site.output, Vector(site.axis))]
    try:
        while pending:
            tensor, v = pending.pop()
            if edit.is_output(graph, tensor):
                raise Refused("its result is an output of the graph")
            for node in edit.consumers(tensor):
                if operator(node).asks_shape:
                    continue
                if not edit.in_graph(graph, node):
                    raise Refused("a subgraph reads its result")
                places = [i for i, t in enumerate(node.inputs) if t is tensor]
                if places != [0] and (node.op, places) != ("MatMul", [1]):
                    raise Refused(f"{node.op} follows it")
                if not operator(node).weighted:
                    pending.append(after(node, v))
                    continue
                linear = _view(graph, node, "follows")
                _check_axis(linear, tensor, v.axis, linear.in_axis)
                way.ends.append((linear, v))
                _limit(way, site, v)
                if linear.padded:
                    way.no_shift = way.no_shift or f"a shift does not pass the zero padding of {node.op}"
    except Refused as error:
        way.no_scale = way.no_shift = error.behind
    return way


def _limit(way: _Way, site: Affine, v: Vector) -> None:
    if v.no_negative and (count := int(np.sum(site.scale < 0))):
        way.no_scale = way.no_scale or f"{count} scale(s) are negative, which does not pass {v.no_negative}"
    way.no_shift = way.no_shift or v.no_shift


def _view(graph: gs.Graph, node: gs.Node, verb: str) -> Linear:
    try:
        return view(graph, node)
    except Refused as error:
        raise Refused(f"{node.op} {verb} it, but {error}") from None


def _end(graph: gs.Graph, node: gs.Node) -> Linear | gs.Node | None:
    """The linear or norm whose result a node computes, or None. Raises Refused for a linear without a view."""
    known = operator(node)
    if known.weighted:
        linear = _view(graph, node, "precedes")
        return linear if linear.bias_node is None else None
    if known.kind in ("instance_norm", "norm") and all(t.is_empty() for t in node.outputs[1:]):
        parameters = [t for t in node.inputs[known.gamma : known.gamma + 1 + known.beta] if not t.is_empty()]
        return node if all(isinstance(t, gs.Constant) and len(t.shape) == 1 for t in parameters) else None
    return _biased(graph, node)


def _check_axis(end: Linear | gs.Node, tensor: gs.Tensor, axis: int | None, channels: int | None = None) -> None:
    """Raises Refused unless ``axis`` of a tensor is the channel axis of the linear or norm that reads or writes it."""
    if axis is None:
        return
    if isinstance(end, Linear):
        op, expected = end.node.op, end.out_axis if channels is None else channels
    else:
        op, expected = end.op, end.attrs.get("axis", operator(end).norm_axis)
    size = edit.rank(tensor)
    if expected < 0 and size is not None:
        expected += size
    last = isinstance(end, gs.Node) and operator(end).norm_axis == -1
    if expected != axis or (last and axis + 1 != size):
        raise Refused(f"it scales axis {axis}, which is not the channels of {op}")


def _move(graph: gs.Graph, site: Affine, back, backward: _Map, forth, forward: _Map, left: _Map) -> None:
    """Carries out a plan. All values are computed before the first is written, so that Refused changes nothing."""
    writes = []
    if _matters(backward):
        for end, v in back:
            if isinstance(end, Linear):
                scale, shift = _expand(v, backward, end, end.channels[0])
                writes.append((end, end.rescaled(out_scale=scale, out_shift=shift)))
            else:
                writes.append((end, norm_parameters(end, *backward)))
    if _matters(forward):
        for end, v in forth:
            scale, shift = _expand(v, forward, end, end.channels[1])
            writes.append((end, end.rescaled(in_scale=scale, in_shift=shift)))
    linears = [(end, values) for end, values in writes if isinstance(end, Linear)]
    for linear, _ in linears:
        check_growth(linear)
    parts = _parts(site, *left)
    new = sum(linear.node.op == "MatMul" and linear.bias_node is None and b is not None for linear, (_, b) in linears)
    if new + len(parts) > len(site.nodes):
        raise Refused(f"it would take {new} bias Adds behind the MatMuls that read it")
    for end, values in writes:
        if isinstance(end, Linear):
            end.install(*values)
        else:
            for index, array, name in values:
                edit.set_constant(graph, end, index, array, name)
    _leave(graph, site, parts)


def _expand(v: Vector, part: _Map, end: Linear, channels: int) -> _Map:
    scale, shift = v.expand(part[0]), v.expand(part[1])
    if scale.ndim and scale.size != channels:
        raise Refused(f"it has {scale.size} channels, but {end.name} has {channels}: the shapes in the file are wrong")
    return scale, shift


def _matters(part: _Map) -> bool:
    return bool(np.any(part[0] != 1) or np.any(part[1] != 0))


def _shorten(graph: gs.Graph, site: Affine, reason: str) -> str:
    """Writes a run of nodes as one Mul and one Add. Raises Refused when it is short already."""
    try:
        parts = _parts(site, site.scale, site.shift)
    except Refused:
        raise Refused(reason) from None
    if len(parts) >= len(site.nodes) or len(site.nodes) == 1:
        raise Refused(reason)
    _leave(graph, site, parts)
    return f"{len(site.nodes)} nodes merged into {len(parts)}; they stay: {reason}"


def _parts(site: Affine, scale: np.ndarray, shift: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The Mul and the Add, with their constants, that compute a map; neutral ones are left out. Raises DoesNotFit."""
    kind = edit.dtype(site.input) or edit.dtype(site.output)
    if kind is None:
        kind = next((np.dtype(t.dtype) for n in site.nodes for t in n.inputs if isinstance(t, gs.Constant)), None)
    size = edit.rank(site.input)
    parts = []
    for op, values, idle in (("Mul", scale, 1), ("Add", shift, 0)):
        values = cast(values, kind or np.dtype(np.float32))
        if not np.any(values != idle):
            continue
        if site.axis is None:
            parts.append((op, values))
        elif size is None:
            raise Refused("the rank of its input is unknown")
        else:
            parts.append((op, values.reshape(-1, *[1] * (size - 1 - site.axis))))
    return parts


def _leave(graph: gs.Graph, site: Affine, parts: list[tuple[str, np.ndarray]]) -> None:
    """Replaces the nodes of a map by the given Mul and Add."""
    if not parts and edit.bypass(graph, site.input, list(site.nodes), site.output):
        return
    kept = site.nodes[-max(len(parts), 1) :]
    for node in site.nodes[: -len(kept)]:
        edit.detach(node)
    if not parts:
        edit.rewrite(kept[0], "Identity", [site.input])
    tensor = site.input
    for node, (op, values) in zip(kept, parts, strict=False):
        edit.rewrite(node, op, [tensor, constant(graph, f"{node.name}_{op.lower()}", values)])
        tensor = node.outputs[0]


def _fold_gemm_factors(graph: gs.Graph, outcome: Outcome) -> None:
    """alpha * A B + beta * C with constant B and C becomes A B' + C'."""
    for node in graph.nodes:
        factors = {name: node.attrs[name] for name in ("alpha", "beta") if node.attrs.get(name, 1.0) != 1.0}
        if node.op != "Gemm" or not factors:
            continue
        try:
            linear = view(graph, node)
            check_growth(linear)
            linear.install(*linear.rescaled())
        except Refused as error:
            outcome.refuse(node.name, f"Gemm: alpha and beta stay: {error}", error.code)
        else:
            outcome.change(node.name, f"Gemm: {' and '.join(factors)} into its weight and bias")

"""Channel-wise scales and shifts folded into weights.

    backward   s * (W x + b) + t          =  (diag(s) W) x + (s * b + t)
    forward    W (s * x + t) + b          =  (W diag(s)) x + (b + W t)
    norm       s * (g * n(x) + e) + t     =  (s * g) n(x) + (s * e + t)
    split      s * x + t                  =  s back, t forward; or s * (x + t / s), shift back, scale forward

BatchNormalization, LayerScale, input normalization and all other constant per-channel Mul, Div, Add and Sub nodes are
affine maps (``layers.affine``). A map is folded into the linear or norm in front, or into *all* linears behind, through
the operators that commute with the map. A part that cannot move stays as at most one Mul and one Add, and the report
names the reason.

The pass leaves alone: gamma and beta of a decomposed norm; a scalar factor right behind a product of two activations,
which belongs to a GELU or HardSwish that runtimes fuse; weights with other readers, where a copy would make the file
more than 1 MB larger; folds that would add more nodes than they remove. A scalar that cannot move is part of a formula
(the epsilon of a norm, the 1 in GELU) and is not refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.fold import FoldAffine
from channelfold.passes.layers.affine import Affine, Layout, as_affine, before, check_axis, find_affine, readers
from channelfold.passes.layers.linear import Linear, cast, check_growth, norm_parameters, view, view_beside
from channelfold.passes.operators import operator
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import constant, infer_shapes

_Map = tuple[np.ndarray, np.ndarray]  # scale and shift


@dataclass
class _Path:
    """The path of a map in one direction.

    ``ends`` holds the linears and norms that take the map up, each with the layout of the map there. ``no_scale`` and
    ``no_shift`` give the reason why the path takes no scale or no shift; empty where the path takes one.
    """

    ends: list[tuple[Linear | gs.Node, Layout]]
    no_scale: str = ""
    no_shift: str = ""

    @classmethod
    def to(cls, site: Affine, ends: Sequence[tuple[Linear | gs.Node, Layout]]) -> _Path:
        negative, stops = int(np.sum(site.scale < 0)), next((v.no_negative for _, v in ends if v.no_negative), "")
        no_scale = f"{negative} scale(s) are negative, which does not pass {stops}" if negative and stops else ""
        return cls([*ends], no_scale, next((v.no_shift for _, v in ends if v.no_shift), ""))

    def takes(self, part: _Map) -> bool:
        return not (self.no_scale and np.any(part[0] != 1)) and not (self.no_shift and np.any(part[1] != 0))


class Work(FoldAffine):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        infer_shapes(graph)
        outcome = Outcome()
        try:
            while _fold_everywhere(graph, outcome):  # a map that moves may clear the way for another map
                outcome.refused.clear()
            _fold_gemm_factors(graph, outcome)
        finally:
            edit.sweep(graph)
        return outcome


def _fold_everywhere(graph: gs.Graph, outcome: Outcome) -> bool:
    """Tries every site once; returns whether a site was folded."""
    moved, seen = False, set()
    for node in list(graph.nodes):
        if id(node) in seen or not node.outputs:
            continue
        site = None
        with outcome.refusing(node.name, node.op):
            site = _site(graph, node)
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
    """The longest map that starts at a node, or None. Raises Refused as ``find_affine`` does."""
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
    """The MatMul whose bias an Add node adds, or None."""
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
    """Whether a tensor is x / root or x * (1 / root), where root is the square root of a variance or of a sum."""
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
    """The node that computes a tensor, before Expand nodes and before ``op`` nodes with a constant operand."""
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


def _plans(site: Affine, back: _Path, forth: _Path) -> Iterator[tuple[str, _Map, _Map, _Map]]:
    """The ways to divide a map, best first: (description, part moved back, part moved forward, part that stays)."""
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
        whole = False  # x + t / s can overflow where s * x + t does not
    yield "scale into what precedes it, shift into what follows it", (scale, zero), (one, shift), nothing
    if whole:
        yield "shift into what precedes it, scale into what follows it", (one, ratio), (scale, zero), nothing
    if len(site.nodes) == 1 and site.nodes[0].op != "BatchNormalization":
        return
    stays = "; ".join(dict.fromkeys(reason for reason in (back.no_shift, forth.no_shift) if reason))
    yield f"scale into what precedes it; the shift stays: {stays}", (scale, zero), nothing, (one, shift)
    if whole:
        yield f"scale into what follows it; the shift stays: {stays}", nothing, (scale, zero), (one, ratio)


def _backward(graph: gs.Graph, site: Affine) -> _Path:
    """The path back to the linear or norm that computes the input of a map."""
    tensor, layout, reader = site.input, Layout(site.axis), site.nodes[0]
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
            tensor, layout = before(node, layout)
        _check_axis(end, tensor, layout.axis)
    except Refused as error:
        return _Path([], str(error), str(error))
    path = _Path.to(site, [(end, layout)])
    if not isinstance(end, Linear) and not (operator(end).beta and edit.has_input(end, operator(end).gamma + 1)):
        path.no_shift = path.no_shift or f"{end.op} has no bias"
    return path


def _forward(graph: gs.Graph, site: Affine) -> _Path:
    """The path forward to all linears that read the output of a map."""
    try:
        return _Path.to(site, readers(graph, site.output, Layout(site.axis)))
    except Refused as error:
        return _Path([], str(error), str(error))


def _end(graph: gs.Graph, node: gs.Node) -> Linear | gs.Node | None:
    """The linear or norm whose result a node computes, or None. Raises Refused for a linear without a view."""
    known = operator(node)
    if known.weighted:
        linear = view_beside(graph, node, "precedes")
        return linear if linear.bias_node is None else None
    if known.kind in ("instance_norm", "norm") and all(t.is_empty() for t in node.outputs[1:]):
        parameters = [t for t in node.inputs[known.gamma : known.gamma + 1 + known.beta] if not t.is_empty()]
        return node if all(isinstance(t, gs.Constant) and len(t.shape) == 1 for t in parameters) else None
    return _biased(graph, node)


def _check_axis(end: Linear | gs.Node, tensor: gs.Tensor, axis: int | None) -> None:
    """Raises Refused unless ``axis`` of a tensor is the channel axis of the linear or norm that writes the tensor."""
    if isinstance(end, Linear):
        check_axis(tensor, axis, end.out_axis, end.node.op)
        return
    check_axis(tensor, axis, end.attrs.get("axis", operator(end).norm_axis), end.op)
    if operator(end).norm_axis == -1:  # not a norm over several axes
        check_axis(tensor, axis, -1, end.op)


def _move(graph: gs.Graph, site: Affine, back, backward: _Map, forth, forward: _Map, left: _Map) -> None:
    """Carries out a plan. Raises Refused, with nothing changed."""
    writes = []
    for end, layout in back if _matters(backward) else ():
        if isinstance(end, Linear):
            scale, shift = _expand(layout, backward, end, end.channels[0])
            writes.append((end, end.rescaled(out_scale=scale, out_shift=shift)))
        else:
            writes.append((end, norm_parameters(end, *backward)))
    for end, layout in forth if _matters(forward) else ():
        scale, shift = _expand(layout, forward, end, end.channels[1])
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


def _expand(layout: Layout, part: _Map, end: Linear, channels: int) -> _Map:
    scale, shift = layout.expand(part[0]), layout.expand(part[1])
    if scale.ndim and scale.size != channels:
        raise Refused(f"it has {scale.size} channels, but {end.name} has {channels}: the shapes in the file are wrong")
    return scale, shift


def _matters(part: _Map) -> bool:
    return bool(np.any(part[0] != 1) or np.any(part[1] != 0))


def _shorten(graph: gs.Graph, site: Affine, reason: str) -> str:
    """Writes a run of nodes as at most one Mul and one Add. Raises Refused where the run is no longer than that."""
    try:
        parts = _parts(site, site.scale, site.shift)
    except Refused:
        raise Refused(reason) from None
    if len(parts) >= len(site.nodes) or len(site.nodes) == 1:
        raise Refused(reason)
    _leave(graph, site, parts)
    return f"{len(site.nodes)} nodes merged into {len(parts)}; they stay: {reason}"


def _parts(site: Affine, scale: np.ndarray, shift: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The Mul and the Add that compute a map, as (operator, constant), without neutral ones. Raises DoesNotFit."""
    kind = edit.dtype(site.input) or edit.dtype(site.output)
    if kind is None:
        kind = next((np.dtype(t.dtype) for n in site.nodes for t in n.inputs if isinstance(t, gs.Constant)), None)
    parts = [(op, cast(values, kind or np.dtype(np.float32))) for op, values in (("Mul", scale), ("Add", shift))]
    parts = [(op, values) for op, values in parts if np.any(values != (op == "Mul"))]
    if site.axis is None or not parts:
        return parts
    size = edit.rank(site.input)
    if size is None:
        raise Refused("the rank of its input is unknown")
    return [(op, values.reshape(-1, *[1] * (size - 1 - site.axis))) for op, values in parts]


def _leave(graph: gs.Graph, site: Affine, parts: list[tuple[str, np.ndarray]]) -> None:
    """Replaces the nodes of a map by ``parts``."""
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
        with outcome.refusing(node.name, "Gemm: alpha and beta stay"):
            linear = view(graph, node)
            check_growth(linear)
            linear.install(*linear.rescaled())
            outcome.change(node.name, f"Gemm: {' and '.join(factors)} into its weight and bias")

"""Channel-wise scales and shifts folded into weights.

    backward   s * (W x + b) + t          =  (diag(s) W) x + (s * b + t)
    forward    W (s * x + t) + b          =  (W diag(s)) x + (b + W t)
    norm       s * (g * n(x) + e) + t     =  (s * g) n(x) + (s * e + t)
    split      s * x + t                  =  s back, t forward; or s forward, t / s back; or s alone

BatchNormalization, LayerScale, input normalization and any other constant per-channel Mul, Div, Add or Sub are the same
map (``affine``). It goes into the linear or norm before it, or into *every* linear behind it, through the operators that
commute with it: Transpose, Reshape, pooling; a positive scale also through ReLU and MaxPool. A shift never crosses
zero padding. What cannot move exactly stays, and the refusal says which part and why.

Left as they are: the affine part of a decomposed norm (it is the norm's gamma and beta), and a scalar factor right
behind a product of two activations (it belongs to GELU or HardSwish, which runtimes fuse).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes import edit
from channelfold.passes.affine import Affine, Blocked, Vector, after, as_affine, before
from channelfold.passes.base import Context, Outcome, Pass
from channelfold.passes.linear import LINEAR_OPS, Linear, NotLinear, cast, view
from channelfold.runtime.graph_io import constant, free_name, infer_shapes

_NORMS = ("LayerNormalization", "InstanceNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


@dataclass
class _Way:
    """One direction a map can take: where it ends, and what part of it may go there."""

    ends: list[tuple[Linear | gs.Node, Vector]] = field(default_factory=list)
    no_scale: str = ""
    no_shift: str = ""


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Folds BatchNormalization and other constant channel-wise scales and shifts into neighbouring weights."""

    name: ClassVar[str] = "fold-affine"
    kind: ClassVar[Literal["exact", "calibrated", "lossy"]] = "exact"

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        infer_shapes(graph)
        outcome = Outcome()
        tried: dict[str, str] = {}
        moved = True
        while moved:
            moved = False
            tried.clear()
            position = 0
            while position < len(graph.nodes):
                site = _site(graph, graph.nodes[position])
                if site is not None:
                    label = site.nodes[0].name
                    ops = "+".join(node.op for node in site.nodes)
                    try:
                        what = _fold(graph, site)
                    except (Blocked, NotLinear, OverflowError) as error:
                        tried[label] = f"{ops}: {error}"
                    else:
                        outcome.change(label, f"{ops}: {what}")
                        moved = True
                        position = max(position - len(site.nodes) - 2, -1)
                position += 1
        for label, reason in tried.items():
            outcome.refuse(label, reason, reason.split(": ", 1)[1])
        _fold_gemm_factors(graph, outcome)
        return outcome


def _site(graph: gs.Graph, node: gs.Node) -> Affine | None:
    """The longest map that starts at a node; None when the node is in the middle of one, or part of something else."""
    first = as_affine(node)
    if first is None or _is_bias(graph, node):
        return None
    source = edit.producer(first.input)
    if source is not None and edit.sole_consumer(graph, first.input) is node:
        previous = as_affine(source)
        if previous is not None and not _is_bias(graph, source) and not _is_own_factor(source) and previous.then(first):
            return None
    if _is_own_factor(node):
        return None
    run = first
    while (follower := edit.sole_consumer(graph, run.output)) is not None:
        more = as_affine(follower)
        joined = run.then(more) if more is not None and more.input is run.output else None
        if joined is None or not any(follower is n for n in graph.nodes):
            break
        run = joined
    return run


def _is_bias(graph: gs.Graph, node: gs.Node) -> bool:
    """Whether an Add is the bias of the MatMul in front of it."""
    if node.op != "Add":
        return False
    for tensor in node.inputs:
        source = edit.producer(tensor)
        if source is not None and source.op == "MatMul":
            try:
                return view(graph, source).bias_node is node
            except NotLinear:
                return False
    return False


def _is_own_factor(node: gs.Node) -> bool:
    """Whether a scalar Mul or Div stands right behind a product of two activations."""
    if node.op not in ("Mul", "Div"):
        return False
    affine = as_affine(node)
    return affine is not None and affine.axis is None and _is_product(edit.producer(affine.input))


def _is_product(node: gs.Node | None) -> bool:
    return (
        node is not None
        and node.op in ("Mul", "Div")
        and not any(isinstance(tensor, gs.Constant) for tensor in node.inputs)
    )


def _fold(graph: gs.Graph, site: Affine) -> str:
    """Moves as much of a map as can go. Returns what was done; raises Blocked with the reason, nothing changed."""
    if _is_product(edit.producer(site.input)) and site.axis is not None:
        return _shorten(graph, site, "it is the affine part of a norm")
    back, forth = _backward(graph, site), _forward(graph, site)
    one, zero = np.ones_like(site.scale), np.zeros_like(site.shift)
    scales, shifts = bool(np.any(site.scale != 1)), bool(np.any(site.shift != 0))
    gain = len(site.nodes) > 1 or site.nodes[0].op == "BatchNormalization"
    plans = []  # (possible, scale and shift that go back, that go forth, that stay, words)
    back_all = not (scales and back.no_scale) and not (shifts and back.no_shift)
    forth_all = not (scales and forth.no_scale) and not (shifts and forth.no_shift)
    plans.append((back_all, (site.scale, site.shift), (one, zero), (one, zero), "into what precedes it"))
    plans.append((forth_all, (one, zero), (site.scale, site.shift), (one, zero), "into what follows it"))
    if scales and shifts:
        ratio = np.divide(site.shift, site.scale, out=zero.copy(), where=site.scale != 0)
        whole = not np.any(site.shift[site.scale == 0])
        plans += [
            (not back.no_scale and not forth.no_shift, (site.scale, zero), (one, site.shift), (one, zero),
             "scale into what precedes it, shift into what follows it"),
            (whole and not forth.no_scale and not back.no_shift, (one, ratio), (site.scale, zero), (one, zero),
             "shift into what precedes it, scale into what follows it"),
            (gain and not back.no_scale, (site.scale, zero), (one, zero), (one, site.shift),
             f"scale into what precedes it; the shift stays: {back.no_shift}; {forth.no_shift}"),
            (gain and whole and not forth.no_scale, (one, zero), (site.scale, zero), (one, ratio),
             f"scale into what follows it; the shift stays: {back.no_shift}; {forth.no_shift}"),
        ]  # fmt: skip
    for possible, backward, forward, left, words in plans:
        if possible:
            _move(graph, site, back, forth, backward, forward, left)
            return words
    reasons = [back.no_scale if scales else back.no_shift, forth.no_scale if scales else forth.no_shift]
    return _shorten(graph, site, "; ".join(dict.fromkeys(r for r in reasons if r)))


def _backward(graph: gs.Graph, site: Affine) -> _Way:
    """The way to the linear or norm that the map's input comes from."""
    tensor, v = site.input, Vector(site.axis)
    way = _Way()
    try:
        reader = site.nodes[0]
        while True:
            node = edit.producer(tensor)
            if node is None or not any(node is n for n in graph.nodes):
                raise Blocked("an input of the graph precedes it")
            if edit.sole_consumer(graph, tensor) is not reader:
                raise Blocked(f"{node.op} in front of it has other readers")
            end = _ends_at(graph, node, tensor)
            if end is not None:
                _check_axis(end, tensor, v.axis)
                way.ends = [(end, v)]
                break
            reader = node
            tensor, v = before(node, v)
        _limit(way, site, v)
        if isinstance(end, gs.Node) and len(end.inputs) < 3:
            way.no_shift = way.no_shift or f"{end.op} has no bias"
    except (Blocked, NotLinear) as error:
        way.no_scale = way.no_shift = str(error)
    return way


def _forward(graph: gs.Graph, site: Affine) -> _Way:
    """The way to all the linears that read the map's output."""
    way = _Way()
    try:
        pending = [(site.output, Vector(site.axis))]
        while pending:
            tensor, v = pending.pop()
            if edit.is_output(graph, tensor) or not tensor.outputs:
                raise Blocked("its result is an output of the graph")
            for node in edit.consumers(tensor):
                if not any(node is n for n in graph.nodes):
                    raise Blocked("a subgraph reads its result")
                if node.op in LINEAR_OPS:
                    linear = view(graph, node)
                    if linear.data is not tensor or sum(t is tensor for t in node.inputs) != 1:
                        raise Blocked(f"{node.name} reads it as a weight")
                    _check_in_axis(linear, tensor, v.axis)
                    way.ends.append((linear, v))
                    _limit(way, site, v)
                    if linear.padded:
                        way.no_shift = way.no_shift or f"a shift does not pass the zero padding of {node.op}"
                    continue
                if node.inputs[0] is not tensor or sum(t is tensor for t in node.inputs) != 1:
                    raise Blocked(f"{node.op} follows it")
                pending.append(after(node, v))
    except (Blocked, NotLinear) as error:
        way.no_scale = way.no_shift = str(error).replace("is in between", "follows it")
    return way


def _limit(way: _Way, site: Affine, v: Vector) -> None:
    if v.positive and np.any(site.scale <= 0):
        count = int(np.sum(site.scale <= 0))
        way.no_scale = way.no_scale or f"{count} scale(s) are not positive, which does not pass {v.positive}"
        way.no_shift = way.no_shift or way.no_scale
    way.no_shift = way.no_shift or v.no_shift


def _ends_at(graph: gs.Graph, node: gs.Node, tensor: gs.Tensor) -> Linear | gs.Node | None:
    """The linear or norm whose output ``tensor`` is."""
    if node.op in LINEAR_OPS:
        linear = view(graph, node)
        return linear if linear.output is tensor else None
    if _is_bias(graph, node):
        source = next(s for t in node.inputs if (s := edit.producer(t)) is not None and s.op == "MatMul")
        return view(graph, source)
    if node.op in _NORMS and all(isinstance(t, gs.Constant) and len(t.shape) == 1 for t in node.inputs[1:]):
        return None if any(t.outputs for t in node.outputs[1:]) else node
    return None


def _check_axis(end: Linear | gs.Node, tensor: gs.Tensor, axis: int | None) -> None:
    if axis is None:
        return
    size = edit.rank(tensor)
    if isinstance(end, Linear):
        expected = end.out_axis if end.out_axis >= 0 or size is None else end.out_axis + size
    elif end.op == "InstanceNormalization":
        expected = 1
    else:
        last = end.attrs.get("axis", -1)
        expected = size - 1 if size is not None and last in (-1, size - 1) else None
    if expected != axis:
        raise Blocked(
            f"it scales axis {axis}, not the channels of {end.op if isinstance(end, gs.Node) else end.node.op}"
        )


def _check_in_axis(linear: Linear, tensor: gs.Tensor, axis: int | None) -> None:
    size = edit.rank(tensor)
    expected = linear.in_axis if linear.in_axis >= 0 or size is None else linear.in_axis + size
    if axis is not None and expected != axis:
        raise Blocked(f"it scales axis {axis}, not the channels that {linear.node.op} reads")


def _move(graph, site: Affine, back: _Way, forth: _Way, backward, forward, left) -> None:
    """Installs a plan: first everything is computed (and may still raise), then it is written."""
    writes = []
    if _matters(backward):
        for end, v in back.ends:
            scale, shift = v.expand(backward[0]), v.expand(backward[1])
            if isinstance(end, Linear):
                writes.append((end, end.rescaled(out_scale=scale, out_shift=shift)))
            else:
                writes.append((end, _norm_parameters(end, scale, shift)))
    if _matters(forward):
        for end, v in forth.ends:
            writes.append((end, end.rescaled(in_scale=v.expand(forward[0]), in_shift=v.expand(forward[1]))))
    for end, values in writes:
        if isinstance(end, Linear):
            end.install(*values)
        else:
            _set_norm(graph, end, values)
    _replace(graph, site, *left)


def _matters(part: tuple[np.ndarray, np.ndarray]) -> bool:
    return bool(np.any(part[0] != 1) or np.any(part[1] != 0))


def _norm_parameters(node: gs.Node, scale: np.ndarray, shift: np.ndarray) -> list[np.ndarray]:
    gamma = edit.value(node.inputs[1])
    out = [cast(np.asarray(gamma, np.float64) * scale, gamma.dtype)]
    if len(node.inputs) > 2:
        beta = edit.value(node.inputs[2])
        out.append(cast(np.asarray(beta, np.float64) * scale + shift, beta.dtype))
    return out


def _set_norm(graph: gs.Graph, node: gs.Node, parameters: list[np.ndarray]) -> None:
    for index, values in enumerate(parameters, 1):
        edit.set_input(node, index, constant(graph, f"{node.inputs[index].name}_folded", values))


def _shorten(graph: gs.Graph, site: Affine, reason: str) -> str:
    """Writes a run of more than two nodes as one Mul and one Add. Raises Blocked when it is short already."""
    needed = int(np.any(site.scale != 1)) + int(np.any(site.shift != 0))
    if len(site.nodes) <= needed or len(site.nodes) == 1:
        raise Blocked(reason)
    _replace(graph, site, site.scale, site.shift)
    return f"{len(site.nodes)} nodes merged into {needed}; they stay: {reason}"


def _replace(graph: gs.Graph, site: Affine, scale: np.ndarray, shift: np.ndarray) -> None:
    """Puts a Mul and an Add, as far as they are needed, in the place of a run of nodes."""
    parts = [(op, values) for op, values, idle in (("Mul", scale, 1), ("Add", shift, 0)) if np.any(values != idle)]
    if not parts and edit.bypass(graph, site.input, list(site.nodes), site.output):
        return
    last = site.nodes[-1]
    dtype = next((t.dtype for n in site.nodes for t in n.inputs if isinstance(t, gs.Constant)), np.dtype(np.float32))
    size = edit.rank(site.output) or edit.rank(site.input) or 0
    tensor, new = site.input, []
    for op, values in parts or [("Identity", None)]:
        inputs = [tensor]
        if values is not None:
            vector = values if site.axis is None else values.reshape(-1, *[1] * (size - 1 - site.axis))
            inputs.append(constant(graph, f"{last.name}_{op.lower()}", cast(np.asarray(vector), np.dtype(dtype))))
        tensor = gs.Variable(free_name(graph, f"{last.name}_{op.lower()}_output"), site.output.dtype, site.output.shape)
        new.append(gs.Node(op, f"{last.name}_{op.lower()}", inputs=inputs, outputs=[tensor]))
    position = next(i for i, node in enumerate(graph.nodes) if node is last)
    graph.nodes[position + 1 : position + 1] = new
    edit.remove(graph, list(site.nodes))
    edit.set_output(new[-1], 0, site.output)


def _fold_gemm_factors(graph: gs.Graph, outcome: Outcome) -> None:
    """alpha * A B + beta * C with constant B and C becomes A B' + C'."""
    for node in graph.nodes:
        if node.op != "Gemm" or (node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)) == (1.0, 1.0):
            continue
        try:
            linear = view(graph, node)
            weight, bias = linear.rescaled()
        except (NotLinear, OverflowError) as error:
            outcome.refuse(node.name, f"Gemm: alpha and beta stay: {error}", "Gemm alpha and beta")
            continue
        linear.install(weight, bias)
        outcome.change(node.name, "Gemm: alpha and beta into its weight and bias")

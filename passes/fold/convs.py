"""Two convolutions in a row merged into one.

    V (W x + b) + c          =  (V W) x + (V b + c)
    K[o, i, u, v]            =  sum over m of V[o, m, u] * W[m, i, v]
    pointwise -> depthwise   :  K[o, i, u] = V[o, u] * W[o, i]

Axis by axis, with stride s, dilation d and padding p of W, and t, e, q of the conv V behind it::

    z[j] = sum over v of W[v] * x[s j - p + d v]        y[n] = sum over u of V[u] * z[t n - q + e u]
    y[n] = sum over u, v of K[u, v] * x[s t n - (p + s q) + s e u + d v]

so the merged conv has stride s t, padding p + s q at either end and, where one kernel has a single tap, the dilation of
the other: d, or s e. It is exact where every z[j] that V reads as padding is what W makes of the zeros around x:

    one tap in W             for j < 0 and j >= size(z), x[s j - p] is outside x: W makes 0
    one tap in V, q = 0      V reads no padding
    anything else            refused: two taps each are no regular kernel, and a padded V sees 0, not W x

A bias b in front of padding is refused: V sees 0 there, and the merged conv V b. The sizes agree, since
floor((floor(a / s) + q) / t) = floor((a + s q) / (s t)). The result has gcd(groups of W, groups of V) groups.

This is how a re-parameterizable layer such as CLR (1x1 -> depthwise 3x3 -> BatchNormalization) becomes one conv. But a
pointwise conv merged with a depthwise k x k one takes about k^2 times its multiply-accumulates (MACs), so that
``max_macs_growth`` has to allow it. They are counted per output, as if there were no border. A conv that returns its
input is removed.

Run ``fold-affine`` before: a BatchNormalization in between is in the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, DoesNotFit, Outcome, Refused
from channelfold.passes.fold import MergeConvs
from channelfold.passes.layers.linear import Linear, cast, view
from channelfold.runtime.io import edit


class Work(MergeConvs):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        while self._merge_everywhere(graph, outcome):  # a merge can make a neighbouring merge affordable
            outcome.refused.clear()
        return outcome

    def _merge_everywhere(self, graph: gs.Graph, outcome: Outcome) -> bool:
        """Tries every site once; returns whether anything was merged or removed."""
        before = len(outcome.changed)
        for node in list(graph.nodes):  # a merge may take the nodes that made a weight out of it
            if not _is_conv(node):
                continue
            try:
                if _remove_identity(graph, node):
                    outcome.change(node.name, "Conv returns its input")
                elif (base := edit.producer(node.inputs[0])) is not None and _is_conv(base):
                    outcome.change(node.name, f"{base.name} merged into it, {self._merge(graph, base, node)}")
            except Refused as error:
                outcome.refuse(node.name, f"Conv: {error}", error.code)
        edit.sweep(graph)
        return len(outcome.changed) > before

    def _merge(self, graph: gs.Graph, base: gs.Node, node: gs.Node) -> str:
        """Merges ``base`` into ``node``; returns the cost in words. Raises Refused, with nothing changed."""
        if edit.sole_consumer(graph, base.outputs[0]) is not node:
            raise Refused("the Conv in front of it has other readers, or is an output of the graph")
        first, second = _view(graph, base, "the Conv in front of it"), _view(graph, node, "it")
        inner, outer = _Window.of(first), _Window.of(second)
        window, bias = outer.after(inner), first.bias()
        if bias is not None and not np.any(bias):
            bias = None
        if bias is not None and any(outer.pads):
            raise Refused("the Conv in front of it has a bias, which does not pass its zero padding")
        growth = _growth(first, second, outer)
        if growth > self.max_macs_growth:
            limit = f"max_macs_growth is {self.max_macs_growth:g}"
            reason = f"merged with the Conv in front of it, it would take {growth:.3g} times the MACs of both ({limit})"
            raise Refused(reason, f"too many MACs ({limit})")
        weight = _checked(_product(first, second), second.dtype)
        if bias is not None:
            own = second.bias()
            bias = cast(second.respond(second.weight(), bias) + (0 if own is None else own), second.dtype)
        second.install(weight, bias)
        node.attrs.pop("auto_pad", None)
        node.attrs |= window.attributes(math.gcd(first.groups, second.groups))
        edit.set_input(node, 0, base.inputs[0])
        edit.detach(base)
        for maker in reversed(first.chain):
            if not maker.outputs[0].outputs and not edit.is_output(graph, maker.outputs[0]):
                edit.detach(maker)
        return f"{growth:.3g} times the MACs"


@dataclass(frozen=True)
class _Window:
    """The geometry of a Conv, one entry an axis; ``pads`` has all starts, then all ends."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]

    @classmethod
    def of(cls, conv: Linear) -> _Window:
        attrs, axes = conv.node.attrs, len(conv.kernel)
        if (mode := attrs.get("auto_pad", "NOTSET")) not in ("NOTSET", "VALID"):
            raise Refused(f"{conv.name} pads by itself ({mode})")
        pads = attrs.get("pads") if mode != "VALID" else None
        ones = [1] * axes
        return cls(
            conv.kernel,
            tuple(attrs.get("strides") or ones),
            tuple(attrs.get("dilations") or ones),
            tuple(pads or [0] * 2 * axes),
        )

    def after(self, base: _Window) -> _Window:
        """The window of this Conv merged with the Conv in front. Raises Refused where there is no such window."""
        axes = len(self.kernel)
        for axis in range(axes):
            if base.kernel[axis] == 1 or (self.kernel[axis] == 1 and not any(self.pads[axis::axes])):
                continue
            if self.kernel[axis] > 1:
                raise Refused("it and the Conv in front of it both look at several places along one axis")
            raise Refused("it pads what a Conv with more than one place to look at made")
        return _Window(
            tuple(a * b for a, b in zip(base.kernel, self.kernel, strict=True)),
            tuple(s * t for s, t in zip(base.strides, self.strides, strict=True)),
            tuple(
                d if k > 1 else s * e if j > 1 else 1
                for d, k, s, e, j in zip(
                    base.dilations, base.kernel, base.strides, self.dilations, self.kernel, strict=True
                )
            ),
            tuple(p + s * q for p, s, q in zip(base.pads, base.strides * 2, self.pads, strict=True)),
        )

    def attributes(self, group: int) -> dict[str, int | list[int]]:
        return {
            "dilations": list(self.dilations),
            "group": group,
            "kernel_shape": list(self.kernel),
            "pads": list(self.pads),
            "strides": list(self.strides),
        }


def _is_conv(node: gs.Node) -> bool:
    return node.op == "Conv" and edit.is_standard(node) and bool(node.outputs)


def _view(graph: gs.Graph, node: gs.Node, subject: str) -> Linear:
    try:
        return view(graph, node)
    except Refused as error:
        raise Refused(f"{subject} cannot be merged: {error}") from None


def _remove_identity(graph: gs.Graph, node: gs.Node) -> bool:
    """Removes a Conv that returns its input; returns whether it was removed (names at both ends may forbid it)."""
    try:
        conv = view(graph, node)
        window = _Window.of(conv)
    except Refused:
        return False
    outs, ins = conv.channels
    if outs != ins or any(s != 1 for s in window.strides):
        return False
    axes = len(window.kernel)
    starts, ends = window.pads[:axes], window.pads[axes:]
    taps = tuple(p // d for p, d in zip(starts, window.dilations, strict=True))  # where x[n] meets y[n]
    for tap, k, d, p, q in zip(taps, window.kernel, window.dilations, starts, ends, strict=True):
        if tap * d != p or not 0 <= tap < k or q != d * (k - 1 - tap):
            return False
    channels, weight = np.arange(outs), conv.weight()
    if np.any(weight[channels, channels % weight.shape[1], *taps] != 1) or np.count_nonzero(weight) != outs:
        return False
    bias = conv.bias()
    if bias is not None and np.any(bias):
        return False
    return edit.bypass(graph, node.inputs[0], [node], node.outputs[0])


def _growth(first: Linear, second: Linear, outer: _Window) -> float:
    """MACs of the merged Conv divided by the MACs of both, borders not considered."""
    mids, ins = first.channels
    outs = second.channels[0]
    taps = math.prod(first.kernel), math.prod(second.kernel)
    base = (
        mids * (ins // first.groups) * taps[0] * math.prod(outer.strides)
    )  # outputs of the first for each output of the second
    both = base + outs * (mids // second.groups) * taps[1]
    return outs * (ins // math.gcd(first.groups, second.groups)) * math.prod(taps) / both


def _product(first: Linear, second: Linear) -> np.ndarray:
    """K (out, in / gcd of the groups, *kernel) in float64, from V (second) and W (first)."""
    v, w = second.weight().astype(np.float64), first.weight().astype(np.float64)
    outs, mids, axes = v.shape[0], w.shape[0], w.ndim - 2
    per_group = w.shape[1] * first.groups // math.gcd(first.groups, second.groups)
    wide = np.zeros((mids, per_group, *first.kernel))  # W, with zeros for the inputs of other groups
    starts = np.arange(mids) // (mids // first.groups) * w.shape[1] % per_group
    np.put_along_axis(
        wide.reshape(mids, per_group, -1),
        (starts[:, None] + np.arange(w.shape[1]))[:, :, None],
        w.reshape(mids, w.shape[1], -1),
        axis=1,
    )
    groups = second.groups
    v = v.reshape(groups, outs // groups, mids // groups, -1).swapaxes(2, 3).reshape(groups, -1, mids // groups)
    k = (v @ wide.reshape(groups, mids // groups, -1)).reshape(outs, *second.kernel, per_group, *first.kernel)
    order = [0, 1 + axes, *(a for axis in range(axes) for a in (1 + axis, 2 + axes + axis))]
    kernel = [a * b for a, b in zip(second.kernel, first.kernel, strict=True)]
    return k.transpose(order).reshape(outs, per_group, *kernel)


def _checked(weight: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A weight in ``dtype``. Raises DoesNotFit where it is too large or, as a whole, too small for it."""
    peak = np.abs(weight).max(initial=0)
    if 0 < peak < float(ml_dtypes.finfo(dtype).smallest_normal):
        raise DoesNotFit(f"the merged weight, {peak:.3g} at most, is too small for {dtype}")
    return cast(weight, dtype)

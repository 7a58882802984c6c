"""Two convolutions in a row merged into one.

    V (W x + b) + c          =  (V W) x + (V b + c)
    K[o, i, u, v]            =  sum over m of V[o, m, u] * W[m, i, v]
    pointwise -> depthwise   :  K[o, i, u] = V[o, u] * W[o, i]

Axis by axis, with stride s, dilation d and padding p of W, and t, e, q of the conv V behind it::

    z[j] = sum over v of W[v] * x[s j - p + d v]        y[n] = sum over u of V[u] * z[t n - q + e u]
    y[n] = sum over u, v of K[u, v] * x[s t n - (p + s q) + s e u + d v]

The merged conv has stride s t and padding p + s q at either end. Where one kernel has a single tap, the merged conv has
the dilation of the other kernel, d or s e. The merge is exact where W makes zeros of the zeros that V pads with:

    one tap in W             for j < 0 and j >= size(z), x[s j - p] is outside x: W makes 0
    one tap in V, q = 0      V reads no padding
    anything else            refused: two taps each make no regular kernel, and a padded V reads 0, not W x

A bias b in front of padding is refused, because V reads 0 there and the merged conv would read V b. The sizes agree:
floor((floor(a / s) + q) / t) = floor((a + s q) / (s t)). The merged conv has gcd(groups of W, groups of V) groups.

A re-parameterizable layer such as CLR (1x1 -> depthwise 3x3 -> BatchNormalization) becomes one conv. But a pointwise
conv merged with a depthwise k x k conv takes about k^2 times the multiply-accumulates (MACs), so that
``max_macs_growth`` has to allow the merge. MACs are counted per output, without borders. A conv that returns its input
is removed.

Run ``fold-affine`` before, because a BatchNormalization between two convs prevents the merge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.fold import MergeConvs
from channelfold.passes.layers.linear import Linear, cast, cast_weight, view, view_beside
from channelfold.runtime.io import edit


class Work(MergeConvs):
    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        while self._merge_everywhere(graph, outcome):  # a merge can make a neighbouring merge cheap enough
            outcome.refused.clear()
        return outcome

    def _merge_everywhere(self, graph: gs.Graph, outcome: Outcome) -> bool:
        """Tries every site once; returns whether a Conv was merged or removed."""
        before = len(outcome.changed)
        for node in list(graph.nodes):
            if not _is_conv(node):
                continue
            with outcome.refusing(node.name, "Conv"):
                if _remove_identity(graph, node):
                    outcome.change(node.name, "Conv returns its input")
                elif (base := edit.producer(node.inputs[0])) is not None and _is_conv(base):
                    outcome.change(node.name, f"{base.name} merged into it, {self._merge(graph, base, node)}")
        merged = len(outcome.changed) > before
        if merged:
            edit.remove_dead(graph)  # such as the nodes that made the weight of a merged Conv
        return merged

    def _merge(self, graph: gs.Graph, base: gs.Node, node: gs.Node) -> str:
        """Merges ``base`` into ``node``; returns the cost in words. Raises Refused, with nothing changed."""
        if edit.sole_consumer(graph, base.outputs[0]) is not node:
            raise Refused("the Conv in front of it has other readers, or is an output of the graph")
        first, second = view_beside(graph, base, "precedes"), view(graph, node)
        inner, outer = _Window.of(first), _Window.of(second)
        window, bias = outer.after(inner), first.bias()
        if bias is not None and not np.any(bias):
            bias = None
        if bias is not None and outer.pads.any():
            raise Refused("the Conv in front of it has a bias, which does not pass its zero padding")
        growth = _growth(first, second, outer)
        if growth > self.max_macs_growth:
            limit = f"max_macs_growth is {self.max_macs_growth:g}"
            reason = f"merged with the Conv in front of it, it would take {growth:.3g} times the MACs of both ({limit})"
            raise Refused(reason, f"too many MACs ({limit})")
        weight = cast_weight(_product(first, second), second.dtype)
        if bias is not None:
            own = second.bias()
            bias = cast(second.respond(second.weight(), bias) + (0 if own is None else own), second.dtype)
        second.install(weight, bias)
        node.attrs.pop("auto_pad", None)
        node.attrs |= window.attributes(math.gcd(first.groups, second.groups))
        edit.set_input(node, 0, base.inputs[0])
        edit.detach(base)
        return f"{growth:.3g} times the MACs"


@dataclass(frozen=True)
class _Window:
    """The geometry of a Conv, int64 arrays with one entry an axis; ``pads`` has a row of starts and a row of ends."""

    kernel: np.ndarray
    strides: np.ndarray
    dilations: np.ndarray
    pads: np.ndarray

    @classmethod
    def of(cls, conv: Linear) -> _Window:
        attrs, axes = conv.node.attrs, len(conv.kernel)
        if (mode := attrs.get("auto_pad", "NOTSET")) not in ("NOTSET", "VALID"):
            raise Refused(f"{conv.name} pads by itself ({mode})")
        pads = (attrs.get("pads") if mode != "VALID" else None) or [0] * 2 * axes
        strides, dilations = (attrs.get(name) or [1] * axes for name in ("strides", "dilations"))
        return cls(np.array(conv.kernel), np.array(strides), np.array(dilations), np.array(pads).reshape(2, axes))

    def after(self, base: _Window) -> _Window:
        """The window of this Conv merged with the Conv in front. Raises Refused where there is no such window."""
        wide = base.kernel > 1
        if np.any(wide & (self.kernel > 1)):
            raise Refused("it and the Conv in front of it both have a kernel along one axis")
        if np.any(wide & self.pads.any(axis=0)):
            raise Refused("it pads the result of a Conv with a kernel")
        behind = np.where(self.kernel > 1, base.strides * self.dilations, 1)
        return _Window(
            base.kernel * self.kernel,
            base.strides * self.strides,
            np.where(wide, base.dilations, behind),
            base.pads + base.strides * self.pads,
        )

    def attributes(self, group: int) -> dict[str, int | list[int]]:
        return {
            "dilations": self.dilations.tolist(),
            "group": group,
            "kernel_shape": self.kernel.tolist(),
            "pads": self.pads.reshape(-1).tolist(),
            "strides": self.strides.tolist(),
        }


def _is_conv(node: gs.Node) -> bool:
    return node.op == "Conv" and edit.is_standard(node) and bool(node.outputs)


def _remove_identity(graph: gs.Graph, node: gs.Node) -> bool:
    """Removes a Conv that returns its input; returns False also where names at both ends must stay."""
    try:
        conv = view(graph, node)
        window = _Window.of(conv)
    except Refused:
        return False
    outs, ins = conv.channels
    starts, ends = window.pads
    taps = starts // window.dilations  # where x[n] meets y[n]
    centred = (taps * window.dilations == starts) & (taps >= 0) & (taps < window.kernel)
    centred &= ends == window.dilations * (window.kernel - 1 - taps)
    if outs != ins or np.any(window.strides != 1) or not centred.all():
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
    outputs = int(outer.strides.prod())  # of the first Conv, for each output of the second Conv
    base = mids * (ins // first.groups) * taps[0] * outputs
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

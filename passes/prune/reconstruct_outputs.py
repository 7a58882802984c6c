"""The error that a cut and its reconstruction leave, corrected by the linears behind the cut, one after another.

    W' = W + C_ex (C_xx + r)^-1,      b' = b + E[e] - (W' - W) E[x],      r = ridge * diag C_xx

x is the input of a linear after the cut, e the difference of its result from the uncut model on the same sample. Where
a shortcut is added to the result, e is the difference of the sum: each layer also corrects the error of the layers
before. So every linear is corrected on the results of the corrected linears in front of it, with two partial runs for
each.

The ridge pulls towards the present weights and is chosen for each linear: fitted to one half of the samples, it has to
lessen the error on the other half. Where no ridge does, nothing changes, so that few samples do no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import DoesNotFit
from channelfold.passes.layers.linear import Linear, cast, view
from channelfold.passes.prune.reconstruct import MAX_FEATURES
from channelfold.runtime.data.sources import Data
from channelfold.runtime.io import edit
from channelfold.runtime.io.files import infer_shapes
from channelfold.runtime.stats.observe import rows
from channelfold.runtime.stats.parts import Observed

RIDGES = (1e-1, 1.0, 10.0, 100.0)
_POSITIONS = 256  # taken of each entry along the first axis

Stays = Mapping[str, Sequence[tuple[int, np.ndarray]]]  # the cut axes of a tensor and the positions that stay, by name


def correct(
    graph: gs.Graph,
    whole: gs.Graph,
    nodes: Sequence[gs.Node],
    stays: Stays,
    data: Data,
    progress: Callable[[str, int, int], None],
) -> list[str]:
    """Corrects ``nodes`` of the cut ``graph``, in graph order, towards the uncut graph ``whole``.

    Returns the names of the nodes whose error fell. Convolutions with a kernel, groups or strides stay as they are;
    with a single sample everything does.
    """
    infer_shapes(graph)
    linears = [linear for node in nodes if _fits(linear := view(graph, node))] if len(data) > 1 else []
    changed = []
    for done, linear in enumerate(linears):
        progress("Correcting outputs", done, len(linears))
        halves = (_Errors(), _Errors())
        for number, (x, e) in enumerate(_errors(graph, whole, linear, stays, data)):
            halves[number % 2].add(x, e)
        found = _best(*halves)
        if found is not None and _changed(linear, *found):
            changed.append(linear.name)
    return changed


def _fits(linear: Linear) -> bool:
    flat = all(k == 1 for k in linear.kernel) and all(s == 1 for s in linear.node.attrs.get("strides") or ())
    return flat and not linear.padded and linear.groups == 1 and max(linear.channels) <= MAX_FEATURES


def _target(linear: Linear) -> gs.Tensor:
    """The result of a linear, or its sum with another activation of the same shape."""
    result = linear.output
    add = edit.sole_consumer(linear.graph, result)
    if add is None or add.op != "Add" or any(isinstance(t, gs.Constant) for t in add.inputs):
        return result
    shapes = [tensor.shape for tensor in (result, *add.inputs, add.outputs[0])]
    return add.outputs[0] if shapes[0] is not None and all(s == shapes[0] for s in shapes) else result


def _errors(
    graph: gs.Graph, whole: gs.Graph, linear: Linear, stays: Stays, data: Data
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """x (positions, in) and e (positions, out) of each sample."""
    target, source = _target(linear).name, linear.data.name
    before, after = Observed(whole, [target]), Observed(graph, list(dict.fromkeys([source, target])))
    for feed in data:
        aim, found = before.all(feed)[target], after.all(feed)
        for axis, kept in stays.get(target, ()):
            aim = np.compress(kept, aim, axis=axis)
        parts = (found[source], linear.in_axis), (aim - found[target], linear.out_axis)
        x, e = (rows(values, axis % values.ndim, _POSITIONS).astype(np.float64) for values, axis in parts)
        if len(x) == len(e):
            yield x, e


@dataclass
class _Errors:
    """Sums over positions of z = [x, 1] and of e: z z^T, e z^T and e e."""

    zz: np.ndarray | float = 0.0
    ez: np.ndarray | float = 0.0
    ee: float = 0.0

    def add(self, x: np.ndarray, e: np.ndarray) -> None:
        z = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        self.zz, self.ez, self.ee = self.zz + z.T @ z, self.ez + e.T @ z, self.ee + float(np.vdot(e, e))

    def __add__(self, other: _Errors) -> _Errors:
        return _Errors(self.zz + other.zz, self.ez + other.ez, self.ee + other.ee)

    def fit(self, ridge: float) -> np.ndarray:
        """[W' - W, b' - b], (out, in + 1); with an infinite ridge the bias alone changes."""
        zz, ez = np.asarray(self.zz), np.asarray(self.ez)
        count = zz[-1, -1]
        mean, shift = zz[:-1, -1] / count, ez[:, -1] / count
        covariance = zz[:-1, :-1] / count - np.outer(mean, mean)
        matrix = np.zeros((len(ez), len(mean)))
        if np.isfinite(ridge):
            variance = np.diagonal(covariance)
            inner = covariance + np.diag(ridge * variance + (1e-9 * variance.mean() or 1.0))
            matrix = np.linalg.solve(inner, (ez[:, :-1] / count - np.outer(shift, mean)).T).T
        return np.concatenate([matrix, (shift - matrix @ mean)[:, None]], axis=1)

    def left(self, change: np.ndarray) -> float:
        """The summed squared error after a change."""
        return self.ee - 2 * float(np.vdot(change, self.ez)) + float(np.vdot(change @ self.zz, change))


def _best(a: _Errors, b: _Errors) -> tuple[np.ndarray, np.ndarray] | None:
    """The change of weight (out, in) and bias (out,); None where no fit to one half lessens the error on the other."""
    if not (isinstance(a.zz, np.ndarray) and isinstance(b.zz, np.ndarray)):
        return None
    errors = {ridge: a.left(b.fit(ridge)) + b.left(a.fit(ridge)) for ridge in (*RIDGES, np.inf)}
    ridge = min(errors, key=errors.__getitem__)
    if not errors[ridge] < a.ee + b.ee:
        return None
    change = (a + b).fit(ridge)
    return change[:, :-1], change[:, -1]


def _changed(linear: Linear, weight: np.ndarray, bias: np.ndarray) -> bool:
    """Adds to weight and bias; False, with nothing changed, where a sum does not fit the type."""
    old, before = linear.weight().astype(np.float64), linear.bias()
    new, after = old + weight.reshape(old.shape), bias if before is None else before + bias
    try:
        for values in (new, after):
            cast(values, linear.dtype)
    except DoesNotFit:
        return False
    linear.set_weight(new)
    linear.set_bias(after)
    return True

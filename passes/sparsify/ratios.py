"""How many weights each layer keeps when a share of all weights is removed.

    uniform       the same share of every layer
    equal slope   the tiles with the least energy of all layers: D_l(k), the share of layer l's energy in its k least
                  tiles, is convex, so removing the cheapest remaining tile again and again gives dD_l / dk = const,
                  the least sum of D_l for the number of tiles removed
    sensitivity   each layer keeps weights in proportion to n_l s_l, within [n_l (1 - most), n_l]; weights that a limit
                  does not admit are distributed among the other layers

The sensitivity is ECoFLaP's zeroth-order estimate: two forward runs for each layer and sample, no gradients. With
r_l the root mean square of the weights and z normal,

    L_l(e) = mean over outputs of  || f(w_l + e r_l z) - f(w_l) ||^2 / || f(w_l) ||^2
    s_l    = sqrt( E[L_l(e) + L_l(-e)] / (2 e^2 n_l) )   =   r_l || df / dw_l || / (|| f || sqrt(n_l))

s_l is the change of the outputs for each weight that changes by its own size. The paper differentiates mean(f^2),
which does not move at all where the outputs come out of a normalization; L is zero and flat at e = 0, so the second
difference takes the place of the first.

Sources: Sung et al., ECoFLaP, ICLR 2024; Xu et al., LPViT, ECCV 2024 (equal slopes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import DataError, ModelError
from channelfold.runtime.io.files import export, open_model, read
from channelfold.runtime.io.session import Feed, Session

SAMPLES = 8  # of the calibration data that sensitivities are measured on
_STEP = 1e-2  # of the weights' root mean square: far above the rounding of float16, far below the weights themselves


def proportional(total: int, sizes: Sequence[int], weights: Sequence[float], least: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to ``weights``, but from ``least`` to ``sizes`` each, whose sum is ``total``.

    Raises ValueError where the limits do not allow that sum.
    """
    low, high = np.asarray(least, np.float64), np.asarray(sizes, np.float64)
    if not low.sum() <= total <= high.sum():
        raise ValueError(f"{total} is not within {low.sum():.0f} to {high.sum():.0f}")
    peak = max(weights)
    share = np.maximum(np.asarray(weights) / peak, 1e-12) if peak > 0 else np.ones(len(low))
    # clip(factor * share) rises with the factor from low to high: where it reaches the total is found by halving.
    small, large = 0.0, float((high / share).max())
    for _ in range(200):
        middle = (small + large) / 2
        small, large = (middle, large) if np.clip(middle * share, low, high).sum() < total else (small, middle)
    wanted = np.clip(large * share, low, high)
    counts = np.floor(wanted + 1e-9).astype(np.int64)
    for step in (1, -1):  # rounding leaves less than one too few or too many for each layer
        room = counts < high if step > 0 else counts > low
        order = np.argsort(-step * (wanted - counts), kind="stable")
        counts[order[room[order]][: max(0, step * (total - int(counts.sum())))]] += step
    return counts.tolist()


def equal_slope(dropped: int, costs: Sequence[np.ndarray], least: Sequence[int]) -> list[int]:
    """How many items each layer keeps when the ``dropped`` cheapest items of all layers are removed.

    ``costs``: the costs of the items of each layer, (items,), comparable between layers. ``least``: how many items each
    layer keeps at least.
    """
    open_costs = [np.sort(cost)[: cost.size - kept] for cost, kept in zip(costs, least, strict=True)]
    owner = np.repeat(np.arange(len(costs)), [cost.size for cost in open_costs])
    if dropped > owner.size:
        raise ValueError(f"{dropped} is more than the {owner.size} that may go")
    cheapest = np.argsort(np.concatenate(open_costs), kind="stable")[:dropped]
    gone = np.bincount(owner[cheapest], minlength=len(costs))
    return [cost.size - int(count) for cost, count in zip(costs, gone, strict=True)]


def sensitivities(
    graph: gs.Graph,
    weights: Sequence[gs.Constant],
    data: Data,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> np.ndarray:
    """s_l of each of ``weights``, (layers,) float64, on the first samples of ``data``.

    Raises DataError when an output is not finite, ModelError when the model has no float output or does not run.
    """
    feeds = data.first(SAMPLES)
    session = _open(graph, weights)
    found = np.zeros(len(weights))
    total = len(feeds) * len(weights)
    for sample, feed in enumerate(feeds):
        probe = _Probe(session, session.accepted(feed), sample)
        for layer, constant in enumerate(weights):
            progress("Measuring sensitivities", sample * len(weights) + layer, total)
            values = read(constant)
            exact = values.astype(np.float32)
            scale = np.float32(np.sqrt(np.mean(np.square(exact), dtype=np.float64)))
            noise = np.random.default_rng((seed, layer, sample)).standard_normal(exact.shape, np.float32)
            noise *= np.float32(_STEP) * scale
            changes = [probe.change(constant.name, (exact + sign * noise).astype(values.dtype)) for sign in (1, -1)]
            found[layer] += sum(changes) / (2 * _STEP**2 * values.size)
    return np.sqrt(found / max(1, len(feeds)))


class _Probe:
    """The outputs on one sample, and how much they change when one weight is replaced."""

    def __init__(self, session: Session, feed: Feed, sample: int):
        self.session, self.feed, self.sample = session, feed, sample
        self.outputs = self._run(feed)
        self.energies = {name: float(np.square(values).mean()) for name, values in self.outputs.items()}

    def change(self, name: str, values: np.ndarray) -> float:
        """The mean over outputs of the squared relative change when the weight ``name`` is ``values``."""
        moved = self._run({**self.feed, name: values})
        changes = []
        for output, before in self.outputs.items():
            if moved[output].shape != before.shape:
                raise ModelError(
                    f"The shape of output {output!r} depends on values, so its change cannot be measured",
                    "Use another choice of ratios",
                )
            change = float(np.square(moved[output] - before).mean())
            changes.append(change / self.energies[output] if self.energies[output] > 0 else 0.0)
        return float(np.mean(changes))

    def _run(self, feed: Feed) -> dict[str, np.ndarray]:
        outputs = self.session.run(feed)
        found = {
            name: v.astype(np.float64) for name, v in outputs.items() if np.asarray(v).dtype.kind == "f" and v.size
        }
        if not found:
            raise ModelError("The model has no output of a float type to measure changes on", "Use uniform ratios")
        for name, values in found.items():
            if not np.isfinite(values).all():
                raise DataError(
                    f"Output {name!r} of sample {self.sample} is not finite, so its change cannot be measured",
                    "Remove that sample, or use uniform ratios",
                )
        return found


def _open(graph: gs.Graph, weights: Sequence[gs.Constant]) -> Session:
    """A session that also takes the weights as inputs, with their present values as defaults."""
    model, large = export(graph)
    known = {value.name for value in model.graph.input}
    for constant in weights:
        if constant.name not in known:
            kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(constant.dtype))
            model.graph.input.append(onnx.helper.make_tensor_value_info(constant.name, kind, constant.shape))
    model.ir_version = max(model.ir_version, 4)  # before it, an initializer among the inputs meant something else
    return open_model(model, large)

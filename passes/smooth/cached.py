"""The keys of a decoder's own cache scaled, so that all channels of the cache have one range.

    K'_jc = K_jc / s_jc,  Q'_hc = Q_hc s_jc     for channel c of key head j and the query heads h that it serves
    s = 2^rint(log2 A),  A = max |K| by head and channel; the geometric mean is 1

Nothing but the cache and the products of attention reads keys, so the scale costs no weight anything. Rotary pairs
share a scale, and so do all heads behind a norm of the keys. Values that a linear reads are scaled for the linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome, Refused
from channelfold.passes.channels.cache import Caches
from channelfold.passes.channels.region import Region
from channelfold.passes.channels.rescale import fitted
from channelfold.passes.channels.scale_regions import Shape, trace
from channelfold.passes.smooth.trial import Move
from channelfold.runtime.io import edit
from channelfold.runtime.stats.channels import outlier_ratio
from channelfold.runtime.stats.observe import by_name

_HEADS, _CHANNELS = 1, 3  # axes of a cache, (batch, heads, tokens, channels)
_FAINT = 1e-3


@dataclass
class _Largest:
    """An observer of the largest magnitude by head and channel, (heads, channels)."""

    amax: np.ndarray | None = None

    def add(self, values: np.ndarray) -> None:
        if values.size:
            found = np.abs(values).max(axis=(0, 2))
            self.amax = found if self.amax is None else np.maximum(self.amax, found)

    def merge(self, other: _Largest) -> None:
        if other.amax is not None:
            self.add(other.amax[None, :, None])


def key_moves(
    graph: gs.Graph, caches: Caches, shapes: Mapping[str, Shape], ctx: Context, outcome: Outcome
) -> Iterator[Move]:
    """The moves that scale the own caches of a graph that no linear reads; refuses the others."""
    found: list[tuple[gs.Tensor, Region]] = []
    for tensor in caches.tensors.values() if caches.own else ():
        writer = edit.producer(tensor)
        if writer is None:
            continue
        with outcome.refusing(writer.name, f"{tensor.name} stays as it is"):
            region = _region(graph, tensor, shapes, caches)
            if region is not None:
                found.append((tensor, region))
    observers = {tensor.name: _Largest() for tensor, _ in found}
    ctx.observe(graph, by_name(observers.items()))
    for tensor, region in found:
        amax, writer = observers[tensor.name].amax, edit.producer(tensor)
        assert writer is not None
        with outcome.refusing(writer.name, f"{tensor.name} stays as it is"):
            if amax is None:
                raise Refused("no calibration sample reached it")
            yield _move(writer, tensor, region, amax)


def _region(graph: gs.Graph, tensor: gs.Tensor, shapes: Mapping[str, Shape], caches: Caches) -> Region | None:
    """The region of a present; None where linears read what the region scales. Raises Refused."""
    if len(shapes[tensor.name]) != 4:
        raise Refused("its heads and channels have no axes of their own")
    region = trace(graph, tensor, (_HEADS, _CHANNELS), shapes, caches=caches)
    index = region.places[id(tensor)][1]
    read = [np.unique(np.abs(end.index)) for end in region.readers()]
    if any(np.isin(np.abs(index), classes).any() for classes in read):
        return None
    if reason := region.why_fixed(index):
        raise Refused(reason)
    return region


def _move(writer: gs.Node, tensor: gs.Tensor, region: Region, amax: np.ndarray) -> Move:
    index = np.broadcast_to(region.places[id(tensor)][1], (1, amax.shape[0], 1, amax.shape[1]))[0, :, 0]
    logs = np.full(region.size, -np.inf)
    usable = amax > _FAINT * np.median(amax)
    np.maximum.at(logs, np.abs(index[usable]) - 1, (np.sign(index) * np.log(np.maximum(amax, 1e-30)))[usable])
    seen = np.isfinite(logs) & region.free
    if not seen.any():
        raise Refused("it is zero in every calibration sample")
    scale = fitted(np.exp(np.where(seen, logs - logs[seen].mean(), 0.0)), region)
    if np.ptp(scale) == 0:
        raise Refused("its channels are alike already")
    s = scale[np.abs(index) - 1]
    ratio = [outlier_ratio(amax.reshape(-1)), outlier_ratio((amax / np.where(index > 0, s, 1 / s)).reshape(-1))]
    what = "" if None in ratio else f"; outlier ratio {ratio[0]:.3g} -> {ratio[1]:.3g}"
    facts = {
        "node": writer.name,
        "tensor": tensor.name,
        "readers": [],
        "method": "cache",
        "outlier_ratio": ratio,
        "output_snr_db": None,
        "scale": [float(scale.min()), float(scale.max())],
        "inserted": 0,
    }
    heads = f"cache {tensor.name}, {amax.shape[0]} heads"
    return Move(writer.name, heads, tensor.name, region, scale, np.zeros_like(scale), f"powers of two{what}", facts)

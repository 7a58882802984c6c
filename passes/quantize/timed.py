"""Which sites stay float because ONNX Runtime on this machine is faster so, by its profiler.

    slow   t_int8 > 1.2 t_float  and  t_int8 - t_float > 20 us,    the times of a site and the quantizers in front
    left   T(the slow sites float) < 0.97 T(all int8)

Around a site that is float among int8 ones values are dequantized and quantized again, of which neither the float nor
the int8 profile tells: EfficientNet-Lite0 loses 17 % where seven depthwise convolutions are left for being slower by
themselves. So the mix runs as well, and the slow sites stay float only where the whole of it is faster.
"""

from __future__ import annotations

import functools
from pathlib import Path

import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.passes.layers.linear import Linear
from channelfold.passes.layers.owners import owners
from channelfold.passes.quantize.proven import Insert, expanded, in_int8
from channelfold.passes.quantize.qdq import Inserter
from channelfold.runtime.errors import ModelError
from channelfold.runtime.io import files, temporary
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.stats.profile import profiles

_RATIO = 1.2  # of the times of a site in int8 and in float, from which int8 is clearly slower
_LEAST = 0.02  # ms
_WORTH = 0.97  # of the time of all nodes; less is noise


def without_slow(
    graph: gs.Graph, sites: list[Linear], tried: Inserter, outcome: Outcome, insert: Insert[Linear], ctx: Context
) -> tuple[list[Linear], Inserter]:
    """The sites without those that are refused for being slow in int8, and the inserter of the copy that has them so.

    All sites, and the inserter ``tried`` of the copy in which all are int8, where float makes nothing faster.
    """
    profiled = functools.partial(profiles, feed=next(iter(ctx.data)), progress=ctx.progress)
    left = Outcome()
    with temporary.folder() as folder:

        def written(kind: str, graph: gs.Graph) -> Path:
            files.save(graph, path := folder / f"{kind}.onnx")
            return path

        try:
            plain, whole = written("float", Snapshot.of(graph).graph()), written("int8", tried.graph)
            timed, names = profiled({"float": plain, "int8": whole}), [[site.name] for site in sites]
            both = zip(sites, owners(plain, timed["float"], names), owners(whole, timed["int8"], names), strict=True)
            slow = {site.name: (a, b) for site, a, b in both if b > _RATIO * a and b - a > _LEAST}
            if not slow:
                return sites, tried
            rest = [site for site in sites if site.name not in slow]
            rest, mixed = in_int8(graph, rest, left, insert, expanded(left))
            found = profiled({"int8": whole, "mixed": written("mixed", mixed.graph)})
        except ModelError as error:
            outcome.warnings.append(f"Which nodes are slower in int8 is not known: {error}")
            return sites, tried
    before, after = (sum(node.ms for node in found[kind]) for kind in ("int8", "mixed"))
    if after >= _WORTH * before:
        return sites, tried
    for site in (site for site in sites if site.name in slow):
        reason = "ONNX Runtime runs it slower in int8 on this machine"
        a, b = slow[site.name]
        outcome.refuse(site.name, f"{site.node.op} stays float: {reason} ({b:.3f} ms, {a:.3f} in float)", reason)
    outcome.refused += left.refused
    outcome.warnings += left.warnings
    return rest, mixed

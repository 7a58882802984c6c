"""Random networks: slicing channels is masking them, at 10 to 70 %."""

from __future__ import annotations

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from channelfold.passes.base import Refused
from channelfold.passes.channels.cut import cut, mask
from channelfold.runtime.io.files import check, import_model, infer_shapes, session
from channelfold.tests.channel_cuts import groups_of, random_keep, regions_of
from channelfold.tests.channel_strategies import networks
from channelfold.tests.graphs import assert_same, feeds

RATIOS = (0.1, 0.3, 0.5, 0.7)


def pruned(model: onnx.ModelProto, step, ratio: float, seed: int, width: bool):
    """A graph without a share of all channels that may go, by ``cut`` or ``mask``."""
    graph = import_model(model)
    infer_shapes(graph)
    rng = np.random.default_rng(seed)
    regions = [r for r in regions_of(groups_of(graph)) if width or not r.reduced]
    step(graph, [(region, random_keep(region, rng, ratio)) for region in regions])
    return graph


@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(networks(), st.sampled_from(RATIOS), st.integers(0, 2**16), st.booleans())
def test_slicing_is_masking(model, ratio, seed, width):
    sliced = pruned(model, cut, ratio, seed, width)
    check(sliced)
    try:
        masked = pruned(model, mask, ratio, seed, width)
    except Refused:  # a norm that has no masked form
        return
    feed = feeds(sliced)
    before, after = (session(graph, optimize=False).run(feed) for graph in (masked, sliced))
    assert_same(before, after, 1e-5)

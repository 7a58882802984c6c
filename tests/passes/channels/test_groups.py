"""Groups by hand-made graphs: what may be cut, why the rest stays, and that slicing is masking.

``zeros`` is the oracle that knows nothing of links: what has to be zero in the constants for the same channels to be
silent, told by hand. Where a norm works on the channels there is none; ``test_cut`` has numpy for those.
"""

from __future__ import annotations

import pytest

from channelfold.passes.channels.groups import find_groups
from channelfold.tests.channel_cuts import Case, assert_slice_equals_mask, assert_slice_equals_zeros, groups_of, summary
from channelfold.tests.graphs import build
from channelfold.tests.passes.channels.cases_of_layers import LAYERS
from channelfold.tests.passes.channels.cases_of_operators import OPERATORS
from channelfold.tests.passes.channels.cases_of_sequences import SEQUENCES

CASES = [*LAYERS, *OPERATORS, *SEQUENCES]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


def test_groups(case):
    assert summary(groups_of(case.make())) == case.groups


def test_slicing_is_masking(case):
    free = assert_slice_equals_mask(case.make)
    assert bool(free) == any(" 0/" not in line for line in case.groups.splitlines())


@pytest.mark.parametrize("case", [case for case in CASES if case.zeros], ids=lambda case: case.name)
def test_slicing_is_zeros_put_in_by_hand(case):
    assert_slice_equals_zeros(case)


def test_a_weight_that_another_part_of_the_model_reads_stays():
    """To cut it for one of them alone, the model would have to hold it twice."""
    body = """
        h = MatMul(x, W)
        a = Relu(h)
        y = MatMul(a, V)
        z = If (c) <then_branch = p () => (float[N,8] q) { q = MatMul(x, W) }, else_branch = r () => (float[N,8] o)
            { o = Identity(b) }>
    """
    given = {"W": (4, 8), "V": (8, 2), "b": (1, 8)}
    graph = build("(float[N,4] x, bool c) => (float[] y, float[] z)", body, kind="float", **given)
    hidden = next(
        group for group in find_groups(graph, {"x": (1, 4), "h": (1, 8), "a": (1, 8), "y": (1, 2)}) if group.units == 8
    )
    assert dict(hidden.reasons) == {"another part of the model reads the same weight": 8}

"""Sums against the exact ones of ``math.fsum``, and observers: however samples are split and ordered, one result."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channelfold.runtime.stats.channels import ChannelMoments, ChannelStatistics
from channelfold.runtime.stats.covariance import Moments
from channelfold.runtime.stats.exact import ExactSum
from channelfold.runtime.stats.histograms import TensorStatistics

FLOATS = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300)


@given(st.lists(FLOATS, min_size=1, max_size=30))
def test_a_sum_is_the_exact_one_but_for_what_the_largest_term_hides(terms):
    """2^-64 of the largest term for each term, and one rounding of the result."""
    total = ExactSum()
    for term in terms:
        total.add(np.array([term, 1.0]))
    largest = max(map(abs, terms))
    assert abs(total.value[0] - math.fsum(terms)) <= len(terms) * largest * 2.0**-52
    assert total.value[1] == len(terms)


def test_what_cancels_leaves_what_is_small():
    total = ExactSum()
    for term in (1e16, 1.0, -1e16, 2.0**-10):
        total.add(np.array([term]))
    assert total.value.tolist() == [1 + 2.0**-10]


def test_terms_of_every_exponent():
    for term in (5e-324, 2.0**-1022, 2.0**-33, 2.0**-32, 1.0, 2.0**32 - 1, 2.0**1023, -np.finfo(float).max, 0.0):
        total = ExactSum()
        total.add(np.array([term]))
        assert total.value.tolist() == [term]


def splits(count: int) -> st.SearchStrategy[list[list[int]]]:
    """The numbers below ``count`` in any order, in blocks, some of them empty."""

    def cut(drawn: tuple[list[int], list[int]]) -> list[list[int]]:
        order, ends = drawn
        places = [0, *sorted(ends), count]
        return [order[a:b] for a, b in itertools.pairwise(places)]

    return st.tuples(st.permutations(range(count)), st.lists(st.integers(0, count), max_size=4)).map(cut)


def state(found: object) -> bytes:
    """All that an observer tells, as bytes."""
    kept = [getattr(found, name) for name in dir(type(found)) if isinstance(getattr(type(found), name), property)]
    names = [name for name in ("minimum", "maximum", "positions", "samples") if hasattr(found, name)]
    told = [*kept, *(getattr(found, name) for name in names)]
    told += found.sample() if isinstance(found, ChannelStatistics) else ()
    return pickle.dumps([sorted(x) if isinstance(x, list) else np.asarray(x).tobytes() for x in told])


def merged(make: Callable, samples: list[np.ndarray], blocks: list[list[int]], order: list[int]) -> bytes:
    parts = []
    for block in blocks:
        parts.append(make())
        for index in block:
            parts[-1].add(samples[index])
    whole = make()
    for number in order:
        whole.merge(parts[number])
    return state(whole)


def samples_of(channels: int, seed: int) -> list[np.ndarray]:
    """Samples of different lengths and sizes, one of them twice, one empty, with ties and both zeros."""
    rng = np.random.default_rng(seed)
    made = [
        rng.standard_normal((1, int(rng.integers(1, 20)), channels)) * 10.0 ** rng.integers(-8, 8) for _ in range(6)
    ]
    zeros = np.zeros((1, 9, channels))
    zeros[0, :, 1] = rng.integers(-1, 2, 9)  # what differs is in channels that the keys leave out
    made += [made[0], made[1][:, :0], np.clip(made[2], -0.5, 0.5), -np.zeros((1, 2, channels)), zeros, zeros[:, ::-1]]
    return [values.astype(np.float32) for values in made]


@pytest.mark.parametrize(
    "make",
    [
        TensorStatistics,
        lambda: TensorStatistics(-1),
        lambda: TensorStatistics(1 - 3),
        lambda: ChannelMoments(-1),
        lambda: ChannelStatistics(-1),
        lambda: ChannelStatistics(-1, 16),
    ],
    ids=["counts", "channels last", "channels first", "moments", "ranges", "rows"],
)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), channels=st.sampled_from([3, 130]), seed=st.integers(0, 100))
def test_any_split_and_any_order_find_the_same_bits(make, data, channels, seed):
    samples = samples_of(channels, seed)
    if make().__dict__.get("channel_axis") == -2:  # along which samples have different lengths
        samples = [np.moveaxis(values, 1, 2) for values in samples]
    one = merged(make, samples, [list(range(len(samples)))], [0])
    blocks = data.draw(splits(len(samples)))
    order = data.draw(st.permutations(range(len(blocks))))
    assert merged(make, samples, blocks, order) == one


@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=st.integers(0, 100))
def test_covariances_merge_up_to_rounding(data, seed):
    """Their sums are of products, in float64: the last digits depend on the order, the count does not."""
    samples = [1000 + np.random.default_rng([seed, i]).standard_normal((5 * i, 4)) for i in range(6)]
    whole = Moments({"x": -1})
    for values in samples:
        whole.take("x", values.astype(np.float32))
    parts = Moments({"x": -1})
    for block in data.draw(splits(len(samples))):
        part = Moments({"x": -1})
        for index in block:
            part.take("x", samples[index].astype(np.float32))
        parts.merge(part)
    assert parts.count == whole.count
    assert np.abs(parts.mean - whole.mean).max() < 1e-12 * 1000
    assert np.abs(parts.covariance - whole.covariance).max() < 1e-11


@pytest.mark.parametrize("axis", [None, -1])
def test_memory_is_that_of_the_octaves_seen(axis):
    """Below 0.04 MB for normal values; the sums of 768 channels take 32 bytes each on top of that."""
    found = TensorStatistics(axis)
    for seed in range(32):
        found.add(np.random.default_rng(seed).standard_normal((1, 128, 768), np.float32))
    assert len(pickle.dumps(found)) < 40_000 + (32 * 768 if axis else 0)
    assert found.counts.sum() == 32 * 128 * 768

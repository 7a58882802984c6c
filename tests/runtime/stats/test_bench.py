from __future__ import annotations

import pytest

from channelfold.runtime.errors import UsageError
from channelfold.runtime.stats.bench import Latency, Ratio, latencies, ratio


class Clock:
    """Time that passes only when a model runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def model(self, name: str, *seconds: float):
        calls = iter(seconds * 1000)

        def run() -> None:
            self.log.append(name)
            self.now += next(calls)

        return run


def test_median_and_quartiles_are_in_milliseconds():
    clock = Clock()
    (found,) = latencies({"a": clock.model("a", 0.001, 0.002, 0.003, 0.004, 0.100)}, rounds=5, warmup=0, clock=clock)
    assert (found.name, found.runs) == ("a", 5)
    assert (found.low, found.ms, found.high) == pytest.approx((2, 3, 4))  # one slow round moves neither


def test_models_alternate_and_the_order_flips_every_round():
    clock = Clock()
    latencies({"a": clock.model("a", 1), "b": clock.model("b", 1)}, rounds=3, warmup=1, seconds=1e9, clock=clock)
    assert "".join(clock.log) == "ab" + "ab" + "ba" + "ab"


def test_warmup_does_not_count():
    clock = Clock()
    (found,) = latencies({"a": clock.model("a", 9, 9, 1, 1, 1)}, rounds=3, warmup=2, clock=clock)
    assert found.ms == 1000


def test_the_time_limit_leaves_three_rounds():
    clock = Clock()
    (found,) = latencies({"a": clock.model("a", 60)}, rounds=50, warmup=0, seconds=1, clock=clock)
    assert found.runs == 3


def test_a_single_round_has_no_spread():
    clock = Clock()
    (found,) = latencies({"a": clock.model("a", 2)}, rounds=1, warmup=0, clock=clock)
    assert (found.low, found.ms, found.high) == (2000, 2000, 2000)


def test_no_rounds_is_an_error():
    with pytest.raises(UsageError, match="0 rounds"):
        latencies({}, rounds=0)


def test_progress_ends_at_the_total():
    clock, seen = Clock(), []
    latencies({"a": clock.model("a", 1)}, rounds=9, warmup=0, clock=clock, progress=lambda *step: seen.append(step))
    assert seen[-1] == ("measure latency", 9, 9)


def test_the_ratio_of_two_models_has_the_noise_of_its_rounds():
    """A slow round slows both; an interruption of one in twenty moves neither the median nor its interval."""
    speeds = [1.0, 1.5] * 10
    base = Latency("a", 0, 0, 0, tuple(speeds))
    own = Latency("b", 0, 0, 0, tuple(2 * s + (9.0 if i == 7 else 0.01 * (i % 3)) for i, s in enumerate(speeds)))
    found = ratio(own, base)
    assert 2 <= found.low <= found.value <= found.high <= 2.02
    assert ratio(base, base) == Ratio(1.0, 1.0, 1.0)

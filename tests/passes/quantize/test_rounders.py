"""Rounders: GPTQ's codes are the textbook's, a search is never worse than the nearest codes, odd data do no harm."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channelfold.passes.layers.formats import FORMATS, Format
from channelfold.passes.quantize.rounders import DAMPING, Rounded, by_scale, gptq, rounded

FLOAT = np.dtype(np.float32)
GROUPED = Format(4, 32, opset=21)


def case(seed: int, outs: int, ins: int, rows: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """A weight (out, in) and E[x x^T] of correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, ins)) @ rng.normal(size=(ins, ins)) * rng.lognormal(size=ins)
    return rng.normal(size=(outs, ins)).astype(np.float32), x.T @ x / rows


def restored(layer: Rounded, format: Format) -> np.ndarray:
    return layer.restored(format).astype(np.float64)


def error(weight: np.ndarray, products: np.ndarray, found: np.ndarray) -> float:
    """The mean square of (W - W') x."""
    return float(np.einsum("oi,ij,oj->", found - weight, products, found - weight))


def textbook(weight: np.ndarray, products: np.ndarray, scales: np.ndarray, format: Format) -> np.ndarray:
    """The codes of GPTQ by the Cholesky factor of the inverse, in float64, with act-order and static groups."""
    ins = weight.shape[1]
    order = np.argsort(-np.diagonal(products).astype(np.float32), kind="stable")
    steps = np.broadcast_to(format.spread(scales.astype(np.float64), ins), weight.shape)[:, order]
    damped = products[np.ix_(order, order)] + DAMPING * np.diagonal(products).mean() * np.eye(ins)
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, codes = weight[:, order].astype(np.float64), np.empty(weight.shape)
    for i in range(ins):
        codes[:, order[i]] = format.snap(left[:, i] / steps[:, i])
        missed = (left[:, i] - codes[:, order[i]] * steps[:, i]) / factor[i, i]
        left[:, i:] -= np.outer(missed, factor[i, i:])
    return codes


@given(st.integers(0, 999), st.integers(1, 9), st.integers(9, 150), st.sampled_from([8, 32, 128]))
def test_gptq_is_the_textbooks(seed, outs, ins, group):
    """float32 against float64: where a value lies between two codes either may be taken; the errors are the same."""
    weight, products = case(seed, outs, ins, rows=2 * ins)
    format = Format(4, group, opset=21)
    found = gptq(format, FLOAT, products)(weight, slice(0, outs))
    wanted = Rounded(textbook(weight, products, found.scales, format), found.scales)
    assert error(weight, products, restored(found, format)) <= 1.01 * error(weight, products, restored(wanted, format))


def test_gptq_has_the_codes_of_the_textbook():
    weight, products = case(1, 64, 300, rows=2000)
    found = gptq(GROUPED, FLOAT, products)(weight, slice(0, 64))
    assert (found.codes.astype(float) == textbook(weight, products, found.scales, GROUPED)).mean() > 0.999


@given(st.integers(0, 999), st.sampled_from(["int8", "int4", "uint4", "fp8"]), st.integers(1, 40), st.integers(2, 200))
def test_a_search_is_never_worse(seed, name, outs, ins):
    weight, products = case(seed, outs, ins)
    format = FORMATS[name].fitted(ins)
    power = np.diagonal(products).astype(np.float32)[None]
    errors = []
    for search in (False, True):
        found = rounded(weight, by_scale(format, FLOAT, power, search), format)
        assert (found.codes.dtype, found.codes.shape, found.scales.shape[0]) == (format.dtype, weight.shape, outs)
        errors.append((np.square(restored(found, format) - weight) * power).sum())
    assert errors[1] <= errors[0] * (1 + 1e-5)


def test_what_each_rounder_is_worth():
    weight, products = case(2, 64, 256, rows=1000)
    power = np.diagonal(products).astype(np.float32)[None]
    rounders = (by_scale(GROUPED, FLOAT, power, False), by_scale(GROUPED, FLOAT, power), gptq(GROUPED, FLOAT, products))
    nearest, search, best = (error(weight, products, restored(rounded(weight, r, GROUPED), GROUPED)) for r in rounders)
    assert best < 0.6 * search < 0.6 * nearest


@pytest.mark.parametrize("products", [np.zeros((40, 40)), np.ones((40, 40)), np.diag([0.0] * 39 + [1.0])])
def test_singular_products(products):
    """No data, one sample, dead channels: the codes are finite and no worse than the nearest ones of a search."""
    weight, _ = case(3, 5, 40)
    found = restored(gptq(GROUPED, FLOAT, products)(weight, slice(0, 5)), GROUPED)
    plain = by_scale(GROUPED, FLOAT, np.diagonal(products).astype(np.float32)[None])
    assert np.isfinite(found).all()
    assert error(weight, products, found) <= error(weight, products, restored(plain(weight, slice(0, 5)), GROUPED))


@given(
    st.integers(0, 99),
    st.sampled_from(list(FORMATS)),
    st.booleans(),
    st.sampled_from(["zero", "one sample", "dead", "large", "small"]),
    st.sampled_from([8, 1 << 16]),
)
def test_odd_data_do_no_harm(seed, name, descent, kind, group):
    """Singular products, dead channels and weights, huge groups: codes and scales are finite, scales positive."""
    weight, products = case(seed, 6, 40)
    x = np.random.default_rng(seed).normal(size=40)
    products = {
        "zero": 0 * products,
        "one sample": np.outer(x, x),
        "dead": products * np.outer(x > 0, x > 0),
        "large": products * 1e20,
        "small": products * 1e-25,
    }[kind]
    weight[0] = 0
    weight[1] *= 1e-30
    format = dataclasses.replace(FORMATS[name], group=FORMATS[name].group and group).fitted(40)
    found = rounded(weight, gptq(format, FLOAT, products, format.base(weight), descent), format)
    assert np.isfinite(restored(found, format)).all()
    assert (found.scales > 0).all()
    assert not restored(found, format)[0].any()


def test_the_parts_of_a_weight_do_not_matter(monkeypatch):
    weight, products = case(4, 33, 64)
    grouped = np.square(weight) + 1.0  # an importance of its own for every output channel
    for rounder in (by_scale(GROUPED, FLOAT, grouped), gptq(GROUPED, FLOAT, products)):
        whole = rounded(weight, rounder, GROUPED)
        with monkeypatch.context() as patch:
            patch.setattr("channelfold.passes.layers.formats._CHUNK", 200)
            parts = rounded(weight, rounder, GROUPED)
        assert np.array_equal(whole.scales, parts.scales)
        assert np.mean(whole.codes == parts.codes) > 0.999  # products of other shapes sum in another order


def test_groups_of_a_channel_are_at_least_two():
    assert [FORMATS["int4"].fitted(ins).group for ins in (512, 256, 255, 130, 64, 16, 9)] == [
        128, 128, 64, 64, 32, 8, 8,
    ]  # fmt: skip


@given(st.integers(0, 999), st.sampled_from(["int4", "uint4", "int2", "fp4", "dgq"]), st.integers(1, 20))
def test_descent_is_never_worse_than_gptq(seed, name, outs):
    weight, products = case(seed, outs, 70, rows=200)
    format, errors = FORMATS[name].fitted(70), []
    base = format.base(weight)
    for descent in (False, True):
        found = rounded(weight, gptq(format, FLOAT, products, base, descent), format)
        damped = products + DAMPING * np.diagonal(products).mean() * np.eye(70)
        errors.append(error(weight, damped, restored(found, format)))
        assert (found.scales > 0).all()
    assert errors[1] <= errors[0] * (1 + 1e-4)


def test_zero_points_pay_where_weights_are_not_centred():
    weight, products = case(5, 32, 256, rows=1000)
    weight = np.abs(weight)
    asymmetric = Format(4, 32, symmetric=False, opset=21)
    for rounder in (
        lambda format: by_scale(format, FLOAT, np.diagonal(products).astype(np.float32)[None]),
        lambda format: gptq(format, FLOAT, products),
    ):
        lost = [error(weight, products, restored(rounded(weight, rounder(f), f), f)) for f in (GROUPED, asymmetric)]
        assert lost[1] < 0.5 * lost[0]

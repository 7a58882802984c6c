"""The error of quantized layers: by hand, against direct quantization, and what does not change it."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes.layers.linear import linears
from channelfold.passes.layers.quantization_error import SYSTEMATIC, Bits, LayerError, matrix, quantized_activation
from channelfold.tests.graphs import build, feeds, random, run


def f32(values) -> np.ndarray:
    return np.asarray(values, np.float32)


INT8 = Bits()


def layer(rows, weight, bits: Bits = INT8, weights=None) -> LayerError:
    rows = f32(rows)
    return LayerError(rows, np.ones(len(rows)) if weights is None else np.asarray(weights, float), f32(weight), bits)


# ---- quantizers ----------------------------------------------------------------------------------------------------


def test_activations_are_rounded_to_steps_of_the_largest():
    assert quantized_activation(f32([[-12.7, 0.04], [0.06, 3.14]]), 8) == pytest.approx(
        f32([[-12.7, 0.0], [0.1, 3.1]]), rel=1e-6
    )
    assert quantized_activation(f32([[7, 3.4, -0.6]]), 4).tolist() == [[7, 3, -1]]


def test_weights_are_rounded_by_row():
    found = Bits(8, 8).format.rounded(f32([[127, 0.4, -3.6], [1.27, 0.004, -0.036]]))
    assert found == pytest.approx(f32([[127, 0, -4], [1.27, 0, -0.04]]), rel=1e-6)


def test_groups_have_ranges_and_zero_points_of_their_own():
    """Four bits in groups of two: [-7, 8] has steps of 1; [0, 30] and [-1, 0] keep zero and their end."""
    weight = f32([[-7, 8, 30, 0, -1, 0, 2.4]])
    assert Bits(0, 4, 2).format.rounded(weight) == pytest.approx(f32([[-7, 8, 30, 0, -1, 0, 2.4]]), rel=1e-6)
    assert Bits(0, 4, 4).format.rounded(f32([[0, 15, 7.4, 0]])).tolist() == [[0, 15, 7, 0]]


@pytest.mark.parametrize("bits", [Bits(8, 8), Bits(8, 4, 3), Bits(8, 2), Bits(8, 3, 100)])
def test_zeros_stay_zeros(bits):
    assert not bits.format.rounded(np.zeros((3, 7), np.float32)).any()
    assert not quantized_activation(np.zeros((3, 7), np.float32), 8).any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [1, 5, 16, 64])
def test_a_rounded_group_is_within_half_a_step(bits, group):
    weight = f32(random((9, 32), "w"))
    lost = np.abs(Bits(0, bits, group).format.rounded(weight) - weight)
    for start in range(0, 32, group):
        part = weight[:, start : start + group]
        step = (np.maximum(part.max(axis=1), 0) - np.minimum(part.min(axis=1), 0)) / (2**bits - 1)
        assert (lost[:, start : start + group] <= step[:, None] * 1.0001).all()


# ---- the error -----------------------------------------------------------------------------------------------------


def test_by_hand():
    """Two rows, exact in the activation: x = (127, 0), (0, 127); W = (1, 0.4 / 127) loses the second weight.

    Outputs are 127 and 0.4, energies 16129 and 0.16; the second row is lost whole. Shares: half of 16 * 0.16 by
    16129.16, half of the mean of 16 * 0.16 by (0.16 + a tenth of the median energy).
    """
    found = layer([[127, 0], [0, 127]], [[1, 0.4 / 127]])
    median = (127**2 + 0.16) / 2
    expected = SYSTEMATIC * 0.16 / 2 * (1 / (127**2 + 0.16) + 0.5 / (0.16 + 0.1 * median))
    assert found.error() == pytest.approx(expected, rel=1e-4)


def direct(error: LayerError, scale: np.ndarray, shift: np.ndarray) -> float:
    """The formula of the docstring in float64, row by row."""
    rows, weight = error.rows.astype(float), error.matrix.astype(float)
    moved, scaled = (rows - shift) / scale, weight * scale
    step = np.abs(scaled).max(axis=1, keepdims=True) / 127
    lost = np.rint(scaled / step) * step - scaled
    unit = np.abs(moved).max() / 127
    noise = np.rint(moved / unit) * unit - moved
    energies = np.array([np.square(weight @ x).sum() for x in rows])
    total = 0.0
    for x, n, energy, count in zip(moved, noise, energies, error.weights, strict=True):
        e = SYSTEMATIC * np.square(lost @ x).sum() + np.square(scaled @ n).sum()
        total += count * e / (error.weights @ energies) / 2
        total += count / error.weights.sum() * e / (energy + 0.1 * np.median(energies)) / 2
    return total


def test_scale_and_shift():
    error = layer(random((40, 12), "x") + 2, random((9, 12), "w"), weights=np.linspace(1, 4, 40))
    assert error.error() == pytest.approx(direct(error, np.ones(12), np.zeros(12)), rel=1e-3)
    scale, shift = np.exp(random(12, "s")), random(12, "z")
    assert error.error(scale, shift) == pytest.approx(direct(error, scale, shift), rel=1e-3)


def test_a_common_factor_of_all_channels_changes_nothing():
    error = layer(random((40, 12), "x"), random((9, 12), "w"))
    for factor in (2.0**-8, 4.0, 2.0**10):
        assert error.error(factor) == error.error()


def test_the_unit_of_rows_and_weights_changes_nothing():
    rows, weight = random((40, 12), "x"), random((9, 12), "w")
    assert layer(1024 * rows, weight / 4).error() == pytest.approx(layer(rows, weight).error(), rel=1e-6)


def test_a_scale_that_evens_channels_out_makes_the_error_smaller():
    rows = random((200, 32), "x")
    rows[:, 5] *= 100
    error = layer(rows, random((16, 32), "w"))
    scale = np.ones(32)
    scale[5] = 10
    assert error.error(scale) < 0.1 * error.error()


def test_float_activations_lose_nothing():
    """With exact weights, too, there is no error at all."""
    rows, weight = random((20, 8), "x"), np.rint(20 * random((6, 8), "w"))
    weight[:, 0] = 127
    assert layer(rows, weight, Bits(0, 8)).error() == pytest.approx(0, abs=1e-12)
    assert layer(rows, weight, Bits(8, 8)).error() > 0
    assert layer(rows, weight, Bits(4, 8)).error() > 50 * layer(rows, weight, Bits(8, 8)).error()


def test_a_row_that_stands_for_many_counts_as_many():
    rows, weight = random((6, 8), "x"), random((5, 8), "w")
    rows[:, 0] = 4.0  # the same largest value in all of them: the median of the energies is that of the rows given
    repeated = np.repeat(rows, 2, axis=0)
    assert layer(rows, weight, weights=[2] * 6).error() == pytest.approx(layer(repeated, weight).error(), rel=1e-5)
    assert layer(rows, weight, weights=[7] * 6).error() == pytest.approx(layer(rows, weight).error(), rel=1e-9)


def test_quiet_rows_count_although_one_row_has_nearly_all_energy():
    """A token of 10,000 by its own scale is fine in int8; all others are lost: the error says at least a quarter."""
    rows = random((50, 16), "x")
    rows[0] *= 1e4
    error = layer(rows, random((8, 16), "w"), Bits(8, 16)).error()
    assert 0.25 < error < 0.75


def test_rows_without_energy_have_no_error():
    assert layer(np.zeros((5, 8)), random((4, 8), "w")).error() == 0.0


def test_dead_outputs_have_no_error():
    assert layer(random((5, 8), "x"), np.zeros((4, 8))).error() == 0.0


# ---- matrices of linears -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("y = Conv(x, W)", (6, 8, 1, 1)),
        ("y = Conv<group=2>(x, W)", (6, 4, 1, 1)),
        ("y = Conv<group=8>(x, W)", (16, 1, 1, 1)),
        ("y = ConvTranspose(x, W)", (8, 6, 1, 1)),
    ],
)
def test_the_matrix_of_a_convolution_whose_kernel_is_a_point(text, shape):
    graph = build("(float[2,8,1,1] x) => (float[] y)", text, W=shape)
    feed = feeds(graph)
    found = feed["x"].reshape(2, 8) @ matrix(linears(graph)[0]).T.astype(float)
    np.testing.assert_allclose(found, run(graph, feed)["y"].reshape(2, -1), rtol=1e-5, atol=1e-6)


def test_the_error_of_many_outputs_is_measured_on_some_of_them():
    """2,000 outputs at random: 500 of them tell the error within 5 %."""
    graph = build("(float[N,24] x) => (float[] y)", "y = MatMul(x, W)", kind="float", W=(24, 2000))
    rows = f32(random((64, 24), "rows"))
    (linear,) = linears(graph)
    some = LayerError.of([linear], (rows, np.ones(64)), Bits())
    assert len(some.matrix) <= 512
    whole = LayerError(rows, np.ones(64), matrix(linear), Bits())
    assert some.error() == pytest.approx(whole.error(), rel=0.05)


def test_linears_that_read_one_tensor_are_measured_together():
    graph = build("(float[N,24] x) => (float[] y, float[] z)", "y = MatMul(x, W)\n z = MatMul(x, V)", kind="float",
                  W=(24, 8), V=(24, 5))  # fmt: skip
    rows = f32(random((64, 24), "rows"))
    both = LayerError.of(linears(graph), (rows, np.ones(64)), Bits())
    np.testing.assert_array_equal(both.matrix, f32(np.hstack([random((24, 8), "W"), random((24, 5), "V")]).T))

"""What a linear reads at a position: products of the inputs, compared with the outputs of the linear itself."""

from __future__ import annotations

import numpy as np
import pytest

from channelfold.passes.layers.linear import linears
from channelfold.passes.layers.patches import Patches, moments_size
from channelfold.runtime.io.files import session
from channelfold.tests.graphs import build, random

CONVS = [
    ("pads=[1,0,2,1], strides=[2,1]", (4, 3, 3, 2), (2, 3, 7, 6)),
    ("group=3, pads=[1,1,1,1], dilations=[2,1]", (6, 1, 3, 3), (1, 3, 8, 5)),
    ("auto_pad='SAME_LOWER', strides=[2,2]", (4, 3, 2, 3), (1, 3, 5, 6)),
    ("auto_pad='VALID'", (4, 3, 3, 3), (1, 3, 5, 6)),
]


@pytest.mark.parametrize(("attributes", "weight", "x"), CONVS)
def test_the_energy_of_the_outputs_of_a_conv_follows_from_the_products(attributes, weight, x):
    text = f"y = Conv<{attributes}>(x, W, B)".replace("'", '"')
    shape = ",".join(map(str, x))
    graph = build(f"(float[{shape}] x) => (float[] y)", text, W=weight, B=weight[:1], kind="float")
    (linear,) = linears(graph)
    values = random(x, "x").astype(np.float32)
    patches = Patches.of(linear)
    assert patches is not None
    patches.add(values)
    y = session(graph).run({"x": values})["y"].astype(float)
    whole = np.concatenate([linear.weight().reshape(weight[0], -1), np.reshape(linear.bias(), (-1, 1))], axis=1)
    whole = whole.reshape(linear.groups, -1, whole.shape[1])
    energies = np.einsum("gon,gnm,gom->go", whole, patches.products(), whole).reshape(-1)
    np.testing.assert_allclose(energies, np.square(y).mean(axis=(0, 2, 3)), rtol=1e-4)
    assert patches.products().nbytes <= moments_size(linear)


def test_halves_of_the_samples_merge():
    graph = build("(float[4,8] x) => (float[] y)", "y = MatMul(x, W)", W=(8, 3), kind="float")
    (linear,) = linears(graph)
    values = random((6, 8)).astype(np.float32)
    one, first, second = (Patches(linear.in_axis) for _ in range(3))
    one.add(values)
    first.add(values[:4])
    second.add(values[4:])
    first.merge(second)
    np.testing.assert_allclose(first.products(), one.products(), rtol=1e-5)
    z = np.concatenate([values, np.ones((6, 1))], axis=1)
    np.testing.assert_allclose(one.products()[0], z.T @ z / 6, rtol=1e-4, atol=1e-5)

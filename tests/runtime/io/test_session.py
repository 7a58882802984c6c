"""An exact session computes what stands in the file."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from channelfold.runtime.io.files import session
from channelfold.tests.graphs import build


@pytest.mark.parametrize("how", [{"exact": True}, {"fuse": False}])
def test_a_relu_in_front_of_an_fp8_quantizer_stays(how):
    graph = build(
        "(float[2,4] x) => (float[2,4] y)",
        "a = Relu(x) q = QuantizeLinear(a, s, z) y = DequantizeLinear(q, s, z)",
        kind="float", opset=19, s=np.float32(0.5), z=np.array(0, ml_dtypes.float8_e4m3fn),
    )  # fmt: skip
    x = np.array([[-3, -1, 0, 1], [2, 4, -8, 16]], np.float32)
    np.testing.assert_array_equal(session(graph, **how).run({"x": x})["y"], np.maximum(x, 0))

"""What the arithmetic of this processor takes from the products of a quantized graph.

An x86 processor without VNNI adds the products of uint8 and int8 in pairs, in 16 bits that saturate:

    255 * 127 + 255 * 127 = 64770 > 32767,      255 * 63 + 255 * 63 = 32130        so 7 bits of weight fit
"""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs

from channelfold.runtime.data.sources import Data
from channelfold.runtime.io.files import session
from channelfold.runtime.io.session import Session
from channelfold.runtime.stats.compare import compare_all, saturation

SAMPLES = 4
_PRODUCT = """
    <ir_version: 8, opset_import: ["": 13]> g (float[1,64] x) => (float[1,16] y)
    <float s = {1}, uint8 z = {0}>
    { q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  w = DequantizeLinear(W, s)  y = MatMul(d, w) }
"""


@functools.cache
def saturates() -> bool:
    """Whether ONNX Runtime's products of uint8 and int8 saturate on this machine."""
    model = onnx.parser.parse_model(_PRODUCT)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full((64, 16), 127, np.int8), "W"))
    feed = {"x": np.full((1, 64), 255, np.float32)}
    plain, exact = (Session(model.SerializeToString(), exact=exact).run(feed)["y"] for exact in (False, True))
    return not np.array_equal(plain, exact)


def lost(original: gs.Graph, quantized: gs.Graph, data: Data) -> str:
    """Which outputs of a quantized graph saturate on this machine, in words; empty where none does."""
    if not saturates():
        return ""
    runs = [session(quantized), session(quantized, exact=True)]
    return saturation(*compare_all(session(original), runs, data.first(SAMPLES)))

"""Casts: a strongly typed graph that computes in 16 bits, with islands of float32 where 16 bits do not reach.

cast    y = f(x)  ~  float32(f16(float16(x)))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from channelfold.passes.base import Pass
from channelfold.passes.options import option
from channelfold.runtime.errors import UsageError


@dataclass(frozen=True)
class Cast(Pass):
    """Makes weights and activations float16 or bfloat16, except where the values would not survive."""

    name, kind, does_it = "cast", "lossy", "typed"
    inside = False  # the pass types the bodies together with the graph around them

    type: Literal["float16", "bfloat16"] = option("float16", "The type of weights and activations.")
    target: Literal["tensorrt", "onnxruntime"] = option("tensorrt", "Whose kernels decide what can have the type.")
    io_type: Literal["same", "cast"] = option(
        "same", "Whether the inputs and outputs of the model keep their types, or take the type too."
    )
    headroom: float = option(
        2.0, "How many times larger than on the calibration data a value may become without overflow.", low=1
    )
    fit: bool = option(
        True,
        "With data: round weights and biases so that their errors cancel, where outputs change by half of max_error.",
    )
    max_error: float = option(
        0.01,
        "Relative L2 error of the outputs on the calibration data above which what stands between products stays "
        "float32, if that halves the error, then the products that cause most of it, a fifth at most; 0: no limit.",
        low=0,
    )
    exclude: tuple[str, ...] = option((), "Nodes to leave in float32: names, * and ? match.", metavar="PATTERN")
    exclude_ops: tuple[str, ...] = option((), "Operator type to leave in float32, such as Softmax.", metavar="OP")

    @property
    def retypes(self) -> bool:
        return self.io_type == "cast"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.type == "bfloat16" and self.target == "onnxruntime":
            raise UsageError("ONNX Runtime computes almost nothing in bfloat16 on a CPU", "Take float16")

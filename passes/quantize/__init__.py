"""Quantization: to int8, and to formats of 2 to 8 bits that are made for weights.

quantize           y = W x + b  ~  DQ(W_q) DQ(Q(x)) + b',   b' = b - (W_q - W) E[x]
quantize-weights   y = W x + b  ~  DQ(W_q) x + b',          with activations DQ(W_q) DQ(Q(x)) + b'
quantize-attention y = A B      ~  DQ(Q(A)) DQ(Q(B))
clip-weights       w' = clip(w, -m, m),   m where the quantized outputs are best
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Literal

from channelfold.passes.base import Pass
from channelfold.passes.layers.targets import why_not
from channelfold.passes.options import option
from channelfold.runtime.errors import UsageError

Calibrator = Literal["minmax", "percentile", "entropy", "mse"]  # that read one histogram


@dataclass(frozen=True)
class Quantize(Pass):
    """Inserts per-channel INT8 QDQ nodes around Conv, Gemm and MatMul, with calibrated activation ranges."""

    name, kind, does_it, needs_data = "quantize", "calibrated", "static", "Quantization"
    needs_opset = 13

    calibrator: Literal[Calibrator, "measured"] = option(
        "mse",
        "How ranges are chosen; measured: by the calibrator of each tensor that changes the outputs least, which takes "
        "hundreds of runs.",
    )
    target: Literal["tensorrt", "onnxruntime"] = option("tensorrt", "Whose rules for QDQ nodes.")
    exclude: tuple[str, ...] = option((), "Nodes to leave in float: names, * and ? match.", metavar="PATTERN")
    exclude_ops: tuple[str, ...] = option((), "Operator type to leave in float, such as MatMul.", metavar="OP")
    min_activation_snr: float = option(
        15.0, "Leave a node in float when 8 bits represent its input worse than this, in dB.", metavar="DB"
    )
    percentile: float = option(99.999, "Of the calibrator percentile.", above=0, high=100, metavar="P")
    gptq: bool = option(False, "Round weights without a kernel by GPTQ, which takes another run of the data.")
    correct_bias: bool = option(True, "Make up in the biases for the mean error of rounded weights.")
    reduce_range: Literal["auto", "on", "off"] = option(
        "auto", "Weights of 7 bits; auto: for onnxruntime, where products of 8 bits saturate on this machine."
    )
    center: bool = option(
        True, "For tensorrt: center the ranges of inputs that are not, such as those behind ReLU, by way of biases."
    )
    embeddings: bool = option(True, "Store the tables from which Gather takes rows like the weights.")
    verify_plan: int | None = option(
        None,
        "Build for this SM (10 x compute capability), and leave in float what the engine does not compute in int8.",
        low=75,
        metavar="SM",
    )
    profile: bool = option(
        False,
        "For onnxruntime: leave in float what runs slower in int8 on this machine, if the file is faster then.",
    )
    float_share: float = option(
        0.0,
        "Share of the linear nodes that may stay float: those whose int8 changes the outputs most, measured.",
        low=0,
        high=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.verify_plan and self.target != "tensorrt":
            raise UsageError(f"verify_plan is for the target tensorrt, not {self.target}", "Leave it out")
        if self.profile and self.target != "onnxruntime":
            raise UsageError(f"profile is for the target onnxruntime, not {self.target}", "Leave it out")


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Stores the weights of Conv, ConvTranspose, Gemm and MatMul in 8 to 2 bits, by default with float activations."""

    name, kind, does_it, needs_opset = "quantize-weights", "lossy", "weights", 13

    weights: Literal["int8", "int4", "uint4", "int2", "fp8", "fp4", "nvfp4", "mxfp4", "mxfp8", "dgq"] = option(
        "int8",
        "Format of the weights: int8 and fp8 (E4M3) by output channel, the others by groups of inputs; uint4 has zero "
        "points; dgq is int4 with scales on a grid of 8 bits, for products of int8.",
    )
    activations: Literal["none", "int8", "fp8", "fp4", "int8-per-token"] = option(
        "none",
        "What products read: none for float; int8 with dgq, fp8 with fp8, fp4 with nvfp4, which need data; "
        "int8-per-token with int8: a scale for every row, made while the model runs.",
    )
    group: int | None = option(
        None,
        "Inputs that share a scale of int4, uint4, int2, fp4 and dgq.",
        low=8,
        high=1 << 16,
        means="128 for int4, uint4 and dgq, 32 for int2 and fp4",
    )
    keep_8bit: tuple[str, ...] = option((), "Nodes that get 8 bits: names, * and ? match.", metavar="PATTERN")
    rounder: Literal["nearest", "search", "gptq", "descent"] = option(
        "search",
        "How weights are rounded: to the nearest code, with the scale of the least error (weighted by calibration data "
        "where there are some), by GPTQ, which needs data, or by GPTQ and coordinate descent, which takes longer.",
    )
    correct_inputs: bool = option(
        False, "With GPTQ a layer makes up for a part of what the rounded layers before have changed of its input."
    )
    target: Literal["tensorrt", "onnxruntime"] = option("tensorrt", "Whose rules for DequantizeLinear nodes.")
    accuracy_level: int | None = option(
        None,
        "Of the products of ONNX Runtime: 1 multiplies in float, 4 rounds what it multiplies with to 8 bits.",
        low=1,
        high=4,
        means="left to ONNX Runtime: 4",
    )
    embeddings: bool = option(True, "Store the tables from which Gather takes rows like the weights.")
    exclude: tuple[str, ...] = option((), "Nodes to leave in float: names, * and ? match.", metavar="PATTERN")
    exclude_ops: tuple[str, ...] = option((), "Operator type to leave in float, such as MatMul.", metavar="OP")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights == "dgq" and self.activations == "none":
            object.__setattr__(self, "activations", "int8")
        self.check_for(None)

    def work(self) -> Pass:
        if self.activations != "int8-per-token":
            return super().work()
        return importlib.import_module("channelfold.passes.quantize.dynamic").Work(**vars(self))

    def check_for(self, sm: int | None) -> None:
        """Raises UsageError where the target, or an engine for an SM, should not get the formats."""
        target, formats = self.target, (self.weights, self.activations)
        if self.accuracy_level and (target != "onnxruntime" or self.activations != "none"):
            raise UsageError("accuracy_level is for float activations and the target onnxruntime", "Leave it out")
        if sm is not None and target == "onnxruntime":
            return
        reason, hint = why_not(*formats, target, sm)
        if reason:
            raise UsageError(reason, hint)


@dataclass(frozen=True)
class QuantizeAttention(Pass):
    """Multiplies queries with keys, and probabilities with values, in int8, with ranges from calibration data."""

    name, kind, does_it, needs_data = "quantize-attention", "calibrated", "attention", "Quantization"
    needs_opset = 13

    min_activation_snr: float = option(
        15.0, "Leave a product in float when 8 bits represent one of its inputs worse than this, in dB.", metavar="DB"
    )
    verify_plan: int | None = option(
        None,
        "Build for this SM (10 x compute capability), and leave in float the products that the engine does not compute "
        "in int8; all of them where int8 takes more kernels.",
        low=75,
        metavar="SM",
    )
    exclude: tuple[str, ...] = option((), "Nodes to leave in float: names, * and ? match.", metavar="PATTERN")
    exclude_ops: tuple[str, ...] = option((), "Operator type to leave in float, such as MatMul.", metavar="OP")


@dataclass(frozen=True)
class ClipWeights(Pass):
    """Clips the weights of linears without a kernel where clipping lowers their quantization error."""

    name, kind, does_it, needs_data = "clip-weights", "calibrated", "clip", "Clipping weights"

    weight_bits: int = option(4, "Bits of the weight quantizer that the weights are clipped for.", low=2, high=16)
    group_size: int = option(128, "Weights that share a scale, 0 for a whole row.", low=0, high=1 << 20)
    exclude: tuple[str, ...] = option((), "Nodes to leave as they are: names, * and ? match.", metavar="PATTERN")

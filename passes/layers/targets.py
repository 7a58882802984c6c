"""Which target runs which format, and how: measured on tensorrt_rtx 1.7.1 and ONNX Runtime 1.32, row by row tested.

    fused               the kernel that multiplies in float reads the codes
    int8, fp8, fp4      the product is computed in this arithmetic
    dequantized first   a kernel writes out the whole weight in front of every product: small in memory, not fast
    wrong               it is built, without a warning, and computes something else
    refused             it is not built

Zero points (uint4) TensorRT refuses. Written as y = DQ(W_q) x + Z sum x by groups, they take as many bits as int4 in
groups of half the size, which is as exact and needs no second product: so there is no such form.

Weights are by output channel (int8, fp8) or in groups of inputs, activations are by tensor, those of fp4 by groups of
16. Float activations are float16 on SM 75, which has no products in float32.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Verdict = Literal["fused", "int8", "fp8", "fp4", "dequantized first", "wrong", "refused"]
SMS = (75, 80, 89, 120)  # the first SM of each column


class Row(NamedTuple):
    """How a format runs: with TensorRT by SM (75; 80, 86; 89, 90; 100, 120, 121), and with ONNX Runtime on a CPU."""

    tensorrt: tuple[Verdict, Verdict, Verdict, Verdict]
    onnxruntime: Verdict
    instead: str
    why: str = ""


_NEVER: tuple[Verdict, Verdict, Verdict, Verdict] = ("refused", "refused", "refused", "refused")
_FROM_80: tuple[Verdict, Verdict, Verdict, Verdict] = ("refused", "fused", "fused", "fused")
_FROM_89: tuple[Verdict, Verdict, Verdict, Verdict] = ("refused", "refused", "fused", "fused")
_EXPANDED_120: tuple[Verdict, Verdict, Verdict, Verdict] = ("refused", "refused", "refused", "dequantized first")

ROWS: dict[tuple[str, str], Row] = {  # by format of the weights and of the activations
    ("int8", "none"): Row(("fused", "fused", "fused", "fused"), "fused", ""),
    ("int8", "int8-per-token"): Row(("int8", "int8", "int8", "int8"), "int8", "int8"),
    ("int4", "none"): Row(_FROM_80, "fused", "int8"),
    ("uint4", "none"): Row(_NEVER, "fused", "int4"),
    ("int2", "none"): Row(_NEVER, "fused", "int4"),
    ("fp8", "none"): Row(_FROM_89, "dequantized first", "int8"),
    ("fp4", "none"): Row(_EXPANDED_120, "refused", "int4"),
    ("nvfp4", "none"): Row(_EXPANDED_120, "refused", "int4"),
    ("mxfp4", "none"): Row(_EXPANDED_120, "refused", "int4"),
    ("mxfp8", "none"): Row(
        ("refused", "refused", "dequantized first", "dequantized first"), "dequantized first", "fp8"
    ),
    ("dgq", "int8"): Row(("refused", "int8", "int8", "int8"), "int8", "int8"),
    ("fp8", "fp8"): Row(("refused", "refused", "fp8", "fp8"), "dequantized first", "int8"),
    ("nvfp4", "fp4"): Row(("refused", "refused", "refused", "fp4"), "refused", "int8"),
    ("int4", "int8"): Row(
        ("refused", "wrong", "wrong", "wrong"), "dequantized first", "dgq", "every group gets the scales of the first"
    ),
}
_REASONS = {
    "refused": "{target} does not run {what}",
    "dequantized first": "{target} would expand {what} on every call",
    "wrong": "{target} builds {what} and computes something else: {why}",
}


def verdict(weights: str, activations: str, target: str, sm: int | None = None) -> Verdict:
    """How a target runs a format; without ``sm`` on the newest GPU."""
    row = ROWS.get((weights, activations))
    if row is None:
        return "refused"
    if target == "onnxruntime":
        return row.onnxruntime
    return row.tensorrt[sum(sm >= first for first in SMS) - 1 if sm is not None and sm >= SMS[0] else -1]


def why_not(weights: str, activations: str, target: str, sm: int | None = None) -> tuple[str, str]:
    """Why a target should not get a format, and what to take instead; empty where it should."""
    found = verdict(weights, activations, target, sm)
    if found not in _REASONS or (found == "dequantized first" and target == "tensorrt"):
        return "", ""
    where = "ONNX Runtime" if target == "onnxruntime" else f"TensorRT for SM {sm}" if sm else "TensorRT"
    row = ROWS.get((weights, activations))
    what = f"{weights} weights" + ("" if activations == "none" else f" with {activations} activations")
    reason = _REASONS[found].format(target=where, what=what, why=row.why if row else "")
    known = [pair[1] for pair in ROWS if pair[0] == weights]
    return reason, f"Take {row.instead}" if row else f"With {weights} weights take activations {' or '.join(known)}"

"""What may help where the outputs of a result have moved away from those of the original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FEW = 32  # calibration samples


def advice(record: Mapping[str, Any], samples: int, synthetic: bool) -> str:
    """A sentence on what to try next; empty where nothing is known. ``samples``: of the calibration data, 0: none."""
    steps = {step["pass"]: step["options"] for step in record["steps"] if step["changed"]}
    ideas = []
    if synthetic:
        ideas.append("calibrate on real data (--calibration)")
    elif samples and samples < FEW:
        ideas.append(f"calibrate on more than {samples} samples")
    if (options := steps.get("quantize")) is not None:
        if "smooth" not in steps:
            ideas.append("smooth first (compress --recipe int8-smooth)")
        if not options["float_share"]:
            ideas.append("leave in float what suffers most (--float-share 0.1)")
        if options["min_activation_snr"] < 20:
            ideas.append("--min-activation-snr 20")
    if (options := steps.get("quantize-weights")) is not None:
        if options["rounder"] != "gptq" and options["weights"] == "int4":
            ideas.append("round by GPTQ (--rounder gptq)")
        ideas.append("--weights int8" if options["weights"] != "int8" else "exclude nodes (--exclude)")
    if "prune" in steps:
        ideas.append("cut less, or reconstruct the outputs (prune --compensate outputs)")
    if "approximate-ffn" in steps or "sparsify" in steps:
        ideas.append("remove less")
    return f"What may help: {', or '.join(ideas)}" if ideas else ""

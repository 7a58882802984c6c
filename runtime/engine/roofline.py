"""Bounds of the time of an engine on a named GPU, from the kernels in its plan: modelled, never measured.

    least   each kernel    max(products / peak, bytes that no cache can hold / bandwidth)
    most    each kernel    products / peak + all its bytes / bandwidth + the time to launch the kernel

Bytes that no cache can hold are tensors larger than the L2 cache, and constants where all together are larger. Neither
bound knows how well a kernel uses the GPU. So two engines are compared, bound by bound, and times are never told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from channelfold.runtime.engine.kernels import Kernel

LAUNCH = 2e-6  # seconds from one kernel to the next, an assumption


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet: dense ``peaks`` in 10^12 operations a second, ``bandwidth`` in GB/s, ``l2`` in MB.

    A MAC is two operations. ``float`` is TF32 where the GPU has TF32.
    """

    name: str
    sm: int
    peaks: Mapping[str, float]
    bandwidth: float
    l2: float

    def peak(self, arithmetic: str) -> float:
        """MACs a second in a type. In one that the GPU lacks, or an unknown one, it computes in float."""
        return self.peaks.get(arithmetic, self.peaks["float"]) * 0.5e12


# Data sheets and architecture whitepapers of NVIDIA; figures for sparse weights are halved. fp16 and fp8 of GeForce
# cards accumulate in float32.
CARDS = (
    Card("T4", 75, {"float": 8.1, "fp16": 65, "int8": 130}, 320, 4),
    Card("A100", 80, {"float": 156, "fp16": 312, "bf16": 312, "int8": 624}, 2039, 40),
    Card("A10", 86, {"float": 62.5, "fp16": 125, "bf16": 125, "int8": 250}, 600, 6),
    Card("L4", 89, {"float": 60, "fp16": 121, "bf16": 121, "int8": 242, "fp8": 242}, 300, 48),
    Card("RTX 4090", 89, {"float": 82.6, "fp16": 165.2, "bf16": 165.2, "int8": 660.6, "fp8": 330.3}, 1008, 72),
    Card(
        "RTX 5090",
        120,
        {"float": 104.8, "fp16": 209.5, "bf16": 209.5, "int8": 838, "fp8": 419, "fp4": 1676},
        1792,
        96,
    ),
)


def cards(sm: int | None) -> list[Card]:
    """The cards that an engine for ``sm`` runs on; for None, those from SM 80 on."""
    return [card for card in CARDS if (card.sm == sm if sm is not None else card.sm >= 80)]


@dataclass(frozen=True)
class Bounds:
    """Seconds of one run."""

    least: float
    most: float


def bounds(kernels: Sequence[Kernel], card: Card) -> Bounds:
    """The bounds of an engine on a card."""
    constants = sum(data.bytes for kernel in kernels for data in kernel.data if data.constant)
    cache, bandwidth = card.l2 * 1e6, card.bandwidth * 1e9
    least = most = 0.0
    for kernel in kernels:
        products = kernel.macs / card.peak(kernel.arithmetic)
        large = sum(d.bytes for d in kernel.data if d.bytes > cache or (d.constant and constants > cache))
        least += max(products, large / bandwidth)
        most += products + kernel.traffic / bandwidth + LAUNCH
    return Bounds(least, most)

"""Kernels of hand-made programs and of plans that TensorRT-RTX builds, and the bounds of their times."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from channelfold.runtime.engine import build as tensorrt
from channelfold.runtime.engine.kernels import Data, Kernel
from channelfold.runtime.engine.plan import read_plan
from channelfold.runtime.engine.roofline import CARDS, LAUNCH, bounds, cards
from channelfold.runtime.io.files import save
from channelfold.tests.graphs import build


def tensor(name: str, dims: str, kind: str = "float", constant: int = 0) -> str:
    payload = f"const_payload_size={constant} " if constant else ""
    return f'  tensor={{ alignment=4 {payload}dims={{ {dims} }} name="{name}" type={kind} }}\n'


def program(tensors: list[str], calls: list[str], shapes: tuple[str, ...] = (), sm: str = "sm89 ") -> str:
    main = "".join(f"  {call}\n" for call in calls)
    text = f"header {{\n  version = 5\n  accelerators={{{sm}}}\n}}\ndescriptors {{\n{''.join(tensors)}}}\n"
    text += f"main {{\n label bb1: \n{main}}}\n"
    return text + (f"shape_main {{\n{''.join(f'  {call}' + chr(10) for call in shapes)}}}\n" if shapes else "")


def plan_of(*programs: str) -> bytes:
    return b"\x00ftrt\x07" + b"\x00\xff binary \x12\x00".join(text.encode() for text in programs) + b"\x00\x01\x02"


def kernels_of(*programs: str, **shapes: tuple[int, ...]) -> list[Kernel]:
    report = read_plan(plan_of(*programs), {}, shapes)
    assert report.readable, report.reason
    return report.kernels


def call(kind: str, inputs: list[str], output: str, name: str = "k", more: str = "") -> str:
    read = " ".join(f'"{one}"' for one in inputs)
    arguments = "_args" if kind in ("function", "runtime_fusion") else ""
    return (
        f'{kind}={{ name="{name}" output{arguments}={{"{output}" }} input{arguments}={{{read} }} {more} '
        'layers="[ONNX Layer: n]" }'
    )


@pytest.mark.parametrize(
    ("kind", "dims", "macs"),
    [
        ("corrltn", ("2 8 10 10", "16 4 3 3", "2 16 8 8"), 2 * 16 * 8 * 8 * 4 * 3 * 3),
        ("deconvolution", ("2 8 10 10", "8 4 2 2", "2 4 20 20"), 2 * 8 * 10 * 10 * 4 * 2 * 2),
        ("fully_connected", ("3 5 7", "1 7 11", "3 5 11"), 3 * 5 * 11 * 7),
    ],
)
def test_products_and_traffic_of_a_contraction(kind: str, dims: tuple[str, ...], macs: int) -> None:
    sizes = [int(np.prod([int(n) for n in one.split()])) for one in dims]
    tensors = [tensor("x", dims[0], "half"), tensor("w", dims[1], "half", 2 * sizes[1]), tensor("y", dims[2])]
    (kernel,) = kernels_of(program(tensors, [call(kind, ["x", "w"], "y")]))
    assert (kernel.macs, kernel.arithmetic, kernel.measured) == (macs, "fp16", True)
    assert kernel.traffic == 2 * sizes[0] + 2 * sizes[1] + 4 * sizes[2]
    assert [data.constant for data in kernel.data] == [False, True, False]


def test_fused_attention_multiplies_twice() -> None:
    tensors = [tensor(n, dims, "half") for n, dims in (("q", "3 17 16"), ("k", "3 16 20"), ("v", "3 20 8"))]
    calls = [call("function", ["q", "k", "v"], "y", "_gemm_mha_v2")]
    (kernel,) = kernels_of(program([*tensors, tensor("y", "3 17 8", "half")], calls))
    assert (kernel.macs, kernel.arithmetic) == (3 * 17 * 20 * (16 + 8), "fp16")


def test_of_a_table_only_the_rows_that_are_read_count() -> None:
    tensors = [tensor("ids", "5", "int64"), tensor("table", "1000 8", "float", 32000), tensor("y", "5 8")]
    (kernel,) = kernels_of(program(tensors, [call("function", ["ids", "table"], "y", "__myl_CastGath")]))
    assert kernel.traffic == 5 * 8 + 2 * (5 * 8 * 4)


def test_open_sizes_are_computed_as_the_engine_does() -> None:
    tensors = [tensor("x.1", '"n.1" 4'), tensor("w", "4 8", "float", 128), tensor("y", '"n.1" "padded" 8')]
    shapes = (
        'copy={ name="a" output={"n.1" } input={"n" } stream=0 speculate={ }}',
        'add={ name="c" output={"up" } input={"n" "__s^3i64" } stream=0 layers="" }',
        'div={ name="b" output={"padded" } input={"up" "four" } stream=0 layers="" }',
        'sub={ name="d" output={"four" } input={"__s^5i64" "minus" } stream=0 layers="" }',
        'mul={ name="e" output={"minus" } input={"__s^1i64" "__s^1i64" } stream=0 layers="" }',
    )
    text = program(tensors, [call("fully_connected", ["x.1", "w"], "y")], shapes)
    (kernel,) = kernels_of(text, x=(6, 4))
    assert (kernel.macs, kernel.measured) == (6 * ((6 + 3) // 4) * 8 * 4, True)
    (unknown,) = kernels_of(text)
    assert (unknown.macs, unknown.measured, unknown.traffic) == (0, False, 128)


def test_the_products_of_a_fusion_stand_in_its_own_program() -> None:
    tensors = [tensor("x", "5 4", "half"), tensor("w", "4 8", "half", 64), tensor("y", "5 8", "half")]
    outer = program(tensors, [call("runtime_fusion", ["w", "x"], "y", "__myl_FcAdd", "binary=1")])
    other, inner = (
        program([*tensors, tensor("t", f"5 {n}", "half")], [call("fully_connected", ["x", "w"], "t")], sm="*")
        for n in (80, 8)
    )
    (kernel,) = kernels_of(outer, other, inner)
    assert (kernel.macs, kernel.arithmetic, kernel.traffic) == (5 * 8 * 4, "fp16", 40 + 64 + 80)


def test_the_gpu_of_a_plan() -> None:
    text = program([tensor("x", "1")], [call("function", ["x"], "x")])
    assert read_plan(plan_of(text), {}).sm == 89
    portable = text.replace("  accelerators", "  hardware_forward_compatibility=1\n  accelerators")
    assert read_plan(plan_of(portable), {}).sm is None


# ---- bounds ------------------------------------------------------------------------------------------------------

CARD = dataclasses.replace(CARDS[0], peaks={"float": 1, "int8": 4}, bandwidth=100, l2=1)  # 0.5e12 MACs a second, 1 MB


def test_bounds_of_an_engine() -> None:
    product = Kernel("a", ("n",), "int8", 2_000_000, (Data("int8", 500_000, True), Data("float", 2_000_000, False)))
    other = Kernel("b", (), "", 0, (Data("float", 400_000, False),))
    found = bounds([product, other], CARD)
    assert found.least == pytest.approx(2e6 / 100e9)  # what the cache does not hold takes longer than 1 µs of products
    assert found.most == pytest.approx(1e-6 + 2.5e6 / 100e9 + 0.4e6 / 100e9 + 2 * LAUNCH)
    as_float = bounds([dataclasses.replace(product, arithmetic="fp4"), other], CARD)  # a type that the card lacks
    assert as_float.most == pytest.approx(found.most + 3e-6)
    constants = dataclasses.replace(other, data=(Data("int8", 600_000, True),))
    assert bounds([product, constants], CARD).least == pytest.approx(2.5e6 / 100e9 + 0.6e6 / 100e9)


def test_cards_by_architecture() -> None:
    assert [card.name for card in cards(89)] == ["L4", "RTX 4090"]
    assert {card.sm for card in cards(None)} == {80, 86, 89, 120}
    assert set(tensorrt.SM_NAMES) >= {card.sm for card in CARDS}
    assert cards(90) == []


@pytest.mark.rtx
def test_the_kernels_of_a_plan_do_the_products_of_the_graph(tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx")
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {"W": rng.standard_normal((16, 16, 3, 3)), "V": rng.standard_normal((8, 24))}
    text = "c = Conv(x, W)  r = Relu(c)  t = Transpose <perm = [0, 2, 3, 1]> (r)  y = MatMul(z, V)"
    graph = build("(float[n,16,8,8] x, float[n,5,8] z) => (float[] t, float[] y)", text, kind="float", **weights)
    save(graph, tmp_path / "m.onnx")
    shapes = {
        "x": tensorrt.ShapeRange((1, 16, 8, 8), (4, 16, 8, 8), (8, 16, 8, 8)),
        "z": tensorrt.ShapeRange((1, 5, 8), (4, 5, 8), (8, 5, 8)),
    }
    engine = tensorrt.build(tmp_path / "m.onnx", tmp_path / "m.engine", sm=89, shapes=shapes)
    assert all(kernel.measured for kernel in engine.plan.kernels)
    assert sum(kernel.macs for kernel in engine.plan.kernels) == 4 * (6 * 6 * 16 * 16 * 9 + 5 * 8 * 24)
    assert {kernel.arithmetic for kernel in engine.plan.kernels if kernel.macs} == {"float"}
    twice = read_plan(tmp_path / "m.engine", {}, {"x": (8, 16, 8, 8), "z": (8, 5, 8)})
    assert (sum(kernel.macs for kernel in twice.kernels), twice.sm) == (8 * (6 * 6 * 16 * 16 * 9 + 5 * 8 * 24), 89)

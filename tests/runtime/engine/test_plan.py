"""Reading plans: the text of hand-made plans, EngineInspector's JSON, and plans that TensorRT-RTX really built."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from channelfold.runtime.engine import build as tensorrt
from channelfold.runtime.engine import plan
from channelfold.runtime.engine.plan import NodeRun
from channelfold.runtime.io import files

US = "\x1f"


def layers(*names: str) -> str:
    text = US.join(f"[ONNX Layer: {name}]" for name in names)
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def program(types: dict[str, str], *ops: str) -> str:
    tensors = "".join(f'  tensor={{ alignment=4 dims={{ 2 3 }} name="{n}" type={t} }}\n' for n, t in types.items())
    main = "".join(f"  {op}\n" for op in ops)
    return f"header {{\n  version = 5\n}}\ndescriptors {{\n{tensors}}}\nmain {{\n label bb1: \n{main}}}\n"


def multiply(kind: str, a: str, b: str, names: str) -> str:
    return f'{kind}={{ name="op" output={{"y" }} input={{"{a}" "{b}" "alpha" }} stream=0 bias=false layers={names} }}'


def plan_of(*programs: str) -> bytes:
    return b"\x00ftrt\x07" + b"\x00\xff binary \x12\x00".join(text.encode() for text in programs) + b"\x00\x01\x02"


TYPES = {"i": "int8", "w": "int8", "f": "float", "g": "float", "h": "half", "b": "bf16", "e": "fp8_e4m3", "s": "int64"}


@pytest.mark.parametrize(
    ("a", "b", "arithmetic"),
    [
        ("i", "w", "int8"),
        ("f", "g", "float"),
        ("h", "h", "fp16"),
        ("b", "b", "bf16"),
        ("e", "e", "fp8"),
        ("i", "f", "unknown"),
        ("nowhere", "nowhere", "unknown"),
    ],
)
@pytest.mark.parametrize("kind", ["corrltn", "deconvolution", "fully_connected"])
def test_the_types_of_the_two_operands_decide(kind: str, a: str, b: str, arithmetic: str) -> None:
    report = plan.read_plan(plan_of(program(TYPES, multiply(kind, a, b, layers("conv", "relu")))), {"conv": "y"})
    assert report.readable
    assert report.nodes == {"conv": NodeRun(arithmetic, kind, (TYPES.get(a, "?"), TYPES.get(b, "?")))}


def test_a_node_in_a_body_goes_by_its_name() -> None:
    names = layers("choice", "fc | then_branch (then_branch) | choice (If)", "a | b")
    report = plan.read_plan(
        plan_of(program(TYPES, multiply("fully_connected", "i", "w", names))), {"fc": "y", "a | b": "z"}
    )
    assert {name: run.arithmetic for name, run in report.nodes.items()} == {"fc": "int8", "a | b": "int8"}


def test_nodes_merged_into_one_product_all_get_its_arithmetic() -> None:
    merged = multiply("fully_connected", "i", "w", layers("/q/MatMul", "dq", "/k/MatMul", "/v/MatMul"))
    report = plan.read_plan(plan_of(program(TYPES, merged)), {f"/{n}/MatMul": n for n in "qkv"})
    assert [run.arithmetic for run in report.nodes.values()] == ["int8"] * 3


def test_the_program_of_a_fused_kernel_decides_not_what_goes_into_it() -> None:
    """An int8 weight that the kernel dequantizes before it multiplies is float arithmetic."""
    outer = (
        f'runtime_fusion={{ name=__myl_CastMulFc input_args={{ "f" "w" }} layers={layers("dq", "mm")} backbone=gemm }}'
    )
    inner = multiply("fully_connected", "f", "g", layers("mm"))
    report = plan.read_plan(plan_of(program(TYPES, outer), program(TYPES, inner)), {"mm": "y"})
    assert report.nodes == {"mm": NodeRun("float", "fully_connected", ("float", "float"))}


@pytest.mark.parametrize(
    ("inputs", "arithmetic"),
    [
        ('"f" "g" "s"', "float"),
        ('"h" "h"', "fp16"),
        ('"i" "w" "f"', "unknown"),
        ('"f" "h"', "unknown"),
        ("", "unknown"),
    ],
)
def test_a_generated_kernel_counts_only_when_its_data_agree(inputs: str, arithmetic: str) -> None:
    kernel = f"function={{ name=__myl_MulSum input_args={{ {inputs} }} grid = {{ 1 1 1 }} layers={layers('mm')} }}"
    run = plan.read_plan(plan_of(program(TYPES, kernel)), {"mm": "y"}).nodes["mm"]
    assert (run.arithmetic, run.op) == (arithmetic, "function __myl_MulSum")


def test_kernels_around_a_product_do_not_count() -> None:
    before = f'function={{ name=__myl_Cast input_args={{ "f" }} layers={layers("mm")} }}'
    report = plan.read_plan(
        plan_of(program(TYPES, before, multiply("fully_connected", "i", "w", layers("mm")))), {"mm": "y"}
    )
    assert report.nodes["mm"].arithmetic == "int8"


@pytest.mark.parametrize(("scales", "wrong"), [(8, False), (7, False), (16, True)])
def test_a_product_with_more_scales_than_columns_is_wrong(scales: int, wrong: bool) -> None:
    """A row for every block of the weight. Fewer scales than columns: TensorRT has padded 7 columns to 8."""
    sizes = {"i": ("int8", "4 6"), "w": ("int8", "6 8"), "y": ("float", "4 8"), "folded": ("float", f"1 {scales}")}
    tensors = "".join(f'  tensor={{ dims={{ {d} }} name="{n}" type={t} }}\n' for n, (t, d) in sizes.items())
    reader = f'function={{ name=__myl_Mul input_args={{ "folded" "y" }} layers={layers("mul")} }}'
    text = program({}, multiply("fully_connected", "i", "w", layers("fc")), reader)
    report = plan.read_plan(plan_of(text.replace("descriptors {\n", f"descriptors {{\n{tensors}")), {"fc": "y"})
    assert (report.nodes["fc"].wrong, report.wrong) == (wrong, ["fc"] if wrong else [])


def test_nodes_of_one_name_are_unknown_unless_they_run_alike() -> None:
    int8, other = (multiply("corrltn", a, b, layers("dup")) for a, b in (("i", "w"), ("f", "g")))
    assert plan.read_plan(plan_of(program(TYPES, int8, int8)), {"dup": "y"}).nodes["dup"].arithmetic == "int8"
    assert plan.read_plan(plan_of(program(TYPES, int8, other)), {"dup": "y"}).nodes["dup"].arithmetic == "unknown"


def test_a_node_without_a_name_is_found_by_its_output_and_not_by_the_name_it_was_lent() -> None:
    text = program(
        TYPES,
        multiply("corrltn", "i", "w", layers("node_of_out")),
        multiply("corrltn", "f", "g", layers("Conv_3")),  # another node that bears this name in the file
    )
    report = plan.read_plan(plan_of(text), {"Conv_3": "out", "gone": "z"})
    assert report.nodes == {"Conv_3": NodeRun("int8", "corrltn", ("int8", "int8")), "gone": NodeRun("unknown")}


@given(st.text(st.characters(exclude_characters="\x00\x1e\x1f", exclude_categories=["Cs"]), min_size=1))
def test_any_node_name_is_found(name: str) -> None:
    text = program(TYPES, multiply("corrltn", "i", "w", layers("first", name, "last")))
    assert plan.read_plan(plan_of(text), {name: "y"}).nodes[name].arithmetic == "int8"


def test_a_tensor_name_may_hold_quotes_and_braces() -> None:
    text = program({'a \\"b\\" }{': "int8"}, multiply("corrltn", 'a \\"b\\" }{', 'a \\"b\\" }{', layers("c")))
    assert plan.read_plan(plan_of(text), {"c": "y"}).nodes["c"].arithmetic == "int8"


GOOD = plan_of(program(TYPES, multiply("corrltn", "i", "w", layers("conv"))))


@given(st.data())
def test_a_damaged_plan_never_raises(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(GOOD)))
    end = data.draw(st.integers(start, len(GOOD)))
    report = plan.read_plan(GOOD[:start] + data.draw(st.binary(max_size=8)) + GOOD[end:], {"conv": "y"})
    assert report.readable or report.reason


def test_a_plan_of_unknown_form_says_why(tmp_path) -> None:
    empty = tmp_path / "empty.engine"
    empty.touch()
    for unknown in (b"", b"\x00" * 64, GOOD.replace(b"ONNX Layer", b"Layer"), empty, tmp_path / "none.engine"):
        report = plan.read_plan(unknown, {"conv": "y"})
        assert (report.readable, report.nodes) == (False, {})
        assert report.reason


def layer(kind: str, nodes: str, *inputs: str) -> dict:
    return {
        "Name": "x",
        "LayerType": kind,
        "Inputs": [{"Name": "t", "Dimensions": [1], "Format/Datatype": text} for text in inputs],
        "Metadata": nodes,
    }


def test_inspector_json() -> None:
    engine = {
        "Layers": [
            layer("Reformat", "[ONNX Layer: q]", "Row major linear FP32"),
            layer(
                "CaskConvolution", f"[ONNX Layer: conv]{US}[ONNX Layer: relu]", "Thirty-two wide Int8 format", "FP32"
            ),
            layer("CaskDeconvolution", "[ONNX Layer: up]", "Row major linear FP32"),
            layer("gemm", "[ONNX Layer: q/MatMul]\x1e[ONNX Layer: k/MatMul]", "Half"),
            layer("kgen", "[ONNX Layer: vec]", "Float", "Float"),
            layer("kgen", "[ONNX Layer: dequantized]", "Int8", "Int8"),
            layer("gemm", "[ONNX Layer: wide]", "BFloat16"),
        ]
    }
    nodes = dict.fromkeys(["conv", "up", "q/MatMul", "k/MatMul", "vec", "dequantized", "wide", "gone"], "y")
    report = plan.read_inspector(json.dumps(engine), nodes)
    assert report.source == "inspector"
    assert {name: run.arithmetic for name, run in report.nodes.items()} == {
        "conv": "int8", "up": "float", "q/MatMul": "fp16", "k/MatMul": "fp16", "vec": "float",
        "dequantized": "unknown", "wide": "bf16", "gone": "unknown",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"Layers": ["only a name"]}', '{"Layers": [{"Inputs": 3}]}'])
def test_inspector_json_of_unknown_form_says_why(text: str) -> None:
    report = plan.read_inspector(text, {"conv": "y"})
    assert not report.readable
    assert report.reason


# ---- plans that TensorRT-RTX builds ------------------------------------------------------------------------------


class Net:
    """A network written node by node; ``quantized`` and ``weight`` make the two halves of a QDQ pair of operands."""

    def __init__(self, **inputs: list[int]):
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, dims) for n, dims in inputs.items()]
        self.rng = np.random.default_rng(0)

    def const(self, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values), f"const_{len(self.weights)}"))
        return self.weights[-1].name

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes) -> str:
        out = f"t{len(self.nodes)}"
        name = f"{kind}.{len(self.nodes)}" if name is None else name
        self.nodes.append(helper.make_node(kind, inputs, [out], name, **attributes))
        return out

    def quantized(self, x: str, scale: float | list[float] = 0.05) -> str:
        values = np.asarray(scale, np.float32)
        pair = self.const(values), self.const(np.zeros(values.shape, np.int8))
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, *pair), *pair)

    def weight(self, shape: tuple[int, ...], axis: int) -> str:
        values = self.rng.integers(-127, 128, shape).astype(np.int8)
        scale = self.rng.uniform(0.001, 0.01, shape[axis]).astype(np.float32)
        zero = np.zeros(shape[axis], np.int8)
        return self.op("DequantizeLinear", self.const(values), self.const(scale), self.const(zero), axis=axis)

    def floats(self, *shape: int) -> str:
        return self.const(self.rng.standard_normal(shape).astype(np.float32))

    def save(self, path, opset: int = 17) -> None:
        used = {name for node in self.nodes for name in node.input}
        outs = [node.output[0] for node in self.nodes if node.output[0] not in used]
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, values, self.weights)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)


def arithmetic_of(net: Net, folder, sm: int = 89) -> dict[str, str]:
    net.save(folder / "net.onnx")
    engine = tensorrt.build(folder / "net.onnx", folder / "net.engine", sm=sm)
    assert engine.plan.readable, engine.plan.reason
    return {name: run.arithmetic for name, run in engine.plan.nodes.items()}


@pytest.mark.rtx
def test_convolutions(tmp_path) -> None:
    """Which forms of a quantized convolution keep int8, and which TensorRT silently takes to float."""
    pytest.importorskip("tensorrt_rtx")
    net = Net(x=[2, 32, 8, 8])
    pads = {"pads": [1, 1, 1, 1]}
    x = net.quantized("x")
    stem = net.op("Relu", net.op("Conv", x, net.weight((32, 32, 3, 3), 0), name="/a.b/stem: conv", **pads))
    left = net.op("Conv", net.quantized(stem), net.weight((32, 32, 3, 3), 0), net.floats(32), name="residual", **pads)
    total = net.op("Relu", net.op("Add", left, stem))
    net.op("Conv", net.quantized(total), net.weight((32, 1, 3, 3), 0), name="depthwise", group=32, **pads)
    net.op("Conv", x, net.weight((64, 8, 3, 3), 0), name="grouped", group=4, **pads)
    net.op("Conv", x, net.weight((16, 32, 1, 1), 0), name="", **pads)
    net.op("Conv", net.quantized("x", [0.06]), net.weight((32, 32, 3, 3), 0), name="scale of shape [1]", **pads)
    net.op("Conv", x, net.weight((32, 32, 3, 3), 1), name="wrong axis", **pads)
    net.op("Conv", "x", net.weight((32, 32, 3, 3), 0), name='weight "only"', **pads)
    net.op("ConvTranspose", x, net.weight((32, 16, 2, 2), 1), name="transposed", strides=[2, 2])
    found = arithmetic_of(net, tmp_path)
    unnamed = next(name for name in found if name.startswith("Conv_"))
    assert found == {
        "/a.b/stem: conv": "int8", "residual": "int8", "depthwise": "int8", "grouped": "int8", unnamed: "int8",
        "scale of shape [1]": "float", "wrong axis": "float", 'weight "only"': "float", "transposed": "float",
    }  # fmt: skip


@pytest.mark.rtx
def test_matrix_products(tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx")
    net = Net(x=[2, 16, 64], v=[8, 64])
    normal = net.op("LayerNormalization", "x", net.floats(64), net.floats(64), axis=-1)
    shared = net.quantized(normal)
    q, k, v = (net.op("MatMul", shared, net.weight((64, 64), 1), name=f"/attn/{n}/MatMul") for n in "qkv")
    scores = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1]), name="/attn/qk"), axis=-1)
    mixed = net.op("MatMul", scores, v, name="/attn/sv")
    erf = net.op("Erf", net.op("Mul", mixed, net.const(np.float32(0.5**0.5))))
    gelu = net.op("Mul", mixed, net.op("Add", erf, net.const(np.float32(1))))
    net.op("MatMul", net.quantized(gelu), net.weight((64, 32), 1), name="fc")
    net.op("MatMul", net.quantized("x"), net.weight((64, 32), 0), name="wrong axis")
    net.op("MatMul", "x", net.weight((64, 32), 1), name="weight only")
    net.op("Gemm", net.quantized("v"), net.weight((32, 64), 0), net.floats(32), name="gemm", transB=1)
    net.op("MatMul", "v", net.floats(64, 1), name="vector")
    assert arithmetic_of(net, tmp_path) == {
        "/attn/q/MatMul": "int8", "/attn/k/MatMul": "int8", "/attn/v/MatMul": "int8", "/attn/qk": "float",
        "/attn/sv": "float", "fc": "int8", "wrong axis": "float", "weight only": "float", "gemm": "int8",
        "vector": "float",
    }  # fmt: skip


@pytest.mark.rtx
def test_dynamic_shapes_put_kernels_into_programs_of_their_own(tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx")
    net = Net(x=["N", 16, 8, 8])  # type: ignore[list-item]
    net.op("Relu", net.op("Conv", "x", net.floats(16, 16, 3, 3), name="float"))
    net.op("Relu", net.op("Conv", net.quantized("x"), net.weight((16, 16, 3, 3), 0), name="int8"))
    net.save(tmp_path / "net.onnx")
    shapes = {"x": tensorrt.ShapeRange((1, 16, 8, 8), (4, 16, 8, 8), (8, 16, 8, 8))}
    engine = tensorrt.build(tmp_path / "net.onnx", tmp_path / "net.engine", sm=120, shapes=shapes)
    assert {name: run.arithmetic for name, run in engine.plan.nodes.items()} == {"float": "float", "int8": "int8"}


@pytest.mark.gpu
def test_the_inspector_agrees_with_the_plan(tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx")
    if tensorrt.local_gpu()[0] is None:
        pytest.skip("needs an NVIDIA GPU")
    net = Net(x=[2, 32, 8, 8])
    net.op("Conv", net.quantized("x"), net.weight((32, 32, 3, 3), 0), name="int8")
    net.op("Conv", "x", net.floats(32, 32, 3, 3), name="float")
    net.save(tmp_path / "net.onnx")
    engine = tensorrt.build(tmp_path / "net.onnx", tmp_path / "net.engine")
    nodes = plan.contractions(files.load(tmp_path / "net.onnx"))
    seen = tensorrt.inspect(tmp_path / "net.engine", nodes, engine.backend)
    assert seen.readable, seen.reason
    assert {n: run.arithmetic for n, run in seen.nodes.items()} == {"int8": "int8", "float": "float"}
    assert {n: run.arithmetic for n, run in engine.plan.nodes.items()} == {"int8": "int8", "float": "float"}

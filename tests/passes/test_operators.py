"""The table of operators: that nobody is forgotten, and that what it claims is so, by running every operator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from channelfold.passes.operators import OPERATORS, Operator
from channelfold.tests.graphs import random

NOT_LOOKED_AT = {  # operators by domain that the table knows nothing about; passes refuse them by name
    "": (
        "AffineGrid BitCast BitShift BlackmanWindow CastLike CausalConvWithState CenterCropPad Col2Im Compress "
        "ConcatFromSequence Constant ConvInteger CumProd DFT DeformConv Det EyeLike HammingWindow HannWindow If "
        "ImageDecoder LinearAttention Loop MatMulInteger MaxUnpool MeanVarianceNormalization MelWeightMatrix "
        "NegativeLogLikelihoodLoss NonMaxSuppression NonZero OneHot Optional OptionalGetElement OptionalHasElement "
        "QLinearConv QLinearMatMul Range RegexFullMatch ReverseSequence STFT Scan Scatter SequenceAt SequenceConstruct "
        "SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence "
        "StringConcat StringNormalizer StringSplit SwiGLU TfIdfVectorizer Trilu Unique"
    ),
    "com.microsoft": (
        "BiasAdd BiasDropout BiasSoftmax BiasSplitGelu BitmaskBiasDropout BitmaskDropout CDist ComplexMul "
        "ConvTransposeWithDynamicPads CropAndResize DecoderAttention DecoderMaskedMultiHeadAttention "
        "DecoderMaskedSelfAttention DynamicQuantizeLSTM DynamicQuantizeMatMul ExpandDims "
        "FusedMatMulActivation GatedRelativePositionBias GatherBlockQuantized GatherND GemmFastGelu "
        "GemmFloat8 GemmaRotaryEmbedding GridSample GroupNorm Inverse LongformerAttention MatMulBnb4 MatMulFpQ4 "
        "MatMulInteger16 MatMulIntegerToFloat MatMulNBits MoE MulInteger NhwcConv NhwcFusedConv NhwcMaxPool "
        "PackedAttention PackedMultiHeadAttention Pad PagedAttention QAttention QEmbedLayerNormalization QGemm "
        "QLinearAdd QLinearAveragePool QLinearConcat QLinearConv QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul "
        "QLinearReduceMean QLinearSigmoid QLinearSoftmax QLinearWhere QMoE QOrderedAttention QOrderedGelu "
        "QOrderedLayerNormalization QOrderedLongformerAttention QOrderedMatMul QuantizeWithOrder DequantizeWithOrder "
        "Range ReduceSumInteger RelativePositionBias RemovePadding RestorePadding SkipGroupNorm SparseAttention "
        "SparseToDenseMatMul TransposeMatMul Trilu Unique"
    ),
}
OTHER_DOMAINS = {"ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training"}  # classical learning, drafts, training
NOT_FLOAT = {  # what they read or return is an integer or a truth value
    "And", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Equal", "Greater", "GreaterOrEqual", "IsInf",
    "IsNaN", "Less", "LessOrEqual", "Not", "Or", "Xor",
}  # fmt: skip

SHAPE = (2, 4, 6, 6)
AXES = np.array([2, 3])
IMAGE = np.stack(np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-1, 1, 5)), -1)[None].repeat(2, 0).astype(np.float32)
ROIS = np.array([[0, 0, 4, 4], [-9, -9, 5, 4]], np.float32)  # the second one leaves the image
ORDER = random(SHAPE, "order").argsort(2)[:, :, :3]
PLACES = np.array([[0], [1]])
OTHER_INPUTS: dict[str, dict[int, np.ndarray]] = {  # those that hold no data
    "BatchNormalization": {i: np.linspace(0.5, 2, 4) for i in range(1, 5)},
    "Clip": {1: np.array(0.0), 2: np.array(1.0)},
    "Conv": {1: random((5, 4, 3, 3), "w")},
    "ConvTranspose": {1: random((4, 5, 3, 3), "w")},
    "CumSum": {1: np.array(2)},
    "Expand": {1: np.array([3, 2, 4, 6, 6])},
    "Gather": {1: np.array([2, 0])},
    "GatherElements": {1: ORDER},
    "GatherND": {1: PLACES},
    "Gemm": {1: random((4, 5), "w")},
    "GridSample": {1: IMAGE},
    "MatMul": {1: random((6, 5), "w")},
    "MaxRoiPool": {1: np.concatenate([np.zeros((2, 1)), ROIS], 1)},
    "PRelu": {1: np.array(0.25)},
    "Pad": {1: np.array([0, 0, 1, 1, 0, 0, 2, 0])},
    "Reshape": {1: np.array([2, 4, 36])},
    "Resize": {2: np.array([1, 1, 2, 2], np.float32)},
    "RoiAlign": {1: ROIS, 2: np.array([0, 1])},
    "ScatterElements": {1: ORDER},
    "ScatterND": {1: PLACES},
    "Slice": {1: np.array([1]), 2: np.array([5]), 3: np.array([2])},
    "Squeeze": {1: np.array([2])},
    "TensorScatter": {2: np.array([1, 2])},
    "Tile": {1: np.array([1, 1, 2, 1])},
    "Unsqueeze": {1: np.array([2])},
    "Upsample": {1: np.array([1, 1, 2, 2], np.float32)},
    "Where": {0: random(SHAPE, "mask") > 0},
} | {op: {1: AXES} for _, op in OPERATORS if op.startswith("Reduce")}
DATA: dict[str, dict[int, tuple[int, ...]]] = {  # shapes of data that are not as usual
    "BiasGelu": {1: (6,)},
    "FastGelu": {1: (6,)},
    "Gemm": {0: (3, 4)},
    "ScatterElements": {2: (2, 4, 3, 6)},
    "Squeeze": {0: (2, 4, 1, 6)},
    "TensorScatter": {1: (2, 4, 3, 6)},
}
ATTRIBUTES: dict[str, dict[str, object]] = {
    "Cast": {"to": TensorProto.DOUBLE},
    "Concat": {"axis": 2},
    "DepthToSpace": {"blocksize": 2},
    "Flatten": {"axis": 2},
    "Gather": {"axis": 2},
    "GatherElements": {"axis": 2},
    "GlobalLpPool": {},
    "LpPool": {"kernel_shape": [2, 2]},
    "AveragePool": {"kernel_shape": [2, 2]},
    "MaxPool": {"kernel_shape": [2, 2]},
    "MaxRoiPool": {"pooled_shape": [2, 2]},
    "Mod": {"fmod": 1},
    "ScatterElements": {"axis": 2},
    "SpaceToDepth": {"blocksize": 2},
    "Split": {"axis": 2, "num_outputs": 2},
    "Transpose": {"perm": [0, 1, 3, 2]},
}
OPSETS = {"GlobalLpPool": 17, "MaxRoiPool": 17, "Swish": 24, "TensorScatter": 24, "Upsample": 9}

Run = Callable[..., np.ndarray]


def claims(wanted: Callable[[Operator], object]) -> list[tuple[str, str]]:
    return [key for key, row in OPERATORS.items() if wanted(row) and key[1] not in NOT_FLOAT]


def run(domain: str, op: str, inputs: list[np.ndarray]) -> np.ndarray:
    """The first output of an operator, from ONNX Runtime, or where that has no kernel from ONNX's reference."""
    names = [f"i{k}" for k in range(len(inputs))]
    given = {name: value for name, value in zip(names, inputs, strict=True) if value.size}
    outputs = ["y", "z"] if op in ("EmbedLayerNormalization", "Split") else ["y"]
    node = helper.make_node(
        op, [name if name in given else "" for name in names], outputs, domain=domain, **ATTRIBUTES.get(op, {})
    )
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in given.items()
    ]
    graph = helper.make_graph([node], "g", values, [onnx.ValueInfoProto(name=name) for name in outputs])
    imports = [helper.make_opsetid("", OPSETS.get(op, 23)), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    try:
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception:  # there are as many kinds as reasons to have no kernel
        return np.asarray(ReferenceEvaluator(model).run(None, given)[0])
    return np.asarray(session.run(None, given)[0])


def function(
    domain: str, op: str
) -> tuple[Callable[[list[np.ndarray]], np.ndarray], Callable[[str], list[np.ndarray]]]:
    """(f of the data inputs, random data by name) of an operator."""
    row = OPERATORS[domain, op]
    places = (0,) if op == "Pad" else row.data or (0, 1)  # the value that Pad has by default is zero
    others = OTHER_INPUTS.get(op, {})

    def data(name: str) -> list[np.ndarray]:
        shapes = [DATA.get(op, {}).get(k, SHAPE) for k in places]
        return [random(shape, f"{name}{k}").astype(np.float32) for k, shape in zip(places, shapes, strict=True)]

    def f(values: list[np.ndarray]) -> np.ndarray:
        made = dict(zip(places, values, strict=True))
        for k, value in others.items():
            made[k] = value.astype(np.float32) if value.dtype == np.float64 else value
        return run(domain, op, [made.get(k, np.zeros(0, np.float32)) for k in range(max(made) + 1)])

    return f, data


def equal(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and bool(np.allclose(one, other, rtol=1e-4, atol=1e-4, equal_nan=True))


def by_channel(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """One number a channel where a tensor has them on axis 1, else one number."""
    return values.reshape(-1, *[1] * (like.ndim - 2)) if like.ndim > 2 and like.shape[1] == 4 else values[:1]


def scales(domain: str, op: str, factors: np.ndarray) -> bool:
    f, data = function(domain, op)
    x = data("x")
    if any(v.shape[1:2] != (4,) for v in (*x, f(x))):
        factors = factors[:1]
    return equal(f([v * by_channel(factors, v) for v in x]), f(x) * by_channel(factors, f(x)))


def shifts(domain: str, op: str) -> bool:
    f, data = function(domain, op)
    x, terms = data("x"), np.array([0.5, -1, 2, 3], np.float32)
    if any(v.shape[1:2] != (4,) for v in (*x, f(x))):
        terms = terms[:1]
    return equal(f([v + by_channel(terms, v) for v in x]), f(x) + by_channel(terms, f(x)))


def is_linear(f: Callable[[list[np.ndarray]], np.ndarray], x: list[np.ndarray], y: list[np.ndarray]) -> bool:
    zero = [np.zeros_like(v) for v in x]
    return equal(f([a + b for a, b in zip(x, y, strict=True)]) + f(zero), f(x) + f(y))


def test_every_operator_of_onnx_has_a_row_or_is_listed():
    schemas = onnx.defs.get_all_schemas_with_history()
    assert {schema.domain for schema in schemas} == {"", *OTHER_DOMAINS}
    names, listed = {s.name for s in schemas if not s.domain}, NOT_LOOKED_AT[""].split()
    rows = {op for domain, op in OPERATORS if not domain}
    assert not rows & set(listed)
    assert len(set(listed)) == len(listed)
    assert rows | set(listed) == names | {"SimplifiedLayerNormalization"}  # ONNX Runtime has that one in ONNX's domain


def test_every_operator_of_microsoft_exists_and_is_said_once():
    names = {schema.name for schema in get_all_operator_schema() if schema.domain == "com.microsoft"}
    rows = [op for domain, op in OPERATORS if domain == "com.microsoft"]
    listed = [*rows, *NOT_LOOKED_AT["com.microsoft"].split()]
    assert set(listed) <= names
    assert len(set(listed)) == len(listed)


@pytest.mark.parametrize("key", claims(lambda row: row.elementwise or (row.scale and row.kind != "attention")), ids=str)
def test_scales(key: tuple[str, str]):
    row = OPERATORS[key]
    positive, signed = np.array([2, 0.5, 3, 0.25], np.float32), np.array([-2, 0.5, -3, -1], np.float32)
    held = "any" if scales(*key, signed) else "positive" if scales(*key, positive) else ""
    assert held == row.scale or key[1] == "Mod"  # that of ONNX's default, for integers, does not


@pytest.mark.parametrize("key", claims(lambda row: row.elementwise or (row.scale and row.kind != "attention")), ids=str)
def test_shifts(key: tuple[str, str]):
    assert shifts(*key) == OPERATORS[key].shift


@pytest.mark.parametrize("key", claims(lambda row: row.elementwise or row.linear), ids=str)
def test_linear(key: tuple[str, str]):
    f, data = function(*key)
    assert is_linear(f, data("x"), data("y")) == OPERATORS[key].linear or key[1] == "Where"  # a mask may be of data


@pytest.mark.parametrize("key", claims(lambda row: row.elementwise), ids=str)
def test_elementwise(key: tuple[str, str]):
    f, data = function(*key)
    x = data("x")
    mixed = [np.flip(v, -1) for v in x]
    if key[1] != "Where":  # whose mask would have to be flipped, too
        assert equal(f(mixed), np.flip(f(x), -1))


@pytest.mark.parametrize("key", claims(lambda row: row.moves), ids=str)
def test_moves(key: tuple[str, str]):
    f, data = function(*key)
    x = data("x")
    assert np.isin(f(x), np.concatenate([[0], *(v.reshape(-1) for v in x)])).all()


@pytest.mark.parametrize("key", claims(lambda row: row.arithmetic), ids=str)
def test_arithmetic(key: tuple[str, str]):
    f, data = function(*key)
    (x, fixed), (y, _) = data("x"), data("y")
    assert is_linear(lambda values: f([*values, fixed]), [x], [y])


@pytest.mark.parametrize("key", claims(lambda row: row.neutral is not None), ids=str)
def test_neutral(key: tuple[str, str]):
    f, data = function(*key)
    x = data("x")[0]
    assert equal(f([x, np.full_like(x, OPERATORS[key].neutral)]), x)


@pytest.mark.parametrize("key", claims(lambda row: row.rectifies), ids=str)
def test_rectifies(key: tuple[str, str]):
    f, data = function(*key)
    high, low = ([np.full_like(v, value if not k else 0) for k, v in enumerate(data("x"))] for value in (3, -3))
    assert np.all(np.abs(f(low)) < np.abs(f(high))) or key[1] == "Erf"  # the step in a Gelu that is written out


@pytest.mark.parametrize("key", claims(lambda row: row.kind == "reduce"), ids=str)
def test_sums(key: tuple[str, str]):
    f, data = function(*key)
    x = np.abs(data("x")[0]) + 0.5
    more = np.concatenate([x, np.zeros_like(x)], 2)
    held = equal(f([x]), f([more])) and not f([np.zeros_like(x)]).any()
    assert held == OPERATORS[key].sums or key[1] == "ReduceMax"  # that of positive numbers


@pytest.mark.parametrize("key", claims(lambda row: row.gamma), ids=str)
def test_gamma_and_beta(key: tuple[str, str]):
    """A norm with both scaled is scaled; the two are where the table says."""
    domain, op = key
    row, channels = OPERATORS[key], 4
    shape = (2, channels, 5) if row.norm_axis == 1 else (2, 5, channels)
    inputs = [random(shape, f"i{k}").astype(np.float32) for k in range(row.gamma)]
    if row.kind == "embedding":
        inputs = [np.array([[0, 1, 2]], np.int32)] * 2 + [
            random((3, channels), f"t{k}").astype(np.float32) for k in "abc"
        ]
    parameters = [np.linspace(k + 1, k + 2, channels, dtype=np.float32) for k in range(1 + row.beta)]
    rest = [np.zeros(channels, np.float32), np.ones(channels, np.float32)] if row.kind == "batch_norm" else []
    factors = np.array([2, -1, 0.5, 3], np.float32)
    ATTRIBUTES["GroupNormalization"] = {"num_groups": 2}
    plain = run(domain, op, [*inputs, *parameters, *rest])
    scaled = run(domain, op, [*inputs, *(p * factors for p in parameters), *rest])
    assert equal(scaled, plain * (factors[:, None] if row.norm_axis == 1 else factors))

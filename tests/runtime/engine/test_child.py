"""What TensorRT's own messages become: one line with the node, the reason and the remedy."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from channelfold.runtime.engine import build as tensorrt
from channelfold.runtime.engine import child as tensorrt_child
from channelfold.runtime.errors import BuildError, DependencyError


def refusal(desc: str, op: str, name: str = "n", number: int = 0) -> SimpleNamespace:
    return SimpleNamespace(desc=lambda: desc, node=lambda: number, node_name=lambda: name, node_operator=lambda: op)


CHECK = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at /_src/c.cpp:250)"
API = "ITensor::getDimensions: Error Code 4: API Usage Error "


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            refusal("Assertion failed: shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported. Please set kX "
                    "to enable asymmetric quantization if it is on DLA.", "QuantizeLinear"),
            "TensorRT refuses node 'n' (QuantizeLinear) of m.onnx: Non-zero zero point is not supported. Quantization "
            "must be symmetric: give every QuantizeLinear and DequantizeLinear the int8 zero point 0.",
        ),
        (
            refusal(f"Invalid Node - n\n{API}(n: input has type Int32 but must have type FP8, FP4, Int4, Int8. "
                    f"In checkType at /_src/optimizer/common/nodeBase.cpp:456)\n{CHECK}", "DequantizeLinear"),
            "TensorRT refuses node 'n' (DequantizeLinear) of m.onnx: input has type Int32 but must have type FP8, FP4, "
            "Int4, Int8. Keep the bias in float, without DequantizeLinear.",
        ),
        (
            refusal("Assertion failed: a->getType() == nvinfer1::DataType::kHALF: input tensor A must be FP16.",
                    "MatMulNBits", "", 7),
            "TensorRT refuses node number 7 (MatMulNBits, without a name) of m.onnx: input tensor A must be FP16. Cast "
            "the model to fp16.",
        ),
        (
            refusal("false", "QLinearConv"),
            "TensorRT refuses node 'n' (QLinearConv) of m.onnx: unknown op. Use the QDQ form: a float op between "
            "DequantizeLinear and QuantizeLinear.",
        ),
        (
            refusal("Failed to import initializer: In node -1 with name:  and operator:  (importInitializers): x", "",
                    "", -1),
            "TensorRT refuses m.onnx: Found unsupported datatype (5) when importing initializer: c2. TensorRT has "
            "int8, int4, fp8 E4M3 and fp4 tensors, but no uint4, int16, E5M2 or strings.",
        ),
    ],
)  # fmt: skip
def test_a_refused_node_is_named_with_the_reason_and_the_remedy(error: SimpleNamespace, message: str) -> None:
    log = tensorrt_child._Log()
    log.errors = ["WeightsContext.cpp:519: Found unsupported datatype (5) when importing initializer: c2"]
    with pytest.raises(BuildError) as raised:
        tensorrt_child._refuse_model([error], log, "m.onnx")
    assert str(raised.value) == message


def test_several_refused_nodes() -> None:
    errors = [refusal("false", "Unique", name) for name in "abcdef"]
    with pytest.raises(
        BuildError, match=r"node 'a' \(Unique\).*; 5 more: node 'b' \(Unique\), .*node 'd' \(Unique\)\."
    ):
        tensorrt_child._refuse_model(errors, tensorrt_child._Log(), "m.onnx")


BUILDER = "IBuilder::buildSerializedNetwork: Error Code 1: Myelin "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"{BUILDER}([pass.cpp:337: check_turing_op_compatibility] Cannot compile operation 'fc' for Turing (SM75): "
            "FP32 GEMM is not supported. In compileGraph at /_src/optimizer/myelin/codeGenerator.cpp:2012)",
            "Cannot compile operation 'fc' for Turing (SM75): FP32 GEMM is not supported. Cast the model to fp16 for "
            "SM 75.",
        ),
        (
            f"{BUILDER}([type.cpp:186: infer_type] Could not infer output types for operation:    36: deconv: t4-(bf16["
            "2,16,32,32][]so[], align=2) | t1-(bf16[2,32][]so[], align=2)<entry>, stream = 0 // up/conv\n  | n_groups)",
            "Could not infer output types for operation deconv (up/conv). Keep ConvTranspose in float or fp16.",
        ),
        (
            f"{BUILDER}(MyelinCheckException: cudnn_impl.cpp:89: CHECK(dtype == myelinTypeFloat) failed.)",
            "MyelinCheckException: cudnn_impl.cpp:89: CHECK(dtype == myelinTypeFloat) failed. TensorRT-RTX convolves "
            "in int8 from 1.7 on: pip install -U 'tensorrt-rtx-cu12>=1.7'",
        ),
        ("std::bad_alloc", "std::bad_alloc. Give it more memory, or a smaller MAX in --shape."),
    ],
)
def test_a_refused_network(text: str, message: str) -> None:
    with pytest.raises(BuildError) as error:
        tensorrt_child._refuse_network(text, "m.onnx")
    assert str(error.value) == f"TensorRT cannot build m.onnx: {message}"


def test_warnings_worth_telling() -> None:
    log = tensorrt_child._Log()
    record = logging.LogRecord("Polygraphy", logging.WARNING, "", 0, "x.cpp:3: kept %s", ("once",), None)
    log.handle(record)
    log.handle(record)
    log.warnings += [
        "ModelImporter.cpp:1071: Make sure input ids has Int64 binding.",
        "onnxOpImporters.cpp:88: UINT8 data W_codes is being converted to INT32",
        "Profile kMIN values are not self-consistent. IShuffleLayer r: reshape changes volume In f at /_src/s.cpp:3 "
        "Instruction: RESHAPE{8 32}",
        "onnxOpImporters.cpp:1980: TensorRT supports QuantizeLinear/DequantizeLinear with UINT8 zero_point only on DLA",
    ]
    assert tensorrt_child._worth_telling(log.warnings) == [
        "kept once",
        "The engine will fail at the MIN shapes: IShuffleLayer r: reshape changes volume",
        "uint8 quantization runs as int8: values above 127 are clamped, half the range is lost. "
        "Quantize with int8 zero points",
    ]


FAKE = """
__version__ = "10.9.0"
class NetworkDefinitionCreationFlag: STRONGLY_TYPED = 1
class ILogger: pass
class Logger: INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)
class Builder:
    def __init__(self, logger):
        logger.log(Logger.ERROR, "createInferBuilder: Error Code 6: API Usage Error (CUDA initialization failure: 35)")
        raise TypeError("factory function returned nullptr")
"""


def test_a_driver_that_fails_when_tensorrt_starts(tmp_path, monkeypatch) -> None:
    pytest.importorskip("polygraphy")
    (tmp_path / "tensorrt.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        DependencyError, match=r"tensorrt 10\.9\.0 cannot start: CUDA initialization failure: 35\. Look"
    ):
        tensorrt._run({"task": "build", "backend": "tensorrt", "model": "m.onnx"}, "m.onnx", lambda *_: None)

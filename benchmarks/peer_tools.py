"""One model quantized to INT8 by another tool, in the environment of that tool (``peers`` says how to make it).

    python benchmarks/peer_tools.py TOOL MODEL CALIBRATION OUT

Static quantization of weights by channel and of activations by tensor, default settings. Needs no channelfold.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Feed = dict[str, np.ndarray]


def feeds(model: str, data: str) -> list[Feed]:
    """The calibration samples of a file of stacked samples, or of a folder with a file for each batch."""
    import onnx

    files = sorted(Path(data).glob("*.npz")) if Path(data).is_dir() else []
    inputs = {value.name: value.type.tensor_type for value in onnx.load(model).graph.input}
    if files:
        found = [dict(np.load(file)) for file in files]
    else:
        stacked = dict(np.load(data))
        (count,) = {len(values) for values in stacked.values()}
        found = [{name: values[n : n + 1] for name, values in stacked.items()} for n in range(count)]
    kinds = {name: onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type) for name, kind in inputs.items()}
    return [{name: feed[name].astype(kind) for name, kind in kinds.items()} for feed in found]


def onnxruntime(model: str, samples: list[Feed], out: str, method: str = "MinMax", **settings: Any) -> None:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = "prepared.onnx"
    quant_pre_process(model, ready, skip_symbolic_shape=True)
    quantization.quantize_static(
        ready, out, reader(samples), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
        calibrate_method=quantization.CalibrationMethod[method], **settings,
    )  # fmt: skip


def onnxruntime_percentile(model: str, samples: list[Feed], out: str) -> None:
    onnxruntime(model, samples, out, "Percentile")


def onnxruntime_entropy(model: str, samples: list[Feed], out: str) -> None:
    onnxruntime(model, samples, out, "Entropy")


def onnxruntime_products(model: str, samples: list[Feed], out: str) -> None:
    """Of transformers: only products with weights."""
    onnxruntime(
        model, samples, out, op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip


def nncf(model: str, samples: list[Feed], out: str) -> None:
    import nncf  # pyright: ignore
    import onnx

    transformer = nncf.ModelType.TRANSFORMER if "MatMul" in operators(model) and "Softmax" in operators(model) else None
    result = nncf.quantize(onnx.load(model), nncf.Dataset(samples), subset_size=len(samples), model_type=transformer)
    onnx.save(result, out)


def modelopt(model: str, samples: list[Feed], out: str) -> None:
    from modelopt.onnx import quantization  # pyright: ignore

    quantization.quantize(
        model, quantize_mode="int8", calibration_method="max", calibration_data_reader=reader(samples),
        calibration_eps=["cpu"], output_path=out,
    )  # fmt: skip


def quark(model: str, samples: list[Feed], out: str) -> None:
    from quark.onnx import ModelQuantizer  # pyright: ignore
    from quark.onnx.quantization.config import Config, get_default_config  # pyright: ignore

    ModelQuantizer(Config(global_quant_config=get_default_config("INT8_CNN_DEFAULT"))).quantize_model(
        model, out, reader(samples)
    )


def aimet(model: str, samples: list[Feed], out: str) -> None:
    import onnx
    from aimet_onnx import QuantizationSimModel  # pyright: ignore
    from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight  # pyright: ignore
    from aimet_onnx.common.quantsim_config.utils import get_path_for_per_channel_config  # pyright: ignore

    loaded = onnx.load(model)
    fold_all_batch_norms_to_weight(loaded)
    simulated = QuantizationSimModel(loaded, config_file=get_path_for_per_channel_config())
    simulated.compute_encodings(samples)
    onnx.save(simulated.to_onnx_qdq(prequantize_constants=True), out)


def operators(model: str) -> set[str]:
    import onnx

    return {node.op_type for node in onnx.load(model).graph.node}


def reader(samples: list[Feed]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rewind()

        def get_next(self) -> Feed | None:
            return next(self.left, None)

        def rewind(self) -> None:
            self.left: Iterator[Feed] = iter(samples)

        def get_first(self) -> Feed:
            return samples[0]

    return Reader()


TOOLS: dict[str, Callable[[str, list[Feed], str], None]] = {
    tool.__name__: tool
    for tool in (
        onnxruntime,
        onnxruntime_percentile,
        onnxruntime_entropy,
        onnxruntime_products,
        nncf,
        modelopt,
        quark,
        aimet,
    )
}

if __name__ == "__main__":
    name, source, calibration, result = sys.argv[1:]
    samples = feeds(source, calibration)
    with tempfile.TemporaryDirectory() as scratch:  # some tools write into the folder they run in, or into the model
        copy = shutil.copy(source, scratch)
        result = str(Path(result).absolute())
        os.chdir(scratch)
        TOOLS[name](copy, samples, result)

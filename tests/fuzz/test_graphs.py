"""Random valid graphs through the commands: none may be refused, and the results are right."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import numpy as np
import onnx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from channelfold.runtime.io.convert import export
from channelfold.runtime.io.weights import tensor_proto
from channelfold.tests import channel_strategies, region_strategies, strategies
from channelfold.tests.fuzz.harness import FIRST, Case, budget, run_all
from channelfold.tests.fuzz.mutate import command


def _serialized(made) -> bytes:
    """The model in float32. Open sizes become those that the graph was drawn for: many graphs have no other."""
    made, values = made if isinstance(made, tuple) else (made, None)
    model, large = (made, []) if isinstance(made, onnx.ModelProto) else export(made)
    model.graph.initializer.extend(tensor_proto(values, proto.name) for proto, values in large)
    for axis, dim in enumerate(model.graph.input[0].type.tensor_type.shape.dim):
        if not dim.dim_value:
            dim.dim_value = values["x"].shape[axis] if values else 2
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.DOUBLE:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.DOUBLE:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for attribute in (a for node in model.graph.node if node.op_type == "Cast" for a in node.attribute):
        attribute.i = TensorProto.FLOAT
    return model.SerializeToString()


def _drawn(count: int) -> list[bytes]:
    """Random graphs in float32."""
    found: list[bytes] = []
    kinds = st.one_of(channel_strategies.networks(), region_strategies.graphs(), strategies.graphs())
    how = settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
    )
    hypothesis.seed(FIRST)(how(given(kinds)(lambda made: found.append(_serialized(made)))))()
    return [data for data in found if _is_valid(data)]


def _is_valid(data: bytes) -> bool:
    """Whether ONNX takes a graph that its reference evaluator has run (a LayerNormalization of axis 1 on a vector)."""
    try:
        onnx.shape_inference.infer_shapes(onnx.ModelProto.FromString(data), strict_mode=True)
    except onnx.shape_inference.InferenceError:
        return False
    return True


def _case(seed: int, data: bytes) -> Case:
    def make(folder: Path) -> list[str]:
        (folder / "model.onnx").write_bytes(data)
        return command(np.random.default_rng([seed, 3]), folder)

    return Case(f"graph-{seed}", make)


def test_random_valid_graphs():
    seeds = budget(20)
    cases = [_case(seed, data) for seed, data in zip(seeds, _drawn(len(seeds)), strict=False)]
    run_all(cases)
    refused = [f"{case.name}: {case.error}" for case in cases if case.code not in (0, 3)]
    assert not refused, "\n".join(refused)

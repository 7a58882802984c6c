"""What several test files need: command lines run in this process, two models compared by meaning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import settings
from onnx import numpy_helper

from channelfold import cli
from channelfold.passes import pipeline
from channelfold.runtime import shell

# The same examples every time; --hypothesis-profile=explore draws new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def nothing_is_taken_back(request, monkeypatch):
    """A site that is taken back is a refusal to the user, and would hide a pass that computes something else."""
    blame, blamed = pipeline.to_blame, []

    def noted(before, sites, error):
        blamed.append(str(error))
        return blame(before, sites, error)

    monkeypatch.setattr(pipeline, "to_blame", noted)
    yield
    assert not blamed or "takes_back" in request.keywords


@pytest.fixture
def run(capfd, monkeypatch):
    """Runs a command line in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*args: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        code = shell.run(cli.cli, [str(arg) for arg in args])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def fails(run):
    """Runs a command line that must fail with one line on stderr and nothing on stdout; returns that line."""

    def fails(code: int, *args: str | Path) -> str:
        found, out, err = run(*args)
        assert (found, out, err.count("\n")) == (code, "", 1), err
        assert err.startswith("error: ")
        return err

    return fails


@pytest.fixture(scope="session")
def canonical():
    """A function that brings a ModelProto into one form, whatever the liberties ONNX leaves.

    Values of Constant nodes are initializers, tensors are stored as raw bytes, unnamed nodes have a name, unused
    initializers are gone, and lists whose order means nothing are sorted.
    """
    return _canonical


def _canonical(model: onnx.ModelProto) -> onnx.ModelProto:
    out = onnx.ModelProto()
    out.CopyFrom(model)
    _sort(out.opset_import, lambda entry: entry.domain)
    _sort(out.metadata_props, lambda entry: entry.key)
    _canonical_graph(out.graph, ir_version=out.ir_version)
    _clear_empty(out)
    out.ir_version = max(out.ir_version, onnx.helper.find_min_ir_version_for(out.opset_import, True), 4)
    return out


def _clear_empty(message) -> None:
    """An empty string is as good as none."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in value if field.is_repeated else (value,):
                _clear_empty(item)
        elif not field.is_repeated and value in ("", b"") and field.name != "s":
            message.ClearField(field.name)


def _canonical_graph(graph: onnx.GraphProto, ir_version: int) -> None:
    constants = {tensor.name for tensor in graph.initializer}
    if ir_version < 4:
        _keep(graph.input, [value for value in graph.input if value.name not in constants])
    nodes = []
    for index, node in enumerate(graph.node):
        if node.op_type == "Constant" and (values := _constant(node)) is not None:
            graph.initializer.append(values)
            graph.initializer[-1].name = node.output[0]
            continue
        node.name = node.name or f"{node.op_type}_{index}"
        _sort(node.attribute, lambda attribute: attribute.name)
        nodes.append(node)
        for attribute in node.attribute:
            for tensor in (*([attribute.t] if attribute.HasField("t") else ()), *attribute.tensors):
                _as_raw(tensor)
            if attribute.HasField("g"):
                _canonical_graph(attribute.g, ir_version)
    _keep(graph.node, nodes)
    used = _names(graph)
    _keep(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in used])
    for tensor in graph.initializer:
        _as_raw(tensor)
    variables = {name for node in graph.node for name in node.output} - {value.name for value in graph.output}
    _keep(graph.value_info, [value for value in graph.value_info if value.name in variables])
    for values in (graph.initializer, graph.value_info, graph.metadata_props, graph.quantization_annotation):
        _sort(values, lambda entry: entry.SerializeToString(deterministic=True))


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    (attribute,) = node.attribute
    if attribute.name == "sparse_value":
        return None
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return value
    kind = attribute.name.removeprefix("value_").rstrip("s")
    dtype = {"float": np.float32, "int": np.int64, "string": object}[kind]
    return numpy_helper.from_array(np.array(value, dtype))


def _names(graph: onnx.GraphProto) -> set[str]:
    """Everything that a graph and its subgraphs read."""
    used = {value.name for value in (*graph.input, *graph.output)}
    used |= {p.value for a in graph.quantization_annotation for p in a.quant_parameter_tensor_names}
    for node in graph.node:
        used |= set(node.input)
        for attribute in node.attribute:
            used |= _names(attribute.g) if attribute.HasField("g") else set()
    return used


def _as_raw(tensor: onnx.TensorProto) -> None:
    if tensor.data_type != onnx.TensorProto.STRING:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))


def _keep(field, values) -> None:
    kept = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(kept)


def _sort(field, key) -> None:
    _keep(field, sorted(field, key=key))

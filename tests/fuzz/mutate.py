"""Mutations of ONNX files that know what the fields mean, and of their bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from channelfold.tests.fuzz.seeds import seeds

HUGE = (0, -1, 1, 2, 3, 7, 255, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 31), -(1 << 63))
NAMES = ("", " ", "x", "a\nerror: forged", "\x1b[31mred\x1b[0m", "é" * 30, "n" * 5000, "../up", "a/b/c", "%s{0}", "\0")
OPS = (
    "Conv", "MatMul", "Gemm", "Add", "Mul", "Relu", "Reshape", "Transpose", "Concat",
    "Slice", "Gather", "Cast", "If", "Loop", "Identity", "Softmax", "BatchNormalization", "LayerNormalization",
    "Split", "Squeeze", "Unsqueeze", "Pad", "Resize", "QuantizeLinear", "DequantizeLinear", "Shape", "Expand",
    "Tile", "Range", "Constant", "ConstantOfShape", "Einsum", "LSTM", "NotAnOp", "Scan", "Where",
    "ReduceMean", "ConvTranspose", "TopK", "Clip", "Dropout", "RandomNormal", "NonZero", "MaxPool", "Flatten",
    "Attention", "OneHot", "CumSum", "GRU", "Div", "Sub",
)  # fmt: skip
Mutation = Callable[["Mutator"], None]


class Mutator:
    """One file under mutation: ``model``, random choices, and files beside the model."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        known = seeds()
        self.name = self.pick(list(known))
        self.model = onnx.ModelProto.FromString(known[self.name])
        self.beside: dict[str, bytes] = {}

    def pick(self, items):
        return items[int(self.rng.integers(len(items)))]

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    @property
    def graphs(self) -> list[onnx.GraphProto]:
        found = [self.model.graph]
        for graph in found:
            found += [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
        return found

    @property
    def graph(self) -> onnx.GraphProto:
        return self.pick(self.graphs) if self.chance(0.4) else self.model.graph

    def node(self) -> onnx.NodeProto:
        nodes = self.graph.node or self.model.graph.node
        return self.pick(nodes) if len(nodes) else self.model.graph.node.add(op_type="Relu", input=["x"], output=["q"])

    def tensor(self) -> onnx.TensorProto:
        found = [*self.model.graph.initializer]
        found += [a.t for graph in self.graphs for node in graph.node for a in node.attribute if a.HasField("t")]
        found += [s.values for s in self.model.graph.sparse_initializer]
        return self.pick(found) if found else self.model.graph.initializer.add(name="extra", data_type=1)

    def tensor_name(self) -> str:
        found = {n for graph in self.graphs for node in graph.node for n in (*node.input, *node.output)}
        return self.pick(sorted(found) or ["x"])

    def write(self, folder: Path) -> None:
        """Writes model.onnx after one to three mutations, now and then broken as bytes."""
        for _ in range(int(self.rng.integers(1, 4))):
            with contextlib.suppress(Exception):  # what protobuf does not let happen
                self.pick(MUTATIONS)(self)
        data = self.model.SerializeToString()
        if self.chance(0.12):
            data = _broken(self, data)
        (folder / "model.onnx").write_bytes(data)
        for name, content in self.beside.items():
            (folder / name).write_bytes(content)


def _broken(m: Mutator, data: bytes) -> bytes:
    at, length = int(m.rng.integers(len(data) or 1)), int(m.rng.integers(1, 40))
    match m.pick(["cut", "flip", "drop", "insert", "double", "zeros", "name", "empty"]):
        case "cut":
            return data[:at]
        case "flip":
            bits = bytearray(data)
            for place in m.rng.integers(0, max(min(len(data), 4000), 1), 3):
                bits[place] ^= 1 << int(m.rng.integers(8))
            return bytes(bits)
        case "drop":
            return data[:at] + data[at + length :]
        case "insert":
            return data[:at] + m.rng.bytes(length) + data[at:]
        case "double":
            return data + data
        case "zeros":
            return data[:at] + bytes(length) + data[at + length :]
        case "name":  # not UTF-8
            name = m.tensor_name().encode()
            return data.replace(name, b"\xff" * len(name), int(m.rng.integers(1, 4))) if name else data
    return b""


# ---- nodes ---------------------------------------------------------------------------------------------------------


def inputs(m: Mutator) -> None:
    node = m.node()
    names = list(node.input)
    match m.pick(["drop", "swap", "more", "other", "missing", "none", "clear", "many"]):
        case "drop" if names:
            del names[int(m.rng.integers(len(names)))]
        case "swap":
            m.rng.shuffle(names)
        case "more":
            names.append(m.tensor_name())
        case "missing" if names:
            names[int(m.rng.integers(len(names)))] = "nowhere"
        case "none" if names:
            names[int(m.rng.integers(len(names)))] = ""
        case "clear":
            names = []
        case "many":
            names = names * 300
        case _ if names:
            names[int(m.rng.integers(len(names)))] = m.tensor_name()
    del node.input[:]
    node.input.extend(map(str, names))


def outputs(m: Mutator) -> None:
    node = m.node()
    match m.pick(["clear", "other", "same", "empty", "more", "own"]):
        case "clear":
            del node.output[:]
        case "same" if node.output:
            node.output.append(node.output[0])
        case "empty" if node.output:
            node.output[0] = ""
        case "own" if node.output and node.input:
            node.output[0] = node.input[0]
        case "more":
            node.output.append("spare")
        case _ if node.output:
            node.output[0] = m.tensor_name()


def operator(m: Mutator) -> None:
    m.node().op_type = m.pick(OPS)


def domain(m: Mutator) -> None:
    m.node().domain = m.pick(["", "ai.onnx", "com.microsoft", "ai.onnx.ml", "nobody", "own"])


def order(m: Mutator) -> None:
    graph = m.graph
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    match m.pick(["shuffle", "drop", "double", "reverse"]):
        case "shuffle":
            nodes = [nodes[i] for i in m.rng.permutation(len(nodes))]
        case "drop" if nodes:
            del nodes[int(m.rng.integers(len(nodes)))]
        case "double" if nodes:
            nodes.append(m.pick(nodes))
        case _:
            nodes.reverse()
    del graph.node[:]
    graph.node.extend(nodes)


def node_name(m: Mutator) -> None:
    m.node().name = m.pick([*NAMES, m.pick(m.graph.node).name if len(m.graph.node) else ""])


def rename(m: Mutator) -> None:
    """A tensor gets a strange name everywhere, or in one place."""
    old, new = m.tensor_name(), m.pick(NAMES)
    for graph in m.graphs:
        for node in graph.node:
            for names in (node.input, node.output):
                for place, name in enumerate(names):
                    if name == old:
                        names[place] = new
        if m.chance(0.8):
            for value in (*graph.input, *graph.output, *graph.initializer):
                value.name = new if value.name == old else value.name


def attribute(m: Mutator) -> None:
    node = m.node()
    if not node.attribute:
        node.attribute.append(helper.make_attribute(m.pick(["axis", "perm", "group", "to", "alpha"]), m.pick(HUGE)))
        return
    found = m.pick(node.attribute)
    match m.pick(["value", "value", "value", "remove", "double", "type", "name", "list", "empty"]):
        case "remove":
            node.attribute.remove(found)
        case "double":
            node.attribute.append(found)
        case "type":
            found.type = int(m.rng.integers(0, 14))
        case "name":
            found.name = m.pick(["axis", "axes", "perm", "group", "value", "", "body", "to", "alpha"])
        case "list":
            found.CopyFrom(helper.make_attribute(found.name, [int(v) for v in m.rng.integers(-2, 6, 3)]))
        case "empty":
            name, kind = found.name, found.type
            found.Clear()
            found.name, found.type = name, kind
        case _:
            _change(m, found)


def _change(m: Mutator, found: onnx.AttributeProto) -> None:
    kinds = onnx.AttributeProto
    if found.type == kinds.INT:
        found.i = m.pick(HUGE)
    elif found.type == kinds.FLOAT:
        found.f = m.pick([0.0, -1.0, 1e38, float("nan"), float("inf"), -float("inf"), 1e-45])
    elif found.type == kinds.INTS and found.ints:
        found.ints[int(m.rng.integers(len(found.ints)))] = m.pick(HUGE)
    elif found.type == kinds.STRING:
        found.s = m.pick([b"", b"\xff\xfe", b"constant", b"nearest", b"ij,jk->ik", b"..." * 2000])


# ---- tensors -------------------------------------------------------------------------------------------------------


def dims(m: Mutator) -> None:
    tensor = m.tensor()
    sizes = list(tensor.dims)
    match m.pick(["permute", "huge", "more", "fewer", "flat", "empty"]):
        case "permute":
            sizes = [sizes[i] for i in m.rng.permutation(len(sizes))]
        case "huge" if sizes:
            sizes[int(m.rng.integers(len(sizes)))] = m.pick(HUGE)
        case "more":
            sizes.insert(int(m.rng.integers(len(sizes) + 1)), m.pick([1, 1, 0, 2]))
        case "fewer" if sizes:
            sizes.pop()
        case "flat":
            sizes = [int(np.prod(sizes))]
        case _:
            sizes = []
    del tensor.dims[:]
    tensor.dims.extend(map(int, sizes))


def data_type(m: Mutator) -> None:
    m.tensor().data_type = int(m.rng.integers(0, 28))


def values(m: Mutator) -> None:
    tensor = m.tensor()
    if m.chance(0.4):
        tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2] + m.rng.bytes(int(m.rng.integers(0, 9)))
        return
    if m.chance(0.2):
        tensor.float_data.extend([1.0, 2.0])
        return
    try:
        array = numpy_helper.to_array(tensor).copy()
    except Exception:
        return
    if array.dtype.kind in "fiu" and array.size:
        with np.errstate(all="ignore"):
            array.flat[int(m.rng.integers(array.size))] = m.pick(
                [0, 1, 100] if array.dtype.kind != "f" else [0, -1, np.nan, np.inf, 1e30, 1e-40, 3e4]
            )
            array = array * array.dtype.type(m.pick([0, 1, 1, 2])) if m.chance(0.3) else array
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def external(m: Mutator) -> None:
    tensor = m.tensor()
    raw = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    m.beside["w.bin"] = m.rng.bytes(16) + raw
    entries = {"location": "w.bin", "offset": "16", "length": str(len(raw))}
    match m.pick(["right", "right", "location", "offset", "length", "key", "none"]):
        case "location":
            places = [
                "",
                "/etc/passwd",
                "../w.bin",
                "gone.bin",
                ".",
                "w.bin/x",
                ":",
                "a\\..\\..\\b",
                "model.onnx",
                "/dev/zero",
            ]
            entries["location"] = m.pick(places)
        case "offset":
            entries["offset"] = m.pick(["-1", "abc", "", "99999999999999999999", "1", "1e3"])
        case "length":
            entries["length"] = m.pick(["-1", "abc", "", "99999999999999999999", "1", "0"])
        case "key":
            entries["nonsense"] = "value"
        case "none":
            entries = {}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def sparse(m: Mutator) -> None:
    if not m.model.graph.sparse_initializer:
        weights = [t for t in m.model.graph.initializer if t.data_type == TensorProto.FLOAT and t.dims]
        if not weights:
            return
        tensor = m.pick(weights)
        at = numpy_helper.from_array(np.array([0], np.int64), f"{tensor.name}_at")
        one = numpy_helper.from_array(np.ones(1, np.float32), tensor.name)
        m.model.graph.sparse_initializer.append(helper.make_sparse_tensor(one, at, list(tensor.dims)))
        m.model.graph.initializer.remove(tensor)
        return
    found = m.model.graph.sparse_initializer[0]
    match m.pick(["dims", "indices", "rank"]):
        case "dims" if found.dims:
            found.dims[int(m.rng.integers(len(found.dims)))] = m.pick(HUGE)
        case "rank":
            found.dims.append(2)
        case _:
            indices = np.array(m.rng.integers(-5, 50, 3), np.int64)
            found.indices.CopyFrom(numpy_helper.from_array(indices))


# ---- the graph -----------------------------------------------------------------------------------------------------


def initializers(m: Mutator) -> None:
    found = m.model.graph.initializer
    if not found:
        return
    match m.pick(["permute", "drop", "double", "rename", "input", "into", "value"]):
        case "permute":
            names = [t.name for t in found]
            for tensor, place in zip(found, m.rng.permutation(len(names)), strict=True):
                tensor.name = names[place]
        case "drop":
            found.remove(m.pick(found))
        case "double":
            found.append(m.pick(found))
        case "rename":
            m.pick(found).name = m.pick([*NAMES, m.tensor_name()])
        case "input":
            tensor = m.pick(found)
            m.model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        case "into":  # a body that has a weight of the same name
            m.pick(m.graphs).initializer.append(m.pick(found))
        case _:
            m.model.graph.output.add(name=m.pick(found).name)


def ports(m: Mutator) -> None:
    graph = m.graph
    found = m.pick([graph.input, graph.output, graph.value_info])
    if not found:
        return
    value = m.pick(found)
    shape = value.type.tensor_type.shape
    match m.pick(["dim", "dim", "type", "rank", "drop", "double", "rename", "kind", "empty", "stale"]):
        case "dim" if shape.dim:
            dim = m.pick(shape.dim)
            if m.chance(0.5):
                dim.dim_value = m.pick(HUGE)
            else:
                dim.dim_param = m.pick(["N", "S", "?", "", "-1"])
        case "type":
            value.type.tensor_type.elem_type = int(m.rng.integers(0, 28))
        case "rank":
            shape.dim.add(dim_value=1)
        case "drop":
            found.remove(value)
        case "double":
            found.append(value)
        case "kind":
            value.type.sequence_type.elem_type.tensor_type.elem_type = 1
        case "empty":
            value.ClearField("type")
        case "stale":
            graph.value_info.append(helper.make_tensor_value_info(m.tensor_name(), 1, [2, 3]))
        case _:
            value.name = m.pick([*NAMES, m.tensor_name()])


def opset(m: Mutator) -> None:
    versions = m.model.opset_import
    match m.pick(["version", "version", "drop", "double", "ir", "more"]):
        case "version" if versions:
            m.pick(versions).version = m.pick(
                [0, -1, 1, 5, 6, 7, 9, 11, 12, 13, 15, 18, 19, 20, 21, 23, 24, 25, 99, 1 << 40]
            )
        case "drop":
            del versions[:]
        case "double" if versions:
            versions.append(helper.make_opsetid(versions[0].domain, 12))
        case "ir":
            m.model.ir_version = m.pick([0, 1, 2, 3, 4, 7, 8, 10, 12, 99, -1])
        case _:
            versions.append(helper.make_opsetid(m.pick(["com.microsoft", "ai.onnx.ml", "nobody", "ai.onnx"]), 1))


def function(m: Mutator) -> None:
    if not m.model.functions:
        node = m.node()
        made = helper.make_function(
            "made", "f", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], m.model.opset_import
        )
        m.model.functions.append(made)
        m.model.opset_import.append(helper.make_opsetid("made", 1))
        node.op_type, node.domain = "f", "made"
        return
    found = m.pick(m.model.functions)
    match m.pick(["recursive", "double", "input", "output", "drop", "opset", "body"]):
        case "recursive":
            found.node.add(op_type=found.name, domain=found.domain, input=list(found.input), output=["again"])
        case "double":
            m.model.functions.append(found)
        case "input":
            found.input.append(m.pick(["x", "q", *found.input]))
        case "output":
            found.output.append("nowhere")
        case "drop":
            m.model.functions.remove(found)
        case "opset":
            del found.opset_import[:]
        case _:
            del found.node[:]


def wrap(m: Mutator) -> None:
    """A node moves into both branches of an If, perhaps in several storeys."""
    graph = m.model.graph
    nodes = [node for node in graph.node if node.output and node.output[0]]
    if not nodes:
        return
    node = m.pick(nodes)
    place = list(graph.node).index(node)
    inner = onnx.NodeProto.FromString(node.SerializeToString())
    for depth in range(m.pick([1, 1, 2, 20])):
        names = [f"{inner.output[0]}_{depth}"] + list(inner.output[1:])
        del inner.output[:]
        inner.output.extend(names)
        values = [onnx.ValueInfoProto(name=name) for name in inner.output if name]
        branch = helper.make_graph([inner], f"branch{depth}", [], values)
        other = branch if depth < 2 else helper.make_graph([], f"other{depth}", [], values)  # else it grows as 2^depth
        inner = helper.make_node("If", ["yes"], [f"{n}_out" for n in names], then_branch=branch, else_branch=other)
    del inner.output[:]
    inner.output.extend(node.output)
    graph.node[place].CopyFrom(inner)
    if "yes" not in {t.name for t in graph.initializer}:
        graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))


def bomb(m: Mutator) -> None:
    """A few nodes that want a great deal of memory or time."""
    graph, rng = m.model.graph, m.rng
    big = m.pick([1 << 26, 1 << 31, 1 << 36])
    constants = {
        "bomb_n": np.array([big], np.int64),
        "bomb_one": np.ones((1, 64), np.float32),
        "bomb_two": np.array([big // 64, 64], np.int64),
        "bomb_0": np.array(0, np.int64),
        "bomb_1": np.array(1, np.int64),
        "bomb_big": np.array(big, np.int64),
    }
    kind = m.pick(["concat", "fill", "tile", "expand", "range", "loop", "onehot", "pad", "matmul", "count", "input"])
    made = {
        "concat": [helper.make_node("Concat", [f"bomb{i}"] * 2, [f"bomb{i + 1}"], axis=0) for i in range(25)],
        "fill": [helper.make_node("ConstantOfShape", ["bomb_n"], ["bomb25"])],
        "tile": [helper.make_node("Tile", ["bomb_one", "bomb_two"], ["bomb25"])],
        "expand": [helper.make_node("Expand", ["bomb_one", "bomb_two"], ["bomb25"])],
        "range": [helper.make_node("Range", ["bomb_0", "bomb_big", "bomb_1"], ["bomb25"])],
        "pad": [helper.make_node("Pad", ["bomb_one", "bomb_pads"], ["bomb25"])],
        "onehot": [helper.make_node("OneHot", ["bomb_n", "bomb_big", "bomb_pair"], ["bomb25"])],
        "matmul": [
            helper.make_node("Expand", ["bomb_one", "bomb_two"], ["bomb1"]),
            helper.make_node("Transpose", ["bomb1"], ["bomb2"]),
            helper.make_node("MatMul", ["bomb1", "bomb2"], ["bomb25"]),
        ],
        "loop": [helper.make_node("Loop", ["", "bomb_yes", "bomb_one"], ["bomb25"], body=_endless())],
        "count": [helper.make_node("Loop", ["bomb_big", "", "bomb_one"], ["bomb25"], body=_endless())],
        "input": [],
    }[kind]
    if kind == "input" and graph.input and graph.input[0].type.tensor_type.shape.dim:
        m.pick(graph.input[0].type.tensor_type.shape.dim).dim_value = big
        return
    constants |= {"bomb_pads": np.array([0, 0, big // 64, 0], np.int64), "bomb_pair": np.array([0, 1], np.float32)}
    constants |= {"bomb_yes": np.array(True), "bomb0": np.ones((1, 64), np.float32)}
    used = {name for node in made for name in node.input}
    graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in constants.items() if name in used)
    nodes = [*made, *graph.node] if rng.random() < 0.8 else [*graph.node, *made]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    if m.chance(0.7):
        graph.output.add(name="bomb25")
    else:
        graph.node.append(helper.make_node("Shape", ["bomb25"], ["bomb_shape"]))
        graph.output.add(name="bomb_shape")


def _endless() -> onnx.GraphProto:
    return helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Tanh", ["s"], ["t"])],
        "endless",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, [1, 64]),
        ],
        [
            helper.make_tensor_value_info("d", TensorProto.BOOL, []),
            helper.make_tensor_value_info("t", TensorProto.FLOAT, [1, 64]),
        ],
    )


def texts(m: Mutator) -> None:
    m.model.producer_name = m.pick(NAMES)
    m.model.graph.name = m.pick(NAMES)
    m.model.metadata_props.add(key=m.pick(NAMES), value=m.pick(NAMES))
    m.node().doc_string = m.pick(NAMES)


MUTATIONS: tuple[Mutation, ...] = (
    *(inputs, inputs, outputs, operator, operator, domain, order, node_name, rename, attribute, attribute, attribute),
    *(dims, dims, data_type, values, values, external, sparse, initializers, initializers, ports, ports, opset),
    *(function, wrap, bomb, texts),
)

COMMANDS = (
    ["inspect"],
    ["inspect", "--groups"],
    ["inspect", "--idle"],
    ["fold"],
    ["fold"],
    ["smooth", "--random", "2"],
    ["smooth", "--method", "equalize"],
    ["prune", "--dead"],
    ["prune", "--ratio", "0.3", "--random", "2"],
    ["sparsify"],
    ["reparam"],
    ["quantize", "--random", "2"],
    ["quantize", "--random", "2", "--target", "onnxruntime"],
    ["quantize", "--weights", "int4"],
    ["compress", "--random", "2"],
    ["compress", "--recipe", "fold"],
    ["compress", "--recipe", "int8-weights"],
    ["diff", "--random", "2"],
)


def command(rng: np.random.Generator, folder: Path) -> list[str]:
    """One of the commands on model.onnx in a folder."""
    name, *options = COMMANDS[int(rng.integers(len(COMMANDS)))]
    model, out = str(folder / "model.onnx"), folder / ("out" if name == "compress" else "out.onnx")
    if name == "diff":
        return [name, model, model, *options]
    return [name, model, *options] if name == "inspect" else [name, model, "-o", str(out), *options]

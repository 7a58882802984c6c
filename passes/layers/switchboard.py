"""All configurations of a quantized graph in one graph: which options its nodes have, and how to run any mix of them.

    weight, bias    an input of the graph, or a constant that lies in a file beside it
    activation      If(on, DQ(Q(x)), x)
    configuration   {node: option}; a node that it does not name is ``float``

The board is made from the graphs that the passes themselves write, one for every option (``int8`` from ``quantize``,
``w8`` from ``quantize-weights`` …), so that a configuration computes what the file of a recipe with these nodes does.
The quantized weights of all options lie in files; a session maps what it needs, and copies nothing.

A session takes some nodes as ``open``: their weights are inputs of the graph, their quantizers are switched by the
feed, and one session tries out all their options. What they do not change is computed once for all options, in a
session of its own. All other nodes are constants, so that ONNX Runtime keeps the layouts and kernels that it has for
constants: without its blocked layout, convolutions take three times as long.

A quantizer in front of the readers of a tensor is on where its reader is (tensorrt: each reader has its own switch).
Around convolutions of target onnxruntime, all readers share one switch: it is on where a reader or the convolution that
writes the tensor is quantized, or where an operator in between reads quantized tensors alone.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.layers.formats import chunks, spread
from channelfold.passes.layers.linear import Linear, cast, linears
from channelfold.passes.operators import operator
from channelfold.runtime.errors import ModelError
from channelfold.runtime.io import edit
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.files import constant, free_name, infer_shapes, packed, read, save
from channelfold.runtime.io.session import Feed, Session, TensorSpec
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.io.split import split, typed

FLOAT = "float"
_FILE, _SWITCH = "board.onnx", "channelfold.switch"
_CLOSING = ("Softmax", "LogSoftmax", "Sigmoid", "HardSigmoid", "ArgMax", "ArgMin")
_FUSED = ("Relu", "Clip")

Configuration = Mapping[str, str]


@dataclass(frozen=True)
class Slot:
    """A node whose weight can be exchanged: the ``inputs`` that take its weight and bias, with the file of each option.

    ``sizes``: the bytes of the weight as each option stores it. ``rounding``: the summed squared error of the weight.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    files: dict[str, tuple[str, ...]]
    sizes: dict[str, int]
    rounding: dict[str, float]


@dataclass(frozen=True)
class Switch:
    """A quantizer of the tensor that is called ``result`` behind it: on where one of the nodes ``readers`` is.

    ``carried``: tensors that are called so behind their switches; where all of them are on, the switch is as well.
    """

    result: str
    readers: tuple[str, ...]
    carried: tuple[str, ...] = ()


@dataclass(frozen=True)
class Board:
    """The graph with its options, in a folder. ``acting``: options with activations.

    ``outputs``: what is measured, and ``ends`` the outputs of the graph that they stand for; ``scores``: which of them
    hold class scores, written by a linear node or read by a closing Softmax or ArgMax. ``mask``: the input that tells
    which positions of a sequence take part, or empty. ``texts``: all inputs, where each has a value for every token.
    ``macs``: of the nodes of a graph, where they are known.
    """

    folder: Path
    outputs: tuple[str, ...]
    ends: tuple[str, ...]
    scores: tuple[bool, ...]
    mask: str
    slots: dict[str, Slot]
    switches: tuple[Switch, ...]
    acting: tuple[str, ...]
    texts: tuple[str, ...] = ()
    macs: dict[str, int] = field(default_factory=dict)

    @functools.cached_property
    def digest(self) -> str:
        """The hash of what the board consists of."""
        found = hashlib.sha256(repr((self.outputs, self.mask, self.switches)).encode())
        for path in sorted(p for p in self.folder.iterdir() if p.suffix == ".npy" or p.name.startswith(_FILE)):
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        return found.hexdigest()

    def on(self, chosen: Configuration) -> dict[str, bool]:
        """Whether each switch is on, by the name of the tensor behind it."""
        found: dict[str, bool] = {}
        for switch in self.switches:
            own = any(chosen.get(reader) in self.acting for reader in switch.readers)
            found[switch.result] = own or (bool(switch.carried) and all(found.get(t, False) for t in switch.carried))
        return found

    def options(self, name: str) -> list[str]:
        """The options of a node, ``float`` first."""
        return list(self.slots[name].files)

    def size(self, chosen: Configuration) -> int:
        """Bytes of the weights of all nodes."""
        return sum(slot.sizes[chosen.get(name, FLOAT)] for name, slot in self.slots.items())

    def player(self, chosen: Configuration | None = None, open: Collection[str] = ()) -> Player:
        """A session in which the nodes ``open`` can be switched, and all others are as ``chosen``."""
        return Player(self, chosen or {}, open)


class Player:
    """A session on a board. ``run`` may choose other options for the open nodes than the session was made with.

    ``share``: of the arithmetic of the graph, what a run does again for the same feed, because open nodes change it.
    """

    def __init__(self, board: Board, chosen: Configuration, open: Collection[str]):
        self.board, self.chosen = board, dict(chosen)
        self.open = [board.slots[name] for name in board.slots if name in open]
        self._switched = list(_reached(board.switches, set(open)))
        model = onnx.load(board.folder / _FILE, load_external_data=False)
        closed = {name: board.slots[name] for name in board.slots if name not in open}
        _close(model.graph, closed.values(), board.folder, self.chosen)
        _wire(model.graph, board.on(self.chosen), set(self._switched))
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in board.outputs)
        changing = {name for slot in self.open for name in slot.inputs} | set(map(_condition, self._switched))
        first, rest = split(model, changing)
        self._stem = self._session(first)
        if self._stem and not typed(rest, self._stem.outputs):
            self._stem, rest = None, model
        self._rest = self._session(rest)
        again = sum(board.macs.get(node.name, 0) for node in rest.graph.node)
        self.share = again / max(sum(board.macs.values()), 1) if open else 1.0
        self._array = functools.cache(lambda file: np.load(board.folder / file, mmap_mode="r"))
        self._known: tuple[Feed, Feed] = {}, {}  # a feed, and what the stem makes of it

    def _session(self, part: onnx.ModelProto) -> Session | None:
        if not part.graph.output:
            return None
        size = sum(slot.sizes[FLOAT] for slot in self.board.slots.values())
        return Session(part.SerializeToString(), folder=self.board.folder, size=size, threads=1, fuse=False)

    def run(self, feed: Feed, chosen: Configuration | None = None) -> list[np.ndarray]:
        """The measured outputs. ``chosen``: options of the open nodes; by default as the session was made."""
        if feed is not self._known[0]:
            self._known = feed, {**feed, **_run(self._stem, feed)}
        chosen = self.chosen if chosen is None else {**self.chosen, **chosen}
        full = {**self._known[1]}
        for slot in self.open:
            files = slot.files[chosen.get(slot.name, FLOAT)]
            full |= {name: self._array(file) for name, file in zip(slot.inputs, files, strict=True)}
        on = self.board.on(chosen)
        full |= {_condition(name): np.array(on[name]) for name in self._switched}
        found = full | _run(self._rest, full)
        return [found[name] for name in self.board.outputs]


def _run(session: Session | None, feed: Feed) -> dict[str, Any]:
    return session.run(session.accepted(feed)) if session else {}


def build(
    graph: gs.Graph,
    variants: Mapping[str, gs.Graph],
    folder: Path,
    acting: Sequence[str] = ("int8",),
    centered: Mapping[str, Mapping[str, float]] | None = None,
) -> Board:
    """Writes the board of a float graph into a folder.

    ``variants``: by option, the graph that a pass makes of ``graph`` where it gives every node this option; they are
    used up. Those in ``acting`` also quantize activations; there is one of them at most. ``centered``: the linears of
    that one that read or write x - c, whose biases make up for that in all options. Raises ModelError.
    """
    found = {FLOAT: _Options(graph), **{option: _Options(other, settle(other)) for option, other in variants.items()}}
    infer_shapes(graph)
    whole = next((variants[option] for option in acting if option in variants), None)
    whole = Snapshot.of(graph).graph() if whole is None else whole
    infer_shapes(whole)
    base, slots = _Options(whole), {}
    for number, name in enumerate(node.name for node in graph.nodes):
        options = {option: own for option, own in found.items() if name in own}
        if len(options) > 1:
            values = {option: found.values(name) for option, found in options.items()}
            if centered and name in base.linears:
                for option in values.keys() - set(acting):
                    values[option] = _centered(base.linears[name], *values[option], centered)
            sizes = {option: own.size(name) for option, own in options.items()}
            slots[name] = _slot(base, name, values, sizes, folder, number)
    switches = tuple(_switches(whole, slots))
    ends = compared(whole)
    whole.outputs = [tensor for tensor, *_ in ends]
    edit.remove_dead(whole)
    save(whole, folder / _FILE, external=True)
    inputs = required_inputs(graph)
    mask = next((s.name for s in inputs if s.meaning and s.meaning.kind == "mask"), "")
    texts = tuple(s.name for s in inputs) if all(map(_is_text, inputs)) else ()
    outputs, closed, scores = zip(*((tensor.name, end, holds) for tensor, end, holds in ends), strict=True)
    return Board(folder, outputs, closed, scores, mask, slots, switches, tuple(acting), texts)


def _is_text(spec: TensorSpec) -> bool:
    """Whether an input has a value for every token, of any number of tokens."""
    values = spec.meaning is not None and spec.meaning.kind in ("ids", "mask", "position", "zeros")
    return values and len(spec.shape) == 2 and not isinstance(spec.shape[1], int)


# ---- the parts of a board ----------------------------------------------------------------------------------------


def settle(graph: gs.Graph) -> dict[str, int]:
    """Replaces every DequantizeLinear of constants by its result; the bytes of the weight by the name of the reader."""
    sizes: dict[str, int] = {}
    for node in [node for node in graph.nodes if node.op == "DequantizeLinear"]:
        constants = all(isinstance(tensor, gs.Constant) for tensor in node.inputs)
        if not constants or edit.is_output(graph, node.outputs[0]):
            continue
        whole = sum(packed(tensor._values).nbytes for tensor in node.inputs)
        for reader in edit.consumers(node.outputs[0]):
            if not (len(reader.inputs) > 2 and reader.inputs[2] is node.outputs[0]):  # a bias
                sizes[reader.name] = whole
        name = node.outputs[0].name
        codes, scales, *zero = (np.asarray(read(tensor)) for tensor in node.inputs)
        values = dequantized(codes, scales, zero[0] if zero else None, node.attrs)
        edit.replace_uses(graph, node.outputs[0], constant(graph, f"{name}_settled", values))
        edit.detach(node)
    edit.sweep(graph)
    return sizes


def dequantized(codes: np.ndarray, scales: np.ndarray, zero: np.ndarray | None, attrs: Mapping) -> np.ndarray:
    """What DequantizeLinear makes of codes, in the type of the scales."""
    wide = codes.astype(np.float32 if codes.dtype != np.int32 else np.float64)
    if zero is not None and np.any(zero.astype(np.float32)):
        wide = wide - spread(zero.astype(np.float32), codes.shape, attrs)
    return (wide * spread(scales.astype(np.float32), codes.shape, attrs)).astype(scales.dtype)


class _Options:
    """The weight and bias of every node of a graph in one option; those of a table are its rows and None."""

    def __init__(self, graph: gs.Graph, sizes: Mapping[str, int] | None = None):
        self.graph, self.sizes = graph, sizes
        self.linears = {linear.name: linear for linear in linears(graph)}
        self.tables = {n.name: n for n in graph.nodes if operator(n).kind == "gather" and _is_table(n.inputs[0])}

    def __contains__(self, name: str) -> bool:
        return (self.sizes is None or name in self.sizes) and (name in self.linears or name in self.tables)

    def values(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        if name in self.tables:
            return np.asarray(read(self.tables[name].inputs[0])), None
        return self.linears[name].weight(), self.linears[name].bias()

    def size(self, name: str) -> int:
        return self.values(name)[0].nbytes if self.sizes is None else self.sizes[name]


def _is_table(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and len(tensor.shape) == 2 and edit.is_float_type(np.dtype(tensor.dtype))


def _centered(
    linear: Linear, weight: np.ndarray, bias: np.ndarray | None, centered: Mapping[str, Mapping[str, float]]
) -> tuple[np.ndarray, np.ndarray | None]:
    """A weight, and the bias for a linear that reads x - c or writes y - c."""
    read, written = (centered.get(side, {}).get(linear.name, 0.0) for side in ("read", "written"))
    if not read and not written:
        return weight, bias
    moved = linear.respond(weight, np.full(linear.channels[1], read)) - written
    return weight, moved if bias is None else bias + moved


def _slot(
    base: _Options,
    name: str,
    values: Mapping[str, tuple[np.ndarray, np.ndarray | None]],
    sizes: dict[str, int],
    folder: Path,
    number: int,
) -> Slot:
    """Makes the weight and bias of a node inputs of the base, and writes those of all options."""
    linear = base.linears.get(name)
    if linear is None:
        places = [(base.tables[name], 0)]
        arrays = {option: [table] for option, (table, _) in values.items()}
    else:
        if linear.bias_place is None and any(bias is not None for _, bias in values.values()):
            linear.set_bias(np.zeros(linear.channels[0]))
        places = [(linear.node, linear.weight_input), *([linear.bias_place] if linear.bias_place else [])]
        arrays = {option: _as_stored(linear, *own) for option, own in values.items()}
    inputs = []
    for (node, place), array in zip(places, arrays[FLOAT], strict=True):
        inputs.append(gs.Variable(free_name(base.graph, f"{name}_slot"), array.dtype, array.shape))
        edit.set_input(node, place, inputs[-1])
    base.graph.inputs += inputs
    files = {}
    for option, own in arrays.items():
        files[option] = tuple(f"{number}.{option}.{place}.npy" for place in range(len(own)))
        for file, array in zip(files[option], own, strict=True):
            np.save(folder / file, np.ascontiguousarray(array))
    rounding = {option: _squared(weight, values[FLOAT][0]) for option, (weight, _) in values.items()}
    return Slot(name, places[0][0].op, tuple(tensor.name for tensor in inputs), files, sizes, rounding)


def _squared(weight: np.ndarray, exact: np.ndarray) -> float:
    return sum(float(np.square(weight[rows] - exact[rows], dtype=np.float32).sum()) for rows in chunks(weight))


def _as_stored(linear: Linear, weight: np.ndarray, bias: np.ndarray | None) -> list[np.ndarray]:
    """An effective weight, and a bias where the linear has a place for one, as the node reads them."""
    alpha = linear.factor("alpha")
    found = [cast(linear.unorient(weight if alpha == 1 else weight / alpha), linear.dtype)]
    if linear.bias_place is not None:
        bias = np.zeros(linear.channels[0]) if bias is None else bias
        found.append(cast(linear.shaped_bias(bias / linear.factor("beta")), linear.dtype))
    return found


def compared(graph: gs.Graph) -> list[tuple[gs.Tensor, str, bool]]:
    """The floating outputs, or what a closing Softmax, Sigmoid or ArgMax reads; the output, and if they hold scores.

    Behind such operators errors do not add up: where one position flips, it counts as much as all others together.
    """
    found: dict[int, tuple[gs.Tensor, str, bool]] = {}
    for tensor in graph.outputs:
        end, node = tensor.name, edit.producer(tensor)
        while node is not None and operator(node).copies and node.op != "Cast":
            node = edit.producer(node.inputs[0])
        closed = node is not None and node.op in _CLOSING
        if node is not None and closed:
            tensor = node.inputs[0]
            node = edit.producer(tensor)
        while node is not None and node.op == "Add":  # of a bias
            node = next(filter(None, map(edit.producer, node.inputs)), None)
        if edit.is_float(tensor) and not isinstance(tensor, gs.Constant):
            found[id(tensor)] = tensor, end, closed or (node is not None and operator(node).weighted)
    if not found:
        raise ModelError("The model has no floating output that an error could be measured at")
    return list(found.values())


# ---- switches ----------------------------------------------------------------------------------------------------


def _switches(graph: gs.Graph, slots: Collection[str]) -> Iterator[Switch]:
    """Puts a switch in the place of every pair of QuantizeLinear and DequantizeLinear."""
    for after in [node for node in graph.nodes if node.op == "DequantizeLinear"]:
        before = edit.producer(after.inputs[0])
        if before is None or before.op != "QuantizeLinear":
            continue
        restored, parameters = after.outputs[0], before.inputs[:3]
        readers = edit.consumers(restored)
        writers, carried = _writers(parameters[0], slots)
        apart = all(node.op in ("MatMul", "Gemm") for node in readers) and not (writers or carried)
        apart = apart or edit.dtype(before.inputs[2]) == np.int8
        for group in [[node] for node in readers] if apart else [readers]:
            result = gs.Variable(free_name(graph, f"{restored.name}_switched"), restored.dtype, restored.shape)
            edit.insert_after(graph, after, gs.Node(_SWITCH, result.name, {}, list(parameters), [result]))
            for node in group:
                for place in [i for i, tensor in enumerate(node.inputs) if tensor is restored]:
                    edit.set_input(node, place, result)
            owners = tuple(node.name for node in group if node.name in slots)
            yield Switch(result.name, owners) if apart else Switch(result.name, (*owners, *writers), carried)
        edit.detach(after)
        if not edit.consumers(before.outputs[0]):
            edit.detach(before)
    edit.sweep(graph)


def _writers(tensor: gs.Tensor, slots: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The convolution that writes a tensor, or else the switches that the operator which writes it reads."""
    writer = edit.producer(tensor)
    while writer is not None and (writer.op in _FUSED or (writer.op == "Sum" and len(writer.inputs) == 1)):
        writer = edit.producer(writer.inputs[0])
    if writer is None or operator(writer).weighted:
        return ((writer.name,) if writer and writer.name in slots and operator(writer).kind == "conv" else ()), ()
    made = map(edit.producer, writer.inputs)
    return (), tuple(node.name for node in made if node is not None and node.op == _SWITCH)


def _reached(switches: Sequence[Switch], open: Set[str]) -> dict[str, None]:
    """The results of the switches that the options of some nodes can change."""
    found: dict[str, None] = {}
    for switch in switches:
        if open & set(switch.readers) or found.keys() & set(switch.carried):
            found[switch.result] = None
    return found


def _condition(name: str) -> str:
    return f"{name}_on"


def _close(graph: onnx.GraphProto, slots: Iterable[Slot], folder: Path, chosen: Configuration) -> None:
    """Makes constants, which lie in their files, of the inputs of nodes."""
    gone = {}
    for slot in slots:
        for name, file in zip(slot.inputs, slot.files[chosen.get(slot.name, FLOAT)], strict=True):
            array = np.load(folder / file, mmap_mode="r")
            proto = onnx.TensorProto(name=name, dims=array.shape)
            proto.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            proto.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", file), ("offset", array.offset), ("length", array.nbytes)):
                proto.external_data.add(key=key, value=str(value))
            gone[name] = proto
    graph.initializer.extend(gone.values())
    kept = [value for value in graph.input if value.name not in gone]
    del graph.input[:]
    graph.input.extend(kept)


def _wire(graph: onnx.GraphProto, on: Mapping[str, bool], open: Collection[str]) -> None:
    """Puts nodes of ONNX in the place of the switches."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != _SWITCH:
            nodes.append(node)
            continue
        (tensor, *parameters), (result,) = node.input, node.output
        if result not in open and not on[result]:
            nodes.append(onnx.helper.make_node("Identity", [tensor], [result], name=result))
            continue
        codes, inner = f"{result}_codes", f"{result}_inner" if result in open else result
        pair = [
            onnx.helper.make_node("QuantizeLinear", [tensor, *parameters], [codes], name=f"{result}_Q"),
            onnx.helper.make_node("DequantizeLinear", [codes, *parameters], [inner], name=f"{result}_DQ"),
        ]
        if result not in open:
            nodes += pair
            continue
        same = [onnx.helper.make_node("Identity", [tensor], [f"{result}_same"], name=f"{result}_Identity")]
        branches: dict[str, Any] = {
            f"{branch}_branch": onnx.helper.make_graph(body, branch, [], [onnx.ValueInfoProto(name=body[-1].output[0])])
            for branch, body in (("then", pair), ("else", same))
        }
        condition = _condition(result)
        graph.input.append(onnx.helper.make_tensor_value_info(condition, onnx.TensorProto.BOOL, ()))
        nodes.append(onnx.helper.make_node("If", [condition], [result], name=result, **branches))
    del graph.node[:]
    graph.node.extend(nodes)

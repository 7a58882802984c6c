"""All configurations of a quantized graph in one graph: which options its nodes have, and how to run any mix of them.

    weight, bias    an input of the graph, or a constant that lies in a file beside it
    activation      If(int8, DQ(Q(x)), If(fp8, DQ(Q(x)), x)) …
    configuration   {node: option}; a node that it does not name is ``float``

The board is made from the graphs that the passes themselves write, one for every option (``int8`` from ``quantize``,
``w8`` from ``quantize-weights`` …), so that a configuration computes what the file of a recipe with these nodes does.
The quantized weights of all options lie in files; a session maps what it needs, and copies nothing.

A session takes some nodes as ``open``: their weights are inputs of the graph, their quantizers are switched by the
feed, and one session tries out all their options. What they do not change is computed once for all options, in a
session of its own. All other nodes are constants, so that ONNX Runtime keeps the layouts and kernels that it has for
constants: without its blocked layout, convolutions take three times as long.

A switch in front of the readers of a tensor computes what the option of its reader puts between the two: a quantizer to
int8, one to fp8 … (tensorrt: each reader has its own switch). The first option that quantizes activations also says how
the rest of the graph is, such as which tensors hold x - c; the switches of the others begin with x.
Around convolutions of target onnxruntime, all readers share one switch: it is on where a reader or the convolution that
writes the tensor is quantized, or where an operator in between reads quantized tensors alone.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.layers.formats import INT8, chunks, spread
from channelfold.passes.layers.linear import Linear, cast, linears
from channelfold.passes.layers.output_error import compared, mask_of
from channelfold.passes.layers.switches import FLOAT as FLOAT
from channelfold.passes.layers.switches import Quantizers, Switch, insert_switches, reached, wire
from channelfold.passes.layers.tables import table_of
from channelfold.runtime.errors import ModelError
from channelfold.runtime.io import edit
from channelfold.runtime.io.emulate import emulate
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.files import constant, free_name, infer_shapes, packed, read, save
from channelfold.runtime.io.session import Feed, Session, TensorSpec
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.runtime.io.split import split, typed

_FILE = "board.onnx"
_EXPANDS: dict[str, Any] = {"Cast": None, "Sub": np.subtract, "Mul": np.multiply, "Reshape": np.reshape}  # packed codes

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
class Board:
    """The graph with its options, in a folder. ``acting``: options with activations, the first that of the graph.

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

    def on(self, chosen: Configuration) -> dict[str, str]:
        """The option that each switch is in, or ``float``, by the name of the tensor behind it."""
        found: dict[str, str] = {}
        for switch in self.switches:
            own = next((chosen[reader] for reader in switch.readers if chosen.get(reader) in switch.options), FLOAT)
            carried = bool(switch.carried) and all(found.get(t, FLOAT) != FLOAT for t in switch.carried)
            found[switch.result] = switch.options[0] if carried and own == FLOAT else own
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
        self._switched = reached(board.switches, set(open))
        model = onnx.load(board.folder / _FILE, load_external_data=False)
        closed = {name: board.slots[name] for name in board.slots if name not in open}
        _close(model.graph, closed.values(), board.folder, self.chosen)
        wire(model.graph, board.on(self.chosen), self._switched)
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in board.outputs)
        changing = {name for slot in self.open for name in slot.inputs}
        changing |= {name for switch in self._switched.values() for name in switch.conditions.values()}
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
        for result, switch in self._switched.items():
            full |= {name: np.array(on[result] == option) for option, name in switch.conditions.items()}
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
    used up. Those in ``acting`` also quantize activations. ``centered``: the linears of the first of these that read or
    write x - c, whose biases make up for that in all options. Raises ModelError.
    """
    found = {FLOAT: _Options(graph), **{option: _Options(other, settle(other)) for option, other in variants.items()}}
    infer_shapes(graph)
    acting = tuple(option for option in acting if option in variants)
    first, *others = acting or (FLOAT,)
    whole = variants[first] if acting else Snapshot.of(graph).graph()
    infer_shapes(whole)
    base, slots = _Options(whole), {}
    for number, name in enumerate(node.name for node in graph.nodes):
        options = {option: own for option, own in found.items() if name in own}
        if first not in options:  # nothing can be switched in front of it
            options = {option: own for option, own in options.items() if option not in others}
        if len(options) > 1:
            values = {option: found.values(name) for option, found in options.items()}
            if centered and name in base.linears:
                for option in values.keys() - {first}:
                    sides = ("written",) if option in others else ("read", "written")
                    values[option] = _centered(base.linears[name], *values[option], centered, sides)
            sizes = {option: own.size(name) for option, own in options.items()}
            slots[name] = _slot(base, name, values, sizes, folder, number)
    read = {name: tensor.name for name, tensor in found[FLOAT].reads().items()}
    ends = {option: (found[option].graph, found[option].reads()) for option in others}
    quantizers = Quantizers(ends, read, (centered or {}).get("read", {}))
    switches = tuple(insert_switches(whole, slots, first, quantizers))
    ends = compared(whole)
    if not ends:
        raise ModelError("The model has no floating output that an error could be measured at")
    whole.outputs = [tensor for tensor, *_ in ends]
    edit.remove_dead(whole)
    save(whole, folder / _FILE, external=True)
    inputs = required_inputs(graph)
    texts = tuple(s.name for s in inputs) if all(map(_is_text, inputs)) else ()
    outputs, closed, scores = zip(*((tensor.name, end, holds) for tensor, end, holds in ends), strict=True)
    return Board(folder, outputs, closed, scores, mask_of(graph), slots, switches, acting, texts)


def _is_text(spec: TensorSpec) -> bool:
    """Whether an input has a value for every token, of any number of tokens."""
    values = spec.meaning is not None and spec.meaning.kind in ("ids", "mask", "position", "zeros")
    return values and len(spec.shape) == 2 and not isinstance(spec.shape[1], int)


# ---- the parts of a board ----------------------------------------------------------------------------------------


def settle(graph: gs.Graph) -> dict[str, int]:
    """Replaces every DequantizeLinear of constants by its result; the bytes of the weight by the name of the reader.

    Codes and scales may be made of the result of another one, and packed codes may be expanded by other operators. What
    ONNX Runtime does not know is emulated.
    """
    sizes: dict[str, int] = {}
    settled: dict[int, int] = {}  # the bytes of what was replaced
    for node in [node for node in graph.nodes if node.op in ("DequantizeLinear", "QuantizeLinear", *_EXPANDS)]:
        constants = all(isinstance(tensor, gs.Constant) for tensor in node.inputs)
        if not constants or edit.is_output(graph, node.outputs[0]):
            continue
        expands = node.op == "Cast" and edit.dtype(node.inputs[0]) in (np.uint8, np.int8)
        if node.op != "DequantizeLinear" and not expands and id(node.inputs[0]) not in settled:
            continue
        if node.op == "QuantizeLinear" and edit.dtype(node.inputs[-1]) != np.int8:
            continue
        whole = sum(settled.get(id(tensor)) or packed(tensor._values).nbytes for tensor in node.inputs)
        for reader in edit.consumers(node.outputs[0]):
            if not (len(reader.inputs) > 2 and reader.inputs[2] is node.outputs[0]):  # a bias
                sizes[reader.name] = whole
        codes, *parameters = (np.asarray(read(tensor)) for tensor in node.inputs)
        if node.op == "Cast":
            values = codes.astype(onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
        elif node.op in _EXPANDS:
            values = _EXPANDS[node.op](codes, parameters[0])
        elif node.op == "QuantizeLinear":
            values = INT8.typed(INT8.snap(codes / spread(parameters[0], codes.shape, node.attrs)))
        else:
            values = dequantized(codes, parameters[0], parameters[1] if len(parameters) > 1 else None, node.attrs)
        new = constant(graph, f"{node.outputs[0].name}_settled", values)
        settled[id(new)] = whole
        edit.replace_uses(graph, node.outputs[0], new)
        edit.detach(node)
    edit.sweep(graph)
    emulate(graph)
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
        self.tables = {n.name: n for n in graph.nodes if (t := table_of(n)) is not None and len(t.shape) == 2}

    def __contains__(self, name: str) -> bool:
        return (self.sizes is None or name in self.sizes) and (name in self.linears or name in self.tables)

    def values(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        if name in self.tables:
            return np.asarray(read(self.tables[name].inputs[0])), None
        return self.linears[name].weight(), self.linears[name].bias()

    def reads(self) -> dict[str, gs.Tensor]:
        """What every linear reads."""
        return {name: linear.data for name, linear in self.linears.items() if name in self}

    def size(self, name: str) -> int:
        return self.values(name)[0].nbytes if self.sizes is None else self.sizes[name]


def _centered(
    linear: Linear,
    weight: np.ndarray,
    bias: np.ndarray | None,
    centered: Mapping[str, Mapping[str, float]],
    sides: Collection[str],
) -> tuple[np.ndarray, np.ndarray | None]:
    """A weight, and the bias for a linear that reads x - c or writes y - c, of the ``sides`` "read" and "written"."""
    read, written = (
        centered.get(side, {}).get(linear.name, 0.0) if side in sides else 0.0 for side in ("read", "written")
    )
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

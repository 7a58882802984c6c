"""A strongly typed graph: every tensor has one type, and a Cast stands where two types meet.

    y = MatMul(x, W)     becomes     y = Cast(MatMul(Cast(x), W16))      W16 = float16(W)

Inputs and outputs of the model, and of bodies, keep their types. The nodes that stay float32 are found in ``islands``;
each is refused by name. A tensor is converted once for all its readers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from channelfold.passes.base import Context, Outcome
from channelfold.passes.cast import Cast
from channelfold.passes.cast.fit import products
from channelfold.passes.cast.islands import Islands, divisors, is_free, is_product
from channelfold.passes.cast.kinds import FLOAT, HALVES, TYPE_ATTRIBUTES, Half, Kinds, opset_of
from channelfold.passes.cast.ranges import Magnitudes, measured
from channelfold.passes.cast.rounding import Plan, Trials
from channelfold.passes.cast.scales import raise_scales
from channelfold.passes.cast.values import Rounded, converted, limited
from channelfold.runtime.errors import ModelError, VerificationError
from channelfold.runtime.io import edit
from channelfold.runtime.io.convert import all_graphs
from channelfold.runtime.io.files import free_name, read, stored, weightless


class Work(Cast):
    @property
    def _half(self) -> Half:
        return HALVES[self.type]

    def least_opset(self, graph: gs.Graph) -> int:
        """For bfloat16, which many operators take late, what most of them need; for float16 what scales need."""
        ops = {node.op for node in graph.nodes if edit.is_standard(node)}
        if self.type == "float16":
            ops &= {"QuantizeLinear", "DequantizeLinear"}
        return max((opset_of(op, graph.opset, self._half) for op in ops), default=0)

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        outcome, faults = Outcome(), _faults(graph)
        if self.type == "float16":
            raise_scales(graph)
        kinds = Kinds(graph)
        blind = self.type == "bfloat16" or ctx.calibration is None
        casting = _Casting(self, {} if blind else measured(graph, kinds, ctx, divisors(graph)))
        plan = self._plan(graph, kinds, casting, ctx, outcome)
        islands, typer = casting.cast(graph, kinds, plan, self.retypes)
        for node in islands.typed:
            if (why := islands.why.get(id(node))) is not None:
                detail = f" ({why.detail})" if why.detail else ""
                outcome.refuse(node.name, f"{node.op} stays float32: {why.code}{detail}", why.code)
            elif id(node) not in islands.float32 and (node.op != "Cast" or is_free(node)):
                outcome.change(node.name, f"{node.op}: {self.type}")
        if not typer.changed:
            outcome.changed.clear()
        outcome.facts |= self._facts(islands, typer)
        outcome.warnings += self._warnings(islands, blind)
        if (found := _faults(graph)) and not faults:
            raise VerificationError(f"The types of the graph do not fit together: {found}")
        return outcome

    def _plan(self, graph: gs.Graph, kinds: Kinds, casting: _Casting, ctx: Context, outcome: Outcome) -> Plan:
        """What is done for the sake of the outputs.

        Behind quantizers the smallest error changes codes, so there the error tells nothing about single products.
        """
        quantized = any(node.op == "QuantizeLinear" for part in all_graphs(graph) for node in part.nodes)
        if ctx.calibration is None or not self.max_error or quantized:
            return Plan()
        found = casting.islands(graph, kinds, Plan(), False)
        names = [linear.name for linear in products(graph) if id(linear.node) not in found.float32]

        def cast(copy: gs.Graph, plan: Plan) -> None:
            casting.cast(copy, Kinds(copy), plan, False)

        try:
            trials = Trials(graph, names, ctx.calibration, self._half, cast, ctx.progress)
            plan, error = trials.plan(self.max_error, self.fit)
        except ModelError as reason:
            outcome.warnings.append(f"How much {self.type} changes the outputs is not known: {reason}")
            return Plan()
        outcome.facts = {
            "error": error, "fitted": len(plan.fits), "between_float32": plan.between, "lossy": plan.kept,
            "float32_macs": trials.share(plan),
        }  # fmt: skip
        if error > self.max_error:
            outcome.warnings.append(f"{self.type} changes the outputs by {error:.1e}, more than {self.max_error:g}: "
                                    "rounding adds up from all nodes")  # fmt: skip
        return plan

    def asked(self, node: gs.Node, plan: Plan) -> str:
        """Why a node is to stay float32; empty where nothing says so."""
        if node.op in self.exclude_ops:
            return f"excluded by operator type {node.op}"
        if reason := self.patterns.why_not(node.name):
            return reason
        if node.name in plan.kept:
            return "rounding it changes the outputs most"
        if plan.between and not is_product(node) and not is_free(node):
            return "it computes between products, where float32 halves the error of the outputs"
        return ""

    def _facts(self, islands: Islands, typer: Typer) -> dict[str, Any]:
        rounded = [islands.constants.seen[key] for key in typer.rounded]
        computing = [node for node in islands.typed if not is_free(node) and id(node) not in islands.silent]
        kept = [node.name for node in computing if id(node) in islands.float32]
        return {
            "type": self.type,
            "nodes": len(computing),
            "float32_nodes": kept,
            "casts": typer.casts,
            "constants": len(rounded),
            "bytes": [4 * sum(one.count for one in rounded), 2 * sum(one.count for one in rounded)],
            "subnormal": sum(one.subnormal for one in rounded),
            "became_zero": sum(one.zero for one in rounded),
            "limited": islands.constants.limited,
        }

    def _warnings(self, islands: Islands, blind: bool) -> list[str]:
        said = []
        if blind and self.type == "float16":
            said.append("Whether values overflow in float16 was not measured: give --calibration")
        if islands.constants.limited:
            names = ", ".join(sorted(islands.constants.limited))
            said.append(f"Masks and bounds beyond {self.type} were limited, which changes no result: {names}")
        if self.target == "onnxruntime":
            said.append("ONNX Runtime computes float16 on a CPU in float32, between casts: the file is half as large, "
                        "and no faster")  # fmt: skip
        return said


@dataclass(frozen=True)
class _Casting:
    """Casts graphs as a pass says, with the magnitudes ``seen`` on the data."""

    step: Work
    seen: Mapping[str, Magnitudes]

    def cast(self, graph: gs.Graph, kinds: Kinds, plan: Plan, io: bool) -> tuple[Islands, Typer]:
        """``io``: whether inputs and outputs take the type."""
        found = self.islands(graph, kinds, plan, io)
        if plan.fits:
            for linear in products(graph):
                if id(linear.node) not in found.float32 and linear.name in plan.fits:
                    plan.fits[linear.name].install(linear)
            found = self.islands(graph, kinds, plan, io)
        typer = Typer(graph, found)
        typer.run()
        return found, typer

    def islands(self, graph: gs.Graph, kinds: Kinds, plan: Plan, io: bool) -> Islands:
        step = self.step
        built = step.target == "tensorrt"
        return Islands(
            graph, kinds, HALVES[step.type], lambda node: step.asked(node, plan), self.seen, step.headroom, built, io
        )


class Typer:
    """Writes the types into a graph. ``casts`` counts the Cast nodes that are new."""

    def __init__(self, graph: gs.Graph, islands: Islands):
        self.graph, self.islands, self.half = graph, islands, islands.half
        self.casts = 0
        self.changed = False
        self.rounded: dict[int, Rounded] = {}
        self._parts = list(all_graphs(graph))
        self._retyped = {id(tensor) for tensor in graph.outputs} - islands.outputs
        self._before: dict[int, list[gs.Node]] = {}  # what stands first, by the id of the part
        self._behind: dict[int, list[gs.Node]] = {}

    def run(self) -> None:
        self._constants()
        for part in self._parts:
            for tensor in part.inputs:
                self._meet(tensor, None, part)
            for node in part.nodes:
                for tensor in list(node.outputs):
                    self._meet(tensor, node, part)
        for node in self.islands.typed:
            self._set_attributes(node)
        for part in self._parts:
            nodes = list(self._before.get(id(part), ()))
            for node in part.nodes:
                nodes += [node, *self._behind.get(id(node), ())]
            part.nodes[:] = nodes
        for part in self._parts:
            self._remove_idle(part)

    def _constants(self) -> None:
        """Gives every reader of a float32 constant the constant in its type, within the limit that it has."""
        wanted: dict[int, tuple[gs.Constant, dict[tuple[bool, float], list[tuple[gs.Node, int]]]]] = {}
        for node in self.islands.typed:
            for index, tensor in enumerate(node.inputs):
                if isinstance(tensor, gs.Constant) and self.islands.kinds.is_float32(tensor):
                    limit = self.islands.constants.limits.get((id(tensor), id(node)), math.inf)
                    key = self.islands.needs(node, index) == "half", limit
                    wanted.setdefault(id(tensor), (tensor, {}))[1].setdefault(key, []).append((node, index))
        for tensor, forms in wanted.values():
            alone = len(forms) == 1 and id(tensor) not in self.islands.outputs
            for (is_half, limit), readers in forms.items():
                if is_half or math.isfinite(limit):
                    self._convert(tensor, is_half, limit, readers, alone)

    def _convert(
        self, tensor: gs.Constant, is_half: bool, limit: float, readers: list[tuple[gs.Node, int]], alone: bool
    ) -> None:
        if is_half:
            self.rounded[id(tensor)] = self.islands.constants.seen[id(tensor)]
            values = converted(tensor, self.half, limit)
        else:
            values = limited(np.asarray(read(tensor)), limit)
        self.changed = True
        name = tensor.name if alone else free_name(self.graph, f"{tensor.name}_{self.half.name}")
        held = stored(self.graph, values, name)
        if alone:
            tensor.values = held
            return
        new = gs.Constant(name, held)
        for node, index in readers:
            edit.set_input(node, index, new)

    def _meet(self, tensor: gs.Tensor, node: gs.Node | None, part: gs.Graph) -> None:
        """Gives a tensor its type, and its readers of the other type a Cast of the tensor.

        A tensor that ends a graph in another type than its node writes is the result of a Cast itself.
        """
        islands = self.islands
        if not isinstance(tensor, gs.Variable) or not islands.kinds.is_float32(tensor):
            return
        is_half = not islands.stays(tensor)
        ends_otherwise = node is not None and id(tensor) in (islands.outputs if is_half else self._retyped)
        if is_half != ends_otherwise:
            tensor.dtype = self.half.dtype
            self.changed = True
        other = "float32" if is_half else "half"
        readers = [(r, i) for r in edit.consumers(tensor) for i, t in enumerate(r.inputs) if t is tensor]
        moved = [(r, i) for r, i in readers if (islands.needs(r, i) == other) != ends_otherwise]
        if not moved and not ends_otherwise:
            return
        made = self._like(tensor, self.half if is_half == ends_otherwise else None)
        for reader, index in moved:
            edit.set_input(reader, index, made)
        if node is not None and ends_otherwise:
            edit.set_output(node, next(i for i, t in enumerate(node.outputs) if t is tensor), made)
            self._cast(made, tensor, node, part)
        else:
            self._cast(tensor, made, node, part)

    def _like(self, tensor: gs.Variable, half: Half | None) -> gs.Variable:
        name = free_name(self.graph, f"{tensor.name}_{half.name if half else 'float32'}")
        return gs.Variable(name, half.dtype if half else FLOAT, tensor.shape)

    def _cast(self, source: gs.Variable, result: gs.Variable, node: gs.Node | None, part: gs.Graph) -> None:
        to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(result.dtype))
        new = gs.Node("Cast", free_name(self.graph, f"{result.name}_Cast"), {"to": to}, [source], [result])
        place = self._before.setdefault(id(part), []) if node is None else self._behind.setdefault(id(node), [])
        place.append(new)
        self.casts += 1
        self.changed = True

    def _set_attributes(self, node: gs.Node) -> None:
        """Sets the attributes that say the type of a result."""
        if id(node) in self.islands.float32 or edit.dtype(node.outputs[0]) != self.half.dtype:
            return
        if (name := TYPE_ATTRIBUTES.get(node.op)) in node.attrs:
            node.attrs[name] = self.half.code
        if node.op == "ConstantOfShape":
            old = node.attrs.get("value")
            values = np.zeros(1, np.float32) if old is None else np.asarray(old.values)
            node.attrs["value"] = gs.Constant("value", values.astype(self.half.dtype))

    def _remove_idle(self, part: gs.Graph) -> None:
        """Removes the Cast nodes whose input has the type of the result by now."""
        for node in [node for node in part.nodes if node.op == "Cast"]:
            source, result = node.inputs[0], node.outputs[0]
            kinds = [edit.dtype(t) for t in (source, result)]
            if kinds[0] == kinds[1] == self.half.dtype and edit.in_graph(part, node):
                edit.bypass(part, source, [node], result)
        edit.sweep(part)


def _faults(graph: gs.Graph) -> str:
    """What ONNX type inference finds wrong with a graph; empty where nothing is."""
    try:
        onnx.shape_inference.infer_shapes(weightless(graph), check_type=True, strict_mode=True)
    except Exception as error:
        return " ".join(str(error).split())[:300]
    return ""

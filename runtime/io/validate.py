"""The faults for which every runtime refuses a model, found before any work: a sentence for each, with the node.

    opsets        the opset of ONNX is 1 or higher
    names         each tensor is written once; initializers, inputs and outputs are listed once; what is read is written
    order         no node depends on itself
    operators     the numbers of inputs and outputs, and the attributes, are those of the operator; the equation of an
                  Einsum is one

The ONNX checker has more rules. ONNX Runtime and TensorRT accept many models against these, so they are not checked.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import onnx

from channelfold.runtime.errors import ModelError
from channelfold.runtime.io.names import in_order

_KIND = onnx.AttributeProto
_STANDARD = ("", "ai.onnx")
_TERM = rb"[a-zA-Z ]*(\.\.\.[a-zA-Z ]*)?"  # in which every text matches in one way
_EQUATION, _LONGEST = rb"%s(,%s)*(->%s)?" % (_TERM, _TERM, _TERM), 1000


def validate(model: onnx.ModelProto, path: Path) -> None:
    """Raises ModelError with the first fault of a model."""
    opsets = {"" if o.domain in _STANDARD else o.domain: o.version for o in model.opset_import}
    fault = next(itertools.chain(_faults(model.graph, opsets), _unwritten(model)), None)
    if fault:
        raise ModelError(f"{path} is not a valid model: {fault[:300]}", "Export it again, or mend what made it.")


def _unwritten(model: onnx.ModelProto) -> Iterator[str]:
    """Outputs of the model, and of its functions, that nothing computes."""
    graph = model.graph
    given = {v.name for v in (*graph.input, *graph.initializer)} | {s.values.name for s in graph.sparse_initializer}
    written = given | {name for node in graph.node for name in node.output}
    yield from (f"nothing computes its output {v.name!r}" for v in graph.output if v.name not in written)
    for function in model.functions:
        written = {*function.input, *(name for node in function.node for name in node.output)}
        missing = [name for name in function.output if name not in written]
        yield from (f"nothing computes the output {name!r} of its function {function.name!r}" for name in missing)


def _faults(
    graph: onnx.GraphProto, opsets: Mapping[str, int], outer: frozenset[str] = frozenset(("",))
) -> Iterator[str]:
    for domain, version in opsets.items():
        if version < (not domain) or version >> 31:
            yield f"its opset {f'of {domain!r} ' if domain else ''}is {version}"
    yield from (f"it lists two initializers {name!r}" for name in _doubles(t.name for t in graph.initializer))
    yield from (f"it lists the input {name!r} twice" for name in _doubles(v.name for v in graph.input))
    written = {t.name for t in graph.initializer} | {v.name for v in graph.input}
    for node in graph.node:
        for name in filter(None, node.output):
            if name in written:
                yield f"{_named(node)} writes {name!r}, which is written before"
            written.add(name)
    known = outer | written | {sparse.values.name for sparse in graph.sparse_initializer}
    yield from _cycles(graph)
    for node in graph.node:
        yield from _misuses(node, opsets)
        for attribute in node.attribute:
            for part in (attribute.g, *attribute.graphs):
                yield from _faults(part, opsets, known)
    for node in graph.node:
        yield from (
            f"{_named(node)} reads {name!r}, which nothing computes" for name in node.input if name not in known
        )


def _doubles(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1 and name]


def _cycles(graph: onnx.GraphProto) -> Iterator[str]:
    inside = set(range(len(graph.node))) - set(in_order(graph.node))
    yield from (f"{_named(graph.node[i])} depends on its own output" for i in sorted(inside))


def _misuses(node: onnx.NodeProto, opsets: Mapping[str, int]) -> Iterator[str]:
    if strange := [text for text in (node.op_type, node.domain) if isinstance(text, bytes)]:
        yield f"{_named(node)}: the name {strange[0]!r} is not UTF-8"
        return
    yield from (f"{_named(node)} has the attribute {name!r} twice" for name in _doubles(a.name for a in node.attribute))
    domain = "" if node.domain in _STANDARD else node.domain
    version = opsets.get(domain)
    if version is None or not onnx.defs.has(node.op_type, version, domain):
        return
    schema = onnx.defs.get_schema(node.op_type, version, domain)
    given = len(node.input) - next((i for i, name in enumerate(reversed(node.input)) if name), len(node.input))
    for what, count, low, high in (
        ("inputs", given, schema.min_input, schema.max_input),
        ("outputs", len([name for name in node.output if name]), min(1, schema.min_output), schema.max_output),
    ):
        if not low <= count <= high:
            bounds = f"{low}" if low == high else f"at least {low}" if count < low else f"at most {high}"
            yield f"{_named(node)} has {count} {what}, and {node.op_type} takes {bounds}"
    for attribute in node.attribute:
        known = schema.attributes.get(attribute.name)
        if known is None:
            yield f"{_named(node)} has an attribute {attribute.name!r}, which {node.op_type} has not in opset {version}"
        elif (
            attribute.type not in (getattr(known.type, "value", None), _KIND.UNDEFINED) and not attribute.ref_attr_name
        ):
            kind = _KIND.AttributeType.Name(attribute.type)
            yield f"{_named(node)}: the attribute {attribute.name!r} is of type {kind}"
    missing = [name for name, known in schema.attributes.items() if known.required]
    for name in missing:
        if name not in {attribute.name for attribute in node.attribute}:
            yield f"{_named(node)} lacks the attribute {name!r}"
    if not domain and node.op_type == "Einsum":
        text = next((a.s for a in node.attribute if a.name == "equation"), b"")
        if len(text) > _LONGEST or not re.fullmatch(_EQUATION, text):  # on which shape inference may never end
            shown = f"{text[:40].decode(errors='replace')}{'…' if len(text) > 40 else ''}"
            yield f"{_named(node)} has the equation {shown!r}"


def _named(node: onnx.NodeProto) -> str:
    name = node.name or next(iter(node.output), "")
    return f"{node.op_type} {name!r}"

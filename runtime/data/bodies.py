"""What reaches a body of If, Loop or Scan when a model runs: the feeds of the body as a graph of its own.

The model in front of the node is run on every feed of the model. What the body then gets is one feed for a branch that
is taken, and one for each iteration of a Loop or a Scan, whose states this module carries from one to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.runtime.data.sources import Data
from channelfold.runtime.errors import ModelError
from channelfold.runtime.io import edit
from channelfold.runtime.io.bodies import Body
from channelfold.runtime.io.convert import export
from channelfold.runtime.io.facts import spec
from channelfold.runtime.io.files import open_model
from channelfold.runtime.io.session import Feed, Session

ITERATIONS = 1024  # of one run of a Loop or a Scan; later iterations are not looked at


def reaching(body: Body, data: Data, always: bool = False) -> Data:
    """The feeds that reach a body when the graph around it runs on ``data``.

    The graph must stay as it is. With ``always`` what would reach the body comes as well: a branch gets its feeds when
    the other branch is taken too, and a Loop makes one iteration at least. Iterating raises ModelError for a node that
    runs its body in a way that is not known here, and where something other than tensors reaches the body.
    """
    run = _Reaching(body, data, always)
    with body.apart() as graph:
        inputs = tuple(map(spec, graph.inputs))
    return Data(inputs, len(data), run.feeds, f"what reaches the {body.place}", synthetic=data.synthetic)


@dataclass
class _Reaching:
    body: Body
    data: Data
    always: bool

    def feeds(self) -> Iterator[Feed]:
        walk = _WALKS.get(self.body.node.op)
        if walk is None or not edit.is_standard(self.body.node):
            raise ModelError(f"how {self.body.node.op} runs its bodies is not known")
        later: list[Feed] = []  # those of a branch that was not taken
        for feed in self.data:
            for taken, found in walk(self, self._values(feed)):
                if not all(isinstance(value, np.ndarray) for value in found.values()):
                    raise ModelError("what reaches it are no tensors")
                if taken:
                    yield found
                elif self.always and len(later) < 2:
                    later.append(found)
        yield from later

    def _values(self, feed: Feed) -> list[Any]:
        """The values of the inputs of the node (None: left out), then of the tensors that the body reads outside."""
        needed = [*self.body.node.inputs, *self.captured]
        asked = [t.name for t in needed if t.name and not isinstance(t, gs.Constant) and t.name not in feed]
        known = feed | (self._outer.run(self._outer.accepted(feed), list(dict.fromkeys(asked))) if asked else {})
        return [edit.value(t) if isinstance(t, gs.Constant) else known.get(t.name) for t in needed]

    def outside(self, values: list[Any]) -> Feed:
        """The values of what the body reads outside, by name."""
        return dict(zip([t.name for t in self.captured], values[len(self.body.node.inputs) :], strict=True))

    @cached_property
    def captured(self) -> list[gs.Variable]:
        return self.body.captured()

    @cached_property
    def _outer(self) -> Session:
        sources = ((t.name, edit.producer(t)) for t in (*self.body.node.inputs, *self.captured))
        computed = [name for name, node in sources if node is not None and edit.in_graph(self.body.outer, node)]
        return _session(self.body.parent, self.body.outer, list(dict.fromkeys(computed)))

    @cached_property
    def session(self) -> Session:
        return _session(self.body, self.body.graph)


def _session(body: Body | None, graph: gs.Graph, outputs: list[str] | None = None) -> Session:
    """A session on the main graph, or on a body apart."""
    if body is None:
        return open_model(*export(graph), outputs)
    with body.apart():
        return open_model(*export(graph), outputs)


def _branch(run: _Reaching, values: list[Any]) -> Iterator[tuple[bool, Feed]]:
    yield bool(np.asarray(values[0]).all()) == (run.body.name == "then_branch"), run.outside(values)


def _loop(run: _Reaching, values: list[Any]) -> Iterator[tuple[bool, Feed]]:
    trips, going, *states = values[: len(run.body.node.inputs)]
    limit = ITERATIONS if trips is None else min(int(np.asarray(trips).item()), ITERATIONS)
    going = np.array(True) if going is None else going
    index = 0
    while (index < limit and going.all()) or (run.always and not index):
        rank = edit.rank(run.body.graph.inputs[0])
        feed = _named(run.body.graph.inputs, [np.full((1,) * (rank or 0), index, np.int64), going, *states])
        feed |= run.outside(values)
        yield index < limit and bool(going.all()), feed
        going, *states = _step(run, feed, 1 + len(states))
        index += 1


def _scan(run: _Reaching, values: list[Any]) -> Iterator[tuple[bool, Feed]]:
    node = run.body.node
    count = int(node.attrs["num_scan_inputs"])
    given = values[: len(node.inputs)]
    states, sequences = given[: len(given) - count], given[len(given) - count :]
    if len(given) != len(run.body.graph.inputs):
        raise ModelError("a Scan of opset 8 counts batches of its own")
    axes = node.attrs.get("scan_input_axes") or [0] * count
    backward = node.attrs.get("scan_input_directions") or [0] * count
    for index in range(min(sequences[0].shape[axes[0]], ITERATIONS)):
        slices = [
            np.take(values, -1 - index if back else index, axis)
            for values, axis, back in zip(sequences, axes, backward, strict=True)
        ]
        feed = _named(run.body.graph.inputs, [*states, *slices]) | run.outside(values)
        yield True, feed
        states = _step(run, feed, len(states))


def _map(run: _Reaching, values: list[Any]) -> Iterator[tuple[bool, Feed]]:
    given = values[: len(run.body.node.inputs)]
    for index in range(min(len(given[0]), ITERATIONS)):
        elements = [value[index] if isinstance(value, list) else value for value in given]
        yield True, _named(run.body.graph.inputs, elements) | run.outside(values)


def _named(inputs: list[gs.Tensor], values: list[Any]) -> Feed:
    return {tensor.name: value for tensor, value in zip(inputs, values, strict=True)}


def _step(run: _Reaching, feed: Feed, count: int) -> list[Any]:
    """The first ``count`` outputs of the body: the states of the next iteration."""
    if not count:
        return []
    names = [tensor.name for tensor in run.body.graph.outputs[:count]]
    found = run.session.run(run.session.accepted(feed), list(dict.fromkeys(names)))
    return [found[name] for name in names]


_WALKS: dict[str, Callable[[_Reaching, list[Any]], Iterator[tuple[bool, Feed]]]] = {
    "If": _branch,
    "Loop": _loop,
    "Scan": _scan,
    "SequenceMap": _map,
}

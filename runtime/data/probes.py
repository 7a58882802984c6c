"""Random inputs that a model accepts, and the shapes that a graph has on them.

What the graph says of its inputs (``runtime.io.meanings``) decides their values: ids are below the rows of their table,
masks are 1, positions follow one another. A decoder with a cache gets the steps of *rollouts*: a prefill of 16 tokens,
then 8 single tokens, each with the cache that the model itself returned one step before. Caches at random would be no
proof of a decoder: a rewrite may rely on what the model writes into them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from channelfold.runtime.data.feeds import batch_size, describe
from channelfold.runtime.data.sources import Data, check_inputs
from channelfold.runtime.errors import DataError, ModelError, UsageError, nearest
from channelfold.runtime.io import limits
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.session import Feed, Meaning, TensorSpec
from channelfold.runtime.io.shapes import Shape, measured_shapes, shapes_on

SAMPLES = 2  # random feeds for a model whose inputs have fixed shapes
SIZES = ((32, 1), (16, 2), (64, 1), (224, 1), (128, 1), (8, 1), (1, 1), (640, 1), (1024, 1))  # open axes, leading ones
RANDOM_LIMIT = 1 << 28  # bytes of an input of random data
PREFILL, STEPS = 16, 8  # tokens of the first step of a rollout, and steps of one token after it

Run = Callable[[Feed], Mapping[str, Any]]
_NONE = Meaning("")


def shapes_of(graph: gs.Graph, data: Data | None = None, seed: int = 0) -> dict[str, Shape]:
    """The shapes of all tensors, on the first sample of ``data`` or else on the first random feed that runs.

    Where no random feed runs, the shapes that ONNX shape inference knows.
    """
    if data is not None and (feed := next(iter(data), None)) is not None:
        return measured_shapes(graph, feed)
    try:
        for feed in random_feeds(required_inputs(graph), seed):
            try:
                return measured_shapes(graph, feed)
            except ModelError:
                continue
    except DataError:  # inputs that cannot be random
        pass
    return shapes_on(graph, {})


def random_feeds(
    inputs: Sequence[TensorSpec], seed: int, like: Feed | None = None, run: Run | None = None
) -> Iterator[Feed]:
    """Random feeds in the shapes of ``like``, or in one size after another where the model leaves sizes open.

    The steps of a rollout come first where the model is a decoder and ``run`` runs it. Raises DataError for inputs that
    cannot be random (strings, sequences).
    """
    if not inputs:
        yield {}
        return
    if run is not None and rolls(inputs):
        yield from _rollout(inputs, {}, seed, run)
    if like is not None:
        inputs = tuple(dataclasses.replace(spec, shape=np.shape(like[spec.name])) for spec in inputs)
    fixed = all(isinstance(dim, int) for spec in inputs for dim in spec.shape)
    for number, (size, leading) in enumerate(SIZES[:SAMPLES] if fixed else SIZES):
        dims = {spec.shape[0]: leading for spec in inputs if spec.shape and isinstance(spec.shape[0], str)}
        yield from random_data(inputs, 1, seed=seed + number, dims=dims, size=size)


def random_data(
    inputs: Sequence[TensorSpec],
    n: int,
    *,
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    size: int = 32,
    run: Run | None = None,
) -> Data:
    """``n`` random feeds: floats from the standard normal distribution, integers 0 or 1 (safe as indices), or what the
    inputs mean. Where the model is a decoder and ``run`` runs it, the feeds are the steps of rollouts.

    A symbolic dimension has the size given in ``dims``, else 1 where it leads a shape, else ``size``; a name has one
    size wherever it appears. Half of the ``size`` tokens of a decoder are in its cache. Raises UsageError for n < 1 or
    an unknown dimension, DataError for inputs of strings.
    """
    check_inputs(inputs)
    if n < 1:
        raise UsageError(f"{n} random samples were asked for", "Ask for at least 1")
    dims = dict(dims or {})
    symbols = {dim for spec in inputs for dim in spec.shape if isinstance(dim, str)}
    for name in sorted(dims.keys() - symbols):
        known = nearest(name, symbols) if symbols else "All its dimensions are fixed"
        raise UsageError(f"The model has no dimension {name!r}", known)
    for spec in inputs:
        if spec.dtype == np.dtype(object):
            raise DataError(f"Input {spec.name!r} takes strings, which cannot be random", "Give real data")
    dims = {spec.shape[0]: 1 for spec in inputs if spec.shape and isinstance(spec.shape[0], str)} | dims
    past = size // 2 if any(map(_grows, inputs)) else 0
    Step(inputs, dims, past, size - past, size, False).shapes()  # which may be too large

    def feeds() -> Iterator[Feed]:
        steps = _rollouts(inputs, dims, seed, run) if run is not None and rolls(inputs) else iter(())
        for index in range(n):
            step = Step(inputs, dims, past, size - past, size, bool(index % 2))
            feed = next(steps, None)
            yield step.feed(np.random.default_rng([seed, index])) if feed is None else feed

    kind = "rollout step" if run is not None and rolls(inputs) else "random sample"
    description = f"{describe(n, batch_size(inputs), kind)} (seed {seed})"
    notes = ("The inputs are random: neither ranges nor accuracy say anything about real data",)
    return Data(inputs, n, feeds, description, notes=notes, synthetic=True)


def rolls(inputs: Sequence[TensorSpec]) -> bool:
    """Whether a model can be fed the cache that it returned: it has cache pairs, and those that grow may grow."""
    caches = [spec for spec in inputs if _meaning(spec).present]
    return bool(caches) and not any(_grows(spec) and isinstance(spec.shape[_axis(spec)], int) for spec in caches)


def _rollouts(inputs: Sequence[TensorSpec], dims: Mapping[str, int], seed: int, run: Run) -> Iterator[Feed]:
    """The steps of one rollout after another, for as long as the model runs."""
    for number in itertools.count():
        steps = list(_rollout(inputs, dims, seed + number, run))
        yield from steps
        if len(steps) <= STEPS:
            return


def _rollout(inputs: Sequence[TensorSpec], dims: Mapping[str, int], seed: int, run: Run) -> Iterator[Feed]:
    """The steps of a rollout of random tokens, up to the first at which the model does not run."""

    def values(step: Step, number: int) -> Feed:
        return step.feed(np.random.default_rng([seed, number]))

    with contextlib.suppress(ModelError):
        yield from rollout(inputs, dims, [PREFILL] + [1] * STEPS, run, values)


def rollout(
    inputs: Sequence[TensorSpec],
    dims: Mapping[str, int],
    sizes: Sequence[int],
    run: Run,
    values: Callable[[Step, int], Feed],
) -> Iterator[Feed]:
    """The steps of a rollout of ``sizes`` new tokens each: the ``values`` of a step, with the cache of the one before.

    Raises ModelError where the model does not run on a step, which is not yielded then.
    """
    cached: Feed = {}
    past = 0
    for number, new in enumerate(sizes):
        step = Step(inputs, dims, past, new, sum(sizes), number > 0)
        feed = values(step, number) | cached
        if number == 0:  # a cache of fixed width is empty as well
            feed |= {s.name: np.zeros_like(feed[s.name]) for s in inputs if _meaning(s).present and not _grows(s)}
        found = run(feed)
        yield feed
        for spec in inputs:
            present = found.get(_meaning(spec).present)
            if present is not None and (present.size or spec.name not in cached):
                cached[spec.name] = present
        past += step.new


def rollout_results(inputs: Sequence[TensorSpec], run: Run, seed: int = 0) -> Iterator[Mapping[str, Any]]:
    """What ``run`` returns at every step of a rollout of a decoder; nothing where the model is none."""
    found: list[Mapping[str, Any]] = []

    def noted(feed: Feed) -> Mapping[str, Any]:
        found.append(run(feed))
        return found[-1]

    for _ in _rollout(inputs, {}, seed, noted) if rolls(inputs) else ():
        yield found[-1]


class Step:
    """The inputs of one run of a model: ``new`` tokens after ``past`` ones."""

    def __init__(
        self, inputs: Sequence[TensorSpec], dims: Mapping[str, int], past: int, new: int, size: int, continues: bool
    ):
        caches = [spec for spec in inputs if _grows(spec)]
        lengths = [spec.shape[_axis(spec)] for spec in caches]
        tokens = _tokens(inputs) if any(_meaning(spec).present for spec in inputs) else []
        masks = [spec.shape[-1] for spec in inputs if caches and _meaning(spec).kind == "mask" and spec.shape]
        self.inputs, self.size, self.continues = inputs, size, continues
        self.past = next((dim for dim in lengths if isinstance(dim, int)), past)
        self.new = next((dim for dim in tokens if isinstance(dim, int)), new)
        sizes = dict.fromkeys(masks, self.past + self.new) | dict.fromkeys(tokens, self.new)
        sizes |= dict.fromkeys(lengths, self.past)
        sizes |= {spec.shape[-1]: width for spec in caches if (width := _meaning(spec).width)}
        self.dims = {name: known for name, known in sizes.items() if isinstance(name, str)} | dict(dims)

    def feed(self, rng: np.random.Generator, known: Mapping[str, Any] | None = None) -> Feed:
        """Values for all inputs: random, or what the inputs mean; ``known`` has values for kinds of meanings."""
        shapes = self.shapes()
        return {spec.name: self._values(spec, shapes[spec.name], rng, known or {}) for spec in self.inputs}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs. Raises DataError for an input that is too large to be random."""
        return {spec.name: self._shape(spec) for spec in self.inputs}

    def _shape(self, spec: TensorSpec) -> tuple[int, ...]:
        found = (1 if axis == 0 and dim is None else self.dims.get(str(dim), self.size)
                 for axis, dim in enumerate(spec.shape))  # fmt: skip
        shape = tuple(dim if isinstance(dim, int) else size for dim, size in zip(spec.shape, found, strict=True))
        if (taken := math.prod(shape) * np.dtype(spec.dtype).itemsize) > RANDOM_LIMIT and limits.are_on():
            most = f"{RANDOM_LIMIT / 1e9:.1f} at most"
            raise DataError(
                f"One random sample of the input {spec} takes {taken / 1e9:,.1f} GB, {most}", "Give real data"
            )
        return shape

    def _values(
        self, spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator, known: Mapping[str, Any]
    ) -> np.ndarray:
        meaning, dtype = _meaning(spec), np.dtype(spec.dtype)
        total = self.past + self.new
        said = {
            "mask": 1,
            "zeros": 0,
            "branch": self.continues,
            "past_length": self.past,
            "total_length": total,
            "last_position": total - 1,
            "position": np.arange(self.past, self.past + shape[-1]) if shape else self.past,
            **known,
        }
        if meaning.kind in said:
            return np.broadcast_to(said[meaning.kind], shape).astype(dtype)
        if dtype.kind == "f":
            return rng.standard_normal(shape, dtype=np.float32).astype(dtype)
        return rng.integers(0, max(meaning.below, 1), shape).astype(dtype)


def _meaning(spec: TensorSpec) -> Meaning:
    return spec.meaning or _NONE


def _tokens(inputs: Sequence[TensorSpec]) -> list[int | str | None]:
    """The sizes of the axes that count new tokens: those of ids and positions, or else of embeddings."""
    named = [spec.shape[-1] for spec in inputs if _meaning(spec).kind in ("ids", "position") and spec.shape]
    kept = {dim for spec in inputs if _meaning(spec).kind == "past" for dim in spec.shape}
    embedded = [spec.shape[1] for spec in inputs if spec.meaning is None and len(spec.shape) == 3]
    return named or [dim for dim in embedded if dim not in kept]


def _grows(spec: TensorSpec) -> bool:
    return _meaning(spec).axis is not None


def _axis(spec: TensorSpec) -> int:
    return _meaning(spec).axis or 0

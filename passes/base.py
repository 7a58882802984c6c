"""What all passes share: outcomes, refusals, the context and the base class."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from channelfold.passes.options import options
from channelfold.runtime.errors import DataError, no_progress

if TYPE_CHECKING:
    import numpy as np
    import onnx_graphsurgeon as gs

    from channelfold.runtime.data.sources import Data
    from channelfold.runtime.stats.observe import Joint, Observer


@dataclass(frozen=True)
class Change:
    """One rewritten site: the node, and what the pass did to it."""

    node: str
    what: str


@dataclass(frozen=True)
class Refusal:
    """One site that stays as it is: the node and the reason. ``code`` groups refusals of one kind in a report."""

    node: str
    reason: str
    code: str = ""


@dataclass
class Outcome:
    """The changes, refusals and results of a pass.

    ``facts`` holds JSON-able results for the report (scales, counts …), ``warnings`` holds sentences for the user.
    """

    changed: list[Change] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def change(self, node: str, what: str) -> None:
        self.changed.append(Change(node, what))

    def refuse(self, node: str, reason: str, code: str = "") -> None:
        self.refused.append(Refusal(node, reason, code))

    @contextlib.contextmanager
    def refusing(self, node: str, site: str) -> Iterator[None]:
        """Refuses a site, described by ``site``, where the block raises Refused."""
        try:
            yield
        except Refused as error:
            self.refuse(node, f"{site}: {error}", error.code)


class Refused(Exception):
    """A site stays as it is. The report shows ``reason``; ``code`` groups refusals of one kind.

    ``what`` is the obstacle alone, where the reason names an obstacle. ``behind`` is the reason in the words of a site
    in front of the obstacle.
    """

    def __init__(self, reason: str, code: str = "", what: str = "", behind: str = ""):
        super().__init__(reason)
        self.reason, self.code = reason, code or reason
        self.what, self.behind = what or reason, behind or reason


class InBetween(Refused):
    """An operator stands between two sites that belong together; ``more`` says what the operator may do there."""

    def __init__(self, what: str, more: str = ""):
        super().__init__(f"{what} is in between{more}", what=what, behind=f"{what} follows it{more}")


class TwoActivations(Refused):
    """A product has no weight: both of its factors are computed."""


class DoesNotFit(Refused):
    """A value that a rewrite needs is not finite in the type that has to hold it."""


@dataclass(frozen=True)
class Patterns:
    """Patterns (``*`` and ``?``) of the names of sites; an empty ``include`` takes all sites but ``exclude``."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def why_not(self, *names: str) -> str:
        """Why the patterns leave a site with these names alone; empty where they take the site."""
        if self.include and not _match(names, self.include):
            return "not included by any pattern"
        pattern = _match(names, self.exclude)
        return f"excluded by pattern {pattern!r}" if pattern else ""


def _match(names: Sequence[str], patterns: Sequence[str]) -> str:
    """The first pattern that one of the names matches; empty where no pattern matches.

    A name that a report has shortened is a pattern as well: its … stands for parts that are left out, and so may its
    ends.
    """
    return next((p for p in patterns if any(_fits(name, p) for name in names)), "")


def _fits(name: str, pattern: str) -> bool:
    if "…" not in pattern:
        return fnmatch.fnmatchcase(name, pattern)
    middle = pattern.replace("…", "*")
    return any(fnmatch.fnmatchcase(name, f"{head}{middle}{tail}") for head in ("", "*/") for tail in ("", "/*"))


@dataclass
class Context:
    """The data and settings that passes may use beside the graph.

    ``calibration`` is the data for calibrated passes, or None. Long work calls ``progress(stage, done, total)`` now and
    then. ``seed`` makes random probes repeatable. ``shared`` holds the ids of the values that several parts of the
    model (main graph and bodies) read, each of which has data of its own. ``quantizer`` is the pass that quantizes the
    graph later, where one is known. ``keep`` is the folder where statistics are kept for a later run. Where nodes are
    ``compared`` with those of the original one by one, a pass changes what a node computes with and nothing else.
    """

    calibration: Data | None = None
    progress: Callable[[str, int, int], None] = no_progress
    seed: int = 0
    shared: frozenset[int] = frozenset()
    quantizer: Pass | None = None
    keep: Path | None = None
    compared: bool = False

    @property
    def data(self) -> Data:
        """The calibration data, for passes that need them."""
        if self.calibration is None:
            raise DataError("There are no calibration data", "Give some with --calibration")
        return self.calibration

    def observe(self, graph: gs.Graph, observers: Mapping[str, Sequence[Observer | Joint]]) -> None:
        """Shows observers the tensor of their name on the calibration data (``stats.observe``)."""
        observe = importlib.import_module("channelfold.runtime.stats.observe").observe
        observe(graph, observers, self.data, self.progress, self.keep)


@dataclass(frozen=True)
class Pass:
    """A graph rewrite. Its dataclass fields are its options, its command-line flags and its recipe keys.

    ``kind`` is a promise that the pipeline checks: ``exact`` (the same function to float rounding, verified by numbers
    after every run), ``calibrated`` (data-driven, approximate) or ``lossy``.

    ``apply`` edits ``graph`` in place and keeps no state. It rewrites a site fully, or refuses the site with a reason.
    ``needs_opset`` is the lowest opset that the pass supports, and ``least_opset`` the lowest opset for one graph; the
    pipeline first raises the graph to this opset. ``needs_data`` describes the pass in the error message for missing
    calibration data. A pass is applied to the bodies of If, Loop and Scan as well, each as a graph of its own, unless
    ``inside`` is False. With ``moves_cache`` a pass may change the values and the shapes of a decoder's cache, and is
    verified by rollouts.

    The class stands in the face of its family, ``passes/<family>/__init__.py``, which imports nothing heavy. The class
    ``Work`` in the file ``does_it`` beside the face is derived from the class and does the work; only a run imports it.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["exact", "calibrated", "lossy"]]
    does_it: ClassVar[str] = ""
    needs_opset: ClassVar[int] = 0
    needs_data: ClassVar[str] = ""
    inside: ClassVar[bool] = True
    moves_cache: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, option in options(type(self)).items():
            option.check(getattr(self, name))

    def work(self) -> Pass:
        """An instance, with the same options, of the class that does the work."""
        module = importlib.import_module(f"{type(self).__module__}.{self.does_it}") if self.does_it else None
        return module.Work(**vars(self)) if module else self

    def opset_for(self, graph: gs.Graph) -> int:
        """The lowest opset that the pass supports for a graph and the bodies in it."""
        work = self.work()
        return max(work.least_opset(part) for part in _all_graphs(graph))

    def least_opset(self, graph: gs.Graph) -> int:
        return self.needs_opset

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        if self.needs_data and ctx.calibration is None:
            raise self.lacks_data
        nodes = [node for part in _all_graphs(graph) for node in part.nodes]
        names, ops = [node.name for node in nodes], {node.op for node in nodes}
        everywhere = importlib.import_module("channelfold.passes.bodies").apply_everywhere
        outcome: Outcome = everywhere(self.work(), graph, ctx)
        patterns = (*self.patterns.include, *self.patterns.exclude)
        lost = [f"no node is called {pattern!r}" for pattern in patterns if not _match(names, [pattern])]
        lost += [f"there is no {op!r} node" for op in getattr(self, "exclude_ops", ()) if op not in ops]
        outcome.warnings += [f"{what}, which include or exclude asks for" for what in lost]
        return outcome

    def check_for(self, sm: int) -> None:
        """Raises UsageError where an engine for an SM cannot run what the pass writes."""

    def left(self, graph: gs.Graph) -> dict[str, Any]:
        """The facts about a graph that the pass leaves as it is."""
        return {}

    def feed(self, ctx: Context) -> dict[str, np.ndarray]:
        """The first sample of the calibration data. Raises DataError where there is none."""
        for feed in ctx.data:
            return feed
        raise self.lacks_data

    @property
    def lacks_data(self) -> DataError:
        return DataError(f"{self.needs_data} needs calibration data", "Give some with --calibration")

    @property
    def retypes(self) -> bool:
        """Whether the pass may change the types of the inputs and outputs of the model."""
        return False

    @property
    def patterns(self) -> Patterns:
        """The patterns among the options."""
        return Patterns(getattr(self, "include", ()), getattr(self, "exclude", ()))

    def options(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        known = options(type(self))
        changed = {name: value for name, value in self.options().items() if value != known[name].default}
        return self.name + (str(changed) if changed else "")


def _all_graphs(graph: gs.Graph) -> Iterator[gs.Graph]:
    return importlib.import_module("channelfold.runtime.io.convert").all_graphs(graph)

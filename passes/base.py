"""What every pass is made of: sites, outcomes, the context and the pass itself."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from channelfold.passes.options import options
from channelfold.runtime.errors import DataError, no_progress

if TYPE_CHECKING:
    import numpy as np
    import onnx_graphsurgeon as gs

    from channelfold.runtime.data.sources import Data


@dataclass(frozen=True)
class Change:
    """One rewritten site: the node it was about, and what was done to it."""

    node: str
    what: str


@dataclass(frozen=True)
class Refusal:
    """One site left alone: its node and why. ``code`` groups refusals of one kind in a report."""

    node: str
    reason: str
    code: str = ""


@dataclass
class Outcome:
    """What a pass did.

    ``facts`` carries JSON-able results that belong in the report (scales, counts …), ``warnings`` sentences that the
    user has to see.
    """

    changed: list[Change] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def change(self, node: str, what: str) -> None:
        self.changed.append(Change(node, what))

    def refuse(self, node: str, reason: str, code: str = "") -> None:
        self.refused.append(Refusal(node, reason, code))


class Refused(Exception):
    """Why a site stays as it is. ``reason`` is what the report says; ``code`` groups refusals of one kind.

    ``what`` is the obstacle alone, where the reason names one; ``behind`` is the reason as a site in front of the
    obstacle puts it.
    """

    def __init__(self, reason: str, code: str = "", what: str = "", behind: str = ""):
        super().__init__(reason)
        self.reason, self.code = reason, code or reason
        self.what, self.behind = what or reason, behind or reason


class InBetween(Refused):
    """An operator stands between two places that belong together; ``more`` says what it may do there."""

    def __init__(self, what: str, more: str = ""):
        super().__init__(f"{what} is in between{more}", what=what, behind=f"{what} follows it{more}")


class TwoActivations(Refused):
    """A product has no weight: both of its factors are computed."""


class DoesNotFit(Refused):
    """A value that a rewrite needs is not finite in the type that has to hold it."""


@dataclass(frozen=True)
class Patterns:
    """Which sites a pass takes by their names: patterns (``*`` and ``?``); without ``include`` all but ``exclude``."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def why_not(self, *names: str) -> str:
        """Why a site with these names is left alone; empty where it is not."""
        if self.include and not _match(names, self.include):
            return "not included by any pattern"
        pattern = _match(names, self.exclude)
        return f"excluded by pattern {pattern!r}" if pattern else ""


def _match(names: Sequence[str], patterns: Sequence[str]) -> str:
    """The first pattern that one of the names matches; empty for none."""
    return next((p for p in patterns if any(fnmatch.fnmatchcase(name, p) for name in names)), "")


@dataclass
class Context:
    """What passes may use beside the graph.

    ``calibration`` is the data for calibrated passes (``None`` when there is none); ``progress(stage, done, total)``
    is called now and then during long work; ``seed`` makes random probes repeatable.
    """

    calibration: Data | None = None
    progress: Callable[[str, int, int], None] = no_progress
    seed: int = 0

    @property
    def data(self) -> Data:
        """The calibration data, for passes that need them."""
        if self.calibration is None:
            raise DataError("There are no calibration data", "Give some with --calibration")
        return self.calibration


@dataclass(frozen=True)
class Pass:
    """A graph rewrite. Its dataclass fields are its options, its command-line flags and its recipe keys.

    ``kind`` is a promise the pipeline holds it to: ``exact`` (the same function to float rounding, verified
    numerically after every run), ``calibrated`` (data-driven, approximate) or ``lossy``.

    ``apply`` edits ``graph`` in place and keeps no state. It rewrites a site fully or leaves it alone and refuses it
    with the reason. ``needs_opset`` is the lowest opset it works at, ``least_opset`` the same for one graph where that
    depends on it; the pipeline raises the graph to it beforehand. ``needs_data``: what needs calibration data, as the
    error says it where there are none.

    The class stands in the face of its family, ``passes/<family>/__init__.py``, which imports nothing heavy. Class
    ``Work`` of the file ``does_it`` beside the face derives from it and does the work; that file is imported then.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["exact", "calibrated", "lossy"]]
    does_it: ClassVar[str] = ""
    needs_opset: ClassVar[int] = 0
    needs_data: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, option in options(type(self)).items():
            option.check(getattr(self, name))

    def work(self) -> Pass:
        """The same options in the class that does the work."""
        module = importlib.import_module(f"{type(self).__module__}.{self.does_it}") if self.does_it else None
        return module.Work(**vars(self)) if module else self

    def opset_for(self, graph: gs.Graph) -> int:
        """The lowest opset that the pass works at on a graph."""
        return self.work().least_opset(graph)

    def least_opset(self, graph: gs.Graph) -> int:
        return self.needs_opset

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        if self.needs_data and ctx.calibration is None:
            raise self.lacks_data
        names, ops = [node.name for node in graph.nodes], {node.op for node in graph.nodes}
        outcome = self.work().apply(graph, ctx)
        patterns = (*self.patterns.include, *self.patterns.exclude)
        lost = [f"no node is called {pattern!r}" for pattern in patterns if not _match(names, [pattern])]
        lost += [f"there is no {op!r} node" for op in getattr(self, "exclude_ops", ()) if op not in ops]
        outcome.warnings += [f"{what}, which include or exclude asks for" for what in lost]
        return outcome

    def feed(self, ctx: Context) -> dict[str, np.ndarray]:
        """The first sample of the calibration data. Raises DataError where there is none."""
        for feed in ctx.data:
            return feed
        raise self.lacks_data

    @property
    def lacks_data(self) -> DataError:
        return DataError(f"{self.needs_data} needs calibration data", "Give some with --calibration")

    @property
    def patterns(self) -> Patterns:
        """The patterns among the options."""
        return Patterns(getattr(self, "include", ()), getattr(self, "exclude", ()))

    def options(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        changed = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != (f.default if f.default is not dataclasses.MISSING else None)
        }
        return self.name + (str(changed) if changed else "")

"""What every pass is made of: errors, sites, outcomes, the context and the pass itself.

Exceptions, all of which end a command with one clear line and an exit code::

    ChannelfoldError            1   something failed; the message ends with the next step
    ├── UsageError              2   an option, a recipe or a name is wrong
    ├── ModelError              1   a model file cannot be read, or is not what it should be
    ├── DataError               1   calibration or evaluation data do not fit the model
    ├── OutputError             1   a result cannot be written
    ├── DependencyError         1   an optional package (ONNX Runtime, TensorRT) is missing or broken
    ├── VerificationError       1   an exact pass changed the function; it was rolled back
    ├── BuildError              1   TensorRT refused the network
    └── GateError               3   an accuracy gate was missed
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from channelfold.runtime.calibration import Data


class ChannelfoldError(Exception):
    """An error the user can act on: what happened, then (``hint``) what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str = ""):
        super().__init__(f"{message.rstrip('.')}. {hint}".strip() if hint else message)


class UsageError(ChannelfoldError):
    exit_code = 2


class ModelError(ChannelfoldError):
    pass


class DataError(ChannelfoldError):
    pass


class OutputError(ChannelfoldError):
    pass


class DependencyError(ChannelfoldError):
    pass


class VerificationError(ChannelfoldError):
    pass


class BuildError(ChannelfoldError):
    pass


class GateError(ChannelfoldError):
    exit_code = 3


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for a misspelt name, else the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}"


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


def no_progress(stage: str, done: int, total: int) -> None:
    """The silent progress callback."""


@dataclass
class Context:
    """What passes may use beside the graph.

    ``calibration`` is the data for calibrated passes (``None`` when there is none); ``progress(stage, done, total)``
    is called now and then during long work; ``seed`` makes random probes repeatable.
    """

    calibration: Data | None = None
    progress: Callable[[str, int, int], None] = no_progress
    seed: int = 0


@dataclass(frozen=True)
class Pass:
    """A graph rewrite. Its dataclass fields are its options, its command-line flags and its recipe keys.

    ``kind`` is a promise the pipeline holds it to: ``exact`` (the same function to float rounding, verified
    numerically after every run), ``calibrated`` (data-driven, approximate) or ``lossy``.

    ``apply`` edits ``graph`` in place and keeps no state. It rewrites a site fully or leaves it alone and refuses it
    with the reason. ``needs_opset`` is the lowest opset it works at, ``opset_for`` the same for one graph where that
    depends on it; the pipeline raises the graph to it beforehand.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["exact", "calibrated", "lossy"]]
    needs_opset: ClassVar[int] = 0

    def opset_for(self, graph: gs.Graph) -> int:
        return self.needs_opset

    def apply(self, graph: gs.Graph, ctx: Context) -> Outcome:
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        changed = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != (f.default if f.default is not dataclasses.MISSING else None)
        }
        return self.name + (str(changed) if changed else "")

"""Rules of TensorRT and ONNX Runtime that a file breaks: what they refuse, ruin without a word, or run slowly.

A rule is a row of ``rules.RULES``. ``lint`` checks a graph without running anything; ``fix`` rewrites what a rule can
repair safely, until no rule changes the graph any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_graphsurgeon as gs

Level = Literal["error", "warning", "note"]
Found = Iterator[tuple[str, str]]  # the node (or tensor), and what is wrong with it beyond the rule's own words

OLDEST = 80  # SM that is taken for granted where no GPU is named
TARGETS = ("tensorrt", "onnxruntime")


@dataclass(frozen=True)
class Rule:
    """A rule, in words, and the function that finds the nodes of a graph that break the rule.

    ``level``: an ``error`` is refused or computed wrongly, a ``warning`` runs slowly or in float without a word, a
    ``note`` is worth knowing. ``below``: the SM from which on a GPU no longer breaks the rule; None where all do.
    ``repair`` rewrites the graph so that ``find`` finds less, and returns the names of the nodes that it changed; a
    ``late`` one needs the weights and biases as the others leave them.
    """

    id: str
    level: Level
    checks: str
    consequence: str
    fix: str
    find: Callable[[gs.Graph], Found]
    targets: tuple[str, ...] = ("tensorrt",)
    below: int | None = None
    repair: Callable[[gs.Graph], list[str]] | None = None
    late: bool = False

    def concerns(self, target: str, sm: int | None) -> bool:
        """Whether the rule holds for a target, and for a GPU where the rule is about some GPUs.

        What a GPU older than SM 80 alone does not run is said of a named GPU alone.
        """
        broken = self.below is None or (self.below > OLDEST if sm is None else sm < self.below)
        return target in self.targets and broken

    def severity(self, sm: int | None) -> Level:
        """The level of a finding: where only some GPUs break the rule and none is named, a note."""
        return "note" if self.below is not None and sm is None else self.level


@dataclass(frozen=True)
class Finding:
    """A node that breaks a rule. ``detail`` holds the figures of this node."""

    rule: Rule
    node: str
    detail: str
    level: Level


def lint(graph: gs.Graph, rules: Iterable[Rule], target: str, sm: int | None = None) -> list[Finding]:
    """What a graph breaks of the rules for a target, the worst first. ``sm``: 10 x the compute capability of a GPU."""
    concerned = (rule for rule in rules if rule.concerns(target, sm))
    found = [Finding(rule, *one, rule.severity(sm)) for rule in concerned for one in dict.fromkeys(rule.find(graph))]
    return sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.level))


def fix(graph: gs.Graph, rules: Iterable[Rule], target: str, sm: int | None = None) -> list[tuple[Rule, list[str]]]:
    """Repairs what can be repaired safely. Returns the rules that changed the graph, with the names of the nodes."""
    done: dict[Rule, list[str]] = {}
    able = [(rule, rule.repair) for rule in rules if rule.repair is not None and rule.concerns(target, sm)]
    able.sort(key=lambda one: one[0].late)
    again = True
    while again:
        again = False
        for rule, repair in able:
            if changed := repair(graph):
                done.setdefault(rule, []).extend(changed)
                again = True
    return list(done.items())

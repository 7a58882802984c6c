"""The methods of the command ``smooth``: the passes of each method, and the options that the method accepts.

    auto, smoothquant, os-plus, awq, repq, outliertune, fp4-shift     pass smooth with this ``method``
    equalize                                                          pass equalize; on request, absorb-bias
    split-merge                                                       pass split-channels; on request, merge-channels
    reorder                                                           pass reorder-channels
    rotate                                                            pass rotate

The passes on request change the function a little; all other passes are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from channelfold.passes.base import Pass
from channelfold.passes.quantize import Quantize
from channelfold.passes.recipe import QUANTIZATIONS, make
from channelfold.passes.smooth import Smooth
from channelfold.runtime.errors import UsageError, nearest


@dataclass(frozen=True)
class Method:
    """The pass ``step`` with the ``options`` that it accepts.

    The option ``switch`` enables the options ``switched`` and adds the pass ``then``, which they belong to. Without
    ``then`` the options ``switched`` belong to ``step``.
    """

    step: str
    options: tuple[str, ...] = ()
    switch: str = ""
    switched: tuple[str, ...] = ()
    then: str = ""

    def __contains__(self, option: str) -> bool:
        return option in (*self.options, *self.switched) or (option == self.switch != "")


_WHERE = ("allow_insert", "include", "exclude", "own_cache", "roll_back")
_SEARCH = ("activation_bits", "weight_bits", "group_size")
METHODS = {
    "auto": Method("smooth", ("shift", *_SEARCH, *_WHERE)),
    "smoothquant": Method("smooth", ("alpha", *_WHERE), "search_alpha", _SEARCH),
    "os-plus": Method("smooth", ("shift", *_SEARCH, *_WHERE)),
    "awq": Method("smooth", ("weight_bits", "group_size", *_WHERE)),
    "repq": Method("smooth", ("aim", "shift", *_WHERE)),
    "outliertune": Method("smooth", ("shift", *_WHERE)),
    "fp4-shift": Method("smooth", _WHERE),
    "equalize": Method(
        "equalize", ("iterations", "allow_insert", "exclude"), "absorb_bias", ("sigmas", "exclude"), "absorb-bias"
    ),
    "split-merge": Method(
        "split-channels",
        ("max_extra", "min_gain", "align", "allow_insert"),
        "restore_width",
        ("max_change",),
        "merge-channels",
    ),
    "reorder": Method("reorder-channels"),
    "rotate": Method("rotate", ("roll_back",)),
}


def passes_of(name: str, options: Mapping[str, Any]) -> tuple[Pass, ...]:
    """The passes of a method. ``options`` holds options of the passes and the switches absorb_bias and restore_width.

    Raises UsageError for an unknown method, and for an option that the method does not accept.
    """
    if name not in METHODS:
        raise UsageError(f"There is no method {name!r}", nearest(name, METHODS))
    method = METHODS[name]
    on = bool(options.get(method.switch))
    for option in options:
        if option not in method:
            raise UsageError(f"Method {name!r} has no option {option!r}", _who_has(option, method))
        if option in method.switched and option not in method.options and not on:
            flag = f"--{method.switch.replace('_', '-')}"
            raise UsageError(f"Option {option!r} of method {name!r} counts only with {method.switch!r}", f"Add {flag}")
    if method.step == "smooth":
        return (make("smooth", {"method": name, **options}),)
    steps = [make(method.step, _only(options, method.options))]
    if on:
        steps.append(make(method.then, _only(options, method.switched)))
    return tuple(steps)


def quantizer(step: Pass, later: Sequence[Pass], known: Pass | None = None) -> Pass | None:
    """The pass that quantizes what ``step`` changes: the next quantization, or else int8 where ``step`` is for int8.

    ``known``: the quantization behind the last pass, where the caller knows of one.
    """
    if found := next((other for other in later if other.name in QUANTIZATIONS), known):
        return found
    bits = (step.activation_bits, step.weight_bits, step.group_size) if isinstance(step, Smooth) else ()
    return Quantize() if bits == (8, 8, 0) and step.options()["method"] != "awq" else None


def _who_has(option: str, method: Method) -> str:
    """The hint of the error for an option that a method does not have."""
    if others := [name for name, other in METHODS.items() if option in other]:
        return f"It is for: {', '.join(others)}"
    known = [*method.options, *method.switched, *([method.switch] if method.switch else [])]
    return nearest(option, set(known)) if known else "It has no options"


def _only(options: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}

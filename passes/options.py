"""Options of passes: a dataclass field defines an option, and everything else is derived from the field.

    percentile: float = option(99.999, "Of the calibrator percentile.", above=0, high=100)

gives a flag of the command line, a key of recipes, a check of values, a JSON schema and a row of ``passes/README.md``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from channelfold.runtime.errors import UsageError, nearest

_WORDS = {str: ("a string", "a list of strings"), bool: ("true or false", "a list of true and false"),
          int: ("a whole number", "a list of whole numbers"), float: ("a number", "a list of numbers")}  # fmt: skip
_JSON = {str: "string", bool: "boolean", int: "integer", float: "number"}
_BOUNDS = {"low": "minimum", "high": "maximum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}


def option(default: Any, help: str, **said: Any) -> Any:
    """A dataclass field that defines an option; ``said`` holds fields of ``Option`` from ``low`` on."""
    return dataclasses.field(default=default, metadata={"help": help} | said)


@dataclass(frozen=True)
class Option:
    """An option of a pass: an ``item`` (str, bool, int, float), limited to ``choices`` where there are any.

    ``many`` allows a list of items, and ``optional`` allows None. A ``needed`` option has no default. A number is at
    least ``low``, at most ``high``, more than ``above`` and less than ``below``; ``expected`` puts the bounds in words.
    ``means`` explains the default None. ``metavar`` stands for the value in the help of the command line.
    """

    name: str
    item: type
    choices: tuple[Any, ...] = ()
    many: bool = False
    optional: bool = False
    needed: bool = False
    default: Any = None
    help: str = ""
    low: float = -math.inf
    high: float = math.inf
    above: float | None = None
    below: float | None = None
    expected: str = ""
    means: str = ""
    metavar: str = ""

    @classmethod
    def of(cls, field: dataclasses.Field, hint: Any) -> Option:
        """The option of a field with the annotation str, bool, int, float, Literal[...], tuple[X, ...] or X | None."""
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (types.UnionType, typing.Union):
            (hint,) = (arg for arg in args if arg is not type(None))
            return dataclasses.replace(cls.of(field, hint), optional=True)
        if origin is tuple:
            return dataclasses.replace(cls.of(field, args[0]), many=True)
        item, choices = (type(args[0]), args) if origin is Literal else (hint, ())
        needed = field.default is field.default_factory is dataclasses.MISSING
        default = None if needed or field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        return cls(field.name, item, choices, needed=needed, default=default, **field.metadata)

    @property
    def bounds(self) -> str:
        """The bounds of a number, in words."""
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"{self.low} to {self.high}"
        words = (("at least", self.low), ("more than", self.above), ("at most", self.high), ("less than", self.below))
        return " and ".join(f"{word} {bound}" for word, bound in words if bound is not None and math.isfinite(bound))

    def _allows(self, value: float) -> bool:
        above = self.above is None or value > self.above
        return self.low <= value <= self.high and above and (self.below is None or value < self.below)  # and no NaN

    def convert(self, value: Any) -> Any:
        """The value of the field for a TOML value. Raises UsageError where the value has the wrong type."""
        try:
            return self._converted(value)
        except TypeError:
            offer = isinstance(value, str) and self.item is str and self.choices
            close = nearest(value, self.choices) if offer else f"Change {self.name!r}"
            raise UsageError(f"{self.name!r} is {found(value)}, expected {self}", close) from None

    def _converted(self, value: Any) -> Any:
        if value is None and self.optional:
            return None
        if self.many:
            if not isinstance(value, list | tuple):
                raise TypeError
            one = dataclasses.replace(self, many=False, optional=False)
            return tuple(one._converted(item) for item in value)
        if self.item is float and isinstance(value, int | float) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not self.item:  # an int is no bool
            raise TypeError
        if self.choices and value not in self.choices:
            raise TypeError
        return value

    def check(self, value: Any) -> None:
        """Raises UsageError for a value that is no choice or is out of bounds."""
        if value is None or self.many:
            return
        if self.choices:
            self.convert(value)
        elif self.item in (int, float) and not self._allows(value):
            shown = f"{value:g}" if self.item is float else value
            raise UsageError(f"{self.name!r} is {shown}", f"Expected {self.expected or self.bounds or 'a number'}")

    def __str__(self) -> str:
        if self.choices:
            return f"{'a list of' if self.many else 'one of'} {', '.join(map(repr, self.choices))}"
        return _WORDS[self.item][self.many]

    @property
    def usual(self) -> str:
        """The default in the words of the command line; empty for an option without a default."""
        if self.default in (None, ()) or self.default is False:
            return self.means
        if self.default is True:
            return self.name.replace("_", "-")
        return f"{self.default:g}" if self.item is float else str(self.default)

    def describe(self) -> dict[str, Any]:
        known = {"name": self.name, "type": str(self), "default": self.default, "choices": list(self.choices)}
        return known | {key: text for key in ("bounds", "help") if (text := getattr(self, key))}

    def schema(self) -> dict[str, Any]:
        one: dict[str, Any] = {"enum": list(self.choices)} if self.choices else {"type": _JSON[self.item]}
        bounds = {word: bound for key, word in _BOUNDS.items() if (bound := getattr(self, key)) is not None}
        one |= {word: bound for word, bound in bounds.items() if math.isfinite(bound)}
        said = {"description": self.help} if self.help else {}
        return ({"type": "array", "items": one} if self.many else one) | said


@functools.cache
def options(cls: type) -> dict[str, Option]:
    """The options of a pass by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: Option.of(field, hints[field.name]) for field in dataclasses.fields(cls)}


def found(value: Any) -> str:
    """A value in the notation of the file."""
    return json.dumps(value, default=str, ensure_ascii=False)

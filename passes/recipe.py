"""Recipes: a list of passes with their options, by name or from a TOML file.

    name = "int8-careful"              # optional; default: the name of the file

    [[pass]]
    name = "fold-affine"

    [[pass]]
    name = "quantize"
    calibrator = "entropy"             # every field of the pass is a key; what is left out keeps its default
    exclude = ["/head/*"]

Passes run from top to bottom. A good order is

    constants, identities                        they clear the way between linears
    reparameterize-ffn                           it changes which linears there are, and folds the norms around them
    pads, affine maps                            they leave less to scale
    equalize, smooth                             shifts and scales, which need a weight or a norm to go into
    split-channels, merge-channels, reorder      they choose by the ranges that scales have left
    clip-weights                                 for the weights that all of them have left
    quantize                                     on ranges measured then

What cannot work is refused: after a quantization the weights lie behind DequantizeLinear, where nothing finds them. The
other orders are all right for the function the model computes, since exact passes keep it, but in some a later pass
takes back what an earlier one has gained. Those run, with a warning (``Recipe.warnings``): recipes are also written to
find out what a pass is worth.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from channelfold.passes.base import Pass
from channelfold.runtime.errors import ChannelfoldError, UsageError, nearest

_QUANTIZATIONS = ("quantize", "quantize-weights")
_ANYWHERE = ("fold-constants", "remove-identities")  # they do not touch weights behind DequantizeLinear
_TAKEN_BACK = {
    ("smooth", "fold-affine"): "folds the Mul nodes that allow_insert lets it insert back into the weights",
    ("smooth", "reparameterize-ffn"): "multiplies the weights it has scaled with each other",
    ("smooth", "equalize"): "gives the channels that both find other scales, which suit the weights alone",
    ("reorder-channels", "smooth"): "scales channels that are sorted by their size",
    ("reorder-channels", "equalize"): "scales channels that are sorted by their size",
}


class _Registry(Mapping[str, type[Pass]]):
    """Pass classes by name, imported when they are asked for."""

    def __init__(self, places: dict[str, str]):
        self._places = places

    def __getitem__(self, name: str) -> type[Pass]:
        module, _, attribute = self._places[name].partition(":")
        return getattr(importlib.import_module(f"channelfold.passes.{module}"), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


PASSES: Mapping[str, type[Pass]] = _Registry(
    {
        "fold-constants": "fold.constants:FoldConstants",
        "remove-identities": "fold.identities:RemoveIdentities",
        "fold-pad": "fold.pad:FoldPad",
        "fold-affine": "fold.affine:FoldAffine",
        "reparameterize-ffn": "ffn.reparameterize:ReparameterizeFfn",
        "equalize": "smooth.equalize:Equalize",
        "absorb-bias": "smooth.absorb_bias:AbsorbBias",
        "smooth": "smooth.smooth:Smooth",
        "merge-convs": "fold.convs:MergeConvs",
        "split-channels": "smooth.split:SplitChannels",
        "merge-channels": "smooth.merge:MergeChannels",
        "reorder-channels": "smooth.reorder:ReorderChannels",
        "clip-weights": "quantize.clip:ClipWeights",
        "remove-dead-channels": "prune.dead:RemoveDeadChannels",
        "prune": "prune.prune:Prune",
        "sparsify": "sparsify.sparsify:Sparsify",
        "approximate-ffn": "ffn.approximate:ApproximateFfn",
        "quantize": "quantize.static:Quantize",
        "quantize-weights": "quantize.weights:QuantizeWeights",
    }
)

_FOLD = ("fold-constants", "remove-identities", "fold-pad", "fold-affine")
_REPARAM = ("fold-constants", "remove-identities", "reparameterize-ffn", "fold-pad", "fold-affine")
BUILT_IN: dict[str, tuple[str, ...]] = {
    "fold": _FOLD,
    "reparam": _REPARAM,
    "int8": (*_FOLD, "quantize"),
    "int8-reparam": (*_REPARAM, "quantize"),
    "int8-smooth": (*_FOLD, "smooth", "quantize"),
    "int8-weights": (*_FOLD, "quantize-weights"),
}


@dataclass(frozen=True)
class Recipe:
    """Passes to run in order. ``name`` is for reports."""

    name: str
    passes: tuple[Pass, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Where a pass takes back what an earlier one has gained, one sentence each."""
        pairs = itertools.combinations(enumerate(self.passes, 1), 2)
        return tuple(
            f"Pass {second} ({later.name!r}) comes after pass {first} ({earlier.name!r}) and {what}. Swap them"
            for (first, earlier), (second, later) in pairs
            if (what := _TAKEN_BACK.get((earlier.name, later.name)))
            and (later.name != "fold-affine" or earlier.options()["allow_insert"])
        )


def load_recipe(source: str | Path) -> Recipe:
    """A built-in recipe by its name, else the one in the TOML file ``source``.

    Raises UsageError, which names the file, the pass and the key, and says what was expected.
    """
    if isinstance(source, str) and source in BUILT_IN:
        return Recipe(source, tuple(PASSES[name]() for name in BUILT_IN[source]))
    path = Path(source)
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        known = f"Built in: {', '.join(BUILT_IN)}; anything else is the path of a TOML file"
        close = nearest(str(source), BUILT_IN)
        raise UsageError(
            f"There is no recipe {str(source)!r}", f"{close} {known}" if close.startswith("Did") else known
        ) from None
    except OSError as error:
        raise UsageError(f"The recipe {path} cannot be read ({error.strerror})", "Give the path of a file") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"The recipe {path} is not TOML: byte {error.start} is not UTF-8", "Save it as UTF-8"
        ) from None
    return loads(text, str(path))


def loads(text: str, source: str = "recipe.toml") -> Recipe:
    """The recipe in a TOML text; ``source`` is the file it comes from, for messages. Raises UsageError."""
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise UsageError(f"{source} is nested too deep for a recipe", "Start every pass with [[pass]]") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source} is not TOML: {error}", 'Text takes quotes, such as name = "fold-affine"') from None
    for key in table:
        if key not in ("name", "pass"):
            raise UsageError(f"{source} has an unknown key {key!r}", nearest(key, ("name", "pass")))
    name, entries = table.get("name", Path(source).stem), table.get("pass")
    if not isinstance(name, str):
        raise UsageError(f"{source}: 'name' is {_found(name)}, expected a string", f'Write name = "{name}"')
    if isinstance(entries, dict):
        raise UsageError(f"{source} has one table [pass], expected a list of them", "Write [[pass]]")
    if not isinstance(entries, list) or not entries:
        what = " has no [[pass]]" if entries is None else f": 'pass' is {_found(entries)}, expected tables"
        raise UsageError(
            f"{source}{what}", f'Start every pass with [[pass]] and name = "...". Passes: {", ".join(PASSES)}'
        )
    passes = [_pass(entry, f"{source}: pass {number}") for number, entry in enumerate(entries, 1)]
    _check_order(passes, source)
    return Recipe(name, tuple(passes))


def dumps(recipe: Recipe) -> str:
    """The recipe as TOML, with every option written out, so that later defaults do not change it."""
    lines = [f"name = {_toml(recipe.name)}"]
    for step in recipe.passes:
        options = {key: value for key, value in step.options().items() if value is not None}  # TOML has no null
        lines += ["", "[[pass]]", f"name = {_toml(step.name)}", *(f"{k} = {_toml(v)}" for k, v in options.items())]
    return "\n".join(lines) + "\n"


def make(name: str, options: Mapping[str, Any], where: str = "") -> Pass:
    """The pass ``name`` with ``options`` as TOML or JSON has them (lists for tuples).

    Raises UsageError for an unknown pass or option, or a value of the wrong type; ``where`` begins its message.
    """
    where = f"{where} ({name!r})" if where else f"Pass {name!r}"
    if name not in PASSES:
        raise UsageError(f"{where} is unknown", nearest(name, PASSES))
    cls = PASSES[name]
    kinds = _options(cls)
    values = {}
    for key, value in options.items():
        if key not in kinds:
            known = nearest(key, kinds) if kinds else "It has no options"
            raise UsageError(f"{where} has no option {key!r}", known)
        try:
            values[key] = kinds[key].convert(value)
        except TypeError:
            kind = kinds[key]
            offer = isinstance(value, str) and kind.item is str and kind.choices
            close = nearest(value, kind.choices) if offer else f"Change {key!r}"
            raise UsageError(f"{where}: {key!r} is {_found(value)}, expected {kind}", close) from None
    for key in _needed(cls):
        if key not in values:
            raise UsageError(f"{where} lacks its option {key!r}", f"Give {kinds[key]}")
    try:
        return cls(**values)
    except (ChannelfoldError, ValueError) as error:  # the pass's own rules, in __post_init__
        raise UsageError(f"{where}: {error}") from None


def describe(name: str) -> dict[str, Any]:
    """A pass for people: name, kind, needs_opset, summary, and its options with type, default and choices."""
    cls = PASSES[name]
    kinds = _options(cls)
    options = [
        {"name": f.name, "type": str(kinds[f.name]), "default": _default(f), "choices": list(kinds[f.name].choices)}
        for f in dataclasses.fields(cls)
    ]
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    return {"name": name, "kind": cls.kind, "needs_opset": cls.needs_opset, "summary": summary, "options": options}


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe, for editors that check TOML."""
    entries = []
    for name, cls in PASSES.items():
        properties = {key: kind.schema() for key, kind in _options(cls).items()}
        entries.append(
            {
                "type": "object",
                "description": describe(name)["summary"],
                "properties": {"name": {"const": name}, **properties},
                "required": ["name", *_needed(cls)],
                "additionalProperties": False,
            }
        )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "channelfold recipe",
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "pass": {"type": "array", "minItems": 1, "items": {"oneOf": entries}},
        },
        "required": ["pass"],
        "additionalProperties": False,
    }


def _pass(entry: Any, where: str) -> Pass:
    if not isinstance(entry, dict):
        raise UsageError(f"{where} is {_found(entry)}, expected a table", "Write [[pass]] above its keys")
    name = entry.get("name")
    if not isinstance(name, str):
        what = "has no name" if name is None else f"is called {_found(name)}, expected a string"
        raise UsageError(f"{where} {what}", f"Give one of: {', '.join(PASSES)}")
    return make(name, {key: value for key, value in entry.items() if key != "name"}, where)


def _check_order(passes: Sequence[Pass], source: str) -> None:
    quantized: tuple[int, str] | None = None
    for number, step in enumerate(passes, 1):
        if quantized is not None and step.name not in (*_ANYWHERE, *_QUANTIZATIONS):
            raise UsageError(
                f"{source}: pass {number} ({step.name!r}) comes after pass {quantized[0]} ({quantized[1]!r}), where "
                "the weights lie behind DequantizeLinear and nothing can change them any more",
                f"Move it before {quantized[1]!r}",
            )
        if step.name in _QUANTIZATIONS:
            quantized = quantized or (number, step.name)


# ---- types -------------------------------------------------------------------------------------------------------

_WORDS = {str: ("a string", "a list of strings"), bool: ("true or false", "a list of true and false"),
          int: ("a whole number", "a list of whole numbers"), float: ("a number", "a list of numbers")}  # fmt: skip
_JSON = {str: "string", bool: "boolean", int: "integer", float: "number"}


@dataclass(frozen=True)
class _Type:
    """The type of an option: an ``item`` (str, bool, int, float), one of ``choices`` if there are any.

    ``many``: any number of them. ``optional``: or None.
    """

    item: type
    choices: tuple[Any, ...] = ()
    many: bool = False
    optional: bool = False

    @classmethod
    def of(cls, hint: Any) -> _Type:
        """From an annotation: str, bool, int, float, Literal[...], tuple[X, ...], X | None."""
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (types.UnionType, typing.Union):
            (hint,) = (arg for arg in args if arg is not type(None))
            return dataclasses.replace(cls.of(hint), optional=True)
        if origin is tuple:
            return dataclasses.replace(cls.of(args[0]), many=True)
        return cls(type(args[0]), args) if origin is Literal else cls(hint)

    def convert(self, value: Any) -> Any:
        """A TOML value as the field holds it. Raises TypeError where it does not fit."""
        if value is None and self.optional:
            return None
        if self.many:
            if not isinstance(value, list | tuple):
                raise TypeError
            one = dataclasses.replace(self, many=False, optional=False)
            return tuple(one.convert(item) for item in value)
        if self.item is float and isinstance(value, int | float) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not self.item:  # an int is no bool
            raise TypeError
        if self.choices and value not in self.choices:
            raise TypeError
        return value

    def __str__(self) -> str:
        if self.choices:
            return f"{'a list of' if self.many else 'one of'} {', '.join(map(repr, self.choices))}"
        return _WORDS[self.item][self.many]

    def schema(self) -> dict[str, Any]:
        one: dict[str, Any] = {"enum": list(self.choices)} if self.choices else {"type": _JSON[self.item]}
        return {"type": "array", "items": one} if self.many else one


def _options(cls: type[Pass]) -> dict[str, _Type]:
    """The types of a pass's fields by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: _Type.of(hints[field.name]) for field in dataclasses.fields(cls)}


def _needed(cls: type[Pass]) -> list[str]:
    """The options that have no default."""
    return [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _found(value: Any) -> str:
    """A value as it stood in the file."""
    return json.dumps(value, default=str, ensure_ascii=False)


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)

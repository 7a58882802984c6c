"""Recipes: a list of passes with their options, by name or from a TOML file.

    name = "int8-careful"              # optional; default: the name of the file

    [[pass]]
    name = "fold-affine"

    [[pass]]
    name = "quantize"
    calibrator = "entropy"             # every option of the pass is a key; missing keys keep their defaults
    exclude = ["/head/*"]

Passes run from top to bottom. A good order is

    constants, identities                        remove nodes between linears
    reparameterize-ffn                           replaces linears, and folds the norms around them
    pads, affine maps                            leave less to scale
    rotate                                       mixes all channels of a stream
    equalize, smooth                             move shifts and scales into weights and norms
    split-channels, merge-channels, reorder      choose by the ranges after scaling
    clip-weights                                 clips the final weights
    quantize                                     measures the final ranges

An order that cannot work is refused: after a quantization the weights lie behind DequantizeLinear, where no pass finds
them. All other orders are correct, because exact passes keep the function of the model. In some orders a later pass
undoes the gain of an earlier pass. Such a recipe runs with a warning (``Recipe.warnings``), because recipes also serve
to measure the gain of a pass.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from channelfold.passes import BUILT_IN, PASSES, SETTINGS
from channelfold.passes.base import Pass
from channelfold.passes.options import found
from channelfold.passes.options import options as options_of
from channelfold.runtime.errors import ChannelfoldError, UsageError, nearest

QUANTIZATIONS = ("quantize", "quantize-weights")
BEHIND_REPARAM = ("fold-pad", "fold-affine", "merge-moves", "merge-equal")  # what is folded after FFNs were rewritten
# passes that do not touch weights behind DequantizeLinear
_ANYWHERE = (
    *("rewrite-einsum", "fold-constants", "fold-shapes", "remove-identities", "merge-moves", "merge-equal"),
    *("quantize-attention", "cast", "own-cache"),
)
_TAKEN_BACK = {
    ("smooth", "fold-affine"): "folds the Mul nodes that allow_insert lets it insert back into the weights",
    ("smooth", "reparameterize-ffn"): "multiplies the weights it has scaled with each other",
    ("smooth", "equalize"): "gives the channels that both find other scales, which suit the weights alone",
    ("smooth", "rotate"): "mixes the channels that it scales with all others",
    ("reorder-channels", "smooth"): "scales channels that are sorted by their size",
    ("reorder-channels", "equalize"): "scales channels that are sorted by their size",
}


@dataclass(frozen=True)
class Recipe:
    """Passes to run in order. ``name`` is for reports."""

    name: str
    passes: tuple[Pass, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for every pass that undoes the gain of an earlier pass."""
        pairs = itertools.combinations(enumerate(self.passes, 1), 2)
        return tuple(
            f"Pass {second} ({later.name!r}) comes after pass {first} ({earlier.name!r}) and {what}. Swap them"
            for (first, earlier), (second, later) in pairs
            if (what := _TAKEN_BACK.get((earlier.name, later.name)))
            and (later.name != "fold-affine" or earlier.options()["allow_insert"])
        )


def load_recipe(source: str | Path) -> Recipe:
    """The built-in recipe with the name ``source``, else the recipe in the TOML file ``source``.

    Raises UsageError, which names the file, the pass, the key and the expected value.
    """
    if isinstance(source, str) and source in BUILT_IN:
        settings = SETTINGS.get(source, {})
        return Recipe(source, tuple(PASSES[name](**settings.get(name, {})) for name in BUILT_IN[source]))
    path = Path(source)
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        close = nearest(str(source), BUILT_IN)
        hint = f"Built in: {', '.join(BUILT_IN)}; anything else is the path of a TOML file"
        hint = f"{close} {hint}" if close.startswith("Did") else hint
        raise UsageError(f"There is no recipe {str(source)!r}", hint) from None
    except OSError as error:
        raise UsageError(f"The recipe {path} cannot be read ({error.strerror})", "Give the path of a file") from None
    except UnicodeDecodeError as error:
        what = f"The recipe {path} is not TOML: byte {error.start} is not UTF-8"
        raise UsageError(what, "Save it as UTF-8") from None
    return loads(text, str(path))


def loads(text: str, source: str = "recipe.toml") -> Recipe:
    """The recipe in a TOML text; messages name the file ``source``. Raises UsageError."""
    import tomllib  # not needed for help

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
        raise UsageError(f"{source}: 'name' is {found(name)}, expected a string", f'Write name = "{name}"')
    if isinstance(entries, dict):
        raise UsageError(f"{source} has one table [pass], expected a list of them", "Write [[pass]]")
    if not isinstance(entries, list) or not entries:
        what = " has no [[pass]]" if entries is None else f": 'pass' is {found(entries)}, expected tables"
        raise UsageError(
            f"{source}{what}", f'Start every pass with [[pass]] and name = "...". Passes: {", ".join(PASSES)}'
        )
    passes = [_pass(entry, f"{source}: pass {number}") for number, entry in enumerate(entries, 1)]
    _check_order(passes, source)
    return Recipe(name, tuple(passes))


def dumps(recipe: Recipe) -> str:
    """The recipe as TOML with every option, so that later defaults do not change the recipe."""
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
    known = options_of(cls)
    for key in options:
        if key not in known:
            raise UsageError(f"{where} has no option {key!r}", nearest(key, known) if known else "It has no options")
    try:
        values = {key: known[key].convert(value) for key, value in options.items()}
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    for key, one in known.items():
        if one.needed and key not in values:
            raise UsageError(f"{where} lacks its option {key!r}", f"Give {one}")
    try:
        return cls(**values)
    except (ChannelfoldError, ValueError) as error:  # the pass's own rules, in __post_init__
        raise UsageError(f"{where}: {error}") from None


def describe(name: str) -> dict[str, Any]:
    """The description of a pass: name, kind, needs_opset, summary, and options (see ``Option.describe``)."""
    cls = PASSES[name]
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    options = [one.describe() for one in options_of(cls).values()]
    return {"name": name, "kind": cls.kind, "needs_opset": cls.needs_opset, "summary": summary, "options": options}


def reference(name: str) -> str:
    """The Markdown reference of a pass and its options."""
    found, lines = describe(name), []
    for one in options_of(PASSES[name]).values():
        usual = _toml(one.default) if one.item is bool else one.usual
        facts = (str(one), one.bounds, f"default: {usual}" if usual else "")
        lines.append(f"- `{one.name}`: {one.help} [{'; '.join(filter(None, facts))}]")
    return "\n".join([f"## {name}", "", f"{found['summary']} ({found['kind']})", *([""] if lines else []), *lines, ""])


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe, for editors that check TOML."""
    entries = []
    for name, cls in PASSES.items():
        known = options_of(cls)
        entries.append(
            {
                "type": "object",
                "description": describe(name)["summary"],
                "properties": {"name": {"const": name}} | {key: one.schema() for key, one in known.items()},
                "required": ["name", *(key for key, one in known.items() if one.needed)],
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
        raise UsageError(f"{where} is {found(entry)}, expected a table", "Write [[pass]] above its keys")
    name = entry.get("name")
    if not isinstance(name, str):
        what = "has no name" if name is None else f"is called {found(name)}, expected a string"
        raise UsageError(f"{where} {what}", f"Give one of: {', '.join(PASSES)}")
    return make(name, {key: value for key, value in entry.items() if key != "name"}, where)


def _check_order(passes: Sequence[Pass], source: str) -> None:
    quantized: tuple[int, str] | None = None
    for number, step in enumerate(passes[:-1], 1):
        if step.moves_cache:  # samples have the cache as the original has it
            raise UsageError(f"{source}: pass {number} ({step.name!r}) is not the last one", "Move it to the end")
    for number, step in enumerate(passes, 1):
        if quantized is not None and step.name not in (*_ANYWHERE, *QUANTIZATIONS):
            raise UsageError(
                f"{source}: pass {number} ({step.name!r}) comes after pass {quantized[0]} ({quantized[1]!r}), where "
                "the weights lie behind DequantizeLinear and nothing can change them any more",
                f"Move it before {quantized[1]!r}",
            )
        if step.name in QUANTIZATIONS:
            quantized = quantized or (number, step.name)


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)

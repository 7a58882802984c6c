"""Names and messages from files, made safe for a terminal. Errors need this module: standard library alone."""

from __future__ import annotations

from collections.abc import Sequence


def safe(text: object) -> str:
    """The text without control characters: names and messages come from files, and must not steer the terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def one_line(text: object, width: int) -> str:
    """A message as one safe line of at most ``width`` characters. Of a longer message both ends are kept."""
    return _both_ends(safe(" ".join(str(text).split())), width)


def _both_ends(text: str, width: int) -> str:
    head = width // 3
    return text if len(text) <= width else f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def shorten(name: str, width: int) -> str:
    """A node's name in at most ``width`` characters: whole parts are left out of its middle, and its end is kept.

    ``/model/layers.11/self_attn/q_proj/MatMul`` becomes ``/model/…/q_proj/MatMul``.
    """
    if len(name) <= width:
        return name
    head = name[: name.find("/", 1) + 1]
    for cut in (index for index, char in enumerate(name) if char == "/" and index >= len(head)):
        for start in (head, ""):
            if len(start) + 1 + len(name) - cut <= width:
                return f"{start}…{name[cut:]}"
    return _both_ends(name, width)


def shorten_all(names: Sequence[str], width: int) -> list[str]:
    """The names of one list in at most ``width`` characters each.

    Where a name is longer, the first parts that all names share are left out, and if need be the last part where all
    names share the last part: ``/encoder/layer.0/query/MatMul`` becomes ``…/layer.0/query``.
    """
    if max(map(len, names), default=0) <= width:
        return list(names)
    parts = [name.split("/") for name in names]
    columns = enumerate(zip(*parts, strict=False))
    fewest = min(map(len, parts)) - 1  # the last part of a name is its own
    head = next((place for place, column in columns if len(set(column)) > 1 or place == fewest), 0)
    if len(names) == 1 or not any(parts[0][:head]):
        return [shorten(name, width) for name in names]
    rest = ["/".join(part[head:]) for part in parts]
    if max(map(len, rest)) + 2 > width and len({part[-1] for part in parts}) == 1 and head < fewest:
        rest = [name.rpartition("/")[0] for name in rest]
    return [f"…/{name}" if len(name) + 2 <= width else shorten(name, width) for name in rest]

"""Recipes: what TOML means, and what every mistake is told."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from channelfold.passes import pipeline
from channelfold.passes import recipe as recipes
from channelfold.passes.base import Context, Pass
from channelfold.passes.fold import FoldAffine
from channelfold.passes.quantize import Quantize
from channelfold.passes.recipe import BUILT_IN, PASSES, Recipe, describe, dumps, load_recipe, loads, make, schema
from channelfold.runtime.data.sources import open_data
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io.facts import required_inputs
from channelfold.tests.graphs import assert_same, build, feeds, ops, positive, random, run


@dataclass(frozen=True)
class Everything(Pass):
    """Has an option of every type. And a second sentence.

    More words.
    """

    name: ClassVar[str] = "everything"
    kind: ClassVar[Any] = "lossy"
    needs_opset: ClassVar[int] = 17

    ratio: float
    mode: Literal["fast", "exact"] = "fast"
    bits: Literal[4, 8] = 8
    on: bool = False
    count: int = 3
    label: str = "a"
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = field(default_factory=lambda: (1, 2))
    limit: float | None = None

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"count is {self.count}, expected 0 or more")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Registers Everything for the time of a test."""
    monkeypatch.setattr(recipes, "PASSES", PASSES | {"everything": Everything})


def error(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        loads(text, "my.toml")
    assert caught.value.exit_code == 2
    return str(caught.value)


def one(options: str) -> str:
    return error(f'[[pass]]\nname = "everything"\n{options}')


# ---- what is understood ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_recipes(name):
    found = load_recipe(name)
    assert (found.name, tuple(step.name for step in found.passes)) == (name, BUILT_IN[name])
    assert loads(dumps(found), "x.toml") == found


def test_every_pass_is_registered_under_its_own_name():
    assert {name: PASSES[name].name for name in PASSES} == {name: name for name in PASSES}
    assert set().union(*BUILT_IN.values()) <= set(PASSES)


def test_a_file(tmp_path: Path):
    path = tmp_path / "careful.toml"
    path.write_text("""
        [[pass]]
        name = "fold-affine"
        [[pass]]
        name = "quantize"
        calibrator = "entropy"   # a comment
        percentile = 99
        exclude = ["/head/*", "stem"]
    """)
    expected = (FoldAffine(), Quantize(calibrator="entropy", percentile=99.0, exclude=("/head/*", "stem")))
    assert load_recipe(path) == load_recipe(str(path)) == Recipe("careful", expected)
    assert isinstance(load_recipe(path).passes[1].percentile, float)


def test_a_built_in_name_wins_over_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fold").write_text('[[pass]]\nname = "fold-constants"\n')
    assert len(load_recipe("fold").passes) == len(BUILT_IN["fold"])
    assert len(load_recipe("./fold").passes) == 1


def test_every_type_survives_a_round_trip():
    step = Everything(
        ratio=1e-5, mode="exact", bits=4, on=True, count=0, label='a "b" \\ \n\t\x00\x7f ü 😀', names=("x", "'"),
        sizes=(), limit=math.inf,
    )  # fmt: skip
    text = dumps(Recipe("my recipe", (FoldAffine(), step)))
    assert loads(text) == Recipe("my recipe", (FoldAffine(), step))
    assert tomllib.loads(text)["pass"][1]["label"] == step.label
    unset = Recipe("r", (Everything(ratio=2),))
    assert "limit" not in dumps(unset)
    assert loads(dumps(unset)) == unset


def test_written_form():
    assert dumps(Recipe("r", (FoldAffine(), Everything(ratio=0.5, names=("a", "b"))))) == (
        'name = "r"\n\n[[pass]]\nname = "fold-affine"\n\n[[pass]]\nname = "everything"\nratio = 0.5\nmode = "fast"\n'
        'bits = 8\non = false\ncount = 3\nlabel = "a"\nnames = ["a", "b"]\nsizes = [1, 2]\n'
    )


def test_make_takes_options_of_a_program():
    assert make("everything", {"ratio": 1, "names": ["a"], "sizes": (3,)}) == Everything(1.0, names=("a",), sizes=(3,))
    step = Everything(1.0)
    assert make("everything", step.options()) == step  # None, where an option may be None
    with pytest.raises(UsageError, match=r"^Pass 'everythin' is unknown\. Did you mean 'everything'\?$"):
        make("everythin", {})


def test_descriptions_for_people():
    found = describe("everything")
    assert found.pop("options")[:4] == [
        {"name": "ratio", "type": "a number", "default": None, "choices": []},
        {"name": "mode", "type": "one of 'fast', 'exact'", "default": "fast", "choices": ["fast", "exact"]},
        {"name": "bits", "type": "one of 4, 8", "default": 8, "choices": [4, 8]},
        {"name": "on", "type": "true or false", "default": False, "choices": []},
    ]
    assert found == {
        "name": "everything", "kind": "lossy", "needs_opset": 17,
        "summary": "Has an option of every type. And a second sentence.",
    }  # fmt: skip
    kinds = {option["name"]: (option["type"], option["default"]) for option in describe("everything")["options"][4:]}
    assert kinds == {
        "count": ("a whole number", 3),
        "label": ("a string", "a"),
        "names": ("a list of strings", ()),
        "sizes": ("a list of whole numbers", (1, 2)),
        "limit": ("a number", None),
    }
    for name in PASSES:
        assert len(describe(name)["options"]) == len(dataclasses.fields(PASSES[name]))
        assert describe(name)["summary"].endswith(".")


def test_json_schema():
    found = schema()
    assert found["required"] == ["pass"]
    entry = next(
        e for e in found["properties"]["pass"]["items"]["oneOf"] if e["properties"]["name"]["const"] == "everything"
    )
    assert entry["properties"] == {
        "name": {"const": "everything"},
        "ratio": {"type": "number"},
        "mode": {"enum": ["fast", "exact"]},
        "bits": {"enum": [4, 8]},
        "on": {"type": "boolean"},
        "count": {"type": "integer"},
        "label": {"type": "string"},
        "names": {"type": "array", "items": {"type": "string"}},
        "sizes": {"type": "array", "items": {"type": "integer"}},
        "limit": {"type": "number"},
    }
    assert entry["required"] == ["name", "ratio"]
    assert entry["additionalProperties"] is False


def test_the_names_of_passes_are_known_without_importing_them():
    code = (
        "import sys; from channelfold.passes import recipe; list(recipe.PASSES); recipe.BUILT_IN;"
        "assert not {'onnx', 'onnx_graphsurgeon', 'onnxruntime', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- mistakes ----------------------------------------------------------------------------------------------------


def test_a_name_that_is_neither_built_in_nor_a_file(tmp_path):
    known = f"Built in: {', '.join(BUILT_IN)}; anything else is the path of a TOML file"
    with pytest.raises(UsageError) as caught:
        load_recipe("int-8")
    assert str(caught.value) == f"There is no recipe 'int-8'. Did you mean 'int8'? {known}"
    with pytest.raises(UsageError) as caught:
        load_recipe(tmp_path / "mine.toml")
    assert str(caught.value) == f"There is no recipe '{tmp_path}/mine.toml'. {known}"


def test_a_folder_and_a_file_that_is_no_text(tmp_path):
    with pytest.raises(UsageError, match=r"cannot be read \(Is a directory\)\. Give the path of a file"):
        load_recipe(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"\x08\xff")
    with pytest.raises(UsageError, match=r"model\.onnx is not TOML: byte 1 is not UTF-8"):
        load_recipe(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[pass]]\nname = fold",
         'my.toml is not TOML: Invalid value (at line 2, column 8). Text takes quotes, such as name = "fold-affine"'),
        ("", 'my.toml has no [[pass]]. Start every pass with [[pass]] and name = "...". Passes: fold-constants, '),
        ("pass = []", "my.toml: 'pass' is [], expected tables. Start every pass with [[pass]]"),
        ('pass = "fold"', "my.toml: 'pass' is \"fold\", expected tables. Start every pass with [[pass]]"),
        ("pass = [1]", "my.toml: pass 1 is 1, expected a table. Write [[pass]] above its keys"),
        ('[pass]\nname = "fold-affine"', "my.toml has one table [pass], expected a list of them. Write [[pass]]"),
        ('[[passes]]\nname = "fold-affine"', "my.toml has an unknown key 'passes'. Did you mean 'pass'?"),
        ('name = 3\n[[pass]]\nname = "fold-affine"', "my.toml: 'name' is 3, expected a string. Write name = \"3\""),
        ("[[pass]]\nkind = 1", "my.toml: pass 1 has no name. Give one of: fold-constants, "),
        ("[[pass]]\nname = true", "my.toml: pass 1 is called true, expected a string. Give one of: fold-constants, "),
        ('[[pass]]\nname = "fold-affine"\n[[pass]]\nname = "fold-afine"',
         "my.toml: pass 2 ('fold-afine') is unknown. Did you mean 'fold-affine'?"),
        ('[[pass]]\nname = "fold-affine"\nmode = 1', "my.toml: pass 1 ('fold-affine') has no option 'mode'. "
         "It has no options"),
    ],
)  # fmt: skip
def test_mistakes_in_the_file(text, message):
    assert error(text).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("ratoi = 1", " has no option 'ratoi'. Did you mean 'ratio'?"),
        ("on = true", " lacks its option 'ratio'. Give a number"),
        ('ratio = "1"', ": 'ratio' is \"1\", expected a number. Change 'ratio'"),
        ("ratio = true", ": 'ratio' is true, expected a number. Change 'ratio'"),
        ("ratio = 1\ncount = 1.0", ": 'count' is 1.0, expected a whole number. Change 'count'"),
        ("ratio = 1\ncount = false", ": 'count' is false, expected a whole number. Change 'count'"),
        ("ratio = 1\non = 1", ": 'on' is 1, expected true or false. Change 'on'"),
        ("ratio = 1\nlabel = 2020-01-01", ": 'label' is \"2020-01-01\", expected a string. Change 'label'"),
        ("ratio = 1\nnames = 'ab'", ": 'names' is \"ab\", expected a list of strings. Change 'names'"),
        ("ratio = 1\nnames = ['a', 1]", ": 'names' is [\"a\", 1], expected a list of strings. Change 'names'"),
        ("ratio = 1\nsizes = [1, true]", ": 'sizes' is [1, true], expected a list of whole numbers. Change 'sizes'"),
        ("ratio = 1\nlimit = []", ": 'limit' is [], expected a number. Change 'limit'"),
        ("ratio = 1\nlabel.x = 1", ": 'label' is {\"x\": 1}, expected a string. Change 'label'"),
        ("ratio = 1\nmode = 'fats'", ": 'mode' is \"fats\", expected one of 'fast', 'exact'. Did you mean 'fast'?"),
        ("ratio = 1\nmode = 8", ": 'mode' is 8, expected one of 'fast', 'exact'. Change 'mode'"),
        ("ratio = 1\nbits = 5", ": 'bits' is 5, expected one of 4, 8. Change 'bits'"),
        ("ratio = 1\nbits = '8'", ": 'bits' is \"8\", expected one of 4, 8. Change 'bits'"),
        ("ratio = 1\ncount = -1", ": count is -1, expected 0 or more"),
    ],
)
def test_mistakes_in_options(options, message):
    assert one(options).removeprefix("my.toml: pass 1 ('everything')") == message


def test_a_fold_after_a_quantization_cannot_work():
    text = '[[pass]]\nname = "quantize"\n[[pass]]\nname = "fold-constants"\n[[pass]]\nname = "fold-affine"\n'
    assert error(text) == (
        "my.toml: pass 3 ('fold-affine') comes after pass 1 ('quantize'), where the weights lie behind "
        "DequantizeLinear and nothing can change them any more. Move it before 'quantize'"
    )


def steps(*names: str) -> Recipe:
    """A recipe of passes by name; one that ends in + may insert nodes."""
    return Recipe(
        "r", tuple(make(name.rstrip("+"), {"allow_insert": True} if name[-1] == "+" else {}) for name in names)
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_recipes_take_nothing_back(name):
    assert load_recipe(name).warnings == ()


@pytest.mark.parametrize(
    ("names", "warning"),
    [
        (("smooth", "equalize"), "Pass 2 ('equalize') comes after pass 1 ('smooth') and gives the channels that both"),
        (("smooth+", "fold-pad", "fold-affine"), "Pass 3 ('fold-affine') comes after pass 1 ('smooth') and folds the"),
        (("reorder-channels", "smooth"), "Pass 2 ('smooth') comes after pass 1 ('reorder-channels') and scales chan"),
        (
            ("smooth", "reparameterize-ffn"),
            "Pass 2 ('reparameterize-ffn') comes after pass 1 ('smooth') and multiplies",
        ),
        (("smooth", "fold-affine"), ""),
        (("fold-affine", "equalize", "smooth+", "split-channels", "merge-channels", "reorder-channels"), ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_orders_that_take_back_what_was_gained_are_warned_of(names, warning):
    found = steps(*names).warnings
    assert len(found) == bool(warning)
    assert all(text.startswith(warning) and text.endswith(". Swap them") for text in found)


def decoder() -> gs.Graph:
    """A linear with a norm before it and one with GELU before it, each fed with a channel that stands out."""
    gamma, wide = positive(32, "gamma"), random((32, 32), "wide")
    gamma[3], wide[:, 5] = 40 * gamma[3], 40 * wide[:, 5]
    return build(
        "(float[N,32] x) => (float[] y)",
        "n = LayerNormalization(x, gamma, beta)  a = MatMul(n, wide)  h = Gelu(a)  y = MatMul(h, narrow)",
        opset=20, kind="float", gamma=gamma, beta=32, wide=wide, narrow=(32, 32),
    )  # fmt: skip


@pytest.mark.parametrize("inserts", [False, True])
def test_folds_after_smooth_keep_the_function(inserts):
    """They are exact in any order; only what smooth has inserted goes back where it came from."""
    graph = decoder()
    inputs = required_inputs(graph)
    data = open_data([{"x": random((1, 32), f"x{i}").astype(np.float32)} for i in range(8)], inputs)
    feed = feeds(graph)
    before = run(graph, feed)
    smooth = make("smooth", {"method": "smoothquant", "allow_insert": inserts})
    graph, records = pipeline.run(graph, [smooth, *load_recipe("fold").passes], Context(data))
    assert records[0]["verified"]["max_rel_error"] < 1e-5
    assert [site["inserted"] for site in records[0]["facts"]["sites"]] == [0, 1][: 1 + inserts]
    assert_same(before, run(graph, feed), rtol=1e-5)  # float32 through two products of 32 terms
    assert ops(graph) == ["LayerNormalization", "MatMul", "Gelu", "MatMul"]

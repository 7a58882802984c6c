"""Lines of text as samples: what a tokenizer makes of them fills every input of a language model by its meaning."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from channelfold.runtime.data.reading import Reading
from channelfold.runtime.data.text import open_text
from channelfold.runtime.errors import DataError, DependencyError, UsageError
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.files import import_model, session
from channelfold.runtime.io.session import Meaning, TensorSpec
from channelfold.tests.decoders import decoder
from channelfold.tests.graphs import random

tokenizers = pytest.importorskip("tokenizers")
WORDS = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "the": 4, "cat": 5, "sat": 6, "on": 7, "mat": 8}


def write_tokenizer(folder: Path, cut: int | None = None, special: bool = True) -> Path:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if special:
        made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    if cut:
        made.enable_truncation(cut)
        made.enable_padding(length=cut)  # as sentence-transformers writes it
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def ints(name: str, kind: str, *shape: int | str | None, dtype: str = "int64", below: int = 2) -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape, Meaning(kind, below) if kind else None)


def bert(batch: int | str = "b", length: int | str = "s") -> list[TensorSpec]:
    return [
        ints("input_ids", "ids", batch, length, below=9),
        ints("attention_mask", "mask", batch, length, dtype="int32"),
        ints("token_type_ids", "zeros", batch, length),
        ints("position_ids", "position", batch, length, below=12),
    ]


@pytest.fixture
def given(tmp_path):
    """Opens texts for some inputs, with a tokenizer that lies beside them."""

    def given(texts: str | bytes, inputs: list[TensorSpec], run=None, cut=None, special=True, **options):
        (tmp_path / "t.txt").write_bytes(texts.encode() if isinstance(texts, str) else texts)
        tokenizer = write_tokenizer(tmp_path, cut, special)
        return open_text(tmp_path / "t.txt", inputs, Reading(tokenizer=tokenizer, **options), tmp_path, run)

    return given


def plain(feed: dict[str, np.ndarray]) -> dict[str, list]:
    return {name: values.tolist() for name, values in feed.items()}


def test_a_line_fills_all_inputs_by_their_meaning(given):
    data = given("the cat sat\n\r\n  \nthe dog\r\n", bert())
    first, second = data
    assert plain(first) == {
        "input_ids": [[1, 4, 5, 6, 2]],
        "attention_mask": [[1] * 5],
        "token_type_ids": [[0] * 5],
        "position_ids": [[0, 1, 2, 3, 4]],
    }
    assert second["input_ids"].tolist() == [[1, 4, 3, 2]]
    assert {name: array.dtype.name for name, array in first.items()} == {
        "input_ids": "int64", "attention_mask": "int32", "token_type_ids": "int64", "position_ids": "int64",
    }  # fmt: skip
    assert (len(data), data.description, data.synthetic) == (2, "2 texts from t.txt", False)
    assert data.notes == ["2 empty lines were left out"]
    assert data.preparation == "tokenizer.json, at most 12 tokens"
    assert data.fingerprint == given("the cat sat\nthe dog", bert()).fingerprint


def test_texts_are_padded_where_the_model_fixes_a_size(given):
    data = given("the cat\nthe cat sat on the mat\n", bert(1, 6))
    assert [feed["input_ids"].tolist() for feed in data] == [[[1, 4, 5, 2, 0, 0]], [[1, 4, 5, 6, 7, 2]]]
    assert [feed["attention_mask"].tolist() for feed in data] == [[[1, 1, 1, 1, 0, 0]], [[1] * 6]]
    assert data.notes == ["1 of 2 texts are longer than 6 tokens and were cut"]
    assert data.preparation == "tokenizer.json, at most 6 tokens, padded to 6 with id 0"
    data = given("the\nthe cat\non\n", bert(2))
    (feed,) = data
    assert (len(data), data.description) == (1, "2 texts in batches of 2 from t.txt")
    assert feed["input_ids"].tolist() == [[1, 4, 2, 0], [1, 4, 5, 2]]
    assert data.notes == ["1 texts did not fill a batch of 2 and were dropped"]
    (feed, _) = given("the\nthe cat", [ints("input_ids", "ids", 1, 5, below=9)])
    assert feed["input_ids"].tolist() == [[1, 4, 2, 0, 0]]


@pytest.mark.parametrize(
    ("options", "cut", "config", "length"),
    [
        ({}, None, None, 12),  # rows of the table of positions
        ({"max_length": 5}, 8, None, 5),
        ({}, 8, None, 8),
        ({}, None, 7, 7),
        ({}, None, int(1e30), 12),
    ],
)
def test_a_long_text_is_cut_to_what_user_model_and_tokenizer_allow(given, tmp_path, options, cut, config, length):
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": config}))
    data = given("the cat " * 50, bert(), cut=cut, **options)
    (feed,) = data
    assert feed["input_ids"].tolist() == [[1, *([4, 5] * 50)[: length - 2], 2]]
    assert data.notes == [f"1 of 1 texts are longer than {length} tokens and were cut"]


def test_a_text_is_not_padded_because_its_tokenizer_says_so(given):
    (feed,) = given("the cat", bert(), cut=8)
    assert feed["input_ids"].tolist() == [[1, 4, 5, 2]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(given, encoding):
    (feed,) = given("the cat\n".encode(encoding), bert())
    assert feed["input_ids"].tolist() == [[1, 4, 5, 2]]


# ---- decoders ----------------------------------------------------------------------------------------------------


def test_a_decoder_gets_rollouts_of_the_text(given):
    graph = decoder()
    run = session(graph).run
    text = "the cat sat on the mat and the cat sat on the mat\nthe cat"
    data = given(text, list(required_inputs(graph)), run, special=False)
    feeds = list(data)
    (ids,) = {spec.name for spec in required_inputs(graph) if spec.meaning and spec.meaning.kind == "ids"}
    pasts = [spec for spec in required_inputs(graph) if spec.meaning and spec.meaning.kind == "past"]
    whole = [4, 5, 6, 7, 4, 8, 3, 4, 5, 6, 7, 4, 8]
    assert feeds[0][ids].tolist() == [whole[:5]]
    assert [feed[ids].tolist() for feed in feeds[1:9]] == [[[token]] for token in whole[5:]]
    assert [feed[ids].tolist() for feed in feeds[9:]] == [[[4]], [[5]]]
    assert [feed[pasts[0].name].shape[pasts[0].meaning.axis] for feed in feeds] == [0, *range(5, 13), 0, 1]
    for feed, later in pairwise(feeds[:9]):
        found = run(feed)
        for spec in pasts:
            np.testing.assert_array_equal(found[spec.meaning.present], later[spec.name])
    assert (len(data), data.description) == (11, "11 steps of 2 texts from t.txt")


def test_a_decoder_that_nothing_runs_gets_an_empty_cache(given):
    inputs = list(required_inputs(decoder()))
    (feed,) = given("the cat sat", inputs, special=False)
    past = next(spec for spec in inputs if spec.meaning and spec.meaning.kind == "past")
    assert feed[past.name].size == 0
    session(decoder()).run(feed)


# ---- what does not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "inputs", "says"),
    [
        ("", bert(), "holds too few texts: none. Write one text a line"),
        ("\n \n", bert(), "holds too few texts: none"),
        ("the", bert(4), "holds too few texts: only 1, and the model takes batches of 4"),
        (b"the cat\n\xff\xfa\n", bert(), "is not UTF-8 in line 2. Save it as UTF-8"),
        ("mat", [ints("input_ids", "ids", "b", "s", below=7)], "makes ids up to 8, and the model's table has 7 rows"),
        ("the", [*bert(), TensorSpec("pixels", np.dtype("f4"), ("b", 3, 8, 8))], "A text cannot fill the input pixels"),
        ("the", [*bert(), ints("decoder_input_ids", "ids", "b", "t")], "cannot fill the input decoder_input_ids"),
        ("the", [ints("input_ids", "ids", "b", "s"), ints("m", "mask", "b", 1, "s", "s")], "cannot fill the input m"),
        ("the", [TensorSpec("x", np.dtype("f4"), ("b", 4))], "No input takes the ids of a text: x: float32[b, 4]"),
        ("the", [ints("input_ids", "ids", 1, 1)], "The model takes 1 token at a time"),
        (
            "the",
            [ints("input_ids", "ids", 1, 8, below=9), ints("m", "mask", 1, 8, dtype="float32")],
            "What hides padding in the input m: float32[1, 8] is not known",
        ),
    ],
)
def test_texts_and_models_that_do_not_fit(given, texts, inputs, says):
    with pytest.raises(DataError) as caught:
        list(given(texts, inputs))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_named(given):
    data = given("the", [ints("input_ids", "ids", "b", "s", below=30_000)])
    assert data.notes == ["tokenizer.json knows 9 tokens, the model's table has 30000 rows: is it this model's?"]


def test_lengths_that_do_not_fit(given):
    with pytest.raises(UsageError, match="--max-length is 20, and the model takes 12 tokens"):
        given("the", bert(), max_length=20)
    with pytest.raises(UsageError, match="--max-length is 0"):
        given("the", bert(), max_length=0)


@pytest.mark.parametrize("content", ["", "hello", "{}", '{"model_max_length": 5}', "\x00"])
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    (tmp_path / "t.txt").write_text("the")
    (tmp_path / "tok.json").write_text(content)
    with pytest.raises(DataError, match=r"tok\.json is not a tokenizer\.json \(.*\)\. Give the tokenizer\.json") as it:
        open_text(tmp_path / "t.txt", bert(), Reading(tokenizer=tmp_path / "tok.json"))
    assert "\n" not in str(it.value)


def test_where_the_tokenizer_is_looked_for(tmp_path):
    (tmp_path / "t.txt").write_text("the")
    (tmp_path / "onnx").mkdir()
    with pytest.raises(UsageError, match=r"is text, and no tokenizer is given\. Add --tokenizer, the tokenizer\.json"):
        open_text(tmp_path / "t.txt", bert(), Reading(), tmp_path / "onnx")
    write_tokenizer(tmp_path)
    data = open_text(tmp_path / "t.txt", bert(), Reading(), tmp_path / "onnx")
    assert data.notes == [f"The tokenizer is {tmp_path / 'tokenizer.json'}, because it lies beside the model"]
    assert len(open_text(tmp_path / "t.txt", bert(), Reading(tokenizer=tmp_path))) == 1
    with pytest.raises(DataError, match=r"There is no .*tokeniser\.json\. Did you mean"):
        open_text(tmp_path / "t.txt", bert(), Reading(tokenizer=tmp_path / "tokeniser.json"))


def test_the_package_is_missing(given, monkeypatch):
    given("the", bert())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DependencyError, match=r"Texts are read with tokenizers .* Run: pip install tokenizers"):
        given("the", bert())


def test_a_newcomer_gives_sentences(run, fails, tmp_path):
    made = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 17]>
        m (int64[b,s] input_ids, int64[b,s] attention_mask) => (float[b,s,32] y) {
            e = Gather(table, input_ids) c = Cast<to = 1>(attention_mask) u = Unsqueeze(c, last) x = Mul(e, u)
            y = MatMul(x, W) }""")
    values = {"table": random((9, 32), "t").astype(np.float32), "W": random((32, 32), "w").astype(np.float32)}
    for name, array in (values | {"last": np.array([-1])}).items():
        made.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(made, tmp_path / "m.onnx")
    assert import_model(made)
    (tmp_path / "s.txt").write_text("the cat sat\non the mat\n")
    line = ("quantize", tmp_path / "m.onnx", "-o", tmp_path / "q.onnx", "--calibration", tmp_path / "s.txt")
    assert "s.txt is text, and no tokenizer is given" in fails(2, *line)
    tokenizer = write_tokenizer(tmp_path)
    code, out, err = run(*line, "--json")
    assert code == 0
    assert json.loads(out)["data"]["calibration"] == "2 texts from s.txt"
    assert json.loads(out)["data"]["preparation"] == "tokenizer.json, at most 512 tokens"
    assert f"The tokenizer is {tokenizer}, because it lies beside the model" in err
    code, out, err = run(*line, "--tokenizer", tokenizer, "--max-length", "3", "--json")
    assert (code, "2 of 2 texts are longer than 3 tokens and were cut" in err) == (0, True)
    quiet = ("--tokenizer", tokenizer, "-o", tokenizer)
    assert "is an input" in fails(2, *line[:2], *line[4:], *quiet)

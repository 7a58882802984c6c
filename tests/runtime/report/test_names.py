"""Names that fit: whole parts go, and what tells them apart stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from channelfold.runtime.report.names import shorten, shorten_all


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [
        ("/model/layers.11/self_attn/q_proj/MatMul", 40, "/model/layers.11/self_attn/q_proj/MatMul"),
        ("/model/layers.11/self_attn/q_proj/MatMul", 39, "/model/…/self_attn/q_proj/MatMul"),
        ("/model/layers.11/self_attn/q_proj/MatMul", 22, "/model/…/q_proj/MatMul"),
        ("/model/layers.11/self_attn/q_proj/MatMul", 21, "…/q_proj/MatMul"),
        ("/model/layers.11/self_attn/q_proj/MatMul", 14, "…/MatMul"),
        ("resnet50.int8.sm89.engine", 20, "resnet…8.sm89.engine"),
    ],
)
def test_whole_parts_are_left_out(name: str, width: int, expected: str):
    assert shorten(name, width) == expected


@given(st.text("ab/.", max_size=60), st.integers(3, 40))
def test_fits_and_keeps_the_end(name: str, width: int):
    short = shorten(name, width)
    assert len(short) <= width or short == name
    assert name.endswith(short.rpartition("…")[2])
    assert name.startswith(short.partition("…")[0])
    assert (short == name) == (len(name) <= width)


ENCODER = [
    "/base/encoder/layer.0/attention/self/query/MatMul",
    "/base/encoder/layer.0/output/dense/MatMul",
    "/base/encoder/layer.11/output/dense/MatMul",
]


@pytest.mark.parametrize(
    ("names", "width", "expected"),
    [
        (ENCODER, 49, ENCODER),
        (
            ENCODER,
            48,
            [
                "…/layer.0/attention/self/query/MatMul",
                "…/layer.0/output/dense/MatMul",
                "…/layer.11/output/dense/MatMul",
            ],
        ),
        (ENCODER, 30, ["…/layer.0/attention/self/query", "…/layer.0/output/dense", "…/layer.11/output/dense"]),
        (ENCODER, 28, ["layer.0/attention/self/query", "…/layer.0/output/dense", "…/layer.11/output/dense"]),
        (ENCODER, 27, ["layer.0/…/self/query", "…/layer.0/output/dense", "…/layer.11/output/dense"]),
        (ENCODER[:1], 48, ["/base/…/layer.0/attention/self/query/MatMul"]),
        (["/a/b/c/Conv", "/a/d/c/Conv"], 8, ["…/b/c", "…/d/c"]),
        (["/a/b/Conv", "/c/d/Conv"], 8, ["…/Conv", "…/Conv"]),
        (["MatMul_123", "MatMul_124"], 8, ["Ma…l_123", "Ma…l_124"]),
        ([], 10, []),
    ],
)
def test_names_of_one_list(names, width, expected):
    assert shorten_all(names, width) == expected


@given(st.lists(st.text("ab/", max_size=30), max_size=4), st.integers(3, 30))
def test_names_of_one_list_fit(names, width):
    short = shorten_all(names, width)
    assert len(short) == len(names)
    assert all(len(name) <= width for name in short)

"""Methods of the command smooth: their passes, and what is said of an option that a method does not heed."""

from __future__ import annotations

import dataclasses

import pytest

from channelfold.passes.recipe import PASSES, describe
from channelfold.passes.smooth import AbsorbBias, Equalize, MergeChannels, ReorderChannels, Smooth, SplitChannels
from channelfold.passes.smooth_methods import METHODS, passes_of
from channelfold.runtime.errors import UsageError


def test_the_methods_of_the_pass_are_methods_of_the_command():
    (method,) = (option for option in describe("smooth")["options"] if option["name"] == "method")
    assert {name for name, found in METHODS.items() if found.step == "smooth"} == set(method["choices"])


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("auto", {}, [Smooth()]),
        ("smoothquant", {"alpha": 0.7, "exclude": ["a"]}, [Smooth(method="smoothquant", alpha=0.7, exclude=("a",))]),
        ("smoothquant", {"search_alpha": True, "weight_bits": 4},
         [Smooth(method="smoothquant", search_alpha=True, weight_bits=4)]),
        ("repq", {"aim": "median", "shift": False}, [Smooth(method="repq", aim="median", shift=False)]),
        ("equalize", {"iterations": 3}, [Equalize(iterations=3)]),
        ("equalize", {"absorb_bias": False}, [Equalize()]),
        ("equalize", {"absorb_bias": True, "exclude": ("a*",), "sigmas": 2},
         [Equalize(exclude=("a*",)), AbsorbBias(exclude=("a*",), sigmas=2.0)]),
        ("split-merge", {"align": 8}, [SplitChannels(align=8)]),
        ("split-merge", {"restore_width": True, "align": 8, "max_change": 0.1},
         [SplitChannels(align=8), MergeChannels(align=0, max_change=0.1)]),
        ("reorder", {}, [ReorderChannels()]),
    ],
)  # fmt: skip
def test_passes(name, options, expected):
    assert list(passes_of(name, options)) == expected


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_one_of_its_pass(name):
    method = METHODS[name]
    fields = {field.name for step in (method.step, method.then) if step for field in dataclasses.fields(PASSES[step])}
    assert {*method.options, *method.switched} <= fields
    assert (method.switch in fields) == (bool(method.switch) and not method.then)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("os_plus", {}, "There is no method 'os_plus'. Did you mean 'os-plus'?"),
        ("repq", {"alpha": 1}, "Method 'repq' has no option 'alpha'. It is for: smoothquant"),
        ("smoothquant", {"alhpa": 1}, "Method 'smoothquant' has no option 'alhpa'. Did you mean 'alpha'?"),
        ("reorder", {"colour": 1}, "Method 'reorder' has no option 'colour'. It has no options"),
        ("smoothquant", {"weight_bits": 4},
         "Option 'weight_bits' of method 'smoothquant' counts only with 'search_alpha'. Add --search-alpha"),
        ("split-merge", {"max_change": 1, "restore_width": False},
         "Option 'max_change' of method 'split-merge' counts only with 'restore_width'. Add --restore-width"),
        ("awq", {"group_size": -1}, "Pass 'smooth': 'group_size' is -1. Expected 0 to 1048576"),
        ("equalize", {"absorb_bias": True, "sigmas": -1}, "Pass 'absorb-bias': 'sigmas' is -1. Expected at least 0"),
    ],
)  # fmt: skip
def test_mistakes(name, options, message):
    with pytest.raises(UsageError) as caught:
        passes_of(name, options)
    assert str(caught.value) == message

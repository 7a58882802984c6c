"""How images and lines of text become samples: what the user says, and which kind of data that is for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from channelfold.runtime.errors import UsageError

IMAGE_OPTIONS = ("resize", "crop", "mean", "std", "scale", "layout", "channel_order")
TEXT_OPTIONS = ("tokenizer", "max_length")


@dataclass(frozen=True)
class Reading:
    """Options for images and texts. What is None or empty is decided by the model, see ``images`` and ``text``.

    ``resize``, ``crop``: one size, or height and width. ``mean``, ``std``: one number, or one for each channel in the
    order of ``channel_order``, of the values after they were multiplied by ``scale``. ``layout``: NCHW or NHWC.
    ``tokenizer``: the path of a tokenizer.json. ``max_length``: tokens of a text at most.

    Raises UsageError for values that no image and no text can have.
    """

    resize: Sequence[int] = ()
    crop: Sequence[int] = ()
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    scale: float | None = None
    layout: str | None = None
    channel_order: str | None = None
    tokenizer: str | Path | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            sizes = getattr(self, name)
            if len(sizes) > 2 or min(sizes, default=1) < 1:
                raise UsageError(f"--{name} is {'x'.join(map(str, sizes))}", "Give one size such as 224, or 224x320")
        for name in ("mean", "std", "scale"):
            numbers = getattr(self, name)
            for number in (numbers,) if isinstance(numbers, float | int) else numbers or ():
                if not math.isfinite(number) or (number <= 0 and name != "mean"):
                    raise UsageError(f"--{name} is {number:g}", "Give the numbers of the training")
        if self.max_length is not None and self.max_length < 1:
            raise UsageError(f"--max-length is {self.max_length}", "Give 1 or more")

    def given(self, names: Sequence[str]) -> list[str]:
        """The flags of the options among ``names`` that the user gave."""
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) not in (None, ())]

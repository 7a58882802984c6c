"""The time of models as a share of the given model's: measured, modelled for a GPU, or by a record of ``bench``.

A clock has the times that ``latency.learned`` needs, tells that of a mix beside the one that was predicted, and proves
that of the written file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from channelfold.passes.layers.sensitivity import Site
from channelfold.passes.search.front import Point, point
from channelfold.passes.search.latency import ORIGINAL, Timed, mixes
from channelfold.passes.search.modelled import card_of, milliseconds, modelled
from channelfold.passes.search.profiled import in_turns, profiled
from channelfold.passes.search.tabled import ONNXRUNTIME, Table, gpu
from channelfold.runtime.engine.plan import contractions, read_plan
from channelfold.runtime.errors import UsageError
from channelfold.runtime.io import files
from channelfold.runtime.io.facts import environment
from channelfold.runtime.io.session import Feed
from channelfold.runtime.stats.bench import Ratio, ratio

FileOf = Callable[[Point], Path]


class Measured:
    """In ONNX Runtime, on this machine."""

    how, warning = "measured in ONNX Runtime", ""

    def __init__(self, model: Path, feed: Feed):
        self.model, self.feed = model, feed

    def timed(self, sites: Sequence[Site], kind: str, file_of: FileOf) -> Mapping[str, Timed]:
        """The times of the original and of ``mixes``, in which what is float is of the type ``kind``."""
        paths = {name: file_of(point(sites, mix)) for name, mix in mixes(sites).items()}
        return profiled({ORIGINAL: self.model, **paths}, [site.nodes for site in sites], self.feed)

    def share(self, mix: Point, file_of: FileOf, predicted: float) -> float:
        """The time of a mix; that of the faster quarter of its runs, for what interrupts a run makes it longer."""
        whole, found = in_turns([self.model, file_of(mix)], self.feed)
        return found.low / whole.low

    def proved(self, path: Path, engines: Sequence[Mapping[str, Any]], predicted: float) -> Ratio:
        """The time of the written file, of which ``engines`` were built."""
        whole, found = in_turns([self.model, path], self.feed)
        return ratio(found, whole)


class Modelled:
    """In TensorRT on a GPU of the architecture ``sm``, by the plans of engines."""

    def __init__(self, model: Path, feed: Feed, sm: int):
        self.model, self.feed, self.sm = model, feed, sm
        self.how = f"modelled for {card_of(sm).name}"
        self.warning = f"The latency is that of a {card_of(sm).name} by a model of it, relative to the float engine: "
        self.warning += "not measured"

    def timed(self, sites: Sequence[Site], kind: str, file_of: FileOf) -> Mapping[str, Timed]:
        """The times of the original and of ``mixes``, in which what is float is of the type ``kind``."""
        paths = {name: file_of(point(sites, mix)) for name, mix in mixes(sites).items()}
        return {ORIGINAL: self._whole, **modelled(paths, [site.nodes for site in sites], self.sm, [self.feed])}

    @functools.cached_property
    def _whole(self) -> Timed:
        return modelled({ORIGINAL: self.model}, [], self.sm, [self.feed])[ORIGINAL]

    def share(self, mix: Point, file_of: FileOf, predicted: float) -> float:
        """The time of a mix, of whose file an engine is built."""
        return modelled({"": file_of(mix)}, [], self.sm, [self.feed])[""].whole / self._whole.whole

    def proved(self, path: Path, engines: Sequence[Mapping[str, Any]], predicted: float) -> Ratio:
        """The time of the engine of the written file."""
        engine = next(Path(one["path"]) for one in engines if one["sm"] == self.sm)
        shapes = {name: values.shape for name, values in self.feed.items()}
        plan = read_plan(engine, contractions(files.load(path)), shapes)
        share = milliseconds(plan, card_of(self.sm), path.name) / self._whole.whole
        return Ratio(share, share, share)


class Tabled:
    """By a table of times that ``bench`` has recorded, of files on a ``device``: what it does not hold is predicted."""

    def __init__(self, model: Path, feed: Feed, path: Path, device: str):
        self.model, self.feed = model, feed
        self.table = Table.read(path).on(device)
        self.table.original(model)
        self._here = device == ONNXRUNTIME and self.table.environment == environment()  # the machine of the table
        self.how, self.warning = Measured.how, ""
        if not self._here:
            self.how = f"predicted from {path.name}"
            self.warning = f"The latency is that of {device} in {path.name}, relative to the given model: predicted, "
            self.warning += "not measured"

    def timed(self, sites: Sequence[Site], kind: str, file_of: FileOf) -> Mapping[str, Timed]:
        """The times of the original and of those ``mixes`` that the table has, with float of the type ``kind``."""
        return self.table.timed(self.model, sites, kind)

    def share(self, mix: Point, file_of: FileOf, predicted: float) -> float:
        """The time of a mix: what the table predicts."""
        return predicted

    def proved(self, path: Path, engines: Sequence[Mapping[str, Any]], predicted: float) -> Ratio:
        """The time of the written file: measured where this is the machine of the table, else predicted."""
        if self._here:
            return Measured(self.model, self.feed).proved(path, engines, predicted)
        return Ratio(predicted, predicted, predicted)


Clock = Measured | Modelled | Tabled


def clock_of(model: Path, feed: Feed, target: str, sms: Sequence[int], table: Path | None = None) -> Clock:
    """The clock for a target. Raises UsageError without a device that it stands for."""
    if target != "onnxruntime" and not sms:
        hint = "Add --target onnxruntime, or --sm 89 to have the time on that GPU modelled"
        raise UsageError("Latency is measured in ONNX Runtime, which is not the target", hint)
    if table is not None:
        return Tabled(model, feed, table, ONNXRUNTIME if target == "onnxruntime" else gpu(sms[0]))
    return Measured(model, feed) if target == "onnxruntime" else Modelled(model, feed, sms[0])

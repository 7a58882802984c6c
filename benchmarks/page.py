"""The web page of reports in headless Chromium: what it shows, how fast, whether everyone can use it.

    python benchmarks/page.py --axe axe.min.js [--shots DIR] [--write]      every check
    python benchmarks/page.py --picture benchmarks/results/report.png       the picture of the README, with pillow

Reports of compress, of diff --explain, of a search, of prune and of two runs are made of the smallest shipped
transformer; further ones, with 1,500 and 50,000 nodes, are made up. Needs ``chromium`` on the PATH, and the
accessibility checker of ``npm install axe-core`` (node_modules/axe-core/axe.min.js).
"""

from __future__ import annotations

import base64
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import parser, table, write
from open_set import DEFAULT

from channelfold import models
from channelfold.runtime import jobs
from channelfold.runtime.data.sources import open_data
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.files import load
from channelfold.runtime.report.terminal import to_html, write_both

WIDTHS = (1280, 768, 390)
LARGE, HUGE = 1500, 50_000  # nodes
SAMPLES = 8
MOST_BYTES, MOST_MS = 2_000_000, 1000  # of the page with LARGE nodes, and until it shows something


class Browser:
    """A page in headless Chromium, driven by the DevTools protocol over a pair of pipes."""

    def __init__(self, write: int, read: int):
        self._write, self._read = write, read
        self._rest, self._last = b"", 0
        self._session: str | None = None
        self._page = ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command; its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (message := self._next()).get("id") != self._last:
            self.events.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]

    def open(self, page: Path) -> None:
        """Loads a page, and forgets what was heard before."""
        self.events.clear()
        self._page = page.resolve().as_uri()
        self.call("Page.navigate", url=self._page)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def said(self) -> list[str]:
        """The requests that left the page and what the console said, since it was opened."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        told = [json.dumps(event["params"])[:300] for event in self.events if event["method"] in kinds]
        sent = [
            event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"
        ]
        return told + [url[:80] for url in sent if not url.startswith(("data:", self._page))]

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", script))
        return found["result"].get("value")

    def look(self, width: int, dark: bool, height: int = 900) -> None:
        """Sets the width of the window and the colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def shot(self, path: Path, whole: bool = True) -> None:
        """Writes a picture of the page."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._read, 1 << 20)
            if not more:
                raise RuntimeError("Chromium has ended")
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium of its own, which ends with the block."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        quiet = "--headless=new --hide-scrollbars --no-sandbox --disable-gpu"
        options = f"{quiet} --remote-debugging-pipe --user-data-dir={profile}"
        pipes = f"exec chromium {options} 3<&{to_read} 4>&{from_write} 2>/dev/null"
        process = subprocess.Popen(["bash", "-c", pipes], pass_fds=(to_read, from_write))
        os.close(to_read)
        os.close(from_write)
        try:
            yield Browser(to_write, from_read)
        finally:
            process.terminate()
            process.wait(20)
            os.close(to_write)
            os.close(from_read)


def reports(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of real runs, with what they are of."""
    model, data = models.path("digits_vit.onnx"), models.path("digits_calibration.npz")
    unseen = models.path("digits_evaluation.npz")
    both, alone = jobs.Source(data, unseen), jobs.Source(evaluation=unseen)
    yield "compress", jobs.compress(model, folder / "a", "int8-smooth", source=both, gates=jobs.Gates(min_snr=20))
    yield "diff --explain", jobs.diff(model, folder / "a/model.onnx", source=alone, explain=True)
    yield "compress --search", jobs.compress(model, folder / "b", source=both, search=jobs.Search(max_loss=0.02))
    yield "prune", jobs.prune(model, folder / "cut.onnx", source=both, options={"keep_macs": 0.6})
    yield "report A B", jobs.report(folder / "a", folder / "b")


def share(model: Path, data: Path, folder: Path) -> float:
    """Processor time of the reports of a compress with few samples, against that of everything else."""
    few = open_data(data, required_inputs(load(model))).first(SAMPLES)
    begin = time.process_time()
    record = jobs.compress(model, folder, source=jobs.Source(few, few))
    whole, begin = time.process_time() - begin, time.process_time()
    write_both(record, folder)
    reports = 2 * (time.process_time() - begin)  # compress writes them twice
    return reports / (whole - reports)


def enlarged(record: dict[str, Any], count: int) -> dict[str, Any]:
    """A record that tells of so many nodes in every table, each with what the first one has."""
    made = copy.deepcopy(record)
    names = [f"/model/layers.{i // 12}/attention/block_{i}/MatMul" for i in range(count)]

    def many(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [rows[0] | {"node": name} for name in names] if rows else []

    for step in made["steps"]:
        for key in ("changed", "refused"):
            step[key] = many(step[key]) if step["pass"] == "quantize" else step[key]
        for key in ("ranges", "sites"):
            if key in step["facts"]:
                step["facts"][key] = many(step["facts"][key])
    return made


def checked(shown: Browser, page: Path, axe: str, shots: Path | None) -> list[str]:
    """What is wrong with a page."""
    wrong = []
    for width in WIDTHS:
        for dark in (False, True):
            shown.look(width, dark)
            shown.open(page)
            place = f"{width} pixels, {'dark' if dark else 'light'}"
            if shots:
                shown.shot(shots / f"{page.stem}-{width}-{'dark' if dark else 'light'}.png")
            if shown.run("document.documentElement.scrollWidth > innerWidth"):
                wrong.append(f"{place}: wider than the window")
            if axe:
                shown.run(f"{axe};0")
                wrong += [f"{place}: {found}" for found in shown.run(_VIOLATIONS)]
            wrong += [f"{place}: {said}" for said in shown.said()]
    return wrong + used(shown)


def used(shown: Browser) -> list[str]:
    """The uses of the open page that do not work."""
    return [why for what, why in _USES.items() if not shown.run(what)]


_VIOLATIONS = "axe.run().then(found => found.violations.map(one => `${one.id}: ${one.nodes[0].html.slice(0, 200)}`))"
_USES = {
    """(() => { const head = [...document.querySelectorAll('tbody th a.node')].map(a => a.closest('table'))[0]?.
         querySelector('thead th'); if (!head) return true;
       const bodies = [...head.closest('table').tBodies];
       const names = () => bodies.flatMap(body => [...body.rows]).map(row => row.cells[0].textContent);
       const least = names().sort(new Intl.Collator(undefined, {numeric: true}).compare);
       head.querySelector('button').click(); const up = names(); head.querySelector('button').click();
       return head.ariaSort === 'descending' && up[0] === least[0] && names()[0] === least.at(-1); })()""":
        "a click on a heading does not sort",
    """(async () => { const name = document.querySelector('a.node')?.textContent; if (!name) return true;
       const find = document.getElementById('find'); find.value = name; find.dispatchEvent(new Event('input'));
       await new Promise(done => setTimeout(done, 400));
       const left = [...document.querySelectorAll('tbody tr:not([hidden])')];
       const told = document.getElementById('found').textContent.startsWith(`${left.length} of `);
       find.value = ''; find.dispatchEvent(new Event('input')); await new Promise(done => setTimeout(done, 400));
       return told && left.length > 0 && left.every(row => row.textContent.includes(name)); })()""":
        "the search does not find a node",
    """(async () => { const box = document.getElementById('marked'); box.click();
       const left = [...document.querySelectorAll('tbody tr:not([hidden])')]; box.click();
       return left.every(row => row.querySelector('.yellow, .red')); })()""": "the box leaves rows without a warning",
    """(async () => { const link = [...document.querySelectorAll('a.node')].at(-1); if (!link) return true;
       location.hash = `node:${encodeURIComponent(link.textContent)}`; await new Promise(done => setTimeout(done, 300));
       const row = document.querySelector('tr.named'), box = row?.getBoundingClientRect();
       return !!row && row.textContent.includes(link.textContent) && box.top >= 0 && box.bottom <= innerHeight; })()""":
        "a link to a node does not lead there",
    """(async () => { const dot = document.querySelector('svg circle'); if (!dot) return true;
       dot.dispatchEvent(new MouseEvent('click', {bubbles: true})); await new Promise(done => setTimeout(done, 300));
       return location.hash.startsWith('#node:'); })()""": "a point of a picture leads nowhere",
}  # fmt: skip  # an expression that is true where a use of the page works, and what is said where it does not


def measured(shown: Browser, page: Path) -> tuple[int, int, int]:
    """(bytes, milliseconds until something shows, milliseconds until all is loaded) of a page, the best of three."""
    shown.look(1280, dark=False)
    times = []
    for _ in range(3):
        shown.open(page)
        times.append(shown.run(_PAINT))
    paint, load = (min(column) for column in zip(*times, strict=True))
    return page.stat().st_size, round(paint), round(load)


_PAINT = """new Promise(done => { const timer = setInterval(() => {
  const [paint] = performance.getEntriesByName('first-contentful-paint');
  const load = performance.getEntriesByType('navigation')[0].loadEventEnd;
  if (paint && load) { clearInterval(timer); done([paint.startTime, load]); } }, 20); })"""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--axe", type=Path, metavar="FILE", help="axe.min.js of npm's axe-core")
    options.add_argument("--shots", type=Path, metavar="DIR", help="keep pictures of every page")
    options.add_argument("--picture", type=Path, metavar="PNG", help="write the picture of the README alone")
    options.add_argument("--dir", type=Path, default=DEFAULT, help="the open set, for vit_s_focus")
    options.add_argument("--write", action="store_true", help="also write results/page.md")
    given = options.parse_args()
    axe = given.axe.read_text(encoding="utf-8") if given.axe else ""
    wrong, rows = {}, []
    with tempfile.TemporaryDirectory() as name, browser() as shown:
        folder = Path(name)
        for what, record in reports(folder):
            page = folder / f"{what.replace(' ', '-')}.html"
            page.write_text(to_html(record), encoding="utf-8")
            if given.picture:
                shown.look(1100, dark=False, height=1180)
                shown.open(page)
                shown.shot(given.picture, whole=False)
                return _pack(given.picture)
            wrong[what] = checked(shown, page, axe, given.shots)
            rows.append((what, f"{page.stat().st_size / 1e3:.0f} kB", str(len(wrong[what]))))
        record, large = jobs.report(folder / "a"), []
        for count in (LARGE, HUGE):
            page = folder / f"{count}.html"
            page.write_text(to_html(enlarged(record, count)), encoding="utf-8")
            size, paint, loaded = measured(shown, page)
            large.append((f"{count:,} nodes", f"{size / 1e6:.2f} MB", f"{paint} ms", f"{loaded} ms"))
            if count == LARGE:
                wrong["large"] = used(shown) + [f"{size} bytes, {paint} ms"] * (size > MOST_BYTES or paint > MOST_MS)
        subjects = {"digits_vit": (models.path("digits_vit.onnx"), models.path("digits_calibration.npz"))}
        subjects["vit_s_focus"] = given.dir / "open/vit_s_focus.onnx", given.dir / "calibration/imgfocus.npz"
        found = {n: share(*files, folder / "c") for n, files in subjects.items() if all(map(Path.exists, files))}
    text = [
        table(("page of", "size", "findings"), rows),
        table(("made up", "size", "first paint", "loaded"), large),
        table((f"compress with {SAMPLES} samples", "time of reports"), [(n, f"{one:.1%}") for n, one in found.items()]),
    ]
    print("\n\n".join([*text, *(f"{what}: {why}" for what, all_ in wrong.items() for why in all_)]))
    if given.write:
        write(
            "page.md",
            "# The web page in headless Chromium",
            f"`python benchmarks/page.py --axe axe.min.js`{_CHECKED}",
            *text,
        )
    sys.exit(any(wrong.values()))


def _pack(picture: Path) -> None:
    """Writes a picture with 128 colours, which takes a third of the bytes."""
    from PIL import Image

    few = Image.open(picture).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few.save(picture, optimize=True)


_CHECKED = """: at 1280, 768 and 390 pixels, light and dark, no word on the console, no request, no finding of axe,
nothing wider than the window; then a table is sorted, a node searched for, and a link and a point of a picture lead to
their nodes. The made-up records tell of so many nodes in every table of a compress."""


if __name__ == "__main__":
    main()

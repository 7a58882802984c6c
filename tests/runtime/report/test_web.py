"""The web page: the same figures as the terminal, whole names, and no way for a name to be more than a text."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from rich.console import Console

from channelfold import models
from channelfold.runtime import jobs
from channelfold.runtime.errors import ChannelfoldError
from channelfold.runtime.report.terminal import render, to_html
from channelfold.tests.runtime.report.test_terminal import record

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'><b>"


class Page(HTMLParser):
    """The texts and the tags of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._inside):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def terminal(shown: dict[str, Any]) -> str:
    out = io.StringIO()
    render(shown, Console(file=out, width=10_000))
    return out.getvalue()


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> dict[str, Any]:
    data = models.path("digits_calibration.npz")
    folder = tmp_path_factory.mktemp("out")
    source, gates = jobs.Source(data), jobs.Gates(min_snr=10, min_agreement=0.5)
    jobs.compress(models.path("digits_repavit.onnx"), folder, recipe="int8-smooth", source=source, gates=gates)
    return json.loads((folder / "report.json").read_text()) | {"folder": str(folder)}


@pytest.fixture(scope="module")
def complete(real) -> dict[str, Any]:
    """The record with what other commands would put into it."""
    sites = [site["node"] for site in real["steps"][-1]["facts"]["ranges"]]
    site = {"op": "MatMul", "snr": 40.0, "share": 0.5, "own_snr": 41.0, "so_far_snr": "inf", "products": []}
    point = {
        "bytes": 1000, "cost": 0.5, "latency": None, "start": "smooth", "options": {"int8": 1.0}, "predicted_db": 41.0,
        "error_db": 42.0, "snr_db": 43.0, "agreement": 0.75, "loss": 0.01, "low": 0.0, "high": 0.02, "chosen": True,
        "proof": None,
    }  # fmt: skip
    return real | {
        "next": ["Take more samples"],
        "explanation": {
            "samples": 4, "aligned": 3, "linears": 2, "covered": 2, "snr": 40.0, "restored": [],
            "sites": [{"node": node, "tensor": node, "original": node, "nodes": [node], **site} for node in sites],
            "depth": [{"node": node, "snr": 60.0 - place} for place, node in enumerate(sites)],
            "advice": {"sites": 1, "nodes": sites[:1], "gain": 3.0, "command": f"--exclude {sites[0]}"},
        },
        "search": {
            "loss": "energy", "options": ["int8"], "limits": {"max_size": 0.5}, "met": True,
            "samples": {"steering": 1, "proof": 1}, "points": [point, point | {"bytes": 800, "chosen": False}],
            "sites": [{"nodes": sites, "option": "int8", "bytes": 10, "snr_db": 40.0, "better": None}],
        },
        "engines": [{
            "sm": 89, "path": "m.engine", "bytes": 940, "seconds": 1.0, "backend": "rtx", "accuracy": None,
            "plan": {"readable": True, "reason": "", "int8": 1, "total": 2,
                     "not_int8": [{"node": sites[0], "runs_as": "float"}],
                     "nodes": [{"node": node, "runs_as": "int8", "kernel": "k", "operands": []} for node in sites]},
        }],
    }  # fmt: skip


def figures(text: str) -> set[str]:
    return set(re.findall(r"-?\d[\d,]*\.?\d*(?:e[+-]\d+)?", text))


@pytest.mark.parametrize("which", ["made", "real", "complete"])
def test_the_figures_are_those_of_the_terminal(which, real, complete):
    shown = {"made": record(), "real": real, "complete": complete}[which]
    page = Page(to_html(shown))
    printed = figures(re.sub(r"… and \d+ more", "", terminal(shown)))
    assert len(printed) > 20
    assert printed <= figures(page.text)


def test_the_figures_are_those_of_the_record(real):
    text = Page(to_html(real)).text
    accuracy = real["accuracy"]
    for output in accuracy["outputs"]:
        assert f"SNR {output['snr']:.2f} dB {output['name']}" in text
        spread = accuracy["spread"][output["name"]]
        assert " ".join(f"{quartile:.1f}" for quartile in spread["quartiles"]) in text
        for place, count in enumerate(spread["counts"]):
            low = spread["low"] + place * spread["step"]
            assert f"{low} to {low + spread['step']} dB: {count}" in text
    for one in accuracy["worst"]:
        assert f"#{one['sample']}, {one['snr']:.1f} dB" in text
    for site in real["steps"][-1]["facts"]["ranges"]:
        seen = real["steps"][-1]["facts"]["activations"][site["tensor"]]
        assert f"{site['op']} {seen['minimum']:.4g} {seen['maximum']:.4g}" in text
        assert (f"{site['clipped']:.4%}" if site["clipped"] else "0") in text


def test_nothing_is_left_out(real):
    """Every node that was changed or refused and every site, by its whole name."""
    page = Page(to_html(real))
    for step in real["steps"]:
        for refusal in step["refused"]:
            assert refusal["node"] in page.text
        for site in [*step["changed"], *step["facts"].get("sites", ()), *step["facts"].get("ranges", ())]:
            assert site["node"] in page.text
    assert all(row["largest"] in page.text for row in real["weights"]["rows"])


def test_the_page_needs_no_other_file_and_no_network(real):
    page = Page(to_html(real))
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "base", "form")]
    sources = {tag: str(attrs["src"]) for tag, attrs in page.tags if "src" in attrs}
    assert all(tag == "img" and source.startswith("data:image/png;base64,") for tag, source in sources.items())
    assert all(str(attrs["href"]).startswith("#") for _, attrs in page.tags if "href" in attrs)
    (policy,) = (str(a["content"]) for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert re.search(r"script-src 'sha256-[\w+/=]+'$", policy)


def planted(value: Any) -> Any:
    """The record with an evil text at the end of every text."""
    if isinstance(value, dict):
        return {k: v if k in ("kind", "level", "schema", "form") else planted(v) for k, v in value.items()}
    if isinstance(value, list):
        return [planted(entry) for entry in value]
    return value + EVIL if isinstance(value, str) and value not in ("inf", "-inf") else value


@pytest.mark.parametrize("runs", [1, 2])
def test_names_are_no_more_than_texts(runs, complete, real):
    other = real | {"steps": real["steps"][:-1], "tool": "another"}
    shown = complete if runs == 1 else {"tool": "t", "command": "report a b", "runs": [complete, other]}
    known = {tag for tag, _ in Page(to_html(shown)).tags}
    page = Page(to_html(planted(shown)))
    assert {tag for tag, _ in page.tags} <= known
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert EVIL in html.unescape(page.text)


def test_links_lead_to_the_nodes(real):
    page = Page(to_html(real))
    anchors = [attrs["id"] for _, attrs in page.tags if str(attrs.get("id", "")).startswith("node:")]
    links = {unquote(str(attrs["href"])[1:]) for tag, attrs in page.tags if tag == "a" and attrs.get("class") == "node"}
    assert len(anchors) == len(set(anchors)) > 5
    assert links == set(anchors)


def test_every_link_leads_to_a_place(complete):
    page = Page(to_html(complete))
    places = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {unquote(str(attrs["href"])[1:]) for tag, attrs in page.tags if tag == "a"} <= places


def test_the_page_of_a_large_model_is_small(complete):
    shown = json.loads(json.dumps(complete))
    names = [f"/model/layers.{i // 12}/attention/block_{i}/MatMul" for i in range(1500)]

    def many(row: dict[str, Any]) -> list[dict[str, Any]]:
        return [row | {"node": name} for name in names]

    smooth, quantize = shown["steps"][-2:]
    quantize["refused"] = [{"node": n, "reason": "MatMul: it has no weight", "code": "no weight"} for n in names]
    quantize["facts"]["ranges"] = many(quantize["facts"]["ranges"][0])
    smooth["facts"]["sites"] = many(smooth["facts"]["sites"][0])
    for key in ("sites", "depth"):
        shown["explanation"][key] = many(shown["explanation"][key][0])
    shown["engines"][0]["plan"]["nodes"] = many(shown["engines"][0]["plan"]["nodes"][0])
    page = to_html(shown)
    assert len(page) < 2e6
    assert sum("rest" in str(attrs.get("class")) for _, attrs in Page(page).tags) == 4  # tables show their first rows


def test_pictures_of_a_record_are_png_or_not_shown(real):
    shown = json.loads(json.dumps(real))
    assert sum(tag == "img" for tag, _ in Page(to_html(shown)).tags) == len(shown["accuracy"]["worst"]) > 0
    for one in shown["accuracy"]["worst"]:
        one["picture"] = "data:image/svg+xml;base64,AAAA"
    assert not any(tag == "img" for tag, _ in Page(to_html(shown)).tags)


def test_the_summary_says_whether_gates_are_met(real):
    assert "Gates 2 of 2 all met" in Page(to_html(real)).text
    missed = real | {"gates": [real["gates"][0] | {"met": False}, *real["gates"][1:]]}
    assert "GATE MISSED" in Page(to_html(missed)).text
    assert "Gates 1 of 2" in Page(to_html(missed)).text


def test_compress_writes_it_and_report_shows_both(real, tmp_path):
    written = Path(real["folder"], "report.html").read_text(encoding="utf-8")
    assert Page(written).text == Page(to_html(jobs.report(real["folder"]))).text
    both = jobs.report(real["folder"], real["folder"])
    assert f"{real['output']['bytes'] / 1e3:.1f} kB" in terminal(both)
    assert jobs.page_beside(both, real["folder"]).name == "comparison.html"
    for text, words in (("{", "is not JSON"), ('{"a": 1}', "is no report"), (None, "cannot be read")):
        if text is not None:
            (tmp_path / "r.json").write_text(text)
        path = tmp_path / "r.json" if text is not None else tmp_path / "none"
        with pytest.raises(ChannelfoldError, match=words):
            jobs.report(path)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_in_a_browser(real, tmp_path):
    """The script runs under the page's policy: headings are buttons, a link marks its node, nothing is logged."""
    (tmp_path / "page.html").write_text(to_html(real), encoding="utf-8")
    node = next(site["node"] for step in real["steps"] for site in step["facts"].get("sites", ()))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    url = f"{(tmp_path / 'page.html').as_uri()}#node:{node}"
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr
    page = Page(done.stdout)
    assert any(tag == "button" for tag, _ in page.tags)
    assert any(attrs.get("class") == "named" for tag, attrs in page.tags if tag == "tr")

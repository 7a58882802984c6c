"""The changes and refusals of the steps of a record, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from channelfold.runtime.report.tables import UNKNOWN, Cell, Page, number, ratio, told

_EXAMPLES, _SITES = 3, 12


def show(record: Mapping[str, Any], page: Page) -> None:
    """Prints ``steps`` of a record."""
    rows = [_row(step) for step in record["steps"]]
    page.table("Steps", ("<kind", ">changed", ">refused", ">seconds", "<verified rel. error"), rows)
    for step in record["steps"]:
        if page.whole:
            _done(step, page)
        _quantized(step, page)
        if page.whole:
            _ranges(step, page)
        _sites(step, page)
        _cut(step, page)
        _refused(step, page)


def _row(step: Mapping[str, Any]) -> tuple[Cell, ...]:
    changed, refused = (str(len(step[key])) for key in ("changed", "refused"))
    return step["pass"], step["kind"], changed, refused, f"{step['seconds']:.1f}", _verified(step.get("verified"))


def _verified(verified: Mapping[str, Any] | None) -> Cell:
    if not verified:
        return UNKNOWN, "dim"
    if "unverified" in verified:
        return f"no: {verified['unverified']}", "yellow"
    probes = verified["probes"]
    return f"{number(verified['max_rel_error'], '{:.2g}')}, {probes} probe{'s' * (probes != 1)}", "green"


def _done(step: Mapping[str, Any], page: Page) -> None:
    """Names a pass that has done something, its options and what it has changed."""
    if not (step["changed"] or step["refused"]):
        return
    page.say((step["pass"], "bold"), indent=0)
    if step["options"]:
        given = (f"{name.replace('_', '-')} {told(value)}" for name, value in step["options"].items())
        page.note(f"options: {', '.join(given)}")
    if step["changed"]:
        rows = [(change["node"], change["what"]) for change in step["changed"]]
        page.nodes(rows, 0, [(f"{len(rows)} x ", "bold"), "changed"])


def _ranges(step: Mapping[str, Any], page: Page) -> None:
    """Shows what each site reads and its weight: ranges, what is clipped of them, what int8 leaves of them."""
    facts = step.get("facts", {})
    rows, depth = [], []
    for site in facts.get("ranges", ()):
        seen = facts.get("activations", {}).get(site["tensor"], {})
        ends = (number(seen.get(key, ""), "{:.4g}") for key in ("minimum", "maximum", "low", "high"))
        ratios = (number(seen.get(key, ""), "{:.1f}") for key in ("snr_db", "row_snr_db"))
        clipped = number(site.get("clipped", ""), "{:.4%}")
        weight = number(site["weight"], "{:.4g}"), ratio(site["weight_outliers"])
        rows.append((site["node"], site["op"], *ends, clipped, *ratios, *weight, site["tensor"]))
        depth += [(site["node"], seen["snr_db"])] if seen else []
    if rows:
        ends = (">lowest", ">highest", ">int8 from", ">int8 to", ">clipped")
        columns = ("<op", *ends, ">SNR dB", ">median row dB", ">weight", ">weight outliers", "<reads")
        page.curve("SNR of the activations as int8 along the depth", "dB", {"": depth})
        outliers = [(site["node"], site["weight_outliers"]) for site in facts["ranges"]]
        page.curve("Outliers of the weights along the depth, largest channel against the median", "x", {"": outliers})
        page.fill("Ranges", columns, rows)
        page.note("weight: its largest value; outliers: the largest of its channels against the median")


def _quantized(step: Mapping[str, Any], page: Page) -> None:
    facts = step.get("facts", {})
    if "quantized" not in facts or "linears" not in facts:
        return
    counts = {**dict(sorted(facts.get("by_op", {}).items())),
              "all linear nodes": {"quantized": facts["quantized"], "total": facts["linears"]}}  # fmt: skip
    pairs = [(op, of["quantized"], of["total"]) for op, of in counts.items()]
    rows = [(op, f"{done} of {total}", f"{total - done} left in float" * (done < total)) for op, done, total in pairs]
    page.blank()
    page.table("Quantized", (">", "<"), rows)


def _sites(step: Mapping[str, Any], page: Page) -> None:
    """Prints the changes that a pass has made to the channels of each site, the worst sites first."""
    facts = step.get("facts", {})
    sites = sorted(facts.get("sites") or map(_ffn_site, facts.get("ffns", ())), key=_badness, reverse=True)
    if not sites:
        return
    used = {key: column for key, column in _SITE.items() if any(site.get(key) for site in sites)}
    headings = [heading for heading, _ in used.values()]
    rows = [
        (site["node"], *(form(site[key]) if site.get(key) else "" for key, (_, form) in used.items()))
        for site in sites[: None if page.whole else _SITES]
    ]
    if "method" in used and page.room(headings, rows) < max(len(name) for name, *_ in rows):
        rows = [(name, method.partition(",")[0], *cells) for name, method, *cells in rows]  # the JSON has its details
    page.blank()
    if page.whole and "outlier_ratio" in used:
        pairs = [(site["node"], site["outlier_ratio"]) for site in facts["sites"] if site.get("outlier_ratio")]
        sides = ((name, [(node, pair[side]) for node, pair in pairs]) for side, name in enumerate(("before", "after")))
        page.curve("Outliers of the activations along the depth, largest channel against the median", "x", dict(sides))
    page.fill(f"By {step['pass']}", headings, rows)
    if len(sites) > _SITES and not page.whole:
        page.note(f"… and {len(sites) - _SITES} more, with --json")
    if legend := [words for key, words in _LEGEND.items() if key in used]:
        page.note("; ".join(legend))
    _tried(facts.get("trial"), page)
    if inserted := sum(site.get("inserted", 0) for site in sites):
        page.say((f"{inserted} node{'s were' if inserted > 1 else ' was'} inserted", "yellow"))


def _tried(trial: Mapping[str, Any] | None, page: Page) -> None:
    """Prints what smoothing does to the outputs of the quantized model."""
    if trial:
        all_, none, kept = (number(trial[key], "{:.1f} dB") for key in ("all", "none", "kept"))
        some = f"{trial['samples']} held-out sample{'s' * (trial['samples'] != 1)}"
        page.say(f"Quantized outputs on {some}: {none} unsmoothed, {all_} with every site, {kept} as kept")


def _ffn_site(ffn: Mapping[str, Any]) -> dict[str, Any]:
    """An FFN in the facts of approximate-ffn, as a site."""
    method = "with a dense branch" if ffn["branch"] else ""
    return {"node": ffn["node"], "method": method, "width": ffn["hidden"], "macs": ffn["macs"],
            "relative_change": ffn["error"]}  # fmt: skip


def _badness(site: Mapping[str, Any]) -> float:
    """The badness of a site: the noise of its quantized outputs, or else the differences of its channels."""
    if "energy_kept" in site:
        return 1 - float(site["energy_kept"])
    for key, sign in (("output_snr_db", -1), ("outlier_ratio", 1), ("bfp_error", 1)):
        if site.get(key):
            return sign * float("inf" if site[key][1] is None else site[key][1])
    return float(site.get("relative_change", 0.0))


def _pair(form: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda pair: " -> ".join(map(form, pair))


_SITE: dict[str, tuple[str, Callable[[Any], str]]] = {
    "method": ("<method", str),
    "width": (">channels", _pair(str)),
    "outlier_ratio": (">outliers", _pair(ratio)),
    "output_snr_db": (">SNR dB", _pair(lambda value: number(value, "{:.1f}"))),
    "bfp_error": (">block error", _pair(lambda value: number(value, "{:.2e}"))),
    "relative_change": (">change", lambda value: number(value, "{:.1e}")),
    "macs": (">MACs", _pair(lambda value: f"{value:,}")),
    "inserted": (">nodes", "{:+d}".format),
    "sparsity": (">zeros", "{:.1%}".format),
    "energy_kept": (">energy kept", "{:.2%}".format),
}  # a key of a site: the heading of its column, and the form of its cells

_LEGEND = {
    "outlier_ratio": "outliers: largest channel against the median",
    "output_snr_db": "SNR: of int8 outputs",
    "bfp_error": "error in blocks that share an exponent",
    "energy_kept": "energy: sum of the squared weights, with data times their squared inputs",
}


def _cut(step: Mapping[str, Any], page: Page) -> None:
    """Prints the channels that ``prune`` has cut."""
    facts = step.get("facts", {})
    if not facts.get("groups"):
        return
    figures = ("channels", "kept", "parameters_saved", "macs_saved")
    rows = [(group["node"], group["op"], *(f"{group[key]:,.0f}" for key in figures)) for group in facts["groups"]]
    columns = ["<op", ">channels", ">kept", ">params saved", ">MACs saved"]
    if page.whole:
        columns.append(">share kept")
        rows = [
            (*row, f"{group['kept'] / group['channels']:.1%}") for row, group in zip(rows, facts["groups"], strict=True)
        ]
    page.blank()
    page.fill("Cut", columns, rows)
    for kind, words in (("macs", "MACs"), ("parameters", "parameters")):
        before, after = facts[kind]["before"], facts[kind]["after"]
        share = f", {after / before:.1%} kept" if before else ""
        page.say(f"{words}: {before:,.0f} -> {after:,.0f}{share}")
    if "latency" in facts:
        page.say(f"time in ONNX Runtime: {facts['latency']['kept']:.1%} kept")
    for name, error in facts.get("output_error", {}).items():
        page.say(f"error of {name!r} on calibration data: {error:.2%} of its variance")
    proof = facts["slice_equals_mask"]
    if proof and "max_rel_error" in proof:
        reconstructed = "; then the layers behind it were reconstructed" if facts["statistics"] else ""
        error = f"{proof['max_rel_error']:.1e} on {proof['probes']} probes"
        page.say(f"The cut equals a mask of the same channels, to {error}{reconstructed}")
    elif proof:
        page.say((f"The cut was not proven: {proof['unverified']}", "yellow"))


def _refused(step: Mapping[str, Any], page: Page) -> None:
    if not step["refused"]:
        return
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for refusal in step["refused"]:
        groups.setdefault(refusal.get("code") or refusal["reason"], []).append(refusal)
    page.blank()
    page.say((f"Left as it was by {step['pass']}", "bold"), indent=0)
    for code, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        reasons = ("" if refusal["reason"].endswith(code) else refusal["reason"] for refusal in group)
        rows = [(refusal["node"], reason) for refusal, reason in zip(group, reasons, strict=True)]
        page.nodes(rows, _EXAMPLES, [(f"{len(group)} x ", "bold"), code])

"""What the search of ``channelfold compress`` finds on the open set, and what ``--float-share`` keeps.

    python benchmarks/search.py [SUBJECT …] [--dir DIR] [--json FILE] [--write]

For every subject: the SNR of the worst output, all in int8 and with 5, 10 and 20 % of the linear nodes in float, ranked
by the measured sensitivities; then a search for 1 % loss: what it predicts and measures along the front, the file, the
samples that it runs (as passes over 64 samples), and its processor time beside that of the float model on 64 samples.
Measured on samples that nothing was calibrated on: for EfficientNet-Lite0 the first 40 crops of its accuracy task, else
every third sample of the calibration data, which is then left out of the calibration.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness import add_results, channelfold, keep, known, parser, table, write

SHARES = (0.0, 0.05, 0.1, 0.2)
SUBJECTS = {  # file, calibration data, recipe
    "crepe_tiny": ("crepe_tiny.onnx", "crepe_tiny.npz", "int8"),
    "effnet": ("effnet_lite0.bn.onnx", "effnet.npz", "int8"),
    "minilm": ("minilm.onnx", "minilm", "int8"),
    "minilm smooth": ("minilm.onnx", "minilm", "int8-smooth"),
    "imgfocus": ("vit_s_focus.onnx", "imgfocus.npz", "int8"),
    "ocr_rec": ("ocr_rec.onnx", "ocr_rec", "int8"),
}
CROPS = 40


def samples(source: Path) -> Iterator[dict[str, np.ndarray]]:
    """The samples of a file, or of a folder of files, one by one."""
    for file in sorted(source.iterdir()) if source.is_dir() else [source]:
        with np.load(file) as stored:
            arrays = dict(stored)
        for i in range(len(next(iter(arrays.values())))):
            yield {name: values[i : i + 1] for name, values in arrays.items()}


def split(source: Path, folder: Path, name: str) -> tuple[Path, Path]:
    """(calibration, evaluation) as folders of samples."""
    found = list(samples(source))
    parts = {"calibration": [s for i, s in enumerate(found) if i % 3], "evaluation": found[::3]}
    if name == "effnet":
        from tasks.images import crop, lite_input, random_windows
        from tasks.sources import photos

        views = list(photos().values())
        windows = list(random_windows(views, 200, np.random.default_rng(0)))[:CROPS]
        crops = [{"image": lite_input(crop(views, window)[None])} for window in windows]
        parts = {"calibration": found, "evaluation": crops}
    for part, feeds in parts.items():
        (folder / part).mkdir()
        for i, feed in enumerate(feeds):
            np.savez(folder / part / f"{i:03}.npz", **feed)  # pyright: ignore[reportArgumentType]
    return folder / "calibration", folder / "evaluation"


def compressed(model: Path, data: tuple[Path, Path], out: Path, *flags: str) -> tuple[dict[str, Any], float]:
    """The record of a command, and its processor time in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = channelfold("compress", model, "-o", out, "--calibration", data[0], "--evaluation", data[1], *flags)
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    if done.returncode not in (0, 3):
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def snr(record: dict[str, Any]) -> float:
    return min(float(o["snr"]) for o in record["accuracy"]["outputs"] if o["snr"] is not None)


def measured(model: Path, source: Path, recipe: str, name: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = split(source, root, name)
        for share in SHARES:
            flags = ("--recipe", recipe, "--float-share", str(share))
            record, row[f"{share:.0%} cpu"] = compressed(model, data, root / "share", *flags)
            row[f"{share:.0%}"] = snr(record)
        record, row["cpu"] = compressed(model, data, root / "search", "--recipe", recipe, "--max-loss", "1%")
        found = record["search"]
        points = [p for p in found["points"] if p["cost"] < 1 and len(p["options"]) > 1]
        chosen = next(p for p in found["points"] if p["chosen"])
        gaps = [p["error_db"] - p["predicted_db"] + found["kappa_db"] for p in points if p["predicted_db"] < 200]
        row |= {
            "met": found["met"], "kappa": found["kappa_db"], "gaps": gaps, "runs": found["runs"],
            "bytes": record["output"]["bytes"] / record["model"]["bytes"], "cost": chosen["cost"],
            "loss": chosen["proof"]["loss"], "high": chosen["proof"]["high"], "what": found["loss"],
            "snr": snr(record), "start": chosen["start"],
        }  # fmt: skip
    return row


def line(name: str, row: dict[str, Any]) -> list[str]:
    near = sum(abs(gap) <= 1 for gap in row["gaps"])
    return [
        name,
        *(f"{row[f'{share:.0%}']:.1f}" for share in SHARES),
        f"{row['bytes']:.0%} / {row['cost']:.0%}",
        f"{row['snr']:.1f}",
        f"{row['loss']:.2%} (to {row['high']:.2%})" + ("" if row["met"] else " missed"),
        f"{near} of {len(row['gaps'])}",
        f"{(sum(row['runs'].values()) - row['runs']['proof']) / 64:.1f}",
        f"{row['cpu']:.0f} s",
    ]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    add_results(made, "search.md")
    args = made.parse_args()
    rows = known(args.json)
    for name in args.subjects or SUBJECTS:
        file, data, recipe = SUBJECTS[name]
        rows[name] = measured(args.dir / "open" / file, args.dir / "calibration" / data, recipe, name)
        keep(args.json, rows)
        print(name, json.dumps(rows[name]), file=sys.stderr)
    header = ("model", "int8 dB", "5 % float", "10 %", "20 %", "search: bytes / cost", "dB", "loss", "within 1 dB",
              "passes", "user CPU")  # fmt: skip
    text = table(header, [line(name, row) for name, row in rows.items()])
    print(text)
    if args.write:
        says = "Loss: of argmaxes where the model scores classes, else of the energy of the outputs; to: end of the "
        says += "interval of 95 %. Within 1 dB: mixed points of the front whose prediction is that near, after one "
        says += "factor. Passes: what was measured before the proof, in units of 64 samples."
        write("search.md", "# Search and float share\n\n`python benchmarks/search.py --write`", text, says)


if __name__ == "__main__":
    main()

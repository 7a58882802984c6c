"""MiniLM with its linear layers in 4 bits, in groups of 128: channelfold beside the quantizers of ONNX Runtime.

    python benchmarks/int4.py [--dir DIR] [--json FILE] [--write]

All are fitted on the same 400 texts (6,676 tokens) and compared on 200 texts that nothing was fitted to: the SNR of
both outputs against the float model, with products in float. Embeddings stay float.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
from harness import HERE, add_results, channelfold, keep, known, parser, run, table, write

OURS = {
    "nearest": ("int4", "nearest"),
    "search": ("int4", "search"),
    "gptq": ("int4", "gptq"),
    "gptq, corrected": ("int4", "gptq", "--correct-inputs"),
    "descent, corrected": ("int4", "descent", "--correct-inputs"),
    "search, zero points": ("uint4", "search"),
    "gptq, zero points": ("uint4", "gptq"),
    "descent, corrected, zero points": ("uint4", "descent", "--correct-inputs"),
}
PEERS = ("RTN", "RTN, zero points", "HQQ, zero points", "k-quant, zero points", "GPTQ", "GPTQ, zero points")


def main() -> None:
    made = parser(__doc__)
    add_results(made, "int4.md")
    options = made.parse_args()
    rows, model = known(options.json), options.dir / "open/minilm.onnx"
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch), Path(scratch, "model.onnx")
        child = [str(options.dir / "venv/bin/python"), str(HERE / "int4_peers.py"), str(options.dir)]
        run([*child, "texts", scratch])
        exact = outputs(model, folder / "unseen")
        ways = {f"channelfold {name}": ours(model, out, folder, *flags) for name, flags in OURS.items()}
        ways |= {f"ONNX Runtime {name}": [*child, name, scratch, str(model), str(out)] for name in PEERS}
        for name, command in ways.items():
            if name in rows:
                continue
            before = spent()
            run(command)
            seconds = spent() - before
            found = outputs(out, folder / "unseen")
            rows[name] = {"snr_db": [snr(exact[key], found[key]) for key in exact], "seconds": seconds}
            keep(options.json, rows)
            print(f"{name} done", file=sys.stderr)
    printed = [(name, *(f"{db:.1f}" for db in row["snr_db"]), f"{row['seconds']:.0f}") for name, row in rows.items()]
    text = table(("quantizer", "tokens dB", "sentence dB", "core-seconds"), printed)
    print(text)
    if options.write:
        write("int4.md", "# 4 bits by several quantizers", (__doc__ or "").split("\n\n")[2], text)


def ours(model: Path, out: Path, folder: Path, weights: str, rounder: str, *flags: str) -> list[str]:
    data = () if rounder == "nearest" else ("--calibration", folder / "fit")
    made = ("--weights", weights, "--rounder", rounder, "--target", "onnxruntime", "--no-embeddings", *flags)
    return channelfold("quantize", model, "-o", out, *data, *made, "--weights-only")


def outputs(model: Path, folder: Path) -> dict[str, list[np.ndarray]]:
    """Every output on every text, with products in float."""
    from channelfold.runtime.io.session import Session

    session = Session(model, optimize=False)
    found: dict[str, list[np.ndarray]] = {}
    for path in sorted(folder.glob("*.npz")):
        for name, values in session.run(dict(np.load(path))).items():
            found.setdefault(name, []).append(values.astype(np.float64))
    return found


def snr(wanted: list[np.ndarray], found: list[np.ndarray]) -> float:
    lost = sum(np.square(a - b).sum() for a, b in zip(wanted, found, strict=True))
    return float(10 * np.log10(sum(np.square(a).sum() for a in wanted) / lost))


def spent() -> float:
    """The core-seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()

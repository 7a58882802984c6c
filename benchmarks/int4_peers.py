"""For ``int4.py``, in the open set's own Python: texts for MiniLM, and the quantizers of ONNX Runtime.

python benchmarks/int4_peers.py DIR texts FOLDER            FOLDER/fit and FOLDER/unseen, a file a text
python benchmarks/int4_peers.py DIR WAY FOLDER MODEL OUT    OUT, the linear layers in 4 bits in groups of 128
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tasks.base import OpenSet
from tasks.sources import definitions, sentences
from tasks.text import PAIRS, tokenized

WAYS = {  # whether symmetric, and the name of the configuration
    "RTN": (True, "Default"),
    "RTN, zero points": (False, "Default"),
    "HQQ, zero points": (False, "HQQ"),
    "k-quant, zero points": (False, "KQuant"),
    "GPTQ": (True, "GPTQ"),
    "GPTQ, zero points": (False, "GPTQ"),
}


def texts(open_set: OpenSet, folder: Path) -> None:
    """400 texts to fit, 200 unseen ones: half of them sentences, half nouns and definitions beyond the task's own."""
    corpus, pairs = sentences(open_set), definitions(open_set)[PAIRS:]
    order = np.random.default_rng(7).permutation(len(corpus))
    parts = {"fit": (order[:150], pairs[100:225]), "unseen": (order[5000:5100], pairs[2000:2050])}
    for name, (lines, chosen) in parts.items():
        (folder / name).mkdir()
        both = [corpus[i] for i in lines] + [side for pair in chosen for side in pair]
        for i, text in enumerate(both):
            np.savez(folder / name / f"{i:03}.npz", **tokenized(open_set, [text]))  # pyright: ignore[reportArgumentType]


def quantize(way: str, folder: Path, model: Path, out: Path) -> None:
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as ort
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self):
            self._feeds: Iterator[dict[str, Any]] = (dict(np.load(p)) for p in sorted((folder / "fit").glob("*.npz")))

        def get_next(self):
            return next(self._feeds, None)

        def __deepcopy__(self, memo):
            return Reader()

    symmetric, kind = WAYS[way]
    options: dict[str, Any] = {"Default": {"block_size": 128, "is_symmetric": symmetric}, "HQQ": {"block_size": 128},
                               "GPTQ": {"calibration_data_reader": Reader()}, "KQuant": {}}[kind]  # fmt: skip
    config = getattr(ort, f"{kind}WeightOnlyQuantConfig")(**options)
    done = ort.MatMulNBitsQuantizer(
        onnx.load(model), block_size=128, is_symmetric=symmetric, accuracy_level=1, algo_config=config
    )
    done.process()
    done.model.save_model_to_file(str(out))


if __name__ == "__main__":
    given, command, scratch, *rest = sys.argv[1:]
    if command == "texts":
        texts(OpenSet(Path(given).resolve()), Path(scratch))
    else:
        quantize(command, Path(scratch), *map(Path, rest))

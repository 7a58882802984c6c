"""Layers that GPTQ has rounded, kept in a folder: a run that was killed goes on with the next layer.

The name of a file is the hash of all that the codes depend on: the graph with its weights, the data, the options of the
pass, the node, the version. So a file that is found can be used, and a folder may serve several runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import onnx

import channelfold
from channelfold.passes.base import Pass
from channelfold.passes.layers.linear import Linear
from channelfold.passes.quantize.rounders import Rounded
from channelfold.runtime.data.sources import Data
from channelfold.runtime.io.files import packed, writing
from channelfold.runtime.io.snapshot import Snapshot


class Done:
    """The rounded layers in a folder; without a folder there are none, and none are kept."""

    def __init__(self, folder: Path | None, before: Snapshot, data: Data, step: Pass):
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            depends = [channelfold.__version__, before.fingerprint(), data.fingerprint, len(data), step.options()]
            self._run = json.dumps([step.name, *depends], sort_keys=True)

    def find(self, site: Linear) -> Rounded | None:
        if self._folder is None:
            return None
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none, or damaged
            with self._path(site).open("rb") as file, np.load(file, allow_pickle=False) as found:
                values = dict(found)
            kind, *dims = map(int, values.pop("type"))
            proto = onnx.TensorProto(data_type=kind, dims=dims, raw_data=values.pop("codes").tobytes())
            return Rounded(onnx.numpy_helper.to_array(proto), **values)
        return None

    def keep(self, site: Linear, layer: Rounded) -> None:
        if self._folder is None:
            return
        codes = layer.codes
        kind = onnx.helper.np_dtype_to_tensor_dtype(codes.dtype)
        rest = {name: value for name, value in vars(layer).items() if name != "codes" and value is not None}
        with writing(self._path(site)) as file:
            bits = packed(codes).reshape(-1).view(np.uint8)
            np.savez(file, codes=bits, type=np.array([kind, *codes.shape]), **rest)  # pyright: ignore[reportArgumentType]

    def _path(self, site: Linear) -> Path:
        assert self._folder is not None
        digest = hashlib.sha256(f"{self._run} {site.name}".encode()).hexdigest()
        return self._folder / f"rounded-{digest[:32]}.npz"

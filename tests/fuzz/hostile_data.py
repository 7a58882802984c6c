"""Data sets as they should not be, for an input x of float32[N, 8]: .npz and .npy files, and folders of them."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

HUGE = (-1, 0, 1, 3, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63), 1 << 64)
Rng = np.random.Generator


def _pick(rng: Rng, items):
    return items[int(rng.integers(len(items)))]


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue()


def header(text: str, values: bytes = bytes(64), version: tuple[int, int] = (1, 0)) -> bytes:
    """An .npy file with any header."""
    raw = text.encode("latin1", errors="replace") + b"\n"
    length = struct.pack("<H", len(raw) & 0xFFFF) if version == (1, 0) else struct.pack("<I", len(raw))
    return b"\x93NUMPY" + bytes(version) + length + raw + values


def npz(members: dict[str, bytes], compressed: bool = False) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def sound(rng: Rng, samples: int = 4) -> np.ndarray:
    return rng.standard_normal((samples, 8)).astype(np.float32)


def _values(rng: Rng) -> bytes:
    """Arrays that numpy can write and the model cannot take, or hardly."""
    x = sound(rng)
    spoilt = x.copy()
    spoilt[int(rng.integers(4)), 3] = _pick(rng, [np.nan, np.inf, -np.inf, 3e38, 1e-45])
    choices = (
        spoilt,
        x.astype(np.float64),
        x.astype(np.float16),
        x.astype(np.int64),
        x.astype(bool),
        x.astype(complex),
        x.astype("S4"),
        x.astype("U8"),
        x.astype(">f4"),
        x.astype(object),
        np.asfortranarray(x),
        x[:0],
        x[:, :0],
        x[:, :7],
        x[0],
        x[0, 0],
        x[None],
        x[None, None],
        x.T,
        x * 1e30,
        x * 0,
        x.astype(np.float64) * 1e300,
        np.zeros((4, 8), [("a", "f4"), ("b", "i4")]),
        np.zeros(4, "M8[s]"),
        np.array([["a"] * 8]),
        np.ma.masked_less(x, 0).data,
    )
    return npy(np.asarray(_pick(rng, choices)))


def _headers(rng: Rng) -> bytes:
    shape = f"({_pick(rng, HUGE)}, {_pick(rng, [8, *HUGE])})"
    texts = (
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 8), }"[: int(rng.integers(50))],
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '<V9', 'fortran_order': True, 'shape': (2, 8), }",
        "{'descr': [('a', '<f4', (1000000000,))], 'fortran_order': False, 'shape': (2,), }",
        "(" * 3000,
        "{'descr': " + "[" * 500,
        "__import__('os').system('touch pwned')",
        "{}",
        "\0" * 40,
        "9" * 9000,
        "{'descr': '<f4', 'fortran_order': 7, 'shape': (4, 8), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 4, }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4.5, 8), }",
        "{'descr': None, 'fortran_order': False, 'shape': ()}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 8), }",
    )
    return header(_pick(rng, texts), rng.bytes(int(rng.integers(200))), _pick(rng, [(1, 0), (2, 0), (3, 0), (9, 9)]))


def _damage(rng: Rng, data: bytes) -> bytes:
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 30))
    match _pick(rng, ["cut", "flip", "flip", "drop", "insert", "double", "empty"]):
        case "cut":
            return data[:at]
        case "flip":
            changed = bytearray(data)
            changed[at] ^= 1 << int(rng.integers(8))
            return bytes(changed)
        case "drop":
            return data[:at] + data[at + length :]
        case "insert":
            return data[:at] + rng.bytes(length) + data[at:]
        case "double":
            return data + data
    return b""


def _archive(rng: Rng) -> bytes:
    x = npy(sound(rng))
    odd = {
        "up": {"../x.npy": x, "x.npy": x},
        "folder": {"a/x.npy": x},
        "root": {"/x.npy": x},
        "none": {"x.txt": b"x"},
        "two": {"x.npy": x, "y.npy": npy(sound(rng, 3))},
        "other": {"input.npy": x},
        "names": {"\x1b[31m.npy": x, "x.npy": x},
        "newline": {"a\nerror: b.npy": x},
        "long": {"n" * 3000 + ".npy": x},
        "many": {f"{i}.npy": x for i in range(800)},
        "nested": {"x.npy": npz({"x.npy": x})},
        "bomb": {"x.npy": npy(np.zeros((1 << 14, 8), np.float32))},
        "empty": {},
        "dot": {".npy": x},
        "bad": {"x.npy": _headers(rng)},
        "values": {"x.npy": _values(rng)},
        "cut": {"x.npy": x[:-7]},
        "positional": {"arr_0.npy": x},
        "two positional": {"arr_0.npy": x, "arr_1.npy": x},
    }
    data = npz(odd[_pick(rng, list(odd))], compressed=bool(rng.random() < 0.5))
    match _pick(rng, ["plain", "plain", "plain", "damage", "flags", "method", "twice", "size", "front"]):
        case "damage":
            return _damage(rng, data)
        case "flags":  # encrypted
            at = data.rfind(b"PK\x01\x02")
            return data[: at + 8] + b"\x01\x00" + data[at + 10 :] if at >= 0 else data
        case "method":
            at = data.rfind(b"PK\x01\x02")
            return data[: at + 10] + b"\x63\x00" + data[at + 12 :] if at >= 0 else data
        case "size":
            at = data.rfind(b"PK\x01\x02")
            return data[: at + 20] + b"\xf0\xff\xff\x7f" * 2 + data[at + 28 :] if at >= 0 else data
        case "front":
            return b"#!/bin/sh\n" + data
        case "twice":
            file = io.BytesIO(data)
            with zipfile.ZipFile(file, "a") as archive:
                archive.comment = b"x" * 60000
            return file.getvalue()
    return data


def _whole(rng: Rng, folder: Path) -> str:
    """A folder of files, or what looks like one."""
    data = folder / "data"
    data.mkdir()
    for name in range(3):
        (data / f"{name}.npz").write_bytes(npz({"x.npy": npy(sound(rng, int(rng.integers(1, 5))))}))
    match _pick(
        rng,
        ["link", "loop", "fifo", "folder", "mixed", "broken", "hidden", "name", "values", "shapes", "none", "image"],
    ):
        case "link":
            (data / "9.npz").symlink_to(data / "nowhere.npz")
        case "loop":
            (data / "9.npz").symlink_to(data / "9.npz")
        case "fifo":
            os.mkfifo(data / "9.npz")
        case "folder":
            (data / "9.npz").mkdir()
        case "mixed":
            (data / "9.npy").write_bytes(npy(sound(rng)))
        case "broken":
            (data / "9.npz").write_bytes(_archive(rng))
        case "hidden":
            (data / ".9.npz").write_bytes(b"PK")
        case "name":
            (data / os.fsdecode(b"\xff\xfe\n.npz")).write_bytes(b"")
        case "values":
            (data / "9.npz").write_bytes(npz({"x.npy": _values(rng)}))
        case "shapes":
            (data / "9.npz").write_bytes(npz({"x.npy": npy(np.ones((2, 9), np.float32))}))
        case "image":
            for name in range(3):
                (data / f"{name}.npz").rename(data / f"{name}.jpg")
        case "none":
            for name in range(3):
                (data / f"{name}.npz").unlink()
    return str(data)


def _file(name: str, content: Callable[[Rng], bytes]) -> Callable[[Rng, Path], str]:
    def write(rng: Rng, folder: Path) -> str:
        (folder / name).write_bytes(content(rng))
        return str(folder / name)

    return write


def _odd_path(rng: Rng, folder: Path) -> str:
    os.mkfifo(folder / "pipe.npz")
    (folder / "link.npz").symlink_to("/dev/zero")
    (folder / "bytes.npz").write_bytes(npz({"x.npy": npy(sound(rng))}))
    names = (
        "pipe.npz",
        "link.npz",
        "",
        "gone.npz",
        "bytes.npz/x",
        "a\nerror: b.npz",
        "n" * 300 + ".npz",
        ".",
        "\udcff.npz",
    )
    name = _pick(rng, names)
    return str(folder / name) if name else ""


KINDS = (
    _file("c.npy", _values),
    _file("c.npy", _headers),
    _file("c.npy", lambda rng: _damage(rng, npy(sound(rng)))),
    _file("c.npz", _archive),
    _file("c.npz", _archive),
    _file("c.npz", lambda rng: npz({"x.npy": _values(rng)})),
    _file("c.npz", lambda rng: _damage(rng, npz({"x.npy": npy(sound(rng))}))),
    _whole,
    _whole,
    _odd_path,
)


def hostile(rng: Rng, folder: Path) -> str:
    """Writes a data set into a folder and returns its path."""
    return _pick(rng, KINDS)(rng, folder)

"""Values of constants: where they lie, what reading them costs, and which files are not opened."""

from __future__ import annotations

import gc
import os
import resource
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from channelfold.runtime.errors import ModelError, OutputError
from channelfold.runtime.io.files import constant, free_name, import_model, load, read, save, stored
from channelfold.runtime.io.weights import DataFolder, MappedFile, MappedValues, Scratch, packed, tensor_proto


def _external(location: str, *, dims=(300,), **entries) -> TensorProto:
    proto = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        proto.external_data.add(key=key, value=str(value))
    return proto


def _values(proto: TensorProto, folder: Path):
    return DataFolder(folder / "model.onnx").values(proto)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    np.arange(1000, dtype=np.float32).tofile(tmp_path / "model" / "data")
    np.arange(1000, dtype=np.float32).tofile(tmp_path / "outside")
    return tmp_path / "model"


def test_external_data(folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "data").write_bytes((folder / "data").read_bytes())
    for location, entries, start in [
        ("data", {}, 0),
        ("data", {"offset": 40, "length": 1200}, 10),
        ("./data", {"offset": 40}, 10),
        ("deep/data", {"offset": "4"}, 1),
        ("deep\\data", {"offset": "4"}, 1),
    ]:
        values = _values(_external(location, **entries), folder)
        assert isinstance(values, MappedValues)
        assert np.array_equal(values.load(), np.arange(start, start + 300))
    small = _values(_external("data", dims=[3], offset=8), folder)
    assert isinstance(small, np.ndarray)
    assert small.tolist() == [2, 3, 4]
    assert _values(_external("nowhere", dims=[3, 0]), folder).shape == (3, 0)


@pytest.mark.parametrize(
    ("location", "entries", "message"),
    [
        ("missing", {}, "are missing: there is no file .*missing. Put it beside the model"),
        ("", {}, "point to '', outside"),
        ("../outside", {}, r"point to '\.\./outside', outside the model's folder"),
        ("deep/../../outside", {}, "outside the model's folder"),
        ("/etc/passwd", {}, "outside the model's folder"),
        ("..\\outside", {}, "outside the model's folder"),
        ("C:\\outside", {}, "outside the model's folder"),
        ("C:outside", {}, "outside the model's folder"),
        ("link", {}, "the link 'link' leaves the model's folder"),
        ("linked/outside", {}, "the link 'linked/outside' leaves the model's folder"),
        (".", {}, "are missing"),
        ("data\0", {}, "are broken: .*null"),
        ("x" * 5000, {}, "cannot be read: .*File name too long"),
        ("data", {"offset": 2804}, r"need bytes 2804 to 4004 of data, which has 4000. The file is truncated"),
        ("data", {"offset": 2**63}, "need bytes 9223372036854775808 to"),
        ("data", {"offset": -4}, "are broken: 1200 bytes at -4"),
        ("data", {"offset": "one"}, "are broken: invalid literal"),
        ("data", {"length": "1e3"}, "are broken: invalid literal"),
        ("data", {"length": 1199}, "1199 bytes at 0 are declared, its type and shape need 1200"),
        ("data", {"length": 10**30}, "are declared, its type and shape need 1200"),
        ("data", {"offset": "9" * 5000}, "are broken: Exceeds the limit"),
    ],
    ids=str,
)
def test_external_data_that_are_refused(folder, location, entries, message):
    (folder / "link").symlink_to(folder.parent / "outside")
    (folder / "linked").symlink_to(folder.parent)
    with pytest.raises(ModelError, match=f"'w'.*{message}"):
        _values(_external(location, **entries), folder)


@pytest.mark.parametrize(
    "change",
    [
        {"dims": [-300]},
        {"dims": [2**62, 2**62]},
        {"dims": [2**32, 2**32, 300]},  # 300 elements in 64-bit arithmetic
        {"data_type": 0},
        {"data_type": 99},
        {"data_type": TensorProto.STRING},
    ],
    ids=str,
)
def test_tensors_that_make_no_sense(folder, change):
    proto = _external("data")
    for field, value in change.items():
        proto.ClearField(field)
        proto.MergeFrom(TensorProto(**{field: value}))
    with pytest.raises(ModelError, match=r"data of tensor 'w' (are broken|need bytes)"):
        _values(proto, folder)


def test_data_without_a_folder():
    with pytest.raises(ModelError, match="cannot be found: the model has no folder"):
        DataFolder(None).values(_external("data"))


def test_a_mapping_outlives_its_file(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"a" * (2 << 20))
    file = MappedFile(path)
    assert file.is_at_its_path()
    path.with_name("new").write_bytes(b"b" * (2 << 20))
    path.with_name("new").replace(path)
    assert not file.is_at_its_path()
    assert file.data[-1:] == b"a"
    path.unlink()
    assert not file.is_at_its_path()
    assert file.data[:1] == b"a"


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counting, nothing more


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_a_thousand_weights_take_few_file_descriptors(tmp_path):
    gc.collect()
    before = _descriptors()
    path = tmp_path / "m.onnx"
    weights = [numpy_helper.from_array(np.full(300, i, np.float32), f"w{i}") for i in range(1000)]
    nodes = [helper.make_node("Sum", [w.name for w in weights], ["y"])]
    out = helper.make_tensor_value_info("y", 1, [300])
    model = helper.make_model(helper.make_graph(nodes, "g", [], [out], weights))
    onnx.save(model, path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0)
    graph = load(path)
    arrays = [read(t) for t in graph.nodes[0].inputs]
    kept = [stored(graph, np.full(300_000, i, np.float32)) for i in range(100)]
    assert [int(v.load()[-1]) for v in kept] == list(range(100))
    assert [int(a[0]) for a in arrays] == list(range(1000))
    assert _descriptors() - before < 20  # the scratch file and its mappings; each data file is small, so it was read
    del arrays, kept, graph
    gc.collect()
    assert _descriptors() == before


def _graph() -> gs.Graph:
    return import_model(
        onnx.parser.parse_model('<ir_version: 8, opset_import: ["":17]> g (float[2] x) => (float[2] x) {}')
    )


def test_new_weights_go_to_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    graph = _graph()
    values = np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)
    first, second = constant(graph, "w", values), constant(graph, "w", values.T)
    assert (first.name, second.name) == ("w", "w_1")
    assert isinstance(first._values, MappedValues)
    assert isinstance(stored(graph, values[0]), np.ndarray)  # small
    assert isinstance(stored(gs.Graph(), values), np.ndarray)  # made by hand: nowhere to keep it
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size >= 2 * values.nbytes
    assert np.array_equal(read(first), values)
    assert np.array_equal(read(second), values.T)
    assert first._values.offset % 4096 == second._values.offset % 4096 == 0
    array = read(second)
    assert not array.flags.writeable
    del graph, first, second
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    assert np.array_equal(array, values.T)  # an array that someone still holds stays readable


def test_a_full_disk_while_spilling(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    graph = _graph()
    kept = stored(graph, np.ones(300_000, np.float32))
    monkeypatch.setattr(Scratch, "append", full)
    with pytest.raises(OutputError, match=r"No room for new weights in .*No space left.* Set TMPDIR to a larger disk"):
        stored(graph, np.ones(300_000, np.float32))
    assert kept.load().all()


def test_a_file_size_limit_while_spilling():
    """The kernel refuses in the middle of a weight; what was spilled before is untouched."""
    scratch = Scratch()
    first = scratch.append(np.ones(1 << 20, np.uint8))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            scratch.append(np.ones(8 << 20, np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = scratch.append(np.full(4 << 20, 2, np.uint8))
    assert scratch.data[first : first + (1 << 20)] == b"\1" * (1 << 20)
    assert scratch.data[again : again + (4 << 20)] == b"\2" * (4 << 20)


def test_free_names():
    graph = _graph()
    assert [free_name(graph, name) for name in ("x", "x", "y", "y")] == ["x_1", "x_2", "y", "y_1"]


@pytest.mark.parametrize(("kind", "bits"), [("INT4", 4), ("UINT4", 4), ("INT2", 2), ("UINT2", 2), ("FLOAT4E2M1", 4)])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 4099])
def test_packed(kind, bits, count):
    data_type = TensorProto.DataType.Value(kind)
    values = (np.arange(count) % 2).astype(helper.tensor_dtype_to_np_dtype(data_type))
    assert packed(values).nbytes == (count * bits + 7) // 8
    assert packed(values).tobytes() == tensor_proto(values, "w").raw_data
    mapped = MappedValues(tensor_proto(values, "w"), Scratch(), 0)
    mapped.file.append(packed(values))
    assert mapped.load().tobytes() == values.tobytes()
    assert packed(mapped).tobytes() == packed(values).tobytes()
    assert tensor_proto(mapped, "v").raw_data == packed(values).tobytes()


def test_weights_at_any_offset_of_the_model_file(tmp_path):
    """The wire format aligns nothing."""
    seen = set()
    for padding in range(8):
        values = np.random.default_rng(padding).standard_normal(1000)
        out = helper.make_tensor_value_info("y", TensorProto.DOUBLE, [1000])
        weight = numpy_helper.from_array(values, "w" + "x" * padding)
        graph = helper.make_graph([helper.make_node("Neg", [weight.name], ["y"])], "g", [], [out], [weight])
        (tmp_path / "m.onnx").write_bytes(helper.make_model(graph, ir_version=8).SerializeToString())
        mapped = load(tmp_path / "m.onnx").nodes[0].inputs[0]._values
        seen.add(mapped.offset % 8)
        assert np.array_equal(mapped.load(), values)
    assert len(seen) > 1


def test_mapped_weights_survive_saving_in_place(tmp_path):
    """The file they came from is replaced, and its offsets with it; they still read the old bytes."""
    path = tmp_path / "m.onnx"
    weights = [numpy_helper.from_array(np.full(300, i, np.float32), f"w{i}") for i in range(5)]
    nodes = [helper.make_node("Sum", ["w4", "w0", "w3", "w1"], ["y"])]
    out = helper.make_tensor_value_info("y", 1, [300])
    path.write_bytes(
        helper.make_model(helper.make_graph(nodes, "g", [], [out], weights), ir_version=8).SerializeToString()
    )
    graph = load(path)
    for external in (True, False, True):
        graph.nodes[0].inputs.pop()
        save(graph, path, external=external)
        assert [int(read(t)[7]) for t in graph.nodes[0].inputs] == [4, 0, 3, 1][: len(graph.nodes[0].inputs)]
        assert [int(read(t)[7]) for t in load(path).nodes[0].inputs] == [4, 0, 3, 1][: len(graph.nodes[0].inputs)]

"""Jobs as Python calls: what they write, what the record says, and that nothing is lost on the way."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console

from channelfold import __version__, models
from channelfold.runtime import jobs
from channelfold.runtime.data.sources import open_data
from channelfold.runtime.errors import DataError, GateError, OutputError, UsageError
from channelfold.runtime.io import files
from channelfold.runtime.io.session import Session
from channelfold.runtime.report import terminal
from channelfold.runtime.stats.compare import Gates
from channelfold.tests.graphs import build, random
from channelfold.tests.shipped import CALIBRATION, DIGITS, EVALUATION, needs_rtx

IMAGES = np.load(EVALUATION)["image"]
QUANTIZED = [
    f"/{block}/conv/Conv" for block in ("residual/first", "residual/second", "widen", "depthwise", "pointwise")
]


def outputs(path: Path) -> np.ndarray:
    return Session(path).run({"image": IMAGES})["logits"]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory) -> tuple[Path, jobs.Record]:
    folder = tmp_path_factory.mktemp("compressed")
    return folder, jobs.compress(DIGITS, folder, source=jobs.Source(CALIBRATION, evaluation=EVALUATION))


# ---- compress ----------------------------------------------------------------------------------------------------


def test_compress_returns_what_it_wrote(compressed):
    folder, record = compressed
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(record))
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "report.html", "report.json"]
    assert (record["schema"], record["tool"], record["command"]) == (1, f"channelfold {__version__}", "compress")
    assert record["model"]["bytes"] == DIGITS.stat().st_size
    assert record["output"]["bytes"] == (folder / "model.onnx").stat().st_size < 0.4 * record["model"]["bytes"]
    assert [step["pass"] for step in record["steps"]][-1] == "quantize"
    assert record["steps"][-1]["facts"]["quantized_nodes"] == QUANTIZED


def test_the_diff_is_on_the_evaluation_data(compressed):
    _, record = compressed
    assert record["data"] == {
        "calibration": "128 samples from digits_calibration.npz",
        "evaluation": "500 samples from digits_evaluation.npz",
    }
    (output,) = record["accuracy"]["outputs"]
    assert (output["name"], output["feeds"], output["elements"]) == ("logits", 500, 5000)
    assert record["accuracy"]["verdict"]["level"] == "ok"


def test_the_diff_is_of_the_written_file(compressed):
    folder, record = compressed
    reference, candidate = outputs(DIGITS).astype(np.float64), outputs(folder / "model.onnx").astype(np.float64)
    snr = 10 * np.log10((reference**2).sum() / ((reference - candidate) ** 2).sum())
    # One sample a run against 500 in one: ONNX Runtime may pick other float kernels, which can flip a rounding.
    assert record["accuracy"]["outputs"][0]["snr"] == pytest.approx(snr, abs=0.1)


def test_without_evaluation_data_the_record_says_so(tmp_path):
    record = jobs.compress(DIGITS, tmp_path, source=jobs.Source(CALIBRATION))
    assert record["data"]["evaluation"] == "the first 16 of 128 samples from digits_calibration.npz"
    assert any("compared on the calibration data" in warning for warning in record["warnings"])


def test_random_data_only_when_asked_for_and_with_a_warning(tmp_path):
    with pytest.raises(DataError, match="needs calibration data"):
        jobs.compress(DIGITS, tmp_path)
    record = jobs.compress(DIGITS, tmp_path, source=jobs.Source(random=2))
    assert record["data"]["calibration"] == "2 random samples (seed 0)"
    assert any("random: neither ranges nor accuracy" in warning for warning in record["warnings"])


def test_data_may_be_python_objects(tmp_path, compressed):
    images = np.load(CALIBRATION)["image"]
    record = jobs.compress(DIGITS, tmp_path, source=jobs.Source([{"image": image[None]} for image in images]))
    assert record["data"]["calibration"] == "128 samples from arrays in memory"
    assert (tmp_path / "model.onnx").read_bytes() == (compressed[0] / "model.onnx").read_bytes()


def test_a_recipe_file_and_overrides(tmp_path):
    (tmp_path / "mine.toml").write_text('[[pass]]\nname = "quantize"\ncalibrator = "entropy"\nexclude = ["/widen/*"]\n')
    options = {"calibrator": "minmax"}
    record = jobs.compress(
        DIGITS, tmp_path / "out", tmp_path / "mine.toml", source=jobs.Source(CALIBRATION), overrides=options
    )
    (step,) = record["steps"]
    assert (step["options"]["calibrator"], step["options"]["exclude"]) == ("minmax", ["/widen/*"])
    assert record["output"]["ops"]["BatchNormalization"] == 6


def test_an_exact_recipe_needs_no_data(tmp_path):
    record = jobs.compress(DIGITS, tmp_path, "fold")
    assert (record["data"], record["accuracy"], record["warnings"]) == ({}, None, [])
    assert [step["verified"]["max_rel_error"] < 1e-4 for step in record["steps"] if step["changed"]] == [True]


def test_an_interrupted_call_is_taken_up(tmp_path, compressed):
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "save":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.compress(DIGITS, tmp_path, source=jobs.Source(CALIBRATION), progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
    record = jobs.compress(DIGITS, tmp_path, source=jobs.Source(CALIBRATION))
    steps = len(record["steps"])
    assert f"{steps} of {steps} steps were done by an earlier, interrupted call" in record["warnings"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "report.html", "report.json"]
    assert (tmp_path / "model.onnx").read_bytes() == (compressed[0] / "model.onnx").read_bytes()


def test_a_missed_gate_is_raised_with_the_record_after_everything_is_written(tmp_path):
    with pytest.raises(GateError, match="wanted at least 200") as caught:
        jobs.compress(DIGITS, tmp_path, source=jobs.Source(CALIBRATION), gates=Gates(min_snr=200))
    assert isinstance(caught.value, jobs.GateMissed)
    assert caught.value.record["accuracy"] == json.loads((tmp_path / "report.json").read_text())["accuracy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "report.html", "report.json"]


def test_a_gate_without_anything_to_measure_is_missed(tmp_path):
    with pytest.raises(GateError, match="not compared"):
        jobs.compress(DIGITS, tmp_path, "fold", gates=Gates(min_snr=20))


def test_a_gate_compares_an_exact_recipe_on_the_calibration_data(tmp_path):
    record = jobs.compress(DIGITS, tmp_path / "plain", "fold", source=jobs.Source(CALIBRATION))
    assert (record["accuracy"], record["warnings"]) == (None, [])  # every step has been verified
    record = jobs.compress(DIGITS, tmp_path / "gated", "fold", source=jobs.Source(CALIBRATION), gates=Gates(min_snr=80))
    assert record["accuracy"]["feeds"] == 16


def test_an_order_that_takes_something_back_is_warned_of(tmp_path):
    (tmp_path / "r.toml").write_text('[[pass]]\nname = "smooth"\n[[pass]]\nname = "equalize"\n')
    record = jobs.compress(DIGITS, tmp_path / "out", tmp_path / "r.toml", source=jobs.Source(CALIBRATION))
    assert record["warnings"][0].startswith("Pass 2 ('equalize') comes after pass 1 ('smooth')")


def test_the_share_left_in_float_is_an_option_of_the_recipe(tmp_path):
    record = jobs.compress(DIGITS, tmp_path, source=jobs.Source(CALIBRATION), overrides={"float_share": 0.5})
    assert record["steps"][-1]["options"]["float_share"] == 0.5


def test_the_smooth_recipe_folds_first(tmp_path):
    record = jobs.compress(DIGITS, tmp_path, "int8-smooth", source=jobs.Source(CALIBRATION, evaluation=EVALUATION))
    assert [step["pass"] for step in record["steps"]][-3:] == ["merge-equal", "smooth", "quantize"]
    (site, *_) = record["steps"][-2]["facts"]["sites"]
    assert site["output_snr_db"][1] > site["output_snr_db"][0]
    assert record["accuracy"]["outputs"][0]["snr"] > 25


def test_progress_tells_the_stages(tmp_path):
    stages: dict[str, None] = {}
    jobs.compress(
        DIGITS, tmp_path, source=jobs.Source(CALIBRATION), progress=lambda stage, *_: stages.update({stage: None})
    )
    assert {"load", "fold-affine", "quantize", "save", "compare"} <= stages.keys()


# ---- fold, quantize ----------------------------------------------------------------------------------------------


def test_fold_is_the_same_function(tmp_path):
    record = jobs.fold(DIGITS, tmp_path / "folded.onnx")
    assert (record["model"]["nodes"], record["output"]["nodes"]) == (25, 17)
    # Relative to the largest logit: float32 rounding through seven layers.
    reference = outputs(DIGITS)
    assert np.abs(outputs(tmp_path / "folded.onnx") - reference).max() < 1e-5 * np.abs(reference).max()


def test_quantize_compares_with_the_original(tmp_path):
    record = jobs.quantize(
        DIGITS, tmp_path / "int8.onnx", source=jobs.Source(CALIBRATION), options={"exclude": ("/widen/*",)}
    )
    assert record["steps"][-1]["facts"]["quantized_nodes"] == [name for name in QUANTIZED if "widen" not in name]
    assert record["accuracy"]["outputs"][0]["snr"] > 25


def test_quantize_weights_only_needs_no_data(tmp_path):
    record = jobs.quantize(DIGITS, tmp_path / "int8.onnx", weights_only=True)
    assert record["output"]["bytes"] < 0.4 * record["model"]["bytes"]
    assert any("4 random samples (seed 0) only" in warning for warning in record["warnings"])


@pytest.fixture(scope="module")
def folded(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("folded") / "folded.onnx"
    jobs.fold(DIGITS, path)
    return path


@pytest.mark.parametrize("method", ["smoothquant", "repq", "equalize"])
def test_smooth_is_the_same_function_and_is_not_compared_again(method, folded, tmp_path):
    record = jobs.smooth(folded, tmp_path / "s.onnx", method, source=jobs.Source(CALIBRATION))
    (step,) = record["steps"]
    assert (bool(step["changed"]), record["accuracy"], record["warnings"]) == (True, None, [])
    assert (record["model"]["ops"], record["model"]["nodes"]) == (record["output"]["ops"], record["output"]["nodes"])
    reference = outputs(DIGITS)
    assert np.abs(outputs(tmp_path / "s.onnx") - reference).max() < 1e-5 * np.abs(reference).max()


def test_smooth_says_when_there_was_nothing_to_do(tmp_path):
    record = jobs.smooth(DIGITS, tmp_path / "s.onnx", "reorder", source=jobs.Source(CALIBRATION))
    assert [step["pass"] for step in record["steps"]] == ["reorder-channels"]
    assert record["warnings"] == ["No channel was changed: the result computes with the weights that the model had"]


@pytest.mark.parametrize("restore", [False, True])
def test_split_and_merge(restore, tmp_path):
    """A hidden layer of 32 whose channel 5 is ten times as large as the others."""
    first = random((32, 32), "first") / 6
    first[:, 5] *= 10
    body = "a = MatMul(x, first)\nh = Relu(a)\ny = MatMul(h, second)"
    graph = build("(float[N,32] x) => (float[] y)", body, kind="float", first=first, second=(32, 32))
    files.save(graph, tmp_path / "m.onnx")
    samples = {"x": random((64, 32), "x").astype(np.float32)}
    options = {"align": 8, "max_extra": 0.3} | ({"restore_width": True, "max_change": 1.0} if restore else {})
    record = jobs.smooth(
        tmp_path / "m.onnx", tmp_path / "s.onnx", "split-merge", source=jobs.Source(samples), options=options
    )
    assert [step["pass"] for step in record["steps"]] == ["split-channels", "merge-channels"][: 1 + restore]
    assert [step["facts"]["sites"][0]["width"] for step in record["steps"]] == [[32, 40], [40, 32]][: 1 + restore]
    assert (record["accuracy"] is None) == (not restore)
    before, after = (Session(tmp_path / name).run(samples)["y"] for name in ("m.onnx", "s.onnx"))
    assert (np.abs(after - before).max() < 1e-5 * np.abs(before).max()) == (not restore)


@pytest.mark.parametrize("method", ["equalize", "reorder"])
def test_what_needs_no_data_takes_none(method, folded, tmp_path):
    record = jobs.smooth(folded, tmp_path / "s.onnx", method)
    assert (record["data"], record["accuracy"]) == ({}, None)


def test_smooth_runs_the_calibration_data_once(folded, tmp_path, monkeypatch):
    """Beside the sample that shapes are measured on and those that a step is verified on."""
    fed = []
    run = Session.run
    monkeypatch.setattr(Session, "run", lambda self, feed, *rest: (fed.append(feed), run(self, feed, *rest))[1])
    source = jobs.Source(CALIBRATION)
    jobs.smooth(folded, tmp_path / "s.onnx", "smoothquant", source=source, options={"roll_back": False})
    assert 128 <= len(fed) <= 128 + 1 + 2 * 3
    fed.clear()
    jobs.smooth(folded, tmp_path / "t.onnx", "smoothquant", source=source)
    right, ranges, trials = 16, 32, 2 + 2 + 4  # samples; trials of all sites, none, halves and quarters
    assert len(fed) <= 128 + 1 + 2 * 3 + right + trials * (ranges + right)


def test_smooth_compares_on_evaluation_data(folded, tmp_path):
    record = jobs.smooth(
        folded, tmp_path / "s.onnx", "fp4-shift", source=jobs.Source(CALIBRATION, evaluation=EVALUATION)
    )
    assert record["accuracy"]["feeds"] == 500
    assert record["accuracy"]["outputs"][0]["snr"] == "inf"  # powers of two round nothing


def test_what_is_approximate_is_compared(folded, tmp_path):
    options = {"absorb_bias": True}
    record = jobs.smooth(folded, tmp_path / "s.onnx", "equalize", source=jobs.Source(CALIBRATION), options=options)
    assert [step["pass"] for step in record["steps"]] == ["equalize", "absorb-bias"]
    assert record["accuracy"]["feeds"] == 16
    assert any("compared on the calibration data" in warning for warning in record["warnings"])


def test_smooth_without_what_it_needs(tmp_path):
    with pytest.raises(UsageError, match="no method 'smothquant'"):
        jobs.smooth(DIGITS, tmp_path / "s.onnx", "smothquant")
    with pytest.raises(DataError, match="needs calibration data"):
        jobs.smooth(DIGITS, tmp_path / "s.onnx")
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_of_a_pass(tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'exclude'"):
        jobs.quantize(DIGITS, tmp_path / "int8.onnx", source=jobs.Source(CALIBRATION), options={"exlude": ("x",)})


def test_a_model_that_refuses_random_inputs_is_not_compared(tmp_path):
    """The Reshape needs 49 values, and random probes of an open axis have 32."""
    nodes = [
        onnx.helper.make_node("Reshape", ["x", "shape"], ["square"]),
        onnx.helper.make_node("MatMul", ["square", "weight"], ["y"]),
    ]
    weights = [
        onnx.numpy_helper.from_array(np.array([7, 7]), "shape"),
        onnx.numpy_helper.from_array(np.eye(7, 32, dtype=np.float32), "weight"),
    ]
    value = onnx.helper.make_tensor_value_info
    inputs, outs = [value("x", 1, [1, "length"])], [value("y", 1, [7, 32])]
    graph = onnx.helper.make_graph(nodes, "square", inputs, outs, weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "square.onnx")
    record = jobs.quantize(tmp_path / "square.onnx", tmp_path / "int8.onnx", weights_only=True)
    assert record["accuracy"] is None
    assert record["warnings"][-1].startswith(
        "The outputs were not compared, because the model does not run on random inputs"
    )


# ---- diff, inspect -----------------------------------------------------------------------------------------------


def test_diff_of_a_model_with_itself():
    record = jobs.diff(
        DIGITS, DIGITS, source=jobs.Source(evaluation=EVALUATION), gates=Gates(min_snr=1e6, min_agreement=1, max_rel=0)
    )
    assert record["accuracy"]["outputs"][0]["snr"] == "inf"
    assert record["warnings"] == ["evaluation data: Not inputs of the model, not fed to it: label"]


def test_diff_names_collapse_in_capitals(tmp_path):
    model = onnx.load(DIGITS)
    weight = next(t for t in model.graph.initializer if t.name == model.graph.node[-1].input[1])
    weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(model, tmp_path / "negated.onnx")
    record = jobs.diff(DIGITS, tmp_path / "negated.onnx", source=jobs.Source(evaluation=EVALUATION))
    assert record["accuracy"]["verdict"]["level"] == "collapsed"
    assert record["warnings"][-1].startswith("THE OUTPUTS HAVE COLLAPSED on 500 samples from ")


def test_opened_data_may_be_passed_on():
    data = open_data(EVALUATION, Session(DIGITS).inputs)
    assert jobs.diff(DIGITS, DIGITS, source=jobs.Source(evaluation=data))["data"] == {
        "evaluation": "500 samples from digits_evaluation.npz"
    }


def test_inspect_counts():
    found = jobs.inspect(DIGITS)["inspection"]
    assert (found["inputs"], found["outputs"]) == (["image: float32[N, 1, 8, 8]"], ["logits: float32[N, 10]"])
    assert found["norms"] == {"BatchNormalization": 6}
    linears = {linear["node"]: linear for linear in found["linears"]}
    assert [name for name, linear in linears.items() if linear["quantizable"]] == QUANTIZED
    assert linears["/stem/conv/Conv"]["reason"] == "fewer than 16 channels"
    depthwise = linears["/depthwise/conv/Conv"]
    assert (depthwise["shape"], depthwise["groups"], depthwise["parameters"]) == ([64, 1, 3, 3], 64, 64 * 9)
    assert depthwise["macs"] == 64 * 9 * 3 * 3  # nine positions
    assert linears["/head/Gemm"]["macs"] == 96 * 10
    convolutions = {"stem": 9 * 32, "first": 32 * 32 * 9, "second": 32 * 32 * 9, "widen": 64 * 32 * 9}
    assert found["macs"] == 36 * sum(convolutions.values()) + 9 * (64 * 9 + 96 * 64) + 960
    # Weights of the linear nodes and 10 biases; gamma, beta, mean and variance of 6 norms; mean and std of the input.
    assert found["parameters"] == sum(linear["parameters"] for linear in linears.values()) + 4 * 320 + 2


def test_inspect_counts_external_data(tmp_path):
    onnx.save(onnx.load(DIGITS), tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    record = jobs.inspect(tmp_path / "m.onnx")
    size = (tmp_path / "m.bin").stat().st_size
    assert record["inspection"]["external_data"] == [{"path": str(tmp_path / "m.bin"), "bytes": size}]
    assert record["model"]["bytes"] == size + (tmp_path / "m.onnx").stat().st_size


# ---- outputs -----------------------------------------------------------------------------------------------------


def test_the_model_is_never_overwritten(tmp_path):
    (tmp_path / "model.onnx").write_bytes(DIGITS.read_bytes())
    with pytest.raises(UsageError, match="is the model itself"):
        jobs.compress(tmp_path / "model.onnx", tmp_path, source=jobs.Source(CALIBRATION))
    assert (tmp_path / "model.onnx").read_bytes() == DIGITS.read_bytes()


def test_a_folder_that_cannot_be_made_is_found_out_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    stages = []
    with pytest.raises(OutputError, match="Nothing can be written in"):
        jobs.compress(
            DIGITS, tmp_path / "file", source=jobs.Source(CALIBRATION), progress=lambda *step: stages.append(step)
        )
    assert not stages


# ---- sparse weights ----------------------------------------------------------------------------------------------


def test_sparsify_shows_every_layer_and_says_what_zeros_are_worth(tmp_path):
    record = jobs.sparsify(DIGITS, tmp_path / "s.onnx", source=jobs.Source(CALIBRATION, evaluation=EVALUATION))
    (step,) = record["steps"]
    assert (step["pass"], len(step["changed"]), len(step["refused"])) == ("sparsify", 5, 2)
    assert record["warnings"][-1].startswith("Zeros save no time in ONNX Runtime. TensorRT can use them from SM 80 on")
    shown = io.StringIO()
    terminal.render(record, Console(file=shown, width=120))
    text = shown.getvalue()
    assert re.search(r"By sparsify +zeros +energy kept", text)
    assert re.search(r"/head/Gemm +50\.0% +\d\d\.\d\d%", text)


# ---- engines -----------------------------------------------------------------------------------------------------


@needs_rtx
@pytest.mark.rtx
def test_build_says_what_runs_as_int8(tmp_path, compressed):
    folder, _ = compressed
    record = jobs.build(folder / "model.onnx", tmp_path / "e.engine", sm=89, shapes=["image:1x1x8x8:8x1x8x8:16x1x8x8"])
    (engine,) = record["engines"]
    assert (engine["sm"], engine["bytes"]) == (89, (tmp_path / "e.engine").stat().st_size)
    assert engine["backend"].startswith("tensorrt_rtx ")
    runs = engine["plan"].pop("nodes")
    assert engine["plan"] == {"readable": True, "reason": "", "int8": 5, "total": 5, "not_int8": []}
    assert sorted(run["runs_as"] for run in runs) == ["float", "float", *["int8"] * 5]


@needs_rtx
@pytest.mark.rtx
def test_the_flag_for_sparse_weights_is_passed_on_and_explained(tmp_path):
    shapes = ["image:1x1x8x8:8x1x8x8:16x1x8x8"]
    record = jobs.build(DIGITS, tmp_path / "e.engine", sm=89, shapes=shapes, sparse_weights=True)
    assert [warning.partition(",")[0] for warning in record["warnings"]] == [
        "e.engine: tensorrt_rtx takes the flag for sparse weights"
    ]


@needs_rtx
@pytest.mark.rtx
def test_compress_builds_an_engine_for_the_shapes_of_the_data(tmp_path):
    record = jobs.compress(DIGITS, tmp_path, source=jobs.Source(CALIBRATION), sms=[86])
    assert [Path(engine["path"]).name for engine in record["engines"]] == ["model.sm86.engine"]
    assert record["engines"][0]["float"]["macs"].keys() == {"float"}
    assert json.loads((tmp_path / "report.json").read_text())["engines"] == json.loads(json.dumps(record["engines"]))


@needs_rtx
def test_an_sm_that_cannot_be_built_for_is_found_out_before_the_work(tmp_path):
    with pytest.raises(UsageError, match="SM 90"):
        jobs.compress(DIGITS, tmp_path / "out", source=jobs.Source(CALIBRATION), sms=[90])
    assert not (tmp_path / "out").exists()


@needs_rtx
def test_build_needs_shapes(tmp_path):
    with pytest.raises(UsageError, match="--shape 'image:"):
        jobs.build(DIGITS, tmp_path / "e.engine", sm=89)


@needs_rtx
def test_a_shape_for_an_unknown_input(tmp_path):
    with pytest.raises(UsageError, match=r"'imag', which is no input\. Did you mean 'image'"):
        jobs.build(DIGITS, tmp_path / "e.engine", sm=89, shapes=["imag:1x1x8x8:1x1x8x8:1x1x8x8"])


# ---- demo --------------------------------------------------------------------------------------------------------


def test_demo_without_tensorrt_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("channelfold.runtime.engine.build._installed", lambda package: False)
    record = jobs.demo(tmp_path)
    assert record["engines"] == []
    assert "pip install polygraphy tensorrt-rtx-cu12" in record["demo"]["no_engines"]
    before, after = record["demo"]["stages"]
    assert (before["name"], after["name"]) == ("float", "int8")
    assert before["accuracy"] == models.MODELS["digits_cnn"].accuracy == 0.998
    assert after["accuracy"] >= 0.99
    assert after["snr"] == pytest.approx(record["accuracy"]["outputs"][0]["snr"], abs=0.01)
    assert [entry["name"].split(",")[0] for entry in record["latency"]] == ["float", "int8"]
    assert json.loads((tmp_path / "report.json").read_text())["demo"] == record["demo"]

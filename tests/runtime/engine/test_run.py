"""The pipe to an engine, with a stand-in for TensorRT; and, where there is a GPU, the real thing."""

import sys

import numpy as np
import pytest

from channelfold.runtime.engine import build as tensorrt
from channelfold.runtime.engine.run import EngineSession
from channelfold.runtime.errors import ModelError

DOUBLE = """
import sys
from channelfold.runtime.engine.run import serve
def infer(feed):
    if "bad" in feed:
        raise RuntimeError("shape outside the profile")
    return {name: value * 2 for name, value in feed.items()}
serve(infer, sys.stdin.buffer, sys.stdout.buffer)
"""


def stand_in(code: str) -> EngineSession:
    return EngineSession("model.engine", "tensorrt", (sys.executable, "-c", code))


def test_feeds_and_results_cross_the_pipe():
    feeds = [
        {"file": np.arange(6, dtype=np.float16).reshape(2, 3), "x/y:0": np.array(3, np.int64)},
        {"x": np.zeros((0, 4), np.float32)},
    ]
    with stand_in(DOUBLE) as session:
        for feed in feeds:
            result = session.run(feed)
            assert set(result) == set(feed)
            for name, value in feed.items():
                assert result[name].dtype == value.dtype
                np.testing.assert_array_equal(result[name], value * 2)


def test_a_failing_feed_is_reported_and_the_next_one_runs():
    with stand_in(DOUBLE) as session:
        with pytest.raises(ModelError, match=r"model.engine failed: shape outside the profile"):
            session.run({"bad": np.zeros(1)})
        assert session.run({"x": np.ones(1)})["x"] == 2


def test_an_engine_that_cannot_be_loaded_says_why():
    code = "import sys; sys.exit('no GPU of this kind')"
    with stand_in(code) as session, pytest.raises(ModelError, match=r"cannot be run: no GPU of this kind"):
        session.run({"x": np.ones(1)})


@pytest.mark.gpu
@pytest.mark.skipif(tensorrt.local_gpu()[0] is None, reason=tensorrt.local_gpu()[1])
def test_engine_agrees_with_onnxruntime(tmp_path):
    from channelfold.models import MODELS, path
    from channelfold.runtime.io.session import Session

    model = MODELS["digits_cnn"]
    images = np.load(path(model.evaluation))[model.input][:1]
    shapes = dict([tensorrt.parse_shape("image:1x1x8x8:1x1x8x8:1x1x8x8")])
    built = tensorrt.build(path(model.onnx), tmp_path / "digits.engine", shapes=shapes)
    expected = Session(path(model.onnx)).run({model.input: images})[model.output]
    with EngineSession(built.path, built.backend) as session:
        actual = session.run({model.input: images})[model.output]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-2 * np.abs(expected).max())  # TF32 has 10 bits

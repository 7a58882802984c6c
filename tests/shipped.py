"""Files that ship with the package, and other things that tests of commands and jobs run with."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from channelfold import cli, models

DIGITS = models.path("digits_cnn.onnx")
CALIBRATION = models.path("digits_calibration.npz")
EVALUATION = models.path("digits_evaluation.npz")
REPAVIT = Path(__file__).parent / "passes" / "fixtures" / "dynamo_20.onnx"
needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra rtx")
COMMANDS = sorted(cli.cli.commands)

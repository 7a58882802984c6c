"""What tests of the command line are run with: shipped files, and the names of the commands."""

from __future__ import annotations

from pathlib import Path

from channelfold import cli, models

DIGITS = models.path("digits_cnn.onnx")


CALIBRATION = models.path("digits_calibration.npz")


EVALUATION = models.path("digits_evaluation.npz")


REPAVIT = Path(__file__).parent / "passes" / "fixtures" / "dynamo_20.onnx"


COMMANDS = sorted(cli.cli.commands)

"""What tests of files need: a place for a model, and a small graph."""

from __future__ import annotations

from pathlib import Path

import onnx_graphsurgeon as gs
import pytest

from channelfold.runtime.io.files import import_model
from channelfold.tests.runtime.io.model_files import model_of


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "dir").mkdir()
    return tmp_path / "dir" / "model.onnx"


@pytest.fixture
def graph() -> gs.Graph:
    return import_model(model_of())

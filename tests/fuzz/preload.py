"""What every run needs, loaded once in the process that the runs are forked from."""

from channelfold.passes import PASSES
from channelfold.runtime.io.session import onnxruntime
from channelfold.runtime.report import terminal  # noqa: F401

onnxruntime()
for _pass in PASSES.values():
    if _pass.does_it:
        __import__(f"{_pass.__module__}.{_pass.does_it}")

"""The progress of a command, on stderr in a terminal. Imports the standard library alone until progress shows."""

from __future__ import annotations

import sys
import threading
from typing import Any

from channelfold.runtime.report.names import safe

AFTER = 1.0  # seconds that a command may take before it shows progress


class Progress:
    """Shows the progress of a command on stderr, in a terminal alone, once the command has taken a second."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._display: Any = None
        self._task: Any = None
        self._ended = False
        self._state = ("start", 0, 0)
        self._timer = threading.Timer(AFTER, self._start)
        self._timer.daemon = True

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            self._ended = True
            if self._display is not None:
                self._display.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Takes the stage and its steps. ``total`` 0: the number of steps is unknown."""
        with self._lock:
            new = stage != self._state[0]
            self._state = (stage, done, total)
            if self._display is not None and not self._ended:
                self._update(new)

    def _start(self) -> None:
        from rich import progress as rich
        from rich.console import Console

        with self._lock:
            if self._ended:
                return
            stage = rich.TextColumn("{task.description}", markup=False)  # TensorRT's phases may hold brackets
            columns = (
                rich.SpinnerColumn(),
                stage,
                rich.BarColumn(),
                rich.TimeElapsedColumn(),
                rich.TimeRemainingColumn(),
            )
            self._display = rich.Progress(*columns, console=Console(stderr=True), transient=True)
            self._update(new=True)
            self._display.start()

    def _update(self, new: bool) -> None:
        stage, done, total = self._state
        if new:
            if self._task is not None:
                self._display.remove_task(self._task)
            self._task = self._display.add_task(safe(stage), total=None)
        self._display.update(self._task, completed=done, total=total or None)

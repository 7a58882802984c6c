"""Tasks that give a model an accuracy number, and calibration data that never touch what a task evaluates on."""

from __future__ import annotations

from tasks import audio, files, images, ocr, text
from tasks.base import Task

TASKS: dict[str, Task] = {task.name: task for module in (audio, images, text, ocr, files) for task in module.TASKS}

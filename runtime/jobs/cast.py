"""The command cast: a model in float16 or bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from channelfold.passes import recipe as recipes
from channelfold.runtime.errors import no_progress
from channelfold.runtime.jobs.job import Job, Progress, Record, Source


def cast(
    model: str | Path,
    out: str | Path,
    *,
    source: Source = Source(),
    options: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Makes weights and activations float16 or bfloat16. Writes ``out``.

    ``options`` are those of the pass ``cast``. With data, what would overflow stays float32, and what the outputs need.
    """
    job = Job("cast", Path(model), progress, source)
    job.open_both()
    job.transform([recipes.make("cast", options or {})], Path(out))
    return job.record

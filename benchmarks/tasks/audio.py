"""Sound: CREPE (pitch of synthetic tones) and PLCMOS (does the score fall as more packets are lost?)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tasks.base import Feed, OpenSet, Task, session
from tasks.sources import speech

# The centre of each of CREPE's 360 bins, in cents above 10 Hz.
CENTS = 20 * np.arange(360) + 1997.3794084376191
PACKET = 320
LOSSES = (0, 0.05, 0.15, 0.3, 0.5)
RATER = 64


def tones(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy harmonic tones of 60 to 1200 Hz: normalised float32 (n, 1024) at 16 kHz, and their pitch in cents."""
    rng, time = np.random.default_rng(seed), np.arange(1024) / 16000
    frames, cents = [], []
    for _ in range(n):
        pitch = 2 ** rng.uniform(np.log2(60), np.log2(1200))
        phase = rng.uniform(0, 6.28, 12)
        wave = sum(
            np.sin(2 * np.pi * pitch * k * time + phase[k]) / k ** rng.uniform(0.5, 1.5)
            for k in range(1, 9)
            if pitch * k < 7500
        ) + rng.normal(0, 0.15, 1024)
        frames.append((wave - wave.mean()) / max(1e-10, wave.std()))
        cents.append(1200 * np.log2(pitch / 10))
    return np.array(frames, np.float32), np.array(cents)


def crepe(open_set: OpenSet, model: Path) -> dict[str, Any]:
    """Share of 400 tones whose pitch comes out within 50 and 25 cents."""
    frames, truth = tones(400, seed=0)
    run = session(model)
    pitch = np.concatenate([run.run(None, {"frames": frames[i : i + 32]})[0] for i in range(0, len(frames), 32)])
    error = np.abs([_weighted_cents(row) for row in pitch] - truth)
    return {
        "pitch_accuracy_50_cents": round(float((error < 50).mean()), 4),
        "pitch_accuracy_25_cents": round(float((error < 25).mean()), 4),
        "median_cents": round(float(np.median(error)), 2),
        "tones": len(frames),
    }


def _weighted_cents(row: np.ndarray) -> float:
    near = slice(max(0, row.argmax() - 4), row.argmax() + 5)
    return float((row[near] * CENTS[near]).sum() / row[near].sum())


def crepe_samples(open_set: OpenSet) -> Iterator[Feed]:
    return ({"frames": frame[None]} for frame in tones(128, seed=100)[0])


@cache
def spectrum(open_set: OpenSet) -> Callable[[np.ndarray], np.ndarray]:
    """The log-power spectrogram of the speechmos package: samples to (frames, 257)."""
    path = open_set.packages / "speechmos/speechmos/plcmos.py"
    spec = importlib.util.spec_from_file_location("speechmos_plcmos", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PLCMOS.__new__(module.PLCMOS).stft_transform


def lossy_speech(open_set: OpenSet, wave: np.ndarray, loss: float, seed: int) -> np.ndarray:
    """The spectrogram of ``wave`` with a share ``loss`` of its 20 ms packets silenced: float32 (1, 1, frames, 257)."""
    rng, wave = np.random.default_rng(seed), wave.copy()
    for start in range(0, len(wave) - PACKET, PACKET):
        if rng.random() < loss:
            wave[start : start + PACKET] = 0
    return np.float32(spectrum(open_set)(wave))[None, None]  # pyright: ignore[reportIndexIssue]


def plcmos(open_set: OpenSet, model: Path) -> dict[str, Any]:
    """Rank correlation of the mean score of five raters with the packet loss (-1 is best), over ten phrases."""
    from scipy.stats import spearmanr

    raters = np.random.default_rng(0).normal(size=(5, RATER)).astype(np.float32)
    run = session(model)

    def score(wave: np.ndarray, loss: float) -> float:
        features = lossy_speech(open_set, wave, loss, seed=1)
        feeds = [{"degraded_audio": features, "rater_embed": rater[None]} for rater in raters]
        return float(np.mean([run.run(None, feed)[0] for feed in feeds]))

    scores = np.array([[score(wave, loss) for loss in LOSSES] for wave in speech(open_set, 0, 10)])
    ordered = [(row[i] > row[j]) for row in scores for i in range(len(LOSSES)) for j in range(i + 1, len(LOSSES))]
    return {
        "spearman": round(float(spearmanr(LOSSES * len(scores), scores.ravel())[0]), 4),  # pyright: ignore[reportArgumentType]
        "ordered_pairs": round(float(np.mean(ordered)), 4),
        "score_range": [round(float(scores.min()), 2), round(float(scores.max()), 2)],
        "clips": scores.size,
    }


def plcmos_samples(open_set: OpenSet) -> Iterator[Feed]:
    """16 other phrases at four other loss rates."""
    rng = np.random.default_rng(100)
    for i, wave in enumerate(speech(open_set, 10, 26)):
        for loss in (0.02, 0.1, 0.2, 0.4):
            rater = rng.normal(size=(1, RATER)).astype(np.float32)
            yield {"degraded_audio": lossy_speech(open_set, wave, loss, seed=100 + i), "rater_embed": rater}


TASKS = (
    Task("crepe_tiny", "crepe_tiny.onnx", "pitch_accuracy_50_cents", crepe, crepe_samples),
    Task("crepe_full", "crepe_full.onnx", "pitch_accuracy_50_cents", crepe, crepe_samples),
    Task("plcmos", "plcmos.onnx", "spearman", plcmos, plcmos_samples),
)

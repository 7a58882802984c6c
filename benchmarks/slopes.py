"""Idling of single channels, the fold of RePaViT, as a method to compare with."""

from __future__ import annotations

import numpy as np


def slopes(covariance: np.ndarray, inputs: np.ndarray, rows: np.ndarray, channels: np.ndarray) -> np.ndarray:
    """P (channels, inputs): the linear part of each of ``channels`` of z as a function of its pre-activation rows x.

    p = cov(h, a) / var(h) with h = rows x, ``rows`` (channels, inputs); a channel whose h is constant gets 0.
    """
    inner = rows @ covariance[np.ix_(inputs, inputs)]
    variance = np.einsum("cx,cx->c", inner, rows)
    shared = np.einsum("cx,cx->c", rows, covariance[np.ix_(channels, inputs)])
    slope = np.divide(shared, variance, out=np.zeros_like(shared), where=variance > 0)
    return slope[:, None] * rows

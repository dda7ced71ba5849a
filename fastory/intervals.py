"""Means over stories with their 95 % bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % percentile bootstrap interval of values, one a story (Efron and Tibshirani, 1993, chapter 13).

    The resamples come from a fixed seed, so the same values give the same interval. One value is an interval by itself.
    """
    rng, sample = np.random.default_rng(0), np.asarray(values)
    means = sample[rng.integers(0, len(sample), (RESAMPLES, len(sample)))].mean(1)
    return float(sample.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))

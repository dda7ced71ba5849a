"""95 % intervals over stories: of means by the bootstrap, of what is of all stories together by the jackknife."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
GROUPS = 20  # as many groups of stories at most are left out, one after the other


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % percentile bootstrap interval of values, one a story (Efron and Tibshirani, 1993, chapter 13).

    The resamples come from a fixed seed, so the same values give the same interval. One value is an interval by itself.
    """
    rng, sample = np.random.default_rng(0), np.asarray(values)
    means = sample[rng.integers(0, len(sample), (RESAMPLES, len(sample)))].mean(1)
    return float(sample.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def jackknife(value: float, left_out: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a figure of all stories together, from what it is without each group of stories.

    value +- t s, s the jackknife's standard error and t Student's with one degree of freedom less than groups (Efron and
    Tibshirani, 1993, chapter 11). A bootstrap would not do for distances of two sets: a story that is drawn twice narrows
    its set. left_out: of at least two groups of about as many stories each. scipy is imported where it is used: the extra
    `eval`.
    """
    from scipy.stats import t

    without, groups = np.asarray(left_out, float), len(left_out)
    error = float(np.sqrt((groups - 1) / groups * ((without - without.mean()) ** 2).sum()))
    reach = float(t.ppf(0.975, groups - 1)) * error
    return value - reach, value + reach

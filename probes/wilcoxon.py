"""Wilcoxon's signed ranks. A module of its own, since SciPy's statistics take a second to import and most commands race nothing."""

from __future__ import annotations

import numpy as np
from scipy import stats


def greater(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """Return the probability of values this far above zero if they lay around it (Wilcoxon 1945; exact for few values)."""
    return float(stats.wilcoxon(values, alternative="greater", method="auto").pvalue)

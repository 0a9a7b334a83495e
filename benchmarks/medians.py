"""Medians with their intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def median_shown(values: Any) -> str:
    """Return a median with the 95 % interval that the order of the values gives it, whatever their distribution; none of fewer than 6."""
    if not len(values):
        return "none"
    ordered, count = np.sort(values), len(values)
    below, share = 0, 0.5**count  # values left out on each side, and the probability that no more than those lie below the median
    while share + math.comb(count, below + 1) * 0.5**count <= 0.025:
        below += 1
        share += math.comb(count, below) * 0.5**count
    interval = f" ({ordered[below]:.3f} to {ordered[-1 - below]:.3f})" if share <= 0.025 else ""
    return f"{np.median(ordered):.3f}{interval}"

"""How alike two models are, by what they are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping

ALIKE = 0.9  # from here on what was best for one is worth a try for the other


def similarity(one: Mapping[str, int], other: Mapping[str, int]) -> float:
    """Return the cosine of the angle between two models' counts of operators by type: 1 for the same mixture, 0 for nothing in common."""
    product = sum(count * other.get(name, 0) for name, count in one.items())
    norms = math.sqrt(sum(each * each for each in one.values())) * math.sqrt(sum(each * each for each in other.values()))
    return product / norms if norms else 0.0

"""How lanes are shared out among the copies of a stage."""

from __future__ import annotations

from collections.abc import Sequence


def shared_out(weights: Sequence[float], lanes: int) -> list[int]:
    """Return which copy each of `lanes` lanes is bound to: as many for each as its weight asks for, one at least, evenly interleaved.

    Each next lane goes to the copy that lags behind its part by most (smooth weighted round robin, as NGINX deals requests out).

    Raises:
        ValueError: there are fewer lanes than copies.
    """
    if lanes < len(weights):
        raise ValueError(f"{lanes} lanes do not serve {len(weights)} copies")
    if len(weights) == 1:
        return [0] * lanes
    counts = _counts(weights, lanes)
    credit = [0.0] * len(weights)
    left = list(counts)
    order = []
    for _ in range(lanes):
        credit = [owed + count for owed, count in zip(credit, counts, strict=True)]
        chosen = max((index for index in range(len(weights)) if left[index]), key=lambda index: (credit[index], -index))
        credit[chosen] -= lanes
        left[chosen] -= 1
        order.append(chosen)
    return order


def _counts(weights: Sequence[float], lanes: int) -> list[int]:
    """Return how many lanes each copy gets: one, and of the rest what its weight asks for, by largest remainders."""
    total = sum(weights)
    counts = [1] * len(weights)
    for _ in range(lanes - len(weights)):
        lag = [weight / total * lanes - count for weight, count in zip(weights, counts, strict=True)]
        counts[lag.index(max(lag))] += 1
    return counts

"""Engines and what they answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aivmm.runtime.engine import Engine

Load = Callable[..., Engine]
Lose = Callable[..., None]
LOADING = ("on_mismatch", "timeout_s")


def close_to(found: Any, expected: Any) -> None:
    """Hold outputs to what they should be: names, shapes, types and, to five digits, values."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == np.shape(value)
        assert found[name].dtype == value.dtype
        if value.dtype.kind == "f":
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(found[name], value)


def used_cache(bundle: Path, inputs: Any, expected: Any, *, rtol: float = 1e-4, atol: float = 1e-5) -> dict[str, Any]:
    """Load, run, and return what the engine says of the cache; the answer has to be right."""
    with Engine.load(bundle) as engine:
        found = engine.run(inputs)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=rtol, atol=atol)
        stats: dict[str, Any] = engine.stats()["cache"]
        return stats

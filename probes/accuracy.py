"""How close outputs are to a reference.

SQNR is 20 log10(||r|| / ||x - r||) in dB. Top-k agreement is the share of rows of a classifier's output (floats [rows, classes]) in
which the reference's first class is among the k first of the output: all that a caller who takes the best class would notice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_MEANS = ("top1_agreement", "top5_agreement")  # over several samples the mean counts; of all else the worst
_MORE_IS_BETTER = ("cosine", "sqnr")
BEST_SQNR = 200.0  # dB; equal outputs would give infinity, which neither JSON nor a database has
_DOUBLE_ROUNDING = 1e-9  # relative L2 of float64 outputs: runtimes that compute in float64 differ by 1e-15 to 1e-12, in float32 by 1e-8
_BEYOND = 2.0**31  # magnitudes that no 32-bit integer holds
_ROUNDING = 1e-4  # fp32 runtimes differ by this much in deep models; a limit of cosine>=1 does not ask for less


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Over all outputs the worst of each measure; `problem` says what makes them unusable (NaN, another shape), else it is empty."""

    cosine: float
    relative_l2: float
    max_abs: float
    agreement: Mapping[str, float] = field(default_factory=dict)  # top1_agreement, top5_agreement; empty when no output is a classifier's
    problem: str = ""

    def metrics(self) -> dict[str, float]:
        """Return the finite measures by name."""
        sqnr = -20 * math.log10(self.relative_l2) if self.relative_l2 > 0 else math.inf
        found = {
            "cosine": self.cosine,
            "relative_l2": self.relative_l2,
            "max_abs": self.max_abs,
            "sqnr": min(sqnr, BEST_SQNR),
            **self.agreement,
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}


def over_limit(cosine: float, relative_l2: float, limit: float) -> str:
    """Say why outputs are too far from the reference, or return "".

    The cosine alone is blind to scale, and to everything in an output of one element. For vectors of equal norm a cosine c means a relative
    L2 error of sqrt(2 (1 - c)), so that error is the limit's second half.
    """
    if cosine < limit:
        return f"cosine {cosine:.5f} is below the limit of {limit:g}"
    most = math.sqrt(2 * max(0.0, 1 - limit)) + 1e-9
    if relative_l2 > max(most, _ROUNDING):
        return f"the relative error {relative_l2:.3g} is above {most:.3g}, what a cosine of {limit:g} allows"
    return ""


def judge(outputs: Mapping[str, Array], reference: Mapping[str, Array]) -> Accuracy:
    """Compare outputs with the reference ones, name by name, in double precision.

    Cosine is the normalised inner product; relative L2 is ||x - r|| / ||r||. Outputs of integers, booleans and strings have to be equal:
    the share of unequal elements is then their relative L2, and 1 minus it their cosine.
    """
    worst = {"cosine": 1.0, "relative_l2": 0.0, "max_abs": 0.0}
    agreement: dict[str, float] = {}
    for name, expected in reference.items():
        if name not in outputs:
            return _unusable(f"the output {name!r} is missing")
        actual = np.asarray(outputs[name])
        expected = np.asarray(expected)
        if actual.shape != expected.shape:
            return _unusable(f"output {name!r} has shape {list(actual.shape)}, the reference has {list(expected.shape)}")
        if actual.dtype.kind in "OSTU" and expected.dtype.kind not in "OSTU":
            return _unusable(f"output {name!r} holds strings, the reference numbers")
        if expected.dtype.kind not in "fc" and expected.dtype.name not in ("bfloat16", "float16"):
            unequal = float(np.mean(actual != expected)) if expected.size else 0.0
            one = {"cosine": 1.0 - unequal, "relative_l2": unequal, "max_abs": unequal}
        else:
            found = _compare_floats(actual, expected)
            if isinstance(found, str):
                return _unusable(f"output {name!r} {found}")
            one = found
            for measure, share in _agreement(actual, expected).items():
                agreement[measure] = min(agreement.get(measure, 1.0), share)
        worst = {
            "cosine": min(worst["cosine"], one["cosine"]),
            "relative_l2": max(worst["relative_l2"], one["relative_l2"]),
            "max_abs": max(worst["max_abs"], one["max_abs"]),
        }
    return Accuracy(cosine=worst["cosine"], relative_l2=worst["relative_l2"], max_abs=worst["max_abs"], agreement=agreement)


def narrowed(outputs: Mapping[str, Array], reference: Mapping[str, Array]) -> str:
    """Say which output was computed in a narrower type than the model declares, or return "".

    No limit on accuracy excuses that: nobody asked for it, and on other inputs the same loss may be all of the result. A float64 output
    has to keep more than float32 can, and an integer beyond 32 bits to come out as such (within 1 %: it may stem from rounded floats).
    """
    for name, expected in reference.items():
        actual, expected = np.asarray(outputs.get(name)), np.asarray(expected)
        if actual.shape != expected.shape or actual.dtype.kind not in "biuf":
            continue  # `judge` says what is wrong with it
        if expected.dtype == np.float64:
            found = _compare_floats(actual, expected)
            if isinstance(found, dict) and found["relative_l2"] > _DOUBLE_ROUNDING:
                return f"output {name!r} is float64 and was computed in less (relative error {found['relative_l2']:.2g})"
        elif expected.dtype.kind in "iu" and expected.dtype.itemsize >= 4:
            x, r = actual.astype(np.float64), expected.astype(np.float64)
            lost = (np.abs(r) >= _BEYOND) & (np.abs(x - r) > 0.01 * np.abs(r))
            if lost.any():
                return f"output {name!r} has {int(lost.sum())} integers beyond 32 bits that came out as others"
    return ""


def combined(samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the measures over several samples: the mean of agreements, the worst of all else."""
    names = dict.fromkeys(name for each in samples for name in each)
    found: dict[str, float] = {}
    for name in names:
        values = [each[name] for each in samples if name in each]
        if name in _MEANS:
            found[name] = sum(values) / len(values)
        else:
            found[name] = min(values) if name in _MORE_IS_BETTER else max(values)
    return found


def _agreement(actual: Array, expected: Array) -> dict[str, float]:
    if expected.ndim < 2 or any(extent != 1 for extent in expected.shape[2:]) or expected.shape[1] < 3 or not expected.shape[0]:
        return {}
    rows, classes = expected.shape[:2]
    x, r = (np.nan_to_num(each.reshape(rows, classes).astype(np.float64)) for each in (actual, expected))
    first = r.argmax(axis=1)
    found = {"top1_agreement": float(np.mean(x.argmax(axis=1) == first))}
    if classes > 5:
        best = np.argpartition(-x, 5, axis=1)[:, :5]
        found["top5_agreement"] = float(np.mean((best == first[:, None]).any(axis=1)))
    return found


def _compare_floats(actual: Array, expected: Array) -> dict[str, float] | str:
    x, r = _doubles(actual), _doubles(expected)
    if x.size != r.size:
        return "is complex on one side only"
    odd = ~np.isfinite(r)
    if not np.array_equal(x[odd], r[odd], equal_nan=True):
        return "differs from the reference where that is infinite or not a number"
    x, r = x[~odd], r[~odd]
    if not np.isfinite(x).all():
        return "holds NaN or infinity where the reference does not"
    if not r.size:
        return {"cosine": 1.0, "relative_l2": 0.0, "max_abs": 0.0}
    # Squares of doubles overflow beyond 1e154, and an infinite norm would make any cosine a NaN.
    scale = max(float(np.abs(x).max()), float(np.abs(r).max())) or 1.0
    x, r = x / scale, r / scale
    difference = x - r
    norm_x, norm_r, norm_d = (float(np.linalg.norm(each)) for each in (x, r, difference))
    max_abs = float(np.abs(difference).max()) * scale
    if norm_r == 0.0:
        same = norm_x == 0.0
        return {"cosine": 1.0 if same else 0.0, "relative_l2": 0.0 if same else norm_x * scale, "max_abs": max_abs}
    cosine = 0.0 if norm_x == 0.0 else max(-1.0, min(1.0, float(x @ r) / (norm_x * norm_r)))
    return {"cosine": cosine, "relative_l2": norm_d / norm_r, "max_abs": max_abs}


def _doubles(array: Array) -> Array:
    flat = array.ravel()
    return flat.astype(np.complex128).view(np.float64) if array.dtype.kind == "c" else flat.astype(np.float64)


def _unusable(problem: str) -> Accuracy:
    return Accuracy(cosine=-1.0, relative_l2=math.inf, max_abs=math.inf, problem=problem)

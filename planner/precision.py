"""Precision as a decision: which ways of lowering suit a target, and which blocks of a model stay as they are.

The noise that lowered parts add to the outputs sums up when they are independent (measured on the demo encoder: the sum of 16 parts is
within 7 % of the whole). Then the best choice of parts is a knapsack, and solved exactly. Where it does not sum up, Optuna searches noise
and time together, and each choice is evaluated.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from scipy.optimize import Bounds, LinearConstraint, milp

from aivmm.runtime.target import Target

_ADDITIVE = 2.0  # so far the sum of the parts' noise may be off the whole's, either way, and still serve to choose by
# Of ONNX Runtime: those that run QuantizeLinear and DequantizeLinear and, between them, what the model has, in fp32. Decision 0068.
_WITHOUT_INTEGER_KERNELS = ("CUDA",)
_HALF_PROVIDERS = ("CUDA", "TensorRT", "DirectML", "MIGraphX")  # those that compute in fp16 when the model does
_BFLOAT_PROVIDERS = ("CUDA", "TensorRT")
_COMPILED_AHEAD = ("NPU", "QNN")  # devices whose ranges have to be known when the model is compiled
_SYMMETRIC_ONLY = ("TensorRT", "NvTensorRtRtx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way of lowering, as far as its suiting a target goes."""

    name: str
    precision: str
    kind: str  # "static", "dynamic", "weights" or "cast"
    symmetric: bool = False  # activations have no zero point
    fused: bool = False  # written with operators of ONNX Runtime's own


def unfit(way: Way, target: Target, *, op_types: Collection[str]) -> str:
    """Say why a way of lowering does not apply to a model with these operators on a target; "" when it does."""
    if problem := _nothing_to_lower(way, op_types):
        return problem
    device = _device_of(target)
    if way.kind == "cast":
        return "" if converts(target, way.precision) else _no_cast(way.precision, target)
    if way.kind == "dynamic" and target.device.kind != "cpu":
        return f"ranges taken at run time are for CPUs: {target} compiles them ahead or lacks the operators"
    if device in _COMPILED_AHEAD and way.kind != "static":
        return f"{target} needs weights and activations in int8, with their ranges in the model"
    if device in _SYMMETRIC_ONLY and way.kind == "static" and not way.symmetric:
        return f"{target} takes activations without a zero point only"
    if way.fused and target.runtime == "openvino" and target.device.kind != "cpu":
        return f"{target} does not know ONNX Runtime's own operators"
    return ""


def dequantizes(way: Way, target: Target) -> bool:
    """Say whether a target computes in fp32 what a way puts in int8, for want of integer kernels.

    It takes such a model, and what that costs or saves is measured; but lowering parts of it gains as little as lowering the whole.
    """
    return way.kind == "static" and target.runtime == "onnxruntime" and _device_of(target) in _WITHOUT_INTEGER_KERNELS


def _nothing_to_lower(way: Way, op_types: Collection[str]) -> str:
    has = set(op_types)
    products = has & {"MatMul", "Gemm", "Attention", "Einsum"}
    if way.name.startswith("ort-weights") and "MatMul" not in has:
        return "it lowers weights of MatMul, and the model has none"
    if way.kind in ("weights", "dynamic") and not (products or has & {"LSTM", "GRU", "Gather"}):
        return "it lowers weights of matrix products, and the model has none"
    if "recurrent" in way.name and "LSTM" not in has:
        return "it lowers recurrent cells, and the model has none"
    if way.kind == "static" and not (products or has & {"Conv", "ConvTranspose", "LSTM", "GRU", "RNN", "Gather"}):
        return "the model has no operator with weights to lower"
    return ""


def converts(target: Target, precision: str) -> bool:
    """Say whether a target computes in fp16 or bf16 when the model itself is converted to it."""
    if precision in target.precisions:
        return precision != "fp32"
    providers = {"fp16": _HALF_PROVIDERS, "bf16": _BFLOAT_PROVIDERS}.get(precision, ())
    return target.runtime == "onnxruntime" and _device_of(target) in providers


def _no_cast(precision: str, target: Target) -> str:
    has = ", ".join(target.precisions)
    return f"{target} does not compute in {precision} ({has} alone): the model would be cast back and forth, and run slower"


def _device_of(target: Target) -> str:
    return target.name.partition(":")[0].partition(".")[0]


# --- which parts of a model to lower


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Parts to lower, by position, with the noise and the gain to be expected of them together."""

    parts: tuple[int, ...]
    noise: float
    gain: float


def adds_up(noises: Sequence[float], whole: float) -> bool:
    """Say whether the parts' noise sums up to the whole's, as near as a choice by sums needs."""
    total = sum(noises)
    if not math.isfinite(total) or not math.isfinite(whole):
        return False
    return total == whole or (whole > 0 and 1 / _ADDITIVE <= total / whole <= _ADDITIVE)


def best_parts(noises: Sequence[float], gains: Sequence[float], most_noise: float) -> Choice:
    """Return the parts with the largest sum of gains whose noise sums to `most_noise` at most: a knapsack, solved exactly by HiGHS.

    Parts without a gain stay as they are. Noise is the relative power of the error, gains are in any one unit.
    """
    usable = [index for index, noise in enumerate(noises) if noise <= most_noise and gains[index] > 0]
    if not usable:
        return Choice(parts=(), noise=0.0, gain=0.0)
    weights = np.array([noises[index] for index in usable]) / most_noise if most_noise > 0 else np.zeros(len(usable))
    values = np.array([gains[index] for index in usable])
    solved = milp(
        -values / values.max(),
        integrality=np.ones(len(usable)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(weights[None], ub=1.0),
        options={"mip_rel_gap": 0.0},
    )
    parts = tuple(index for index, taken in zip(usable, solved.x, strict=True) if taken > 0.5)
    return Choice(parts=parts, noise=sum(noises[index] for index in parts), gain=sum(gains[index] for index in parts))


def front(noises: Sequence[float], gains: Sequence[float], limits: Sequence[float]) -> tuple[Choice, ...]:
    """Return the best choices for several limits on noise, the largest gain first, each once; the empty one and repeats are left out."""
    found: dict[tuple[int, ...], Choice] = {}
    for limit in limits:
        choice = best_parts(noises, gains, limit)
        if choice.parts:
            found.setdefault(choice.parts, choice)
    return tuple(sorted(found.values(), key=lambda each: -each.gain))


def searched_front(
    gains: Sequence[float],
    noises: Sequence[float],
    evaluate: Callable[[tuple[int, ...]], float],
    *,
    trials: int,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Choice, ...]:
    """Return the choices that no other one beats in both noise and gain, of those that Optuna tried, the largest gain first.

    `evaluate` returns the noise of lowering some parts together. The first choices tried leave the noisiest parts as they are, one more
    each time, since `noises` of the parts alone still tell which they are.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=4)
    study = optuna.create_study(directions=["minimize", "maximize"], sampler=sampler)
    ranked = sorted(range(len(noises)), key=lambda index: -noises[index])
    for kept in range(1, min(len(ranked), max(1, trials // 2)) + 1):
        study.enqueue_trial({f"part {index}": int(index not in ranked[:kept]) for index in range(len(noises))})
    known: dict[tuple[int, ...], Choice] = {}
    for _ in range(trials):
        if stop():
            break
        trial = study.ask()
        parts = tuple(index for index in range(len(noises)) if trial.suggest_int(f"part {index}", 0, 1))
        if parts not in known:
            noise = evaluate(parts) if parts else 0.0
            known[parts] = Choice(parts=parts, noise=noise, gain=sum(gains[index] for index in parts))
        choice = known[parts]
        if math.isfinite(choice.noise):
            study.tell(trial, [choice.noise, choice.gain])
        else:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    useful = [each for each in known.values() if each.parts and math.isfinite(each.noise)]
    best = [each for each in useful if not any(_beats(other, each) for other in useful)]
    return tuple(sorted(best, key=lambda each: -each.gain))


def _beats(one: Choice, other: Choice) -> bool:
    return one.noise <= other.noise and one.gain >= other.gain and (one.noise, one.gain) != (other.noise, other.gain)


def most_noise(limits: Mapping[str, float], cosine: float | None) -> float | None:
    """Return the noise (relative power of the error) that limits on accuracy allow; None where they limit it in no such way.

    `limits` are by metric: `sqnr` in dB, `cosine`. A cosine c stands for a relative L2 error of sqrt(2 (1 - c)), see `accuracy.over_limit`.
    """
    found = []
    for each in (limits.get("cosine"), cosine):
        if each is not None:
            found.append(2 * max(0.0, 1 - each))
    if "sqnr" in limits:
        found.append(10 ** (-limits["sqnr"] / 10))
    return min(found, default=None)

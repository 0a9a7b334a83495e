"""What is believed of points that were not measured: a Gaussian process over their parameters, fitted to those that were.

Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), ch. 2 and 5: covariance exp(-sum of w_d * distance_d), one weight
for each parameter, noise beside it; weights, scale and noise are those of the greatest posterior density. A parameter that does not matter
gets a weight near 0, so points that differ in it teach each other. Losses are logarithms, in which effects that multiply add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.special import log_ndtr, ndtr
from threadpoolctl import ThreadpoolController

Array = npt.NDArray[np.float64]

_WEIGHT, _WEIGHT_SPREAD = np.log(0.15), 1.5  # log-normal prior of a weight: most parameters matter little
_SCALE_SPREAD = 1.0
_NOISE_SPREAD = 0.7
_LEAST_NOISE = 1e-4  # variance, of standardised losses: keeps the matrix regular
_STEPS = 20


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep linear algebra on the calling thread: matrices this small take several times longer on two, and their threads spin on."""
    with _libraries().limit(limits=1, user_api="blas"):
        yield


@dataclass(frozen=True, slots=True)
class Surrogate:
    """The fitted process. Losses in and out are in the caller's unit."""

    ordered: npt.NDArray[np.bool_]
    weights: Array
    x: Array
    mean: float
    spread: float
    scale: float  # variance of the process, standardised
    noise: float  # of one measurement, standardised
    _y: Array
    _lower: Array
    _alpha: Array

    @classmethod
    def fit(cls, x: Array, losses: Array, ordered: Sequence[bool], *, sigma: float) -> Surrogate:
        """Fit to points x [n, parameters] in [0, 1] (or category numbers) and their losses [n].

        `sigma` is how far one measurement is thought to be off, in the losses' unit.
        """
        which = np.asarray(ordered, dtype=np.bool_)
        mean, spread = float(losses.mean()), float(losses.std()) or 1.0
        y = (losses - mean) / spread
        apart = np.stack([_distance(x[:, at, None], x[None, :, at], one) for at, one in enumerate(which)])
        expected_noise = np.log(max(_LEAST_NOISE, (sigma / spread) ** 2))
        prior = np.concatenate([np.full(len(which), _WEIGHT), [0.0, expected_noise]])
        width = np.concatenate([np.full(len(which), _WEIGHT_SPREAD), [_SCALE_SPREAD, _NOISE_SPREAD]])
        found = minimize(
            _density,
            prior,
            args=(apart, y, prior, width),
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(prior - 4 * width, prior + 4 * width, strict=True)),
            options={"maxiter": _STEPS},
        ).x
        weights, scale, noise = np.exp(found[:-2]), float(np.exp(found[-2])), float(np.exp(found[-1]))
        covariance = scale * np.exp(-np.tensordot(weights, apart, 1))
        lower = cholesky(covariance + (noise + _LEAST_NOISE) * np.eye(len(y)), lower=True)
        return cls(which, weights, x, mean, spread, scale, noise, y, lower, cho_solve((lower, True), y))

    def given(self, x: Array, losses: Array) -> Surrogate:
        """Return what is believed with further points and losses, without fitting anew."""
        return self.with_data(np.concatenate([self.x, x]), np.concatenate([self.mean + self.spread * self._y, losses]))

    def with_data(self, every: Array, losses: Array) -> Surrogate:
        """Return what is believed with these points and losses instead, without fitting anew."""
        y = (losses - self.mean) / self.spread
        apart = sum(
            weight * _distance(every[:, at, None], every[None, :, at], bool(self.ordered[at])) for at, weight in enumerate(self.weights)
        )
        lower = cholesky(self.scale * np.exp(-apart) + (self.noise + _LEAST_NOISE) * np.eye(len(y)), lower=True)
        return replace(self, x=every, _y=y, _lower=lower, _alpha=cho_solve((lower, True), y))

    def believe(self, x: Array) -> tuple[Array, Array]:
        """Return mean and standard deviation of the true losses of points [m, parameters]."""
        apart = np.zeros((len(x), len(self.x)))
        for at, one in enumerate(self.ordered):
            apart += self.weights[at] * _distance(x[:, at, None], self.x[None, :, at], bool(one))
        across = self.scale * np.exp(-apart)
        inner = solve_triangular(self._lower, across.T, lower=True)
        variance = np.maximum(self.scale - np.einsum("ij,ij->j", inner, inner), 1e-12)
        return self.mean + self.spread * (across @ self._alpha), self.spread * np.sqrt(variance)


def log_expected_improvement(mean: Array, sd: Array, best: float) -> Array:
    """Return the logarithm of how far a loss is expected to fall below `best`, less a constant (Jones et al. 1998; Ament et al. 2023)."""
    z = (best - mean) / sd
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    with np.errstate(divide="ignore", invalid="ignore"):
        near = np.log(np.maximum(density + z * ndtr(z), 1e-300))
    # Far below there is nothing but rounding left of the difference: its leading term is.
    far = -0.5 * z**2 - 0.5 * np.log(2 * np.pi) - 2 * np.log(np.maximum(-z, 1.0))
    found: Array = np.log(sd) + np.where(z > -10, near, far)
    return found


def log_chance_below(mean: Array, sd: Array, limit: float) -> Array:
    """Return the logarithm of the probability that a value is below `limit`."""
    found: Array = log_ndtr((limit - mean) / sd)
    return found


def _distance(a: Array, b: Array, ordered: bool) -> Array:
    """Return how far apart values are: of ordered ones to the power of 1.5, between a rough line and a smooth one."""
    apart = np.abs(a - b)
    found: Array = apart * np.sqrt(apart) if ordered else (apart > 0).astype(np.float64)
    return found


def _density(theta: Array, apart: Array, y: Array, prior: Array, width: Array) -> tuple[float, Array]:
    """Return the negative logarithm of the posterior density of weights, scale and noise, and its gradient."""
    weights, scale, noise = np.exp(theta[:-2]), np.exp(theta[-2]), np.exp(theta[-1])
    signal = scale * np.exp(-np.tensordot(weights, apart, 1))
    lower = cholesky(signal + (noise + _LEAST_NOISE) * np.eye(len(y)), lower=True)
    inverse = cho_solve((lower, True), np.eye(len(y)))
    alpha = inverse @ y
    off = (theta - prior) / width
    value = 0.5 * float(y @ alpha) + float(np.log(np.diag(lower)).sum()) + 0.5 * float(off @ off)
    slope = 0.5 * (inverse - np.outer(alpha, alpha))
    gradient = np.empty_like(theta)
    gradient[:-2] = -weights * np.tensordot(apart, slope * signal, 2)
    gradient[-2] = float((slope * signal).sum())
    gradient[-1] = noise * float(np.trace(slope))
    return value, gradient + off / width

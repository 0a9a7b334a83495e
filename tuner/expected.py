"""What a proof is expected to find, and what it found, as the plan holds it."""

from __future__ import annotations

import math
from dataclasses import replace

from aivmm.planner.certificate import Certificate
from aivmm.planner.evidence import Estimate
from aivmm.probes.compare import APART
from aivmm.runtime.plan import Certificate as Planned
from aivmm.runtime.plan import Number
from aivmm.tuner.proof import Entrant, call_s, interval_s

# What a plan says of itself besides the duration of a call, as far as it was measured.
_EXPECTED = (
    "p99_s", "throughput_per_s", "peak_memory_bytes", "device_memory_bytes", "compile_s", "load_cached_s", "first_inference_s", "energy_j",
    "card_energy_j", "stray_nodes", "stray_copies", "stray_s",
)  # fmt: skip

_AUTO_SIGMA = 0.1  # of the logarithm of what OpenVINO's AUTO takes over what the default of its only device does


def in_other_processes(found: Estimate) -> Estimate:
    """Return what to expect where plan and reference are loaded again: each load has its memory and threads somewhere else."""
    return replace(found, sigma=math.hypot(found.sigma, 2 * APART.sd))  # four loads: two that were measured, two that will be


def unmeasured_auto(default: Estimate) -> Estimate:
    """Return what to expect of AUTO, which was not measured: what the default takes, through one more hand."""
    return replace(default, source="modelled", sigma=math.hypot(default.sigma, _AUTO_SIGMA), because="the default of its only device")


def as_planned(certificate: Certificate | None) -> Planned | None:
    """Return a certificate as the plan holds it."""
    return None if certificate is None else Planned.from_json(certificate.as_json())


def expected(plan: Entrant) -> dict[str, Number]:
    """Return the numbers that the proof found, as the plan holds them."""
    assert plan.confirmed
    low, high = interval_s(plan)
    count = len(plan.confirmed.timed_s)
    found = {"median_s": Number(value=call_s(plan), low=low, high=high, source="measured", samples=count)}
    for name in _EXPECTED:
        if name in plan.metrics:
            found[name] = Number(value=plan.metrics[name], source="measured", samples=count if name == "throughput_per_s" else 0)
    return found

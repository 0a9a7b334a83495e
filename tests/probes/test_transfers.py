"""The cost of a boundary: the fit on made-up costs with a known answer, and the measuring on real runtimes in a real worker."""

from __future__ import annotations

import random
from typing import Any

import pytest

from aivmm.errors import AivmmError
from aivmm.probes import wire
from aivmm.probes.client import Worker
from aivmm.probes.transfers import SIZES_BYTES, fit_boundaries, fit_transfer
from aivmm.runtime.config import Config
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Target


def costs(fixed_s: float, per_byte_s: float) -> list[float]:
    return [fixed_s + size * per_byte_s for size in SIZES_BYTES]


@pytest.mark.parametrize("seed", range(12))
def test_what_was_put_in_comes_out(seed: int) -> None:
    rng = random.Random(seed)
    fixed_s, per_byte_s = 10 ** rng.uniform(-7, -3), 10 ** rng.uniform(-12, -9)
    fit = fit_transfer(SIZES_BYTES, costs(fixed_s, per_byte_s))
    assert fit.fixed_s == pytest.approx(fixed_s, rel=1e-3)
    assert fit.per_byte_s == pytest.approx(per_byte_s, rel=1e-3)
    assert fit.error < 1e-3
    assert fit.seconds(1 << 20) == pytest.approx(fixed_s + (1 << 20) * per_byte_s, rel=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_the_fit_is_near_under_noise_and_says_how_near(seed: int) -> None:
    rng = random.Random(seed)
    noisy = [each * rng.lognormvariate(0, 0.05) for each in costs(1e-5, 1e-10)]
    fit = fit_transfer(SIZES_BYTES, noisy)
    assert fit.fixed_s == pytest.approx(1e-5, rel=0.2)
    assert fit.per_byte_s == pytest.approx(1e-10, rel=0.2)
    assert 0.001 < fit.error < 0.2


@pytest.mark.parametrize("place", range(len(SIZES_BYTES)))
def test_one_wild_size_does_not_carry_the_fit_away(place: int) -> None:
    wild = costs(1e-5, 1e-10)
    wild[place] *= 20
    fit = fit_transfer(SIZES_BYTES, wild)
    assert fit.fixed_s == pytest.approx(1e-5, rel=0.05)
    assert fit.per_byte_s == pytest.approx(1e-10, rel=0.05)


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3])
def test_the_unit_of_time_does_not_matter(factor: float) -> None:
    rng = random.Random(1)
    noisy = [each * rng.lognormvariate(0, 0.1) for each in costs(1e-5, 1e-10)]
    plain, scaled = fit_transfer(SIZES_BYTES, noisy), fit_transfer(SIZES_BYTES, [factor * each for each in noisy])
    assert scaled.fixed_s == pytest.approx(factor * plain.fixed_s, rel=1e-6)
    assert scaled.per_byte_s == pytest.approx(factor * plain.per_byte_s, rel=1e-6)
    assert scaled.error == pytest.approx(plain.error, rel=1e-4)


def test_no_part_of_a_cost_is_negative() -> None:
    fit = fit_transfer(SIZES_BYTES, [-1e-6] * 5 + [1e-6] * (len(SIZES_BYTES) - 5))
    assert fit.fixed_s >= 0
    assert fit.per_byte_s >= 0
    assert fit_transfer(SIZES_BYTES, [0.0] * len(SIZES_BYTES)).seconds(1 << 20) == 0.0


def test_a_cost_below_what_can_be_told_does_not_spoil_the_error() -> None:
    nothing = [1e-7, -1e-7] * (len(SIZES_BYTES) // 2) + [1e-7] * (len(SIZES_BYTES) % 2)
    blind = fit_transfer(SIZES_BYTES, nothing)
    seeing = fit_transfer(SIZES_BYTES, nothing, resolution_s=[1e-5] * len(SIZES_BYTES))
    assert seeing.error < 0.05 < blind.error


@pytest.mark.parametrize(
    ("sizes", "seconds"), [([1, 2], [1.0, 2.0]), ([1, 1, 1], [1.0] * 3), ([1, 2, 3], [1.0] * 2), ([1, 2, 3], [1.0, 2.0, float("nan")])]
)
def test_too_little_to_fit_is_refused(sizes: list[float], seconds: list[float]) -> None:
    with pytest.raises(ValueError, match=r"sizes|costs|finite"):
        fit_transfer(sizes, seconds)


@pytest.fixture(scope="module")
def targets() -> dict[str, dict[str, Any]]:
    found = {}
    for runtime in ("openvino", "onnxruntime"):
        target = load_backend(runtime).find("CPU")  # type: ignore[attr-defined]
        assert isinstance(target, Target)
        found[runtime] = wire.target_out(target)
    return found


@pytest.mark.parametrize(("source", "destination"), [("openvino", "onnxruntime"), ("onnxruntime", "openvino")])
def test_a_boundary_is_measured_in_place_on_both_runtimes(worker: Worker, targets: dict[str, Any], source: str, destination: str) -> None:
    config = wire.config_out(Config(precision="fp32"))
    answer = worker.call(
        "boundary",
        limit_s=60.0,
        source=targets[source],
        destination=targets[destination],
        sizes_bytes=[256, 4096, 1 << 20],
        source_config=config,
        destination_config=config,
    )
    assert [each["size_bytes"] for each in answer["boundaries"]] == [256, 4096, 1 << 20]
    for each in answer["boundaries"]:
        assert len(each["durations"]) >= 5
        assert min(each["durations"]) > 0
        assert each["source_s"] > 0
        assert each["destination_s"] > 0
    fit = fit_boundaries(answer["boundaries"])
    assert fit.fixed_s >= 0


def test_a_precision_that_a_target_lacks_is_refused_in_its_words(worker: Worker, targets: dict[str, Any]) -> None:
    with pytest.raises(AivmmError, match="natively"):
        worker.call(
            "boundary",
            limit_s=60.0,
            source=targets["onnxruntime"],
            destination=targets["onnxruntime"],
            sizes_bytes=[256],
            source_config=wire.config_out(Config(precision="fp16")),
            destination_config=wire.config_out(Config(precision="fp32")),
        )

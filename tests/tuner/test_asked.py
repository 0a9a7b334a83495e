"""Which targets options and constraints leave, and what is said where that is none."""

from __future__ import annotations

import pytest

from aivmm.errors import UsageError
from aivmm.runtime.target import Device, Target
from aivmm.tuner.asked import allowed
from aivmm.tuner.options import TuneOptions

CPU, GPU = (
    Target(runtime="null", name=name, device=Device(kind=kind, model="made-up"), runtime_version="1")
    for name, kind in (("CPU", "cpu"), ("GPU.0", "gpu"))
)


@pytest.mark.parametrize(
    ("targets", "constraints", "said"),
    [
        (
            ("null:CPU",),
            ("targets in (null:GPU)",),
            "--targets null:CPU and the constraint `targets in (null:GPU)` leave nothing to run on; drop one",
        ),
        (
            (),
            ("targets in (null:CPU), targets in (null:GPU)",),
            "the constraint `targets in (null:CPU)` and the constraint `targets in (null:GPU)` leave nothing to run on; drop one of them",
        ),
    ],
)
def test_what_leaves_nothing_to_run_on_is_named(targets: tuple[str, ...], constraints: tuple[str, ...], said: str) -> None:
    options = TuneOptions(model="m.onnx", targets=targets, constraints=constraints)
    with pytest.raises(UsageError) as refused:
        allowed(options, [CPU, GPU], [])
    assert said in str(refused.value)


def test_several_constraints_on_targets_all_hold() -> None:
    options = TuneOptions(model="m.onnx", constraints=("targets in (null:CPU, null:GPU)", "targets in (null:GPU)"))
    assert allowed(options, [CPU, GPU], []) == (GPU,)

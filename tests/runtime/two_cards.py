"""Two cards made of arithmetic that take their time: one answers a call at a time, and another's copies pass while it computes."""

from __future__ import annotations

from aivmm.runtime.null import NullBackend
from aivmm.runtime.null_device import NullDevice

LAYERS, WIDTH = 8, 64
COMPUTE_S, COPY_S = 0.02, 0.004  # of the whole model; of each tensor that crosses
_FLOPS = 2 * 2 * WIDTH * WIDTH * LAYERS  # of the matrix products of `chain_model` with two rows


def _card(name: str) -> NullDevice:
    return NullDevice(
        name=name,
        kind="gpu",
        flops_per_s=1e12,
        efficiency={"MatMul": _FLOPS / COMPUTE_S / 1e12},
        bytes_per_s=1e12,
        launch_s=0.0,
        copy_s=COPY_S,
        cores=1,
        max_streams=1,
        real_time=True,
    )


class TwoCards(NullBackend):
    """The null backend with these devices alone."""


_ONE = TwoCards([_card("GPU.0"), _card("GPU.1")])  # for the whole process, as devices are


def backend() -> TwoCards:
    """Return the only one."""
    return _ONE

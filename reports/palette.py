"""Which colour a target has. The colours themselves are CSS variables `--t0` .. `--t7`, one set for light and one for dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from aivmm.runtime.target import matches

SLOTS = 8
OTHER = SLOTS - 1  # grey: AUTO and whatever else is not one target

# The usual targets keep one colour in every report, so that two reports can be read side by side.
_PREFERRED = (
    ("openvino:CPU", 0),
    ("onnxruntime:CPU", 1),
    ("openvino:GPU", 2),
    ("onnxruntime:CUDA", 3),
    ("openvino:NPU", 4),
    ("onnxruntime:TensorRT", 5),
    ("openvino:AUTO", OTHER),
)


def slots(targets: Iterable[str]) -> Mapping[str, int]:
    """Return a colour slot for each target; a known target has its own, the rest take the free ones in order, then share the last."""
    names = list(dict.fromkeys(targets))
    chosen: dict[str, int] = {}
    for pattern, slot in _PREFERRED:
        first = next((name for name in names if name not in chosen and matches(pattern, name)), None)
        if first is not None:
            chosen[first] = slot
    free = iter([slot for slot in range(OTHER) if slot not in chosen.values()])
    for name in names:
        if name not in chosen:
            chosen[name] = next(free, OTHER)
    return chosen

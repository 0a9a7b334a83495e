"""aivmm: measure a model on every device of this machine, plan, prove the plan, and run it.

    import aivmm

    result = aivmm.tune("model.onnx")
    with aivmm.load_plan("model.aivmm") as engine:
        outputs = engine.run({"input": array})

What `__all__` does not name is not public. Names load on first use: running a plan imports none of the tuning machinery.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aivmm.errors import AivmmError, BundleError, DatabaseError, Infeasible, ModelError, Unsupported, UsageError
    from aivmm.face import deploy, devices, evidence, load_plan, tune
    from aivmm.result import TuneResult
    from aivmm.runtime.engine import Engine
    from aivmm.runtime.many import Engines, ShapedEngine

# ONNX Runtime's builds for Linux write a device id and a queue of events below ~/.cache/Microsoft as soon as they are imported, to be sent
# to Microsoft. Nothing of ours sends anything; whoever wants to take part has set the variable to 0 before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "AivmmError": "errors",
    "BundleError": "errors",
    "DatabaseError": "errors",
    "Engine": "runtime.engine",
    "Engines": "runtime.many",
    "Infeasible": "errors",
    "ModelError": "errors",
    "ShapedEngine": "runtime.many",
    "TuneResult": "result",
    "Unsupported": "errors",
    "UsageError": "errors",
    "deploy": "face",
    "devices": "face",
    "evidence": "face",
    "load_plan": "face",
    "tune": "face",
}

__all__ = [
    "AivmmError",
    "BundleError",
    "DatabaseError",
    "Engine",
    "Engines",
    "Infeasible",
    "ModelError",
    "ShapedEngine",
    "TuneResult",
    "Unsupported",
    "UsageError",
    "__version__",
    "deploy",
    "devices",
    "evidence",
    "load_plan",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("aivmm")
    if name not in _HOMES:
        raise AttributeError(f"module 'aivmm' has no attribute {name!r}")
    value = getattr(import_module(f"aivmm.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

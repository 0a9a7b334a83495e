"""Text to copy: how to run the plan in production, and how to reproduce the run."""

from __future__ import annotations

import shlex
from pathlib import PurePath

from aivmm.reports.data import ReportData, dig
from aivmm.tensors import TensorSpec


def production(data: ReportData) -> str:
    """Return Python that loads the plan and runs it once, with the model's own input names, types and shapes."""
    lines = [
        "import numpy as np",
        "import aivmm",
        "",
        "inputs = {",
        *[f"    {_literal(spec.name)}: {_array(spec)}," for spec in data.run.model.inputs],
        "}",
        f"with aivmm.load_plan({_literal(plan_path(data))}) as engine:",
        "    outputs = engine.run(inputs)",
    ]
    lines += [f"    outputs[{_literal(spec.name)}]  # {spec.dtype}[{_shape(spec)}]" for spec in data.run.model.outputs]
    return "\n".join(lines)


def plan_path(data: ReportData) -> str:
    """Return the bundle's path as the run stored it."""
    return str(dig(data.run.summary, "plan", "path") or f"{PurePath(data.run.model.name).name}.aivmm")


def reproduce(data: ReportData) -> str:
    """Return the command that was given; one that asks for the same where none was stored."""
    if data.run.command:
        return data.run.command
    words = ["aivmm-tune", data.run.model.path, "--objective", data.run.objective, "--seed", str(data.run.seed)]
    for constraint in data.run.constraints:
        words += ["--constraint", constraint]
    return shlex.join(words)


def try_it(data: ReportData) -> str:
    """Return the command that runs the plan from a shell."""
    return shlex.join(["aivmm", "run", plan_path(data)])


def _literal(text: str) -> str:
    """Return a Python string literal in which nothing invisible is left invisible."""
    return repr(text) if text.isprintable() else ascii(text)


def _array(spec: TensorSpec) -> str:
    shape = ", ".join("1" if extent is None else str(extent) for extent in spec.shape)
    shape = f"({shape},)" if len(spec.shape) == 1 else f"({shape})"
    if spec.dtype == "string":
        return f'np.full({shape}, "", dtype=object)'
    if spec.dtype in ("bfloat16", "int4", "uint4", "int2", "uint2") or spec.dtype.startswith("float8"):
        return f"np.zeros({shape}, dtype=ml_dtypes.{spec.dtype})"
    return f'np.zeros({shape}, dtype="{spec.dtype}")'


def _shape(spec: TensorSpec) -> str:
    return ", ".join("?" if extent is None else str(extent) for extent in spec.shape)

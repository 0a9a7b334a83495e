"""What a worker does for a conformance suite: compile a case's model, run it on the case's inputs, compare with the case's outputs.

The cases and the comparison are those of the ONNX project (`onnx.backend.test`); all that runs is our own seam: `Backend.compile`,
`Request.bind`, `Request.run`, `Request.output`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aivmm.probes import phases, wire
from aivmm.probes.accuracy import judge
from aivmm.runtime.backend import Executable
from aivmm.runtime.config import Config
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Target

if TYPE_CHECKING:
    import onnx

    from aivmm.probes.runners import State

# Two units in the last place of a bfloat16: what the suite itself allows for that type.
_BFLOAT16_RTOL = 2**-6


def conformance_case(
    state: State, *, model: str, target: dict[str, Any], data: Sequence[str], interface: str, rtol: float, atol: float
) -> dict[str, Any]:
    """Run the model at `model` on each folder of `data` (`input_0.pb`, ..., `output_0.pb`, ...); answer with what is wrong, or "".

    The arrays are those of the inputs and outputs that the model at `interface` declares, in its order; `model` is the same one, prepared.

    Raises:
        Unsupported: the runtime refuses to compile or to run it.
    """
    import onnx

    where = wire.target_in(target)
    assert isinstance(where, Target)
    declared = onnx.load(interface, load_external_data=False).graph
    weights = {each.name for each in declared.initializer}  # which old files list as inputs too
    # Not the default, which is bfloat16 on some CPUs: the suite's tolerances are meant for the types that the models declare.
    executable = load_backend(where.runtime).compile(Path(model), where, Config(precision="fp32"))
    try:
        phases.enter(phases.RUN)
        for folder in map(Path, data):
            inputs = _values(folder, "input", [each for each in declared.input if each.name not in weights])
            expected = _values(folder, "output", declared.output)
            problem = _difference(expected, _outputs(executable, inputs, list(expected)), rtol, atol)
            if problem:
                return {"wrong": problem}
    finally:
        executable.close()
    return {"wrong": ""}


def _values(folder: Path, kind: str, declared: Sequence[onnx.ValueInfoProto]) -> dict[str, Any]:
    """Read `kind_0.pb`, ... as the values of the tensors declared, in order."""
    count = len(list(folder.glob(f"{kind}_*.pb")))
    return {value.name: _value((folder / f"{kind}_{index}.pb").read_bytes(), value.type) for index, value in enumerate(declared[:count])}


def _value(raw: bytes, declared: onnx.TypeProto) -> Any:
    import onnx
    from onnx import numpy_helper

    match declared.WhichOneof("value"):
        case "sequence_type":
            return numpy_helper.to_list(onnx.SequenceProto.FromString(raw))
        case "optional_type":
            return numpy_helper.to_optional(onnx.OptionalProto.FromString(raw))
    return np.array(numpy_helper.to_array(onnx.TensorProto.FromString(raw)))  # a copy: runtimes share only what may be written


def _outputs(executable: Executable, inputs: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    request = executable.new_request()
    for spec in executable.inputs:  # a runtime may drop an input that nothing reads
        request.bind(spec.name, inputs[spec.name])
    request.run()
    return {name: _copied(request.output(name)) for name in names}  # while the request lives: the arrays are its own


def _copied(value: Any) -> Any:
    return np.array(value) if isinstance(value, np.ndarray) else value


def _difference(expected: dict[str, Any], actual: dict[str, Any], rtol: float, atol: float) -> str:
    """Compare as the suite does (`onnx.backend.test.runner.Runner.assert_similar_outputs`); return the first difference in words, or ""."""
    for name, wanted in expected.items():
        problem = _differs(wanted, actual[name], rtol, atol)
        if problem:
            return f"output {name!r} {problem}"
    return ""


def _differs(wanted: Any, found: Any, rtol: float, atol: float) -> str:
    if isinstance(wanted, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(wanted):
            return f"is no sequence of {len(wanted)} elements"
        return next((problem for one, other in zip(wanted, found, strict=True) if (problem := _differs(one, other, rtol, atol))), "")
    if wanted is None or found is None:
        return "" if wanted is found else "is there and should not be, or the other way round"
    wanted, found = np.asarray(wanted), np.asarray(found)
    if wanted.shape != found.shape:
        return f"has shape {list(found.shape)}, expected {list(wanted.shape)}"
    if wanted.dtype.kind in "OSTU":
        equal = [str(each) for each in wanted.ravel()] == [_text(each) for each in found.ravel()]
        return "" if equal else "holds other strings"
    if wanted.dtype.name != found.dtype.name:
        return f"has type {found.dtype.name}, expected {wanted.dtype.name}"
    return _far(wanted, found, rtol, atol)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _far(wanted: np.ndarray[Any, Any], found: np.ndarray[Any, Any], rtol: float, atol: float) -> str:
    """As `numpy.testing.assert_allclose`: |found - wanted| <= atol + rtol |wanted|, NaN equal to NaN and infinities to themselves."""
    if wanted.dtype.name == "bfloat16":
        rtol = max(rtol, _BFLOAT16_RTOL)
    if wanted.dtype.kind not in "biufc":  # types that ml_dtypes adds, none wider than a float32
        wanted, found = wanted.astype(np.float32), found.astype(np.float32)
    if wanted.dtype.kind in "b":
        near = wanted == found
    else:
        with np.errstate(all="ignore"):
            near = np.isclose(found, wanted, rtol=rtol, atol=atol, equal_nan=True)
    if near.all():
        return ""
    first = tuple(int(axis[0]) for axis in np.nonzero(~near)) if near.ndim else ()
    place = f" at {list(first)}" if first else ""
    found_there, wanted_there = found[first], wanted[first]
    error = judge({"": found}, {"": wanted}).relative_l2
    differs = f"differs in {int((~near).sum())} of {near.size} elements: {found_there}{place}, expected {wanted_there}"
    return differs + (f" (relative L2 {error:.1g})" if wanted.dtype.kind in "fc" and np.isfinite(error) else "")


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {"conformance_case": conformance_case}

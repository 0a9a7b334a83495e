"""The ONNX project's own backend test suite, run through our backends.

    python -m benchmarks.onnx_conformance [--out benchmarks/results/onnx_conformance.md] [--json FILE] [--only REGEX]

Every case that the `onnx` package brings (node, simple, PyTorch's, light models) is compiled and run on each runtime's CPU in a worker,
with limits for compiling and running; what kills or stalls a worker costs that case. A model that a runtime refuses as it is gets a
second try after our own preparation (versions lowered or raised, shapes bound, functions inlined). Results are compared within the
case's own rtol and atol.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import psutil
from onnx import numpy_helper

from aivmm.errors import AivmmError
from aivmm.probes import wire
from aivmm.probes.client import Worker, WorkerDied
from aivmm.runtime.cpu import cpu_device
from aivmm.runtime.finding import find_target
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Target
from benchmarks.onnx_readings import operators_without_rule, reading_of, reason_of

ROOT = Path(__file__).parent.parent
RUNTIMES = ("openvino", "onnxruntime")
COMPILE_LIMIT_S, RUN_LIMIT_S, PREPARE_LIMIT_S = 60.0, 60.0, 60.0
Status = Literal["passed", "passed when prepared", "refused", "wrong", "crashed", "hung"]
STATUSES: tuple[Status, ...] = ("passed", "passed when prepared", "refused", "wrong", "crashed", "hung")
_ORT = "onnxruntime-gpu" if platform.machine() in ("x86_64", "AMD64") else "onnxruntime"
_DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"


@dataclass(frozen=True)
class Case:
    """One case on disk."""

    name: str
    kind: str  # "node", "simple", "light", ...
    model: Path
    data: tuple[Path, ...]  # folders of input_0.pb, ..., output_0.pb, ...
    rtol: float
    atol: float


@dataclass(frozen=True)
class Result:
    """How a case came out on a runtime. `detail` is the reason, in the runtime's words, or what differs."""

    case: str
    kind: str
    runtime: str
    status: Status
    detail: str = ""
    notes: tuple[str, ...] = ()  # what preparation changed, where it was needed


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "onnx_conformance.md")
    parser.add_argument("--json", type=Path, help="write every result there too")
    parser.add_argument("--only", default="", help="a regular expression that names must match")
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cases = [each for each in write_cases(Path(folder)) if re.search(arguments.only, each.name)]
        results = run_cases(cases, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(each) for each in results], indent=1))
    text = report(cases, results, time.perf_counter() - started)
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(text)
    print(text.partition("## Wrong")[0])


# --- cases


def write_cases(folder: Path, operators: Sequence[str] | None = None) -> list[Case]:
    """Bring every case of the installed suite to disk below `folder`, in a fixed order; of the node cases only those of some `operators`.

    `operators` are modules of `onnx.backend.test.case.node`: to make all cases takes ten seconds.
    """
    found = [*_node_cases(folder / "node", operators), *_stored_cases(), *_light_cases(folder / "light")]
    return sorted(found, key=lambda each: (each.kind, each.name))


def _node_cases(folder: Path, operators: Sequence[str] | None) -> Iterator[Case]:
    """Cases of one operator, which the suite makes in memory when their module is imported."""
    from onnx.backend.test.case import node
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # they overflow on purpose
        if operators is None:
            load_model_tests(kind="node")
        for name in operators or ():
            import_module(f"{node.__name__}.{name}")
    for each in [] if operators == () else list(node._NodeTestCases):
        place = folder / each.name
        place.mkdir(parents=True)
        (place / "model.onnx").write_bytes(each.model.SerializeToString())
        data = []
        for number, (inputs, outputs) in enumerate(each.data_sets):
            data.append(place / str(number))
            data[-1].mkdir()
            _write_values(data[-1], "input", inputs, each.model.graph.input)
            _write_values(data[-1], "output", outputs, each.model.graph.output)
        yield Case(each.name, "node", place / "model.onnx", tuple(data), each.rtol, each.atol)


def _write_values(folder: Path, kind: str, values: Sequence[Any], declared: Sequence[onnx.ValueInfoProto]) -> None:
    for index, (value, info) in enumerate(zip(values, declared, strict=False)):
        (folder / f"{kind}_{index}.pb").write_bytes(_proto(value, info).SerializeToString())


def _proto(value: Any, info: onnx.ValueInfoProto) -> Any:
    if isinstance(value, onnx.TensorProto | onnx.SequenceProto | onnx.OptionalProto):
        return value
    match info.type.WhichOneof("value"):
        case "sequence_type":
            return numpy_helper.from_list(value, info.name)
        case "optional_type":
            return numpy_helper.from_optional(value, info.name)
    return numpy_helper.from_array(np.asarray(value), info.name)


def _stored_cases() -> Iterator[Case]:
    """Cases whose model and data lie in the package."""
    from onnx.backend.test.loader import load_model_tests

    for kind in ("simple", "pytorch-converted", "pytorch-operator"):
        for each in load_model_tests(kind=kind):
            place = Path(each.model_dir)
            yield Case(each.name, kind, place / "model.onnx", tuple(sorted(place.glob("test_data_set_*"))), each.rtol, each.atol)


def _light_cases(folder: Path) -> Iterator[Case]:
    """Real architectures with constant weights; the input is made as the suite's runner makes it."""
    from onnx.backend.test.loader import load_model_tests
    from onnx.backend.test.runner import Runner

    for each in load_model_tests(kind="real"):
        model = _DATA / "light" / Path(each.url).name
        graph = onnx.load(model).graph
        weights = {value.name for value in graph.initializer}
        place = folder / each.name / "0"
        place.mkdir(parents=True)
        declared = [value for value in graph.input if value.name not in weights]
        _write_values(place, "input", [Runner.generate_dummy_data(value) for value in declared], declared)
        for index in range(len(graph.output)):
            (place / f"output_{index}.pb").write_bytes(model.with_name(f"{model.stem}_output_{index}.pb").read_bytes())
        yield Case(each.name, "light", model, (place,), each.rtol, each.atol)


# --- running


def run_cases(cases: Sequence[Case], folder: Path, runtimes: Sequence[str] = RUNTIMES) -> list[Result]:
    """Run the cases on each runtime, side by side; every case gives one result for each, whatever happens."""
    with ThreadPoolExecutor(max_workers=len(runtimes)) as pool:
        return [result for found in pool.map(lambda each: _run_on(each, cases, folder), runtimes) for result in found]


def _run_on(runtime: str, cases: Sequence[Case], folder: Path) -> list[Result]:
    target = find_target(load_backend(runtime), "CPU")
    with Worker(runtime) as worker, Worker(f"preparing for {runtime}") as preparer:
        results = []
        for number, case in enumerate(cases):
            if sys.stderr.isatty() or number % 200 == 0:
                print(f"{runtime}: {number} of {len(cases)}", end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr)
            results.append(_run_case(worker, preparer, target, case, folder / f"{runtime}-{case.kind}-{case.name}.onnx"))
        return results


def _run_case(worker: Worker, preparer: Worker, target: Target, case: Case, prepared: Path) -> Result:
    status, detail = _try(worker, target, case, case.model)
    notes: tuple[str, ...] = ()
    if status == "refused":
        found = _prepare(preparer, case, prepared)
        if isinstance(found, tuple):
            notes = found
            status, again = _try(worker, target, case, prepared)
            status = "passed when prepared" if status == "passed" else status
            detail = again or ("" if status != "refused" else detail)
        else:
            detail = f"{detail} (and cannot be prepared: {found})"
        prepared.unlink(missing_ok=True)
    return Result(case.name, case.kind, target.runtime, status, detail, notes)


def _try(worker: Worker, target: Target, case: Case, model: Path) -> tuple[Status, str]:
    try:
        answer = worker.call(
            "conformance_case",
            limit_s=COMPILE_LIMIT_S,
            run_limit_s=RUN_LIMIT_S,
            model=str(model),
            target=wire.target_out(target),
            data=list(map(str, case.data)),
            interface=str(case.model),
            rtol=case.rtol,
            atol=case.atol,
        )
    except AivmmError as error:
        return "refused", error.message
    except WorkerDied as died:
        return ("hung" if died.reason.startswith("took longer") else "crashed"), died.reason
    except RuntimeError as error:  # our own Python code broke in the worker
        return "crashed", f"our code: {str(error).strip().rpartition(chr(10))[2]}"
    return ("wrong", answer["wrong"]) if answer["wrong"] else ("passed", "")


def _prepare(preparer: Worker, case: Case, destination: Path) -> tuple[str, ...] | str:
    """Prepare the case's model for the shapes of its first data set; return what was changed, or why it cannot be."""
    try:
        answer = preparer.call(
            "prepare",
            limit_s=PREPARE_LIMIT_S,
            source=str(case.model),
            destination=str(destination),
            shapes=_shapes(case),
            dims={},
            batch=1,
        )
    except AivmmError as error:
        return error.message
    except WorkerDied as died:
        return died.reason
    except RuntimeError as error:
        return f"our code: {str(error).strip().rpartition(chr(10))[2]}"
    return tuple(answer["facts"]["notes"])


def _shapes(case: Case) -> dict[str, list[int]]:
    graph = onnx.load(case.model, load_external_data=False).graph
    weights = {value.name for value in graph.initializer}
    found = {}
    for index, value in enumerate(each for each in graph.input if each.name not in weights):
        path = case.data[0] / f"input_{index}.pb"
        if value.type.HasField("tensor_type") and path.is_file():
            found[value.name] = list(onnx.TensorProto.FromString(path.read_bytes()).dims)
    return found


# --- reporting


def report(cases: Sequence[Case], results: Sequence[Result], seconds: float) -> str:
    """Return the page."""
    lines = [
        *_head(cases, seconds),
        "",
        *_table(results),
        "",
        *_prepared(results),
        "",
        "## Wrong",
        "",
        *_wrong(results),
        "",
        "## Crashed or hung",
        "",
        *_crashed(results),
        "",
        "## Refused",
        "",
        *_refused(results),
    ]
    return "\n".join(lines) + "\n"


def _head(cases: Sequence[Case], seconds: float) -> list[str]:
    device = cpu_device()
    packages = ", ".join(f"{each} {version(each)}" for each in ("aivmm", "openvino", _ORT, "onnx"))
    load = ", ".join(f"{each:.1f}" for each in psutil.getloadavg())
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(each.kind for each in cases).items())
    return [
        "# The ONNX project's backend tests on our backends",
        "",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {device.model}, {device.cores} cores; {platform.platform()}; Python "
        f"{platform.python_version()}; {packages}; load average at the end {load}; {seconds:.0f} s.",
        "",
        f"`python -m benchmarks.onnx_conformance`: {len(cases)} cases ({kinds}), each through `Backend.compile`, `Request.bind`, `run` and",
        "`output` in a worker, in fp32 on the CPU (a default may be bfloat16), compared within the case's own rtol and atol.",
        "*Prepared*: the runtime refused the model as it is and took it after our preparation.",
    ]


def _table(results: Sequence[Result]) -> list[str]:
    lines = [f"| runtime | cases | {' | '.join(STATUSES)} |", f"|{'---|' * (len(STATUSES) + 2)}"]
    for kind in (None, *dict.fromkeys(each.kind for each in results)):
        for runtime in dict.fromkeys(each.runtime for each in results):
            mine = [each for each in results if each.runtime == runtime and kind in (None, each.kind)]
            counts = Counter(each.status for each in mine)
            name = f"**{runtime}**" if kind is None else f"{runtime}, {kind}"
            lines.append(f"| {name} | {len(mine)} | {' | '.join(str(counts[status]) for status in STATUSES)} |")
    return lines


def _prepared(results: Sequence[Result]) -> list[str]:
    lines = []
    for runtime in dict.fromkeys(each.runtime for each in results):
        mine = [each for each in results if each.runtime == runtime and each.status == "passed when prepared"]
        notes = Counter(
            note for each in mine for note in each.notes if re.match(r"opset|IR version|no operator set|\d+ model functions", note)
        )
        shown = "; ".join(f"{note} ({count})" for note, count in notes.most_common(8))
        lines.append(f"What preparation changed in the {len(mine)} that {runtime} then passed: {shown or 'nothing of versions'}.")
    return lines


def _wrong(results: Sequence[Result]) -> list[str]:
    """List the wrong ones under what was found out about them."""
    lines = []
    for runtime in dict.fromkeys(each.runtime for each in results):
        mine = [each for each in results if each.runtime == runtime and each.status == "wrong"]
        groups: dict[str, list[Result]] = {}
        for each in mine:
            reading = reading_of(runtime, each.case, each.detail)
            groups.setdefault(reading.text if reading else "NOT LOOKED AT", []).append(each)
        lines += [f"### {runtime}: {len(mine)}", ""]
        for text, members in sorted(groups.items()):
            lines.append(f"- {text} ({len(members)}):")
            lines += [f"  - {each.case}: {each.detail}" for each in members]
        lines.append("")
    return lines[:-1]


def _crashed(results: Sequence[Result]) -> list[str]:
    found = [each for each in results if each.status in ("crashed", "hung")]
    return [f"- {each.runtime}, {each.case}: {each.detail}" for each in found] or ["- nothing"]


def _refused(results: Sequence[Result]) -> list[str]:
    lines = ["| runtime | reason | cases | for example |", "|---|---|---|---|"]
    refused = [each for each in results if each.status == "refused"]
    for (runtime, reason), count in Counter((each.runtime, reason_of(each.detail)) for each in refused).most_common():
        example = next(each for each in refused if (each.runtime, reason_of(each.detail)) == (runtime, reason))
        lines.append(f"| {runtime} | {reason} | {count} | {example.case}: {_cell(example.detail)} |")
    operators = Counter(name for each in refused for name in dict.fromkeys(operators_without_rule(each.detail)))
    lines += ["", f"Operators without a conversion rule: {', '.join(f'{name} ({count})' for name, count in operators.most_common())}."]
    return lines


def _cell(text: str) -> str:
    """Shorten a runtime's words for a table; paths of the run say nothing."""
    plain = re.sub(r"/\S*/(?=[\w.-]+)", "", text).replace("|", "\\|")
    return plain if len(plain) <= 200 else plain[:200] + " …"


if __name__ == "__main__":
    main()

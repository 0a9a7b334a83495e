"""The laboratory: the workers, one for each runtime, and what is loaded in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from aivmm.errors import AivmmError
from aivmm.models.input_contract import InputContract
from aivmm.models.records import ModelFacts
from aivmm.probes import wire
from aivmm.probes.accuracy import combined
from aivmm.probes.client import Worker, WorkerDied, compile_limit_s, run_limit_s
from aivmm.probes.machine import QUIET_LIMIT_S, wait_until_quiet
from aivmm.probes.race import Contestant, runs_single
from aivmm.probes.user_code import ask
from aivmm.runtime.backend import Baseline
from aivmm.runtime.config import Config, Knob
from aivmm.runtime.registry import BACKENDS
from aivmm.runtime.target import Target, Unavailable
from aivmm.tensors import TensorSpec

if TYPE_CHECKING:
    from aivmm.models.lowering_recipes import Recipe

COMPILE_LIMIT_S = 300.0  # compilations of minutes are real on NPUs
RUN_LIMIT_S = 120.0
_DISCOVER_LIMIT_S = 120.0
_LOWER_LIMIT_S = 900.0
_USER_CODE_LIMIT_S = 300.0  # of a function that the user names: reading a data set may take a while


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model that was compiled in a worker, and what was seen while doing so."""

    contestant: Contestant
    compile_s: float
    first_inference_s: float
    effective_config: Mapping[str, Any]
    nodes: Mapping[str, int]
    stray: tuple[str, ...]  # the first of the nodes that are on another device than the target's
    strays: int  # how many there are
    device_memory_bytes: int | None  # that it holds of the target's own memory; None where nothing tells
    accuracy: Mapping[str, float]
    problem: str  # what makes the outputs unusable, or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A lowered model: its file, and what its reader should know."""

    path: Path
    nodes: int  # operators that were lowered
    weight_bytes: int
    duration_s: float
    file_bytes: int
    sha256: str  # of the file
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """How much noise (relative power of the error) each part of a lowered model adds, lowered alone, and the whole."""

    parts: tuple[tuple[int, int, tuple[str, ...], float], ...]  # first block, last block, operators, noise
    whole: float
    complete: bool  # False when time ran out: the parts are then not all


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """A user's samples as files of arrays: those to calibrate with, those to judge with, and what else the data set says of each."""

    calibration: tuple[Path, ...]
    validation: tuple[Path, ...]
    extras: tuple[Path | None, ...]  # beside `validation`
    calibration_extras: tuple[Path | None, ...]  # beside `calibration`
    notes: tuple[str, ...]


class Lab:
    """Owns the workers. What crashes in one costs what is loaded there, and nothing else."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self.trouble: list[str] = []  # what went wrong without costing a probe, for the user to know
        self._count = 0
        self._closed = False
        self._quiet: dict[str, int] = {}  # worker's name -> the requests it had had when it was last seen doing nothing

    def worker(self, runtime: str) -> Worker:
        """Return the worker that runs one runtime."""
        found = self._workers.setdefault(runtime, Worker(runtime))
        if self._closed:
            found.retire()
        return found

    def pids(self) -> list[int]:
        """Return the process ids of the workers that run."""
        return [worker.pid for worker in self._workers.values() if worker.pid]

    def wait_for_others(self, worker: Worker) -> None:
        """Return when no other worker burns CPU time, as threads that spin do for a while. One that was asked nothing since is left out."""
        for other in self._workers.values():
            if other is not worker and other.pid and self._quiet.get(other.name) != other.asked:
                asked = other.asked
                if wait_until_quiet(other.pid) < QUIET_LIMIT_S:
                    self._quiet[other.name] = asked

    def discover(self, backends: Sequence[str]) -> tuple[tuple[Target, ...], tuple[Unavailable, ...]]:
        """List the targets of each backend, and what is absent and why; a runtime that crashes while looking is absent for that reason."""
        targets: list[Target] = []
        absent: list[Unavailable] = []
        with ThreadPoolExecutor(max_workers=max(1, len(backends))) as pool:  # most of it is waiting for libraries to load
            asked = [pool.submit(self.worker(name).call, "discover", limit_s=_DISCOVER_LIMIT_S, backends=[name]) for name in backends]
        for name, one in zip(backends, asked, strict=True):
            try:
                answer = one.result()
            except WorkerDied as died:
                absent.append(Unavailable(target=name, reason=f"looking for its devices {died.reason}", advice="check the driver"))
                continue
            except AivmmError as error:
                absent.append(Unavailable(target=name, reason=error.message, advice=error.advice))
                continue
            except RuntimeError as error:
                if name in BACKENDS:
                    raise  # a bug of ours keeps its traceback; one of a plug-in must not stop the others
                last = str(error).strip().rpartition("\n")[2]
                absent.append(Unavailable(target=name, reason=f"its plug-in failed: {last}", advice="report it to the plug-in's authors"))
                continue
            for each in map(wire.target_in, answer["targets"]):
                if isinstance(each, Target):
                    targets.append(each)
                else:
                    absent.append(each)
        return tuple(targets), tuple(absent)

    def knobs(self, target: Target) -> tuple[Knob, ...]:
        """List the knobs of a target."""
        try:
            answer = self.worker(target.runtime).call("knobs", limit_s=run_limit_s(), target=wire.target_out(target))
        except WorkerDied as died:
            self.trouble.append(f"nothing was searched on {target}: asked for its settings, {target.runtime} {died.reason}")
            return ()
        return tuple(map(wire.knob_in, answer["knobs"]))

    def baselines(self, targets: Sequence[Target], objective: str) -> tuple[Baseline, ...]:
        """List what a user would run on the targets without us."""
        found: list[Baseline] = []
        for runtime in dict.fromkeys(target.runtime for target in targets):
            mine = [wire.target_out(target) for target in targets if target.runtime == runtime]
            try:
                answer = self.worker(runtime).call(
                    "baselines", limit_s=run_limit_s(), targets=mine, objective=objective, backends=[runtime]
                )
            except WorkerDied as died:
                self.trouble.append(f"{runtime} has no baseline: asked for them, it {died.reason}")
                continue
            for each in answer["baselines"]:
                target = wire.target_in(each["target"])
                assert isinstance(target, Target)
                found.append(Baseline(name=each["name"], target=target, config=wire.config_in(each["config"]), callers=each["callers"]))
        return tuple(found)

    def prepare(
        self,
        source: Path,
        destination: Path,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        dims: Mapping[str, int],
        batch: int,
        contract: InputContract | None = None,
    ) -> ModelFacts:
        """Prepare a model file in a worker: shape inference is native code."""
        answer = self.worker("models").call(
            "prepare",
            limit_s=COMPILE_LIMIT_S,
            source=str(source),
            destination=str(destination),
            shapes={name: list(shape) for name, shape in shapes.items()},
            dims=dict(dims),
            batch=batch,
            contract=wire.contract_out(contract or InputContract()),
        )
        return wire.facts_in(answer["facts"])

    def write_demo(self, name: str, folder: Path) -> Path:
        """Write a demo model."""
        return Path(self.worker("models").call("demo", limit_s=COMPILE_LIMIT_S, name=name, folder=str(folder))["path"])

    def make_samples(self, model: Path, specs: tuple[TensorSpec, ...], destinations: Sequence[Path], *, seed: int) -> None:
        """Write sample inputs that suit a model."""
        self.worker("models").call(
            "samples",
            limit_s=RUN_LIMIT_S,
            model=str(model),
            specs=wire.specs_out(specs),
            destinations=list(map(str, destinations)),
            seed=seed,
        )

    def lower(self, model: Path, folder: Path, recipe: Recipe, *, samples: Sequence[Path], content: str) -> Made:
        """Lower a prepared model; what was made before is taken from `folder`. The worker ends with it: the tools leave gigabytes behind.

        Raises:
            Unsupported: the recipe does not apply.
            WorkerDied: the tool crashed or hung.
        """
        answer = self._lowering(
            "lower",
            model=str(model),
            folder=str(folder),
            recipe=recipe.name,
            options=dict(recipe.options),
            samples=list(map(str, samples)),
            content=content,
        )
        return Made(**{**answer, "path": Path(answer["path"]), "notes": tuple(answer["notes"])})

    def sensitivity(
        self,
        model: Path,
        lowered: Path,
        recipe: Recipe,
        *,
        blocks: Sequence[tuple[int, int]],
        samples: Sequence[Path],
        references: Sequence[Path],
        most: int,
        limit_s: float,
    ) -> Sensitivity:
        """Measure the noise of each part of a lowered model. Raises as `lower`."""
        answer = self._lowering(
            "sensitivity",
            model=str(model),
            lowered=str(lowered),
            recipe=recipe.name,
            options=dict(recipe.options),
            blocks=[list(each) for each in blocks],
            samples=list(map(str, samples)),
            references=list(map(str, references)),
            most=most,
            within_s=limit_s,
        )
        parts = tuple((each["first"], each["last"], tuple(each["nodes"]), float(each["noise"])) for each in answer["parts"])
        return Sensitivity(parts=parts, whole=float(answer["whole"]), complete=bool(answer["complete"]))

    def noise(
        self, model: Path, lowered: Path, recipe: Recipe, plain: Sequence[str], *, samples: Sequence[Path], references: Sequence[Path]
    ) -> float:
        """Measure the noise of a lowered model when some operators stay as they were. Raises as `lower`."""
        answer = self._lowering(
            "noise",
            model=str(model),
            lowered=str(lowered),
            recipe=recipe.name,
            options=dict(recipe.options),
            plain=list(plain),
            samples=list(map(str, samples)),
            references=list(map(str, references)),
        )
        return float(answer["noise"])

    def _lowering(self, operation: str, **arguments: Any) -> dict[str, Any]:
        worker = Worker("lowering")
        try:
            return worker.call(operation, limit_s=_LOWER_LIMIT_S, **arguments)
        finally:
            worker.close()

    def judge(self, contestant: Contestant, samples: Sequence[Path], references: Sequence[Path]) -> tuple[dict[str, float], str]:
        """Run what is loaded on samples; return the measures over all of them, and what makes its outputs unusable ("" if nothing)."""
        found, problem = [], ""
        for sample, reference in zip(samples, references, strict=True):
            answer = contestant.worker.call(
                "judge", limit_s=run_limit_s(), name=contestant.name, inputs=str(sample), reference=str(reference)
            )
            found.append(answer["accuracy"])
            problem = problem or answer["problem"]
        return combined(found), problem

    def rebatch(self, lowered: Path, base: Path, prepared: Path, destination: Path) -> None:
        """Carry a model lowered at one batch over to another. Raises as `lower`."""
        self.worker("models").call(
            "rebatch", limit_s=COMPILE_LIMIT_S, lowered=str(lowered), base=str(base), prepared=str(prepared), destination=str(destination)
        )

    def read_dataset(
        self, given: str, specs: tuple[TensorSpec, ...], folder: Path, *, most: int, seed: int, source: Path | None = None
    ) -> Data:
        """Read a user's data set, which may be a function of theirs, in a worker of its own.

        Raises:
            UsageError: it cannot be read, does not fit the model, raised, crashed, or never ended. Where samples have other shapes than
                `specs` and `source` is the model's file, it says which ones to tune for.
        """
        more = {} if source is None else {"source": str(source)}
        answer = self._user_code("dataset", given=given, specs=wire.specs_out(specs), folder=str(folder), most=most, seed=seed, **more)
        extras = {path: Path(beside) for path, beside in answer["extras"].items()}
        return Data(
            calibration=tuple(map(Path, answer["calibration"])),
            validation=tuple(map(Path, answer["validation"])),
            extras=tuple(map(extras.get, answer["validation"])),
            calibration_extras=tuple(map(extras.get, answer["calibration"])),
            notes=tuple(answer["notes"]),
        )

    def check_metric(self, function: str) -> None:
        """Import a user's metric, so that a misspelt name is found before anything is measured. Raises as `read_dataset`."""
        self._user_code("check_metric", function=function)

    def metric(self, function: str, samples: Sequence[Path], extras: Sequence[Path | None], outputs: Sequence[Path]) -> float:
        """Return what a user's metric says of outputs. Raises as `read_dataset`."""
        answer = self._user_code(
            "metric",
            function=function,
            samples=list(map(str, samples)),
            extras=[str(each or "") for each in extras],
            outputs=list(map(str, outputs)),
        )
        return float(answer["value"])

    def _user_code(self, operation: str, **arguments: Any) -> dict[str, Any]:
        return ask(self.worker("user code"), operation, limit_s=_USER_CODE_LIMIT_S, **arguments)

    def load(
        self,
        model: Path,
        target: Target,
        config: Config,
        *,
        inputs: Path,
        reference: Path | None = None,
        batch: int = 1,
        callers: int = 1,
        replicas: int = 1,
    ) -> Loaded:
        """Compile a model in its runtime's worker, `replicas` times, and run it once.

        Raises:
            Unsupported: the runtime refuses.
            WorkerDied: it crashed or hung.
        """
        self._count += 1
        name = f"m{self._count}"
        worker = self.worker(target.runtime)
        answer = worker.call(
            "compile",
            limit_s=compile_limit_s(),
            run_limit_s=run_limit_s(),
            name=name,
            model=str(model),
            target=wire.target_out(target),
            config=wire.config_out(config.compiled_for(target.precisions)),
            inputs=str(inputs),
            reference=str(reference) if reference else "",
            callers=callers,
            replicas=replicas,
        )
        return Loaded(
            contestant=Contestant(
                name,
                worker,
                batch=batch,
                callers=callers,
                expected_s=answer["first_inference_s"],
                single=runs_single([target], [config]),
            ),
            compile_s=answer["compile_s"],
            first_inference_s=answer["first_inference_s"],
            effective_config=answer["effective_config"],
            nodes=answer["nodes"],
            stray=tuple(answer["stray"]),
            strays=answer["strays"],
            device_memory_bytes=answer.get("device_memory_bytes"),
            accuracy=answer.get("accuracy", {}),
            problem=answer.get("problem", ""),
        )

    def outputs(self, contestant: Contestant, inputs: Path, destination: Path) -> None:
        """Run what is loaded on the arrays in `inputs` and write its outputs."""
        contestant.worker.call("outputs", limit_s=RUN_LIMIT_S, name=contestant.name, inputs=str(inputs), destination=str(destination))

    def unload(self, contestant: Contestant) -> None:
        """Free what is loaded. What died with its worker is free already."""
        if contestant.worker.pid and contestant.worker.generation == contestant.generation:
            contestant.worker.call("close", limit_s=RUN_LIMIT_S, name=contestant.name)

    def close(self) -> None:
        """End all workers."""
        self._closed = True  # for a thread that still looks for devices
        for worker in list(self._workers.values()):
            worker.retire()

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

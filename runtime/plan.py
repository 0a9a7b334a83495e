"""The plan: what runs where, with what is known of it. `plan.json` is this, and nothing in it is trusted before it is checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from msgspec import Meta, field

from aivmm.errors import UsageError
from aivmm.runtime.config import Config, Setting
from aivmm.runtime.strict import Count, Digest, Extent, Reader, Strict
from aivmm.tensors import TensorSpec

SCHEMA = 1
MOST_EXECUTABLES = 64  # of a stage: its replicas and those of its copies
MOST_LANES = 1024  # requests in flight
_SHORTEST_S = 1e-12  # of a call: less is no time at all, and monitors take logarithms

# By its suffix a runtime would take it for some other format, and read more files; `$` would also match before a line feed at the end.
ModelFile = Annotated[str, Meta(pattern=r"\.onnx(?![\s\S])")]
Replicas = Annotated[int, Meta(ge=1, le=MOST_EXECUTABLES)]
Callers = Annotated[int, Meta(ge=1, le=MOST_LANES)]
Weight = Annotated[float, Meta(gt=0, le=1e9)]
Share = Annotated[float, Meta(ge=0, le=1)]
Value = bool | int | float | str


class Tensor(Strict, frozen=True, kw_only=True):
    """A tensor at the edge of the model or of a stage. A null extent is known only after the run."""

    name: str
    dtype: str
    shape: list[Extent | None]

    @classmethod
    def of(cls, spec: TensorSpec) -> Tensor:
        """Return `spec` as JSON takes it."""
        return cls(name=spec.name, dtype=spec.dtype, shape=list(spec.shape))

    @property
    def spec(self) -> TensorSpec:
        """The tensor's description."""
        return TensorSpec(name=self.name, dtype=self.dtype, shape=tuple(self.shape))


def _said(numbers: Sequence[float]) -> str:
    return f"{numbers[0]:g}" if len(numbers) == 1 else f"[{', '.join(f'{each:g}' for each in numbers)}]"


class Taken(Strict, frozen=True, kw_only=True):
    """An input that the plan takes in fewer bits than the user's model has it, as the user asked; the model of the plan widens it.

    Of uint8 the user's model then gets (pixel - mean) / scale, each of them one number or one a channel; none where it is only cast.
    """

    name: str
    model_dtype: str  # what the user's model has
    dtype: Literal["float16", "uint8"]
    mean: list[float] = []
    scale: list[float] = []

    def __str__(self) -> str:
        if self.dtype == "float16":
            return f"{self.name} as float16"
        how = f"normalised inside: (pixel - {_said(self.mean)}) / {_said(self.scale)}" if self.scale else "only cast inside"
        return f"{self.name} as {self.dtype}, 0 to 255 ({how})"


class Model(Strict, frozen=True, kw_only=True):
    """The model that the plan runs."""

    name: str
    sha256: Digest  # of the user's file
    content: str  # content hash of the prepared model, with weights
    category: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    taken: list[Taken] = []

    def __post_init__(self) -> None:
        types = {each.name: each.dtype for each in self.inputs}
        for each in self.taken:
            if types.get(each.name) != each.dtype:
                raise ValueError(f"{each.name!r} is said to be taken as {each.dtype}, and no input is so")


class Copy(Strict, frozen=True, kw_only=True):
    """A stage's blocks again, on another target or with another config: it runs beside the stage and takes its part of the requests."""

    model: ModelFile
    target: str
    precision: str
    config: dict[str, Value] = {}
    replicas: Replicas = 1
    weight: Weight = 1.0
    share: Share | None = None


class Stage(Strict, frozen=True, kw_only=True):
    """A segment on a target. With `copies` it is also elsewhere, and each request goes through one of them."""

    model: ModelFile  # a file of the bundle: "segments/<hash>.onnx"
    target: str
    precision: str  # "fp32"; "default" leaves it to the runtime; "int8" is in the model itself
    config: dict[str, Value] = {}
    replicas: Replicas = 1  # copies of the stage, compiled each for itself, that take requests in turn
    weight: Weight = 1.0  # each replica's part of the requests in flight, beside those of `copies`
    share: Share | None = None  # its part of the requests answered, all replicas together, by the rates that were measured
    copies: Annotated[list[Copy], Meta(max_length=64)] = []
    blocks: tuple[int, int]  # first and last block of the model, both included
    inputs: list[Tensor]
    outputs: list[Tensor]

    def __post_init__(self) -> None:
        """Raise ValueError for more executables than a stage may have."""
        if self.executables > MOST_EXECUTABLES:
            raise ValueError(f"{self.executables} replicas, those of its copies among them, and a stage may have {MOST_EXECUTABLES}")

    @property
    def compiled_with(self) -> Config:
        """The config, as it was searched; see `Config.compiled_for` for what a target is asked for."""
        return Config.of(dict(self.config), precision=None if self.precision == "default" else self.precision)

    @property
    def executables(self) -> int:
        """The stage's replicas and those of its copies."""
        return self.replicas + sum([each.replicas for each in self.copies])

    def everywhere(self) -> tuple[Stage, ...]:
        """Return the stage and its copies, each as a stage of its own."""
        if not self.copies:
            return (self,)
        alone = self.replaced(copies=[])
        return (alone, *(alone.replaced(**{name: getattr(each, name) for name in Copy.__struct_fields__}) for each in self.copies))

    def weights(self) -> list[float]:
        """Return the weight of each executable: the replicas of the stage, then those of its copies."""
        return [each.weight for each in self.everywhere() for _ in range(each.replicas)]

    def kinds(self) -> list[int]:
        """Return of each executable which of `everywhere` it is a replica of."""
        return [kind for kind, each in enumerate(self.everywhere()) for _ in range(each.replicas)]


class Batching(Strict, frozen=True, kw_only=True):
    """Dynamic batching: rows of several requests run together, and a request may have any number of rows (decision 0017)."""

    max_batch: Count  # rows that run together at most; where the stages have a fixed batch, that at most
    max_wait_s: Annotated[float, Meta(ge=0, le=60)] = 0.0  # how long the first of them waits for company


class Execution(Strict, frozen=True, kw_only=True):
    """How the stages are run. Replicas are the stages' own."""

    mode: Literal["sequential", "pipelined"] = "sequential"  # pipelined: each stage on a thread of its own
    depth: Annotated[int, Meta(ge=1, le=64)] = 3  # pipelined: in flight for each stage and replica; of 2 too often none waits
    batching: Batching | None = None


class Number(Strict, frozen=True, kw_only=True):
    """A number, its 95 % interval, and where it comes from."""

    value: float
    low: float | None = None
    high: float | None = None
    source: Literal["measured", "interpolated", "modelled"]
    samples: int = 0


def _require_calls_that_take_time(expected: dict[str, Number]) -> None:
    for name in ("median_s", "p99_s"):  # other times may be 0: what nodes on the CPU cost where there are none
        number = expected.get(name)
        if number is not None and min(number.value, number.value if number.high is None else number.high) < _SHORTEST_S:
            raise ValueError(f"expected: {name} says that a call takes no time, or less")


Expected = dict[str, Number]  # metric -> number: "median_s", "throughput_per_s", ...


class Accuracy(Strict, frozen=True, kw_only=True):
    """How close the plan's outputs are to the fp32 reference."""

    metric: str
    value: float
    limit: float
    data: Literal["real", "synthetic"]
    reference: str


class Certificate(Strict, frozen=True, kw_only=True):
    """How good the plan was known to be before it was proven, as `sentence` says to a reader. Seconds are of one call, or from one answer
    to the next where `objective` is "throughput".

    `bound_s` is what no other plan of the kind was expected to go below; null where nothing bounds it. `rests_on` are shares of
    `objective_s` by source.
    """

    objective: str
    objective_s: float
    interval_s: tuple[float, float]  # 95 %
    bound_s: float | None = None
    gap: float | None = None
    proven: bool
    rests_on: dict[Literal["measured", "interpolated", "modelled"], float]
    segments_measured: Annotated[int, Meta(ge=0)]
    segments_possible: Annotated[int, Meta(ge=0)]
    planning_s: float
    solves: Annotated[int, Meta(ge=0)]
    sentence: str


class Conditions(Strict, frozen=True, kw_only=True):
    """The environment of one target in which the numbers were measured."""

    target: str
    device_model: str
    driver: str
    runtime_version: str
    instruction_sets: list[str]
    usable_cores: int | None
    power_limit_w: float | None
    system: str


class Alternative(Strict, frozen=True, kw_only=True):
    """Another way to run the model: kept as a fallback, or for another goal.

    `objective` names the goal in which it beats the plan. Its batch and callers are the plan's where they are null.
    """

    name: str
    objective: str = ""
    batch: Count | None = None
    callers: Callers | None = None
    stages: Annotated[list[Stage], Meta(min_length=1)]
    execution: Execution = Execution()
    expected: Expected = {}

    def __post_init__(self) -> None:
        """Raise ValueError where calls are said to take no time."""
        _require_calls_that_take_time(self.expected)


class Plan(Strict, frozen=True, kw_only=True):
    """A decision, with everything needed to run it and to believe it."""

    schema_version: Annotated[int, Meta(ge=1, le=SCHEMA)] = field(name="schema", default=SCHEMA)
    created_by: str  # "aivmm 0.1.0"
    created_at: str  # ISO 8601, UTC
    model: Model
    objective: str
    constraints: list[str] = []
    batch: Count
    callers: Callers = 1  # requests in flight for which the numbers hold
    stages: Annotated[list[Stage], Meta(min_length=1)]
    execution: Execution = Execution()
    expected: Expected = {}
    accuracy: Accuracy | None = None
    certificate: Certificate | None = None
    environments: list[Conditions] = []
    alternatives: list[Alternative] = []
    fallbacks: list[Alternative] = []
    verdict: str = ""
    files: dict[str, Digest]  # every other file of the bundle: path with forward slashes -> SHA-256

    def __post_init__(self) -> None:
        """Raise ValueError where the parts of the plan do not fit together."""
        _require_calls_that_take_time(self.expected)
        self._require_stages_that_connect()
        self._require_few_lanes()

    def _require_stages_that_connect(self) -> None:
        batches = (self.batch, *(each.batch or self.batch for each in (*self.alternatives, *self.fallbacks)))
        for stages, batch in zip(self.stage_lists(), batches, strict=True):
            known = {each.name: _at_batch(each, self.batch, batch) for each in self.model.inputs}
            if len(known) != len(self.model.inputs):
                raise ValueError("two inputs of the model have one name")
            made: dict[str, Tensor] = {}
            for stage in stages:
                for model in (stage.model, *[each.model for each in stage.copies]):
                    if model not in self.files:
                        raise ValueError(f"stage file {model!r} is not listed in files")
                for each in stage.inputs:
                    if each.name not in known:
                        raise ValueError(f"stage on {stage.target} needs {each.name!r}, which nothing before it makes")
                    _require_agreement(each, known[each.name])
                for each in stage.outputs:
                    if each.name in made:
                        raise ValueError(f"two stages make {each.name!r}")
                    made[each.name] = each
                known |= made
            for each in self.model.outputs:
                if each.name not in known:
                    raise ValueError(f"no stage makes the output {each.name!r}")
                _require_agreement(_at_batch(each, self.batch, batch), known[each.name])

    def _require_few_lanes(self) -> None:
        ways: tuple[Plan | Alternative, ...] = (self, *self.alternatives, *self.fallbacks)
        for way in ways:
            copies = max([each.executables for each in way.stages])
            lanes = copies * way.execution.depth * len(way.stages) if way.execution.mode == "pipelined" else copies
            if lanes > MOST_LANES:
                text = f"{len(way.stages)} stages with {way.execution.depth} requests for each, in up to {copies} replicas"
                raise ValueError(f"{text}, are {lanes} requests in flight, and {MOST_LANES} may be")

    def stage_lists(self) -> tuple[Sequence[Stage], ...]:
        """Return each way to run the model that the plan holds: its own, the alternatives', the fallbacks'."""
        return (self.stages, *(each.stages for each in (*self.alternatives, *self.fallbacks)))

    def for_goal(self, wanted: str) -> Plan:
        """Return the plan with an alternative in its place: that for an objective (`throughput`), or that of a name.

        What was expected and proven is the alternative's; the certificate and the accuracy were the plan's own, and are left out. Only the
        fallbacks of the same batch stay.

        Raises:
            UsageError: there is no such alternative, or several; the advice lists what there is.
        """
        found = [each for each in self.alternatives if wanted in (*each.objective.split(","), each.name)]
        if len(found) != 1:
            known = "; ".join(f"{each.objective or 'a compromise'} ({each.name})" for each in self.alternatives)
            problem = f"the plan has {'several alternatives' if found else 'no alternative'} for {wanted!r}"
            raise UsageError(problem, advice=f"it has {known}" if known else "tune with several objectives: --objective latency,throughput")
        (chosen,) = found
        read = {each.name: each for stage in reversed(chosen.stages) for each in stage.inputs}
        made = {each.name: each for stage in chosen.stages for each in stage.outputs}
        edges = {
            "inputs": [read.get(each.name, each) for each in self.model.inputs],
            "outputs": [made.get(each.name, each) for each in self.model.outputs],
        }
        batch = chosen.batch or self.batch
        return self.replaced(
            model=self.model.replaced(**edges),
            objective=chosen.objective or self.objective,
            batch=batch,
            callers=chosen.callers or self.callers,
            stages=chosen.stages,
            execution=chosen.execution,
            expected=chosen.expected,
            accuracy=None,
            certificate=None,
            alternatives=[],
            fallbacks=[each for each in self.fallbacks if (each.batch or self.batch) == batch],
        )

    def fallback_targets(self) -> tuple[str, ...]:
        """Return the targets of the fallbacks' stages, each once."""
        return tuple(dict.fromkeys(each.target for other in self.fallbacks for stage in other.stages for each in stage.everywhere()))

    def model_files(self) -> tuple[str, ...]:
        """Return the files that stages compile, each once."""
        return tuple(dict.fromkeys(each.model for stages in self.stage_lists() for stage in stages for each in stage.everywhere()))

    def targets(self) -> tuple[str, ...]:
        """Return the stages' targets, each once, in order."""
        return tuple(dict.fromkeys(each.target for stage in self.stages for each in stage.everywhere()))


def agree(a: Tensor | TensorSpec, b: Tensor | TensorSpec) -> bool:
    """Say whether two descriptions of one tensor can both be right. An empty shape may stand for an unknown rank."""
    if a.dtype != b.dtype and "unknown" not in (a.dtype, b.dtype):
        return False
    if a.shape == b.shape:  # lists, both of them, where a plan is held against itself
        return True
    if len(a.shape) != len(b.shape):
        return not a.shape or not b.shape
    return all(one is None or other is None or one == other for one, other in zip(a.shape, b.shape, strict=True))


def _at_batch(tensor: Tensor, batch: int, other: int) -> Tensor:
    """Return what is known of a tensor at another batch than the plan's: its first extent may be any, and so may those that are the
    plan's batch: the state of a recurrent model is [layers, batch, width]."""
    if other == batch:
        return tensor
    return tensor.replaced(shape=[None if at == 0 or extent == batch else extent for at, extent in enumerate(tensor.shape)])


def _require_agreement(a: Tensor, b: Tensor) -> None:
    if not agree(a, b):
        raise ValueError(f"{a.spec} is {b.spec} elsewhere in the plan")


_READER = Reader(Plan, newest=SCHEMA, remedy="tune again")


def parse_plan(text: str | bytes, where: str, *, keys_later: bool = False) -> Plan:
    """Check the text of a `plan.json`; with `keys_later` all but what `require_keys_once` does.

    Raises:
        BundleError: not JSON, newer than this version, or not a plan; one line, with the place.
    """
    return _READER.read(text, where, keys_later=keys_later)


def require_keys_once(text: bytes, where: str) -> None:
    """Refuse the text of a `plan.json` that has a key twice in one object.

    Raises:
        BundleError: it has.
    """
    _READER.require_keys_once(text, where)


def settings(config: Config) -> dict[str, Setting]:
    """Return a config's settings as a stage holds them."""
    return config.as_dict()


def tensors(specs: Iterable[TensorSpec]) -> list[Tensor]:
    """Return descriptions as a plan holds them."""
    return [Tensor.of(each) for each in specs]

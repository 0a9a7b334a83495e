"""What a tuning is asked for: one frozen object, checked at birth, the same for the command line and for Python."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aivmm.errors import UsageError
from aivmm.models.input_contract import MODEL, InputContract, parse_normalise
from aivmm.planner.constraints import Constraint, parse
from aivmm.planner.levels import SERVICE_LEVELS, unknown_level
from aivmm.planner.objectives import Objective, drive_of, parse_objectives

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
DEFAULT_BATCHES = (1, 2, 4, 8, 16, 32)
LARGE_BATCHES = (1, 4, 16, 32, 64, 128)  # for devices with memory of their own, which small batches leave idle
DEFAULT_BUDGET_S = 60.0
BUDGET_HELP = "Time to search in. Loading, what is timed whole for throughput, and the proof come on top: `--dry-run` says how much."
DEFAULT_COSINE = 0.999
# What comes on top of the budget takes as long as that at most, but for small ones, and of large ones a share.
_LEAST_S, _ENOUGH_S, _SHARE = 15.0, 90.0, 0.5


OTHER_SHAPES = ("refuse", "dynamic")


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """The request. Times in seconds."""

    model: str  # a path, or "demo:NAME"
    output: Path | None = None
    db: str | None = None
    objective: str = "latency"
    constraints: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)
    inputs: Path | None = None
    dataset: str | None = None  # a path, or "module:function"
    metric: str | None = None  # "module:function"
    assumed_objective: bool = False  # nobody asked for it
    prefer: tuple[str, ...] = ()  # patterns of targets, the most wanted first
    service_level: str | None = None  # already resolved into objective and constraints; kept for the record
    budget_s: float = DEFAULT_BUDGET_S
    trials: int | None = None
    min_segments: int = 1
    input_contract: str = "model"  # "narrow", "narrow:uint8": inputs are taken in fewer bits than the model has them
    normalise: tuple[str, ...] = ()  # "NAME=MEAN/SCALE" of inputs taken as uint8
    other_shapes: str = "refuse"  # "dynamic": what fits none of several shapes runs with open extents
    cut_around: tuple[str, ...] = ()  # operator types or names of nodes
    top: int = 3
    seed: int = 0
    fresh: bool = False
    retry_failed: bool = False
    dry_run: bool = False
    backends: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "objective", ",".join(each.name for each in self.objectives))
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed} is not between 0 and 4294967295")
        if not 0 < self.budget_s < 1e6:
            raise UsageError(f"a budget of {self.budget_s} s cannot be spent", advice="give seconds, such as 120")
        for name, value, least in (("--trials", self.trials, 1), ("--min-segments", self.min_segments, 1), ("--top", self.top, 1)):
            if value is not None and value < least:
                raise UsageError(f"{name} {value} is below {least}")
        for batch in self.batches:
            if batch < 1:
                raise UsageError(f"a batch of {batch} is below 1")
        for each in self.precisions:
            if each not in PRECISIONS:
                raise UsageError(f"unknown precision {each!r}", advice=f"known: {', '.join(PRECISIONS)}")
        self.contract  # noqa: B018 - it is checked when it is made
        if self.other_shapes not in OTHER_SHAPES:
            raise UsageError(f"unknown --other-shapes {self.other_shapes!r}", advice=f"known: {', '.join(OTHER_SHAPES)}")
        if self.other_shapes != "refuse" and self.input_contract != MODEL:
            what = f"--other-shapes {self.other_shapes} runs the model as its file has it, --input-contract {self.input_contract} does not"
            raise UsageError(what, advice="leave one of them away")
        if self.service_level is not None and self.service_level not in SERVICE_LEVELS:
            raise unknown_level(self.service_level)
        self._check_data()
        self.parsed_constraints()

    def _check_data(self) -> None:
        if self.inputs is not None and self.dataset is not None:
            raise UsageError("--inputs and --dataset both give samples", advice="keep one of them: a dataset also calibrates int8")
        if self.metric is None and any(each.metric == "metric" for each in self.parsed_constraints()):
            raise UsageError("a constraint limits metric, and there is none", advice="name your function with --metric MODULE:FUNCTION")

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives, the one that decides what the plan is first."""
        return parse_objectives(self.objective)

    @property
    def contract(self) -> InputContract:
        """In which form callers hand in inputs."""
        return InputContract(kind=self.input_contract, normalise=parse_normalise(self.normalise))

    @property
    def drive(self) -> str:
        """How the model is called for all objectives to be seen: "latency" or "throughput"."""
        return drive_of(self.objectives)

    @property
    def lowered_precisions(self) -> tuple[str, ...]:
        """The precisions named that a model can be lowered to: int8 and int4 are in the model always, bf16 and fp16 may be."""
        return tuple(each for each in self.precisions if each != "fp32")

    def parsed_constraints(self) -> tuple[Constraint, ...]:
        """Return the constraints, parsed."""
        return tuple(each for text in self.constraints for each in parse(text))

    def as_json(self) -> dict[str, Any]:
        """Return the request as JSON takes it, for the record of the run."""
        raw = asdict(self)
        for name in ("output", "inputs"):
            raw[name] = None if raw[name] is None else str(raw[name])
        return {name: list(value) if isinstance(value, tuple) else value for name, value in raw.items()}


def allowed_s(budget_s: float) -> float:
    """Return how many seconds on top of a budget each kind of what is timed whole may take: several callers, and copies with pipelines."""
    return max(min(_ENOUGH_S, max(_LEAST_S, budget_s)), _SHARE * budget_s)


def on_top(budget_s: float, drive: str, *, cards: bool) -> str:
    """Say what a tuning takes beyond its budget; `cards`: targets have memory of their own."""
    whole = f"up to about {allowed_s(budget_s):.0f} s each for several callers on the engine and for copies and pipelines, "
    long = ", and on cards more: each of ten or more sessions takes seconds to load" if cards else " (more where models are slow)"
    return f"{whole if drive == 'throughput' else ''}tens of seconds for the proof and the report{long}"


def parse_budget(text: str) -> float:
    """Return seconds from `120s`, `2min`, `1h` or a plain number."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(s|sec|m|min|h)?\s*", text)
    if not found:
        raise UsageError(f"--budget {text!r} is not a time", advice="give one such as 120s or 5min")
    return float(found[1]) * {"m": 60, "min": 60, "h": 3600}.get(found[2] or "s", 1)


def parse_shapes(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return shapes from `NAME=1x3x224x224`; a scalar is `NAME=`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, equals, extents = text.rpartition("=")
        if not equals or not name or not re.fullmatch(r"(\d+(x\d+)*)?", extents):
            raise UsageError(f"--shape {text!r} does not read as NAME=EXTENTS", advice="write it like --shape input=1x3x224x224")
        shapes[name] = tuple(int(each) for each in extents.split("x") if each)
    return shapes


def parse_dims(texts: Iterable[str]) -> dict[str, int]:
    """Return extents from `NAME=N`."""
    dims: dict[str, int] = {}
    for text in texts:
        name, equals, extent = text.rpartition("=")
        if not equals or not name or not extent.isdigit():
            raise UsageError(f"--dim {text!r} does not read as NAME=N", advice="write it like --dim seq=128")
        dims[name] = int(extent)
    return dims


def parse_list(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the parts of comma-separated lists that may be given several times."""
    return tuple(part.strip() for text in texts for part in text.split(",") if part.strip())


def parse_batches(texts: Iterable[str]) -> tuple[int, ...]:
    """Return batch sizes, ascending, each once."""
    parts = parse_list(texts)
    for part in parts:
        if not part.isdigit() or int(part) < 1:
            raise UsageError(f"--batch {part!r} is not a batch size", advice="give some such as --batch 1,8,32")
    return tuple(sorted({int(part) for part in parts}))

"""How far a plan's numbers hold on this machine, and what is done where they do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from aivmm.errors import BundleError, UsageError
from aivmm.runtime.backend import Executable
from aivmm.runtime.environment import environment_of
from aivmm.runtime.plan import Conditions, Stage, agree
from aivmm.runtime.target import Target

Grade = Literal["exact", "compatible", "retune"]
OnMismatch = Literal["warn", "error", "fallback"]
_POLICIES: tuple[OnMismatch, ...] = get_args(OnMismatch)

_SHOWN = 3  # differences named in a sentence; `Validity.differences` has all


@dataclass(frozen=True, slots=True, kw_only=True)
class Validity:
    """How far a plan's numbers hold on this machine.

    `exact`: every recorded condition is the same. `compatible`: the same device with all that it had when it was measured; versions
    differ, or there is more of something, so the settings still fit and the numbers may differ. `retune`: another device or system, or
    less than the settings were chosen for (cores, instruction sets, power), or nothing is recorded of the target.
    """

    grade: Grade
    differences: Mapping[str, tuple[object, object]] = field(default_factory=dict)  # "target.field" -> (here, in the plan)

    def __str__(self) -> str:
        if not self.differences:
            return self.grade
        items = list(self.differences.items())
        shown = "; ".join(f"{key}: {here!r} here, {there!r} in the plan" for key, (here, there) in items[:_SHOWN])
        more = f"; and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
        return f"{self.grade}: {shown}{more}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One list of stages that the engine considered: the plan itself, or a fallback by its name."""

    name: str
    outcome: Literal["runs", "passed over", "failed"]
    reason: str = ""


def check_policy(on_mismatch: str) -> OnMismatch:
    """Return `on_mismatch` if it is one of the three.

    Raises:
        UsageError: it is not.
    """
    for known in _POLICIES:
        if on_mismatch == known:
            return known
    raise UsageError(f"on_mismatch={on_mismatch!r} is unknown", advice=f"choose from {', '.join(_POLICIES)}")


def grade_stages(stages: Sequence[Stage], recorded: Iterable[Conditions], targets: Mapping[str, Target]) -> Validity:
    """Grade the conditions `recorded` in a plan against this machine's `targets`, for the targets that `stages` use."""
    conditions = {each.target: each for each in recorded}
    differences: dict[str, tuple[object, object]] = {}
    retune = False
    for name in dict.fromkeys(each.target for stage in stages for each in stage.everywhere()):
        here = environment_of(targets[name]).as_dict()
        there = conditions[name].as_json() if name in conditions else {}
        for key, value in here.items():
            value = list(value) if isinstance(value, tuple) else value
            if value != there.get(key):
                differences[f"{name}.{key}"] = (value, there.get(key))
                retune = retune or not there or _lessens(key, value, there.get(key))
    return Validity(grade="retune" if retune else "compatible" if differences else "exact", differences=differences)


def _lessens(key: str, here: object, there: object) -> bool:
    """Say whether a difference takes something away that the plan's settings were chosen for."""
    if key in ("device_model", "system"):
        return True
    if key == "instruction_sets" and isinstance(here, list) and isinstance(there, list):
        return not set(there) <= set(here)
    if key in ("usable_cores", "power_limit_w") and isinstance(here, int | float) and isinstance(there, int | float):
        return here < there
    return False


def check_interface(stage: Stage, executable: Executable) -> None:
    """Raise BundleError unless the model behind `stage` is what the plan says: buffers are bound by the plan's word."""
    for kind, said, found in (("input", stage.inputs, executable.inputs), ("output", stage.outputs, executable.outputs)):
        tensors = {each.name: each for each in said}
        have = {each.name: each for each in found}
        # A runtime may drop an input that nothing reads, and a model may have outputs that the plan leaves alone.
        odd = next(iter(have.keys() - tensors.keys() if kind == "input" else tensors.keys() - have.keys()), None)
        if odd is not None:
            raise BundleError(f"{stage.model} does not fit its plan: the {kind} {odd!r} is not in both")
        for name in tensors.keys() & have.keys():
            if not agree(tensors[name], have[name]):
                raise BundleError(f"{stage.model} does not fit its plan: the {kind} {tensors[name].spec} is {have[name]} in the file")

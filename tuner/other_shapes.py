"""What runs inputs of shapes that no plan was tuned for: the model with its extents left open, on a runtime that takes it so, proven.

Runtimes take open extents as they are (ONNX Runtime natively, OpenVINO as dynamic dimensions), and prepare for each new shape; so
this is seldom as fast as a shape that was tuned, and its latency is not promised. That its answers are right is shown at sizes beyond and
between the tuned ones, in the written bundle, against the fp32 reference at those very sizes. Decision 0032; which of several targets it
is, and whether it is faster than padding, is timed (`open_or_padded`, decision 0045).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from aivmm.errors import AivmmError, UsageError
from aivmm.probes.client import WorkerDied
from aivmm.runtime.bundle import write_bundle
from aivmm.runtime.environment import environment_of
from aivmm.runtime.family import Dimension
from aivmm.runtime.plan import Conditions, Execution, Plan, Stage, Tensor, tensors
from aivmm.runtime.target import Target
from aivmm.tensors import TensorSpec
from aivmm.tuner.padding import Case, PaddingCheck

Judge = Callable[[Path, Sequence[Case]], str]  # why the answers of a bundle are too far off, or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPlan:
    """A plan for all other shapes whose answers are right at `cases`, and the sentence that says what is known of it."""

    target: str
    bundle: Path
    cases: tuple[Case, ...]
    line: str


@dataclass(slots=True, kw_only=True)
class OtherShapes:
    """Makes the plan of open extents beside the tuned `plan` of the first shape. Files go to `folder`."""

    check: PaddingCheck
    targets: Sequence[Target]  # that may be used, in the order in which they are tried
    dimensions: Sequence[Dimension]  # with the padding that was decided
    plan: Plan
    folder: Path
    judge: Judge
    judged_by: str  # what `judge` holds answers to, in words

    def run(self) -> tuple[OpenPlan, ...]:
        """Return one plan for each target that answers as the reference does.

        Raises:
            UsageError: the model runs at no other size, or no target answers rightly; with each reason.
        """
        cases = tuple(each for each in map(self._case, self._sizes()) if each is not None)
        if not cases:
            raise _refused("the model runs at none of the sizes tried beyond the listed ones")
        sizes = "; ".join(said(each.extents) for each in cases)
        right, reasons = [], []
        for target in self.targets:
            try:
                bundle = self._write(target)
                why = self.judge(bundle, cases)
            except (AivmmError, WorkerDied) as error:
                why = error.reason if isinstance(error, WorkerDied) else error.message
            if why:
                reasons.append(f"{target}: {why}")
                continue
            line = f"Other shapes run on {target} with open extents, checked at {sizes} by {self.judged_by}; not tuned."
            right.append(OpenPlan(target=str(target), bundle=bundle, cases=cases, line=line))
        if not right:
            raise _refused("no target answers other shapes rightly (" + "; ".join(reasons) + ")")
        return tuple(right)

    def _sizes(self) -> Iterator[dict[str, int]]:
        """Yield extents that no tuned shape takes: beyond the largest, and, where nothing is padded, between them."""
        most = {each.name: max(bucket.extents[each.name] for bucket in self.check.buckets) for each in self.dimensions}
        yield {name: extent + extent // 2 + 1 for name, extent in most.items()}
        yield {name: 2 * extent for name, extent in most.items()}
        between = {name: self._below(name, extent) for name, extent in most.items()}
        if any(each.padding == "none" and between[each.name] < most[each.name] for each in self.dimensions):
            yield between

    def _below(self, name: str, extent: int) -> int:
        """Return the largest extent below one that is not listed; itself where all are."""
        listed = {bucket.extents[name] for bucket in self.check.buckets}
        return next((each for each in range(extent - 1, 0, -1) if each not in listed), extent)

    def _case(self, extents: Mapping[str, int]) -> Case | None:
        return self.check.case(self.check.buckets[0], self.check.shapes[0], extents)

    def _write(self, target: Target) -> Path:
        from aivmm.models.slice import Slicer, WeightStore  # here: it loads onnx

        inputs = tuple(self._open(each.spec) for each in self.plan.model.inputs)
        outputs = tuple(TensorSpec(name=e.name, dtype=e.dtype, shape=(None,) * len(e.shape)) for e in self.plan.model.outputs)
        folder = self.folder / str(self.targets.index(target))
        folder.mkdir(parents=True)
        with Slicer(self.check.source) as slicer:
            last = len(slicer.prepared.nodes) - 1
            made = slicer.write(0, last, folder / "open.onnx", weights=WeightStore(folder / "open.weights"))
        fields = asdict(environment_of(target))
        stage = Stage(
            model=f"segments/{made.path.name}",
            target=str(target),
            precision="fp32" if "fp32" in target.precisions else "default",
            blocks=(0, max(each.blocks[1] for each in self.plan.stages)),
            inputs=_listed(inputs),
            outputs=_listed(outputs),
        )
        files = {f"segments/{each.name}": each for each in (made.path, *made.weights)}
        plan = self.plan.replaced(
            model=self.plan.model.replaced(inputs=_listed(inputs), outputs=_listed(outputs)),
            stages=[stage],
            execution=Execution(),
            expected={},
            accuracy=None,
            certificate=None,
            environments=[Conditions(**{**fields, "instruction_sets": list(fields["instruction_sets"])})],
            alternatives=[],
            fallbacks=[],
            verdict="for shapes that were not tuned",
            files=dict.fromkeys(files, "0" * 64),
        )
        return write_bundle(folder / "open.aivmm", plan, files)

    def _open(self, spec: TensorSpec) -> TensorSpec:
        places = [place for each in self.dimensions for place in each.places]  # open in the file, or several shapes could not be asked for
        shape = tuple(None if (spec.name, axis) in places else extent for axis, extent in enumerate(spec.shape))
        return TensorSpec(name=spec.name, dtype=spec.dtype, shape=shape)


def _listed(specs: Sequence[TensorSpec]) -> list[Tensor]:
    return list(tensors(specs))


def said(extents: Mapping[str, int]) -> str:
    """Return extents as a user writes them."""
    return ", ".join(f"{name}={extent}" for name, extent in extents.items())


def _refused(why: str) -> UsageError:
    return UsageError(f"--other-shapes dynamic: {why}", advice="leave it away: other shapes are then refused with the list of known ones")

"""Finds out how smaller inputs may be padded to a bucket, by computing both: the small input alone, and padded, the rest cut off.

Padding is right only where what is added does not reach what is kept. No rule about operators decides that: for each dimension the model is
prepared at sizes below a bucket and run on the fp32 reference, and again at the bucket on the padded input. Where the two agree the padding
is taken, elsewhere the dimension keeps the buckets' own extents, and the reason is kept with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aivmm.errors import AivmmError
from aivmm.models.input_contract import InputContract
from aivmm.models.records import ModelFacts
from aivmm.probes.accuracy import judge
from aivmm.probes.arrays import load_arrays, save_arrays
from aivmm.probes.client import WorkerDied
from aivmm.probes.lab import Lab, Loaded
from aivmm.runtime.config import Config
from aivmm.runtime.family import Bucket, Crop, Dimension, Padding
from aivmm.runtime.fitting import Fitter
from aivmm.runtime.target import Target
from aivmm.tensors import TensorSpec

LIMIT = 1e-4  # relative L2: one runtime in fp32 differs by 1e-7 to 1e-5 between two shapes of one model
_TRIED: tuple[Padding, ...] = ("zero", "edge")
_SAID = {"zero": "zeros", "edge": "copies of its last element"}
_SAMPLES = 2

Inputs = Mapping[str, TensorSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A size below a bucket, with its samples and what the model answers to them at that very size."""

    bucket: Bucket
    extents: Mapping[str, int]
    samples: tuple[Path, ...]
    references: tuple[Path, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paddings:
    """What was found: the dimensions with their padding, what is cut off, and the cases that showed it."""

    dimensions: tuple[Dimension, ...]
    crops: tuple[Crop, ...] = ()
    cases: tuple[Case, ...] = ()


class _WrongError(Exception):
    """Padding gives other answers; the text says how."""


def dimensions_of(shapes: Sequence[Inputs], extents: Mapping[str, Sequence[int]]) -> tuple[Dimension, ...]:
    """Return the dimensions in which buckets differ, from each bucket's inputs and the extents of the dimensions that the user listed.

    Places that change alike are one dimension, under its listed name where it has one. Two axes of one input that change alike (height and
    width) are two: inputs need not be square.
    """
    changes: dict[tuple[tuple[int, ...], int], list[tuple[str, int]]] = {}
    for name, spec in shapes[0].items():
        seen: dict[tuple[int, ...], int] = {}
        for axis in range(len(spec.shape)):
            change = tuple(each[name].shape[axis] or 0 for each in shapes)
            if len(set(change)) > 1:
                changes.setdefault((change, seen.get(change, 0)), []).append((name, axis))
                seen[change] = seen.get(change, 0) + 1
    named = {tuple(each): name for name, each in extents.items() if len(set(each)) > 1}
    found = []
    for (change, number), places in changes.items():
        place = f"{places[0][0]}[{places[0][1]}]"
        found.append(Dimension(name=named.get(change, place) if number == 0 else place, places=places))
    return tuple(found)


@dataclass(slots=True, kw_only=True)
class PaddingCheck:
    """Decides the padding of each dimension. Files go to `folder`."""

    lab: Lab
    source: Path
    folder: Path
    buckets: Sequence[Bucket]
    shapes: Sequence[Inputs]  # beside `buckets`
    dimensions: Sequence[Dimension]
    targets: Sequence[Target]  # the fp32 reference first
    contract: InputContract | None = None  # the buckets take inputs so
    seed: int = 0
    _loaded: dict[str, tuple[ModelFacts, Loaded] | None] = field(default_factory=dict)
    _count: int = 0

    def run(self) -> Paddings:
        """Check each dimension alone, then all that may be padded together."""
        decided: list[Dimension] = []
        crops: list[Crop] = []
        cases: list[Case] = []
        for dimension in self.dimensions:
            found, cut, tried = self._dimension(dimension, list(self._cases([dimension])))
            decided.append(found)
            crops += cut
            cases += tried if found.padding != "none" else ()
        padded = [each for each in decided if each.padding != "none"]
        if len(padded) > 1:
            together = list(self._cases(padded))
            try:
                self._hold(padded, crops, together)
                cases += together
            except _WrongError as wrong:
                why = f"not padded: padding {' and '.join(each.name for each in padded)} together gives other answers ({wrong})"
                decided = [replace_padding(each, "none", why) if each in padded else each for each in decided]
                crops, cases = [], []
        return Paddings(dimensions=tuple(decided), crops=tuple(crops), cases=tuple(cases))

    def _dimension(self, dimension: Dimension, cases: Sequence[Case]) -> tuple[Dimension, list[Crop], Sequence[Case]]:
        if not cases:
            return replace_padding(dimension, "none", "not padded: the model runs at no other size to check it at"), [], cases
        reasons = []
        for padding in _TRIED:
            tried = replace_padding(dimension, padding, "")
            try:
                crops = self._crops(tried, cases)
                worst = self._hold([tried], crops, cases)
            except _WrongError as wrong:
                reasons.append(f"with {_SAID[padding]} {wrong}")
                continue
            sizes = ", ".join(str(each) for each in sorted({case.extents[dimension.name] for case in cases}))
            why = f"padded with {_SAID[padding]}: at {sizes} the answers are those of the unpadded input, within {max(worst, 1e-7):.0e}"
            return replace_padding(dimension, padding, why), crops, cases
        return replace_padding(dimension, "none", f"not padded: it gives other answers ({'; '.join(reasons)})"), [], cases

    def _cases(self, dimensions: Sequence[Dimension]) -> Iterator[Case]:
        """Yield sizes to check at: for each extent just above the next smaller one, where most is padded, and half-way; those that run."""
        seen: set[tuple[int, ...]] = set()
        for bucket, inputs in zip(self.buckets, self.shapes, strict=True):
            key = tuple(bucket.extents[each.name] for each in dimensions)
            if key in seen:
                continue
            seen.add(key)
            for number in range(2):
                smaller = {each.name: self._below(each.name, bucket.extents[each.name])[number] for each in dimensions}
                if any(smaller[each.name] < bucket.extents[each.name] for each in dimensions):
                    case = self.case(bucket, inputs, {**bucket.extents, **smaller})
                    if case is not None:
                        yield case

    def _below(self, name: str, extent: int) -> tuple[int, int]:
        """Return two sizes that fall into the bucket of `extent`: close to the next smaller one, and half-way."""
        lower = max((each.extents[name] for each in self.buckets if each.extents[name] < extent), default=0)
        return max(1, lower + 1 if lower else extent // 4), max(1, (lower + extent) // 2)

    def case(self, bucket: Bucket, inputs: Inputs, extents: Mapping[str, int]) -> Case | None:
        """Return the size `extents`, run; None where the model does not take it."""
        shapes = {name: list(each.shape) for name, each in inputs.items()}
        for dimension in self.dimensions:
            for name, axis in dimension.places:
                shapes[name][axis] = extents[dimension.name]
        loaded = self._load({name: tuple(extent or 0 for extent in shape) for name, shape in shapes.items()})
        if loaded is None:
            return None
        facts, model = loaded
        self._count += 1
        samples = tuple(self.folder / f"case-{self._count}-{index}.npz" for index in range(_SAMPLES))
        references = tuple(each.with_name(f"{each.stem}-reference.npz") for each in samples)
        try:
            self.lab.make_samples(Path(facts.path), facts.inputs, samples, seed=self.seed)
            for sample, reference in zip(samples, references, strict=True):
                self.lab.outputs(model.contestant, sample, reference)
        except (AivmmError, WorkerDied):
            return None
        return Case(bucket=bucket, extents=extents, samples=samples, references=references)

    def _load(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[ModelFacts, Loaded] | None:
        """Prepare the model at `shapes` and load it where references are made; None where it does not run."""
        key = str(sorted(shapes.items()))
        if key not in self._loaded:
            self._loaded[key] = None
            path = self.folder / f"at-{len(self._loaded)}" / "model.onnx"
            path.parent.mkdir(parents=True)
            try:
                facts = self.lab.prepare(self.source, path, shapes=shapes, dims={}, batch=1, contract=self.contract)
                samples = path.with_name("sample.npz")
                self.lab.make_samples(path, facts.inputs, [samples], seed=self.seed)
                self._loaded[key] = (replace(facts, path=str(path)), self._compiled(path, samples))
            except (AivmmError, WorkerDied):
                pass  # a size that the model does not take; the caller says so when none is left
        return self._loaded[key]

    def _compiled(self, path: Path, samples: Path) -> Loaded:
        trouble: AivmmError | WorkerDied | None = None
        for target in self.targets:
            try:
                return self.lab.load(path, target, Config(precision="fp32" if "fp32" in target.precisions else None), inputs=samples)
            except (AivmmError, WorkerDied) as error:
                trouble = trouble or error
        assert trouble is not None  # there is a target: the buckets were tuned
        raise trouble

    def _crops(self, dimension: Dimension, cases: Sequence[Case]) -> list[Crop]:
        """Return where outputs grow with the dimension.

        Raises:
            _WrongError: they do not grow in proportion.
        """
        found: dict[tuple[str, int], int] = {}
        for case in cases:
            small, size = load_arrays(str(case.references[0])), case.extents[dimension.name]
            large = self._answers(case, [dimension], case.samples[0])
            for name, array in small.items():
                if array.ndim != large[name].ndim:
                    raise _WrongError(f"the output {name!r} has another rank")
                for axis, (kept, whole) in enumerate(zip(array.shape, large[name].shape, strict=True)):
                    if kept == whole and (name, axis) not in found:
                        continue
                    times = kept // size
                    proportional = kept == times * size and whole == times * case.bucket.extents[dimension.name]
                    if not proportional or times < 1 or found.setdefault((name, axis), times) != times:
                        raise _WrongError(f"axis {axis} of the output {name!r} does not grow with {dimension.name}: {kept} of {whole}")
        return [Crop(output=name, axis=axis, dimension=dimension.name, times=times) for (name, axis), times in found.items()]

    def _hold(self, dimensions: Sequence[Dimension], crops: Sequence[Crop], cases: Sequence[Case]) -> float:
        """Return the largest relative error of the padded answers.

        Raises:
            _WrongError: one is over the limit.
        """
        worst = 0.0
        fitter = self._fitter(dimensions, crops)
        for case in cases:
            for sample, reference in zip(case.samples, case.references, strict=True):
                outputs = fitter.crop(self._answers(case, dimensions, sample), case.extents)
                found = judge(outputs, load_arrays(str(reference)))
                if found.problem or not found.relative_l2 <= LIMIT:
                    said = ", ".join(f"{each.name}={case.extents[each.name]}" for each in dimensions)
                    raise _WrongError(found.problem or f"they differ by {found.relative_l2:.1e} at {said}")
                worst = max(worst, found.relative_l2)
        return worst

    def _answers(self, case: Case, dimensions: Sequence[Dimension], sample: Path) -> Mapping[str, Any]:
        """Return what the model says at the bucket of a case to a padded sample."""
        inputs = self.shapes[list(self.buckets).index(case.bucket)]
        loaded = self._load({name: tuple(extent or 0 for extent in each.shape) for name, each in inputs.items()})
        if loaded is None:
            raise _WrongError("the reference does not run at the bucket")
        padded = self.folder / "padded.npz"
        answers = self.folder / "padded-answers.npz"
        save_arrays(padded, self._fitter(dimensions, ()).pad(load_arrays(str(sample)), case.bucket))
        try:
            self.lab.outputs(loaded[1].contestant, padded, answers)
        except (AivmmError, WorkerDied) as error:
            raise _WrongError(f"the reference fails ({error})") from error
        return load_arrays(str(answers))

    def _fitter(self, dimensions: Sequence[Dimension], crops: Sequence[Crop]) -> Fitter:
        return Fitter(specs={}, buckets=self.buckets, dimensions=dimensions, crops=crops)


def replace_padding(dimension: Dimension, padding: Padding, why: str) -> Dimension:
    """Return `dimension` with another padding."""
    return dimension.replaced(padding=padding, why=why)

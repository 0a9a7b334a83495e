"""The user's samples, sorted into the shapes that a bundle of several has: each to the smallest that takes it, padded as the plan will pad.

So a shape is calibrated and judged with what it will be asked in production, and with nothing else. Decision 0044.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aivmm.errors import UsageError
from aivmm.models.dataset import Sample, digest, split_indices
from aivmm.models.shapes import names_the_batch
from aivmm.probes.arrays import load_arrays, save_arrays
from aivmm.probes.lab import Data, Lab
from aivmm.runtime.family import Bucket, Dimension
from aivmm.runtime.fitting import Fitter
from aivmm.tensors import TensorSpec
from aivmm.tuner.padding import Paddings
from aivmm.tuner.subject import MOST_READ

Inputs = Mapping[str, TensorSpec]
_IMAGES = 4  # axes of a batch of images


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What of the user's samples belongs to one shape. `data` is None where none does: it is then judged on made-up inputs."""

    bucket: str
    data: Data | None = None
    samples: int = 0
    padded: int = 0

    def __str__(self) -> str:
        if self.data is None:
            return f"none for {self.bucket}, which is judged on made-up inputs"
        return f"{self.samples} for {self.bucket}" + (f" ({self.padded} padded)" if self.padded else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """The user's samples by shape, in the order of the shapes; and what is to be said of them."""

    shares: tuple[Share, ...]
    left_out: str = ""
    notes: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """What the verdict says of them."""
        return f"Samples: {', '.join(map(str, self.shares))}{'; ' if self.left_out else ''}{self.left_out}."


@dataclass(slots=True, kw_only=True)
class BucketData:
    """Reads the user's samples once and sorts them. Files go to `folder`."""

    lab: Lab
    given: str  # as --dataset or --inputs has it
    source: Path  # the model
    folder: Path
    buckets: Sequence[Bucket]
    shapes: Sequence[Inputs]  # beside `buckets`
    paddings: Paddings
    seed: int = 0
    _left_out: Counter[str] = field(default_factory=Counter)

    def sorted(self) -> Shares:
        """Return the samples by shape.

        Raises:
            UsageError: they cannot be read, are not what the model takes, or fit none of the shapes.
        """
        fitter = Fitter(specs=self._open(), buckets=self.buckets, dimensions=self.paddings.dimensions)
        read = self._read()
        beside = dict(zip((*read.calibration, *read.validation), (*read.calibration_extras, *read.extras), strict=True))
        paths: dict[str, list[Path]] = {each.name: [] for each in self.buckets}
        padded: Counter[str] = Counter()
        for number, path in enumerate(sorted(beside)):
            placed = self._placed(fitter, path, number)
            if placed is not None:
                paths[placed[0]].append(path)
                padded[placed[0]] += placed[1]
        if not any(paths.values()):
            what = f"{self.given}: no sample fits {fitter.known()}; they have {self._left()}"
            raise UsageError(what, advice="list shapes with --dim or --shape that take them")
        shares = [self._share(index, paths[each.name], padded[each.name], beside) for index, each in enumerate(self.buckets)]
        left_out = f"{self._left_out.total()} left out, which fit none ({self._left()})" if self._left_out else ""
        return Shares(shares=tuple(shares), left_out=left_out, notes=read.notes)

    def _read(self) -> Data:
        """Read the samples one by one where a batch of 1 is listed, since several in one file look like one large batch; else as they are.

        Where they are whole batches of their own, as files of a folder may be, they are read as they are, too.
        """
        raw = self.folder / "read"
        raw.mkdir(parents=True)
        batch = next((each for each in self.paddings.dimensions if self._is_batch(each)), None)
        if batch is not None:
            with contextlib.suppress(UsageError):
                return self._read_as(self._open(single=batch.places), raw)
        return self._read_as(self._open(), raw, source=self.source)

    def _read_as(self, specs: Inputs, folder: Path, *, source: Path | None = None) -> Data:
        return self.lab.read_dataset(self.given, tuple(specs.values()), folder, most=MOST_READ, seed=self.seed, source=source)

    def _is_batch(self, dimension: Dimension) -> bool:
        """Say whether a dimension is the batch, in front of every input that it is in, and a batch of 1 is listed."""
        if min(each.extents[dimension.name] for each in self.buckets) != 1 or any(axis != 0 for _, axis in dimension.places):
            return False
        name, axis = dimension.places[0]
        nameless = dimension.name == f"{name}[{axis}]"
        return names_the_batch(dimension.name) or (nameless and len(self.shapes[0][name].shape) == _IMAGES)

    def _open(self, *, single: Sequence[tuple[str, int]] = ()) -> dict[str, TensorSpec]:
        """Return the inputs with open extents where the shapes differ, and 1 at `single` places."""
        extents = {place: None for each in self.paddings.dimensions for place in each.places} | dict.fromkeys(single, 1)
        return {
            name: TensorSpec(
                name=name,
                dtype=spec.dtype,
                shape=tuple(extents.get((name, axis), extent) for axis, extent in enumerate(spec.shape)),
            )
            for name, spec in self.shapes[0].items()
        }

    def _placed(self, fitter: Fitter, path: Path, number: int) -> tuple[str, bool] | None:
        """Pad the sample at `path` in place; return its bucket and whether it was padded, or None where none takes it."""
        try:
            arrays, extents = fitter.take(load_arrays(str(path)))
        except UsageError as error:
            raise UsageError(f"{self.given}, sample {number}: {error.message}", advice=error.advice) from error
        try:
            bucket = fitter.choose(extents)
        except UsageError:
            self._left_out[", ".join(f"{name}={extent}" for name, extent in extents.items())] += 1
            return None
        assert bucket is not None  # without a fallback there is a bucket, or an error
        if bucket.extents == extents:
            return bucket.name, False
        save_arrays(path, fitter.pad(arrays, bucket))
        return bucket.name, True

    def _left(self) -> str:
        """Name the sizes that fit nowhere, the most frequent ones."""
        named = [text for text, _ in self._left_out.most_common(3)]
        return "; ".join((*named, "...") if len(self._left_out) > len(named) else named)

    def _share(self, index: int, paths: Sequence[Path], padded: int, extras: Mapping[Path, Path | None]) -> Share:
        name = self.buckets[index].name
        if not paths:
            batched = self._batched(index)
            return batched or Share(bucket=name)
        samples = [digest(Sample(inputs=load_arrays(str(each)), extras={})) for each in paths]
        calibration, validation = split_indices(samples, seed=self.seed)
        data = Data(
            calibration=tuple(paths[each] for each in calibration),
            validation=tuple(paths[each] for each in validation),
            extras=tuple(extras[paths[each]] for each in validation),
            calibration_extras=tuple(extras[paths[each]] for each in calibration),
            notes=("one sample is there, so the model is calibrated and judged on the same one",) if len(paths) == 1 else (),
        )
        return Share(bucket=name, data=data, samples=len(paths), padded=padded)

    def _batched(self, index: int) -> Share | None:
        """Put single samples together, where a shape is one of a larger batch: none of them has that shape by itself."""
        folder = self.folder / f"batched-{index}"
        folder.mkdir()
        specs = tuple(self.shapes[index].values())
        if all((spec.shape[0] if spec.shape else 1) in (None, 1) for spec in specs):
            return None
        try:
            data = self.lab.read_dataset(self.given, specs, folder, most=MOST_READ, seed=self.seed)
        except UsageError:
            return None  # they are of other sizes: said of the bucket
        return Share(bucket=self.buckets[index].name, data=data, samples=len({*data.calibration, *data.validation}))

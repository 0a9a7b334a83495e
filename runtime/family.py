"""A bundle of several plans: one model in several shapes, or several models served on one machine.

`family.json` takes the place of `plan.json`. It lists the models by name, each with its buckets; a bucket's plan is an ordinary plan in a
file of its own, whose paths count from the bundle's root, so that buckets share what is alike: weights are stored once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, field

from aivmm.errors import BundleError
from aivmm.runtime.bundle import FAMILY_FILE, Bundle, check_listing, read_root, unpack, write_folder
from aivmm.runtime.folders import PrivateFolder
from aivmm.runtime.plan import Model, Number, Plan, parse_plan
from aivmm.runtime.reading import Reading, check_content
from aivmm.runtime.signing import Key
from aivmm.runtime.strict import Count, Digest, Extent, Reader, Strict

SCHEMA = 1
Axis = Annotated[int, Meta(ge=0, lt=64)]
Padding = Literal["none", "zero", "edge"]


class Dimension(Strict, frozen=True, kw_only=True):
    """An extent in which buckets differ, at every place where inputs have it.

    `padding` is how an input that is smaller than its bucket is filled up behind its end: with zeros (False, ""), with its last element
    along the axis, or not at all: then only the buckets' own extents are taken. `why` says what showed that this is right, or wrong.
    """

    name: str
    places: Annotated[list[tuple[str, Axis]], Meta(min_length=1)]  # (input, axis)
    padding: Padding = "none"
    why: str = ""


class Crop(Strict, frozen=True, kw_only=True):
    """What is cut off an output behind padding: along `axis` it keeps `times` the extent that the inputs have in `dimension`."""

    output: str
    axis: Axis
    dimension: str
    times: Count = 1


class Bucket(Strict, frozen=True, kw_only=True):
    """A shape with a plan of its own. `smaller` says what runs inputs below it that no smaller bucket takes: this plan on padded ones, or
    the plan of open extents on the inputs as they are, where that was measured to be faster."""

    name: str  # "seq=128"; "" for the only one
    plan: str  # a file of the bundle: "plans/0.json"
    extents: dict[str, Extent] = {}  # by dimension
    smaller: Literal["padded", "open"] = "padded"


class Promise(Strict, frozen=True, kw_only=True):
    """What a workload asks for a model and what was seen with all of its models running at once."""

    priority: Count = 1  # 1 is served first
    latency_s: float | None = None  # the most that the median from arrival to answer may take
    p99_s: float | None = None  # as much for the 99th percentile
    rate_per_s: float | None = None  # requests arriving; None: the next one comes when the last one is answered
    seen: dict[str, Number] = {}  # "latency_s", "p99_s", "rate_per_s"


class Served(Strict, frozen=True, kw_only=True):
    """A model of the bundle, and how it is run."""

    name: str
    buckets: Annotated[list[Bucket], Meta(min_length=1)]
    dimensions: list[Dimension] = []
    crops: list[Crop] = []
    fallback: str | None = None  # the plan of open extents that takes what fits no bucket; without one that is refused
    promise: Promise | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where its parts do not fit together."""
        _require_once("bucket", [each.name for each in self.buckets])
        _require_once("dimension", [each.name for each in self.dimensions])
        _require_once("place", [str(place) for each in self.dimensions for place in each.places])
        known = {each.name for each in self.dimensions}
        for bucket in self.buckets:
            if bucket.extents.keys() != known:
                raise ValueError(f"bucket {bucket.name!r} of {self.name!r} does not give each dimension an extent")
            if bucket.smaller == "open" and self.fallback is None:
                raise ValueError(f"bucket {bucket.name!r} of {self.name!r} leaves smaller inputs to open extents, and no plan has those")
        for crop in self.crops:
            if crop.dimension not in known:
                raise ValueError(f"output {crop.output!r} is cropped by {crop.dimension!r}, which is no dimension")
        _require_once("crop", [f"{each.output}[{each.axis}]" for each in self.crops])

    def plan_files(self) -> list[str]:
        """Return the plan files of the model: those of the buckets, and the fallback's."""
        return [*(each.plan for each in self.buckets), *([self.fallback] if self.fallback is not None else [])]


class Family(Strict, frozen=True, kw_only=True):
    """The content of `family.json`."""

    schema_version: Annotated[int, Meta(ge=1, le=SCHEMA)] = field(name="schema", default=SCHEMA)
    kind: Literal["shapes", "workload"]
    created_by: str
    created_at: str  # ISO 8601, UTC
    models: Annotated[list[Served], Meta(min_length=1)]
    verdict: str = ""
    files: dict[str, Digest]

    def __post_init__(self) -> None:
        """Raise ValueError where its parts do not fit together."""
        if self.kind == "shapes" and len(self.models) > 1:
            raise ValueError("a bundle of shapes holds one model")
        _require_once("model", [each.name for each in self.models])
        _require_once("plan", [name for each in self.models for name in each.plan_files()])
        unlisted = next((name for each in self.models for name in each.plan_files() if name not in self.files), None)
        if unlisted is not None:
            raise ValueError(f"plan {unlisted!r} is not listed in files")


def _require_once(kind: str, names: Sequence[str]) -> None:
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise ValueError(f"{kind} {twice!r} is there twice")


_READER = Reader(Family, newest=SCHEMA, remedy="tune again")


def parse_family(text: str | bytes, where: str) -> Family:
    """Check the text of a `family.json`.

    Raises:
        BundleError: not JSON, newer than this version, or not a family; one line, with the place.
    """
    return _READER.read(text, where)


@dataclass(slots=True)
class OpenFamily:
    """An opened and checked bundle of several plans. `close` removes what was unpacked."""

    path: Path
    folder: Path
    family: Family
    plans: Mapping[str, Plan]  # by file
    reading: Reading  # of all files: who uses one waits for it
    _unpacked: PrivateFolder | None = None

    def bundle(self, plan: str) -> Bundle:
        """Return the bundle that one plan is; closing it removes nothing."""
        return Bundle(self.folder, self.plans[plan], reading=self.reading, shared=True)

    def close(self) -> None:
        """Remove what was unpacked."""
        self.reading.end()
        if self._unpacked is not None:
            self._unpacked.cleanup()
            self._unpacked = None

    def __enter__(self) -> OpenFamily:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_family(path: str | Path, *, signed_by: Key | Sequence[Key] | None = None, read_later: bool = False) -> OpenFamily:
    """Open and check the bundle of several plans at `path`, a folder or a zip of one; `signed_by` and `read_later` as for `Bundle.open`.

    Raises:
        BundleError: missing, damaged, changed, unsafe, newer than this version, or not signed as required.
        UsageError: a key cannot be read.
    """
    path = Path(path)
    try:
        folder, unpacked = unpack(path)
        try:
            opened = _opened(path, folder, unpacked, signed_by)
            if not read_later:
                opened.reading.wait()
            return opened
        except BaseException:  # not handled, only cleaned up: nothing else knows of the folder
            if unpacked is not None:
                unpacked.cleanup()
            raise
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror or error})") from error


def _opened(path: Path, folder: Path, unpacked: PrivateFolder | None, signed_by: Key | Sequence[Key] | None) -> OpenFamily:
    family = parse_family(read_root(folder, FAMILY_FILE, path, signed_by=signed_by), str(path / FAMILY_FILE))
    size = check_listing(folder, family.files, root=FAMILY_FILE, shown=path)
    plans: dict[str, Plan] = {}
    for served in family.models:
        for name in served.plan_files():
            check_content(folder, name, family.files[name], path)  # before it is looked into; what is large can wait
            plans[name] = plan = parse_plan(read_root(folder, name, path), str(path / name))
            strange = next((each for each, digest in plan.files.items() if family.files.get(each) != digest), None)
            if strange is not None:
                raise BundleError(f"{path / name} lists {strange!r} otherwise than {FAMILY_FILE} does", advice="tune again")
        _require_one_interface(served, plans, path)
    models = [name for plan in plans.values() for name in plan.model_files()]
    reading = Reading()
    reading.of(folder, family.files, models, path, size=size)
    return OpenFamily(path, folder, family, plans, reading, unpacked)


def _require_one_interface(served: Served, plans: Mapping[str, Plan], path: Path) -> None:
    """Raise BundleError unless the plans of a model take and give the same tensors, which differ in the dimensions alone."""
    places = {place: each.name for each in served.dimensions for place in each.places}
    first = plans[served.buckets[0].plan].model
    ranks = {each.name: len(each.shape) for each in first.inputs}
    odd = next((place for place in places if place[1] >= ranks.get(place[0], 0)), None)
    if odd is not None:
        raise BundleError(f"{path / FAMILY_FILE}: {served.name} has no axis {odd[1]} of an input {odd[0]!r}")
    kinds = {each.name: (each.dtype, len(each.shape)) for each in (*first.inputs, *first.outputs)}
    for crop in served.crops:
        if crop.axis >= next((len(each.shape) for each in first.outputs if each.name == crop.output), 0):
            raise BundleError(f"{path / FAMILY_FILE}: {served.name} has no axis {crop.axis} of an output {crop.output!r}")
    for name in served.plan_files():
        model = plans[name].model
        if {each.name: (each.dtype, len(each.shape)) for each in (*model.inputs, *model.outputs)} != kinds:
            raise BundleError(f"{path / name} takes or gives other tensors than the first plan of {served.name}")
        bucket = next((each for each in served.buckets if each.plan == name), None)
        for each in model.inputs:
            for axis, (extent, usual) in enumerate(zip(each.shape, _shape(first, each.name), strict=True)):
                want = bucket.extents[places[each.name, axis]] if bucket and (each.name, axis) in places else usual
                if extent != want and not (bucket is None and (extent is None or (each.name, axis) in places)):
                    raise BundleError(f"{path / name}: axis {axis} of the input {each.name!r} is {extent}, and should be {want}")


def _shape(model: Model, name: str) -> Sequence[int | None]:
    return next(each.shape for each in model.inputs if each.name == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A plan of the family that is to be written: where its bundle's files lie now, by their names in the family."""

    plan: Plan  # its stages name files of `files`
    files: Mapping[str, Path] = dataclass_field(default_factory=dict)


def write_family(destination: Path, family: Family, parts: Mapping[str, Part]) -> Path:
    """Write a family at `destination`, whole or not at all; `parts` are by plan file. `files` of family and plans are filled in here.

    Raises:
        UsageError: the destination cannot be written, or holds something else than a bundle.
    """
    files = {name: path for part in parts.values() for name, path in part.files.items()}

    def texts(listed: dict[str, str]) -> dict[str, str]:
        plans: dict[str, str] = {}
        for name, part in parts.items():
            plans[name] = part.plan.replaced(files={each: listed[each] for each in part.files}).to_json()
            parse_plan(plans[name], name)  # what we write, we can read
        digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in plans.items()}
        text = family.replaced(files=listed | digests).to_json()
        parse_family(text, FAMILY_FILE)
        return {**plans, FAMILY_FILE: text}

    return write_folder(destination, files, texts)

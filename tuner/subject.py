"""The model under study: prepared for each batch that is tried, with sample inputs and fp32 reference outputs."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from aivmm.errors import AivmmError, ModelError, UsageError
from aivmm.models.dataset import MOST_CALIBRATION
from aivmm.models.demo import demo_of
from aivmm.models.records import ModelFacts, Structure
from aivmm.probes.accuracy import judge
from aivmm.probes.arrays import load_arrays, save_arrays
from aivmm.probes.client import WorkerDied
from aivmm.probes.lab import Data, Lab, Loaded
from aivmm.runtime.config import LOWERED, Config
from aivmm.runtime.folders import cache_folder
from aivmm.runtime.target import Target
from aivmm.tuner.lowering import Lowerer
from aivmm.tuner.options import TuneOptions

PROOF_SAMPLES = 4  # inputs that the search never saw, on which the proof judges accuracy

MOST_SAMPLES = 64  # of those that a user gives, to judge the accuracy of each finalist on
MOST_HELD_OUT = 500  # on which the plan is judged in the end: enough to tell 99.6 % from 99 %
MOST_READ = 1000  # of a data set
REAL_ENOUGH = 8  # so many real samples are worth calibrating with
_SYNTHETIC_CALIBRATION = 24
_SYNTHETIC_CHOOSING, _MOST_CHOOSING = 8, 16
_MOST_CHOOSING_BY_METRIC = 64  # a share of right answers moves in steps of one sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The model at one batch. The first sample serves the search; the others are kept for the proof."""

    path: Path
    facts: ModelFacts
    samples: tuple[Path, ...]
    references: tuple[Path, ...]
    extras: tuple[Path | None, ...] = ()  # beside the samples, at the base batch: what else the user's data set says of each


@dataclass(frozen=True, slots=True, kw_only=True)
class Further:
    """Held-out samples beyond those that every finalist is judged on, with their fp32 outputs and what else the data set says of each."""

    samples: tuple[Path, ...]
    references: tuple[Path, ...]
    extras: tuple[Path | None, ...]


class Subject:
    """Loads the user's model once, and prepares it for further batches when they are asked for."""

    def __init__(self, options: TuneOptions, lab: Lab, folder: Path, *, data: Data | None = None) -> None:
        """Load the model that `options` name. `data` are the user's samples where they were read already: those of one shape of several."""
        self._options = options
        self._data = data
        self._lab = lab
        self._folder = folder
        self._at: dict[int, Prepared] = {}
        self._structures: dict[int, Structure] = {}
        self.notes: list[str] = []
        self.source = self._find()
        self.base_batch = options.batches[0] if options.batches else 1
        self.facts = self._prepare(self.base_batch)
        if self.facts.batch != self.base_batch:  # fixed in the model, or by --shape or --dim
            self._model_path(self.base_batch).parent.rename(self._model_path(self.facts.batch).parent)
            self.base_batch = self.facts.batch
        self.structure = self._analyse()
        self.real_data = options.inputs is not None or options.dataset is not None
        self.deterministic = True
        self.reference_name = ""
        self.refusals: dict[Target, str] = {}  # where no target takes the model whole: why each does not
        self._by_name: dict[str, Target] = {}
        self._sample_digest = ""
        self._calibration: tuple[Path, ...] = ()
        self._extras: tuple[Path | None, ...] = ()
        self._calibration_extras: tuple[Path | None, ...] = ()
        self._held_out: tuple[tuple[Path, Path | None], ...] = ()  # beyond MOST_SAMPLES: a sample, and what else is said of it
        self._classes: tuple[str, ...] | None = None
        self._lowerer: Lowerer | None = None
        self._choosing: tuple[tuple[Path, ...], tuple[Path, ...]] | None = None

    @property
    def path(self) -> Path:
        """The prepared model at the base batch."""
        return self._model_path(self.base_batch)

    @property
    def judged(self) -> str:
        """What numerical verdicts hold for: this content, on this input."""
        return f"{self.structure.content[:16]}.{self._sample_digest}"

    def subject_of(self, lowered: str | None) -> str:
        """What keys times: the structure, or the content and the input where values decide how long a run takes; and how it was lowered."""
        plain = f"{self.structure.content}@{self._sample_digest}" if self.structure.data_dependent else self.structure.structure
        return f"{plain}~{self.lowerer.tag(lowered)}" if lowered else plain

    def judged_of(self, lowered: str | None) -> str:
        """As `judged`, for the model lowered in our way with the samples at hand."""
        return f"{self.judged}.{self.lowerer.tag(lowered)}.{self.lowerer.calibration_digest}" if lowered else self.judged

    @property
    def kind_of_samples(self) -> str:
        """What accuracy is judged on, in words: what was held out calibrated nothing."""
        return "held-out samples" if self._calibration else "real inputs" if self.real_data else "synthetic inputs"

    @property
    def classifies(self) -> bool:
        """True when an output of the model is a classifier's: its top-1 agreement is then worth telling."""
        from aivmm.models.classifier import class_outputs

        if self._classes is None:
            self._classes = class_outputs(self.path)
        return bool(self._classes)

    @property
    def data_digest(self) -> str:
        """What tells the user's samples from others."""
        base = self._at[self.base_batch]
        return _digest_of(base.samples) + _digest_of(self._calibration)

    @property
    def lowered_precisions(self) -> tuple[str, ...]:
        """The precisions that the model may be lowered to: those that were named, or int8 and int4 where real data is there."""
        if self._options.precisions:
            return self._options.lowered_precisions
        return LOWERED if self.real_data and len(self._calibration) >= REAL_ENOUGH else ()

    def ways(self) -> tuple[str, ...]:
        """Return each way to lower the whole model, as configs name it."""
        from aivmm.models.lowering_recipes import recipes

        category = self.facts.category.name
        return tuple(each.variant for family in self.lowered_precisions for each in recipes(family, category))

    def choosing(self) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
        """Return samples to choose a way of lowering by, and their fp32 outputs. The proof judges on others.

        Of a user's data they are samples that calibrated: what was held out stays so.
        """
        if self._choosing is None:
            if self._calibration:
                samples = self._calibration[: _MOST_CHOOSING if self._options.metric is None else _MOST_CHOOSING_BY_METRIC]
            else:
                samples = tuple(self._folder / f"choosing-{index}.npz" for index in range(_SYNTHETIC_CHOOSING))
                self._lab.make_samples(self.path, self.facts.inputs, samples, seed=(self._options.seed + 2) % 2**32)
            self._choosing = (samples, self._refer(self._load_reference(samples[0]), samples))
        return self._choosing

    def choosing_extras(self) -> tuple[Path | None, ...]:
        """Return what the user's data set says beside the inputs of each sample of `choosing`: for a metric of the user's own."""
        count = len(self.choosing()[0])
        return self._calibration_extras[:count] or (None,) * count

    def held_out(self, *, limit_s: float) -> Further:
        """Return the held-out samples beyond those of every finalist, as many as fp32 outputs could be made of in `limit_s` seconds."""
        if not self._held_out:
            return Further(samples=(), references=(), extras=())
        loaded = self._load_reference(self._held_out[0][0])
        deadline = time.perf_counter() + limit_s
        references: list[Path] = []
        try:
            for sample, _ in self._held_out:
                if time.perf_counter() > deadline:
                    break
                references.append(sample.with_name(f"{sample.stem}-reference.npz"))
                self._lab.outputs(loaded.contestant, sample, references[-1])
        finally:
            self._lab.unload(loaded.contestant)
        used = self._held_out[: len(references)]
        return Further(samples=tuple(each for each, _ in used), references=tuple(references), extras=tuple(each for _, each in used))

    def _load_reference(self, inputs: Path) -> Loaded:
        """Load the model where the reference outputs come from."""
        target = self.target_named(self.reference_name.partition(" ")[0])
        config = Config(precision="fp32" if "fp32" in target.precisions else None)
        return self._lab.load(self.path, target, config, inputs=inputs)

    @property
    def lowerer(self) -> Lowerer:
        """What lowers the model. Ask after `make_reference`."""
        if self._lowerer is None:
            calibration = self._calibration or self._synthetic_calibration()
            self._lowerer = Lowerer(
                lab=self._lab,
                folder=self._folder,
                model=self.path,
                content=self.structure.content,
                category=self.facts.category.name,
                calibration=calibration,
                calibration_digest=_digest_of(calibration),
                real_data=bool(self._calibration),
                saturates=any(map(_saturates, self._by_name.values())),
                notes=self.notes,
            )
        return self._lowerer

    def size_bytes(self, lowered: str | None) -> int | None:
        """Return the bytes of the model's weights, as they are or lowered; None where that is not known."""
        if lowered is None:
            return self.structure.weight_bytes
        record = self.lowerer.record(lowered, accuracy={})
        return None if record is None else record.weight_bytes

    def variant(self, batch: int, lowered: str | None) -> Path:
        """Return the model file at `batch`, lowered to a precision or (None) as it is.

        Raises:
            UsageError: the model's batch cannot be changed.
            Unsupported: it cannot be lowered.
        """
        prepared = self.at(batch).path
        if lowered is None:
            return prepared
        return self.lowerer.path(lowered) if batch == self.base_batch else self.lowerer.carried(lowered, batch, prepared)

    def _synthetic_calibration(self) -> tuple[Path, ...]:
        paths = tuple(self._folder / f"calibration-{index}.npz" for index in range(_SYNTHETIC_CALIBRATION))
        # Another seed than that of the samples on which accuracy is judged.
        self._lab.make_samples(self.path, self.facts.inputs, paths, seed=(self._options.seed + 1) % 2**32)
        return paths

    def make_reference(self, targets: Sequence[Target]) -> None:
        """Make samples and the fp32 reference at the base batch, on ONNX Runtime's CPU or else on the first target that takes the model.

        Where none takes it whole, and several may take parts of it, there are samples alone, and `refusals` says why.

        Raises:
            ModelError: there is one target, and it does not take the model.
        """
        facts = self.facts
        samples = self._base_samples(facts)
        self._sample_digest = _digest(load_arrays(str(samples[0])))
        reasons = []
        refusals: dict[Target, str] = {}
        for target in _reference_order(targets):
            try:
                precision = "fp32" if "fp32" in target.precisions else None
                loaded = self._lab.load(self.path, target, Config(precision=precision), inputs=samples[0])
                references = self._refer(loaded, samples)
            except (AivmmError, WorkerDied) as error:
                refusals[target] = error.message if isinstance(error, AivmmError) else error.reason
                reasons.append(f"{target}: {refusals[target]}")
                continue
            self.reference_name = f"{target} fp32"
            if reasons:
                self.notes.append(f"the reference outputs come from {target}, since {reasons[0]}")
            self._at[self.base_batch] = Prepared(path=self.path, facts=facts, samples=samples, references=references, extras=self._extras)
            return
        if len(reasons) < 2:
            raise ModelError(f"no target here takes {self.facts.name}: {'; '.join(reasons)}")
        self.refusals = refusals
        self.notes.append(f"no target here takes the model whole: {'; '.join(reasons)}")
        self._at[self.base_batch] = Prepared(path=self.path, facts=facts, samples=samples, references=(), extras=self._extras)

    def try_metric(self, function: str) -> None:
        """Ask the user's metric of the fp32 outputs: one that has no number for these is found before anything is measured.

        Raises:
            UsageError: it raised, or gave anything but one finite number.
        """
        base = self._at[self.base_batch]
        if base.references:
            self._lab.metric(function, base.samples, base.extras or [None] * len(base.samples), base.references)

    def keep_references(self, references: Sequence[Path], name: str) -> None:
        """Take the reference outputs, one file a sample, from elsewhere: of a model that no target takes whole."""
        self._at[self.base_batch] = replace(self._at[self.base_batch], references=tuple(references))
        self.reference_name = name

    def at(self, batch: int) -> Prepared:
        """Return the model prepared for `batch`.

        Raises:
            UsageError: the model's batch cannot be changed.
        """
        if batch not in self._at:
            base = self._at[self.base_batch]
            if not self.facts.batchable:
                raise UsageError(f"{self.facts.name} has a fixed batch of {self.facts.batch}", advice="leave --batch away")
            facts = self._prepare(batch)
            samples = [self._folder / f"sample-{batch}-{index}.npz" for index in range(len(base.samples))]
            arrays = [load_arrays(str(each)) for each in base.samples]
            for index, path in enumerate(samples):
                save_arrays(path, _stacked(arrays, index, facts, batch))
            target, _, _ = self.reference_name.partition(" ")
            loaded = self._lab.load(self._model_path(batch), self.target_named(target), Config(precision="fp32"), inputs=samples[0])
            references = self._refer(loaded, samples)
            self._at[batch] = Prepared(path=self._model_path(batch), facts=facts, samples=tuple(samples), references=references)
        return self._at[batch]

    def structure_at(self, batch: int) -> Structure:
        """Return the model at `batch` taken apart."""
        if batch == self.base_batch:
            return self.structure
        if batch not in self._structures:
            from aivmm.models.graph import analyse

            self._structures[batch] = analyse(self.at(batch).path)
        return self._structures[batch]

    def remember_targets(self, targets: Sequence[Target]) -> None:
        """Keep the targets by name, for references at other batches."""
        self._by_name = {str(each): each for each in targets}

    def reference_order(self) -> list[Target]:
        """Return the remembered targets, those first whose numbers are trusted most."""
        return _reference_order(list(self._by_name.values()))

    def target_named(self, name: str) -> Target:
        """Return one of the remembered targets."""
        return self._by_name[name]

    def _find(self) -> Path:
        given = self._options.model
        name = demo_of(given)
        if name is None:
            return Path(given)
        folder = cache_folder() / "demo"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            folder = self._folder  # a home that cannot be written is no reason to stop
        if not (folder / f"{name}.onnx").exists():
            staging = self._folder / "demo"
            staging.mkdir()
            written = self._lab.write_demo(name, staging)
            target = folder / f"{name}.onnx"
            partial = folder / f".{name}.{os.getpid()}"
            partial.write_bytes(written.read_bytes())
            partial.replace(target)
        return folder / f"{name}.onnx"

    def _model_path(self, batch: int) -> Path:
        return self._folder / f"batch-{batch}" / "model.onnx"

    def _prepare(self, batch: int) -> ModelFacts:
        destination = self._model_path(batch)
        destination.parent.mkdir(exist_ok=True)
        try:
            options = self._options
            return self._lab.prepare(
                self.source, destination, shapes=options.shapes, dims=options.dims, batch=batch, contract=options.contract
            )
        except WorkerDied as died:
            raise ModelError(f"{self.source} cannot be read: preparing it {died.reason}", advice="is the file damaged?") from died

    def _analyse(self) -> Structure:
        from aivmm.models.graph import analyse

        return analyse(self.path)

    def _base_samples(self, facts: ModelFacts) -> tuple[Path, ...]:
        """Write the samples: the first for the search, further ones for the proof."""
        paths = tuple(self._folder / f"sample-{self.base_batch}-{index}.npz" for index in range(1 + PROOF_SAMPLES))
        if self._data is not None:
            return self._take(self._data)
        if self._options.dataset is not None:
            return self._take(self._read_dataset(self._options.dataset, facts))
        if self._options.inputs is None:
            self._lab.make_samples(self.path, facts.inputs, paths, seed=self._options.seed)
            self.notes.extend(_large_integers(load_arrays(str(paths[0]))))
            return paths
        from aivmm.models.inputs import load_inputs

        given = load_inputs(self._options.inputs, facts.inputs)
        if len(given) == 1:
            self.notes.append("one sample was given, so the search and the proof judge accuracy on the same one")
        elif len(given) >= REAL_ENOUGH:
            # Accuracy is judged on samples that int8 was not calibrated with: every second one is set aside for that.
            calibrating = given[1::2][:MOST_CALIBRATION]
            self._calibration = tuple(self._folder / f"calibration-{index}.npz" for index in range(len(calibrating)))
            for path, arrays in zip(self._calibration, calibrating, strict=True):
                save_arrays(path, arrays)
            given = given[::2]
        if len(given) > MOST_HELD_OUT:
            self.notes.append(f"{len(given)} samples are there to judge accuracy with; the first {MOST_HELD_OUT} are used")
        further = given[MOST_SAMPLES:MOST_HELD_OUT]
        self._held_out = tuple((self._folder / f"held-out-{index}.npz", None) for index in range(len(further)))
        for (path, _), arrays in zip(self._held_out, further, strict=True):
            save_arrays(path, arrays)
        used = tuple(self._folder / f"sample-{self.base_batch}-{index}.npz" for index in range(max(2, min(len(given), MOST_SAMPLES))))
        for index, path in enumerate(used):
            save_arrays(path, given[index % len(given)])
        return used

    def _read_dataset(self, given: str, facts: ModelFacts) -> Data:
        folder = self._folder / "dataset"
        folder.mkdir()
        return self._lab.read_dataset(given, facts.inputs, folder, most=MOST_READ, seed=self._options.seed, source=self.source)

    def _take(self, data: Data) -> tuple[Path, ...]:
        """Take the user's samples: a part calibrates, the rest judges."""
        self.notes.extend(data.notes)
        samples, extras = data.validation[:MOST_SAMPLES], data.extras[:MOST_SAMPLES]
        self._held_out = tuple(zip(data.validation, data.extras, strict=True))[MOST_SAMPLES:MOST_HELD_OUT]
        if len(data.validation) > MOST_HELD_OUT:
            self.notes.append(f"{len(data.validation)} held-out samples are there to judge accuracy with; {MOST_HELD_OUT} of them are used")
        if len(samples) == 1:  # the first serves the search, the others the proof
            samples, extras = samples * 2, extras * 2
        self._calibration, self._calibration_extras = data.calibration, data.calibration_extras
        self._extras = extras
        return samples

    def _refer(self, loaded: Loaded, samples: Sequence[Path]) -> tuple[Path, ...]:
        """Write the outputs for each sample; note when a second run gives other ones."""
        try:
            paths = []
            for index, sample in enumerate(samples):
                path = sample.with_name(f"{sample.stem}-reference-{index}.npz")
                self._lab.outputs(loaded.contestant, sample, path)
                paths.append(path)
            again = samples[0].with_name("again.npz")
            self._lab.outputs(loaded.contestant, samples[0], again)
            repeat = judge(load_arrays(str(again)), load_arrays(str(paths[0])))
            if repeat.problem or repeat.relative_l2 > 1e-3:
                self.deterministic = False
                self.notes.append("the model gives other outputs each time it runs, so accuracy cannot be judged")
            return tuple(paths)
        finally:
            self._lab.unload(loaded.contestant)


def _reference_order(targets: Sequence[Target]) -> list[Target]:
    # ONNX Runtime's CPU is the reference even when it may not be part of the plan.
    return sorted(targets, key=lambda each: (str(each) != "onnxruntime:CPU", each.device.kind != "cpu"))


def _large_integers(sample: Mapping[str, Any]) -> list[str]:
    """Return notes on made-up inputs that need more than 32 bits: some runtimes cannot calculate with those."""
    return [
        f"input {name!r} was also tried with integers beyond 32 bits, as its type allows; if yours are never that large, bring --inputs"
        for name, array in sample.items()
        if array.dtype.kind in "iu" and array.size and int(array.max()) >= 1 << 32
    ]


def _saturates(target: Target) -> bool:
    """Say whether int8 products overflow there: on x86 without VNNI two of them are summed in 16 bits. Not known counts as yes."""
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    return target.device.kind == "cpu" and x86 and not any("vnni" in each for each in target.device.instruction_sets)


def _digest_of(paths: Sequence[Path]) -> str:
    return hashlib.sha256("".join(_digest(load_arrays(str(each))) for each in paths).encode()).hexdigest()[:8]


def _digest(arrays: Mapping[str, Any]) -> str:
    """Return 8 hexadecimal digits that tell inputs apart."""
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(repr((name, array.dtype.str, array.shape)).encode())
        total.update(repr(array.tolist()).encode() if array.dtype.kind == "O" else np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:8]


def _stacked(samples: Sequence[Mapping[str, Any]], first: int, facts: ModelFacts, batch: int) -> dict[str, Any]:
    """Make one sample of `batch` from samples of a smaller batch, cycling through them from number `first`."""
    made = {}
    for spec in facts.inputs:
        one = samples[first][spec.name]
        if spec.shape and spec.shape[0] == batch and one.shape[:1] != (batch,):
            parts: list[Any] = []
            while sum(part.shape[0] for part in parts) < batch:
                parts.append(samples[(first + len(parts)) % len(samples)][spec.name])
            made[spec.name] = np.concatenate(parts)[:batch]
        elif any(have != want for have, want in zip(one.shape, spec.shape, strict=True)):
            # The batch is not on the first axis (a state of [2, batch, 128]): repeat along the axis that differs.
            axis = next(index for index, (have, want) in enumerate(zip(one.shape, spec.shape, strict=True)) if have != want)
            made[spec.name] = np.repeat(one, batch, axis=axis)[tuple(slice(0, extent) for extent in spec.shape)]
        else:
            made[spec.name] = one
    return made

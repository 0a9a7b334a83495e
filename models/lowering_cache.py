"""The cache of lowered models: each is made once per content, recipe and calibration, whoever asks, whoever is killed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from filelock import FileLock

from aivmm.errors import Unsupported, UsageError
from aivmm.models import lowering_model as shared
from aivmm.models.lowering import Lowered, Sample, lower
from aivmm.models.lowering_recipes import Recipe


def lower_cached(model: Path, folder: Path, recipe: Recipe, samples: Sequence[Sample], *, content: str) -> Lowered:
    """Return the lowered model from `folder`, made now if it is not there; `content` is the content hash of `model`.

    A second process that wants the same waits for the first. What a killed process left is swept, and a file that is not as it was
    written is made again. A refusal is remembered too.

    Raises:
        Unsupported, UsageError: as `lower` does.
    """
    whole = None if recipe.whole is None else lower_cached(model, folder, recipe.whole, samples, content=content).path
    key = _key(recipe, samples if recipe.needs_data else (), content)
    path = folder / f"{recipe.name}-{key}.onnx"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{path.name}.lock"):
            _sweep(path)
            known = _known(path)
            if known is None:
                known = _lower_and_record(model, path, recipe, samples, whole)
    except OSError as error:
        reason = error.strerror or shared.one_line(error)
        raise UsageError(f"cannot keep lowered models in {folder}: {reason}", advice="choose a folder that can be written") from error
    if isinstance(known, str):
        raise Unsupported(known)
    return known


def _key(recipe: Recipe, samples: Sequence[Sample], content: str) -> str:
    said = "\0".join([content, recipe.digest(), calibration_digest(samples)])
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def calibration_digest(samples: Sequence[Sample]) -> str:
    """Hash of the samples: their order, names, types, shapes and values."""
    digest = hashlib.sha256(str(len(samples)).encode())
    for sample in samples:
        for name in sorted(sample):
            array = np.ascontiguousarray(sample[name])
            digest.update(json.dumps([name, array.dtype.name, list(np.shape(sample[name]))]).encode())
            digest.update(json.dumps(array.astype(str).tolist()).encode() if array.dtype.hasobject else array.tobytes())
    return digest.hexdigest()


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _sweep(path: Path) -> None:
    """Remove what killed processes left of this key; the lock is held, so that nobody works there."""
    for left in path.parent.glob(f"{shared.workshop_prefix(path)}*"):
        shutil.rmtree(left, ignore_errors=True)
    _record_of(path).with_suffix(".part").unlink(missing_ok=True)


def _known(path: Path) -> Lowered | str | None:
    """What was made before, or why it could not be; None when it is not known, or not as it was written."""
    try:
        record = json.loads(_record_of(path).read_text(encoding="utf-8"))
        if "refused" in record:
            return str(record["refused"])
        if record["files"] != _files(path):
            return None
        made = record["made"]
        return Lowered(**{**made, "path": path, "notes": tuple(made["notes"])})
    except (OSError, ValueError, KeyError, TypeError):  # absent, half written, or written by hand
        return None


def _files(path: Path) -> dict[str, list[int | str]]:
    """Size and SHA-256 of the model file, and of its weights' file if it has one."""
    found: dict[str, list[int | str]] = {}
    for role, file in (("model", path), ("data", path.with_name(f"{path.name}.data"))):
        if role == "model" or file.exists():
            with file.open("rb") as stream:
                found[role] = [file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]
    return found


def _lower_and_record(model: Path, path: Path, recipe: Recipe, samples: Sequence[Sample], whole: Path | None) -> Lowered | str:
    record = _record_of(path)
    record.unlink(missing_ok=True)  # it does not tell of what is written next
    try:
        made = lower(model, path, recipe, samples, whole=whole)
    except Unsupported as refusal:
        _write_record(record, {"refused": str(refusal)})
        return str(refusal)
    told = {**asdict(made), "path": path.name}
    _write_record(record, {"made": told, "files": _files(path)})
    return made


def _write_record(record: Path, told: Mapping[str, object]) -> None:
    draft = record.with_suffix(".part")
    with draft.open("w", encoding="utf-8") as stream:
        json.dump(told, stream)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(record)

"""The user's own data and metric: operations of a worker, and the parent's side of asking for them.

A data set's callable and a metric are the user's own code, named on the user's own command line (or in the user's own call of our API).
Nothing that comes from a model, a plan, a bundle or a database may ever name one. They run in a worker of their own with a limit, since
they may hang, exit or crash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aivmm.errors import UsageError
from aivmm.models.dataset import digest, read_samples, split_indices
from aivmm.models.dataset_shapes import declared_inputs
from aivmm.models.user_function import UserFunction, text_of
from aivmm.probes import wire
from aivmm.probes.arrays import load_arrays, save_arrays
from aivmm.probes.client import Worker, WorkerDied

if TYPE_CHECKING:
    from aivmm.probes.runners import State

_METRIC_ARGUMENTS = ("samples", "outputs")


def dataset(
    state: State, *, given: str, specs: list[dict[str, Any]], folder: str, most: int, seed: int, source: str = ""
) -> dict[str, Any]:
    """Load and split a data set (see `models.dataset`), one sample at a time, and write each sample to files of its own in `folder`.

    `source` is the model's file: where samples have other shapes than `specs`, it says which ones can be tuned for. `extras` maps the file
    of a sample to the file of what is no input; samples without such are not in it.
    """
    paths: list[str] = []
    digests: list[str] = []
    extras: dict[str, str] = {}
    notes: list[str] = []
    declared = partial(declared_inputs, Path(source)) if source else None
    for index, sample in enumerate(read_samples(given, wire.specs_in(specs), most=most, notes=notes, declared=declared)):
        path = Path(folder) / f"dataset-{index:05}.npz"
        try:
            save_arrays(path, sample.inputs)
            if sample.extras:
                save_arrays(path.with_suffix(".extras.npz"), sample.extras)
                extras[str(path)] = str(path.with_suffix(".extras.npz"))
        except OSError as error:
            what = f"--dataset {given}: sample {index} cannot be kept in {folder}: {error.strerror or text_of(error)}"
            raise UsageError(what, advice="make room there, or give --dataset fewer samples") from error
        paths.append(str(path))
        digests.append(digest(sample))
    calibration, validation = split_indices(digests, seed=seed)
    if len(paths) > 1 and (note := _repeats(digests)):
        notes.append(note)
    return {
        "calibration": [paths[index] for index in calibration],
        "validation": [paths[index] for index in validation],
        "extras": extras,
        "notes": notes,
    }


def _repeats(digests: Sequence[str]) -> str:
    """Say how many samples repeat another one, or return ""."""
    repeats = len(digests) - len(set(digests))
    if not repeats:
        return ""
    if repeats == len(digests) - 1:
        return f"all {len(digests):,} samples are the same, so the model is calibrated and judged on the same one"
    return f"{repeats:,} of {len(digests):,} samples repeat another one; such are not both calibrated and judged on"


def check_metric(state: State, *, function: str) -> dict[str, Any]:
    """Import the user's metric and look at its arguments, so that a typo is found before minutes of measuring.

    Raises:
        UsageError: it cannot be called as `function(samples, outputs)`.
    """
    UserFunction.find(function, option="--metric", arguments=_METRIC_ARGUMENTS)
    return {}


def metric(state: State, *, function: str, samples: list[str], extras: list[str], outputs: list[str]) -> dict[str, Any]:
    """Call the user's metric as `function(samples, outputs)` and return its value; higher is better.

    Both are lists of dicts from name to array, one dict a run: inputs and extras together, and outputs. The arguments are their files in
    the same order; "" in `extras` stands for none.

    Raises:
        UsageError: it is missing, raises, or returns anything but one finite number.
    """
    found = UserFunction.find(function, option="--metric", arguments=_METRIC_ARGUMENTS)
    pairs = zip(samples, extras, strict=True)
    given = [{**load_arrays(sample), **(load_arrays(extra) if extra else {})} for sample, extra in pairs]
    made = [load_arrays(each) for each in outputs]
    if len(given) != len(made):
        raise ValueError(f"{len(given)} samples, but {len(made)} outputs")
    value = found.call(given, made)
    with found.running("cannot make a number of what it returned"):
        array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iuf":
        what = f"an array of {array.size} elements" if isinstance(value, np.ndarray) else f"{type(value).__name__} {text_of(value)}"
        raise UsageError(f"{found} returned {what}, expected one number", advice="let it return a float, where higher is better")
    number = float(array.reshape(()))
    if not math.isfinite(number):
        raise UsageError(f"{found} returned {number}, expected a finite number", advice="let it return a float, where higher is better")
    return {"value": number}


def ask(worker: Worker, operation: str, *, limit_s: float, **arguments: Any) -> dict[str, Any]:
    """Have a worker do one of the operations above.

    Raises:
        UsageError: it refused, or it hung, exited or crashed, which is then the user's code's (or data's) doing.
    """
    option, name = ("--dataset", arguments["given"]) if operation == "dataset" else ("--metric", arguments["function"])
    try:
        answer: dict[str, Any] = worker.call(operation, limit_s=limit_s, **arguments)
    except WorkerDied as died:
        last = died.output.rpartition("\n")[2].strip()
        printed = f"the last that it printed: {text_of(last)}" if last else f"mend it, or leave {option} away"
        raise UsageError(f"{option} {name} {died.reason}", advice=printed) from died
    return answer


def extras_in_order(samples: Sequence[str], extras: Mapping[str, str]) -> list[str]:
    """Return the files of extras that belong to files of samples, as `metric` wants them."""
    return [extras.get(each, "") for each in samples]

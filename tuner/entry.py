"""One way in for the command line and for Python: a tuning of one model, of one at several shapes, or of several models at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aivmm.errors import UsageError
from aivmm.models.model_file import require_file
from aivmm.tuner.many import ManyOutcome
from aivmm.tuner.options import TuneOptions
from aivmm.tuner.progress import Progress
from aivmm.tuner.session import Session, TuneOutcome
from aivmm.tuner.shapes import Wanted


def run(
    options: TuneOptions, shapes: Sequence[Wanted], models: Sequence[str], workload: Path | None, progress: Progress, *, command: str
) -> TuneOutcome | ManyOutcome | dict[str, Any]:
    """Tune what is asked for; `options.model` is the first of `models`. With `dry_run` return what would be measured.

    Raises:
        AivmmError: what the user can fix.
    """
    if len(models) > 1 and workload is None:
        advice = "tune one by one, or say with --workload FILE what each is to reach"
        raise UsageError(f"{len(models)} models are given", advice=advice)
    if workload is not None:
        from aivmm.tuner.served import WorkloadTuner, require_alone
        from aivmm.tuner.workload_file import read_workload

        require_alone(options, shapes)
        _require_files(models)
        wishes, notes = read_workload(workload, models)
        for note in notes:
            progress.note(note)
        return WorkloadTuner(options, wishes, progress, command=command, notes=list(notes)).run()
    _require_files(models)
    if len(shapes) > 1:
        from aivmm.tuner.buckets import BucketTuner

        return BucketTuner(options, shapes, progress, command=command).run()
    if options.other_shapes != "refuse":
        raise UsageError(
            f"--other-shapes {options.other_shapes} asks what runs beside several shapes", advice="list them, such as --dim seq=32,128"
        )
    return Session(options, progress, command=command).run()


def _require_files(models: Sequence[str]) -> None:
    """Tell of a file that is not there before devices are looked for, which takes seconds."""
    for each in models:
        if not each.startswith("demo:"):
            require_file(Path(each))

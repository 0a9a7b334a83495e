"""`aivmm db`: look at the performance database, take it elsewhere, keep it in order. Commands parse, call and print."""

from __future__ import annotations

import json
import math
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aivmm.errors import UsageError
from aivmm.tuner.command import App, Backends, Db, Json, print_json
from aivmm.tuner.db_table import print_frame
from aivmm.tuner.text import printable

if TYPE_CHECKING:
    import pandas as pd

    from aivmm.db.query import Filter

app = App(
    name="db",
    help="The performance database: ask it, export and import it, merge those of other machines, keep it small and sound.",
)

Model = Annotated[
    str | None, typer.Option(metavar="NAME|HASH", help="A model's name or hash: the whole, its parts, and what its runs rest on.")
]
Target = Annotated[str | None, typer.Option(metavar="PATTERN", help="`openvino`, `openvino:GPU`, `*:CPU`, ...")]
Since = Annotated[str | None, typer.Option(metavar="WHEN", help="`7d`, `12h`, or a date such as `2026-05-04`.")]

_TABLE_ROWS = 50
FORMATS = ("table", "csv", "json", "parquet")


@app.command()
def path(db: Db = None, as_json: Json = False) -> None:
    """Say where the database is. Nothing is opened or made.

    Example: `aivmm db path`
    """
    from aivmm.db.location import Location

    place = Location.of(db)
    exists = None if place.path is None else place.path.exists()
    print_json({"schema": 1, "path": place.shown, "exists": exists}) if as_json else print(place.shown)


@app.command()
def stats(db: Db = None, as_json: Json = False) -> None:
    """Say how much is stored: rows, models, environments, size, the oldest and the newest measurement.

    Example: `aivmm db stats`
    """
    from aivmm.db.database import Database
    from aivmm.db.query import statistics

    with Database.open(db, make=False) as database:
        found = statistics(database)
    if as_json:
        print_json({**found, "schema": 1, "revision": found["schema"]})
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    states = ", ".join(f"{count:,} {state}" for state, count in found["probes"]["state"].items())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in found["probes"]["kind"].items())
    for name, value in (
        ("database", f"{found['path']} (schema {found['schema']})"),
        ("size", _bytes(found["size_bytes"])),
        ("probes", f"{found['tables']['probe']:,}" + (f" ({states}; {kinds})" if states else "")),
        ("models", f"{found['models']:,}"),
        ("environments", f"{found['environments']:,}"),
        ("runs", f"{found['tables']['run']:,}"),
        ("oldest", _minute(found["oldest"])),
        ("newest", _minute(found["newest"])),
        ("rows", ", ".join(f"{name} {count:,}" for name, count in found["tables"].items() if count) or "none"),
    ):
        table.add_row(name, Text(value, overflow="fold"))
    Console(highlight=False).print(table)


@app.command()
def query(
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="`model`, `segment`, `operator` or `transfer`.")] = None,
    model: Model = None,
    target: Target = None,
    op_type: Annotated[str | None, typer.Option(metavar="TYPE", help="Operators of this type: `Conv`, `MatMul`, ...")] = None,
    precision: Annotated[str | None, typer.Option(metavar="NAME", help="`fp32`, `bf16`, ...; `default` where none was asked for.")] = None,
    state: Annotated[str | None, typer.Option(metavar="STATE", help="`measured`, `refused` or `failed`.")] = None,
    since: Since = None,
    environment: Annotated[
        str, typer.Option(metavar="all|this|FINGERPRINT", help="`this` is this machine as it is now (its devices are asked).")
    ] = "all",
    every: Annotated[bool, typer.Option("--all", help="Older measurements of the same thing too.")] = False,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help=f"The newest N; default {_TABLE_ROWS} in a table, else all.")
    ] = None,
    form: Annotated[str, typer.Option("--format", metavar="NAME", help="`table`, `csv`, `json` or `parquet`.")] = "table",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write there; a known suffix is the format.")
    ] = None,
    backend: Backends = None,
    db: Db = None,
    as_json: Json = False,
) -> None:
    """Show measurements, a row each, oldest first.

    Examples:

    `aivmm db query --model resnet50 --target openvino --since 7d`

    `aivmm db query --op-type Conv --format csv -o conv.csv`
    """
    from aivmm.db.database import Database
    from aivmm.db.frames import frame_of
    from aivmm.db.query import Filter, find

    form = _format(form, output, as_json)
    wanted = Filter(
        kind=kind,
        model=model,
        target=target,
        op_type=op_type,
        precision=precision,
        state=state,
        since=_moment("--since", since),
        every=every,
    )
    if form == "table" and output is None and limit is None:
        limit = _TABLE_ROWS
    with Database.open(db, make=False) as database:
        wanted = _in_environment(wanted, environment, database, backend)
        found = find(database, wanted, limit=limit)
        frame = frame_of(database, found.entries)
    if output is not None:
        _write_frame(frame, form, output)
        told = {"schema": 1, "output": str(output), "format": form, "rows": len(frame), "total": found.total}
        print_json(told) if as_json else print(f"{len(frame)} of {found.total} written to {output}", file=sys.stderr)
    elif form == "table":
        if found.total:
            print_frame(frame)
        else:
            print("nothing that is stored fits" if wanted != Filter() else "nothing is stored yet", file=sys.stderr)
        if found.total > len(frame):
            print(f"the newest {len(frame)} of {found.total}; see --limit", file=sys.stderr)
    elif form == "csv":
        frame.to_csv(sys.stdout, index=False, lineterminator="\n")
    else:
        print_json({"schema": 1, "total": found.total, "probes": _records(frame)})


@app.command("export")
def export_(
    place: Annotated[Path, typer.Argument(metavar="DIR|FILE.zip", help="A new folder, or a zip.")],
    model: Model = None,
    target: Target = None,
    since: Since = None,
    db: Db = None,
    as_json: Json = False,
) -> None:
    """Write measurements to Parquet files, one a table, with a manifest of their SHA-256; `aivmm db import` reads them.

    Filters choose the probes. A run comes along whole (with all it rests on) or, with --target, not at all.

    Example: `aivmm db export measurements.zip --model resnet50`
    """
    from aivmm.db.database import Database
    from aivmm.db.exchange import export
    from aivmm.db.query import Filter

    wanted = Filter(model=model, target=target, since=_moment("--since", since), every=True)
    with Database.open(db, make=False) as database:
        manifest = export(database, place, None if wanted == Filter(every=True) else wanted)
    rows = {name: each["rows"] for name, each in manifest["tables"].items()}
    if as_json:
        print_json({"schema": 1, "path": str(place), "revision": manifest["schema"], "rows": rows})
    else:
        print(f"{_count(rows['probe'], 'probe')} and {_count(rows['run'], 'run')} written to {place}")


@app.command("import")
def import_(
    place: Annotated[Path, typer.Argument(metavar="DIR|FILE.zip", help="What `aivmm db export` wrote.")],
    db: Db = None,
    as_json: Json = False,
) -> None:
    """Take an export in: all of it or nothing, and a second time nothing is new.

    Example: `aivmm db import measurements.zip`
    """
    from aivmm.db.database import Database
    from aivmm.db.exchange import import_from

    with Database.open(db) as database:
        added = import_from(database, place)
    _tell_added([{"source": str(place), "added": added}], as_json)


@app.command()
def merge(
    others: Annotated[list[str], typer.Argument(metavar="OTHER", help="Databases of other machines: files or URLs. They are only read.")],
    db: Db = None,
    as_json: Json = False,
) -> None:
    """Take in what other databases know: each whole or not at all, and a second time nothing is new.

    Example: `aivmm db merge colleague.db`
    """
    from aivmm.db.database import Database
    from aivmm.db.location import Location
    from aivmm.db.merge import merge as merge_in

    told = []
    with Database.open(db) as database:
        for other in others:
            told.append({"source": Location.of(other).shown, "added": merge_in(database, other)})
    _tell_added(told, as_json)


@app.command()
def prune(
    older_than: Annotated[str | None, typer.Option(metavar="WHEN", help="Measured before: `90d`, `12h`, or a date.")] = None,
    model: Model = None,
    environment: Annotated[
        str | None, typer.Option(metavar="other", help="`other`: everything but this machine as it is now (its devices are asked).")
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Only what failed, so that it is tried again.")] = False,
    keep_newest: Annotated[int | None, typer.Option(metavar="N", help="Only what is not among the newest N of its kind.")] = None,
    runs: Annotated[bool, typer.Option("--runs", help="The runs too that fit --older-than, --model and --environment.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    backend: Backends = None,
    db: Db = None,
    as_json: Json = False,
) -> None:
    """Remove what fits all that is given, and give the space back. What a kept run rests on stays.

    Example: `aivmm db prune --older-than 90d --dry-run`
    """
    from dataclasses import asdict

    from aivmm.db.database import Database
    from aivmm.db.upkeep import Prune
    from aivmm.db.upkeep import prune as prune_

    if environment not in (None, "other"):
        raise UsageError(f"--environment {environment!r} cannot be pruned", advice="give --environment other")
    before = _moment("--older-than", older_than)
    Prune(older_than=before, model=model, other_than=() if environment else None, failed=failed, keep_newest=keep_newest, runs=runs)
    here = _this_environment(backend) if environment else None
    wanted = Prune(older_than=before, model=model, other_than=here, failed=failed, keep_newest=keep_newest, runs=runs)
    with Database.open(db, make=False) as database:
        pruned = prune_(database, wanted, dry_run=dry_run)
    if as_json:
        print_json({"schema": 1, "dry_run": dry_run, **asdict(pruned)})
        return
    what = f"{_count(pruned.probes, 'probe')} and {_count(pruned.runs, 'run')}"
    print(f"{what} would go" if dry_run else f"{what} removed, {_bytes(pruned.freed_bytes)} freed")
    if pruned.kept_for_runs:
        print(f"note: {pruned.kept_for_runs:,} more fit, and stay because a run rests on them (see --runs)", file=sys.stderr)
    if pruned.note:
        print(f"note: {printable(pruned.note)}", file=sys.stderr)


@app.command()
def check(db: Db = None, as_json: Json = False) -> None:
    """Read everything and say what is wrong: pages, references, samples, digests. Exits with 1 when something is.

    Example: `aivmm db check`
    """
    from aivmm.db.database import Database

    with Database.open(db, make=False) as database:
        problems = database.check()
        location = database.location
    if as_json:
        print_json({"schema": 1, "path": location, "problems": problems})
    else:
        for problem in problems:
            print(printable(problem))
        print(f"{_count(len(problems), 'problem')} in {location}" if problems else f"{location} is sound")
    if problems:
        raise typer.Exit(1)


def _format(form: str, output: Path | None, as_json: bool) -> str:
    if form not in FORMATS:
        raise UsageError(f"unknown format {form!r}", advice=f"choose from {', '.join(FORMATS)}")
    if output is None:
        if form == "parquet":
            raise UsageError("Parquet is not for a terminal", advice="give -o FILE.parquet")
        return "json" if as_json else form
    suffix = output.suffix.lower().lstrip(".")
    if form == "table":
        form = suffix
    if form not in FORMATS[1:]:
        raise UsageError(f"what format is {output.name!r} to have?", advice="give --format csv, json or parquet")
    return form


def _moment(option: str, text: str | None) -> datetime | None:
    """Return the moment that `7d`, `12h` or a date names; a date without a zone is the user's own."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d{1,6}(?:\.\d*)?)\s*(min|h|d|w)\s*", text)
    try:
        if found:
            return datetime.now(UTC) - timedelta(minutes=float(found[1]) * {"min": 1, "h": 60, "d": 1440, "w": 10080}[found[2]])
        return datetime.fromisoformat(text.strip()).astimezone(UTC)
    except (ValueError, OverflowError, OSError) as error:  # OSError: Windows, before 1970
        raise UsageError(f"{option} {text!r} is not a time", advice="give one such as 90d, 12h, 30min or 2026-05-04") from error


def _in_environment(wanted: Filter, text: str, database: Any, backend: list[str] | None) -> Filter:
    from dataclasses import replace

    if text == "all":
        return wanted
    if text == "this":
        return replace(wanted, environments=_this_environment(backend))
    known = [each.fingerprint for each in database.environments()]
    found = [each for each in known if each.startswith(text.lower())]
    if not found or not text:
        listed = ", ".join(each[:8] for each in known[:5])
        raise UsageError(
            f"no environment begins with {text!r}", advice=f"give all, this, or one of {listed}" if known else "give all or this"
        )
    return replace(wanted, environments=tuple(found))


def _this_environment(backend: list[str] | None) -> tuple[str, ...]:
    """Return the fingerprints of this machine's targets, as they are now."""
    from aivmm.runtime.environment import environment_of
    from aivmm.tuner.inventory import find_devices

    found = tuple(environment_of(each).fingerprint for each in find_devices(backend)[0])
    if not found:
        raise UsageError("no target runs here, so nothing is of this machine", advice="see `aivmm devices`")
    return found


def _write_frame(frame: pd.DataFrame, form: str, output: Path) -> None:
    try:
        if form == "csv":
            frame.to_csv(output, index=False, lineterminator="\n")
        elif form == "parquet":
            frame.to_parquet(output, index=False)
        else:
            output.write_text(json.dumps({"schema": 1, "probes": _records(frame)}, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror or error}", advice="give another -o FILE") from error


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return rows as JSON values: a moment is ISO 8601, what is missing is null."""
    return [{str(name): _json_value(value) for name, value in row.items()} for row in frame.to_dict("records")]


def _json_value(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _minute(text: str | None) -> str:
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M} UTC" if text else "nothing measured yet"


def _tell_added(told: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json({"schema": 1, "sources": told})
        return
    for each in told:
        added = each["added"]
        some = ", ".join(_count(added[name], name) for name in ("probe", "run", "model", "environment") if added[name])
        if not some and any(added.values()):
            some = _count(sum(added.values()), "row")  # devices, blocks, configs, ...
        print(f"{each['source']}: {f'new: {some}' if some else 'nothing is new'}")

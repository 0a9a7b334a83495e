"""`aivmm report`: a run again, several beside each other, or the whole database as a static site."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aivmm.errors import UsageError
from aivmm.tuner.command import Db, Json, print_json

if TYPE_CHECKING:
    from aivmm.db.database import Database

FORMATS = ("html", "markdown", "json")


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN|PLAN|MODEL",
            help="A run's id (or the beginning of it), a plan bundle, or a model's name; default: the newest run.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE|DIR", help="Where to write; default `<model>.report.html`. `-` is standard output."),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Compare the first run with the others.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Write a site over the whole database to `-o DIR`.")] = False,
    kind: Annotated[str, typer.Option("--format", metavar="NAME", help="`html`, `markdown` (for a pull request), or `json`.")] = "html",
    tables: Annotated[
        str | None, typer.Option(metavar="csv|parquet|json", help="Write the run's tables in this format to `-o DIR` instead.")
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open what was written in the browser.")] = False,
    db: Db = None,
    as_json: Json = False,
) -> None:
    """Render a run's report again from the database, compare runs, or make pages of all of them.

    Examples:

    `aivmm report resnet50.onnx --open`

    `aivmm report --compare 0d9f6a3e 7c21b0aa -o before-after.html`

    `aivmm report --all -o site`

    `aivmm report --format markdown -o -`
    """
    from aivmm.db.database import Database
    from aivmm.tuner.reporting import find_run

    wanted: list[str | None] = [*(runs or [])] or [None]
    _check(wanted, output, compare=compare, everything=everything, kind=kind, tables=tables)
    to_stdout = output is not None and str(output) == "-"
    if to_stdout and (as_json or open_it):
        raise UsageError("-o - writes the report itself to standard output", advice="leave --json and --open away")
    run_id: str | None = None  # of the one run that this is about
    with Database.open(db, make=False) as database:
        if not everything and not compare:
            run_id = find_run(database, wanted[0]).id
        if everything:
            written = _site(database, output or Path("aivmm-report"))
        elif tables:
            written = _tables(database, str(run_id), output, tables)
        else:
            name, text = _comparison(database, wanted) if compare else _single(database, str(run_id), kind)
            if to_stdout:
                sys.stdout.write(text)
                return
            written = _write(output or Path(name), text)
    if open_it:
        typer.launch(str(written.absolute()))
    print_json({"schema": 1, "run": run_id, "report": str(written)}) if as_json else print(written)


def _check(wanted: list[Any], output: Path | None, *, compare: bool, everything: bool, kind: str, tables: str | None) -> None:
    if kind not in FORMATS:
        raise UsageError(f"unknown format {kind!r}", advice=f"choose from {', '.join(FORMATS)}")
    if tables is not None and tables not in ("csv", "parquet", "json"):
        raise UsageError(f"unknown format of tables {tables!r}", advice="choose from csv, parquet, json")
    if sum((compare, everything, tables is not None)) > 1:
        raise UsageError("--compare, --all and --tables are three different things", advice="keep one of them")
    if compare and len(wanted) < 2:
        raise UsageError("--compare takes two runs or more", advice="name them by id, plan or model: aivmm report --compare A B")
    if everything and wanted != [None]:
        raise UsageError("--all takes no run: it is about all of them", advice="leave them away, or leave --all away")
    if ((everything or compare) and kind != "html") or (tables and kind != "html"):
        raise UsageError(f"--format {kind} is for the report of one run", advice="leave it away")
    if not compare and len(wanted) > 1:
        raise UsageError("several runs were named", advice="name one, or compare them with --compare")
    if (everything or tables) and output is not None and str(output) == "-":
        raise UsageError("several files cannot go to standard output", advice="name a folder with -o DIR")


def _single(database: Database, run_id: str, kind: str) -> tuple[str, str]:
    """Return a file name and the text of one run's report."""
    from aivmm.tuner.reporting import report_data

    data = report_data(database, run_id)
    stem = _stem(data.run.model.name)
    if kind == "markdown":
        from aivmm.reports.markdown import markdown_summary

        return f"{stem}.report.md", markdown_summary(data)
    if kind == "json":
        return f"{stem}.report.json", json.dumps({"run": data.run.id, **data.run.summary}, allow_nan=False) + "\n"
    from aivmm.reports.render import render

    return f"{stem}.report.html", render(data)


def _comparison(database: Database, wanted: list[str | None]) -> tuple[str, str]:
    """Return a file name and the text of a comparison."""
    from aivmm.reports.compare import compare
    from aivmm.reports.pages import render_comparison
    from aivmm.tuner.reporting import find_run, report_data

    found = [report_data(database, find_run(database, each).id) for each in wanted]
    return "comparison.report.html", render_comparison(compare(found), found[0].generated_at)


def _site(database: Database, folder: Path) -> Path:
    """Write the site; the report of a finished run that is there already is kept, since its rows do not change. Return its index."""
    from datetime import UTC, datetime

    from aivmm.reports.history import histories
    from aivmm.reports.pages import render_site
    from aivmm.reports.render import render
    from aivmm.tuner.reporting import report_data

    _make(folder)
    found = [report_data(database, record.id, parts=False) for record in database.runs()]
    for history in histories(found):
        for entry in history.entries:
            page = folder / entry.page
            if not page.is_file() or entry.data.run.finished_at is None:
                _write(page, render(report_data(database, entry.data.run.id)))
    for name, text in render_site(found, datetime.now(UTC)):
        _write(folder / name, text)
    return folder / "index.html"


def _tables(database: Database, run_id: str, output: Path | None, kind: str) -> Path:
    """Write each table of a run to a file of its own. Return the folder."""
    from aivmm.tuner.reporting import run_tables

    folder = output or Path(f"{_stem(database.run(run_id).model.name)}.tables")
    _make(folder)
    for name, frame in run_tables(database, run_id).items():
        path = folder / f"{name}.{kind}"
        try:
            if kind == "csv":
                frame.to_csv(path, index=False)
            elif kind == "parquet":
                frame.to_parquet(path, index=False)
            else:
                frame.to_json(path, orient="records", date_format="iso")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}", advice="choose another folder with -o DIR") from error
    return folder


def _stem(name: str) -> str:
    """Return what a model's name leaves for a file name: no part of a path, nothing that a shell or a file system minds."""
    kept = "".join(each if each.isalnum() or each in "-_." else "_" for each in Path(name.removeprefix("demo:")).name)
    return kept.strip("._")[:80] or "model"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror or error}", advice="choose another one with -o DIR") from error


def _write(path: Path, text: str) -> Path:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}", advice="choose another file with -o FILE") from error
    return path

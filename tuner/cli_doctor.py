"""`aivmm doctor` on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aivmm.tuner.command import Backends, Db, Json, print_json
from aivmm.tuner.text import printable

if TYPE_CHECKING:
    from aivmm.tuner.doctor import Finding

_STYLES = {"ok": "green", "absent": "dim", "missing": "yellow", "warning": "yellow", "broken": "red"}


def doctor(
    db: Db = None,
    as_json: Json = False,
    backend: Backends = None,
) -> None:
    """Say what works here, what is missing for each class of device, and how to get it.

    It also looks at what would spoil measurements now, and at the places where data is kept. Nothing is changed. Exit status 2 when
    nothing could be tuned here.

    Examples:

    `aivmm doctor`

    `aivmm doctor --json`
    """
    from aivmm.tuner import doctor as examination

    findings = examination.examine(db, backend)
    if as_json:
        print_json(examination.as_json(findings))
    else:
        _print(findings)
    if not examination.usable(findings):
        raise typer.Exit(2)


def _print(findings: Sequence[Finding]) -> None:
    from aivmm.tuner.doctor import mark

    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    last = ""
    for each in findings:
        subject = each.subject if each.subject != last else ""
        last = each.subject
        said = Text(printable(each.detail), style="dim" if each.state == "absent" else "")
        if each.advice:
            said.append("\n" + printable(each.advice), style=_STYLES[each.state])
        table.add_row(Text(mark(each.state), style=_STYLES[each.state]), Text(subject), said)
    Console(highlight=False).print(table)

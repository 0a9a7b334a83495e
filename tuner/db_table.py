"""Measurements as a table for people: what fits a terminal's width, and all of it where the output goes elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from aivmm.tuner.text import printable

if TYPE_CHECKING:
    import pandas as pd

_WIDE = 120  # columns of a terminal from which all is shown
_LONGEST = 80  # of what a driver said or an author called a model
_RIGHT = ("batch", "callers", "median", "p90")
_FOLDED = ("name", "settings", "remarks")  # the others stay whole
_NARROW_LACKS = ("kind", "settings", "p90")


def print_frame(frame: pd.DataFrame) -> None:
    """Print measurements, a row each, on standard output. Lines are not folded when that is no terminal, so that they can be searched."""
    rows = [_cells(row) for row in frame.to_dict("records")]
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=10_000)
    names = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    if console.width < _WIDE:
        names = [name for name in names if name not in _NARROW_LACKS]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in names:
        side: Literal["left", "right"] = "right" if name in _RIGHT else "left"
        least = len("never-settled,") if name == "remarks" else None
        table.add_column(name, no_wrap=name not in _FOLDED, overflow="fold", justify=side, min_width=least)
    for row in rows:
        table.add_row(*(Text(row[name]) for name in names))
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _cells(row: Mapping[Any, Any]) -> dict[str, str]:
    measured = row["state"] == "measured"
    settings = json.loads(row["config"])["settings"]
    cells = {
        "measured (UTC)": f"{row['measured_at']:%Y-%m-%d %H:%M}",
        "kind": row["kind"],
        "name": row["name"],
        "target": row["target"],
        "precision": row["precision"] if isinstance(row["precision"], str) else "default",
        "settings": ", ".join(f"{name}={value}" for name, value in settings.items()),
        "batch": str(row["batch"]),
        "callers": str(row["callers"]) if row["callers"] > 1 else "",
        "median": duration(row["median_s"]) if measured else row["state"],
        "p90": duration(row["p90_s"]) if measured else "",
        "remarks": row["cautions"].replace(",", ", ") or row["reason"],
    }
    return {name: printable(text)[:_LONGEST] for name, text in cells.items()}


def duration(seconds: float) -> str:
    """Return a duration in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"

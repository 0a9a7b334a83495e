"""The golden file: how the report of a run that is stored in a file of the repository looks, so that each change of it is seen in a diff.

`python -m tests.reports.golden` (in the repository's root) writes `golden/report.html` anew from `golden/run.sql.xz`; look at the diff, and
at the page itself with `--page FILE`, before it is committed. The rows are of `aivmm tune chain.onnx --precisions fp32 --batch 1,4
--trials 8 --objective latency,throughput --budget 120s --top 2` on a model of seven nodes, as SQLite's dump gave them. They stay as
they are when the schema moves: that they are still read is a part of what is tested.
"""

from __future__ import annotations

import lzma
import re
import sqlite3
import sys
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from aivmm.db.database import Database
from aivmm.reports.data import ReportData
from aivmm.reports.render import render
from aivmm.tuner.reporting import report_data
from tests.reports.rows import EARLIER

FOLDER = Path(__file__).parent / "golden"
PAGE, ROWS = FOLDER / "report.html", FOLDER / "run.sql.xz"

_OURS = re.compile(r"(<(style|script)>).*?(</\2>)", re.DOTALL)  # their own files, with tests of their own
_POLICY = re.compile(r"sha256-[A-Za-z0-9+/=]+")  # and no further: the quote after it is escaped
_CHART = re.compile(r'<svg class="mpl.*?</svg>', re.DOTALL)
_NUMBER = re.compile(r"-?\d+\.\d+")
_VALUE = re.compile(r'(?<=data-v=")-?\d+\.\d+(e-?\d+)?(?=")')


def stored(folder: Path) -> ReportData:
    """Return the stored run, read from a database file in `folder`."""
    path = folder / "run.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(lzma.decompress(ROWS.read_bytes()).decode("utf-8"))
    with Database.open(str(path)) as database:
        return replace(report_data(database, None), generated_at=EARLIER)


def plain(page: str) -> str:
    """Return a page as the golden file has it: a tag a line, without our script and style; positions in charts as whole pixels.

    Matplotlib's second decimals differ between its versions, and the last digits of what is computed between processors; nobody sees them.
    """
    page = _POLICY.sub("sha256-of-the-script", _OURS.sub(r"\1\3", page))
    page = _CHART.sub(lambda chart: _NUMBER.sub(lambda number: f"{float(number[0]):.0f}", chart[0]), page)
    page = _VALUE.sub(lambda number: f"{float(number[0]):.12g}", page)
    return page.replace("><", ">\n<")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        page = render(stored(Path(folder)))
    PAGE.write_text(plain(page), encoding="utf-8")
    if "--page" in sys.argv:
        Path(sys.argv[sys.argv.index("--page") + 1]).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

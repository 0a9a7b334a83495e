"""What `aivmm.tune` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from aivmm.runtime.engine import Engine
    from aivmm.runtime.many import Engines, ShapedEngine
    from aivmm.runtime.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneResult:
    """A finished tuning."""

    plan_path: Path
    report_path: Path
    run_id: str
    database: str
    summary: Mapping[str, Any]  # the object of `aivmm tune --json`
    _db: str | None = None

    @property
    def plan(self) -> Plan:
        """The plan as written, checked again."""
        from aivmm.runtime.bundle import Bundle

        with Bundle.open(self.plan_path) as bundle:
            return bundle.plan

    @property
    def verdict(self) -> str:
        """The result in plain English."""
        return str(self.summary["verdict"])

    @property
    def baselines(self) -> Sequence[Mapping[str, Any]]:
        """What a user would have run otherwise: name, median_s, ci95_s, ratio_to_plan, eligible, verdict, ..."""
        return list(self.summary.get("baselines", ()))  # of several plans each has its own, in the summary

    @property
    def evidence(self) -> pd.DataFrame:
        """Every probe of this run, a row each."""
        from aivmm.db.database import Database
        from aivmm.db.frames import evidence

        with Database.open(self._db) as database:
            return evidence(database, run_id=self.run_id)

    def load(self) -> Engine | ShapedEngine | Engines:
        """Load the plan and return a running engine, as `load_plan` does."""
        from aivmm.runtime.many import load

        return load(self.plan_path)

    def _repr_html_(self) -> str:
        from html import escape

        from aivmm.reports.notebook import notebook

        if "kind" in self.summary:
            return f"<p>{escape(self.verdict)}</p>"
        return notebook(self.summary, str(self.report_path))

    def __str__(self) -> str:
        return self.verdict

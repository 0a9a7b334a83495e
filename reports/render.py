"""From the rows of a run to one HTML file that needs nothing else: no network, no scripts, no fonts."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment as Templates
from jinja2 import FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from aivmm.planner.records import TrialRecord
from aivmm.reports import (
    anatomy,
    belief,
    costs,
    figures,
    handovers,
    importance,
    palette,
    precision,
    race,
    recipes,
    rooflines,
    scaling,
    summary,
    tradeoffs,
    trouble,
)
from aivmm.reports import format as fmt
from aivmm.reports.at_once import attempts
from aivmm.reports.data import ReportData, dig, throughput_wanted

_FOLDER = Path(__file__).parent / "templates"
_BEST_TRIALS = 15


def render(data: ReportData) -> str:
    """Return the report. A pure function: the same data gives the same text, byte for byte.

    Every name from a model, file, device or error is escaped, cut to a length that can be read, and kept from reordering its surroundings.
    """
    return templates().get_template("report.html.j2").render(_context(data)) + "\n"


def render_page(template: str, **context: Any) -> str:
    """Return a page that stands beside reports: its template with our script, our style and the policy that lets only these in."""
    script = asset("report.js")
    ours = {"policy": content_security_policy(script), "script": Markup(script), "style": Markup(asset("report.css"))}
    return templates().get_template(template).render(**ours, **context) + "\n"


def content_security_policy(script: str) -> str:
    """Return a policy that lets `script` run and nothing load, not even from this file's own folder."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def _context(data: ReportData) -> dict[str, Any]:
    colours = palette.slots(data.targets)
    plan = anatomy.dissect(data, colours)
    warned = trouble.cautions(data)
    troubles = trouble.troubles(data)
    script = asset("report.js")
    return {
        "data": data,
        "run": data.run,
        "colours": colours,
        "policy": content_security_policy(script),
        "script": Markup(script),  # our own file
        "style": Markup(asset("report.css")),  # our own file
        "verdict": summary.split_verdict(summary.verdict(data)),
        "answers": summary.answers(data, plan.stages, [each.caution.code for each in warned if each.on_plan]),
        "figures": summary.key_figures(data),
        "throughput_wanted": throughput_wanted(data),
        "race": race.lay_out(data, colours),
        "anatomy": plan,
        "attempts": attempts(data),
        "costs": costs.account(data, plan.cells, colours),
        "distribution": figures.distribution(data, colours),
        "tradeoffs": tradeoffs.account(data, colours),
        "roofs": rooflines.account(data, colours),
        "scaling": scaling.account(data, colours),
        "handovers": handovers.account(data, colours),
        "predictions": belief.predictions(data, colours),
        "accuracy": belief.accuracy(data, colours),
        "importance": importance.account(data, colours),
        "search": figures.search(data, colours),
        "precision": precision.account(data, colours),
        "knobs": figures.knobs(data, colours),
        "best_trials": _best(data.trials),
        "states": _states(data.trials),
        "troubles": troubles[: trouble.MOST_TROUBLES],
        "trouble_count": len(troubles),
        "cautions": warned,
        "probes": _probes(data),
        "options": {name: json.dumps(value, ensure_ascii=False, default=str) for name, value in sorted(data.run.options.items())},
        "recipe": {"python": recipes.production(data), "shell": recipes.try_it(data), "again": recipes.reproduce(data)},
    }


def _best(trials: tuple[TrialRecord, ...]) -> list[TrialRecord]:
    done = [trial for trial in trials if trial.value is not None]
    return sorted(done, key=lambda trial: (trial.value or 0.0, trial.number))[:_BEST_TRIALS]


def _states(trials: tuple[TrialRecord, ...]) -> str:
    """Return `41 complete, 3 refused`."""
    counts = {state: sum(trial.state == state for trial in trials) for state in ("complete", "pruned", "refused", "failed")}
    reused = sum(trial.reused for trial in trials)
    said = [f"{count} {state}" for state, count in counts.items() if count]
    return ", ".join([*said, f"{reused} of them from the database"] if reused else said)


def _probes(data: ReportData) -> str:
    """Return how many probes were measured, reused, refused and failed, by the run's own count where it has one."""
    stated = dig(data.run.summary, "probes")
    if isinstance(stated, Mapping):
        counts = {str(name): stated.get(name) for name in ("measured", "reused", "refused", "failed")}
    else:
        counts = {}
        for outcome in data.outcomes:
            name = "reused" if outcome.key in data.reused else type(outcome).__name__.lower()
            counts[name] = (counts.get(name) or 0) + 1
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if isinstance(count, int)) or "none"


@cache
def templates() -> Templates:
    """Return the templates with our filters: everything is cleaned and escaped on its way out."""
    templates = Templates(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    templates.filters.update(
        {
            "label": _label,
            "seconds": fmt.seconds,
            "bytes": fmt.size,
            "binary": fmt.binary,
            "flops": fmt.flops,
            "ratio": fmt.ratio,
            "percent": fmt.percent,
            "count": fmt.count,
            "moment": fmt.moment,
            "shorten": fmt.shorten,
            "per_second": fmt.per_second,
            "similarity": fmt.similarity,
            "interval": race.ratio_interval,
        }
    )
    return templates


def _finalize(value: Any) -> Any:
    """Clean every text on its way out; Jinja escapes it afterwards."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return fmt.clean(value)


def _label(text: object, limit: int = 72) -> Markup:
    """Return a name from outside, isolated from the direction of the text around it, with more of it on hover when it was cut."""
    full = str(text)
    short = fmt.shorten(full, limit)
    hover = Markup(' title="{}"').format(fmt.shorten(full, 600)) if short != full else Markup("")
    return Markup("<bdi{}>{}</bdi>").format(hover, escape(short))


@cache
def asset(name: str) -> str:
    """Return a file of ours that belongs in a page."""
    return (_FOLDER / name).read_text(encoding="utf-8")

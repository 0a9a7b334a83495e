"""What a tuning says on the terminal, or as JSON, once it has ended."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aivmm.tuner.command import print_json

if TYPE_CHECKING:
    from aivmm.tuner.many import ManyOutcome


def print_outcome(summary: Any, notes: list[str], verbose: bool) -> None:
    console = Console(highlight=False)
    console.print(Text(summary["verdict"], style="bold"))
    if verbose or summary["plan"] is None:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("baseline", "median", "95 % interval", "plan against it"):
            table.add_column(heading)
        for each in summary["baselines"]:
            interval = f"{each['ci95_s'][0] * 1e3:.3f} to {each['ci95_s'][1] * 1e3:.3f} ms" if each["ci95_s"] else ""
            median = f"{each['median_s'] * 1e3:.3f} ms" if each["median_s"] is not None else "did not run"
            against = f"{each['verdict']}, {each['ratio_to_plan']:.2f}x" if each["verdict"] else each["reason"] or ""
            table.add_row(
                Text(each["name"]),
                median,
                interval,
                Text(against if each["eligible"] or not each["reason"] else f"not eligible: {each['reason']}"),
            )
        console.print(table)
    if verbose:
        for note in notes:
            console.print(Text(f"note: {note}"))
    if summary["plan"]:
        console.print(Text(f"plan    {summary['plan']['path']}"))
        for place in (place for stage in summary["plan"]["stages"] for place in (stage, *stage["copies"])):
            if len(place["config"]) > 2:  # the verdict names two
                console.print(Text(f"with    {place['target']}: {', '.join(f'{name}={value}' for name, value in place['config'].items())}"))
    console.print(Text(f"report  {summary['report']}"))
    if summary["certificate"]:
        console.print(Text(f"sure    {summary['certificate']['sentence']}"))
    if told := summary["predicted"].get("sentence"):  # nothing was expected of what the search never met
        console.print(Text(f"promise {told}"))
    console.print(Text(f"probes  {_counted(summary['probes'])}"))
    if summary["plan"]:
        console.print(Text(f"use it  import aivmm; engine = aivmm.load_plan({summary['plan']['path']!r})"))


def print_many(outcome: ManyOutcome, as_json: bool, verbose: bool) -> None:
    """Print what a tuning for several plans gave, and exit with 3 when there is no bundle."""
    if as_json:
        print_json(outcome.summary)
    else:
        console = Console(highlight=False)
        for number, line in enumerate(outcome.lines):
            console.print(Text(line, style="" if number else "bold"), soft_wrap=True)
        for note in dict.fromkeys(note for each in outcome.outcomes for note in each.run.notes) if verbose else outcome.notes:
            console.print(Text(f"note: {note}"))
        if outcome.plan_path is not None:
            console.print(Text(f"plan    {outcome.plan_path}"), soft_wrap=True)
        console.print(Text(f"report  {outcome.report_path}"), soft_wrap=True)
        console.print(Text(f"probes  {_counted(outcome.summary['probes'])}"))
        if outcome.plan_path is not None:
            console.print(Text(f"use it  {outcome.use}"), soft_wrap=True)
    if outcome.plan_path is None:
        raise typer.Exit(3)


def print_dry_run(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    print(f"model      {found['model']['path']} ({found['model']['category']['name']}: {found['model']['category']['reason']})")
    print(f"inputs     {', '.join(found['inputs'])}")
    limits = f", limited by {', '.join(found['constraints'])}" if found["constraints"] else ""
    print(f"goal       {found['objective']}{limits}")
    print(f"targets    {', '.join(found['targets'])}")
    for each in found["unavailable"]:
        print(f"           not available: {each}")
    print(f"baselines  {', '.join(found['baselines'])}")
    for target, knobs in found["knobs"].items():
        print(f"search     {target}: {', '.join(knobs) or 'nothing to tune'}")
    print(f"batches    {', '.join(map(str, found['batches']))}")
    print(f"parts      {found['blocks']} blocks and {found['operators']} unique operators on each target")
    print(f"budget     {found['budget_s']:.0f} s, and on top {found['on_top']}")
    for each in found["notes"]:
        print(f"note: {each}", file=sys.stderr)


def _counted(probes: Mapping[str, int]) -> str:
    """Say how many probes were measured now, and how many the database knew already."""
    known = f"{probes['measured']} measured, {probes['reused']} reused from the database"
    return ", ".join([known, *(f"{probes[state]} {state}" for state in ("refused", "failed") if probes[state])])

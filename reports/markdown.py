"""A few lines of Markdown for a pull request: the verdict and the comparison."""

from __future__ import annotations

import re

from aivmm.reports import format as fmt
from aivmm.reports.data import ReportData, throughput_wanted
from aivmm.reports.palette import slots
from aivmm.reports.race import Runner, lay_out, ratio_interval
from aivmm.reports.summary import key_figures, verdict

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|<>~$&@:-])")


def markdown_summary(data: ReportData) -> str:
    """Return GitHub-flavoured Markdown: verdict, comparison table, key figures. Names are escaped, so none becomes markup or a mention."""
    race = lay_out(data, slots(data.targets))
    lines = [f"**{_escape(verdict(data), 600)}**", ""]
    if race.runners:
        head = "Throughput" if throughput_wanted(data) else "Median"
        lines += [f"| | {head} | 95 % interval | Ratio to plan | The plan is |", "|---|---:|---:|---:|---|"]
        lines += [_row(runner) for runner in race.runners]
        lines.append("")
    lines += [f"- {_escape(each.label)}: {_escape(each.value)}" for each in key_figures(data) if each.value != "–"]
    return "\n".join(lines).rstrip() + "\n"


def _row(runner: Runner) -> str:
    proof = runner.proof
    name = _escape(proof.name)
    if not proof.eligible:
        name += f" (not eligible: {_escape(proof.why_not)})"
    between = ratio_interval(proof)
    compared = f"{fmt.ratio(proof.ratio)}{f' ({between})' if between else ''}"
    said = "**the plan**" if proof.role == "plan" else proof.verdict or "–"
    return f"| {name} | {runner.value} | {runner.interval or '–'} | {compared} | {said} |"


def _escape(text: str, limit: int = 120) -> str:
    """Return `text` on one line with everything escaped that Markdown or GitHub would act on."""
    return _SPECIAL.sub(r"\\\1", fmt.shorten(text, limit)).replace("\\@", "@\u200b").replace("\\:", ":").replace("\\-", "-")

"""The top of the report: the verdict, three short answers, and the key figures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from aivmm.planner.evidence import SOURCES
from aivmm.planner.records import ProofRecord
from aivmm.reports import format as fmt
from aivmm.reports.anatomy import Stage
from aivmm.reports.belief import promise_of
from aivmm.reports.data import ReportData, call_s, dig, number, rate_of, throughput_wanted
from aivmm.reports.intervals import P99_NEEDS
from aivmm.reports.race import best_baseline, figure_of, ratio_interval

# Not missed where there is nothing to tell.
_ON_DEVICES_ONLY = ("device_memory_bytes", "stray_nodes", "stray_s", "energy_j", "card_energy_j")
_FEW = 6  # of fewer samples none lie outside a median's 95 %: 1 - 2 * 0.5 ** 5 is less
_VAGUE = 4.0  # a ratio whose interval is wider than this factor is no figure for the top of a page
_WITHOUT_VERDICT = {
    "running": "This run is still going on: nothing is proven yet.",
    "searched": "The search is done, but no plan has been proven yet.",
    "complete": "The run is complete, but no verdict was stored.",
    "infeasible": "No plan meets the constraints.",
    "interrupted": "The run was interrupted before a plan was proven.",
    "failed": "The run failed before a plan was proven.",
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A short answer: what it is about, the answer, and a line of support."""

    label: str
    value: str
    support: tuple[str, ...] = ()
    tone: str = ""  # "good", "bad" or neutral


def verdict(data: ReportData) -> str:
    """Return the run's own sentence; what can be said from its status where there is none."""
    if data.run.status == "failed" and data.planned is not None:
        return "The run failed after a plan was proven: what was measured is below."
    return str(data.run.summary.get("verdict") or _WITHOUT_VERDICT[data.run.status])


def split_verdict(sentence: str) -> tuple[str, str]:
    """Return the first sentence, which is the news, and the rest. A full stop within a number or a name ends nothing."""
    first, *rest = re.split(r"(?<=\.)\s+(?=[A-Z])", sentence, maxsplit=1)
    return first, " ".join(rest)


def answers(data: ReportData, stages: Sequence[Stage], cautions: Sequence[str]) -> tuple[Answer, ...]:
    """Answer the three questions that a reader comes with. `cautions` are codes of those on the plan. Empty without a proven plan."""
    plan = data.planned
    if plan is None or plan.samples is None:
        return ()
    return _what(plan, stages), _how_much(data), _believe(data, plan, cautions)


def key_figures(data: ReportData) -> tuple[Answer, ...]:
    """Return the figures of the plan's proof; each that is missing says why."""
    plan = data.planned
    if plan is None or plan.samples is None:
        return ()
    samples, metrics = plan.samples, plan.metrics
    n = len(samples.timed_s)
    call = "one call" if plan.batch == 1 else f"one call of {plan.batch} samples"
    figures = [
        Answer(label="Median latency", value=fmt.seconds(call_s(plan)), support=(call, *_interval(data, plan))),
        *([Answer(label="p90 latency", value=fmt.seconds(samples.quantile_s(0.9)))] if plan.callers == 1 else []),
        # Of single calls, where those of the race are means of several.
        Answer(label="p99 latency", value=fmt.seconds(metrics["p99_s"]), support=("of single calls, timed after the race",))
        if "p99_s" in metrics
        else Answer(label="p99 latency", value=fmt.seconds(samples.quantile_s(0.99)))
        if n >= P99_NEEDS and plan.callers == 1
        else Answer(label="p99 latency", value="–", support=(_no_p99(plan),)),
        Answer(label="Throughput", value=fmt.per_second(_throughput(data, plan)), support=(_load(plan),)),
    ]
    for label, metric, show in (
        ("Energy of a sample", "energy_j", fmt.joules),
        ("Energy of a sample, of the card alone", "card_energy_j", fmt.joules),
        ("Peak memory", "peak_memory_bytes", fmt.size),
        ("Device memory", "device_memory_bytes", fmt.size),
        ("Compile time", "compile_s", fmt.seconds),
        ("Load from cache", "load_cached_s", fmt.seconds),
        ("First inference", "first_inference_s", fmt.seconds),
        ("Nodes left on the CPU", "stray_nodes", lambda count: f"{count:.0f}"),
        ("Time on those and their copies", "stray_s", fmt.seconds),
    ):
        value = metrics.get(metric)
        if (value if metric == "device_memory_bytes" else value is not None) or metric not in _ON_DEVICES_ONLY:  # a CPU has none
            figures.append(Answer(label=label, value=show(value), support=() if value is not None else ("not measured",)))
    return (*figures, *_cards(metrics), _accuracy(data, plan), *_predicted(data), *_left(data))


def _cards(metrics: Mapping[str, float]) -> Iterator[Answer]:
    """Say how each NVIDIA card was while the plan was raced."""
    uids = [name[len("sm_mhz[") : -len("]_during")] for name in metrics if name.startswith("sm_mhz[") and name.endswith("]_during")]
    for uid in uids:
        temperature, power = (metrics.get(f"{name}[{uid}]_during") for name in ("temperature_c", "power_w"))
        told = [f"{temperature:.0f} °C" if temperature is not None else "", f"{power:.0f} W" if power is not None else ""]
        which = f" {uid[:12]}" if len(uids) > 1 else ""
        clock = f"{metrics[f'sm_mhz[{uid}]_during']:.0f} MHz"
        yield Answer(label=f"Card{which} while proven", value=clock, support=tuple(filter(None, (", ".join(filter(None, told)),))))


def _no_p99(plan: ProofRecord) -> str:
    if plan.callers > 1:
        return "with several callers, answers are timed, not calls"
    return f"needs {P99_NEEDS} samples, this proof has {len(plan.samples.timed_s) if plan.samples else 0}"


def _what(plan: ProofRecord, stages: Sequence[Stage]) -> Answer:
    places = [place for stage in stages for place in stage.places]
    precision = ", ".join(dict.fromkeys(each.precision or "default precision" for each in places))
    settings = [f"{name}={value}" for name, value in places[0].settings] if len(places) == 1 else []
    if len(stages) > 1:
        settings = [f"{len(stages)} stages"]
    if (executables := sum(stage.executables for stage in stages)) > len(stages):
        settings.append(f"{executables} executables side by side" if len(stages) == 1 else f"{executables} executables")
    load = [f"batch {plan.batch}", fmt.count(plan.callers, "caller")]
    return Answer(
        label="What to run",
        value=plan.target,
        support=(" · ".join(part for part in (precision, *load) if part), *([", ".join(settings)] if settings else [])),
    )


def _how_much(data: ReportData) -> Answer:
    label = "How much better"
    rival = best_baseline(data)
    own = data.planned
    if own is not None and any(dig(each, "name") == own.name for each in data.run.summary.get("baselines") or ()):
        others = (f"{fmt.ratio(rival.ratio)} the speed of {rival.name}, the next best",) if rival is not None and rival.ratio else ()
        return Answer(label=label, value="a baseline won", support=("this is what you would have run anyway", *others))
    if rival is None or rival.ratio is None:
        return Answer(label=label, value="–", support=("no eligible baseline ran, so there is nothing to compare with",))
    sure = [p for p in data.proofs if p.role == "baseline" and p.eligible and p.ratio is not None and not _vague(p)]
    worst = max(sure, key=lambda p: p.ratio or 0, default=rival)
    lines = [f"than {rival.name}, the best you would have run otherwise"]
    if ratio_interval(rival):
        lines.append(f"95 % interval {ratio_interval(rival, turned=rival.verdict == 'slower')}")
    if worst is not rival and worst.verdict == "faster":
        lines.append(f"{fmt.ratio(worst.ratio)} faster than {worst.name}")
    if rival.verdict == "faster":
        return Answer(label=label, value=f"{fmt.ratio(rival.ratio)} faster", support=tuple(lines), tone="good")
    if rival.verdict == "slower":
        return Answer(label=label, value=f"{fmt.ratio(1 / rival.ratio)} slower", support=tuple(lines), tone="bad")
    word = "the same" if rival.verdict == "same" else "undecided"
    lines[0] = lines[0].replace("than", "as" if rival.verdict == "same" else "against", 1)
    return Answer(label=label, value=f"{word}, within noise" if rival.verdict == "same" else word, support=tuple(lines))


def _vague(proof: ProofRecord) -> bool:
    """True when the interval of a ratio spans so much that the ratio would mislead alone."""
    return proof.ratio_low is not None and proof.ratio_high is not None and proof.ratio_high > _VAGUE * proof.ratio_low


def _believe(data: ReportData, plan: ProofRecord, cautions: Sequence[str]) -> Answer:
    assert plan.samples is not None
    rounds = len(set(plan.samples.rounds))
    timed = fmt.count(len(plan.samples.timed_s), "sample")
    lines = [f"{timed} in {fmt.count(rounds, 'round')}, interleaved with the baselines" if rounds > 1 else f"{timed}, not interleaved"]
    accuracy = _accuracy(data, plan)
    if accuracy.value != "–":
        lines.append(
            f"{accuracy.label} {accuracy.value}, {accuracy.support[0]}" if accuracy.support else f"{accuracy.label} {accuracy.value}"
        )
    lines.append(f"{fmt.count(len(cautions), 'caution')} on the plan: {fmt.listing(cautions)}" if cautions else "no cautions on the plan")
    figure = figure_of(data, plan)
    value = f"{fmt.plus_minus((figure.high - figure.low) / 2 / figure.median)} on the median" if figure else "–"
    if len(plan.samples.timed_s) < _FEW:
        value = "too few samples for an interval"
    return Answer(label="Can I believe it", value=value, support=tuple(lines))


def _interval(data: ReportData, plan: ProofRecord) -> tuple[str, ...]:
    figure = figure_of(data, plan)
    if figure is None or throughput_wanted(data):
        return ()
    return (f"95 % interval {fmt.seconds(figure.low)} to {fmt.seconds(figure.high)}",)


def _throughput(data: ReportData, plan: ProofRecord) -> float | None:
    stated = number(dig(data.run.summary, "measured", "throughput_per_s"))
    return stated or rate_of(plan)


def _load(plan: ProofRecord) -> str:
    return f"samples, batch {plan.batch}, {fmt.count(plan.callers, 'caller')}"


def _accuracy(data: ReportData, plan: ProofRecord) -> Answer:
    stated = dig(data.run.summary, "accuracy")
    metric = str(dig(stated, "metric") or "cosine")
    value = number(dig(stated, "value"))
    value = value if value is not None else plan.metrics.get(metric)
    if value is None:
        return Answer(label="Accuracy", value="–", support=("not measured",))
    limit = number(dig(stated, "limit"))
    lines = [f"limit {fmt.similarity(limit)}"] if limit is not None else []
    data_kind = dig(stated, "data")
    if data_kind:
        lines = [", ".join([*lines, f"{data_kind} data"])]
    return Answer(label=f"Accuracy ({metric})", value=fmt.similarity(value), support=tuple(lines))


def _left(data: ReportData) -> tuple[Answer, ...]:
    gap, bound = number(dig(data.run.summary, "certificate", "gap")), number(dig(data.run.summary, "certificate", "bound_s"))
    if gap is None or bound is None:
        return ()
    shares = [(source, number(dig(data.run.summary, "certificate", "rests_on", source))) for source in SOURCES]
    rests = ", ".join(f"{share:.0%} {source}" for source, share in shares if share)
    return (Answer(label="Left to gain", value=f"at most {gap:.1%}", support=(f"bound {fmt.seconds(bound)}", rests)),)


def _predicted(data: ReportData) -> tuple[Answer, ...]:
    promise = promise_of(data)
    if promise is None:
        return ()
    several = (number(dig(data.run.summary, "plan", "callers")) or 1) > 1
    label = "Predicted, callers busy" if several else "Predicted median"  # with several it is what a rate makes of a call, no latency
    return (Answer(label=label, value=fmt.seconds(promise.expected_s), support=promise.short),)

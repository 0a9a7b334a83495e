"""`aivmm bench PLAN`: a plan under load, in MLPerf's scenarios, and a gate for pipelines."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from aivmm.errors import UsageError
from aivmm.planner.constraints import Constraint, check, human, parse
from aivmm.tuner.command import Bucket, Inputs, Json, Plan, Quiet, Trace, print_json
from aivmm.tuner.options import parse_budget
from aivmm.tuner.scenarios import LEAST_QUERIES, MOST_QUERIES, SCENARIOS, Result
from aivmm.tuner.text import printable

FAILED = 4  # exit status: a condition of --fail-if is met
_METRICS = {"latency": "p50_s", "p99": "p99_s", "throughput": "throughput_per_s"}  # of a constraint -> of a result
_OPPOSITE = {">=": "<", ">": "<=", "<=": ">", "<": ">="}


def bench(
    plan: Plan,
    scenario: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="`single` (the default), `offline`, `server`, or `all`. Repeatable.")
    ] = None,
    duration: Annotated[str, typer.Option(metavar="TIME", help="How long each scenario takes.")] = "10s",
    rate: Annotated[
        str | None, typer.Option(metavar="N/s", help="`server`: queries a second; default: the highest that keeps the bound is searched.")
    ] = None,
    latency_bound: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="`server`: what the 99th percentile may take, such as `20ms`; default: the plan's own limit on p99."
        ),
    ] = None,
    inputs: Inputs = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="The model, where the bundle holds several.")] = None,
    bucket: Bucket = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(metavar="EXPR", help=f"Exit with {FAILED} if this holds: `p99>20ms`, `latency>5ms`, `throughput<100/s`. Repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the arrivals.")] = 0,
    trace: Trace = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Load a plan as production does and measure it under load.

    `single` sends a query when the last one is answered (MLPerf's SingleStream; its figure is p90), `offline` all at once (its figure is
    samples a second), `server` lets them arrive at random (Poisson) and finds the rate at which p99 keeps the bound, or with `--rate` says
    whether it does at that one: VALID or INVALID, from 1,000 queries on. That is no failure of the command; `--fail-if "p99>20ms"` makes a
    gate of it.

    Examples:

    `aivmm bench squeezenet.aivmm --fail-if "p99>20ms"`

    `aivmm bench squeezenet.aivmm --scenario server --latency-bound 20ms --duration 60s`

    `aivmm bench squeezenet.aivmm --scenario offline --duration 1s --trace stages.json`
    """
    from aivmm.tuner.benching import Request, run_scenarios

    names = _scenarios(scenario or ["single"])
    gates = [each for text in fail_if or () for each in failing(text, names)]
    request = Request(
        scenarios=names,
        duration_s=_seconds("--duration", duration),
        rate_per_s=None if rate is None else _rate(rate),
        bound_s=None if latency_bound is None else _seconds("--latency-bound", latency_bound),
        inputs=inputs,
        model=model,
        bucket=bucket,
        seed=seed,
        trace=trace,
    )
    if request.rate_per_s is not None and request.rate_per_s * request.duration_s > MOST_QUERIES:
        problem = f"--rate {rate}: {request.rate_per_s * request.duration_s:.3g} queries are more than the {MOST_QUERIES:,} that are kept"
        raise UsageError(problem, advice="give a lower rate, or a shorter --duration")
    found = run_scenarios(plan, request, tell=_silent if quiet else _tell)
    met = [each for result in found.results for each in _met(gates, result)]
    if as_json:
        print_json(found.as_json() | {"failed": met})
    else:
        _print(found.engine, found.results, found.events)
    for sentence in met:
        print(printable(f"aivmm: failed: {sentence}"), file=sys.stderr)
    if met:
        raise typer.Exit(FAILED)


def failing(expression: str, scenarios: Sequence[str]) -> list[tuple[str, Constraint]]:
    """Return what `expression` forbids, each condition with the constraint that is its opposite.

    Raises:
        UsageError: it does not parse, or no scenario measures what it names.
    """
    found = []
    for text in expression.split(","):
        parts = re.fullmatch(r"\s*([A-Za-z_0-9]+)\s*(>=|<=|>|<)\s*(\S.*?)\s*", text)
        if not parts:
            raise UsageError(f"--fail-if {expression!r} does not read as METRIC>LIMIT", advice='write it like --fail-if "p99>20ms"')
        name, operator, limit = parts.groups()
        if name not in _METRICS:
            raise UsageError(f"--fail-if {text.strip()!r}: {name} is not measured here", advice=f"choose from {', '.join(_METRICS)}")
        if name != "throughput" and not set(scenarios) - {"offline"}:
            raise UsageError(f"--fail-if {text.strip()!r}: offline measures no latency", advice="add --scenario single")
        sense, example = ("<", "throughput<100/s") if name == "throughput" else (">", f"{name}>20ms")
        if not operator.startswith(sense):
            advice = f"{name} fails with {sense}: {name}{sense}{limit}"
            raise UsageError(f"--fail-if {text.strip()!r} would fail where {name} is good", advice=advice)
        try:
            (opposite,) = parse(f"{name}{_OPPOSITE[operator]}{limit}")
        except UsageError as error:  # which names the opposite, that nobody wrote
            why = error.message.partition(": ")[2] or error.message
            raise UsageError(f"--fail-if {text.strip()!r} makes no sense: {why}", advice=f'write it like --fail-if "{example}"') from error
        found.append((text.strip(), opposite))
    return found


def _met(gates: Sequence[tuple[str, Constraint]], result: Result) -> list[str]:
    metrics = result.metrics()
    known = {name: metrics[key] for name, key in _METRICS.items() if key in metrics}
    found = []
    for text, constraint in gates:
        if check([constraint], known):
            found.append(f"{text} ({result.scenario}: {constraint.metric} is {human(known[constraint.metric], constraint.metric)})")
    return found


def _scenarios(names: Sequence[str]) -> tuple[str, ...]:
    asked = [each for name in names for each in (SCENARIOS if name == "all" else name.split(","))]
    odd = next((each for each in asked if each not in SCENARIOS), None)
    if odd is not None:
        raise UsageError(f"unknown scenario {odd!r}", advice=f"choose from {', '.join(SCENARIOS)}, all")
    return tuple(dict.fromkeys(asked))


def _seconds(option: str, text: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(us|µs|ms)\s*", text)
    try:
        value = float(found[1]) * {"ms": 1e-3}.get(found[2], 1e-6) if found else parse_budget(text)
    except UsageError as error:
        raise UsageError(f"{option} {text!r} is not a time", advice=f"give one such as {option} 20ms") from error
    if not 0 < value < 1e6:
        raise UsageError(f"{option} {text!r} is not a time that can be kept", advice=f"give one such as {option} 20ms")
    return value


def _rate(text: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(/s)?\s*", text)
    value = float(found[1]) if found else 0.0
    if not 0 < value < math.inf:
        raise UsageError(f"--rate {text!r} is not a rate", advice="give one such as --rate 200/s")
    return value


def _print(engine: Mapping[str, Any], results: Sequence[Result], events: Sequence[str]) -> None:
    out = Console(highlight=False, soft_wrap=True)
    what = engine["model"] if engine["bucket"] is None else f"{engine['model']} at {engine['bucket']}"
    out.print(Text(printable(f"{what} on {' + '.join(engine['targets'])} ({engine['validity']}), batch {engine['batch']}")))
    for result in results:
        out.print(Text(f"{result.scenario:<9}{_sentence(result)}"))
    for each in events:
        print(printable(f"note: {each}"), file=sys.stderr)


def _sentence(result: Result) -> str:
    metrics = result.metrics()
    throughput = f"{metrics['throughput_per_s']:.4g} samples/s"
    if result.scenario == "offline":
        return f"{throughput}; {result.queries} queries in {result.wall_s:.3g} s"
    quantiles = ", ".join(f"p{q} {human(metrics[f'p{q}_s'], 'latency')}" for q in (50, 90, 99))
    if result.scenario == "single":
        return f"{quantiles}; {throughput}; {result.queries} queries"
    assert result.rate_per_s is not None
    verdict = _verdict(result)
    early = ""
    if result.ended_early:
        early = "; ended early" + (
            f": {result.queries / result.wall_s:.4g} queries/s were answered, and the line only grew" if result.bound_s is None else ""
        )
    few = "; fewer than 1,000 queries say little of p99" if result.queries < LEAST_QUERIES and result.bound_s is None else ""
    return f"{verdict}{result.rate_per_s:.4g} queries/s arriving: {quantiles}; {result.queries} queries{early}{few}"


def _verdict(result: Result) -> str:
    """Return how a run is called by its bound, as the head of its sentence; "" where it has none."""
    if result.bound_s is None:
        return ""
    found = result.not_kept_because or f"p99 keeps the bound of {human(result.bound_s, 'latency')}"
    if result.verdict is not None:
        return f"{result.verdict}, {found}: "
    longer = math.ceil(1.1 * LEAST_QUERIES / result.queries)
    return f"no verdict, {result.undecided_because} ({longer} times the --duration has enough); {found}: "


def _tell(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def _silent(_: str) -> None:
    pass

"""`aivmm profile MODEL`: parses, calls, prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aivmm.planner.constraints import human
from aivmm.probes.records import Measured
from aivmm.reports.format import binary
from aivmm.tuner.command import Backends, Db, Json, Quiet, print_json
from aivmm.tuner.options import TuneOptions, parse_batches, parse_budget, parse_dims, parse_list, parse_shapes
from aivmm.tuner.text import printable

if TYPE_CHECKING:
    from aivmm.models.records import Operator
    from aivmm.probes.records import Transfer
    from aivmm.tuner.profile import Profile


def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An ONNX file, or `demo:NAME`.")],
    db: Db = None,
    targets: Annotated[list[str] | None, typer.Option(metavar="PATTERNS", help="Targets to measure on: `openvino`, `*:CPU`, ...")] = None,
    shape: Annotated[list[str] | None, typer.Option(metavar="NAME=1x3x224x224", help="The shape of an input. Repeatable.")] = None,
    dim: Annotated[list[str] | None, typer.Option(metavar="NAME=N", help="The extent of a named dimension. Repeatable.")] = None,
    batch: Annotated[list[str] | None, typer.Option(metavar="N", help="The batch to measure at.")] = None,
    inputs: Annotated[Path | None, typer.Option(metavar="FILE.npz", help="Real samples to run with.")] = None,
    budget: Annotated[str, typer.Option(metavar="TIME", help="Time for measuring.")] = "600s",
    blocks: Annotated[bool, typer.Option("--blocks/--no-blocks", help="Measure blocks too.")] = True,
    rows: Annotated[int, typer.Option(metavar="N", min=0, help="How many operators the table shows; 0 shows all.")] = 25,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure all again; the database keeps what it has.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what crashed or hung here before.")] = False,
    backend: Backends = None,
    in_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the operators and blocks of a model alone, and say what limits each: compute, memory, or overhead.

    Examples:

    `aivmm profile demo:squeezenet`

    `aivmm profile model.onnx --targets "*:CPU" --dim seq=128 --json`
    """
    options = TuneOptions(
        model=model,
        db=db,
        targets=parse_list(targets or ()),
        batches=parse_batches(batch or ()),
        shapes=parse_shapes(shape or ()),
        dims=parse_dims(dim or ()),
        inputs=inputs,
        budget_s=parse_budget(budget),
        fresh=fresh,
        retry_failed=retry_failed,
        backends=tuple(backend or ()),
    )
    from aivmm.tuner.profile import as_json, profile_model
    from aivmm.tuner.progress import make_progress

    progress = make_progress(quiet=quiet)
    try:
        found = profile_model(options, progress, with_blocks=blocks)
    finally:
        progress.close()
    if in_json:
        print_json(as_json(found))
        return
    _print(found, rows)


def _print(profile: Profile, rows: int) -> None:
    out = Console(highlight=False)
    operators = profile.sorted_operators()
    shown = operators[:rows] if rows else operators
    for place in profile.places:
        out.print(Text(_heading(profile, place), style="bold"))
        out.print(_table(profile, place, shown))
    if len(shown) < len(operators):
        out.print(f"... and {len(operators) - len(shown)} more; --rows 0 shows all")
    measured, nodes = profile.coverage()
    counts = profile.counts
    out.print(
        f"{measured} of {nodes} nodes measured ({len(operators)} unique operators); probes: {counts.measured} measured, "
        f"{counts.reused} reused, {counts.refused} refused, {counts.failed} failed; {profile.wall_s:.1f} s"
    )
    for target, fusion in profile.fusions.items():
        done = len(fusion.own)
        out.print(
            Text(f"{target} runs the whole model in {done} kernels: {len(fusion.fused_into)} nodes are fused, {len(fusion.vanished)} gone")
        )
    for transfer in profile.transfers.values():
        out.print(Text(_transfer_line(transfer)))
    for copy in profile.copies.values():
        out.print(Text(_copy_line(copy)))
    for note in profile.notes:
        print(f"note: {printable(note)}", file=sys.stderr)


def _transfer_line(transfer: Transfer) -> str:
    """Say what handing a tensor over costs, and how far the sizes are off that line."""
    from aivmm.probes.transfers import fit_of

    fit, pair = fit_of(transfer), f"{transfer.source} to {transfer.destination}"
    if fit is None:
        return f"{pair}: {transfer.state} ({printable(transfer.reason)})"
    rate = f" and {_time(fit.per_byte_s * 1e6)} a megabyte" if fit.per_byte_s else ""
    return f"{pair}: handing a tensor over costs {_time(fit.fixed_s)}{rate} (half of the sizes are within {fit.error:.0%} of that)"


def _copy_line(copy: Transfer) -> str:
    """Say what a copy takes at each size, and how fast that is."""
    ends = f"{copy.source} to {copy.destination}"
    if copy.state != "measured":
        return f"{ends}: {copy.state} ({printable(copy.reason)})"
    sizes = ", ".join(f"{binary(each.size_bytes)} {_time(each.cost_s)} ({_si(each.size_bytes / each.cost_s)}B/s)" for each in copy.points)
    return f"{ends}: {sizes}"


def _time(seconds: float) -> str:
    return human(seconds, "latency")


def _heading(profile: Profile, place: tuple[str, str]) -> str:
    """Return one line on a target: the sum of its operators, and its ceilings."""
    text = f"{place[0]} {place[1]}: {_time(profile.total_s(place))} operator by operator"
    ceilings = profile.ceilings.get(place)
    if ceilings is None:
        return text
    peak = f"{_si(ceilings.flops_per_s)}FLOP/s, " if ceilings.flops_per_s else ""
    return f"{text}; ceilings {peak}{_si(ceilings.bytes_per_s)}B/s, {_time(ceilings.call_s)} a call"


def _table(profile: Profile, place: tuple[str, str], operators: list[Operator]) -> Table:
    """One table for each target, since several side by side do not fit a terminal of 80 columns."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("operator", overflow="fold", ratio=1)
    for heading in ("nodes", "time", "share", "FLOP/s", "bound"):
        table.add_column(heading, justify="left" if heading == "bound" else "right", no_wrap=True)
    for operator in operators:
        table.add_row(Text(printable(operator.description)), str(operator.count), *map(Text, _cells(profile, operator, place)))
    return table


def _cells(profile: Profile, operator: Operator, place: tuple[str, str]) -> list[str]:
    from aivmm.probes.ceilings import bound_of

    outcome = profile.operators.get((operator.signature, *place))
    seconds = profile.seconds(operator, place)
    if not isinstance(outcome, Measured) or seconds is None:
        return ["not measured" if outcome is None else "refused" if type(outcome).__name__ == "Refused" else "failed", "", "", ""]
    metrics = profile.metrics(operator, outcome)
    rate = f"{_si(metrics['flops_per_s'])}" if "flops_per_s" in metrics else ""
    fused = profile.fused(operator, place[0])
    words: list[str] = [bound_of(metrics) or ""]
    if fused:
        words.append("fused" if fused == operator.count else f"{fused} fused")
    return [_time(seconds), f"{seconds / profile.total_s(place):.1%}", rate, ", ".join(filter(None, words))]


def _si(value: float) -> str:
    """Return three digits and a prefix: `12.3 G`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "

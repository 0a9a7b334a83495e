"""The command line. Commands parse, call and print; standard output is the result, standard error is everything else."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aivmm.errors import AivmmError, Infeasible
from aivmm.planner.levels import SERVICE_LEVELS, goal
from aivmm.probes.client import WorkerDied
from aivmm.runtime.target import Target
from aivmm.tuner import config_file
from aivmm.tuner.cli_bench import bench
from aivmm.tuner.cli_db import app as db_app
from aivmm.tuner.cli_doctor import doctor
from aivmm.tuner.cli_plan import app as plan_app
from aivmm.tuner.cli_profile import profile
from aivmm.tuner.cli_report import report
from aivmm.tuner.config_file import Defaults
from aivmm.tuner.options import DEFAULT_BUDGET_S, TuneOptions, parse_batches, parse_budget, parse_list
from aivmm.tuner.shapes import parse_dim_lists, parse_shape_lists, wanted
from aivmm.tuner.text import printable

if TYPE_CHECKING:
    from aivmm.tuner.many import ManyOutcome

app = typer.Typer(
    name="aivmm",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Measure an ONNX model on every device of this machine, plan, prove the plan, and run it.

The way from a model to production:

`aivmm doctor` - what works on this machine, and what is missing

`aivmm tune model.onnx` - find, prove and save a plan (or a demo: `aivmm tune demo:squeezenet`)

`aivmm run model.aivmm` - run it; in Python: `aivmm.load_plan("model.aivmm").run(inputs)`

`aivmm report` - look again at what was found

Each command has examples: `aivmm tune --help`. `aivmm --install-completion` teaches your shell to complete them.

Options may stand in `aivmm.toml` or in `[tool.aivmm]` of `pyproject.toml`, under the same names.""",
)

Json = Annotated[bool, typer.Option("--json", help="Make standard output exactly one JSON object.")]
Db = Annotated[
    str | None, typer.Option("--db", metavar="PATH|URL", help="Performance database; default: the user's data folder.", envvar="AIVMM_DB")
]


# What `tune --help` groups its options by.
_GOAL, _ALLOWED, _MODEL, _EFFORT = "What is wanted", "What may be used", "The model and its inputs", "How long and how carefully"


def tune(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="An ONNX file, or `demo:NAME` (`demo:` lists them); several with --workload."),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Where the plan goes; default `<name>.aivmm`.")
    ] = None,
    db: Db = None,
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="`latency` (the default), `throughput`, `p99`, `memory`, `energy`, `accuracy`, `compile` or `size`. Several are joined by "
            "commas: the first decides what the plan is, and what it can be traded for goes into the plan as alternatives.",
            rich_help_panel=_GOAL,
        ),
    ] = None,
    service_level: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A named goal: " + "; ".join(f"`{name}` ({level})" for name, level in SERVICE_LEVELS.items()) + ".",
            rich_help_panel=_GOAL,
        ),
    ] = None,
    prefer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERNS",
            help="Hardware in the order in which it is wanted, such as `openvino:NPU,*:CPU`: the plan is the best one on the "
            "first of them that keeps the limits, however fast the others are.",
            rich_help_panel=_GOAL,
        ),
    ] = None,
    constraint: Annotated[
        list[str] | None,
        typer.Option(metavar="EXPR", help="A limit such as `latency<10ms, memory<2GB`. Repeatable.", rich_help_panel=_GOAL),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERNS", help="Targets that may be used: `openvino`, `*:CPU`, ...", rich_help_panel=_ALLOWED),
    ] = None,
    precisions: Annotated[
        list[str] | None, typer.Option(metavar="LIST", help="Precisions that may be used: `fp32,bf16,int8`.", rich_help_panel=_ALLOWED)
    ] = None,
    batch: Annotated[
        list[str] | None, typer.Option(metavar="LIST", help="Batch sizes to choose from: `1,8,32`.", rich_help_panel=_ALLOWED)
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=1x3x224x224", help="The shape of an input, or several with commas. Repeatable.", rich_help_panel=_MODEL),
    ] = None,
    dim: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=N",
            help="The extent of a named dimension; `seq=32,128` or `seq=32..512` for a plan of several. Repeatable.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    workload: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml", help="Serve several models at once: for each its priority, limits and rate.", rich_help_panel=_MODEL
        ),
    ] = None,
    inputs: Annotated[Path | None, typer.Option(metavar="FILE.npz", help="Real samples to run with.", rich_help_panel=_MODEL)] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|MODULE:FUNCTION",
            help="Real samples to calibrate int8 with and to judge accuracy on: an `.npz`, a folder, or a function.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION", help='Your own measure of accuracy, for `--constraint "metric>=0.9"`.', rich_help_panel=_GOAL
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option(metavar="TIME", help="Time for measuring and searching; the proof comes on top.", rich_help_panel=_EFFORT)
    ] = f"{DEFAULT_BUDGET_S:.0f}s",
    trials: Annotated[
        int | None, typer.Option(metavar="N", help="Points to try; default: as the budget allows.", rich_help_panel=_EFFORT)
    ] = None,
    min_segments: Annotated[
        int, typer.Option(metavar="N", help="Force a cut into at least N segments, for study.", rich_help_panel=_EFFORT)
    ] = 1,
    other_shapes: Annotated[
        str,
        typer.Option(
            metavar="refuse|dynamic",
            help="What happens to inputs that fit none of several listed shapes: `dynamic` runs them with open extents, untuned.",
            rich_help_panel=_MODEL,
        ),
    ] = "refuse",
    input_contract: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="`narrow` takes float inputs as float16, for less to copy: who calls the plan converts.",
            rich_help_panel=_MODEL,
        ),
    ] = "model",
    cut_around: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIST",
            help="Keep these operators or nodes in blocks of their own, cutting branches where need be: `Resize`.",
            rich_help_panel=_EFFORT,
        ),
    ] = None,
    top: Annotated[int, typer.Option(metavar="K", help="How many finalists are proven.", rich_help_panel=_EFFORT)] = 3,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of inputs, orders and the search.", rich_help_panel=_EFFORT)] = 0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure all again; the database keeps what it has.", rich_help_panel=_EFFORT)
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what crashed or hung here before.", rich_help_panel=_EFFORT)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be measured, and measure nothing.", rich_help_panel=_EFFORT)
    ] = False,
    backend: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also print every baseline and note.")] = False,
) -> None:
    """Find, prove and save the best plan for a model on this machine.

    Examples:

    `aivmm tune demo:squeezenet`

    `aivmm tune model.onnx --budget 120s --constraint "latency<20ms"`

    `aivmm tune model.onnx --objective throughput --batch 1,8,32 --dim seq=128`

    `aivmm tune model.onnx --dim seq=32..512` (one bundle with a plan for 32, 64, 128, 256 and 512)

    `aivmm tune a.onnx b.onnx --workload w.toml` (both at once, on a part of the machine each)
    """
    if models == ["demo:"]:
        _list_demos(as_json)
        return
    assumed_objective = objective is None and service_level is None
    objective, constraints = goal(service_level, objective, tuple(constraint or ()))
    each_shape = wanted(parse_shape_lists(shape or ()), parse_dim_lists(dim or ()))
    options = TuneOptions(
        model=models[0],
        output=output,
        db=db,
        objective=objective,
        assumed_objective=assumed_objective,
        prefer=parse_list(prefer or ()),
        constraints=constraints,
        targets=parse_list(targets or ()),
        precisions=parse_list(precisions or ()),
        batches=parse_batches(batch or ()),
        shapes=each_shape[0].shapes,
        dims=each_shape[0].dims,
        inputs=inputs,
        dataset=dataset,
        metric=metric,
        service_level=service_level,
        budget_s=parse_budget(budget),
        trials=trials,
        min_segments=min_segments,
        input_contract=input_contract,
        other_shapes=other_shapes,
        cut_around=parse_list(cut_around or ()),
        top=top,
        seed=seed,
        fresh=fresh,
        retry_failed=retry_failed,
        dry_run=dry_run,
        backends=tuple(backend or ()),
    )
    from aivmm.tuner import entry
    from aivmm.tuner.many import ManyOutcome
    from aivmm.tuner.progress import make_progress
    from aivmm.tuner.session import TuneOutcome

    progress = make_progress(quiet=quiet)
    command = _command(context.obj)
    try:
        outcome = entry.run(options, each_shape, models, workload, progress, command=command)
    finally:
        progress.close()
    if isinstance(outcome, ManyOutcome):
        _print_many(outcome, as_json, verbose)
        return
    if not isinstance(outcome, TuneOutcome):
        _print_dry_run(outcome, as_json)
        return
    if as_json:
        _print_json(outcome.summary)
    else:
        _print_outcome(outcome.summary, list(outcome.run.notes), verbose)
    if outcome.plan_path is None:
        raise typer.Exit(3)


def devices(as_json: Json = False, backend: Annotated[list[str] | None, typer.Option(hidden=True)] = None) -> None:
    """List every target that runs here, and everything unavailable with its reason.

    Examples:

    `aivmm devices`

    `aivmm devices --json`
    """
    from aivmm.tuner.inventory import find_devices

    targets, unavailable = find_devices(backend)
    if as_json:
        _print_json(
            {
                "schema": 1,
                "targets": [_target_json(each) for each in targets],
                "unavailable": [{"target": each.target, "reason": each.reason, "advice": each.advice} for each in unavailable],
            }
        )
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("target", "device", "precisions", "runtime"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "target")
    for target in targets:
        cores = f", {target.device.cores} cores" if target.device.cores else ""
        table.add_row(
            Text(str(target)), Text(target.device.model + cores), Text(", ".join(target.precisions)), Text(target.runtime_version)
        )
    out = Console()
    out.print(table)
    if unavailable:
        out.print("\nNot available:")
        for absent in unavailable:
            out.print(Text(f"  {absent.target}: {absent.reason}"), soft_wrap=True)
            if absent.advice:
                out.print(Text(f"    {absent.advice}", style="dim"), soft_wrap=True)


def run_plan(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan bundle.")],
    inputs: Annotated[Path | None, typer.Option(metavar="FILE.npz", help="Inputs by name; default: random ones.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE.npz", help="Where to write the outputs.")] = None,
    repeat: Annotated[int, typer.Option(metavar="N", min=1, help="How many times to run.")] = 1,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="The model, where the bundle holds several.")] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Record which stage ran when, on which thread, for ui.perfetto.dev.")
    ] = None,
    key: Annotated[
        list[Path] | None, typer.Option(metavar="FILE.pem", help="Require a signature by this public key. Repeatable: any of them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a plan once (or N times) and show its outputs.

    Examples:

    `aivmm run squeezenet.aivmm --inputs sample.npz -o result.npz`

    `aivmm run squeezenet.aivmm --repeat 50 --trace stages.json`
    """
    from aivmm.tuner.running import run_bundle

    result = run_bundle(plan, inputs, output, repeat, model=model, keys=key or (), trace=trace)
    if as_json:
        _print_json(result)
        return
    print(
        f"{result['model']} on {' + '.join(result['targets'])} ({result['validity']}): median {result['median_s'] * 1e3:.3f} ms of {repeat}"
    )
    for each in result["outputs"]:
        print(f"  {each['name']}: {each['dtype']}{each['shape']}  {each['preview']}")
    for name in ("written", "trace"):
        if name in result:
            print(f"{name}  {result[name]}", file=sys.stderr)
    for event in result["events"]:
        print(f"note: {event}", file=sys.stderr)


# In the order of the way from a model to production, which is that of the help.
for _name, _command_of in (
    ("doctor", doctor),
    ("devices", devices),
    ("tune", tune),
    ("report", report),
    ("run", run_plan),
    ("bench", bench),
    ("profile", profile),
):
    app.command(_name)(_command_of)
app.add_typer(plan_app, name="plan")
app.add_typer(db_app, name="db")


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit status; a bug keeps its traceback."""
    try:
        return _run(arguments)
    except BrokenPipeError:  # whoever reads has read enough
        return 1


def _run(arguments: Sequence[str]) -> int:
    wants_json = "--json" in arguments
    try:
        found = _options_from_file(arguments)
        status = app(
            args=list(arguments), prog_name="aivmm", standalone_mode=False, default_map=dict(found.map) if found else None, obj=found
        )
    except AivmmError as error:
        _print_error(error.message, error.advice, wants_json)
        return 3 if isinstance(error, Infeasible) else 2
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        message = error.format_message()
        if not arguments:
            print(message)  # no arguments: the help is the answer
            return 2
        _print_error(message.rstrip("."), f"see {context.command_path if context else 'aivmm'} --help", wants_json)
        return 2
    except typer.Abort:
        status = 130
    except WorkerDied as died:
        # Those that cost one probe never get here; this one held what everything else needs.
        _print_error(f"a worker process {died.reason}", "run the same command again; what was measured is kept", wants_json)
        return 2
    if status == 130:
        _print_error("interrupted; what was measured is kept", "run the same command again to continue", wants_json)
    return status if isinstance(status, int) else 0


def _options_from_file(arguments: Sequence[str]) -> Defaults | None:
    """Return what a configuration file says for this command line, and say it: nothing is set in silence."""
    file = config_file.find(Path.cwd(), os.environ)
    found = file and config_file.defaults(file, typer.main.get_command(app), arguments)
    if found and not {"-q", "--quiet", "-h", "--help"} & set(arguments):
        print(f"options {printable(found.said())}", file=sys.stderr)
    return found or None


def _command(from_file: Defaults | None) -> str:
    """Return a command line that asks for the same again, also where the configuration file is another one."""
    name = "aivmm-tune" if Path(sys.argv[0]).name.startswith("aivmm-tune") else "aivmm"
    return shlex.join([name, *sys.argv[1:], *(from_file.words if from_file else ())])


def _print_json(value: Any) -> None:
    print(json.dumps(value, allow_nan=False))


def _print_error(message: str, advice: str, as_json: bool) -> None:
    line = printable(f"aivmm: {message}{f'; {advice}' if advice else ''}")
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(line, style="red"))
    if as_json:
        _print_json({"schema": 1, "error": {"message": " ".join(message.split()), "advice": " ".join(advice.split())}})


def _target_json(target: Target) -> dict[str, Any]:
    device = target.device
    return {
        "target": str(target),
        "device": device.model,
        "kind": device.kind,
        "runtime_version": target.runtime_version,
        "driver": device.driver,
        "precisions": list(target.precisions),
        "cores": device.cores,
        "memory_bytes": device.memory_bytes,
        "uid": device.uid,
        "power_limit_w": device.power_limit_w,
        "properties": dict(device.properties),
    }


def _list_demos(as_json: bool) -> None:
    from aivmm.models.demo import demo_names

    names = demo_names()
    if as_json:
        _print_json({"schema": 1, "demos": {f"demo:{name}": text for name, text in names.items()}})
        return
    width = max(map(len, names)) + 5
    for name, text in names.items():
        print(f"{f'demo:{name}':<{width}}  {text}")


def _print_many(outcome: ManyOutcome, as_json: bool, verbose: bool) -> None:
    """Print what a tuning for several plans gave, and exit with 3 when there is no bundle."""
    if as_json:
        _print_json(outcome.summary)
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


def _print_dry_run(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(found)
        return
    print(f"model      {found['model']['path']} ({found['model']['category']['name']}: {found['model']['category']['reason']})")
    print(f"inputs     {', '.join(found['inputs'])}")
    print(f"targets    {', '.join(found['targets'])}")
    for each in found["unavailable"]:
        print(f"           not available: {each}")
    print(f"baselines  {', '.join(found['baselines'])}")
    for target, knobs in found["knobs"].items():
        print(f"search     {target}: {', '.join(knobs) or 'nothing to tune'}")
    print(f"batches    {', '.join(map(str, found['batches']))}")
    print(f"parts      {found['blocks']} blocks and {found['operators']} unique operators on each target")
    print(f"budget     {found['budget_s']:.0f} s, and at most 30 s for the proof and the report")
    for each in found["notes"]:
        print(f"note: {each}", file=sys.stderr)


def _print_outcome(summary: Any, notes: list[str], verbose: bool) -> None:
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
    console.print(Text(f"report  {summary['report']}"))
    if summary["certificate"]:
        console.print(Text(f"sure    {summary['certificate']['sentence']}"))
    console.print(Text(f"probes  {_counted(summary['probes'])}"))
    if summary["plan"]:
        console.print(Text(f"use it  import aivmm; engine = aivmm.load_plan({summary['plan']['path']!r})"))


def _counted(probes: Mapping[str, int]) -> str:
    """Say how many probes were measured now, and how many the database knew already."""
    known = f"{probes['measured']} measured, {probes['reused']} reused from the database"
    return ", ".join([known, *(f"{probes[state]} {state}" for state in ("refused", "failed") if probes[state])])

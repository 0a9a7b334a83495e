"""`aivmm tune`: the main job. Parses, calls and prints."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from aivmm.planner.levels import SERVICE_LEVELS, goal
from aivmm.tuner.command import Backends, Db, Json, Quiet, print_json
from aivmm.tuner.config_file import Defaults
from aivmm.tuner.options import BUDGET_HELP, DEFAULT_BUDGET_S, TuneOptions, parse_batches, parse_budget, parse_list
from aivmm.tuner.printing import print_dry_run, print_many, print_outcome
from aivmm.tuner.shapes import parse_dim_lists, parse_shape_lists, wanted

# What `tune --help` groups its options by.
_GOAL, _ALLOWED, _MODEL, _EFFORT = "What is wanted", "What may be used", "The model and its inputs", "How long and how carefully"


def tune(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="An ONNX file, or `demo:NAME` (`demo:` lists them); several with --workload."),
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
    budget: Annotated[str, typer.Option(metavar="TIME", help=BUDGET_HELP, rich_help_panel=_EFFORT)] = f"{DEFAULT_BUDGET_S:.0f}s",
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
            help="Inputs in fewer bits, cast where the model runs: `narrow` takes floats as float16, `narrow:uint8` images as 0 to 255.",
            rich_help_panel=_MODEL,
        ),
    ] = "model",
    normalise: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=MEAN/SCALE",
            help="With `narrow:uint8`: the model gets (pixel - MEAN) / SCALE, of each one number or one a channel: `x=127.5/127.5`.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
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
    backend: Backends = None,
    as_json: Json = False,
    quiet: Quiet = False,
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
        normalise=tuple(normalise or ()),
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
        print_many(outcome, as_json, verbose)
        return
    if not isinstance(outcome, TuneOutcome):
        print_dry_run(outcome, as_json)
        return
    if as_json:
        print_json(outcome.summary)
    else:
        print_outcome(outcome.summary, list(outcome.run.notes), verbose)
    if outcome.plan_path is None:
        raise typer.Exit(3)


def _command(from_file: Defaults | None) -> str:
    """Return a command line that asks for the same again, also where the configuration file is another one."""
    name = "aivmm-tune" if Path(sys.argv[0]).name.startswith("aivmm-tune") else "aivmm"
    return shlex.join([name, *sys.argv[1:], *(from_file.words if from_file else ())])


def _list_demos(as_json: bool) -> None:
    from aivmm.models.demo import demo_names

    names = demo_names()
    if as_json:
        print_json({"schema": 1, "demos": {f"demo:{name}": text for name, text in names.items()}})
        return
    width = max(map(len, names)) + 5
    for name, text in names.items():
        print(f"{f'demo:{name}':<{width}}  {text}")

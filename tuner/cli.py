"""The command line. Commands parse, call and print; standard output is the result, standard error is everything else."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aivmm.errors import AivmmError, Infeasible
from aivmm.probes.client import WorkerDied
from aivmm.runtime.target import Target
from aivmm.tuner import config_file
from aivmm.tuner.cli_bench import bench
from aivmm.tuner.cli_db import app as db_app
from aivmm.tuner.cli_doctor import doctor
from aivmm.tuner.cli_plan import app as plan_app
from aivmm.tuner.cli_profile import profile
from aivmm.tuner.cli_report import report
from aivmm.tuner.cli_tune import tune
from aivmm.tuner.command import App, Backends, Inputs, Json, Keys, Plan, Trace, print_json
from aivmm.tuner.config_file import Defaults
from aivmm.tuner.main import INTERRUPTED
from aivmm.tuner.text import printable

if TYPE_CHECKING:
    pass

app = App(
    name="aivmm",
    add_completion=True,
    pretty_exceptions_enable=False,
    help="""Measure an ONNX model on every device of this machine, plan, prove the plan, and run it.

The way from a model to production:

`aivmm doctor` - what works on this machine, and what is missing

`aivmm tune model.onnx` - find, prove and save a plan (or a demo: `aivmm tune demo:squeezenet`)

`aivmm run model.aivmm` - run it; in Python: `aivmm.load_plan("model.aivmm").run(inputs)`

`aivmm report` - look again at what was found

Each command has examples: `aivmm tune --help`. `aivmm --install-completion` teaches your shell to complete them.

Options may stand in `aivmm.toml` or in `[tool.aivmm]` of `pyproject.toml`, under the same names.""",
)


def devices(as_json: Json = False, backend: Backends = None) -> None:
    """List every target that runs here, and everything unavailable with its reason.

    Examples:

    `aivmm devices`

    `aivmm devices --json`
    """
    from aivmm.tuner.inventory import find_devices

    targets, unavailable = find_devices(backend)
    if as_json:
        print_json(
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
    plan: Plan,
    inputs: Inputs = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE.npz", help="Where to write the outputs.")] = None,
    repeat: Annotated[int, typer.Option(metavar="N", min=1, help="How many times to run.")] = 1,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="The model, where the bundle holds several.")] = None,
    bucket: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The shape, where the plan has several; default: what takes --inputs, or else the first."),
    ] = None,
    trace: Trace = None,
    key: Keys = None,
    as_json: Json = False,
) -> None:
    """Run a plan once (or N times) and show its outputs.

    Examples:

    `aivmm run squeezenet.aivmm --inputs sample.npz -o result.npz`

    `aivmm run squeezenet.aivmm --repeat 50 --trace stages.json`
    """
    from aivmm.tuner.running import run_bundle

    result = run_bundle(plan, inputs, output, repeat, model=model, bucket=bucket, keys=key or (), trace=trace)
    if as_json:
        print_json(result)
        return
    where = "" if result["bucket"] is None else " at other shapes" if result["bucket"] == "fallback" else f" at {result['bucket']}"
    took = f"{result['median_s'] * 1e3:.3f} ms" if repeat == 1 else f"median {result['median_s'] * 1e3:.3f} ms of {repeat} runs"
    print(f"{result['model']}{where} on {' + '.join(result['targets'])} ({result['validity']}): {took}")
    for each in result["outputs"]:
        print(f"  {each['name']}: {each['dtype']}{each['shape']}  {each['preview']}")
    for name in ("written", "trace"):
        if name in result:
            print(f"{name}  {result[name]}", file=sys.stderr)
    if inputs is None and bucket is None and len(result["buckets"]) > 1:
        shapes = ", ".join(result["buckets"])
        print(printable(f"note: inputs are random, in the first of the shapes {shapes}; --bucket names another"), file=sys.stderr)
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


_KEEPING = ("tune", "profile")  # commands that keep what they measure, and go on with it


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
        status = INTERRUPTED
    except WorkerDied as died:
        # Those that cost one probe never get here; this one held what everything else needs.
        _print_error(f"a worker process {died.reason}", "run the same command again; what was measured is kept", wants_json)
        return 2
    if status == INTERRUPTED:
        if arguments[:1] and arguments[0] in _KEEPING:
            _print_error("interrupted; what was measured is kept", "run the same command again to continue", wants_json)
        else:
            _print_error("interrupted", "", wants_json)
    return status if isinstance(status, int) else 0


def _options_from_file(arguments: Sequence[str]) -> Defaults | None:
    """Return what a configuration file says for this command line, and say it: nothing is set in silence."""
    file = config_file.find(Path.cwd(), os.environ)
    found = file and config_file.defaults(file, typer.main.get_command(app), arguments)
    if found and not {"-q", "--quiet", "-h", "--help"} & set(arguments):
        print(f"options {printable(found.said())}", file=sys.stderr)
    return found or None


def _print_error(message: str, advice: str, as_json: bool) -> None:
    line = printable(f"aivmm: {message}{f'; {advice}' if advice else ''}")
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(line, style="red"))
    if as_json:
        print_json({"schema": 1, "error": {"message": " ".join(message.split()), "advice": " ".join(advice.split())}})


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

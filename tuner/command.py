"""What the commands share: how their help looks, the options that several of them have, and how a result goes out as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

Function = TypeVar("Function", bound=Callable[..., Any])

Json = Annotated[bool, typer.Option("--json", help="Make standard output exactly one JSON object.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")]
Db = Annotated[
    str | None, typer.Option("--db", metavar="PATH|URL", help="Performance database; default: the user's data folder.", envvar="AIVMM_DB")
]
Backends = Annotated[list[str] | None, typer.Option("--backend", hidden=True)]
Plan = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan bundle: a folder or a zip of one.")]
Inputs = Annotated[Path | None, typer.Option(metavar="FILE.npz", help="Inputs by name; default: random ones.")]
Bucket = Annotated[str | None, typer.Option(metavar="NAME", help="The shape, where the plan has several; default: the first.")]
Trace = Annotated[Path | None, typer.Option(metavar="FILE.json", help="Record which stage ran when, on which thread, for ui.perfetto.dev.")]
Keys = Annotated[
    list[Path] | None, typer.Option("--key", metavar="FILE.pem", help="Require a signature by this public key. Repeatable: any of them.")
]


def print_json(value: Any) -> None:
    """Print `value` as one line of JSON."""
    print(json.dumps(value, allow_nan=False))


class App(typer.Typer):
    """A group of commands whose help shows values, not Python's types: a flag takes none, and an argument is named for what it is."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            cls=_Group,
            no_args_is_help=True,
            rich_markup_mode="markdown",
            context_settings={"help_option_names": ["-h", "--help"]},
            **settings,
        )

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Function], Function]:
        """Register a function as a command."""
        return super().command(name, cls=_Command, **settings)


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return [_plain(each) for each in super().get_params(ctx)]


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return [_plain(each) for each in super().get_params(ctx)]


def _plain(parameter: Any) -> Any:
    """Return a parameter that names no type in help: Typer puts `<bool>` beside each flag and `<list[str]>` beside arguments."""
    if isinstance(parameter, TyperOption) and parameter.is_flag:
        parameter.metavar = ""
    elif isinstance(parameter, TyperArgument):
        parameter.display_type_rich = lambda ctx: ""  # type: ignore[method-assign]
    return parameter

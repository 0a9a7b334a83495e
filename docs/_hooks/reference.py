"""Hooks of MkDocs, so that the reference cannot be out of date.

That of the command line is written from the command line itself. For the one from docstrings the sources are laid out as the packages that
they are installed as, since what reads them does not follow `package-dir`.
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from aivmm.tuner.cli import app

_MARK = "<!-- the commands -->"

_ROOT = Path(__file__).parent.parent.parent
_PACKAGES = _ROOT / "build" / "docs-packages"


def on_startup(**_: Any) -> None:
    """Lay out the sources."""
    shutil.rmtree(_PACKAGES, ignore_errors=True)
    folders = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    for package, folder in sorted(folders.items()):
        shutil.copytree(
            _ROOT / folder, _PACKAGES / package.replace(".", "/"), ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
        )


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the commands where a page asks for them."""
    if _MARK not in markdown:
        return markdown
    return markdown.replace(_MARK, "\n".join(_command(typer.main.get_command(app), ("aivmm",))))


def _command(command: Any, names: tuple[str, ...]) -> Iterator[str]:
    """Yield the Markdown of a command and of those below it."""
    if len(names) > 1:
        yield f"## `{' '.join(names)}`\n"
    yield f"{_text(command.help)}\n"
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option" and not each.hidden and each.name != "help"]
    if len(names) > 1 and (arguments or options):
        yield "| | | |\n|---|---|---|"
        for each in arguments:
            several = "..." if each.nargs != 1 else ""
            yield f"| `{each.metavar or each.name.upper()}{several}` | | {_cell(each.help)} |"
        for each in options:
            value = "" if each.is_flag else f"`{each.metavar or 'VALUE'}`"
            default = (
                f" Default: `{each.default}`."
                if isinstance(each.default, (str, int, float)) and not each.is_flag and each.default != ""
                else ""
            )
            variable = f" Environment: `{each.envvar}`." if each.envvar else ""
            yield f"| {', '.join(f'`{flag}`' for flag in each.opts)} | {value} | {_cell(each.help)}{default}{variable} |"
        yield ""
    for name, below in getattr(command, "commands", {}).items():
        yield from _command(below, (*names, name))


def _text(text: str | None) -> str:
    return (text or "").replace("\b", "").strip()


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")

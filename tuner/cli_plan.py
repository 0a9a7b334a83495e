"""`aivmm plan`: look at bundles, check, compare, pack and sign them. Commands parse, call and print."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from aivmm.errors import UsageError
from aivmm.tuner.command import App, Json, Keys, Plan, print_json
from aivmm.tuner.text import printable

app = App(
    name="plan",
    help="Plan bundles: show, verify, compare, export, sign.",
)

Output = Annotated[Path, typer.Option("-o", "--output", metavar="PATH", help="Where to write: a `.zip`, or else a folder.")]


@app.command()
def show(plan: Plan, as_json: Json = False) -> None:
    """Say what a plan runs where, what was measured of it, and where that holds. The bundle is checked first.

    Example: `aivmm plan show squeezenet.aivmm`
    """
    from aivmm.runtime.packing import opened
    from aivmm.tuner.bundles import lines_of, shape_lines, shown, titles

    with opened(plan) as bundle:
        found, plans, named, shapes = shown(bundle), dict(bundle.plans), titles(bundle), list(shape_lines(bundle))
    if as_json:
        print_json(found)
        return
    signed = f", signed by {', '.join(each[:16] for each in found['signed_by'])} (not verified)" if found["signed_by"] else ", not signed"
    _line("bundle", f"{plan}: {found['files']} files, {found['size_bytes'] / 1e6:.3g} MB{signed}")
    for heading, text in shapes:
        _line(heading, text)
    for name, each in plans.items():
        if len(plans) > 1:
            print()
            _line("plan", f"{named[name]} ({name})")
        for heading, text in lines_of(each):
            _line(heading, text)


@app.command()
def verify(
    plan: Plan,
    key: Keys = None,
    as_json: Json = False,
) -> None:
    """Check every file of a bundle, its signature where a key is given, and how far it is valid on this machine.

    The exit status is 0 when the bundle is whole (and signed as required), whatever it is worth here; else 2.

    Examples:

    `aivmm plan verify squeezenet.aivmm`

    `aivmm plan verify squeezenet.aivmm --key release.pub.pem`
    """
    from aivmm.tuner.bundles import verified

    found = verified(plan, list(key) if key else None)
    if as_json:
        print_json(found)
        return
    signed = "signed as required" if found["signature_checked"] else "signatures not checked" if found["signed_by"] else "not signed"
    _line("bundle", f"{plan}: {found['files']} files, all as listed; {signed}")
    for each in found["plans"].values():
        for way in each["ways"]:
            exact = ", this machine is as the one that it was proven on" if way["grade"] == "exact" else ""
            _line("here", f"{each['title']}, {way['name']}: {way['reason']}{exact}")


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="A plan bundle.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Another.")],
    as_json: Json = False,
) -> None:
    """Say where two plans differ, each part of them in a few lines. The exit status is 0 when they do not, and 1 when they do.

    Plans of two models differ nearly everywhere: `--json` lists every place.

    Example: `aivmm plan diff yesterday.aivmm today.aivmm`
    """
    from aivmm.tuner.bundles import differences, shortened

    found = differences(first, second)
    if as_json:
        print_json({"schema": 1, "first": str(first), "second": str(second), "differences": found})
    elif not found:
        print("no difference")
    else:
        for place, text in shortened(found):
            print(printable(f"{place}: {text}"))
    if found:
        raise typer.Exit(1)


@app.command()
def export(plan: Plan, output: Output, as_json: Json = False) -> None:
    """Write a plan as one zip, or as a folder, as the suffix of the output says. What is written loads as the original does.

    Examples:

    `aivmm plan export squeezenet.aivmm -o squeezenet.zip`

    `aivmm plan export squeezenet.zip -o /srv/plans/squeezenet.aivmm`
    """
    from aivmm.runtime.packing import export_folder, export_zip

    written = export_zip(plan, output) if output.suffix.lower() == ".zip" else export_folder(plan, output)
    print_json({"schema": 1, "path": str(written)}) if as_json else print(written)


@app.command()
def sign(
    plan: Plan,
    key: Annotated[Path, typer.Option(metavar="FILE.pem", help="An Ed25519 private key; make one with `aivmm plan key`.")],
    passphrase_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The passphrase of the key, if it has one; a newline at its end is left off.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Sign a plan, so that `load_plan(..., require_signature=KEY)` takes it. The bundle is checked first.

    Example: `aivmm plan sign squeezenet.aivmm --key release.pem`
    """
    from aivmm.runtime.packing import sign_bundle

    passphrase = None
    if passphrase_file is not None:
        try:
            passphrase = passphrase_file.read_bytes().removesuffix(b"\n").removesuffix(b"\r")
        except OSError as error:
            raise UsageError(f"{passphrase_file} cannot be read ({error.strerror or error})") from error
    name = sign_bundle(plan, key, passphrase=passphrase)
    print_json({"schema": 1, "path": str(plan), "key": name}) if as_json else print(f"{plan} is signed by key {name[:16]}")


@app.command()
def key(
    name: Annotated[Path, typer.Argument(metavar="NAME", help="Writes `NAME.pem` (keep it secret) and `NAME.pub.pem` (hand it out).")],
    as_json: Json = False,
) -> None:
    """Make a pair of keys to sign plans with. Nothing that exists is overwritten.

    Example: `aivmm plan key release`
    """
    from aivmm.runtime.signing import new_key

    private, public = new_key()
    paths = [name.with_name(f"{name.name}.pem"), name.with_name(f"{name.name}.pub.pem")]
    for path, text, mode in zip(paths, (private, public), (0o600, 0o644), strict=True):
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(text)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}", advice="choose another name") from error
    if as_json:
        print_json({"schema": 1, "private": str(paths[0]), "public": str(paths[1])})
        return
    print(f"private key  {paths[0]} (keep it secret)\npublic key   {paths[1]}")


def _line(heading: str, text: str) -> None:
    line = Text.assemble((f"{heading:<11}", "dim"), printable(text))
    Console(highlight=False, soft_wrap=True).print(line)

"""Options from aivmm.toml and pyproject.toml: what counts, what is said, and what is refused."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from aivmm.errors import UsageError
from aivmm.tuner import config_file
from aivmm.tuner.cli import app
from aivmm.tuner.config_file import Defaults
from tests.tuner.harness import TINY, Finished, Place, command, run

ROOT = typer.main.get_command(app)


def read(folder: Path, text: str, *arguments: str, name: str = "aivmm.toml") -> Defaults | None:
    (folder / name).write_text(text, encoding="utf-8")
    file = config_file.find(folder, {})
    return file and config_file.defaults(file, ROOT, arguments)


def test_options_of_the_file_reach_the_command_and_are_said(place: Place, tiny: Path, in_process: Callable[..., Finished]) -> None:
    (place.work / "aivmm.toml").write_text("[tune]\nbatch = [2, 4]\ndim = {batch = 3}\ndry-run = true\n", encoding="utf-8")
    refused = in_process(place, "tune", tiny, "--json")
    assert refused.code == 2 and "dry-run" in refused.json["error"]["message"]
    (place.work / "aivmm.toml").write_text("[tune]\nbatch = [2, 4]\nbudget = 33\n[tune.dim]\nside = 16\n", encoding="utf-8")
    done = in_process(place, "tune", tiny, "--dry-run", "--json")
    assert done.code == 0, done.err
    assert (done.json["batches"], done.json["budget_s"]) == ([2], 33)  # for latency the smallest batch counts
    assert "options from" in done.err and "--batch 2 --batch 4 --budget 33 --dim side=16" in done.err


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    text = '[tune]\nbudget = "9s"\ntop = 2\n'
    assert read(tmp_path, text, "tune", "m.onnx", "--budget=5s") == Defaults(
        {"tune": {"top": "2"}}, ("--top", "2"), str(tmp_path / "aivmm.toml")
    )
    assert read(tmp_path, text, "devices") is None


def test_the_environment_goes_before_the_file(place: Place) -> None:
    (place.work / "aivmm.toml").write_text('db = "of-the-file.db"\n', encoding="utf-8")
    environment = place.env()
    by_variable = run(command("db", "path"), cwd=place.work, env={**environment, "AIVMM_DB": "of-the-variable.db"})
    assert by_variable.out.strip() == str(place.work / "of-the-variable.db")
    environment.pop("AIVMM_DB", None)
    assert run(command("db", "path"), cwd=place.work, env=environment).out.strip() == str(place.work / "of-the-file.db")
    assert run(command("db", "path"), cwd=place.work, env={**environment, "AIVMM_CONFIG": ""}).out.strip() != str(
        place.work / "of-the-file.db"
    )


def test_the_nearest_file_above_counts_and_paths_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "aivmm.toml").write_text('db = "far.db"\n', encoding="utf-8")
    near = tmp_path / "near"
    (near / "below").mkdir(parents=True)
    (near / "pyproject.toml").write_text('[project]\nname = "x"\n[tool.aivmm]\ndb = "near.db"\n[tool.aivmm.tune]\ndataset = "my:samples"\n')
    file = config_file.find(near / "below", {})
    assert file is not None and file.place == f"[tool.aivmm] of {near / 'pyproject.toml'}"
    found = config_file.defaults(file, ROOT, ["tune", "x"])
    assert found is not None and found.map == {"tune": {"db": str(near / "near.db"), "dataset": "my:samples"}}
    (near / "pyproject.toml").write_text("[project]\nname = 3 4\n")  # somebody else's, and broken
    again = config_file.find(near / "below", {})
    assert again is not None and again.path == tmp_path / "aivmm.toml"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tune]\nbugdet = 3\n", "tune.bugdet in .* is no option"),
        ("[tnue]\nbudget = 3\n", "tnue in .* is no command and no option"),
        ("[tune]\nfresh = 'yes'\n", "tune.fresh in .* is 'yes'"),
        ("[tune]\nbatch = [1, {}]\n", "tune.batch in .* wrong kind"),
        ("[tune]\nbudget = [1]\n", "tune.budget in .* wrong kind"),
        ("[tune]\njson = true\n", "tune.json in .* cannot be set there"),
        ("[tune\n", "is no TOML"),
        ("db = 1\n[db]\n", "is no TOML"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        read(tmp_path, text, "tune", "x")
    assert str(tmp_path) in refused.value.message and refused.value.advice


def test_a_file_that_is_named_must_exist_and_be_of_sane_size(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        config_file.find(tmp_path, {config_file.VARIABLE: "absent.toml"})
    (tmp_path / "aivmm.toml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(UsageError, match="more than 1 MiB"):
        config_file.find(tmp_path, {})


@pytest.mark.slow
def test_the_recorded_command_holds_the_options_of_the_file(place: Place, tiny: Path, in_process: Callable[..., Finished]) -> None:
    (place.work / "aivmm.toml").write_text('[tune]\nbudget = "1s"\ntrials = 1\ntop = 1\n', encoding="utf-8")
    done = in_process(place, "tune", tiny, *TINY, "--backend", "null", "-q", "--json")
    assert done.code == 0, done.err
    with sqlite3.connect(place.env()["AIVMM_DB"]) as rows:
        ((said,),) = rows.execute("select command from run").fetchall()
    assert "--budget 1s --trials 1 --top 1" in said

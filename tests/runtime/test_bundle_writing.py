"""Bundles are written whole or not at all, and what is not one of ours is left alone."""

from __future__ import annotations

import itertools
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aivmm.errors import BundleError, UsageError
from aivmm.runtime.bundle import Bundle, check_destination, write_bundle
from aivmm.runtime.plan import Plan
from tests.runtime.bundles import edit_plan, links, snapshot


@pytest.fixture
def plan(made: Path) -> Plan:
    with Bundle.open(made) as opened:
        return opened.plan


@pytest.fixture
def files(made: Path, plan: Plan) -> dict[str, Path]:
    return {name: made / name for name in plan.files}


def test_what_is_written_opens_and_leaves_nothing_beside(tmp_path: Path, plan: Plan, files: dict[str, Path]) -> None:
    write_bundle(tmp_path / "new.aivmm", plan, files)
    with Bundle.open(tmp_path / "new.aivmm") as opened:
        assert opened.plan == plan
    assert [each.name for each in tmp_path.iterdir()] == ["new.aivmm"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_a_bundle_can_be_read_by_others(tmp_path: Path, plan: Plan, files: dict[str, Path]) -> None:
    assert stat.S_IMODE(write_bundle(tmp_path / "new.aivmm", plan, files).stat().st_mode) == 0o755


def test_an_earlier_bundle_is_replaced_whole(bundle: Path, plan: Plan, files: dict[str, Path]) -> None:
    (bundle / "report.html").write_text("old")
    (bundle / "segments" / "weights.bin").unlink()  # a damaged one may be replaced as well
    write_bundle(bundle, plan.replaced(verdict="new"), files)
    with Bundle.open(bundle) as opened:
        assert opened.plan.verdict == "new"
    assert not (bundle / "report.html").exists()
    assert list(bundle.parent.iterdir()) == [bundle]


def test_a_bundle_of_a_newer_version_may_be_replaced(bundle: Path, plan: Plan, files: dict[str, Path]) -> None:
    edit_plan(bundle, lambda raw: raw.update(schema=7, unknown={}))
    write_bundle(bundle, plan, files)
    Bundle.open(bundle).close()


def test_an_empty_folder_may_be_written_to_also_by_a_relative_name(
    tmp_path: Path, plan: Plan, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    write_bundle(Path("here"), plan, {name: path.absolute() for name, path in files.items()})
    Bundle.open(tmp_path / "here").close()


@pytest.mark.parametrize(
    "plan_text", [None, "{}", '{"format_version": "1.2", "files": {}}', '{"schema": 1, "files": {"a": "b"}}', "not json", "[]"]
)
def test_a_folder_that_is_not_a_bundle_is_left_alone(tmp_path: Path, plan: Plan, files: dict[str, Path], plan_text: str | None) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("years of work")
    if plan_text is not None:
        (folder / "plan.json").write_text(plan_text)
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match="holds other things; choose another with -o DIR"):
        write_bundle(folder, plan, files)
    assert snapshot(tmp_path) == before


def test_a_bundle_with_a_users_file_in_it_is_left_alone(bundle: Path, plan: Plan, files: dict[str, Path]) -> None:
    (bundle / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other things"):
        write_bundle(bundle, plan, files)
    assert (bundle / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m.aivmm").write_text("x")
    with pytest.raises(UsageError, match="exists and is not a folder"):
        check_destination(tmp_path / "m.aivmm")


@links
def test_a_link_in_the_way_is_left_alone(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    with pytest.raises(UsageError, match="not a folder"):
        check_destination(tmp_path / "link")


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing does not exist"):
        check_destination(tmp_path / "missing" / "m.aivmm")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_an_unwritable_parent_is_named() -> None:
    with pytest.raises(UsageError, match="choose another with -o DIR"):
        check_destination(Path("/proc/m.aivmm"))


def test_a_write_that_fails_leaves_the_earlier_bundle_and_nothing_else(bundle: Path, plan: Plan, files: dict[str, Path]) -> None:
    before = snapshot(bundle.parent)
    with pytest.raises(UsageError, match="cannot write the plan"):
        write_bundle(bundle, plan, files | {"segments/weights.bin": bundle / "missing"})
    with pytest.raises(BundleError, match="not a plain path"):
        write_bundle(bundle, plan, files | {"../out": next(iter(files.values()))})
    with pytest.raises(ValueError, match="not listed in files"):
        write_bundle(bundle, plan, {})
    assert snapshot(bundle.parent) == before


READER = """
import sys, aivmm
from aivmm.runtime.bundle import Bundle
print("ready", flush=True)
seen, missing, broken = set(), 0, 0
import select
while not select.select([sys.stdin], [], [], 0)[0]:
    try:
        with Bundle.open(sys.argv[1]) as bundle:
            if len(seen) == 1 and bundle.plan.verdict not in seen: print("several", flush=True)
            seen.add(bundle.plan.verdict)
    except aivmm.BundleError as error:
        missing += 1
print(len(seen))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not replace what others read")
def test_a_reader_sees_the_old_bundle_or_the_new_one_and_never_a_mixture(bundle: Path, plan: Plan, files: dict[str, Path]) -> None:
    with subprocess.Popen([sys.executable, "-c", READER, str(bundle)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout and reader.stdout.readline() == "ready\n"
        # Thirty times, and until it has seen more than one of them, however seldom it gets to look.
        until_several = threading.Thread(target=reader.stdout.readline, daemon=True)
        until_several.start()
        for number in itertools.count():
            write_bundle(bundle, plan.replaced(verdict=str(number)), files)
            if number >= 30 and not until_several.is_alive():
                break
        out, _ = reader.communicate("stop\n", timeout=60)
    assert reader.returncode == 0
    assert int(out) > 1

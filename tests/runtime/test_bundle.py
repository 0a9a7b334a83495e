"""Bundles on disk: not believed before they are checked."""

from __future__ import annotations

import io
import os
import shutil
import stat
import struct
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aivmm
from aivmm.errors import AivmmError, BundleError
from aivmm.runtime.bundle import Bundle
from aivmm.runtime.reading import file_sha256
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle
from tests.runtime.bundles import edit_plan, links, list_as, refused, snapshot, zipped

# --- what opens ---


def test_a_folder_opens_with_its_plan_and_files(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        assert [stage.target for stage in opened.plan.stages] == [OPENVINO, ONNXRUNTIME]
        assert set(opened.plan.files) == {stage.model for stage in opened.plan.stages} | {"segments/weights.bin"}
        for name, digest in opened.plan.files.items():
            assert file_sha256(opened.file(name)) == digest


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_zip_is_unpacked_and_its_copy_removed_when_closed(bundle: Path, tmp_path: Path, compression: int) -> None:
    opened = Bundle.open(zipped(bundle, tmp_path / "m.zip", compression=compression))
    with Bundle.open(bundle) as folder:
        assert opened.plan == folder.plan
    copy = opened.folder
    assert opened.file(opened.plan.stages[0].model).is_file()
    opened.close()
    opened.close()
    assert not copy.exists()


def test_a_report_beside_the_plan_is_ignored(bundle: Path) -> None:
    (bundle / "report.html").write_text("<script>anything</script>")
    Bundle.open(bundle).close()


def test_a_bundle_that_may_not_be_written_opens(bundle: Path) -> None:
    everything = [bundle, *bundle.rglob("*")]
    for each in everything:
        each.chmod(stat.S_IREAD | stat.S_IEXEC if each.is_dir() else stat.S_IREAD)
    try:
        before = snapshot(bundle)
        Bundle.open(bundle).close()
        assert snapshot(bundle) == before
    finally:
        for each in everything:
            each.chmod(stat.S_IRWXU)


def test_a_file_that_is_not_listed_cannot_be_asked_for(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        for name in ("plan.json", "../m.aivmm/plan.json", "", "segments"):
            with pytest.raises(BundleError):
                opened.file(name)


# --- what does not ---


@pytest.mark.parametrize("at", [0, 100, -1])
@pytest.mark.parametrize("suffix", [".onnx", ".bin"])
def test_a_changed_byte_is_noticed(bundle: Path, suffix: str, at: int) -> None:
    file = next(bundle.glob(f"segments/*{suffix}"))
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    refused(bundle, r"was changed.*copy the bundle again")


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "segments" / "weights.bin").unlink()
    refused(bundle, "lacks 'segments/weights.bin'")


@pytest.mark.parametrize("name", ["extra", "segments/extra.onnx", "REPORT.HTML", "segments/report.html", ".hidden", "plan.json~"])
def test_an_unlisted_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).write_text("x")
    refused(bundle, "which its plan does not list")


@links
@pytest.mark.parametrize("name", ["segments/weights.bin", "plan.json", "report.html", "segments"])
def test_symbolic_links_are_refused_wherever_they_lead(bundle: Path, name: str) -> None:
    aside = bundle.parent / "aside"
    if (bundle / name).exists():
        (bundle / name).rename(aside)
    else:
        aside.write_text("x")
    (bundle / name).symlink_to(aside)
    refused(bundle)


@links
def test_hard_links_are_refused(bundle: Path) -> None:
    os.link(bundle / "segments" / "weights.bin", bundle.parent / "elsewhere")
    refused(bundle, "hard-linked from elsewhere")


@links
def test_a_hard_link_to_a_report_is_refused_where_the_plan_lists_it(bundle: Path) -> None:
    """An unlisted report is opened by nobody; a listed file is read for its digest."""
    (bundle.parent / "elsewhere").write_text("x")
    os.link(bundle.parent / "elsewhere", bundle / "report.html")
    Bundle.open(bundle).close()
    edit_plan(bundle, lambda plan: plan["files"].update({"report.html": file_sha256(bundle / "report.html")}))
    refused(bundle, "hard-linked from elsewhere")


@links
def test_a_plan_that_is_a_hard_link_is_not_read(bundle: Path) -> None:
    os.link(bundle / "plan.json", bundle.parent / "elsewhere")
    (bundle / "plan.json").unlink()
    (bundle.parent / "elsewhere").write_text("secret")
    os.link(bundle.parent / "elsewhere", bundle / "plan.json")
    refused(bundle, "'plan.json', which is hard-linked from elsewhere")


@links
def test_special_files_are_refused_without_being_opened(bundle: Path) -> None:
    os.mkfifo(bundle / "pipe")
    with pytest.raises(BundleError, match="special file"):
        Bundle.open(bundle)
    (bundle / "plan.json").unlink()
    os.mkfifo(bundle / "plan.json")
    with pytest.raises(BundleError, match="holds no plan"):
        Bundle.open(bundle)
    with pytest.raises(BundleError, match="neither"):
        Bundle.open(bundle / "pipe")


OUTSIDE = [
    "../secret", "segments/../../secret", "segments/../segments/weights.bin", "/etc/passwd", "segments\\weights.bin", "C:/secret",
    "C:secret", "segments/weights.bin:stream", "./segments/weights.bin", "segments//weights.bin", "segments/weights.bin/", "", ".", "..",
    "a\0b", "//host/share",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_listed_name_that_is_no_plain_path_is_refused(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_bytes(next(bundle.glob("segments/*.onnx")).read_bytes())
    list_as(bundle, name)
    refused(bundle, "not a plain path inside the bundle")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_zip_writes_nothing_outside_itself(bundle: Path, tmp_path: Path, name: str) -> None:
    if "\0" in name or not name:
        pytest.skip("a zip cannot hold this name")
    if name.endswith("/"):
        pytest.skip("a zip holds folders under such names, and makes none")
    archive = zipped(bundle, tmp_path / "m.zip")
    with zipfile.ZipFile(archive, "a") as opened:
        info = zipfile.ZipInfo("x")
        info.filename = name
        opened.writestr(info, b"slipped")
    if os.sep == "/" and name == "/etc/passwd":
        before = Path(name).read_bytes()
        refused(archive, "not a plain path")
        assert Path(name).read_bytes() == before
    else:
        refused(archive, "not a plain path")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(bundle: Path, tmp_path: Path) -> None:
    archive = zipped(bundle, tmp_path / "m.zip")
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED, compresslevel=9) as opened:
        opened.writestr("segments/zeros", bytes(64 << 20))
    refused(archive, "more than 200 times its size")


def test_a_zip_of_too_many_files_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as opened:
        for number in range(10_001):
            opened.writestr(f"f{number}", b"")
    refused(tmp_path / "m.zip", "10001 files")


@pytest.mark.parametrize("size", [10, 0])
def test_a_zip_that_lies_about_sizes_is_refused(bundle: Path, tmp_path: Path, size: int) -> None:
    archive = zipped(bundle, tmp_path / "m.zip")
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("segments/zeros", bytes(8 << 20))
    data = archive.read_bytes()
    assert data.count(struct.pack("<I", 8 << 20)) == 2
    archive.write_bytes(data.replace(struct.pack("<I", 8 << 20), struct.pack("<I", size)))
    refused(archive)


def test_a_zip_that_holds_a_name_twice_is_refused(bundle: Path, tmp_path: Path) -> None:
    archive = zipped(bundle, tmp_path / "m.zip")
    with zipfile.ZipFile(archive, "a") as opened, pytest.warns(UserWarning, match="Duplicate name"):
        opened.writestr("plan.json", b"{}")
    refused(archive, "cannot be unpacked")


def test_links_in_a_zip_are_not_followed(bundle: Path, tmp_path: Path) -> None:
    archive = zipped(bundle, tmp_path / "m.zip")
    with zipfile.ZipFile(archive, "a") as opened:
        info = zipfile.ZipInfo("report.html")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        opened.writestr(info, "/etc/passwd")
    with Bundle.open(archive) as opened_bundle:
        assert (opened_bundle.folder / "report.html").read_text() == "/etc/passwd"
        assert not (opened_bundle.folder / "report.html").is_symlink()


def test_a_refused_zip_is_called_by_its_own_name(bundle: Path, tmp_path: Path) -> None:
    (bundle / "extra").write_text("x")
    refused(zipped(bundle, tmp_path / "mine.zip"), r"mine\.zip holds 'extra'")


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x05\x06" + bytes(18), b"<html>", b"\0" * 100])
def test_a_file_that_is_no_zip_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.aivmm").write_bytes(content)
    refused(tmp_path / "m.aivmm")


def test_a_missing_path_an_empty_folder_and_an_absurd_name_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "missing.aivmm", "does not exist")
    refused(tmp_path / "x\0y")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no plan.json")
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / ("x" * 5000))


def test_an_enormous_plan_is_refused_unread(bundle: Path) -> None:
    with (bundle / "plan.json").open("r+b") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(BundleError, match="larger than 64 MiB"):
        Bundle.open(bundle)


def test_a_newer_schema_and_a_nested_plan_are_refused(bundle: Path) -> None:
    edit_plan(bundle, lambda plan: plan.update(schema=99))
    refused(bundle, "upgrade aivmm")
    (bundle / "plan.json").write_text("[" * 100_000)
    refused(bundle, "Expected `object`, got `array`")


@pytest.mark.parametrize("name", ["segments/a.xml", "segments/a.pb", "segments/a.ort", "segments/a.onnx.blob", "onnx"])
def test_a_stage_that_is_no_onnx_file_is_refused(bundle: Path, name: str) -> None:
    edit_plan(bundle, lambda plan: plan["stages"][0].update(model=name))
    refused(bundle, "stages.0.model")


def test_a_model_with_a_compiled_blob_is_refused(bundle: Path) -> None:
    file = next(bundle.glob("segments/*.onnx"))
    model = onnx.load(file, load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("EPContext", [], [], domain="com.microsoft", ep_cache_context="/etc/passwd"))
    file.write_bytes(model.SerializeToString())
    edit_plan(bundle, lambda plan: plan["files"].update({f"segments/{file.name}": file_sha256(file)}))
    refused(bundle, r"holds compiled code \(EPContext\)")


def test_a_zip_that_does_not_fit_the_disk_is_refused_before_it_is_unpacked(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = zipped(bundle, tmp_path / "m.zip")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    refused(archive, "unpacks to .* left; set TMPDIR")


def test_a_zip_where_nothing_may_be_written_says_what_to_do(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zipped(bundle, tmp_path / "m.zip")
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    refused(archive, "there is no folder to unpack it to .*; set TMPDIR")


# --- anything else ---


TOKENS = [b"../", b"null", b"NaN", b"-1", b'"', b"{", b"/etc/passwd", b"\\u0000", b"1e999"]


def opens_or_is_refused(path: Path) -> None:
    try:
        with Bundle.open(path) as opened:
            inside = opened.folder.resolve()
            assert all(opened.file(name).resolve().is_relative_to(inside) for name in opened.plan.files)
    except AivmmError as error:
        assert "\n" not in str(error)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_plan_opens_or_is_refused(data: st.DataObject, made: Path) -> None:
    original = (made / "plan.json").read_bytes()
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(damaged) - 1))
        damaged[start : start + data.draw(st.integers(0, 8))] = data.draw(
            st.one_of(
                st.binary(max_size=8), st.sampled_from([b"../", b"null", b"NaN", b"-1", b'"', b"{", b"/etc/passwd", b"\\u0000", b"1e999"])
            )
        )
    try:
        (made / "plan.json").write_bytes(damaged)
        opens_or_is_refused(made)
    finally:
        (made / "plan.json").write_bytes(original)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_zip_opens_or_is_refused(data: st.DataObject, made: Path, tmp_path: Path) -> None:
    packed = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2]))
    damaged = bytearray(zipped(made, tmp_path / "m.zip", compression=packed).read_bytes())
    end = len(damaged)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, end - 1), st.integers(max(0, end - 400), end - 1), st.integers(0, 100)))
        damaged[at] = data.draw(st.integers(0, 255))
    (tmp_path / "m.zip").write_bytes(damaged[: data.draw(st.one_of(st.just(end), st.integers(0, end)))])
    opens_or_is_refused(tmp_path / "m.zip")


# --- while it is read ---


def test_a_zip_reads_the_same_from_memory_as_from_disk(bundle: Path, tmp_path: Path) -> None:
    assert zipfile.is_zipfile(io.BytesIO(zipped(bundle, tmp_path / "m.zip").read_bytes()))


def test_a_plan_with_a_key_twice_is_never_found_good(bundle: Path) -> None:
    text = (bundle / "plan.json").read_text()
    (bundle / "plan.json").write_text(text.replace('"objective":', '"objective": "throughput", "objective":', 1))
    told = r"plan\.json is not valid JSON \(the key objective is there twice in one object\)"
    with Bundle.open(bundle, read_later=True) as opened, pytest.raises(BundleError, match=told):
        opened.verify()
    with pytest.raises(BundleError, match=told):
        Bundle.open(bundle)
    with pytest.raises(BundleError, match=told):
        aivmm.load_plan(bundle)


@pytest.mark.parametrize("error", [MemoryError("no\nroom"), RecursionError(), ValueError("odd"), KeyboardInterrupt()], ids=repr)
def test_a_check_that_ends_before_its_time_never_says_good(bundle: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("aivmm.runtime.reading.refuse_compiled", fail)
    with pytest.raises(BundleError, match=f"cannot be checked .{type(error).__name__}") as caught:
        Bundle.open(bundle)
    assert caught.value.__cause__ is error and "\n" not in str(caught.value)


def test_a_bundle_that_was_closed_while_it_was_read_is_not_found_good(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        begun.set()
        go_on.wait(60)

    monkeypatch.setattr("aivmm.runtime.reading.check_content", slow)
    opened = Bundle.open(bundle, read_later=True)
    opened.start_reading()
    assert begun.wait(60) and opened._reading is not None
    closing = threading.Thread(target=opened.close)
    closing.start()
    while not opened._reading._given_up:
        time.sleep(0.001)
    go_on.set()
    closing.join()
    with pytest.raises(BundleError, match="was closed before all of it was read"):
        opened.verify()


def test_what_a_refused_zip_was_unpacked_to_is_gone(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unpacked").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "unpacked"))
    file = next(bundle.glob("segments/*.onnx"))
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(BundleError, match="was changed") as caught:
        Bundle.open(zipped(bundle, tmp_path / "m.zip"))
    assert caught.value and not list((tmp_path / "unpacked").iterdir())  # while the error is still held, and all that it refers to


@pytest.mark.parametrize("warm", [False, True], ids=["compiled", "from the cache"])
def test_a_file_changed_after_it_was_compiled_is_refused_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: bool) -> None:
    """Loading overlaps with hashing, but no engine comes of it unless every byte is the plan's."""
    from aivmm.runtime.engine import Engine

    monkeypatch.setenv("AIVMM_CACHE", str(tmp_path / "cache"))
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)])
    if warm:
        Engine.load(bundle).close()
    for each in sorted((bundle / "segments").iterdir()):
        whole = each.read_bytes()
        each.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(BundleError, match="was changed: its SHA-256"):
            Engine.load(bundle)
        each.write_bytes(whole)
    Engine.load(bundle).close()

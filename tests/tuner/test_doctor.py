"""`aivmm doctor`: a missing driver is told from a missing card, and what would stop or spoil a tune is named with its remedy."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from aivmm.probes.hardware import Card, cards
from aivmm.runtime.ort_options import PROVIDERS
from aivmm.runtime.target import Device, Target, Unavailable
from aivmm.tuner.doctor import CLASSES, Finding, devices, usable
from tests.tuner.harness import Finished, Place, command, run

CPU = Target(runtime="onnxruntime", name="CPU", device=Device(kind="cpu", model="A CPU", cores=2), runtime_version="1")
NO_CUDA = Unavailable(target="onnxruntime:CUDA", reason="no NVIDIA driver", advice="install one")


def plug(root: Path, address: str, **files: str) -> Path:
    folder = root / "sys/bus/pci/devices" / address
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.removesuffix("_")).write_text(text)
    return folder


def test_cards_are_read_from_the_bus_with_their_drivers(tmp_path: Path) -> None:
    assert cards(tmp_path) is None
    plug(tmp_path, "0000:00:02.0", class_="0x030000\n", vendor="0x8086\n", device="0x7d55\n")
    held = plug(tmp_path, "0000:01:00.0", class_="0x030200\n", vendor="0x10de\n", device="0x2335\n")
    (tmp_path / "drivers/nvidia").mkdir(parents=True)
    (held / "driver").symlink_to(tmp_path / "drivers/nvidia")
    plug(tmp_path, "0000:00:0b.0", class_="0x120000\n", vendor="0x8086\n", device="0x7d1d\n")
    plug(tmp_path, "0000:00:1f.0", class_="0x060100\n", vendor="0x8086\n", device="0x1234\n")  # a bridge
    plug(tmp_path, "0000:02:00.0", class_="rubbish\n", vendor="0x8086\n", device="0x1234\n")
    plug(tmp_path, "0000:03:00.0", class_="0x030000\n", vendor="0x1af4\n", device="0x1050\n")  # a virtual display
    found = cards(tmp_path)
    assert found is not None
    assert [(each.kind, each.vendor, each.ids, each.driver) for each in found] == [
        ("gpu", "Intel", "8086:7d55", ""),
        ("npu", "Intel", "8086:7d1d", ""),
        ("gpu", "NVIDIA", "10de:2335", "nvidia"),
    ]


def test_a_card_without_its_software_is_missing_and_no_card_is_absent() -> None:
    card = Card("gpu", "NVIDIA", "10de:2335", "0000:01:00.0")
    of = {each.subject: each for each in devices([CPU], [NO_CUDA], [card])}
    assert of["CPU"].state == "ok"
    assert of["NVIDIA GPU"].state == "missing" and "10de:2335" in of["NVIDIA GPU"].detail and of["NVIDIA GPU"].advice == "install one"
    of = {each.subject: each for each in devices([CPU], [NO_CUDA], [])}
    assert of["NVIDIA GPU"].state == "absent" and not of["NVIDIA GPU"].advice
    of = {each.subject: each for each in devices([CPU], [NO_CUDA], None)}  # where the bus cannot be seen, the remedy is shown
    assert of["NVIDIA GPU"].state == "missing" and of["NVIDIA GPU"].advice == "install one"


def test_like_cards_and_instances_are_told_apart_by_their_ids() -> None:
    def told(uid: str, **properties: bool) -> str:
        card = Device(kind="gpu", model="A Card", uid=uid, memory_bytes=1 << 36, properties=properties)
        target = Target(runtime="onnxruntime", name="CUDA:0", device=card, runtime_version="1")
        return next(each.detail for each in devices([target], [], None) if each.state == "ok")

    assert "GPU-3735863d-e7b0-d9b7-74dd-909e838c722a" in told("GPU-3735863d-e7b0-d9b7-74dd-909e838c722a")
    instance = told("MIG-3735863d-e7b0-d9b7-74dd-909e838c722a", mig=True)
    assert "MIG-3735863d" in instance and "an instance of a divided card (MIG)" in instance


def test_a_card_that_no_backend_knows_of_is_shown_too() -> None:
    (found,) = [
        each for each in devices([CPU], [], [Card("gpu", "AMD", "1002:744c", "0000:03:00.0", "amdgpu")]) if each.subject == "AMD GPU"
    ]
    assert found.state == "missing" and "1002:744c" in found.detail and found.advice


def test_every_provider_of_onnx_runtime_has_a_class_and_what_is_no_card_is_not_looked_for_on_the_bus() -> None:
    assert {f"onnxruntime:{each}" for each in PROVIDERS} <= {pattern for each in CLASSES for pattern in each.patterns}
    gone = [Unavailable(target=f"onnxruntime:{name}", reason="no device", advice="update") for name in ("DirectML", "QNN", "CoreML")]
    found = [each for each in devices([CPU], gone, []) if each.subject != "CPU"]
    assert [each.subject for each in found] == ["DirectX 12 adapter", "Qualcomm NPU", "Apple GPU and Neural Engine"]
    assert all(each.state == "missing" and "PCI" not in each.detail and each.advice == "update" for each in found)
    adapter = Target(runtime="onnxruntime", name="DirectML:0", device=Device(kind="gpu", model="DirectX 12 adapter"), runtime_version="1")
    assert [each.state for each in devices([adapter], [], []) if each.subject == "DirectX 12 adapter"] == ["ok"]


def test_without_a_target_or_with_something_broken_nothing_can_be_tuned() -> None:
    works = Finding("CPU", "ok", "")
    assert usable([works, Finding("conditions", "warning", "busy")])
    assert not usable([Finding("database", "ok", "")])
    assert not usable([works, Finding("database", "broken", "")])


def test_on_this_machine_it_names_what_runs_and_changes_nothing(place: Place, in_process: Callable[..., Finished]) -> None:
    done = in_process(place, "doctor", "--json")
    assert done.code == 0, done.err
    subjects = {each["subject"]: each for each in done.json["findings"]}
    assert {"software", "CPU", "database", "cache", "lock"} <= subjects.keys() and done.json["usable"]
    assert not place.db.exists()


def test_a_file_that_is_no_database_is_broken_and_kept(place: Place) -> None:
    place.db.write_bytes(b"precious" * 100)
    (place.folder / "file").write_text("")
    done = place.aivmm("doctor", "--backend", "null", "--json", AIVMM_LOCK=str(place.folder / "file" / "lock"))
    assert done.code == 2 and not done.json["usable"]
    broken = {each["subject"]: each for each in done.json["findings"] if each["state"] == "broken"}
    assert str(place.db) in broken["database"]["detail"] and "AIVMM_LOCK" in broken["lock"]["advice"]
    assert place.db.read_bytes() == b"precious" * 100


@pytest.mark.skipif(os.name == "nt", reason="a terminal of Windows has another encoding")
def test_a_terminal_without_signs_gets_letters(place: Place) -> None:
    environment = {**place.env(), "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    done = run(command("doctor", "--backend", "null"), cwd=place.work, env=environment)
    assert done.out.isascii() and max(map(len, done.out.splitlines())) <= 80

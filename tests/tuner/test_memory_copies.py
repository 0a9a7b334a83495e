"""Copies between memories on the null backend's fake GPU: measured once for a machine, recalled, shown by size."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aivmm.db.database import Database
from aivmm.probes.lab import Lab
from aivmm.runtime.environment import environment_of
from aivmm.runtime.null import DEFAULT_DEVICES
from aivmm.runtime.target import Target
from aivmm.tuner.cli_profile import _copy_line
from aivmm.tuner.measure import Counts
from aivmm.tuner.memory_copies import CopyProber
from aivmm.tuner.transfers import Probing
from tests.tuner.harness import Finished, Place

SIZES = (4096, 1 << 20, 1 << 22)
GPU = "null:GPU.0 memory"


def probed(database: Database, lab: Lab, targets: list[Target], *, budget_s: float = 60.0) -> CopyProber:
    prober = CopyProber(Probing(lab=lab, database=database, run_id=None, targets=targets, counts=Counts(), sizes_bytes=SIZES))
    prober.run(budget_s=budget_s, tell=lambda *_: None)
    return prober


def test_they_are_measured_once_kept_and_found_again(place: Place, in_process: Callable[..., Finished]) -> None:
    with Database.open(place.db) as database, Lab() as lab:
        targets, _ = lab.discover(["null"])
        for each in targets:
            database.remember_environment(environment_of(each))
            database.remember_target(each)
        assert probed(database, lab, list(targets), budget_s=0.0).skipped == 5
        first = probed(database, lab, list(targets))
        host = [(f"host {kind}", GPU) for kind in ("pageable", "pinned")]
        assert set(first.found) == {*host, *((b, a) for a, b in host), (GPU, GPU)}
        assert first.given.counts.measured == 5 * len(SIZES) and not first.skipped
        again = probed(database, lab, list(targets))
        assert again.found == first.found and again.given.counts.measured == 0 and again.given.counts.reused == 5 * len(SIZES)
        cpu = [each for each in targets if each.device.kind == "cpu"]
        assert probed(database, lab, cpu).found == {}
    checked = in_process(place, "db", "check")
    assert checked.code == 0, checked.out + checked.err
    times = {ends: [each.cost_s for each in copy.points] for ends, copy in first.found.items()}
    device = DEFAULT_DEVICES[1]
    assert times[host[0]] == pytest.approx([device.copy_s + size / device.copy_bytes_per_s for size in SIZES])
    assert times[host[1]] == pytest.approx([device.copy_s + size / (device.pinned_speed * device.copy_bytes_per_s) for size in SIZES])
    assert _copy_line(first.found[host[1]]).startswith(f"host pinned to {GPU}: 4 KiB 10.2 µs (")

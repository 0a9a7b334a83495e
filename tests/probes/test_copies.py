"""Copies between memories, measured by a worker: on the fake GPU, whose times are known, and on a card where there is one."""

from __future__ import annotations

from typing import Any

import pytest

from aivmm.errors import AivmmError
from aivmm.probes import wire
from aivmm.probes.client import Worker
from aivmm.probes.copies import is_copy, points_of, route_in, route_out
from aivmm.runtime.backend import CopyRoute
from aivmm.runtime.finding import find_named
from aivmm.runtime.null import DEFAULT_DEVICES
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Target

SIZES = [256, 1 << 20]


def routes_on(worker: Worker, runtime: str, *targets: Target) -> list[dict[str, Any]]:
    answer = worker.call("copy_routes", limit_s=60.0, runtime=runtime, targets=list(map(wire.target_out, targets)))
    routes: list[dict[str, Any]] = answer["routes"]
    return routes


def test_the_fake_gpus_copies_are_measured_by_size_and_way(worker: Worker) -> None:
    cpu, gpu = (each for each in load_backend("null").targets() if isinstance(each, Target))
    routes = routes_on(worker, "null", cpu, gpu)
    assert len(routes) == 5
    device = DEFAULT_DEVICES[1]
    for raw in routes:
        route = route_in(raw)
        assert route_in(route_out(route)) == route
        answer = worker.call("copies", limit_s=60.0, runtime="null", route=raw, sizes_bytes=SIZES)
        points = points_of(answer["points"])
        assert [each.size_bytes for each in points] == SIZES
        rate = device.copy_bytes_per_s * (device.pinned_speed if route.pinned else 1)
        for each in points:
            inside = device.launch_s + 2 * each.size_bytes / device.bytes_per_s
            expected = inside if route.source and route.destination else device.copy_s + each.size_bytes / rate
            assert each.cost_s == pytest.approx(expected) and (each.source_s, each.destination_s) == (0, 0)


def test_runtimes_that_compute_in_the_hosts_memory_have_no_ways(worker: Worker) -> None:
    for name in ("openvino:CPU", "onnxruntime:CPU"):
        target = find_named(name)
        assert isinstance(target, Target)
        assert routes_on(worker, target.runtime, target) == []


def test_sizes_end_where_memory_does_and_none_at_all_is_a_refusal(worker: Worker) -> None:
    _, gpu = (each for each in load_backend("null").targets() if isinstance(each, Target))
    route = route_out(CopyRoute(source=None, destination=gpu))
    found = worker.call("copies", limit_s=60.0, runtime="null", route=route, sizes_bytes=[1 << 40, 256])["points"]
    assert [each["size_bytes"] for each in found] == [256]
    with pytest.raises(AivmmError, match=r"a copy needs 1099511627776 bytes, null:GPU\.0 has"):
        worker.call("copies", limit_s=60.0, runtime="null", route=route, sizes_bytes=[1 << 40])


def test_copies_are_told_from_hand_overs_by_their_ends() -> None:
    _, gpu = (each for each in load_backend("null").targets() if isinstance(each, Target))
    assert all(is_copy(*CopyRoute(source=source, destination=gpu, pinned=True).ends) for source in (None, gpu))
    assert not is_copy("openvino:CPU", "null:GPU.0")


@pytest.mark.gpu
def test_a_cards_copies_are_measured_and_pinned_ones_are_faster(worker: Worker) -> None:
    card = find_named("onnxruntime:CUDA:0")
    assert isinstance(card, Target)
    large = 64 << 20
    rates = {}
    for raw in routes_on(worker, "onnxruntime", card):
        points = points_of(worker.call("copies", limit_s=120.0, runtime="onnxruntime", route=raw, sizes_bytes=[4096, large])["points"])
        assert [each.size_bytes for each in points] == [4096, large]
        rates[route_in(raw).ends] = large / points[1].cost_s
    here = "onnxruntime:CUDA:0 memory"
    assert len(rates) == 5
    for pageable, pinned in ((("host pageable", here), ("host pinned", here)), ((here, "host pageable"), (here, "host pinned"))):
        assert rates[pinned] > rates[pageable]
    assert rates[here, here] > rates["host pinned", here]

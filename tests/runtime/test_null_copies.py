"""The null backend's devices with memory of their own: what copies take, what stays there, and how much there is of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from aivmm.errors import Unsupported, UsageError
from aivmm.models.ceilings import stage_model
from aivmm.probes.transfers import chained, measured
from aivmm.runtime.backend import CopiesMemory, CopyRoute, DeviceRequest, DeviceTensors, routes_of
from aivmm.runtime.config import Config
from aivmm.runtime.null import NullBackend, NullDevice
from aivmm.runtime.null_card import NullCardExecutable, NullCardRequest
from aivmm.runtime.null_memory import NullTensor
from aivmm.runtime.target import Target

CARD = NullDevice(
    name="GPU.0",
    kind="gpu",
    bytes_per_s=100e9,
    memory_bytes=1 << 20,
    copy_bytes_per_s=1e9,
    copy_s=1e-5,
    pinned_speed=4.0,
    launch_s=1e-6,
    cores=1,
    max_streams=1,
    serial=0.0,
    thread_overhead=0.0,
    stream_overhead=0.0,
    keeps_tensors=True,
)
OTHER = replace(CARD, name="GPU.1", copy_bytes_per_s=2e9, copy_s=3e-5)
SIZE = 4096


def backend_of(*devices: NullDevice) -> tuple[NullBackend, list[Target]]:
    backend = NullBackend(devices)
    return backend, [each for each in backend.targets() if isinstance(each, Target)]


def took(backend: NullBackend, route: CopyRoute, size: int = SIZE) -> float:
    copier = backend.copier(route, size)
    before = backend.clock.now()
    copier.run()
    assert backend.clock.now() - before == pytest.approx(copier.last_s)
    np.testing.assert_array_equal(copier.destination, copier.source)
    copier.close()
    return copier.last_s


def test_every_way_from_and_to_a_card_is_listed_once_and_none_of_the_cpu() -> None:
    backend, (cpu, one, two) = backend_of(NullDevice(), CARD, OTHER)
    assert isinstance(backend, CopiesMemory)
    ends = [each.ends for each in backend.routes([cpu, one, two])]
    assert len(ends) == len(set(ends)) == 2 * 4 + 4
    assert ("host pinned", "null:GPU.0 memory") in ends and ("null:GPU.1 memory", "host pageable") in ends
    assert ("null:GPU.0 memory", "null:GPU.0 memory") in ends and ("null:GPU.0 memory", "null:GPU.1 memory") in ends
    assert list(backend.routes([cpu])) == [] == list(routes_of([]))
    shared, (card,) = backend_of(NullDevice(name="GPU.0", kind="gpu", memory_bytes=1 << 20))
    assert list(shared.routes([card])) == []  # nothing is copied, and what takes no time was a tune's end


def test_copies_take_what_the_devices_figures_say() -> None:
    backend, (one, two) = backend_of(CARD, OTHER)
    assert took(backend, CopyRoute(source=None, destination=one)) == pytest.approx(1e-5 + SIZE / 1e9)
    assert took(backend, CopyRoute(source=one, destination=None, pinned=True)) == pytest.approx(1e-5 + SIZE / 4e9)
    assert took(backend, CopyRoute(source=one, destination=one)) == pytest.approx(1e-6 + 2 * SIZE / 100e9)
    through_host = 1e-5 + SIZE / 4e9 + 3e-5 + SIZE / 8e9
    assert took(backend, CopyRoute(source=one, destination=two)) == pytest.approx(through_host)
    backend, (one, two) = backend_of(replace(CARD, peer_bytes_per_s=50e9), replace(OTHER, peer_bytes_per_s=25e9))
    assert took(backend, CopyRoute(source=two, destination=one)) == pytest.approx(3e-5 + SIZE / 25e9)


def test_a_copy_takes_memory_of_its_ends_and_gives_it_back() -> None:
    backend, (one, two) = backend_of(CARD, replace(OTHER, memory_bytes=1 << 10))
    copier = backend.copier(CopyRoute(source=None, destination=one), SIZE)
    assert backend.memory_in_use(one) == SIZE
    copier.close()
    copier.close()
    with pytest.raises(Unsupported, match=r"a copy needs 4096 bytes, null:GPU\.1 has 1024"):
        backend.copier(CopyRoute(source=one, destination=two), SIZE)
    assert backend.memory_in_use(one) == backend.memory_in_use(two) == 0


def executable(backend: NullBackend, target: Target, *, reads: str, writes: str) -> NullCardExecutable:
    made = backend.compile(stage_model(SIZE, reads=reads, writes=writes), target, Config())
    assert isinstance(made, NullCardExecutable) and isinstance(made, DeviceTensors)
    return made


def test_what_stays_on_the_device_is_not_copied() -> None:
    backend, (card,) = backend_of(CARD)
    first, second = executable(backend, card, reads="a", writes="b"), executable(backend, card, reads="b", writes="c")
    one, two = first.new_request(), second.new_request()
    a, b, c = np.arange(SIZE // 4, dtype=np.float32), np.empty(SIZE // 4, np.float32), np.empty(SIZE // 4, np.float32)
    one.bind("a", a), one.bind("b", b), two.bind("b", b), two.bind("c", c)

    def both() -> float:
        one.run()
        two.run()
        return one.last_s + two.last_s

    crossing = both()
    np.testing.assert_array_equal(c, 4 * a)
    between = first.device_tensor(first.outputs[0])
    for request in (one, two):
        request.bind_device("b", between)
    c[...] = 0
    assert crossing - both() == pytest.approx(2 * (1e-5 + SIZE / 1e9))
    np.testing.assert_array_equal(c, 4 * a)
    one.bind("b", b), two.bind("b", b)
    assert both() == pytest.approx(crossing)


def test_the_probe_of_a_boundary_leaves_the_tensor_where_the_engine_does() -> None:
    """Each stage alone copies what it reads and writes: staying there saves both copies of what is handed over."""
    copies_s = 2 * (1e-5 + SIZE / 1e9)
    backend, (card, other) = backend_of(CARD, replace(OTHER, copy_bytes_per_s=1e9, copy_s=1e-5))
    first, second = executable(backend, card, reads="a", writes="b"), executable(backend, card, reads="b", writes="c")
    found = measured(chained((first, second), SIZE))
    assert found["cost_s"] == pytest.approx(-copies_s)
    assert found["source_s"] == found["destination_s"] == pytest.approx(copies_s + 1e-6 + (2 * SIZE + 4) / 100e9, rel=1e-3)
    elsewhere = executable(backend, other, reads="b", writes="c")
    assert measured(chained((first, elsewhere), SIZE))["cost_s"] == pytest.approx(0, abs=1e-12)  # both copies are in the stages alone


def test_a_callers_tensor_is_taken_where_it_is_and_others_are_refused() -> None:
    backend, (card, other) = backend_of(CARD, OTHER)
    stage = executable(backend, card, reads="a", writes="b")
    (spec,) = stage.inputs
    tensor = stage.device_tensor(spec)
    assert stage.from_dlpack(tensor, spec) is tensor
    with pytest.raises(UsageError, match=r"does not lie in null:GPU\.0"):
        stage.from_dlpack(executable(backend, other, reads="a", writes="b").device_tensor(spec), spec)
    with pytest.raises(UsageError, match="was given as"):
        stage.from_dlpack(NullTensor(np.zeros(3, np.float32), stage.memory), spec)
    request: DeviceRequest = NullCardRequest(stage)
    request.bind_device("a", tensor)
    with pytest.raises(TypeError, match=r"lies in the memory of null:GPU\.0"):
        np.asarray(tensor)

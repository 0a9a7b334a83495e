"""Copies from, to and between NVIDIA's cards: every byte arrives, whichever way and whatever memory."""

from __future__ import annotations

import numpy as np
import pytest

from aivmm.errors import Unsupported
from aivmm.runtime.cuda import is_pinned
from aivmm.runtime.cuda_copies import CardCopier, index_of
from aivmm.runtime.onnxruntime import OnnxRuntime
from aivmm.runtime.target import Device, Target

SIZE = (5 << 20) + 3


def cards(*names: str) -> list[Target]:
    found = [OnnxRuntime().find(each) for each in names]
    assert all(isinstance(each, Target) for each in found)
    return [each for each in found if isinstance(each, Target)]


def arrives(copier: CardCopier, *, from_host: bool, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, SIZE).astype(np.uint8)
    if from_host:
        copier.host[...] = data
    else:
        copier.fill(data)
    copier.run()
    np.testing.assert_array_equal(copier.arrived(), data)


@pytest.mark.gpu
def test_every_byte_arrives_on_every_way_of_a_card() -> None:
    backend = OnnxRuntime()
    routes = backend.routes(cards("CUDA:0"))
    assert len(routes) == 5
    for seed, route in enumerate(routes):
        copier = backend.copier(route, SIZE)
        assert (route.source is not None and route.destination is not None) or is_pinned(copier.host) == route.pinned
        for turn in range(3):
            arrives(copier, from_host=route.source is None, seed=10 * seed + turn)
        copier.close()
        copier.close()


@pytest.mark.gpu(count=2)
def test_every_byte_arrives_between_two_cards() -> None:
    backend = OnnxRuntime()
    both = [each for each in backend.routes(cards("CUDA:0", "CUDA:1")) if each.source and each.destination]
    assert len(both) == 4
    for seed, route in enumerate(both):
        arrives(backend.copier(route, SIZE), from_host=False, seed=seed)


@pytest.mark.gpu
def test_more_than_a_card_has_is_refused_and_leaves_nothing_behind() -> None:
    backend = OnnxRuntime()
    (card,) = cards("CUDA:0")
    route = backend.routes([card])[0]
    for _ in range(3):
        with pytest.raises(Unsupported, match="CUDA could not have"):
            backend.copier(route, 4 * (card.device.memory_bytes or 1 << 40))
    arrives(backend.copier(route, SIZE), from_host=True, seed=0)


def test_cards_are_listed_once_whatever_provider_names_them() -> None:
    device = Device(kind="gpu", model="made-up")
    named = [
        Target(runtime="onnxruntime", name=name, device=device, runtime_version="1") for name in ("CUDA:1", "TensorRT:0", "CUDA:0", "CPU")
    ]
    ends = [each.ends for each in OnnxRuntime().routes(named)]
    assert len(ends) == len(set(ends)) == 2 * 4 + 4
    assert ends[0] == ("host pageable", "onnxruntime:TensorRT:0 memory")  # the first that was named
    assert [index_of(each) for each in named] == [1, 0, 0, 0]

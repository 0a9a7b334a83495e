"""A sample of `benchmarks/search.py`: its truth is what brute force says, and its ways are held to equal trials."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.search import CHOOSING, WAYS, Bench
from benchmarks.search_instances import Chance, Instance, Segmentations, policies


@pytest.fixture(scope="module")
def instance() -> Instance:
    return Instance(3, blocks=6)


def test_the_placement_inside_is_what_trying_every_segmentation_gives(instance: Instance) -> None:
    chance = np.random.default_rng(1)
    seen = 0
    for _ in range(60):
        point = instance.space.point(Chance(chance))
        if point.policy is None:
            continue
        seen += 1
        assert point.policy in policies(point.policy.targets)
        costs, boundary, rows = instance.prices(point.policy.targets, point.batch)
        every = Segmentations(instance.blocks, len(rows))
        inside, between = every.price(costs, boundary)
        at = every.least(inside, between, point.policy)
        assert instance.plan(point).segments == tuple((first, last, rows[on]) for first, last, on in every.segments[at])
    assert seen > 10


@pytest.mark.parametrize("way", sorted(WAYS))
def test_each_way_spends_the_same_trials_and_chooses_what_keeps_the_limits(instance: Instance, way: str) -> None:
    again = sum(most * times for most, times in CHOOSING)
    bench = Bench(instance, 0)
    WAYS[way](bench, 30)
    assert bench.count == 30
    chosen = bench.chosen()
    assert bench.count <= 30 + again and instance.keeps(chosen)

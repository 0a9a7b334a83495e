"""Placement under a policy, against every segmentation."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivmm.errors import Infeasible
from aivmm.planner.policy import place_under, priced

Array = npt.NDArray[np.float64]


def every(blocks: int, width: int, most: int, contiguous: bool) -> list[tuple[tuple[int, int, int], ...]]:
    found = []
    for on in itertools.product(range(width), repeat=blocks):
        edges = [0, *(at for at in range(1, blocks) if on[at] != on[at - 1]), blocks]
        segments = tuple((a, b - 1, on[a]) for a, b in itertools.pairwise(edges))
        columns = [column for _, _, column in segments]
        if len(segments) <= most and (not contiguous or len(set(columns)) == len(columns)):
            found.append(segments)
    return found


@st.composite
def chains(draw: st.DrawFn) -> tuple[Array, Array]:
    blocks, width = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    number = st.integers(0, 9).map(float)
    costs = np.array(draw(st.lists(st.lists(number | st.just(np.inf), min_size=width, max_size=width), min_size=blocks, max_size=blocks)))
    steps = draw(st.lists(number, min_size=(blocks - 1) * width * width, max_size=(blocks - 1) * width * width))
    return costs, np.array(steps, dtype=np.float64).reshape(blocks - 1, width, width)


@given(chains(), st.integers(1, 4), st.sampled_from([0.5, 1.0, 4.0]), st.booleans())
def test_no_segmentation_that_a_policy_allows_is_cheaper_at_its_prices(
    chain: tuple[Array, Array], most: int, price: float, contiguous: bool
) -> None:
    costs, boundary = chain
    allowed = [each for each in every(*costs.shape, most, contiguous) if np.isfinite(priced(each, costs, boundary))]
    if not allowed:
        with pytest.raises(Infeasible):
            place_under(costs, boundary, most_pieces=most, cut_price=price, contiguous=contiguous)
        return
    found = place_under(costs, boundary, most_pieces=most, cut_price=price, contiguous=contiguous)
    least = min(priced(each, costs, boundary * price) for each in allowed)
    assert found.segments in allowed
    assert priced(found.segments, costs, boundary * price) == pytest.approx(least)
    assert found.cost_s == pytest.approx(priced(found.segments, costs, boundary))


def test_a_dearer_cut_is_taken_less_often() -> None:
    costs = np.array([[1.0, 3.0], [3.0, 1.0], [1.0, 3.0], [3.0, 1.0]])
    boundary = np.full((3, 2, 2), 0.5)
    pieces = [len(place_under(costs, boundary, most_pieces=4, cut_price=price, contiguous=False).segments) for price in (1.0, 3.0, 99.0)]
    assert pieces == sorted(pieces, reverse=True) and pieces[0] == 4 and pieces[-1] == 1

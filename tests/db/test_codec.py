"""Records to columns and back."""

from __future__ import annotations

import threading
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivmm.db import codec
from aivmm.probes.records import ProbeKey, Samples
from aivmm.runtime.config import Config

durations = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
rounds = st.integers(min_value=0, max_value=2**32 - 1)


@st.composite
def samples(draw: st.DrawFn) -> Samples:
    timed = draw(st.lists(durations, min_size=1, max_size=50))
    numbered = draw(st.booleans())
    return Samples(
        timed_s=tuple(timed),
        rounds=tuple(draw(st.lists(rounds, min_size=len(timed), max_size=len(timed)))) if numbered else (),
        warmup_s=tuple(draw(st.lists(durations, max_size=5))),
    )


@given(samples())
def test_samples_come_back_as_they_were_to_the_last_bit(taken: Samples) -> None:
    back = codec.unpack_samples(codec.pack_samples(taken))
    assert back == taken
    assert all(type(each) is float for each in back.timed_s)
    assert all(type(each) is int for each in back.rounds)


@given(samples(), st.data())
def test_samples_that_lost_bytes_are_not_read_as_something_else(taken: Samples, data: st.DataObject) -> None:
    blob = codec.pack_samples(taken)
    with pytest.raises(ValueError):
        codec.unpack_samples(blob[: data.draw(st.integers(0, len(blob) - 1))])
    with pytest.raises(ValueError):
        codec.unpack_samples(blob + b"\0" * data.draw(st.integers(1, 20)))


def test_a_round_that_does_not_fit_is_refused() -> None:
    for number in (-1, 2**32):
        with pytest.raises(ValueError, match="rounds"):
            codec.pack_samples(Samples(timed_s=(1.0,), rounds=(number,)))


@given(st.text(st.characters(codec=None)))
def test_cleaned_text_is_text_that_every_database_takes(text: str) -> None:
    cleaned = codec.clean(text)
    assert "\0" not in cleaned
    assert cleaned.encode().decode() == cleaned
    if text.isprintable() and "\0" not in text:
        assert cleaned == text


def test_ids_are_uuids_of_version_7_in_the_order_they_were_made_also_by_threads() -> None:
    made: list[list[str]] = [[] for _ in range(4)]
    threads = [threading.Thread(target=lambda mine=mine: mine.extend(codec.new_id() for _ in range(2000))) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine == sorted(mine) for mine in made)
    everything = [each for mine in made for each in mine]
    assert len(set(everything)) == 8000
    assert {(len(each), uuid.UUID(each).version, uuid.UUID(each).variant) for each in everything} == {(32, 7, uuid.RFC_4122)}


def test_a_key_has_the_same_digest_for_ever() -> None:
    """Rows of years ago, and of other machines, are found by it: this value never changes."""
    key = ProbeKey(
        kind="segment", subject="s", target="null:0", environment="e", config=Config.of({"b": 1, "a": True}, precision="fp32"), batch=2
    )
    assert codec.key_digest(key) == "26923ad334114ff9c98f09fb0998b044"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_only_finite_numbers_are_stored(value: float) -> None:
    with pytest.raises(ValueError, match="cosine"):
        codec.finite("cosine", value)
    with pytest.raises(ValueError):
        codec.dump_json({"a": [value]})

"""What has no room in a device's memory is not asked for."""

from __future__ import annotations

import pytest

from aivmm.planner.candidates import Candidate, Rejection, Score
from aivmm.planner.room import Room, possible
from aivmm.runtime.config import Config
from aivmm.runtime.no_room import is_no_room
from aivmm.runtime.target import Device, Target

GB = 10**9
CARD = Target(runtime="onnxruntime", name="CUDA:0", device=Device(kind="gpu", model="card", memory_bytes=8 * GB), runtime_version="1")
HOST = Target(runtime="onnxruntime", name="CPU", device=Device(kind="cpu", model="host"), runtime_version="1")
SEEN = [  # what ONNX Runtime's arena, and the null backend, were seen to say
    "ONNX Runtime while running: 1 : FAIL : Non-zero status code returned while running Expand node. Name:'ex' Status Message: "
    "bfc_arena.cc:360 void* onnxruntime::BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 112000000000",
    "BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::Stream*) Available memory of 1072693248 is smaller than requested bytes of 4",
    "model needs 3000000000 bytes, null:GPU.0 has 2000000000",
    "CUDA failure 2: out of memory ; GPU=0",
]


def at(batch: int, callers: int = 1, *, target: Target = CARD, precision: str | None = "fp32") -> Candidate:
    return Candidate(target=target, config=Config(precision=precision), batch=batch, callers=callers)


def scored(held: float) -> Score:
    return Score(ratio=1.0, low=0.9, high=1.1, cosine=1.0, metrics={"device_memory": held}, seconds=1.0, reused=False, median_s=0.01)


@pytest.mark.parametrize("words", SEEN)
def test_words_of_a_full_memory_are_known(words: str) -> None:
    assert is_no_room(words)


@pytest.mark.parametrize("words", ["does not support Det", "no setting 'x'", "the model needs an input", "cosine 0.9 is below 0.999"])
def test_other_refusals_are_not_taken_for_it(words: str) -> None:
    assert not is_no_room(words)


@pytest.mark.parametrize(("batch", "callers", "fits"), [(16, 1, True), (32, 2, False), (64, 2, False), (32, 3, False), (64, 1, True)])
def test_more_of_what_had_no_room_is_not_asked_for_and_less_is(batch: int, callers: int, fits: bool) -> None:
    room = Room()
    room.learn(at(32, 2), Rejection(state="refused", reason=SEEN[0]))
    assert (room.why_not(at(batch, callers)) is None) == fits
    assert room.why_not(at(batch, callers, precision="fp16:ort-half")) is None, "half of the bytes may fit"
    assert room.why_not(at(batch, callers, target=HOST)) is None


def test_a_line_through_what_was_measured_says_what_does_not_fit() -> None:
    room = Room()
    room.learn(at(1), scored(1.0 * GB))
    assert room.why_not(at(512)) is None, "one point makes no line"
    room.learn(at(8), scored(1.7 * GB))
    assert room.expected_bytes(at(32)) == pytest.approx(4.1 * GB)
    assert room.why_not(at(64)) is None
    refused = room.why_not(at(128))
    assert refused is not None and "13.7 GB" in refused.reason and "8.0 GB" in refused.reason
    assert room.why_not(at(16, callers=8)) is not None


def test_a_refusal_for_another_reason_rules_out_nothing_else() -> None:
    room = Room()
    room.learn(at(1), Rejection(state="refused", reason="no such setting"))
    assert room.why_not(at(64)) is None


def test_batches_whose_tensors_alone_fit_nowhere_are_not_in_the_space() -> None:
    sizes = {"weight_bytes": 2 * GB, "sample_bytes": GB // 10}
    assert possible((1, 8, 64), [CARD], **sizes) == (1, 8)
    assert possible((1, 8, 64), [CARD, HOST], **sizes) == (1, 8, 64), "the host has no limit of its own"
    assert possible((256,), [CARD], **sizes) == (256,), "the only one stays, to be refused with the runtime's words"

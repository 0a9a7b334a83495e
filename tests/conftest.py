"""What holds for all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import cache

import pytest

from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Target, Unavailable, matches

# A shell that starts us in the background (`pytest &`, nohup) has SIGINT ignored, and every process that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines keep compiled stages: here and not in the folder of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIVMM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `gpu` where its target is absent, with the reason that discovery gives for it.

    `@pytest.mark.gpu` is a test of NVIDIA cards, `@pytest.mark.gpu("openvino:GPU")` one of another target; `count=2` asks for two of them.
    """
    mark = item.get_closest_marker("gpu")
    if mark is not None:
        pattern = mark.args[0] if mark.args else "onnxruntime:CUDA"
        found, reason = targets_like(pattern)
        wanted = mark.kwargs.get("count", 1)
        if len(found) < wanted:
            pytest.skip(reason if not found else f"{len(found)} of {wanted} {pattern} that it needs are here")


@cache
def targets_like(pattern: str) -> tuple[tuple[Target, ...], str]:
    """Return the targets of this machine that `pattern` names, and when there are none, why."""
    everything = _targets(pattern.partition(":")[0])
    found = tuple(each for each in everything if isinstance(each, Target) and matches(pattern, str(each)))
    absent = [str(each) for each in everything if not isinstance(each, Target) and matches(pattern, each.target)]
    return found, "; ".join(absent) or f"no {pattern} is here"


@cache
def _targets(runtime: str) -> tuple[Target | Unavailable, ...]:
    return tuple(load_backend(runtime).targets())

"""What holds for all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

# A shell that starts us in the background (`pytest &`, nohup) has SIGINT ignored, and every process that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines keep compiled stages: here and not in the folder of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIVMM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield

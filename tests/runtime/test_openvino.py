"""OpenVINO passes the contract, and what is special about it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from aivmm.runtime.backend import Backend
from aivmm.runtime.openvino import OpenVino
from tests.contracts import BackendContract


class TestOpenVino(BackendContract):
    @pytest.fixture
    def backend(self) -> Backend:
        return OpenVino()


def test_importing_openvino_through_us_loads_no_telemetry() -> None:
    code = "import sys; from aivmm.runtime.openvino import OpenVino; OpenVino().targets(); print('openvino_telemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_missing_driver_is_a_reason_and_a_remedy() -> None:
    absent = [each for each in OpenVino().targets() if not hasattr(each, "device")]
    for each in absent:
        assert each.reason and "site-packages" not in each.reason
        assert each.advice

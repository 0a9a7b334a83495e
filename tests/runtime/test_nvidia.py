"""NVIDIA's cards as CUDA numbers them, and its libraries in wheels. Cards are real and on GPU machines only; libraries can be planted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aivmm.errors import Unsupported
from aivmm.runtime.config import Config
from aivmm.runtime.nvidia import cuda_devices, driver_advice, missing_library, same_card
from aivmm.runtime.nvml import nvidia_devices
from aivmm.runtime.onnxruntime import OnnxRuntime
from aivmm.runtime.ort_options import NVIDIA, PROVIDERS
from aivmm.runtime.target import Device, Target, Unavailable
from tests.contract_models import relu_model


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("GPU-3735863d-e7b0-d9b7-74dd-909e838c722a", "3735863de7b0d9b774dd909e838c722a", True),
        ("MIG-3735863d-e7b0-d9b7-74dd-909e838c722a", "3735863DE7B0D9B774DD909E838C722A", True),
        ("GPU-3735863d-e7b0-d9b7-74dd-909e838c722a", "3735863de7b0d9b774dd909e838c722b", False),
        ("", "", False),
    ],
)
def test_a_card_is_known_however_its_id_is_written(one: str, other: str, same: bool) -> None:
    assert same_card(one, other) == same


def test_the_library_that_a_provider_lacks_is_named(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("reads the words of Linux's loader")
    for name in ("libnobody.so.7", "libprovider.so"):
        needs = [] if name.startswith("libnobody") else ["-L", str(tmp_path), "-l:libnobody.so.7"]
        made = subprocess.run(
            ["cc", "-shared", "-Wl,--no-as-needed", "-o", str(tmp_path / name), "-x", "c", "/dev/null", "-x", "none", *needs],
            capture_output=True,
            text=True,
        )
        if made.returncode:
            pytest.skip(f"no C compiler here ({made.stderr.strip()[-80:]})")
    (tmp_path / "libnobody.so.7").unlink()
    assert missing_library(tmp_path / "libprovider.so") == "libnobody.so.7"
    assert missing_library(tmp_path / "libabsent.so") == ""


def test_libraries_in_wheels_are_loaded_from_wherever_pip_put_them(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("plants a library as Linux names them")
    # Any shared library does as a stand-in; what is looked at is the file that the process has mapped.
    import _ctypes

    for folder in ("nvidia/cu13/lib", "nvidia/cudnn/lib"):
        (tmp_path / folder).mkdir(parents=True)
    planted = tmp_path / "nvidia/cu13/lib/libcudart.so.13"
    planted.write_bytes(Path(_ctypes.__file__).read_bytes())
    (tmp_path / "nvidia/cudnn/lib/libcudnn.so.9").write_bytes(b"no library")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from aivmm.runtime.nvidia import libraries_loaded as f;"
        "print(*f(), sep=chr(10)); print(open('/proc/self/maps').read().count('libcudart'))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *loaded, mapped = ran.stdout.splitlines()
    assert str(planted) in loaded and not any("libcudnn.so.9" in each and str(tmp_path) in each for each in loaded), ran.stderr
    assert int(mapped) > 0


@pytest.mark.parametrize(("build", "loaded"), [("13.0", "12"), ("12.8", "13")])
def test_cudas_library_is_the_one_that_onnx_runtime_links_against_whatever_others_loaded(build: str, loaded: str, tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("plants libraries as Linux names them")
    wanted = build.partition(".")[0]
    wheel, others = tmp_path / "nvidia/cu/lib", tmp_path / "others"
    for folder, version in ((wheel, wanted), (others, loaded)):
        folder.mkdir(parents=True)
        name = f"libcudart.so.{version}"
        made = subprocess.run(
            ["cc", "-shared", f"-Wl,-soname,{name}", "-o", str(folder / name), "-x", "c", "-"],
            input=f"int which(void) {{ return {version}; }} const char *cudaGetErrorString(int code) {{ return 0; }}",
            capture_output=True,
            text=True,
        )
        if made.returncode:
            pytest.skip(f"no C compiler here ({made.stderr.strip()[-80:]})")
    code = (
        f"import ctypes, sys; sys.path.insert(0, {str(tmp_path)!r}); ctypes.CDLL({str(others / f'libcudart.so.{loaded}')!r});"
        f"from onnxruntime.capi import build_and_package_info; build_and_package_info.cuda_version = {build!r};"
        "from aivmm.runtime.cuda import _library; print(_library().which())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == wanted, ran.stderr


def test_without_a_card_the_reason_is_the_driver_and_not_the_libraries() -> None:
    devices, reason = cuda_devices()
    if devices:
        pytest.skip("this machine has a card")
    assert "no NVIDIA driver" in reason
    absent = [each for each in OnnxRuntime().targets() if isinstance(each, Unavailable) and each.target.split(":")[1] in NVIDIA]
    for each in absent:  # who does the one finds the other missing next
        assert each.reason == reason and "driver" in each.advice and PROVIDERS[each.target.split(":")[1]].advice in each.advice


@pytest.mark.parametrize(
    ("reason", "does"),
    [
        ("no NVIDIA driver (libcuda.so.1 is missing)", "install the NVIDIA driver"),
        ("CUDA shows no card (CUDA_VISIBLE_DEVICES is '')", "unset CUDA_VISIBLE_DEVICES"),
        ("CUDA's driver failed (no device in cuInit), though NVML sees A Card (CUDA_VISIBLE_DEVICES is '7')", "unset CUDA_VISIBLE_DEVICES"),
        ("CUDA's driver failed (unknown error in cuInit)", "nvidia-smi"),
    ],
)
def test_no_driver_is_advised_where_there_is_one(reason: str, does: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert does in driver_advice(reason)
    assert ("install" in driver_advice(reason)) == reason.startswith("no NVIDIA driver")
    monkeypatch.setattr("aivmm.runtime.onnxruntime.cuda_devices", lambda: ((), reason))
    absent = [each for each in OnnxRuntime().targets() if isinstance(each, Unavailable) and each.target.split(":")[1] in NVIDIA]
    assert all(does in each.advice for each in absent)


def test_a_card_that_the_environment_hides_from_cuda_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise Unsupported("CUDA's driver failed (no CUDA-capable device is detected in cuInit)")

    card = Device(kind="gpu", model="A Card", uid="GPU-3735863d-e7b0-d9b7-74dd-909e838c722a")
    monkeypatch.setattr("aivmm.runtime.nvidia._driver", failing)
    monkeypatch.setattr("aivmm.runtime.nvidia.nvidia_devices", lambda: ((card,), ""))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found, reason = cuda_devices.__wrapped__()
    assert found == () and "NVML sees A Card" in reason and "unset CUDA_VISIBLE_DEVICES" in driver_advice(reason)


@pytest.mark.parametrize("problem", ["no NVIDIA driver (libcuda.so.1 is missing)", "CUDA's driver failed (unsupported driver in cuInit)"])
def test_what_has_another_reason_is_not_laid_to_the_environment(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise Unsupported(problem)

    card = Device(kind="gpu", model="A Card", uid="GPU-3735863d-e7b0-d9b7-74dd-909e838c722a")
    monkeypatch.setattr("aivmm.runtime.nvidia._driver", failing)
    monkeypatch.setattr("aivmm.runtime.nvidia.nvidia_devices", lambda: ((card,), ""))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # as schedulers always set it
    _, reason = cuda_devices.__wrapped__()
    assert "NVML sees A Card" in reason and "CUDA_VISIBLE_DEVICES" not in reason + driver_advice(reason)


@pytest.mark.parametrize("kind", [each for each in PROVIDERS if each != "CPU"])
def test_each_provider_has_its_options_in_the_table(kind: str) -> None:
    provider = PROVIDERS[kind]
    assert provider.options and set(provider.choices) <= provider.options
    assert not any("path" in option or "dir" in option.lower() for option in provider.options), "a plan may name no file"


@pytest.mark.gpu
def test_cudas_numbers_name_the_cards_that_nvml_knows() -> None:
    (card, *_), _ = cuda_devices()
    assert card.uid in [each.uid for each in nvidia_devices()[0]]
    assert card.driver and card.memory_bytes and float(str(card.properties["compute_capability"])) >= 5


@pytest.mark.gpu
def test_a_hidden_card_is_a_reason() -> None:
    code = "from aivmm.runtime.nvidia import cuda_devices; print(cuda_devices())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**_environment(), "CUDA_VISIBLE_DEVICES": ""})
    assert "NVML sees" in ran.stdout or "CUDA_VISIBLE_DEVICES is ''" in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.gpu
def test_cuda_runs_without_a_library_path() -> None:
    code = (
        "from aivmm.runtime.onnxruntime import OnnxRuntime; from aivmm.runtime.nvidia import libraries_loaded as f;"
        "print([str(each) for each in OnnxRuntime().targets()]); print(len(f())); print(open('/proc/self/maps').read())"
    )
    environment = {name: value for name, value in _environment().items() if name != "LD_LIBRARY_PATH"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert "onnxruntime:CUDA:0" in ran.stdout, ran.stdout + ran.stderr
    if int(ran.stdout.splitlines()[1]):  # there are wheels: then theirs is the one that was taken
        assert any("libcublasLt.so" in line and "nvidia" in line for line in ran.stdout.splitlines())


@pytest.mark.gpu
def test_a_card_that_is_not_there_is_refused_in_the_runtimes_words() -> None:
    found = OnnxRuntime().find("CUDA:0")
    assert isinstance(found, Target)
    absent = Target(runtime="onnxruntime", name="CUDA:77", device=found.device, runtime_version=found.runtime_version)
    with pytest.raises(Unsupported, match="77"):
        OnnxRuntime().compile(relu_model(4), absent, Config())


def test_the_extra_brings_what_the_provider_links_against() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert "onnxruntime-gpu[cuda,cudnn]" in project["optional-dependencies"]["cuda"][0]
    assert "[cuda]" in PROVIDERS["CUDA"].advice


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)

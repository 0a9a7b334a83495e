"""What is shipped: the wheel, and what it says that it depends on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.test_architecture import imports_of

ROOT = Path(__file__).parent.parent
MODULES = {
    "onnxruntime-gpu": "onnxruntime",
    "onnx-ir": "onnx_ir",
    "nvidia-ml-py": "pynvml",
    "ml-dtypes": "ml_dtypes",
    "protobuf": "google",
    "prometheus-client": "prometheus_client",
}  # where the import has another name


def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The built wheel. Built from a copy, since setuptools leaves a build folder and an egg-info where it works."""
    source, out = tmp_path_factory.mktemp("source") / "aivmm", tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so what belongs to the source cannot be told")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return zipfile.ZipFile(built("--wheel", source, out))


def built(kind: str, source: Path, out: Path) -> Path:
    """Build a wheel or a source distribution with the setuptools that pyproject.toml asks for, and return its file."""
    backend = Requirement(project()["build-system"]["requires"][0])
    have = importlib.util.find_spec("setuptools") and Version(importlib.metadata.version("setuptools"))
    alone = ["--no-isolation"] if have and have in backend.specifier else []  # else the build fetches what it requires
    build = [sys.executable, "-m", "build", kind, *alone, "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=280)
    if done.returncode and not alone and re.search(r"No matching distribution|Connection|Temporary failure", done.stdout + done.stderr):
        pytest.skip(f"{backend} is not here and cannot be fetched")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.iterdir()
    return found


def test_the_wheel_holds_aivmm_and_nothing_else_at_its_top(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert "aivmm" in tops
    assert all(top == "aivmm" or re.fullmatch(r"aivmm-[\d.]+\.dist-info", top) for top in tops)


def test_the_wheel_holds_every_module_and_every_data_file(wheel: zipfile.ZipFile) -> None:
    folders = {name: ROOT / folder for name, folder in project()["tool"]["setuptools"]["package-dir"].items()}
    held = set(wheel.namelist())
    missing = []
    for package, folder in folders.items():
        for file in folder.glob("*"):
            if file.is_file() and not file.name.startswith(".") and file.suffix not in (".pyc", ".md", ".c", ".h", ".so", ".pyd"):
                name = f"{package.replace('.', '/')}/{file.name}"
                missing += [name] * (name not in held)
    assert missing == []
    assert {"aivmm/py.typed", "aivmm/__init__.py", "aivmm/db/migrations/env.py"} <= held
    assert any(name.startswith("aivmm/db/migrations/versions/0001") for name in held)
    assert any(name.startswith("aivmm/reports/templates/") for name in held)


def test_the_wheel_holds_the_hot_path_in_c_where_there_is_a_compiler(wheel: zipfile.ZipFile) -> None:
    compiler = (sysconfig.get_config_var("CC") or "cl").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} is here, so the wheel is without it")
    assert f"aivmm/runtime/_hot{sysconfig.get_config_var('EXT_SUFFIX')}" in wheel.namelist()
    assert not [name for name in wheel.namelist() if name.endswith((".c", ".h"))]


def test_the_source_that_is_built_is_in_a_source_distribution(tmp_path: Path) -> None:
    for name in (
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
        "runtime/_hot.c",
        "runtime/_hot_answer.h",
        "runtime/_hot_clock.h",
        "runtime/__init__.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for folder in project()["tool"]["setuptools"]["package-dir"].values():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    with tarfile.open(built("--sdist", tmp_path, tmp_path / "out")) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "runtime/_hot.c", "runtime/_hot_answer.h", "runtime/_hot_clock.h"} <= inside


def test_every_folder_with_modules_is_a_package_of_the_wheel() -> None:
    found = project()["tool"]["setuptools"]
    mapped = {str((ROOT / folder).relative_to(ROOT)) for folder in found["package-dir"].values()}
    code = {str(file.parent.relative_to(ROOT)) for folder in mapped for file in (ROOT / folder).rglob("*.py")}
    assert {folder.replace("\\", "/") for folder in code} == {folder.replace("\\", "/") for folder in mapped}
    assert set(found["packages"]) == set(found["package-dir"])


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode()
    assert "Requires-Python: >=3.11" in metadata and "License-Expression: Apache-2.0" in metadata
    assert any(each.endswith("licenses/LICENSE") for each in wheel.namelist())
    scripts = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "aivmm = aivmm.tuner.main:main\n" in scripts and "aivmm-tune = aivmm.tuner.main:main_tune" in scripts


def dependencies() -> list[tuple[Requirement, str]]:
    """Return each dependency with the file that the comment beside it names."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text[text.index("\ndependencies = [") :]
    block = block[: block.index("\n]")]
    return [(Requirement(found[1]), found[2]) for found in re.finditer(r'^  "([^"]+)",  # (\S+)$', block, re.MULTILINE)]


def test_each_dependency_names_a_file() -> None:
    assert [str(each) for each, _ in dependencies()] == [str(Requirement(each)) for each in project()["project"]["dependencies"]]


@pytest.mark.parametrize(
    ("requirement", "file"),
    dependencies(),
    ids=lambda each: each.name if isinstance(each, Requirement) else "",
)
def test_the_file_that_a_dependency_names_imports_it(requirement: Requirement, file: str) -> None:
    module = MODULES.get(requirement.name, requirement.name)
    assert module in {each.partition(".")[0] for each in imports_of(ROOT / file)}, f"{file} does not import {module}"


def test_what_production_needs_is_a_part_of_what_is_needed_with_the_same_versions() -> None:
    needed = project()["project"]["dependencies"]
    production = project()["dependency-groups"]["production"]
    assert production == [each for each in needed if each in production]
    assert {Requirement(each).name for each in production} >= {"numpy", "openvino", "onnxruntime-gpu", "onnxruntime"}
    assert {"onnx", "optuna", "pandas", "matplotlib", "sqlalchemy"}.isdisjoint(Requirement(each).name for each in production)


def test_exactly_one_onnx_runtime_is_installed_on_any_machine() -> None:
    wheels = [each for each, _ in dependencies() if each.name.startswith("onnxruntime")]
    for platform, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("win32", "AMD64"), ("win32", "ARM64"), ("darwin", "arm64")):
        chosen = [
            each.name
            for each in wheels
            if each.marker is None or each.marker.evaluate({"sys_platform": platform, "platform_machine": machine})
        ]
        assert chosen == ["onnxruntime-gpu" if (platform, machine) in (("linux", "x86_64"), ("win32", "AMD64")) else "onnxruntime"]


def test_every_library_that_is_imported_is_a_dependency() -> None:
    extras = [Requirement(each) for name, some in project()["project"]["optional-dependencies"].items() if name != "test" for each in some]
    wanted = [*(each for each, _ in dependencies()), *extras]
    known = {MODULES.get(each.name, each.name) for each in wanted} | {"aivmm"} | sys.stdlib_module_names
    folders = project()["tool"]["setuptools"]["package-dir"].values()
    used = {each.partition(".")[0] for folder in folders for file in (ROOT / folder).glob("*.py") for each in imports_of(file)}
    assert used - known <= {"openvino_telemetry", ""}

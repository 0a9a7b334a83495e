"""The table of backends, and plug-ins beside it: real distributions written to a folder on the path, nothing patched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aivmm.errors import UsageError
from aivmm.runtime.backend import Backend
from aivmm.runtime.registry import BACKENDS, backend_names, default_backends, load_backend

PLUG_IN = """
class {attribute}:
    name = "{name}"
    def targets(self): return []
    def knobs(self, target): return []
    def baselines(self, targets, objective): return []
    def compile(self, model, target, config): raise NotImplementedError
"""


def install(folder: Path, distribution: str, entry: str, source: str) -> None:
    """Write what `pip install` of a plug-in would leave in site-packages."""
    module = distribution.replace("-", "_")
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[aivmm.backends]\n{entry}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_known_backends_come_in_the_tables_order() -> None:
    assert backend_names()[:3] == ("openvino", "onnxruntime", "null") == tuple(BACKENDS)


def test_discovery_does_not_ask_the_null_backend_unless_told() -> None:
    assert "null" not in default_backends()
    assert {"openvino", "onnxruntime"} <= set(default_backends())


def test_the_null_backend_can_be_loaded() -> None:
    backend = load_backend("null")
    assert isinstance(backend, Backend)
    assert backend.name == "null"


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown backend 'tensorflow'; choose from openvino, onnxruntime, null"):
        load_backend("tensorflow")


def test_importing_the_registry_imports_no_runtime() -> None:
    code = "import sys, aivmm.runtime.registry; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"openvino", "onnxruntime", "onnx"}
    assert {each for each in loaded if each.startswith("aivmm.runtime.")} == {
        f"aivmm.runtime.{part}" for part in ("registry", "backend", "config", "target")
    }


def test_a_plug_in_is_found_and_loaded(site: Path) -> None:
    install(site, "acme-runtime", "acme = acme_runtime:Acme", PLUG_IN.format(attribute="Acme", name="acme"))
    assert backend_names()[-1] == "acme"
    assert "acme" in default_backends()
    assert type(load_backend("acme")).__name__ == "Acme"


def test_a_plug_in_cannot_take_the_name_of_one_of_ours(site: Path) -> None:
    install(site, "usurper", "openvino = usurper:Mine", PLUG_IN.format(attribute="Mine", name="openvino"))
    for ask in (backend_names, lambda: load_backend("some-other-plug-in")):
        with pytest.raises(UsageError, match=r"usurper registers a backend named 'openvino', which is one of .*; uninstall usurper"):
            ask()
    assert type(load_backend("openvino")).__module__ == "aivmm.runtime.openvino"


def test_two_plug_ins_cannot_share_a_name(site: Path) -> None:
    install(site, "first-one", "same = first_one:A", PLUG_IN.format(attribute="A", name="same"))
    install(site, "second-one", "same = second_one:B", PLUG_IN.format(attribute="B", name="same"))
    with pytest.raises(UsageError, match=r"both register a backend named 'same'"):
        backend_names()


def test_a_plug_in_named_so_that_no_target_could_be_written_is_refused(site: Path) -> None:
    install(site, "colonist", "a.b = colonist:A", PLUG_IN.format(attribute="A", name="a.b"))
    with pytest.raises(UsageError, match=r"colonist registers a backend under the name 'a.b'"):
        backend_names()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_library_that_is_not_installed_here", "a_library_that_is_not_installed_here"),
        ("Other = 1", "has no attribute 'Broken'"),
    ],
)
def test_a_plug_in_that_cannot_be_imported_says_why(site: Path, source: str, reason: str) -> None:
    name = f"broken{len(source)}"  # a module's name is remembered by the process, so each case has its own
    install(site, name, f"{name} = {name}:Broken", source)
    with pytest.raises(UsageError, match=rf"backend '{name}' cannot be loaded: .*{reason}.*; reinstall {name}"):
        load_backend(name)


@pytest.mark.parametrize("source", [PLUG_IN.format(attribute="Odd", name="another"), "class Odd: name = 'odd{0}'"])
def test_a_plug_in_that_is_no_backend_of_that_name_is_refused(site: Path, source: str) -> None:
    name = f"odd{len(source)}"
    install(site, name, f"{name} = {name}:Odd", source.replace("odd{0}", name))
    with pytest.raises(UsageError, match=rf"is not a backend named '{name}'"):
        load_backend(name)

"""The folders' imports go one way, and what production needs stays small. Read from the sources: imports inside functions count."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.making import ONNXRUNTIME, Part, chain_model, make_bundle

ROOT = Path(__file__).parent.parent

# Folder -> the folders it may import, besides itself and the two leaves `aivmm.errors` and `aivmm.tensors`.
MAY_IMPORT = {
    "models": set(),
    "runtime": set(),
    "probes": {"models", "runtime"},
    "planner": {"models", "runtime", "probes"},
    "db": {"models", "runtime", "probes", "planner"},
    "reports": {"models", "runtime", "probes", "planner"},
    "tuner": {"models", "runtime", "probes", "planner", "db", "reports"},
    "api": {"models", "runtime", "probes", "planner", "db", "reports", "tuner"},
}
LEAVES = {"errors", "tensors"}

# Folder -> the modules of another folder that it may see, where that is not all of them.
ONLY_THESE = {("planner", "probes"): {"aivmm.probes.records"}}

# Libraries -> the folders (or files) that may import them. What is not listed here anyone may.
HEAVY = {
    "onnx": {"models", "probes", "reports", "tuner", "runtime/null_work.py"},
    "onnx_ir": {"models", "probes", "tuner"},
    "nncf": {"models"},
    "optuna": {"planner", "reports", "tuner"},
    "scipy": {"planner", "probes"},
    "sqlalchemy": {"db"},
    "alembic": {"db"},
    "pandas": {"db", "reports", "tuner", "api"},
    "pyarrow": {"db"},
    "matplotlib": {"reports"},
    "jinja2": {"reports"},
    "cryptography": {"runtime/signing.py"},
    "typer": {"tuner"},
    "pydantic": {"planner"},
    "rich": {"tuner"},
    "openvino": {"runtime", "models", "probes"},
    "onnxruntime": {"runtime", "models", "probes"},
    "prometheus_client": {"runtime/prometheus.py"},
}

_MODULE_WITH_ATTRIBUTE = re.compile(r"(aivmm(?:\.\w+)+):\w+")


def sources(folder: str) -> Iterator[Path]:
    return (ROOT / folder).rglob("*.py")


def module_of(file: Path) -> str:
    """Return the name under which a file of the repository is imported."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "api" else parts
    return ".".join(["aivmm", *(parts[:-1] if parts[-1:] == ["__init__"] else parts)])


def imported(source: str, module: str, *, package: bool) -> set[str]:
    """Return every module that a source imports, at any level: statements, `import_module("...")`, and tables of "module:attribute".

    `from aivmm import x` and `from aivmm.probes import x` count as importing both the package and `x` in it.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found |= {each.name for each in names}
            case ast.ImportFrom(module=stated, names=names, level=level):
                here = module.split(".")[: len(module.split(".")) - level + package] if level else []
                base = ".".join([*here, *([stated] if stated else [])])
                found |= {base, *(f"{base}.{each.name}" for each in names)}
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(value=str(called)), *_]):
                if name in ("import_module", "__import__", "find_spec", "run_module"):
                    found.add(called)
            case ast.Constant(value=str(text)) if named := _MODULE_WITH_ATTRIBUTE.fullmatch(text):
                found.add(named[1])
    return found


@cache  # each file is asked about once for each library
def imports_of(file: Path) -> set[str]:
    return imported(file.read_text(encoding="utf-8"), module_of(file), package=file.name == "__init__.py")


def folder_of(module: str) -> str | None:
    """Return the folder of ours that a module lies in; None for everyone else's and for the leaves."""
    top, _, rest = module.partition(".")
    first = rest.partition(".")[0]
    if top != "aivmm" or first in LEAVES:
        return None
    return first if first in MAY_IMPORT else "api"


def offences(folder: str, modules: set[str]) -> list[str]:
    """Return those of the imported `modules` that a file of `folder` may not see."""
    found = []
    for module in sorted(modules):
        # `from aivmm import errors` names the package, but means the leaf.
        if module == "aivmm" and any(each.startswith("aivmm.") for each in modules):
            continue
        other = folder_of(module)
        if other is None or other == folder:
            continue
        visible = ONLY_THESE.get((folder, other))
        within = visible is None or any(f"{each}.".startswith(f"{module}.") or f"{module}.".startswith(f"{each}.") for each in visible)
        if other not in MAY_IMPORT[folder] or not within:
            found.append(module)
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_flow_one_way(folder: str) -> None:
    seen = {str(file.relative_to(ROOT)): offences(folder, imports_of(file)) for file in sources(folder)}
    assert {file: modules for file, modules in seen.items() if modules} == {}


def test_the_leaves_import_nothing_of_ours() -> None:
    for leaf in LEAVES:
        assert not {each for each in imports_of(ROOT / "api" / f"{leaf}.py") if each.partition(".")[0] == "aivmm"}


@pytest.mark.parametrize("library", HEAVY)
def test_each_heavy_library_is_imported_where_it_belongs(library: str) -> None:
    strangers = [
        str(file.relative_to(ROOT))
        for folder in MAY_IMPORT
        for file in sources(folder)
        if any(each.partition(".")[0] == library for each in imports_of(file))
        and not {folder, file.relative_to(ROOT).as_posix()} & HEAVY[library]
    ]
    assert strangers == []


def test_nothing_can_flow_in_a_circle() -> None:
    reached: set[str] = set()
    while layer := {folder for folder, below in MAY_IMPORT.items() if below <= reached} - reached:
        reached |= layer
    assert reached == set(MAY_IMPORT)


def test_every_package_has_its_place_in_the_order() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = project["tool"]["setuptools"]["package-dir"]
    assert {path.partition("/")[0] for path in folders.values()} == set(MAY_IMPORT)
    assert set(project["tool"]["setuptools"]["packages"]) == set(folders)
    holders = {f"{folder}" for folder in MAY_IMPORT for _ in sources(folder)}
    packages = {module_of(file) for folder in holders for file in sources(folder) if file.name == "__init__.py"}
    assert packages == set(folders), "a folder that is not listed is not in the wheel"


@pytest.mark.parametrize(
    ("folder", "source", "caught"),
    [
        ("runtime", "import aivmm.probes.records", "aivmm.probes.records"),
        ("runtime", "def f():\n    from aivmm.planner import chain", "aivmm.planner"),
        ("runtime", "from ..models import load", "aivmm.models"),
        ("runtime", "from .. import models", "aivmm.models"),
        ("runtime", "from importlib import import_module\nimport_module('aivmm.tuner.main')", "aivmm.tuner.main"),
        ("runtime", "TABLE = {'x': 'aivmm.db.store:Store'}", "aivmm.db.store"),
        ("runtime", "from aivmm import tune", "aivmm.tune"),
        ("runtime", "import aivmm", "aivmm"),
        ("reports", "from aivmm.db import store", "aivmm.db"),
        ("planner", "from aivmm.probes import timer", "aivmm.probes.timer"),
        ("runtime", "from aivmm.errors import UsageError\nfrom aivmm import tensors\nfrom . import plan\nfrom .plan import Plan", ""),
        ("planner", "from aivmm.probes.records import Samples\nfrom aivmm.probes import records", ""),
        ("db", "DATABASE = 'aivmm.db'", ""),
    ],
)
def test_the_check_sees_each_way_to_import(folder: str, source: str, caught: str) -> None:
    found = offences(folder, imported(source, f"aivmm.{folder}.sample", package=False))
    assert found[:1] == ([caught] if caught else [])


def test_relative_imports_are_resolved_in_packages_too() -> None:
    assert imported("from . import b\nfrom .c import d", "aivmm.a", package=True) == {"aivmm.a", "aivmm.a.b", "aivmm.a.c", "aivmm.a.c.d"}


def modules_after(statement: str) -> set[str]:
    """Return the modules that a fresh process has more after `statement`, NumPy and what it needs left out."""
    code = f"import sys, numpy\nbefore = set(sys.modules)\n{statement}\nprint(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def loaded_after(statement: str) -> set[str]:
    """Return the top-level ones of `modules_after`."""
    return {each.partition(".")[0] for each in modules_after(statement)}


def test_importing_aivmm_is_light() -> None:
    assert not loaded_after("import aivmm; dir(aivmm); aivmm.__doc__") & {*HEAVY, "msgspec", "psutil"}


def test_loading_a_plan_imports_nothing_that_it_can_do_without(tmp_path: Path) -> None:
    """Each process in production waits for its imports: these take as long as opening a plan does, or many times as long."""
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(ONNXRUNTIME)])
    modules = modules_after(f"import aivmm\nwith aivmm.load_plan({str(bundle)!r}): pass\nassert 'onnxruntime' in sys.modules")
    slow = {"pydantic", "psutil", "platformdirs", "zipfile", "importlib.metadata", "asyncio", "aivmm.runtime.many", "aivmm.runtime.trace"}
    assert not modules & slow


def test_a_tune_starts_without_what_few_searches_ask_for() -> None:
    """Which knobs mattered is asked of longer searches alone, and scikit-learn takes a second to load."""
    assert not loaded_after("import aivmm.tuner.session") & {"sklearn", "pandas"}


def test_importing_all_of_the_runtime_loads_nothing_that_only_tuning_needs() -> None:
    modules = ", ".join(sorted(module_of(file) for file in sources("runtime")))
    tuning = {library for library, folders in HEAVY.items() if "runtime" not in folders}
    assert not loaded_after(f"import {modules}") & tuning

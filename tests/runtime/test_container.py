"""What docs/Dockerfile and the page on production claim, as far as it shows without a container."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle
from tests.runtime.test_engine_loading import TUNING

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = (ROOT / "docs" / "Dockerfile").read_text(encoding="utf-8")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="containers are Linux's")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("container")
    folder.chmod(0o755)
    return make_bundle(folder / "plan.aivmm", chain_model(), [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)])


def command_of_dockerfile() -> list[str]:
    found = re.search(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert found
    return [sys.executable, *json.loads(found[1])[1:]]


def run_bare(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run with nothing but a path in the environment and no standard input, as `docker run` does without -it."""
    kept = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)


def test_the_command_of_the_dockerfile_runs_without_a_home_and_without_the_tuning_half(plan: Path, tmp_path: Path) -> None:
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in sorted(TUNING) if not name.startswith("aivmm"))
    python, option, code = command_of_dockerfile()
    done = run_bare([python, option, f"import sys; {blocked}{code}"], plan.parent, AIVMM_CACHE=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout) == (0, "dict_keys(['y']) exact\n"), done.stderr


@pytest.mark.parametrize("home", [None, "/proc/nowhere"])
def test_a_home_that_is_missing_or_cannot_be_written_costs_only_the_cache(plan: Path, home: str | None) -> None:
    before = sorted(plan.rglob("*"))
    code = (
        "import os, pwd\n"
        "def unknown(_): raise KeyError('no such user')\n"  # as in an image whose password file does not know the user
        "pwd.getpwuid = unknown\n"
        "import aivmm, numpy as np\n"
        "with aivmm.load_plan('plan.aivmm') as engine:\n"
        "    print(engine.run({'x': np.zeros((2, 32), np.float32)})['y'].shape, len(engine.stats()['cache']['problems']) > 0)\n"
    )
    done = run_bare([sys.executable, "-c", code], plan.parent, **({} if home is None else {"HOME": home}))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(2, 32) True\n"  # it runs, and says what is wrong with the cache
    assert sorted(plan.rglob("*")) == before


@pytest.mark.skipif(not shutil.which("taskset"), reason="needs taskset")
def test_pinning_is_seen_and_a_plan_for_more_cores_is_not_taken_for_proven(plan: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core only")
    code = (
        "import aivmm, os; from aivmm.runtime.cpu import usable_cores\n"
        "with aivmm.load_plan('plan.aivmm') as engine: print(usable_cores(), engine.stats()['validity'])"
    )
    done = run_bare(["taskset", "-c", str(cores[0]), sys.executable, "-c", code], plan.parent, AIVMM_CACHE="/proc/nowhere")
    assert done.stdout == "1 retune\n", done.stderr
    assert f"usable_cores: 1 here, {len(cores)} in the plan" in done.stderr


def test_the_dockerfile_installs_the_production_half_and_nothing_else() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    lines = [line.strip(" \\").removeprefix("RUN ").removeprefix("&& ") for line in DOCKERFILE.splitlines()]
    installs = [shlex.split(line) for line in lines if line.startswith("pip install")]
    assert installs == [
        ["pip", "install", "--no-cache-dir", "--group", "/tmp/build/pyproject.toml:production"],
        ["pip", "install", "--no-cache-dir", "--no-deps", "/tmp/build/aivmm-*.whl"],
    ]
    assert "production" in groups
    assert "pip wheel --no-cache-dir --no-deps" in DOCKERFILE and "COPY --from=build" in DOCKERFILE  # a slim image has no compiler
    stages = re.findall(r"^FROM python:([\d.]+)(?:-slim| AS build)$", DOCKERFILE, re.MULTILINE)
    assert len(stages) == 2 and len(set(stages)) == 1  # the wheel is for the interpreter that runs it
    assert re.search(r"^USER 65534:65534$", DOCKERFILE, re.MULTILINE)


@pytest.fixture
def read_only(plan: Path, tmp_path: Path) -> list[str]:
    """The command that runs another one where the plan lies in `place` on a file system that cannot be written."""
    place = tmp_path / "place"
    place.mkdir()
    mounting = (
        f"mount -t tmpfs none {shlex.quote(str(place))} && cp -r {shlex.quote(str(plan))} {shlex.quote(str(place))}/ && "
        f'mount -o remount,ro {shlex.quote(str(place))} && cd {shlex.quote(str(place))} && exec "$@"'
    )
    if not shutil.which("unshare"):
        pytest.skip("needs unshare")
    command = ["unshare", "--map-root-user", "--mount", "sh", "-ec", mounting, "sh"]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, timeout=60)
    if tried.returncode:
        command = ["unshare", "--mount", *command[3:]]  # as root without user namespaces
        tried = subprocess.run([*command, "true"], capture_output=True, text=True, timeout=60)
    if tried.returncode:
        pytest.skip(f"no file system can be mounted here: {tried.stderr.strip()}")
    return command


@pytest.mark.parametrize("cache", ["nowhere", "plan.aivmm/cache"])
def test_a_plan_on_a_file_system_that_cannot_be_written_runs(read_only: list[str], cache: str) -> None:
    code = (
        "import aivmm, errno, os, numpy as np\n"
        "try: os.mkdir('probe')\n"
        "except OSError as error: print(errno.errorcode[error.errno])\n"
        "with aivmm.load_plan('plan.aivmm') as engine:\n"
        "    print(engine.run({'x': np.zeros((2, 32), np.float32)})['y'].shape, engine.stats()['cache']['stored'])\n"
    )
    environment = {"PATH": os.environ["PATH"], "AIVMM_CACHE": cache}
    done = subprocess.run([*read_only, sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "EROFS\n(2, 32) 0\n"), done.stderr

"""Whole tunes over a driver that does everything wrong: each fault is one row with its reason, the rest is measured, and a plan is written.

Each fault is a baseline of its own, beside a sound one, so that every tune meets every fault that it is given.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from aivmm.db.database import Database
from aivmm.probes.records import Failed, Measured, Outcome, Refused
from tests.probes.conftest import install_wild, python_path
from tests.tuner.harness import TINY, Finished, Place

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals, forks and numbered pipes are those of POSIX")

# ONNX Runtime under another name. A fault comes while compiling, at the first run, or at the third, when the race is on.
BACKEND = """
import os
from dataclasses import replace

from aivmm.runtime.backend import Baseline
from aivmm.runtime.config import Config, Knob
from aivmm.runtime.onnxruntime import OnnxRuntime
from aivmm.runtime.target import Target
from wild_runtime import misbehave


class Faulty:
    name = "faulty"

    def __init__(self):
        self._real = OnnxRuntime()

    def targets(self):
        misbehave(os.environ.get("FAULT_LOOKING", ""))
        return [replace(each, runtime="faulty") for each in self._real.targets() if isinstance(each, Target) and each.name == "CPU"]

    def knobs(self, target):
        misbehave(os.environ.get("FAULT_KNOBS", ""))
        return (Knob("intra_op_num_threads", "int", "threads", low=1, high=2, default=1),)

    def baselines(self, targets, objective):
        misbehave(os.environ.get("FAULT_BASELINES", ""))
        faults = [each for each in os.environ.get("FAULTS", "").split(",") if each]
        for each in targets:
            if each.runtime == "faulty":
                yield Baseline(name="sound", target=each, config=Config())
                yield from (Baseline(name=fault, target=each, config=Config.of({"fault": fault})) for fault in faults)

    def compile(self, model, target, config):
        fault = str(config.get("fault") or "")
        with open(os.environ["FAULT_LOG"], "a") as log:
            log.write(fault + chr(10))
        if fault.startswith("compile "):
            misbehave(fault.removeprefix("compile "))
        if os.environ.get("FAULT_PARTS") and "operator-" in str(model):
            misbehave(os.environ["FAULT_PARTS"])
        settings = {name: value for name, value in config.as_dict().items() if name != "fault"}
        real = self._real.compile(model, replace(target, runtime="onnxruntime"), Config.of(settings, precision=config.precision))
        return Executable(real, fault)


class Executable:
    def __init__(self, real, fault):
        self._real, self._fault = real, fault
        self.inputs, self.outputs, self.placement = real.inputs, real.outputs, real.placement
        if fault == "as shape":  # what is of no known shape is read where the runtime put it; else the engine would read its own buffer
            self.outputs = tuple(replace(each, shape=(*each.shape[:-1], None)) for each in real.outputs)
        self.effective_config = {**real.effective_config, **({"fault": fault} if fault else {})}

    def new_request(self):
        return Request(self._real.new_request(), self._fault, {each.name for each in self.outputs})

    def close(self):
        self._real.close()


class Request:
    def __init__(self, real, fault, outputs):
        when, _, self._how = fault.partition(" ")
        self._real, self._left = real, {"first": 1, "run": 3}.get(when, -1)
        self._outputs, self._bound = outputs, {}

    def bind(self, name, buffer):
        self._real.bind(name, buffer)
        if name in self._outputs:
            self._bound[name] = buffer

    def run(self):
        self._left -= 1
        if self._left == 0:
            misbehave(self._how)
        self._real.run()
        if self._how == "nan":  # the engine reads what it bound, and asks for no output
            for buffer in self._bound.values():
                buffer[...] = float("nan")

    def output(self, name):
        found = self._real.output(name)
        if self._how == "nan":
            return found * float("nan")
        return found[:, :-1] if self._how == "shape" else found
"""

RUBBISH = "wrote rubbish where its answers go"
REASONS = {
    "segfault": "SIGSEGV",
    "abort": "SIGABRT",
    "exit": "exited with status 7",
    "vanish": "exited with status 9",
    "raise": "failed in its plug-in .KeyError: 'a bug of the plug-in'",
    "busy": "took longer than",
    "idle": "took longer than",
    "eat": "used more than 1.0 GB",
    "rubbish": RUBBISH,
    "forge": RUBBISH,
    "flood": RUBBISH,
    "flood one line": RUBBISH,
    "close": "exited with status|closed the pipe",
    "close and hang": "closed the pipe of its answers",
    "child and die": "SIGABRT",
    "child and hang": "took longer than",
}
WRONG = ("as nan", "as shape")  # it answers, with something that is no answer
SOUND = ("run print", "compile print")  # a hundred megabytes are printed, and nothing comes of it
SOME = ("compile segfault", "first rubbish", "run vanish", "as nan")
ALL = tuple(f"{when} {how}" for when in ("compile", "first", "run") for how in REASONS)
PARTS = [ALL[start::12] for start in range(12)]  # few at a time: what crashes takes with it what is loaded, which is then loaded again


@pytest.fixture
def plug_ins(tmp_path: Path) -> Path:
    """The folder with the plug-in, installed as a distribution is."""
    site = install_wild(tmp_path / "plug-ins")
    info = site / "faulty-1.0.dist-info"
    info.mkdir()
    (site / "faulty_backend.py").write_text(BACKEND)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[aivmm.backends]\nfaulty = faulty_backend:Faulty\n")
    return site


def tune(place: Place, model: Path, plug_ins: Path, *more: str, **changes: str) -> Finished:
    """Tune on the faulty backend alone, unless `more` names others; limits are short, but not for a machine that others keep busy."""
    backends = [] if "--backend" in more else ["--backend", "faulty"]
    limits = {"AIVMM_COMPILE_LIMIT": "15", "AIVMM_RUN_LIMIT": "6", "AIVMM_WORKER_GB": "1"}
    arguments = ("tune", model, *TINY, *backends, "--budget", "6s", "--trials", "1", "--top", "1", "--json", *more)
    return place.aivmm(*arguments, PYTHONPATH=python_path(plug_ins), FAULT_LOG=str(place.folder / "log"), **{**limits, **changes})


def tried(place: Place) -> list[str]:
    """Return the faults that were met, in order, and forget them."""
    log = place.folder / "log"
    found = [each for each in log.read_text().splitlines() if each]
    log.unlink()
    return found


def rows(place: Place) -> dict[str, list[Outcome]]:
    """Return the stored outcomes of the whole model by fault; "" is the sound driver."""
    found: dict[str, list[Outcome]] = {}
    with Database.open(place.db) as database:
        assert database.check() == []
        for each in database.outcomes(kind="model", all=True):
            found.setdefault(str(each.key.config.get("fault") or ""), []).append(each)
    return found


def check_rows(place: Place, faults: tuple[str, ...]) -> None:
    """Each fault has one row with its reason; the sound driver was measured."""
    found = rows(place)
    assert any(isinstance(each, Measured) for each in found[""])
    for fault in faults:
        (outcome,) = found[fault]
        assert isinstance(outcome, Failed | Refused), fault
        assert re.search(REASONS[fault.partition(" ")[2]], outcome.reason), (fault, outcome.reason)


@pytest.mark.parametrize(
    "faults", [SOME, *(pytest.param(each, marks=[pytest.mark.slow, pytest.mark.timeout(720)]) for each in PARTS)], ids=", ".join
)
def test_each_fault_costs_one_probe_and_is_not_met_again_until_asked_for(
    place: Place, tiny: Path, plug_ins: Path, faults: tuple[str, ...]
) -> None:
    fatal = tuple(each for each in faults if each not in WRONG)
    done = tune(place, tiny, plug_ins, FAULTS=",".join(faults))
    assert done.code == 0, done.err
    assert "fault" not in done.json["plan"]["stages"][0]["config"]
    assert done.json["probes"]["failed"] + done.json["probes"]["refused"] >= len(fatal)
    assert set(tried(place)) >= set(faults)
    check_rows(place, fatal)

    again = tune(place, tiny, plug_ins, FAULTS=",".join(faults))
    assert again.code == 0, again.err
    assert set(tried(place)).isdisjoint(fatal)
    check_rows(place, fatal)

    retried = tune(place, tiny, plug_ins, "--retry-failed", FAULTS=",".join(faults))
    assert retried.code == 0, retried.err
    assert set(tried(place)) >= set(fatal)
    found = rows(place)
    assert all(len(found[each]) == 2 for each in fatal)


@pytest.mark.slow
def test_what_answers_wrongly_is_shown_with_its_reason_and_never_the_plan(place: Place, tiny: Path, plug_ins: Path) -> None:
    done = tune(place, tiny, plug_ins, FAULTS=",".join((*WRONG, *SOUND)))
    assert done.code == 0, done.err
    assert done.json["plan"]["stages"][0]["config"].get("fault") not in WRONG
    for each in done.json["baselines"]:
        assert each["eligible"] == (each["name"] not in WRONG), each
    reasons = {each["name"]: each["reason"] for each in done.json["baselines"]}
    assert "NaN" in reasons["as nan"] and "shape" in reasons["as shape"]


@pytest.mark.slow
def test_operators_that_crash_cost_one_row_each(place: Place, tiny: Path, plug_ins: Path) -> None:
    long = ("--budget", "40s")  # on a busy machine the other one is over before an operator's turn
    done = tune(place, tiny, plug_ins, *long, FAULT_PARTS="abort")
    assert done.code == 0, done.err
    with Database.open(place.db) as database:
        # What was measured to know the target's ceilings is of kind operator too, and made of other files.
        found = [each for each in database.outcomes(kind="operator", all=True) if not each.key.subject.startswith("ceiling:")]
        assert found, done.err
        assert [each for each in found if not (isinstance(each, Failed) and "SIGABRT" in each.reason)] == []
    before = len(found)
    assert tune(place, tiny, plug_ins, *long, FAULT_PARTS="abort").code == 0
    with Database.open(place.db) as database:
        again = [each for each in database.outcomes(kind="operator", all=True) if not each.key.subject.startswith("ceiling:")]
        assert len(again) == before


BREAKS = [("FAULT_LOOKING", "segfault"), ("FAULT_KNOBS", "vanish"), ("FAULT_BASELINES", "raise")]


def test_a_runtime_that_crashes_while_looking_for_devices_leaves_the_others(place: Place, tiny: Path, plug_ins: Path) -> None:
    done = tune(place, tiny, plug_ins, "--backend", "faulty", "--backend", "onnxruntime", "--dry-run", FAULT_LOOKING="segfault")
    assert done.code == 0, done.err
    assert done.json["targets"] == ["onnxruntime:CPU"] and done.json["baselines"] == ["onnxruntime:CPU default"]
    assert any("faulty" in each and "SIGSEGV" in each for each in done.json["unavailable"])


@pytest.mark.slow
@pytest.mark.parametrize(("where", "how"), BREAKS)
def test_a_runtime_that_breaks_before_anything_is_measured_leaves_the_others(
    place: Place, tiny: Path, plug_ins: Path, where: str, how: str
) -> None:
    done = tune(place, tiny, plug_ins, "--backend", "faulty", "--backend", "onnxruntime", **{where: how})
    assert done.code == 0, done.err
    assert done.json["plan"]["stages"][0]["target"] == "onnxruntime:CPU" or where == "FAULT_KNOBS"

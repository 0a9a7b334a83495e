"""What a user is told while a tuning works, and before it of what it will take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aivmm.planner.candidates import Draft, Piece
from aivmm.probes.client import WorkerDied
from aivmm.runtime.config import Config
from aivmm.runtime.target import Device, Target
from aivmm.tuner import prove
from aivmm.tuner.options import BUDGET_HELP, allowed_s, on_top
from aivmm.tuner.progress import Plain
from aivmm.tuner.proof import Entrant
from aivmm.tuner.prove import Prover

CARD = Target(runtime="onnxruntime", name="CUDA:0", device=Device(kind="gpu", model="a card", memory_bytes=1 << 36), runtime_version="1")


class _Dead:
    """A worker that dies of whatever it is asked."""

    pid = None

    def __init__(self, name: str) -> None:
        self.name = name

    def call(self, *_: Any, **__: Any) -> Any:
        raise WorkerDied("it died")

    def close(self) -> None:
        """Nothing to end."""


def _entrant(number: int, folder: Path) -> Entrant:
    draft = Draft(name=f"candidate {number}", pieces=(Piece(target=CARD, config=Config(), first=0, last=0),))
    path = folder / "x.npz"
    return Entrant(draft=draft, role="candidate", bundle=folder, size_bytes=1, sample=path, reference=path)


def test_who_waits_for_the_entrants_of_a_proof_is_told_how_many_are_ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    monkeypatch.setattr(prove, "Worker", _Dead)
    entrants = [_entrant(number, tmp_path) for number in range(3)]
    proof = Prover(entrants, constraints=(), cosine_limit=None, seed=0, tell=lambda what, state: said.append(what)).run()
    assert proof.plan is None and all(each.fatal for each in entrants)  # one that does not load is done with, too
    assert sorted(said) == [f"loading the finalists and the baselines: {number} of 3 are ready" for number in range(4)]


def test_a_budget_that_is_spent_is_not_told_as_seconds_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("aivmm.tuner.progress._PLAIN_EVERY_S", 0.0)
    plain = Plain()
    plain.detail("round 3", left_s=12.3)
    plain.detail("round 4", left_s=-40.0)
    plain.detail("round 5")
    ends = [each.partition("round")[2] for each in capsys.readouterr().err.splitlines()]
    assert ends == [" 3, 12 s of the budget left", " 4, the budget is spent", " 5"]


def test_what_comes_on_top_of_a_budget_is_told_as_long_as_it_may_be() -> None:
    assert "30 s each" in on_top(30.0, "throughput", cards=False)
    assert f"{allowed_s(600.0):.0f} s each" in on_top(600.0, "throughput", cards=True)
    assert "each for several callers" not in on_top(30.0, "latency", cards=True)  # of latency nothing is timed whole before the proof
    assert "on cards" in on_top(30.0, "latency", cards=True) and "on cards" not in on_top(30.0, "latency", cards=False)
    assert "--dry-run" in BUDGET_HELP

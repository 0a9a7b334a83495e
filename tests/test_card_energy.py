"""What a machine with cards is asked about energy, on counters and cards that are made up."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from aivmm.errors import Unsupported
from aivmm.runtime.null_device import METER
from benchmarks import gpu_energy
from benchmarks.gpu import calls_of, engine, main
from benchmarks.gpu_energy import ENERGY_PLAN, THROUGHPUT_PLAN, in_turns, page_energy, page_energy_tuned, power_w
from tests.making import Part, chain_model

WATTS = 20.0


def stepping(watts: float = WATTS, every_s: float = 0.02) -> gpu_energy.Read:
    """A counter like NVML's: it grows by `watts`, but moves at each multiple of `every_s` only."""
    began = time.perf_counter()
    return lambda: watts * every_s * ((time.perf_counter() - began) // every_s)


def test_power_is_read_between_the_moves_of_the_counter() -> None:
    found, result = power_w(stepping(), lambda: time.sleep(0.27) or "slept")
    assert result == "slept"
    assert found == pytest.approx(WATTS, rel=0.1)  # the first and the last of 13 steps are cut off, not counted half


def test_a_counter_that_does_not_move_is_no_number_and_one_that_fails_says_why() -> None:
    with pytest.raises(Unsupported, match="moved 0 times"):
        power_w(lambda: 1.0, lambda: time.sleep(0.02))

    def gone() -> float:
        raise Unsupported("the driver is gone")

    with pytest.raises(Unsupported, match="the driver is gone"):
        power_w(gone, lambda: None)


def test_an_inference_costs_what_the_made_up_card_counts_for_it(tmp_path: Path) -> None:
    """The null GPU's meter tells the joules of each call, whatever time that takes here."""
    steps, expected = {}, {}
    model = chain_model(width=64, rows=4, layers=2)
    for batch in (1, 4):
        running = engine(tmp_path, f"chain-{batch}", model, [Part("null:GPU.0")], batch=batch, callers=2)
        calls = calls_of(running, model, 2)
        before = METER.read()[0]
        calls[0]()
        expected[batch] = (METER.read()[0] - before) / batch
        steps[str(batch)] = (batch, calls)
    found = in_turns(lambda: METER.read()[0], steps, rounds=2, seconds=0.15)
    for batch, joules in expected.items():
        rounds = found[str(batch)]
        assert len(rounds) == 2
        for each in rounds:
            assert each["joules"] == pytest.approx(joules, rel=0.15)  # calls are counted in whole windows, joules between looks
            assert each["watts"] == pytest.approx(each["joules"] * each["rate"])


def test_where_there_is_no_card_it_says_so_in_one_line_and_leaves_that_as_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.gpu.environment", dict)
    monkeypatch.setattr("aivmm.runtime.nvidia.cuda_devices", lambda: ((), "no NVIDIA driver"))
    places = [f"--{each}={tmp_path}" for each in ("state", "folder", "shared")]
    monkeypatch.setattr("sys.argv", ["gpu", *places, "--only=energy,energy_tuned"])
    main()
    said = "the energy of a card is not counted here: no NVIDIA driver"
    assert [line for line in capsys.readouterr().out.splitlines() if line == said] == [said] * 2
    for name, page in (("energy", page_energy), ("energy_tuned", page_energy_tuned)):
        assert page(json.loads((tmp_path / f"{name}.json").read_text())) == [f"Not run: {said}."]


def test_the_page_tells_joules_beside_the_rate_and_what_is_above_idle() -> None:
    counted = {"watts": 500.0, "rate": 10_000.0, "joules": 0.05}
    found = {"idle_w": 100.0, "loaded_w": 120.0, "candidates": [{"model": "minilm", "precision": "fp16", "batch": 64, **counted}]}
    text = "\n".join(page_energy(found))
    assert "An idle card draws 100 W, with a session on it that nobody calls 120 W" in text
    assert "| minilm | fp16 | 64 | 10,000 | 500 | 50.0 | 40.0 |" in text


@pytest.mark.parametrize(
    ("joules", "said"), [((0.9, 1.02), "it is not worse"), ((1.01, 1.02), "**it is worse**"), ((0.99, 1.2), "**it is worse**")]
)
def test_the_page_says_whether_the_plan_for_energy_is_worse(joules: tuple[float, float], said: str) -> None:
    def rounds(*each: float) -> list[dict[str, float]]:
        return [{"joules": one, "watts": 300.0, "rate": 300.0 / one} for one in each]

    plans = {ENERGY_PLAN: "a plan", THROUGHPUT_PLAN: "another"}
    text = "\n".join(page_energy_tuned({"plans": plans, "rounds": {ENERGY_PLAN: rounds(*joules), THROUGHPUT_PLAN: rounds(1.0, 1.0)}}))
    assert said in text and f"({joules[0]:.3f} to {joules[1]:.3f})" in text

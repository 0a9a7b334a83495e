"""The sections between the candidates and the troubles: what each says of stored rows, and why it is absent where it is."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from aivmm.probes.records import Measured, Refused, Samples, Transfer, TransferPoint, handover_of
from aivmm.reports import belief, handovers, importance, rooflines, scaling, summary, tradeoffs
from aivmm.reports.data import ReportData
from aivmm.reports.palette import slots
from aivmm.reports.race import lay_out
from aivmm.reports.render import render
from aivmm.reports.summary import key_figures
from aivmm.runtime.backend import CopyRoute
from aivmm.runtime.config import Config
from aivmm.runtime.target import Device, Target
from tests.reports.rows import ORT, OV, environment, measured, proof, race_samples


def only(data: ReportData, *proofs: Any) -> ReportData:
    return replace(data, proofs=proofs, trials=())


def names_on(found: tradeoffs.Tradeoffs, axis: str) -> set[str]:
    return {each.proof.name for each in found.points if axis in each.fronts}


# --- trade-offs


def test_the_front_is_of_what_may_be_the_plan_and_what_differs_little_is_the_same(full: ReportData) -> None:
    def entrant(name: str, role: Any, median: float, memory: float, **more: Any) -> Any:
        made = proof(name, role, OV, median, **more)
        return replace(made, metrics={**made.metrics, "peak_memory_bytes": memory})

    data = only(
        full,
        entrant("plan", "plan", 0.00271, 100e6),
        entrant("lean", "baseline", 0.004, 50e6),
        entrant("as lean, slower", "baseline", 0.005, 49e6),  # 2 % less memory is no reason
        entrant("out", "baseline", 0.001, 10e6, eligible=False, why_not="wrong"),
    )
    found = tradeoffs.account(data, slots(data.targets))
    assert names_on(found, "memory") == {"plan", "lean"}
    assert found.points[0].proof.role == "plan"
    assert found.chart is not None and re.search(
        r"front against memory: plan \(2\.7\d ms, 100 MB\), lean \(\S+ ms, 50\.0 MB\)", found.chart.wide
    )


def test_what_else_was_asked_for_is_drawn_too_and_alternatives_are_marked(full: ReportData) -> None:
    def entrant(name: str, role: Any, median: float, compile_s: float) -> Any:
        made = proof(name, role, OV, median)
        return replace(made, metrics={**made.metrics, "compile_s": compile_s, "size_bytes": 1e6})

    data = only(
        full, entrant("plan", "plan", 0.00271, 0.9), entrant("soon", "baseline", 0.004, 0.2), entrant("late", "baseline", 0.005, 1.0)
    )
    assert not {"compile", "size"} & {axis.name for axis in tradeoffs.account(data, slots(data.targets)).axes}
    data = replace(data, run=replace(data.run, objective="latency,compile,size", summary={"alternatives": [{"name": "soon"}]}))
    found = tradeoffs.account(data, slots(data.targets))
    assert {"compile", "size"} < {axis.name for axis in found.axes}
    assert names_on(found, "compile") == {"plan", "soon"} and names_on(found, "size") == {"plan"}
    assert [each.proof.name for each in found.points if each.alternative] == ["soon"]


def test_what_was_not_measured_is_not_drawn_and_says_why(full: ReportData) -> None:
    why = "this machine has no RAPL counters"
    told = {**full.run.summary, "measured": {**full.run.summary["measured"], "not_measured": {"energy": why}}}
    found = tradeoffs.account(replace(full, run=replace(full.run, summary=told)), slots(full.targets))
    assert found.absent == (f"Not drawn against energy: {why}.",)
    assert tradeoffs.account(only(full, full.proofs[0]), slots(full.targets)).chart is None


def test_with_several_callers_a_call_takes_as_many_times_the_time_between_answers(full: ReportData) -> None:
    plan = proof("busy", "plan", OV, 0.0015, callers=2)
    other = proof("alone", "baseline", ORT, 0.002)
    data = only(full, plan, other)
    data = replace(data, run=replace(data.run, objective="throughput,latency", summary={}))
    point = tradeoffs.account(data, slots(data.targets)).points[0]
    assert point.latency_s == pytest.approx(0.003, rel=0.05) and point.values["throughput"] == pytest.approx(1 / 0.0015)
    runner = next(each for each in lay_out(data, slots(data.targets)).runners if each.proof.role == "plan")
    assert runner.value == "667/s"
    figures = {each.label: each for each in key_figures(data)}
    assert figures["Median latency"].value.startswith("3.0") and "p90 latency" not in figures
    assert "not calls" in figures["p99 latency"].support[0]


def test_what_a_card_drew_and_how_it_was_stands_with_the_figures(full: ReportData) -> None:
    uid = "GPU-1e6460b7-aaaa"
    seen = {f"sm_mhz[{uid}]_during": 1755.0, f"temperature_c[{uid}]_during": 46.0, f"power_w[{uid}]_during": 233.4, "card_energy_j": 0.135}
    plan = proof("on a card", "plan", OV, 0.001)
    figures = {each.label: each for each in key_figures(only(full, replace(plan, metrics={**plan.metrics, **seen})))}
    assert figures["Energy of a sample, of the card alone"].value == "135 mJ"
    assert figures["Card while proven"].value == "1755 MHz" and figures["Card while proven"].support == ("46 °C, 233 W",)
    assert "Energy of a sample" not in figures  # of the whole machine none was counted
    assert not any("Card" in each.label or "Energy" in each.label for each in key_figures(only(full, plan)))


def test_the_top_of_a_page_names_no_ratio_that_nobody_can_tell_and_no_interval_of_three_samples(full: ReportData) -> None:
    plan = proof("ours", "plan", OV, 0.001)
    near, far = (
        replace(proof(name, "baseline", ORT, 0.002), ratio=ratio, verdict="faster") for name, ratio in (("near", 2.0), ("far", 600.0))
    )
    near = replace(near, ratio_low=1.9, ratio_high=2.1)
    assert plan.samples is not None
    few = replace(plan, samples=replace(plan.samples, timed_s=plan.samples.timed_s[:3], rounds=plan.samples.rounds[:3]))
    for each, high, told in ((plan, 700.0, True), (few, 13784.0, False)):
        data = only(full, each, near, replace(far, ratio_low=26.5 if not told else 500.0, ratio_high=high))
        better, believe = summary._how_much(data), summary._believe(data, each, ())
        assert any("600× faster than far" in line for line in better.support) == told
        assert (believe.value == "too few samples for an interval") != told


# --- scaling


def test_the_best_of_each_batch_is_what_counts(full: ReportData) -> None:
    assert full.structure is not None
    subject = full.structure.structure

    def ran(batch: int, median: float, **settings: Any) -> Any:
        made = measured("model", subject, OV, median, Config.of(settings, precision="fp32"))
        return replace(made, key=replace(made.key, batch=batch))

    outcomes = (ran(1, 0.002), ran(1, 0.001, INFERENCE_NUM_THREADS=2), ran(8, 0.004, INFERENCE_NUM_THREADS=1))
    found = scaling.account(replace(full, outcomes=outcomes, trials=()), slots(full.targets))
    batch, threads, precision = found.sweeps
    assert [(each.value, round(each.rate, -2), each.ways) for each in batch.points] == [("1", 1000, 2), ("8", 2000, 1)]
    assert [each.value for each in threads.points] == ["1", "2"] and not threads.missing
    assert precision.missing == "Only one precision was tried (fp32)."
    assert found.chart is not None and "batch: best" in found.chart.wide


def test_one_batch_is_no_curve_and_the_reader_is_told_the_option(full: ReportData) -> None:
    found = scaling.account(full, slots(full.targets))
    assert found.sweeps[0].missing == "Only batch 1 was tried; name more with --batch 1,8,32."
    nothing = scaling.account(replace(full, outcomes=(), trials=()), slots(full.targets))
    assert nothing.chart is None and all(each.missing for each in nothing.sweeps)


# --- rooflines


def test_ten_operators_with_their_share_and_what_they_reach_of_the_ceiling(full: ReportData) -> None:
    assert full.structure is not None
    roofs = {each.target: each for each in rooflines.account(full, slots(full.targets))}
    assert set(roofs) == {OV, ORT}
    top = roofs[OV].top
    assert [each.rank for each in top] == list(range(1, 11)) and [each.total_s for each in top] == sorted(
        (each.total_s for each in top), reverse=True
    )
    assert sum(each.share for each in top) < 1
    first = top[0]
    assert first.ceiling is not None and first.above_s == pytest.approx(first.total_s * (1 - first.ceiling))
    assert first.bound == "arithmetic" and roofs[OV].chart is not None
    assert "of the time" in roofs[OV].sentence and "above what this target can do at best" in roofs[OV].sentence


def test_without_ceilings_operators_are_ranked_and_nothing_is_claimed_of_them(full: ReportData) -> None:
    outcomes = tuple(each for each in full.outcomes if not each.key.subject.startswith("ceiling:"))
    roof = rooflines.account(replace(full, outcomes=outcomes), slots(full.targets))[0]
    assert roof.chart is None and {each.ceiling for each in roof.top} == {None} and roof.sentence.endswith("of the time.")


def test_the_plans_precision_is_the_one_looked_at(full: ReportData) -> None:
    assert full.structure is not None
    planned = tuple(
        measured("operator", each.signature, OV, 1e-4, Config(precision=precision))
        for each in full.structure.operators[:3]
        for precision in ("fp32", "bf16")
    )
    data = replace(full, outcomes=(*full.outcomes, *planned))
    assert rooflines.account(data, slots(full.targets))[0].precision == "fp32"


# --- hand-overs


def test_a_hand_over_is_told_by_pair_with_what_it_costs(full: ReportData) -> None:
    found = handovers.account(full, slots(full.targets))
    assert [(each.source, each.destination, each.said(1 << 20)) for each in found.pairs] == [(ORT, OV, "49.9 µs"), (OV, ORT, "46.9 µs")]
    assert found.chart is not None and found.missing == ""


def test_what_too_few_sizes_were_measured_for_is_no_noise(full: ReportData) -> None:
    pairs = [each for each in full.outcomes if each.key.kind == "transfer"]
    rest = tuple(each for each in full.outcomes if each.key.kind != "transfer")
    few = replace(full, outcomes=(*rest, *pairs[:2]))
    (pair,) = handovers.account(few, slots(full.targets)).pairs
    assert pair.fixed_s is None and len(pair.costs) == 2
    section = render(few).partition('id="transfers"')[2].partition("</section>")[0]
    assert "below noise" not in section and section.count('<td class="num">–</td>') + section.count('data-v="">–</td>') >= 3


def test_no_hand_over_says_why(full: ReportData) -> None:
    rest = tuple(each for each in full.outcomes if each.key.kind != "transfer")
    assert "budget" in handovers.account(replace(full, outcomes=rest), {}).missing
    one = replace(full, outcomes=rest, environments=full.environments[:1])
    assert "One target took part" in handovers.account(one, {}).missing
    pair = next(each for each in full.outcomes if each.key.kind == "transfer")
    refused = replace(full, outcomes=(*rest, Refused(key=pair.key, reason="no")))
    assert "could be measured" in handovers.account(refused, {}).missing


def test_copies_between_memories_are_a_table_of_their_own(full: ReportData) -> None:
    key = next(each for each in full.outcomes if each.key.kind == "transfer").key
    card = Target(runtime="onnxruntime", name="CUDA:0", device=Device(kind="gpu", model="a card"), runtime_version="1")
    copies = []
    for pinned, seconds in ((False, 1e-4), (True, 2.5e-5)):
        for ends in (
            CopyRoute(source=None, destination=card, pinned=pinned).ends,
            CopyRoute(source=card, destination=None, pinned=pinned).ends,
        ):
            points = tuple(
                TransferPoint(
                    size_bytes=size, samples=Samples(timed_s=(size / 2**20 * seconds,)), source_s=0.0, destination_s=0.0, cost_s=seconds
                )
                for size in (4096, 1 << 20)
            )
            made = Transfer(
                source=ends[0],
                source_environment=key.environment,
                destination=ends[1],
                destination_environment=key.environment,
                points=points,
            )
            copies += [
                Measured(key=each, samples=point.samples, metrics=dict.fromkeys(("cost_s", "source_s", "destination_s"), 0.0))
                for each, point in zip(made.keys(), points, strict=True)
            ]
    found = handovers.account(replace(full, outcomes=(*full.outcomes, *copies)), slots(full.targets))
    assert len(found.pairs) == 2 and len(found.copies) == 4 and found.copied_sizes == [4096, 1 << 20]
    assert found.copies[1].said(1 << 20) == ("25.0 µs", "41.9 GB/s") and found.copies[1].said(1) == ("–", "")
    section = render(replace(full, outcomes=(*full.outcomes, *copies))).partition('id="transfers"')[2].partition("</section>")[0]
    assert "Copies between memories" in section and "host pinned" in section and "41.9 GB/s" in section and "1 MiB" in section
    assert "Copies between memories" not in render(full)
    rest = tuple(each for each in full.outcomes if each.key.kind != "transfer")
    alone = handovers.account(replace(full, outcomes=(*rest, *copies)), {})
    assert "budget" in alone.missing and len(alone.copies) == 4


def test_the_key_of_a_hand_over_can_be_read_back() -> None:
    point = TransferPoint(size_bytes=4096, samples=race_samples(1e-4), source_s=5e-5, destination_s=5e-5, cost_s=1e-6)
    made = Transfer(
        source="onnxruntime:CUDA:0",
        source_environment=environment(ORT).fingerprint,
        destination=OV,
        destination_environment=environment(OV).fingerprint,
        points=(point,),
    )
    assert handover_of(made.key(4096)) == (4096, "onnxruntime:CUDA:0")
    assert handover_of(made.key()) == (0, "onnxruntime:CUDA:0")
    assert handover_of(replace(made.key(), kind="operator")) is None


# --- predictions, accuracy, importance


def test_predictions_stand_beside_what_the_proof_measured(full: ReportData) -> None:
    found = belief.predictions(full, slots(full.targets))
    assert found.reference == "onnxruntime:CPU default" and found.rows[0].proof.role == "plan"
    assert found.rows[0].off == pytest.approx(-0.038, abs=0.02) and found.rows[0].within == "yes"
    surprised = replace(full.proofs[0], metrics={**full.proofs[0].metrics, "predicted_ratio": 0.1})
    assert belief.predictions(replace(full, proofs=(surprised, *full.proofs[1:])), {}).rows[0].within == "no"
    open_ = replace(full.proofs[0], metrics={**full.proofs[0].metrics, "proven_sigma": 0.5})
    assert belief.predictions(replace(full, proofs=(open_, *full.proofs[1:])), {}).rows[0].within == "unclear"
    assert belief.predictions(only(full, full.proofs[0]), {}).rows == ()  # without the reference there is no ratio


def promised(full: ReportData, *, reference_s: float, **more: Any) -> ReportData:
    """Return a run whose promise was made where the reference took `reference_s`; in the proof it takes 5.2 ms, and the plan 2.71."""
    told = {"median_s": 0.00264, "reference": "onnxruntime:CPU default", "ratio_to_reference": 0.00264 / reference_s} | more
    return replace(full, run=replace(full.run, summary={**full.run.summary, "predicted": told}))


def card(data: ReportData) -> summary.Answer:
    return {each.label: each for each in key_figures(data)}["Predicted median"]


def test_a_promise_is_told_as_a_ratio_beside_its_seconds(full: ReportData) -> None:
    steady = promised(full, reference_s=0.0052)
    assert card(steady).value == "2.64 ms" and card(steady).support[1] == "proven 2.71 ms"
    assert card(steady).support[0].startswith("kept: 0.508 of the reference's time, proven 0.5")
    assert "0.508 of the time of onnxruntime:CPU default (0.479 to 0.538), proven 0.5" in render(steady)
    # With several callers the seconds are what a rate makes of a call, which is no latency.
    busy = replace(steady, run=replace(steady.run, summary={**steady.run.summary, "plan": {"callers": 4}}))
    assert {"Predicted, callers busy", "Predicted median"} & {each.label for each in key_figures(busy)} == {"Predicted, callers busy"}


def test_a_machine_that_was_slower_in_the_proof_is_told_where_the_promise_is(full: ReportData) -> None:
    slower = promised(full, reference_s=0.0046)
    assert card(slower).support[0].startswith("better than promised, 9 % less time: 0.574 of the reference's time")
    assert re.fullmatch(r"(2\.9\d|3) ms at its speed in the proof; proven 2\.71 ms", card(slower).support[1])
    assert re.search(r"onnxruntime:CPU default took 1[234] % more time in the proof", render(slower))
    # The ratio of the proof's own rounds goes before that of the medians, where the run has it.
    own = promised(full, reference_s=0.0046, proven_ratio=0.58)
    assert card(own).support[0] == "kept: 0.574 of the reference's time, proven 0.58"
    # What the reference's own rounds leave open is no change of the machine.
    unsure = promised(full, reference_s=0.0046, proven_ratio=0.58, reference_proven_interval_s=[0.004, 0.0068])
    assert card(unsure).support[1] == "proven 2.71 ms"


def test_a_promise_of_several_callers_is_told_per_sample(full: ReportData) -> None:
    plan = replace(full.proofs[0], callers=4)
    busy = replace(full, proofs=(plan, *full.proofs[1:]))
    told = promised(busy, reference_s=0.0052, median_s=0.01056, ratio_to_reference=0.508, proven_ratio=0.52, reference_proven_s=0.0052)
    assert card(told).support[0] == "kept: 0.508 of the reference's time per sample, proven 0.52"


def test_accuracy_has_a_column_for_each_metric_that_someone_has(full: ReportData) -> None:
    exact = replace(full.proofs[0], metrics={"cosine": 1.0, "sqnr": 200.0, "relative_l2": 0.0, "top1_agreement": 0.98})
    found = belief.accuracy(only(full, exact, full.proofs[1]), {})
    assert found.columns == ("Cosine", "SQNR", "Relative error", "Top-1 agrees")
    assert [text for _, text in found.rows[0].cells] == ["1", "exact", "0", "98.0%"]
    assert [text for _, text in found.rows[1].cells] == ["0.999999", "–", "–", "–"]
    assert "synthetic inputs. Real data may come out otherwise" in found.sentence


def test_importance_is_a_table_of_knobs_and_what_is_odd_in_it_is_left_out(full: ReportData) -> None:
    found = importance.account(full, slots(full.targets))
    assert (
        found is not None
        and found.knobs[0] == "target"
        and [each.about for each in found.columns]
        == [
            "all targets, latency, by 46 trials",
            "openvino:CPU, latency, by 31 trials",
        ]
    )
    odd = {**full.run.summary, "importance": [3, {"share": "much"}, {"share": -1, "knob": "x"}]}
    assert importance.account(replace(full, run=replace(full.run, summary=odd)), {}) is None


def test_a_section_without_rows_says_so_in_the_page(infeasible: ReportData, page: Any) -> None:
    text = page(render(infeasible)).text
    for said in (
        "there is nothing to trade",
        "nothing is handed over",
        "no prediction was put to the test",
        "No entrant's outputs were compared",
    ):
        assert said in text, said

"""The pieces a report is made of: units, names, intervals, colours, figures, text to copy."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from aivmm.probes.records import Samples
from aivmm.reports import format as fmt
from aivmm.reports import recipes
from aivmm.reports.anatomy import dissect
from aivmm.reports.at_once import attempts
from aivmm.reports.costs import account
from aivmm.reports.data import ReportData
from aivmm.reports.figures import distribution, knob_effects, knobs, search
from aivmm.reports.intervals import apart, log_ticks, median_interval, nice_ticks
from aivmm.reports.markdown import markdown_summary
from aivmm.reports.notebook import notebook
from aivmm.reports.palette import OTHER, slots
from aivmm.reports.race import best_baseline, lay_out
from aivmm.reports.render import render
from aivmm.reports.summary import key_figures
from aivmm.reports.trouble import cautions, troubles
from aivmm.tensors import TensorSpec
from tests.reports.html_page import Page
from tests.reports.rows import GPU, HOSTILE, ORT, OV


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        (fmt.seconds(0.00271), "2.71 ms"),
        (fmt.seconds(0.0000413), "41.3 µs"),
        (fmt.seconds(0.0009999), "1.00 ms"),
        (fmt.seconds(61.3), "61.3 s"),
        (fmt.seconds(125), "2 min 5 s"),
        (fmt.seconds(None), "–"),
        (fmt.size(4_800_000), "4.8 MB"),
        (fmt.size(512), "512 B"),
        (fmt.size(999_990), "1.0 MB"),
        (fmt.rate(1.2e9, "flop"), "1.2 GFLOP/s"),
        (fmt.rate(1.1e10, "byte"), "11.0 GB/s"),
        (fmt.per_second(369), "369/s"),
        (fmt.per_second(12_345), "12,300/s"),
        (fmt.ratio(1.919), "1.92×"),
        (fmt.percent(0.004), "<1 %"),
        (fmt.similarity(0.9999987), "0.999999"),
        (fmt.similarity(1.0), "1"),
        (fmt.tick("2.00 ms"), "2 ms"),
        (fmt.tick("100 ms"), "100 ms"),
        (fmt.tick("0.00 ns"), "0"),
        (fmt.count(1, "block"), "1 block"),
    ],
)
def test_units_are_human(shown: str, said: str) -> None:
    assert shown == said


@pytest.mark.parametrize("text", ["short", "x" * 10_000, "a  b\nc", "\u202eevil", "🙂" * 500])
def test_a_name_fits_and_is_one_clean_line(text: str) -> None:
    line = fmt.shorten(text, 40)
    assert len(line) <= 40 and "\n" not in line and "\u202e" not in line
    assert ("…" in line) == (len(text) > 40)


def test_both_ends_of_a_long_name_are_kept() -> None:
    assert fmt.shorten("model/" + "x" * 9000 + "/Conv_42", 30).startswith("model/")
    assert fmt.shorten("model/" + "x" * 9000 + "/Conv_42", 30).endswith("/Conv_42")


def test_the_interval_of_a_median_covers_the_true_one_about_95_times_in_100() -> None:
    import random

    chance = random.Random(1)
    hits = 0
    for _ in range(400):
        low, high = median_interval(Samples(timed_s=tuple(chance.lognormvariate(0, 0.4) for _ in range(41))))
        hits += low <= 1.0 <= high
    assert 0.93 <= hits / 400 <= 0.99


def test_samples_of_one_round_do_not_count_as_independent() -> None:
    medians = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]
    timed = tuple(value for value in medians for _ in range(50))
    grouped = median_interval(Samples(timed_s=timed, rounds=tuple(index // 50 for index in range(400))))
    flat = median_interval(Samples(timed_s=timed))
    assert grouped[1] - grouped[0] > flat[1] - flat[0]


def test_overlapping_intervals_are_not_apart() -> None:
    near = Samples(timed_s=tuple(1 + index / 100 for index in range(20)))
    assert not apart(near, replace(near, timed_s=tuple(value + 0.02 for value in near.timed_s)))
    assert apart(near, replace(near, timed_s=tuple(value + 1 for value in near.timed_s)))


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0, 5.9, 6) == [0, 1, 2, 3, 4, 5]
    assert log_ticks(0.9, 30) == [1, 2, 5, 10, 20]


def test_a_known_target_keeps_its_colour_whatever_else_is_there() -> None:
    assert slots(["onnxruntime:CPU"])["onnxruntime:CPU"] == slots(["openvino:GPU.1", "openvino:CPU", "onnxruntime:CPU"])["onnxruntime:CPU"]
    many = slots([f"null:{index}" for index in range(12)])
    assert len(set(many.values())) == 8 and many["null:11"] == OTHER


def test_the_yardstick_is_the_best_eligible_baseline(full: ReportData) -> None:
    rival = best_baseline(full)
    assert rival is not None and rival.name == "openvino:CPU default"


def test_what_is_left_to_gain_is_a_key_figure_and_what_it_rests_on(full: ReportData) -> None:
    left = {each.label: each for each in key_figures(full)}["Left to gain"]
    assert left.value == "at most 1.1%" and left.support == ("bound 2.61 ms", "80% measured, 20% modelled")
    assert "80 % measured" in render(full)
    bare = replace(full, run=replace(full.run, summary={**full.run.summary, "certificate": None}))
    assert "Left to gain" not in {each.label for each in key_figures(bare)}
    odd = replace(full, run=replace(full.run, summary={**full.run.summary, "certificate": {"gap": "<b>", "sentence": 3, "bound_s": []}}))
    assert "Left to gain" not in {each.label for each in key_figures(odd)} and render(odd)


def test_the_race_puts_the_plan_first_and_the_ineligible_after_the_eligible(full: ReportData) -> None:
    race = lay_out(full, slots(full.targets))
    assert race.runners[0].proof.role == "plan"
    assert [runner.proof.eligible for runner in race.runners] == [True] * 6 + [False]
    for runner in race.runners:
        assert 0 <= runner.x_low <= runner.x <= runner.x_high <= 100
    medians = [runner.figure.median for runner in race.runners[1:6] if runner.figure]
    assert medians == sorted(medians)


def test_an_interval_that_misses_its_own_median_is_not_believed(full: ReportData) -> None:
    wrong = {**full.run.summary, "measured": {"median_s": 9.0, "ci95_s": [9.0, 9.1]}}
    plan = lay_out(replace(full, run=replace(full.run, summary=wrong)), {}).runners[0].figure
    assert plan is not None and plan.low <= plan.median <= plan.high < 0.003


def test_near_medians_are_zoomed_in_on_and_far_ones_get_a_logarithm(full: ReportData) -> None:
    def race_of(*medians: float) -> str:
        proofs = tuple(
            replace(full.proofs[1], name=str(index), samples=Samples(timed_s=tuple(median * (1 + step / 1000) for step in range(30))))
            for index, median in enumerate(medians)
        )
        return lay_out(replace(full, proofs=proofs), {}).axis

    assert "does not start at zero" in race_of(1.0, 1.05)
    assert "logarithmic" in race_of(1.0, 50.0)
    assert race_of(1.0, 3.0) == "Time of one call, less is better"


def test_the_strip_shows_each_block_once_and_the_cut_that_is_used(split: ReportData) -> None:
    plan = dissect(split, slots(split.targets))
    assert [cell.first for cell in plan.cells] == list(range(26))
    assert [cell.stage for cell in plan.cells] == [1] * 17 + [2] * 9
    assert [cell.lowered for cell in plan.cells] == [True] * 17 + [False] * 9
    (used,) = [cut for cut in plan.cuts if cut.used]
    assert split.structure is not None
    assert used.bytes == plan.stages[1].arriving == split.structure.cut_points[16].bytes
    assert sum(stage.flops_share or 0 for stage in plan.stages) == pytest.approx(1)


def test_each_replica_and_each_copy_has_a_band_of_its_blocks(copies: ReportData) -> None:
    plan = dissect(copies, slots(copies.targets))
    gpu, ort, ov = (slots(copies.targets)[each] for each in (GPU, ORT, OV))
    assert [[band.slot for band in cell.bands] for cell in plan.cells] == [[gpu, gpu, ort]] * 17 + [[ov]] * 9
    assert [band.lowered for band in plan.cells[0].bands] == [True, True, True] and not plan.cells[20].lowered
    for cell in plan.cells:
        assert cell.bands[0].y == 0
        assert sum(band.height for band in cell.bands) == pytest.approx(100, abs=0.01)
    assert plan.height == 3 * 18
    assert f"stage 1 on {GPU} (2 replicas) beside {ORT}" in plan.cells[0].title
    assert plan.beside and plan.load == "8 requests are under way at once, and all stages work at once, each on another one."


def test_one_executable_a_stage_is_drawn_as_before(split: ReportData, full: ReportData) -> None:
    for data in (full, replace(split, plan={"batch": 1, "stages": [{**stage, "replicas": 1} for stage in split.stages]})):
        plan = dissect(data, slots(data.targets))
        assert {len(cell.bands) for cell in plan.cells} == {1} and plan.height == 44
        assert plan.beside == plan.load == ""


def test_of_many_replicas_each_target_is_drawn_once(copies: ReportData) -> None:
    stages = [{**copies.stages[0], "replicas": 60}, copies.stages[1]]
    plan = dissect(replace(copies, plan={"batch": 1, "callers": 8, "stages": stages}), slots(copies.targets))
    assert [len(cell.bands) for cell in plan.cells] == [2] * 17 + [1] * 9
    assert "replicas of one are drawn once" in plan.beside and plan.load == "8 requests are under way at once."


def test_the_page_names_every_copy_with_its_part_of_the_requests(copies: ReportData) -> None:
    text = Page(render(copies)).text
    assert "2 replicas, 80 % of the requests" in text and "20 % of the requests" in text
    assert "2 stages, 4 executables" in text
    assert "int8:made" in text and "intra_op_num_threads = 1" in text


def test_the_page_says_what_was_tried_at_once_and_what_came_of_it(copies: ReportData, full: ReportData) -> None:
    lost, won = attempts(copies)
    assert (lost.outcome, won.outcome) == ("not proven: it promised too little", "the plan")
    assert lost.factors[1] == f"{OV} takes 2.50× as long beside another copy of it"
    failed = {"kind": "copies", "what": "two", "promised_per_s": 400.0, "assumes_no_contention": True, "could_not_be_measured": True}
    stopped = failed | {"could_not_be_measured": False, "to_beat_per_s": 300.0}
    whole = {"kind": "copies", "what": "two", "promised_per_s": 400.0, "to_beat_per_s": 500.0, "measured_whole": True}
    tried = [failed, stopped | {"to_beat_per_s": 500.0}, stopped, whole]
    first, second, third, fourth = attempts(replace(copies, run=replace(copies.run, summary={"at_once": tried})))
    assert first.outcome == "could not be measured"
    assert second.outcome == "not measured: too slow even if its parts cost each other nothing"
    assert third.outcome == "not measured"
    assert fourth.outcome == "not proven: measured whole, it was no better"
    text = Page(render(copies)).text
    assert "What was tried at once" in text and "300/s" in text and f"{GPU} takes 1.84× as long beside {OV}" in text
    assert "What was tried at once" not in Page(render(full)).text


def test_many_blocks_are_drawn_in_groups(large: ReportData) -> None:
    plan = dissect(large, slots(large.targets))
    assert plan.grouped == 3 and len(plan.cells) == 167
    assert plan.cells[-1].last == 499


def test_the_fastest_target_is_named_only_when_intervals_are_apart(full: ReportData) -> None:
    colours = slots(full.targets)
    costs = account(full, dissect(full, colours).cells, colours)
    assert [lane.target for lane in costs.operator_lanes] == ["openvino:CPU", "onnxruntime:CPU"]
    verdicts = {row.verdict for row in costs.operators}
    assert "same within noise" in verdicts and any(verdict.endswith("faster") for verdict in verdicts)
    assert all((row.winner is None) == (row.verdict == "same within noise") for row in costs.operators)
    assert costs.tally[0].startswith("openvino:CPU wins")


def test_shares_are_of_all_operators_and_not_only_of_those_shown(full: ReportData) -> None:
    colours = slots(full.targets)
    costs = account(full, dissect(full, colours).cells, colours)
    assert len(costs.operators) < costs.operator_count
    assert 0.9 < sum(row.costs[0].share or 0 for row in costs.operators) < 1


def test_parts_of_another_batch_are_not_mixed_in(full: ReportData) -> None:
    colours = slots(full.targets)
    before = account(full, dissect(full, colours).cells, colours)
    fake = [
        replace(each, key=replace(each.key, batch=8), samples=Samples(timed_s=(1e-9,) * 9))
        for each in full.outcomes
        if hasattr(each, "samples")
    ]
    assert account(replace(full, outcomes=(*full.outcomes, *fake)), dissect(full, colours).cells, colours) == before


def test_equal_reasons_are_told_once_with_their_count(full: ReportData) -> None:
    found = troubles(full)
    assert found[0].state == "failed" and "signal 9" in found[0].reason
    bf16 = [each for each in found if each.kind == "trial"]
    assert len({each.target for each in bf16}) == len(bf16)
    assert sum(len(each.subjects) for each in bf16) == sum(trial.state == "refused" for trial in full.trials) > len(bf16)
    assert [each.caution.code for each in cautions(full)] == ["machine-busy", "spread"]


def test_knobs_are_ranked_by_what_they_changed(full: ReportData) -> None:
    effects = knob_effects(full.trials)
    assert [effect.name for effect in effects][:3] == ["target", "intra_op_num_threads", "INFERENCE_NUM_THREADS"]
    assert effects[2].best == "2" and effects[2].values == ("1", "2", "3", "4")


def test_charts_follow_the_page_and_carry_no_font_date_or_foreign_id(full: ReportData) -> None:
    colours = slots(full.targets)
    for chart in (distribution(full, colours), search(full, colours), knobs(full, colours)):
        assert chart is not None
        for svg in (chart.wide, chart.narrow):
            assert svg.startswith("<svg class=") and "<title id=" in svg and "<desc id=" in svg
            assert "DejaVu" not in svg and "xmlns" not in svg and "metadata" not in svg and "<style" not in svg
            assert not re.search("#0a0[bc]", svg) and "var(--muted)" in svg
            assert not re.search(r"~\d+~", svg)
        assert not set(re.findall(r'id="([^"]+)"', chart.wide)) & set(re.findall(r'id="([^"]+)"', chart.narrow))


def test_names_never_reach_matplotlib(full: ReportData) -> None:
    """A formula stays text: mathtext would swallow the dollars."""
    odd = tuple(
        replace(trial, config=replace(trial.config, settings=(("$x^2$<b>", f"$\\alpha_{trial.number % 3}$"),))) for trial in full.trials
    )
    chart = knobs(replace(full, trials=odd), {})
    assert chart is not None
    assert "$x^2$&lt;b&gt;" in chart.wide and "$\\alpha_1$" in chart.wide


def test_the_production_code_is_python_that_names_every_input(hostile: ReportData, full: ReportData) -> None:
    ast.parse(recipes.production(full))
    assert '"float32"' in recipes.production(full) and "'data': np.zeros((1, 3, 224, 224)" in recipes.production(full)
    tree = ast.parse(recipes.production(hostile))
    keys = [key.value for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys if isinstance(key, ast.Constant)]
    assert keys == [spec.name for spec in hostile.run.model.inputs]


@pytest.mark.parametrize(
    ("dtype", "said"),
    [("string", "dtype=object"), ("int64", 'dtype="int64"'), ("bfloat16", "ml_dtypes.bfloat16"), ("bool", 'dtype="bool"')],
)
def test_the_production_code_knows_each_type(full: ReportData, dtype: str, said: str) -> None:
    spec = TensorSpec(name="x", dtype=dtype, shape=(None, 4))
    run = replace(full.run, model=replace(full.run.model, inputs=(spec,)))
    code = recipes.production(replace(full, run=run))
    assert said in code and "(1, 4)" in code
    ast.parse(code)


def test_a_scalar_input_has_an_empty_shape(full: ReportData) -> None:
    run = replace(full.run, model=replace(full.run.model, inputs=(TensorSpec(name="s", dtype="float32", shape=()),)))
    assert "np.zeros((), " in recipes.production(replace(full, run=run))


def test_markdown_holds_the_verdict_and_no_live_markup(full: ReportData, hostile: ReportData) -> None:
    text = markdown_summary(full)
    assert text.startswith("**openvino:CPU, 2 threads: 2.71 ms") and "| onnxruntime:CPU default | 5.19 ms |" in text
    bad: Any = markdown_summary(hostile)
    assert "\\<script\\>" in bad and not re.search(r"(?<!\\)<", bad)


def test_a_notebook_shows_the_verdict_and_the_comparison_with_every_name_escaped(page: Callable[[str], Any]) -> None:
    row = {"name": HOSTILE[0], "median_s": 0.002, "ci95_s": [0.0019, 0.0021], "ratio_to_plan": 2.0, "eligible": True, "verdict": "faster"}
    left_out = {
        "name": "bf16",
        "median_s": None,
        "ci95_s": None,
        "ratio_to_plan": None,
        "eligible": False,
        "reason": "cosine 0.9 is below 0.999",
    }
    summary = {
        "verdict": f"{HOSTILE[1]} won",
        "plan": {"path": "m.aivmm"},
        "measured": {"median_s": 0.001, "ci95_s": [0.0009, 0.0011]},
        "baselines": [row, left_out],
    }
    html = notebook(summary, "m.aivmm/report.html")
    seen = page(html)
    assert seen.unclosed == () and not seen.all("script") and not seen.all("img")
    assert len(seen.all("tr")) == 4 and "1.00 ms" in html and "2.00×" in html and "not eligible" in html
    assert notebook({"verdict": "No plan meets the constraints.", "plan": None}, "r.html").startswith("<p><b>No plan")

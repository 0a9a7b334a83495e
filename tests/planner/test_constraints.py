"""The constraint grammar: what it reads, what it refuses and in which words, and how violations are told."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivmm.errors import UsageError
from aivmm.planner.constraints import KNOWN, Constraint, check, human, parse, unjudged


def only(expression: str) -> Constraint:
    (constraint,) = parse(expression, measured=KNOWN)
    return constraint


def refusal(expression: str, **options: frozenset[str]) -> str:
    with pytest.raises(UsageError) as caught:
        parse(expression, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- reading ---


@pytest.mark.parametrize(
    ("expression", "metric", "operator", "limit"),
    [
        ("latency<100ms", "latency", "<", 0.1),
        ("p99<=20ms", "p99", "<=", 0.02),
        ("throughput>=500/s", "throughput", ">=", 500.0),
        ("memory<4GB", "memory", "<", 4e9),
        ("device_memory<8GB", "device_memory", "<", 8e9),
        ("size<50MB", "size", "<", 5e7),
        ("power<=15W", "power", "<=", 15.0),
        ("energy<50mJ", "energy", "<", 0.05),
        ("compile<60s", "compile", "<", 60.0),
        ("first_inference<2s", "first_inference", "<", 2.0),
        ("cosine>=0.999", "cosine", ">=", 0.999),
        ("top1_agreement>=0.99", "top1_agreement", ">=", 0.99),
        ("sqnr>=30dB", "sqnr", ">=", 30.0),
        ("metric>=0.9", "metric", ">=", 0.9),
    ],
)
def test_every_example_of_the_design_is_read_in_si_units(expression: str, metric: str, operator: str, limit: float) -> None:
    constraint = only(expression)
    assert (constraint.metric, constraint.operator, constraint.text) == (metric, operator, expression)
    assert constraint.limit == pytest.approx(limit, rel=1e-12)


@pytest.mark.parametrize(
    ("written", "limit"),
    [
        *(
            ("latency<5" + unit, 5 * factor)
            for unit, factor in [("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("μs", 1e-6), ("s", 1), ("min", 60)]
        ),
        *(("memory<5" + unit, 5 * factor) for unit, factor in [("B", 1), ("KB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)]),
        *(("memory<5" + unit, 5 * 2**power) for unit, power in [("KiB", 10), ("MiB", 20), ("GiB", 30)]),
        ("power<5mW", 0.005),
        ("energy<5J", 5),
        ("latency<.5s", 0.5),
        ("latency<5.s", 5),
        ("latency<1.5e-3s", 0.0015),
        ("metric>-0.5", -0.5),
        ("metric<0.5", 0.5),
    ],
)
def test_each_unit_and_each_way_to_write_a_number_is_read(written: str, limit: float) -> None:
    assert only(written).limit == pytest.approx(limit, rel=1e-12)


def test_comparisons_are_joined_by_commas_and_white_space_is_free() -> None:
    found = parse("  latency < 100 ms ,targets  in( openvino:NPU,openvino:GPU ) , cosine >=\t0.999 ")
    assert [str(each) for each in found] == ["latency<100ms", "targets in (openvino:NPU, openvino:GPU)", "cosine>=0.999"]
    assert [each.text for each in found] == ["latency < 100 ms", "targets  in( openvino:NPU,openvino:GPU )", "cosine >=\t0.999"]
    assert found[1].names == ("openvino:NPU", "openvino:GPU")


def test_patterns_of_targets_may_be_short_or_have_a_star() -> None:
    assert only("targets in (openvino, *:CPU, onnxruntime:CUDA:0)").names == ("openvino", "*:CPU", "onnxruntime:CUDA:0")


FINITE = st.floats(min_value=1e-12, max_value=1e15)
NUMERIC = (
    st.builds(
        Constraint,
        metric=st.sampled_from(["latency", "p99", "compile", "first_inference"]),
        operator=st.sampled_from(["<", "<="]),
        limit=FINITE,
    )
    | st.builds(
        Constraint, metric=st.sampled_from(["memory", "device_memory", "size", "power", "energy"]), operator=st.just("<"), limit=FINITE
    )
    | st.builds(Constraint, metric=st.sampled_from(["throughput", "sqnr", "metric"]), operator=st.sampled_from([">", ">="]), limit=FINITE)
    | st.builds(
        Constraint,
        metric=st.sampled_from(["cosine", "top1_agreement", "top5_agreement"]),
        operator=st.just(">="),
        limit=st.floats(min_value=0, max_value=1),
    )
)
NAMES = st.lists(st.from_regex(r"[a-z*]{1,5}(:[A-Z]{1,3}([.:][0-9]{1,2})?)?", fullmatch=True), min_size=1, max_size=3)
ANY = NUMERIC | st.builds(lambda names: Constraint(metric="targets", operator="in", names=tuple(names)), NAMES)


@given(st.lists(ANY, min_size=1, max_size=4), st.sampled_from([",", ", ", " ,\t"]))
def test_what_is_written_reads_back_as_the_very_same_constraints(constraints: list[Constraint], comma: str) -> None:
    written = comma.join(map(str, constraints))
    assert parse(written, measured=KNOWN) == tuple(constraints)


@given(st.text(alphabet="latencyp9<>=, 0.1msGB()in:%e-é\n", max_size=30) | st.text(max_size=20))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        parse(text, measured=KNOWN)
    except UsageError as error:
        assert "\n" not in str(error)
        assert error.advice


@given(NUMERIC, st.integers(2, 9), st.sampled_from(["ms", "MB", "W", "/s", "dB", "parsec", ""]))
def test_a_unit_of_another_quantity_is_never_taken(constraint: Constraint, number: int, unit: str) -> None:
    right = {
        "ms": {"latency", "p99", "compile", "first_inference"},
        "MB": {"memory", "device_memory", "size"},
        "W": {"power"},
        "/s": {"throughput"},
        "dB": {"sqnr"},
        "parsec": set(),
        "": {"metric"},
    }
    if constraint.metric in right[unit]:
        assert only(f"{constraint.metric}{constraint.operator}{number}{unit}").operator == constraint.operator
    else:
        refusal(f"{constraint.metric}{constraint.operator}{number}{unit}", measured=KNOWN)


# --- refusing ---


@pytest.mark.parametrize(
    ("expression", "place", "words"),
    [
        ("", "at its end", "expected the name of a metric"),
        ("latency<100ms,", "at its end", "expected the name of a metric"),
        ("latency", "at its end", "expected <, <=, > or >= after latency"),
        ("latency=100ms", "at '=100ms' (character 8)", "expected <, <=, > or >= after latency"),
        ("latency<fast", "at 'fast' (character 9)", "expected a number to compare latency with; for example latency<100ms"),
        ("latency<100", "at its end", "latency is a time and needs a unit (ns, us, ms, s, min); for example latency<100ms"),
        ("latency<100, p99<1s", "at character 12", "needs a unit"),
        ("latency<100 MB", "at 'MB' (character 13)", "'MB' is a unit of a size, and latency is a time"),
        (
            "memory<4gb",
            "at 'gb' (character 9)",
            "unknown unit 'gb' (did you mean GB?), and memory is a size (B, KB, KiB, MB, MiB, GB, GiB, TB)",
        ),
        ("throughput>=500", "at its end", "throughput is a rate and needs a unit (/s); for example throughput>=500/s"),
        ("cosine>=99%", "at '%' (character 11)", "cosine takes no unit; write a share, like cosine>=0.999"),
        ("cosine>=0.9s", "at 's' (character 12)", "cosine takes no unit"),
        ("speed<3s", "at 'speed<3s' (character 1)", "unknown metric 'speed'; choose from compile, cosine"),
        ("latency<1s p99<2s", "at 'p99<2s' (character 12)", "expected a comma or the end"),
        ("latency<1e999s", "at '1e999s' (character 9)", "the number is too large"),
        ("targets", "at its end", "expected `in` after targets"),
        ("targets=openvino:CPU", "at '=openvino:CPU' (character 8)", "expected `in` after targets; for example targets in (openvino:NPU"),
        ("targets in openvino:CPU", "at 'openvino:CPU' (character 12)", "expected ( before the targets"),
        ("targets in ()", "at ')' (character 13)", "expected a target"),
        ("targets in (openvino:CPU", "at its end", "expected a comma or ) after a target"),
    ],
)
def test_what_does_not_parse_is_refused_with_the_place_and_an_example(expression: str, place: str, words: str) -> None:
    said = refusal(expression)
    assert f"constraint {expression!r} does not parse {place}: " in said
    assert words in said


@pytest.mark.parametrize(
    ("expression", "meant"),
    [
        ("latency>100ms", "did you mean latency<100ms?"),
        ("memory >= 4GB", "did you mean memory <= 4GB?"),
        ("cosine<=0.9", "did you mean cosine>=0.9?"),
        ("throughput<500/s", "did you mean throughput>500/s?"),
    ],
)
def test_a_direction_nobody_wants_is_refused_with_the_likely_intent(expression: str, meant: str) -> None:
    assert meant in refusal(expression)


@pytest.mark.parametrize(
    "expression", ["latency<0ms", "latency<=0s", "latency<-3ms", "cosine>1", "cosine>=1.01", "cosine>=-2", "throughput>-1/s"]
)
def test_a_limit_that_can_never_decide_anything_is_refused(expression: str) -> None:
    assert "makes no sense" in refusal(expression)


@pytest.mark.parametrize("expression", ["power<=15W", "energy<50mJ", "device_memory<8GB"])
def test_what_is_not_measured_here_is_refused_with_what_is(expression: str) -> None:
    measured = KNOWN - {"power", "energy", "device_memory"}
    said = refusal(expression, measured=measured)
    assert "it is not measured on this machine" in said
    assert all(name in said for name in measured)
    assert only(expression).metric in KNOWN


# --- judging ---


def test_a_kept_limit_is_no_violation_and_equality_follows_the_operator() -> None:
    constraints = parse("latency<100ms, p99<=20ms, throughput>=500/s")
    kept = {"latency": 0.0999, "p99": 0.02, "throughput": 500.0}
    assert check(constraints, kept) == ()
    (violation,) = check(constraints, kept | {"latency": 0.1})
    assert violation.percent == 0
    assert str(violation) == "latency is 100 ms, not below it as latency<100ms asks"


@pytest.mark.parametrize(
    ("expression", "value", "percent", "sentence"),
    [
        ("latency<100ms", 0.12, 20, "latency is 120 ms, 20 % above the limit of 100 ms"),
        ("throughput>=500/s", 400.0, 20, "throughput is 400/s, 20 % below the limit of 500/s"),
        ("cosine>=0.999", 0.99, 0.9009, "cosine is 0.99, 0.9 % below the limit of 0.999"),
        ("latency<1us", 72.4e-6, 7140, "latency is 72.4 µs, 72 times the limit of 1 µs"),
        ("sqnr>=300dB", -5000.0, 1766.67, "sqnr is -5000 dB, 1800 % below the limit of 300 dB"),
        ("memory<4GB", 4.0004e9, 0.01, "memory is 4.0004 GB, 0.01 % above the limit of 4 GB"),
        ("metric>=0", -0.5, math.inf, "metric is -0.5, below the limit of 0"),
    ],
)
def test_a_violation_says_by_how_much(expression: str, value: float, percent: float, sentence: str) -> None:
    constraint = only(expression)
    (violation,) = check([constraint], {constraint.metric: value})
    assert violation.constraint == constraint
    assert violation.value == value
    assert violation.percent == pytest.approx(percent, rel=1e-3)
    assert str(violation) == sentence


@pytest.mark.parametrize("metrics", [{}, {"latency": math.nan}])
def test_what_has_no_number_is_neither_kept_nor_violated(metrics: dict[str, float]) -> None:
    constraints = parse("latency<100ms, cosine>=0.999")
    assert check(constraints, {"cosine": 1.0, **metrics}) == ()
    assert unjudged(constraints, {"cosine": 1.0, **metrics}) == constraints[:1]


def test_targets_outside_the_allowed_are_named() -> None:
    constraints = parse("targets in (openvino:GPU, *:CPU)")
    assert check(constraints, {}, targets=["openvino:GPU.1", "onnxruntime:CPU"]) == ()
    (violation,) = check(constraints, {}, targets=["openvino:GPU.1", "openvino:NPU", "onnxruntime:CUDA:0"])
    assert str(violation) == "openvino:NPU and onnxruntime:CUDA:0 are not among openvino:GPU, *:CPU"
    assert unjudged(constraints, {}) == constraints
    assert unjudged(constraints, {}, targets=[]) == ()


@given(NUMERIC, FINITE)
def test_a_number_is_kept_or_violated_and_the_sentence_shows_two_numbers_that_differ(constraint: Constraint, value: float) -> None:
    violations = check([constraint], {constraint.metric: value})
    assert bool(violations) is not constraint.allows(value)
    for violation in violations:
        assert violation.percent >= 0
        if value != constraint.limit:
            shown, _, wanted = violation.sentence.partition("the limit of ")
            assert wanted not in shown.removeprefix(f"{constraint.metric} is ").partition(",")[0].split(",")


# --- words ---


@pytest.mark.parametrize(
    ("value", "metric", "words"),
    [
        (0.00271, "latency", "2.71 ms"),
        (0.9999996, "latency", "1 s"),
        (0.0009999996, "latency", "1 ms"),
        (11.3e-6, "p99", "11.3 µs"),
        (5e-9, "p99", "5 ns"),
        (75.0, "compile", "75 s"),
        (600.0, "compile", "10 min"),
        (512e6, "memory", "512 MB"),
        (12.0, "size", "12 B"),
        (5e16, "memory", "50000 TB"),
        (5630.4, "throughput", "5630/s"),
        (0.5, "throughput", "0.5/s"),
        (15.0, "power", "15 W"),
        (0.042, "energy", "42 mJ"),
        (31.25, "sqnr", "31.2 dB"),
        (0.99987654, "cosine", "0.999877"),
        (0.0, "metric", "0"),
        (math.nan, "latency", "unknown"),
        (math.inf, "latency", "inf"),
    ],
)
def test_numbers_are_shown_as_people_write_them(value: float, metric: str, words: str) -> None:
    assert human(value, metric) == words


@given(FINITE, st.sampled_from(["latency", "memory", "throughput", "power"]))
def test_shown_numbers_are_near_the_truth_and_can_be_read_back(value: float, metric: str) -> None:
    operator = ">" if metric == "throughput" else "<"
    words = human(value, metric, digits=6)
    if float(words.removesuffix("/s").split()[0]):
        assert only(f"{metric}{operator}{words}").limit == pytest.approx(value, rel=1e-5)

"""What is said to have made calls slow: others, this process itself, a quota, a card, or nothing that is seen here."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivmm.errors import Unsupported
from aivmm.runtime import causes
from aivmm.runtime.causes import Cause, Machine, Witness
from aivmm.runtime.nvml import CardState
from aivmm.runtime.target import Device
from tests.runtime.machines import ByHand, counted

CALL_S = 5e-3


def calls(machine: ByHand, witness: Witness, seconds: float, *, factor: float = 1.0, **cores: float) -> None:
    """Let calls of 5 ms come in a row for so long, `factor` times as slow, while so many cores do something else; this process has one."""
    count = round(seconds / CALL_S / factor)
    machine.passes(seconds, **({"own": seconds} | {name: share * seconds for name, share in cores.items()}))
    witness.calls += count
    witness.busy_ns += int(seconds * 1e9)


def asked(witness: Witness, seconds: float, factor: float = 1.4) -> Cause | None:
    """Ask for the cause of slow calls that came for so long."""
    return witness.cause(round(seconds / CALL_S / factor), int(seconds * 1e9), CALL_S * 1e9)


def seen(
    *,
    before: dict[str, float] | None = None,
    users: frozenset[int] = frozenset(),
    slowed: tuple[str, str] = ("", ""),
    sees_waits: bool = True,
    **cores: float,
) -> Cause | None:
    """Return the cause that is seen where calls are slower for a second, after ten as usual."""
    machine = ByHand()
    machine.sees_waits = sees_waits
    machine.slowed = slowed[0]
    witness = Witness(machine)
    witness.begin()
    calls(machine, witness, 10.0, **(before or {}))
    witness.usual()
    witness.suspect()
    machine.users, machine.slowed = users, slowed[1]
    calls(machine, witness, 1.0, factor=1.4, **cores)
    return asked(witness, 1.0)


def machine_cores() -> str:
    return f"{os.cpu_count()} core" + ("s" if os.cpu_count() != 1 else "")


def test_others_who_share_a_core_take_what_calls_lose_and_make_them_wait() -> None:
    cause = seen(others=0.29, waited=0.29, own=0.71)
    assert cause is not None and cause.name == "other processes"
    assert cause.words == (
        "threads of this process waited for cores, 0.29 s in each second, and other processes took "
        f"0.29 of {machine_cores()} meanwhile (0.00 before)"
    )


def test_others_who_slow_calls_from_another_core_take_more_than_calls_lose() -> None:
    cause = seen(others=0.9)
    assert cause is not None and cause.name == "other processes"
    assert cause.words == f"other processes took 0.90 of {machine_cores()} meanwhile (0.00 before)"
    assert seen(others=0.29) is None  # calls lose as much, and did not wait
    cause = seen(others=0.29, sees_waits=False)
    assert cause is not None and cause.name == "other processes"


def test_others_who_do_what_they_always_did_are_no_cause() -> None:
    assert seen() is None
    for sees in (True, False):
        assert seen(before={"others": 0.8}, others=0.8, sees_waits=sees) is None
        assert seen(before={"others": 0.8}, others=0.8 * 1.4, sees_waits=sees) is None  # all is slow, and so are they
        assert seen(before={"others": 0.8, "waited": 0.4}, others=0.8 * 1.4, waited=0.4, sees_waits=sees) is None
        assert seen(others=0.04, sees_waits=sees) is None
    cause = seen(before={"others": 0.8}, others=1.9)
    assert cause is not None and "took 1.90 of" in cause.words and "(0.80 before)" in cause.words


def test_other_work_of_this_process_is_a_cause() -> None:
    cause = seen(own=2.0)
    assert cause is not None and cause.name == "this process" and "other work of this process took 1.00 of" in cause.words
    assert seen(before={"own": 4.0}, own=4.0) is None  # threads that spin as long as a call lasts
    assert seen(before={"own": 4.0}, own=4.5) is None  # not always for as long


def test_threads_that_wait_for_a_core_tell_of_it_whoever_has_it() -> None:
    cause = seen(waited=0.3, own=1.0)
    assert cause is not None and cause.name == "this process" and "waited for cores, 0.30 s in each second" in cause.words
    cause = seen(before={"others": 1.0}, waited=0.3, others=1.0)
    assert cause is not None and cause.name == "other processes" and "other processes took 1.00 of" in cause.words
    assert seen(before={"waited": 0.3}, waited=0.3) is None
    cause = seen(before={"waited": 0.8, "own": 0.2, "others": 1.8}, waited=0.9, own=0.1, others=1.9)  # where there was little left to lose
    assert cause is not None and cause.name == "other processes"


def test_a_quota_is_a_cause() -> None:
    cause = seen(withheld=0.3, own=0.7)
    assert cause is not None and cause.name == "cpu quota" and "0.30 s of each second" in cause.words


def test_a_quota_that_stops_many_cores_at_once_is_told_by_the_clock() -> None:
    """The kernel adds up what each core was stopped for: four threads that are stopped for 0.3 s are 1.2."""
    cause = seen(before={"own": 4.0}, withheld=1.2, own=2.8)
    assert cause is not None and cause.name == "cpu quota" and "for 0.30 s of each second" in cause.words


def test_who_begins_to_compute_on_the_card_is_a_cause() -> None:
    cause = seen(users=frozenset({7}))
    assert cause is not None and cause.name == "card"


def test_a_card_that_begins_to_slow_down_is_a_cause_and_one_that_always_does_is_none() -> None:
    assert seen(slowed=("power cap", "power cap")) is None
    cause = seen(slowed=("power cap", "hardware thermal limit, power cap"))
    assert cause is not None and cause.name == "card" and cause.words == "the card slows down (hardware thermal limit, power cap)"


def test_what_the_host_takes_is_said_and_is_no_cause_here() -> None:
    assert seen(stolen=0.5) is None


@pytest.mark.parametrize(
    ("counted", "slowed", "name", "words"),
    [
        ({"stolen": 0.3}, "", "none seen", "and the host took 0.30 of"),
        ({}, "", "none seen", "calls need 1.4 times the CPU time (the host, the clock or the temperature)"),
        ({"own": 0.7}, "", "none seen", "calls need 0.98 times the CPU time, and wait otherwise (a device, a file, a lock)"),
        ({"waited": 0.3}, "", "none seen", "threads of this process wait for cores, 0.30 s in each second (0.30 before)"),
        ({}, "hardware thermal limit", "card", "the card slows down (hardware thermal limit)"),
    ],
)
def test_where_no_cause_is_seen_it_says_what_is_seen_beside(counted: dict[str, float], slowed: str, name: str, words: str) -> None:
    machine = ByHand()
    machine.slowed = slowed
    witness = Witness(machine)
    witness.begin()
    calls(machine, witness, 10.0, waited=counted.get("waited", 0.0))
    witness.usual()
    calls(machine, witness, 60.0, factor=1.4, **counted)
    assert asked(witness, 60.0) is None
    cause = witness.unseen().cause
    assert cause.name == name and words in cause.words


def test_on_a_machine_that_was_full_others_are_the_cause_of_waits_although_they_cannot_take_much_more() -> None:
    """Seen where a test ran beside others: 1.6 of 2 cores before, three more processes on the core, and `this process` was named."""
    machine = ByHand()
    machine.cores = 2
    witness = Witness(machine)
    witness.begin()
    calls(machine, witness, 10.0, others=1.6, own=0.4, waited=0.1)
    witness.usual()
    witness.suspect()
    calls(machine, witness, 1.0, factor=2.5, others=1.4, own=0.55, waited=0.8)
    cause = asked(witness, 1.0, factor=2.5)
    assert cause is not None and cause.name == "other processes"


def test_from_the_beginning_others_are_held_against_a_plan_that_was_proven_alone() -> None:
    machine = ByHand()
    witness = Witness(machine)
    witness.begin()
    calls(machine, witness, 1.0, factor=1.4, others=0.3, waited=0.3, own=3.0)
    cause = asked(witness, 1.0)
    assert cause is not None and cause.name == "other processes" and "before" not in cause.words
    assert "a plan from elsewhere" in witness.unseen().cause.words


def test_what_came_while_nobody_called_is_not_held_against_the_next_calls() -> None:
    """An hour of somebody's work in a pause: less than a thousand calls ago, and yet the last look says nothing of now."""
    machine = ByHand()
    witness = Witness(machine)
    witness.begin()
    calls(machine, witness, 2.0)
    witness.usual()
    machine.passes(3600.0, others=3600.0)
    witness.suspect()
    calls(machine, witness, 1.0, factor=1.4)
    assert asked(witness, 1.0) is None


@pytest.mark.parametrize("when", ["suspect", "cause", "usual"])
def test_a_look_that_fails_is_none(when: str) -> None:
    """It counted as 0: then others had taken less than nothing, or all that they ever took in one second."""
    machine = ByHand()
    witness = Witness(machine)
    machine.passes(1000.0, own=100.0, others=900.0, waited=50.0)
    witness.begin()
    calls(machine, witness, 10.0)
    machine.fails = when == "usual"
    witness.usual()
    machine.fails = False
    calls(machine, witness, 10.0)
    witness.usual()
    machine.fails = when == "suspect"
    witness.suspect()
    machine.fails = when == "cause"
    calls(machine, witness, 1.0, factor=1.4)
    assert asked(witness, 1.0) is None
    machine.fails = False
    calls(machine, witness, 1.0, factor=1.4, others=1.8, own=0.6)
    cause = asked(witness, 1.0)
    assert cause is not None and cause.name == "other processes"


def test_more_than_there_are_cores_is_no_account() -> None:
    assert seen(others=65.0) is None and seen(others=63.0) is not None  # of 64


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(1, 600), st.booleans()), min_size=1, max_size=200), call=st.floats(1e-5, 9e-3))
def test_it_looks_at_most_once_in_a_thousand_calls_where_no_alarm_is(steps: list[tuple[int, bool]], call: float) -> None:
    machine = ByHand()
    witness = Witness(machine)
    witness.begin()
    witness.usual()
    before, made = machine.looks, 0
    for count, noisy in steps:
        machine.passes(count * call)
        witness.calls += count
        witness.busy_ns += int(count * call * 1e9)
        made += count
        witness.suspect() if noisy else witness.quiet()
    assert machine.looks - before <= 1 + made / 1000


# --- the machine's own counters ---


def burn(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@contextmanager
def another(code: str) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def spent(during: Callable[[], object]) -> tuple[float, float, float, float]:
    """Return own CPU time, that of others, waits and seconds meanwhile."""
    machine = Machine()
    before = counted(machine)
    during()
    found = counted(machine).since(before)
    return found.own, found.others, found.waited, found.seconds


def test_own_work_is_no_others_work() -> None:
    def work() -> None:
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass

    own, others, _, seconds = spent(work)
    assert own >= 0.3
    assert others <= (os.cpu_count() or 1) * seconds - own + 0.1  # ticks of 10 ms


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_who_shares_a_core_is_seen_in_others_time_and_in_own_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causes, "_MOST_THREADS", 10_000)  # other tests leave runtimes' threads behind in this process
    mine = os.sched_getaffinity(0)
    core = max(mine)
    found: list[tuple[float, float, float, float]] = []

    def pinned() -> None:  # a thread, so that nothing else of the tests is pinned
        os.sched_setaffinity(0, {core})
        found.append(spent(lambda: burn(1.0)))

    with another(f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"):
        thread = threading.Thread(target=pinned)
        thread.start()
        thread.join()
    ((own, others, waited, seconds),) = found
    assert others > 0.2 * seconds and waited > 0.2 * seconds
    assert own < 0.8 * seconds


def test_looking_costs_little() -> None:
    """Of a call of a millisecond it is a part, and comes once in a thousand."""
    machine = Machine()
    machine.counted()
    durations = []
    for _ in range(200):
        started = time.perf_counter()
        machine.counted()
        durations.append(time.perf_counter() - started)
    started = time.perf_counter()
    for _ in range(20_000):
        pass
    assert sorted(durations)[20] < 20 * (time.perf_counter() - started)  # what a loop of 20,000 turns takes, several times


def test_a_system_that_is_not_linux_is_asked_by_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    before = psutil.cpu_times()
    own, others, *_ = spent(lambda: burn(0.3))
    after = psutil.cpu_times()
    assert own > 0 and others <= after.user + after.system - before.user - before.system


def test_where_nothing_is_counted_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr(causes, "_read", missing)
    found = counted(Machine())
    assert not Machine().sees_waits
    assert found.own > 0 and found.others == found.waited == found.stolen == 0.0


class Proc:
    """What Linux says of this process's threads and of all others, by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waited_s: dict[str, float] = {"1": 0.0}
        self.busy_s = 1000.0
        self.full = False  # no file can be opened any more
        self.reads = 0
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(causes, "_TICKS", 100)
        monkeypatch.setattr(causes, "_read", self.read)
        monkeypatch.setattr(os, "listdir", lambda _: list(self.waited_s))

    def read(self, path: str) -> bytes:
        self.reads += 1
        if self.full:
            raise OSError(errno.EMFILE, "too many open files", path)
        if path == "/proc/stat":
            return f"cpu {int(self.busy_s * 100)} 0 0 0 0 0 0 0 0 0\n".encode()
        return f"1000 {int(self.waited_s.get(path.split('/')[4], 0.0) * 1e9)} 1".encode()


def test_a_thread_that_ends_takes_its_waits_with_it_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    proc, machine = Proc(monkeypatch), Machine()
    proc.waited_s = {"1": 3.0, "2": 50.0}
    before = counted(machine)
    proc.waited_s = {"1": 3.5}
    ended = counted(machine)
    assert machine.sees_waits and ended.waited - before.waited == pytest.approx(0.5)
    proc.waited_s = {"1": 3.75, "2": 0.25}  # another one that got the number
    assert counted(machine).waited - ended.waited == pytest.approx(0.5)


def test_a_machine_that_cannot_be_read_just_now_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    proc, machine = Proc(monkeypatch), Machine()
    proc.waited_s = {"1": 3.0}
    before = counted(machine)
    proc.full = True
    assert machine.counted() is None
    proc.full, proc.busy_s, proc.waited_s = False, 1002.0, {"1": 3.5}
    spent = counted(machine).since(before)
    assert spent.others == pytest.approx(2.0, abs=0.5) and spent.waited == pytest.approx(0.5)


def test_waits_of_many_threads_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs 4 µs, under a lock that calls wait for."""
    proc, machine = Proc(monkeypatch), Machine()
    proc.waited_s = {str(each): 1.0 for each in range(500)}
    assert counted(machine).waited == 0.0 and not machine.sees_waits and proc.reads < 100
    proc.waited_s = {"1": 2.0}
    assert counted(machine).waited == 0.0  # since when is not known
    proc.waited_s = {"1": 3.0}
    assert counted(machine).waited == pytest.approx(1.0) and machine.sees_waits


def test_a_group_that_is_stopped_is_seen_below_one_that_was_stopped_for_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pod, mine = tmp_path / "pod", tmp_path / "mine"
    pod.write_text("throttled_usec 1000000000\n")
    mine.write_text("throttled_usec 0\n")
    monkeypatch.setattr(causes, "throttling_files", lambda: (str(pod), str(mine)))
    machine = Machine()
    before = counted(machine)
    mine.write_text("throttled_usec 30000000\n")
    pod.write_text("throttled_usec 1010000000\n")
    stopped = counted(machine)
    assert stopped.withheld - before.withheld == pytest.approx(30.0)
    mine.unlink()
    assert counted(machine).withheld == stopped.withheld
    mine.write_text("throttled_usec 31000000\n")
    assert counted(machine).withheld - stopped.withheld == pytest.approx(1.0)


def test_cards_are_asked_where_their_library_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    users: dict[str, dict[int, int | None]] = {"GPU-1": {7: 1}, "GPU-2": {8: None}}
    machine = Machine([Device(kind="gpu", model="card", uid=each) for each in (*users, "GPU-3")] + [Device(kind="cpu", model="cpu")])
    assert machine.on_cards() == frozenset() and machine.slowed_cards() == ""  # it is not, on a machine without a driver

    def card_users(uid: str) -> dict[int, int | None]:
        if uid not in users:
            raise Unsupported("no such card")
        return users[uid]

    def card_state(uid: str) -> CardState:
        return CardState(uid=uid, sm_mhz=None, most_sm_mhz=None, temperature_c=None, power_w=None, slowed_by=("power brake",))

    monkeypatch.setattr(causes, "is_started", lambda: True)
    monkeypatch.setattr(causes, "card_users", card_users)
    monkeypatch.setattr(causes, "card_state", card_state)
    assert machine.on_cards() == {7, 8} and machine.slowed_cards() == "power brake"
    assert Machine([Device(kind="cpu", model="cpu")]).on_cards() == frozenset()

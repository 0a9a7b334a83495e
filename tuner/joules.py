"""What one sample costs in energy, and what a plan holds of a device's own memory: measured where the hardware tells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from aivmm.errors import Unsupported
from aivmm.planner.constraints import Constraint
from aivmm.planner.objectives import Objective
from aivmm.probes.client import Worker, run_limit_s
from aivmm.probes.energy import POWERCAP, SHORTEST_S, EnergyMeter, counters
from aivmm.probes.machine import measuring
from aivmm.runtime.null import counts_itself
from aivmm.runtime.nvml import is_nvidia, process_memory_bytes, total_energy_j
from aivmm.runtime.target import Target

ENERGY = ("energy", "power")  # constraints that need a counter of energy
COUNTED = ("energy_j", "power_w", "card_energy_j", "card_power_w")  # what a counter gives


def asks_for_energy(objectives: Iterable[Objective], constraints: Iterable[Constraint]) -> bool:
    """Say whether a search has to count the energy of each candidate: it is an objective, or a limit is on it."""
    return any(each.name == "energy" for each in objectives) or any(each.metric in ENERGY for each in constraints)


class _Racer(Protocol):
    """What has been raced in a worker of its own."""

    @property
    def worker(self) -> Worker:
        """Where it is loaded, under `name`."""

    @property
    def name(self) -> str: ...

    @property
    def batch(self) -> int: ...


def why_no_energy(targets: set[Target], *, root: Path = POWERCAP) -> str:
    """Return why the energy of these targets cannot be counted; "" when it can."""
    if targets and counts_itself(targets):
        return ""
    found, missing = counters(targets, root=root)
    return "; ".join(f"{name}: {reason}" for name, reason in missing.items()) or ("" if found else "this machine has no counter of energy")


def has_counters(target: Target, *, root: Path = POWERCAP) -> bool:
    """Say whether all of the energy that a target uses can be counted here."""
    return not why_no_energy({target}, root=root)


def energy_metrics(racer: _Racer, targets: set[Target], *, seconds: float = SHORTEST_S, root: Path = POWERCAP) -> dict[str, float]:
    """Run for `seconds` while the counters count; return metrics of one sample.

    `energy_j` and `power_w` where every counter could be read; where only the card's own could, `card_energy_j` and `card_power_w`: they
    compare with those of other plans on that card, and with nothing else. Empty where nothing counts.

    Raises:
        WorkerDied: it died meanwhile.
    """
    if targets and counts_itself(targets):
        answer = racer.worker.call("arithmetic_energy", limit_s=run_limit_s(), name=racer.name)
        return {"power_w": answer["joules"] / answer["seconds"], "energy_j": answer["joules"] / racer.batch}
    if not counters(targets, root=root)[0]:
        return {}
    with measuring(), EnergyMeter(targets, root=root) as meter:
        answer = racer.worker.call("timed", limit_s=run_limit_s() + seconds, name=racer.name, seconds=seconds, most=10**9)
    period_s = sorted(answer["durations"])[len(answer["durations"]) // 2]  # of one call, or between two completions
    energy = meter.energy
    if energy.watts is not None:
        found = {"power_w": energy.watts, "energy_j": energy.watts * period_s / racer.batch}
        return found if energy.watts else {}  # 0: no counter ticked
    card_w = sum(joules for name, joules in energy.joules.items() if name.startswith("card")) / energy.seconds
    return {"card_power_w": card_w, "card_energy_j": card_w * period_s / racer.batch} if card_w else {}


def counts_cards_only(targets: Iterable[Target], *, root: Path = POWERCAP) -> bool:
    """Say whether no target's energy can be counted in full, and that of an NVIDIA card alone can.

    So it is in virtual machines, which have a card of their own and no counters of the host's processors. What plans use of the card
    compares among those that use one; a plan on a CPU has no number there.
    """
    found = list(targets)
    cards = {target for target in found if is_nvidia(target.device)}
    if not cards or any(not why_no_energy({target}, root=root) for target in found):
        return False
    try:
        return all(total_energy_j(target.device.uid) > 0 for target in cards)
    except Unsupported:
        return False


def device_memory(pid: int, targets: set[Target]) -> tuple[int | None, str]:
    """Return the bytes that a process holds in memories of the targets' own, 0 where they are CPUs; or None and the reason."""
    others = {each for each in targets if each.device.kind != "cpu"}
    cards = {each.device.uid for each in others if each.device.uid.startswith(("GPU-", "MIG-"))}
    unknown = sorted(str(each) for each in others if each.device.uid not in cards)
    if unknown:
        return None, f"{unknown[0]} does not tell how much of its memory a process holds"
    try:
        return sum(process_memory_bytes(uid, pid) for uid in cards), ""
    except Unsupported as error:
        return None, str(error)


def absent(targets: set[Target], metrics: Mapping[str, float]) -> dict[str, str]:
    """Return what could not be measured of a plan, and why, for its reader."""
    reason = why_no_energy(targets)
    return {"energy": reason} if reason and "energy_j" not in metrics else {}

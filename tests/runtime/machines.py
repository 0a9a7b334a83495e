"""Machines whose accounts are moved by hand, for what asks them why calls are slow."""

from __future__ import annotations

from itertools import count

from aivmm.runtime.causes import Counted, Machine


def counted(machine: Machine) -> Counted:
    """Return what a machine counts that can be read."""
    found = machine.counted()
    assert found is not None
    return found


class ByHand(Machine):
    """Counts what a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.at = Counted(0.0)
        self.looks = 0
        self.users: frozenset[int] = frozenset()  # of cards
        self.slowed = ""
        self.sees_waits = True
        self.cores = 64
        self.fails = False  # whether nothing can be read just now

    def passes(self, seconds: float, **counted: float) -> None:
        """Let time pass, and count so much more."""
        more = {"seconds": seconds} | counted
        self.at = self.at._replace(**{name: getattr(self.at, name) + each for name, each in more.items()})

    def now_s(self) -> float:
        return self.at.seconds

    def own_s(self) -> float:
        return self.at.own

    def others_s(self) -> float | None:
        return None if self.fails else self.at.others

    def counted(self) -> Counted | None:
        self.looks += 1
        return None if self.fails else self.at

    def on_cards(self) -> frozenset[int]:
        return self.users

    def slowed_cards(self) -> str:
        return self.slowed


class Others(ByHand):
    """Others take so many cores all the time, and this process waits for as long: they share its core."""

    def __init__(self, busy: float) -> None:
        super().__init__()
        self.busy = busy

    def passes(self, seconds: float, **counted: float) -> None:
        super().passes(seconds, **({"own": seconds, "others": self.busy * seconds, "waited": self.busy * seconds} | counted))


class Sharing(Others):
    """Others take less than a core, the one that all calls run on."""

    def passes(self, seconds: float, **counted: float) -> None:
        super().passes(seconds, **({"own": (1 - self.busy) * seconds} | counted))


class Elsewhere(Others):
    """Others work on other cores, and nobody waits for them."""

    def passes(self, seconds: float, **counted: float) -> None:
        super().passes(seconds, **({"waited": 0.0} | counted))


class Suspicious(Others):
    """Finds a cause whenever it is asked for one: others from the beginning, and later somebody new on a card."""

    def __init__(self) -> None:
        super().__init__(0.5)
        self._pids = count()

    def on_cards(self) -> frozenset[int]:
        return frozenset({next(self._pids)})

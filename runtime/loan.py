"""Outputs that are lent: `with engine.lend(inputs) as outputs:`."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from aivmm.errors import Unsupported, UsageError
from aivmm.runtime.backend import Buffer
from aivmm.runtime.inputs import refuse_unnamed
from aivmm.runtime.lane import Lane

if TYPE_CHECKING:
    from aivmm.runtime.engine import Engine


class Loan:
    """Outputs lent for a `with` block; see `Engine.lend`. Used once."""

    __slots__ = ("_engine", "_inputs", "_lane", "_program")

    def __init__(self, engine: Engine, inputs: Mapping[str, Any]) -> None:
        self._engine, self._inputs = engine, inputs
        self._lane: Lane | None = None

    def __enter__(self) -> dict[str, Buffer]:
        engine = self._engine
        self._program = engine._program
        if self._program.gives and engine.timeout_s is None:
            return engine.run(self._inputs)  # which does all that is done below when it fails
        try:
            if self._program.gives:
                return self._program.ask(self._inputs)
            self._lane, outputs = self._program.borrow(self._inputs)
        except (AttributeError, TypeError):
            refuse_unnamed(self._inputs)
            raise
        except (Unsupported, UsageError) as error:
            return self._engine._instead(self._program, self._inputs, error)
        return outputs

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lane is not None:
            self._program.free.put(self._lane)
            self._lane = None

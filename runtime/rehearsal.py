"""A way through stages that do nothing, built and run once while a runtime wakes on another thread.

A line of Python takes ten times as long when it runs for the first time, and what is between a compiled model and the first answer is a few
hundred of them: 2 ms, in which nothing else goes on. While the runtime wakes, the thread that loads a plan has nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from aivmm.runtime.backend import Buffer
from aivmm.runtime.inputs import dtype_of, is_numpy
from aivmm.runtime.plan import Plan
from aivmm.runtime.program import Program
from aivmm.tensors import TensorSpec

_MOST_BYTES = 1 << 20  # of all tensors that are handed on: buffers are made for them


class _Idle:
    """An executable that does nothing, and its own request."""

    placement: Any = None
    effective_config: Mapping[str, Any] = {}

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self.inputs, self.outputs = inputs, outputs

    def new_request(self) -> _Idle:
        return self

    def bind(self, name: str, buffer: Buffer) -> None: ...

    def run(self) -> None: ...

    def output(self, name: str) -> Buffer:
        raise KeyError(name)

    def direct(self) -> tuple[Callable[[], object], Callable[[BaseException], Exception | None]]:
        return partial(id, None), lambda _: None

    def close(self) -> None: ...


def rehearse(plan: Plan) -> None:
    """Build and run a way through the stages of `plan` that does nothing, where that takes little memory. Nothing of it stays."""
    inputs, outputs = [each.spec for each in plan.model.inputs], [each.spec for each in plan.model.outputs]
    made = [*inputs, *(tensor.spec for stage in plan.stages for tensor in stage.outputs)]
    if not all(each.static and is_numpy(each.dtype) for each in made) or sum(each.nbytes or 0 for each in made) > _MOST_BYTES:
        return
    with suppress(Exception):  # who runs the plan itself will see it
        idle = [[_Idle([each.spec for each in stage.inputs], [each.spec for each in stage.outputs])] for stage in plan.stages]
        program = Program(plan.stages, idle, inputs, outputs)
        program.run({each.name: np.zeros(each.shape, dtype_of(each)) for each in inputs})
        program.close()

"""What who loads a plan does before he has it compiled: what he can do of that while a runtime wakes up, and room for weights."""

from __future__ import annotations

from aivmm.runtime.blobs import BlobCache
from aivmm.runtime.bundle import Bundle
from aivmm.runtime.finding import look_ahead, packs_weights
from aivmm.runtime.paging import make_room
from aivmm.runtime.rehearsal import rehearse


def get_ready(bundle: Bundle, blobs: BlobCache | None) -> bool:
    """Do ahead what needs no runtime, as far as there is one to wait for, and make room for what a runtime packs.

    Whatever is odd or missing is left for who needs it. Say whether room was made, which is to be given back in the end.
    """
    plan, awake = bundle.plan, bundle.runtime_awake
    if blobs is not None and not awake():
        look_ahead((each.target, bundle.file(each.model)) for each in plan.stages)
        blobs.foresee(sum(len(each.everywhere()) for each in plan.stages), awake)
        rehearse(plan)
    return packs_weights(each.target for each in plan.stages) and make_room(bundle.size, awake)

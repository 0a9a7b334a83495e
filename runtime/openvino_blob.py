"""Where the weights lie in what OpenVINO's plug-in for the CPU exports."""

from __future__ import annotations

import struct

# Where it puts its own settings, the constants and the graph: offset, from this table on, and size of each
# (`ov::pass::StreamSerialize::DataHeader`).
_TABLE = struct.Struct("<6Q")
_HEAD_BYTES = 4096  # in which the table lies


def constants_in(blob: bytes) -> tuple[int, int]:
    """Return from where to where the constants lie, (0, 0) where there is no table that fits what follows it."""
    for at in range(min(_HEAD_BYTES, len(blob) - _TABLE.size)):
        own, own_size, constants, size, graph, graph_size = _TABLE.unpack_from(blob, at)
        if own == _TABLE.size and constants == own + own_size and graph == constants + size and at + graph + graph_size == len(blob):
            return at + constants, at + graph
    return 0, 0

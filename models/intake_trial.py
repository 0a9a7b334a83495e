"""Trial runs: whether a model, its shapes still open, accepts certain extents, asked of ONNX Runtime on the CPU by running it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

SECONDS = 8.0  # for all trials of one model together
_ELEMENTS = 2**26  # inputs larger than this are not tried


class Trial:
    """Runs a model of open shapes on given input shapes. The first question opens the session; after `SECONDS` none is answered."""

    def __init__(self, model: ir.Model, folder: Path) -> None:
        """`folder` is where the model's external weights lie."""
        self._model = model
        self._folder = folder
        self._session: Any = None
        self._end: float | None = None
        self.reason = ""  # why it cannot tell, in one line

    def extents(self) -> frozenset[int]:
        """Extents that the graph itself names: axes of weights and small integer constants. A fixed input extent is usually one of them."""
        found: set[int] = set()
        for graph in self._model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is None:
                    continue
                found |= {extent for extent in tensor.shape if isinstance(extent, int)}
                if tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32) and tensor.size <= 8:
                    found |= {int(number) for number in tensor.numpy().ravel()}
        return frozenset(extent for extent in found if 1 < extent <= 65536)

    def accepts(self, shapes: Mapping[str, tuple[int, ...]]) -> bool | None:
        """True when the model runs on inputs of these shapes with finite results, False when it refuses, None when that cannot be told."""
        feed = self._feed(shapes)
        if feed is None or not self._open():
            return None
        left = (self._end or 0.0) - time.monotonic()
        if left <= 0:
            self.reason = f"{SECONDS:g} s of trial runs were not enough"
            return None
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.log_severity_level = 4
        stop = threading.Timer(left, setattr, (options, "terminate", True))
        stop.start()
        try:
            results = self._session.run(None, feed, options)
        except Exception as error:  # noqa: BLE001 - the runtime raises many kinds for a shape it cannot take: that is the answer
            if options.terminate:
                return None
            self.reason = " ".join(str(error).split())[-160:]
            return False
        finally:
            stop.cancel()
        return all(_finite(result) for result in results)

    def output_ranks(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Ranks of the outputs as one run shows them; empty when the model cannot be run here."""
        feed = self._feed(shapes)
        if feed is None or not self._open():
            return {}
        names = [output.name for output in self._session.get_outputs()]
        try:
            results = self._session.run(names, feed)
        except Exception:  # noqa: BLE001 - as above; there is no answer then
            return {}
        return {name: result.ndim for name, result in zip(names, results, strict=True) if isinstance(result, np.ndarray)}

    def kinds(self, shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]) -> dict[str, tuple[ir.DataType, int]]:
        """Element types and ranks of those of the values `names` that are tensors, as one run shows them; empty when it cannot be run."""
        feed = self._feed(shapes)
        if feed is None or not names or not self._open(names):
            return {}
        tensors = [output.name for output in self._session.get_outputs() if output.name in names and output.type.startswith("tensor(")]
        try:
            arrays = dict(zip(tensors, self._session.run(tensors, feed), strict=True)) if tensors else {}
        except Exception:  # noqa: BLE001 - as above; there is no answer then
            return {}
        return {
            name: (ir.DataType.STRING if array.dtype.kind in "OSU" else ir.DataType.from_numpy(array.dtype), array.ndim)
            for name, array in arrays.items()
        }

    def _open(self, extra: Sequence[str] = ()) -> bool:
        """Open a session whose outputs are the model's and `extra`."""
        if self._session is None and self._end is None:
            self._end = time.monotonic() + SECONDS
            try:
                import onnxruntime

                options = onnxruntime.SessionOptions()
                options.log_severity_level = 4
                options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
                options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
                proto = ir.to_proto(self._model)
                proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
                self._session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
            except Exception as error:  # noqa: BLE001 - a model that ONNX Runtime cannot load may still be one for another runtime
                self.reason = " ".join(str(error).split())[-160:]
        return self._session is not None

    def _feed(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
        """Harmless inputs: small noise, indices 0 (inside any table), masks of ones."""
        random = np.random.default_rng(0)
        feed: dict[str, Any] = {}
        for value in self._model.graph.inputs:
            shape, name = shapes[value.name or ""], value.name or ""
            if value.dtype is None or int(np.prod(shape, dtype=np.float64)) > _ELEMENTS:
                return None
            if value.dtype == ir.DataType.STRING:
                feed[name] = np.full(shape, "", dtype=object)
                continue
            dtype = value.dtype.numpy()
            if dtype.kind not in "fiub":
                self.reason = f"input {name!r} is {value.dtype.name.lower()}"
                return None
            if dtype.kind == "f":
                feed[name] = (0.1 * random.standard_normal(shape)).astype(dtype)
            else:
                feed[name] = np.full(shape, dtype.kind == "b" or "mask" in name.lower(), dtype=dtype)
        return feed


def _finite(result: Any) -> bool:
    return not isinstance(result, np.ndarray) or result.dtype.kind != "f" or bool(np.isfinite(result).all())

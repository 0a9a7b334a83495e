"""Engines over a bundle of several plans: one model in several shapes, and several models by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from aivmm.errors import UsageError
from aivmm.runtime.backend import Buffer, DeviceTensor
from aivmm.runtime.bundle import is_family
from aivmm.runtime.engine import Engine
from aivmm.runtime.family import Family, OpenFamily, Served, open_family
from aivmm.runtime.fitting import Fitter
from aivmm.runtime.inputs import elsewhere, refuse_unnamed
from aivmm.runtime.signing import Key
from aivmm.runtime.streaming import ordered
from aivmm.runtime.validity import check_policy
from aivmm.tensors import TensorSpec

if TYPE_CHECKING:
    from aivmm.runtime.trace import Trace


class ShapedEngine:
    """One model with a plan for each of several shapes. Inputs run in the smallest bucket that takes them. Thread-safe, as `Engine` is."""

    def __init__(self, served: Served, opened: OpenFamily, *, on_mismatch: str = "warn", cache: bool = True) -> None:
        def engine(plan: str) -> Engine:
            return Engine(opened.bundle(plan), on_mismatch=on_mismatch, cache=cache)

        self.served = served
        self._opened = opened
        with ExitStack() as stack:
            self.engines = {each.name: stack.enter_context(engine(each.plan)) for each in served.buckets}
            self.fallback = None if served.fallback is None else stack.enter_context(engine(served.fallback))
            self._closing = stack.pop_all()
        first = next(iter(self.engines.values()))
        self.inputs = tuple(_open(spec, served) for spec in first.inputs)
        self.outputs = first.outputs if len(self.engines) == 1 else tuple(self._common(each.name) for each in first.outputs)
        self.fitter = Fitter(
            specs={each.name: each for each in self.inputs},
            buckets=served.buckets,
            dimensions=served.dimensions,
            crops=served.crops,
            has_fallback=self.fallback is not None,
        )
        # Exact shapes need no fitting: what was tuned for runs as fast as its plan alone.
        self._exact: dict[tuple[Any, ...], Engine] = {
            tuple(each.shape for each in engine.inputs): engine for engine in self.engines.values()
        }
        self._names = tuple(each.name for each in self.inputs)
        self._padded = 0
        self._beyond = 0

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Buffer]:
        """Run once, with arrays by input name, and return arrays by output name; the arrays are the caller's own.

        Raises:
            UsageError: an input is missing, unknown or of another type, or no bucket takes its shape; the known ones are named.
        """
        engine, arrays, extents = self._placed(inputs)
        outputs = engine.run(arrays)
        return outputs if extents is None else self.fitter.crop(outputs, extents)

    def submit(self, inputs: Mapping[str, Any]) -> Future[dict[str, Buffer]]:
        """Start a run and return a future of what `run` returns; see `Engine.submit`.

        Raises:
            UsageError: as `run`, at once.
        """
        engine, arrays, extents = self._placed(inputs)
        running = engine.submit(arrays)
        if extents is None:
            return running
        cropped: Future[dict[str, Buffer]] = Future()
        cropped.set_running_or_notify_cancel()

        def deliver(done: Future[dict[str, Buffer]]) -> None:
            try:
                outputs = self.fitter.crop(done.result(), extents)
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is the answer to this request
                cropped.set_exception(error)
            else:
                cropped.set_result(outputs)

        running.add_done_callback(deliver)
        return cropped

    def stream(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Buffer]]:
        """Run each of `requests`, of whatever shape, and yield the outputs in their order; see `Engine.stream`."""
        window = sum(each._program.window for each in self._all().values())
        return ordered(lambda inputs, reply: reply.follow(self.submit(inputs)), window, requests)

    @contextmanager
    def lend(self, inputs: Mapping[str, Any]) -> Iterator[dict[str, Buffer]]:
        """Run once and lend the outputs without copying them, but for those that are cropped; see `Engine.lend`. Raises as `run`."""
        engine, arrays, extents = self._placed(inputs)
        with engine.lend(arrays) as outputs:
            yield outputs if extents is None else self.fitter.crop(outputs, extents)

    async def arun(self, inputs: Mapping[str, Any]) -> dict[str, Buffer]:
        """Run once without blocking the event loop; see `Engine.arun`. Raises as `run`."""
        engine, arrays, extents = self._placed(inputs)
        outputs = await engine.arun(arrays)
        return outputs if extents is None else self.fitter.crop(outputs, extents)

    def new_inputs(self, bucket: str | None = None) -> dict[str, Buffer]:
        """Return arrays for one request's inputs in the shape that `bucket` names ("seq=128"; the only one by default).

        See `Engine.new_inputs`: filled and given to `run`, they are read where they are, neither padded nor copied.

        Raises:
            UsageError: no bucket has this name, or there are several and none is named; or as `Engine.new_inputs`.
        """
        if bucket is None and len(self.engines) == 1:
            (bucket,) = self.engines
        if bucket not in self.engines:
            problem = "there are several shapes, and none is named" if bucket is None else f"there is no shape {bucket!r}"
            raise UsageError(problem, advice=f"give new_inputs one of {', '.join(map(repr, self.engines))}")
        return self.engines[bucket].new_inputs()

    def run_on_device(self, inputs: Mapping[str, Any]) -> dict[str, DeviceTensor]:
        """Run once on inputs of a bucket's very shape and leave the outputs on the device; see `Engine.run_on_device`.

        Raises:
            UsageError: as `run`, and for other shapes: padding and cropping are done on the host. Or as `Engine.run_on_device`.
            Unsupported: as `Engine.run_on_device`.
        """
        engine = self._own_shape(inputs)
        if engine is None:
            inputs, _ = self.fitter.take(inputs)  # a list has its shape as an array; and this says what is missing
            engine = self._own_shape(inputs)
        if engine is None:
            raise UsageError(f"run_on_device neither pads nor crops: it takes {', '.join(self.engines)}", advice="use run")
        return engine.run_on_device(inputs)

    def _own_shape(self, inputs: Mapping[str, Any]) -> Engine | None:
        """Return the engine of the bucket whose very shape the inputs have, in whatever memory; None where they have another.

        Raises:
            UsageError: they have another, and one lies on a device.
        """
        engine = self._exact.get(tuple(_shape_of(inputs.get(name)) for name in self._names))
        if engine is None and any(map(elsewhere, inputs.values())):
            raise UsageError(
                f"inputs on a device are not padded: they fit {', '.join(self.engines)} and nothing else", advice="give arrays of the host"
            )
        return engine

    def _placed(self, inputs: Mapping[str, Any]) -> tuple[Engine, Mapping[str, Any], dict[str, int] | None]:
        """Return what runs `inputs`, them as it takes them, and their extents where outputs are to be cropped to those."""
        refuse_unnamed(inputs)
        engine = self._exact.get(tuple(getattr(inputs.get(name), "shape", None) for name in self._names)) or self._own_shape(inputs)
        if engine is not None:
            return engine, inputs, None
        arrays, extents = self.fitter.take(inputs)
        bucket = self.fitter.choose(extents)
        if bucket is None:
            assert self.fallback is not None
            self._beyond += 1
            return self.fallback, arrays, None
        self._padded += bucket.extents != extents
        return self.engines[bucket.name], self.fitter.pad(arrays, bucket), extents

    def bucket_of(self, inputs: Mapping[str, Any]) -> str | None:
        """Return the name of the bucket that `run` would take for `inputs`; None for the fallback. Raises as `run`."""
        bucket = self.fitter.choose(self.fitter.take(inputs)[1])
        return None if bucket is None else bucket.name

    @property
    def events(self) -> list[str]:
        """What did not go as planned, of all buckets."""
        return list(dict.fromkeys(event for each in self._all().values() for event in each.events))

    def trace(self) -> Trace:
        """Return a recording of all shapes' engines, as `Engine.trace` does of one."""
        from aivmm.runtime.trace import Trace

        return Trace(list(self._all().values()))

    def stats(self) -> dict[str, Any]:
        """Return each bucket's statistics by its name, the runs in all, and how many of them were padded or left to the fallback."""
        buckets = {name: each.stats() for name, each in self._all().items()}
        return {
            "runs": sum(each["runs"] for each in buckets.values()),
            "padded": self._padded,
            "fallback": self._beyond,
            "load_s": sum(each["load_s"] for each in buckets.values()),
            "validity": worst(each["validity"] for each in buckets.values()),
            "events": self.events,
            "buckets": buckets,
        }

    def close(self) -> None:
        """Wait for running requests, then free what the runtimes hold. Calling it again does nothing."""
        self._closing.close()
        self._opened.close()

    def __enter__(self) -> ShapedEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<aivmm.ShapedEngine {self.served.name} for {self.fitter.known()}>"

    def _all(self) -> dict[str, Engine]:
        return self.engines if self.fallback is None else {**self.engines, "fallback": self.fallback}

    def _common(self, name: str) -> TensorSpec:
        """Return an output as all buckets agree on it."""
        found = [next(spec for spec in each.outputs if spec.name == name) for each in self.engines.values()]
        extents = zip(*(each.shape for each in found), strict=True)
        shape = tuple(group[0] if len(set(group)) == 1 else None for group in extents)
        return TensorSpec(name=name, dtype=found[0].dtype, shape=shape)


def _shape_of(value: Any) -> tuple[int, ...] | None:
    """Return the extents of an array or tensor; None of what has none. Tensors that an engine left on a device give theirs when called."""
    shape = getattr(value, "shape", None)
    shape = shape() if callable(shape) else shape
    return tuple(shape) if isinstance(shape, Iterable) else None


def _open(spec: TensorSpec, served: Served) -> TensorSpec:
    """Return an input with None where buckets differ."""
    free = {place for each in served.dimensions for place in each.places}
    shape = tuple(None if (spec.name, axis) in free else extent for axis, extent in enumerate(spec.shape))
    return TensorSpec(name=spec.name, dtype=spec.dtype, shape=shape)


class Engines(Mapping[str, "Engine | ShapedEngine"]):
    """The models of a workload: an engine for each name."""

    def __init__(self, opened: OpenFamily, *, on_mismatch: str = "warn") -> None:
        self._opened = opened
        self._on_mismatch = on_mismatch
        self.family: Family = opened.family
        with ExitStack() as stack:
            self._engines: dict[str, Engine | ShapedEngine] = {}
            for served in opened.family.models:
                self._engines[served.name] = self._loaded(served)
                stack.callback(self._engines[served.name].close)
            self._closing = stack.pop_all()

    def _loaded(self, served: Served) -> Engine | ShapedEngine:
        if len(served.buckets) == 1 and served.fallback is None and not served.dimensions:
            return Engine(self._opened.bundle(served.buckets[0].plan), on_mismatch=self._on_mismatch)
        return ShapedEngine(served, self._opened, on_mismatch=self._on_mismatch)

    def __getitem__(self, name: str) -> Engine | ShapedEngine:
        try:
            return self._engines[name]
        except KeyError:
            raise UsageError(
                f"there is no model {name!r} in this bundle", advice=f"it holds {', '.join(map(repr, self._engines))}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._engines

    def __iter__(self) -> Iterator[str]:
        return iter(self._engines)

    def __len__(self) -> int:
        return len(self._engines)

    def stats(self) -> dict[str, Any]:
        """Return each model's statistics by its name."""
        return {name: each.stats() for name, each in self._engines.items()}

    def close(self) -> None:
        """Close all engines. Calling it again does nothing."""
        self._closing.close()
        self._opened.close()

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<aivmm.Engines {', '.join(self._engines)}>"


def worst(grades: Iterator[str]) -> str:
    """Return the worst of some grades of validity."""
    order = ("exact", "compatible", "retune")
    return max(grades, key=order.index, default="exact")


def load(
    path: str | Path, *, on_mismatch: str = "warn", require_signature: Key | Sequence[Key] | None = None
) -> Engine | ShapedEngine | Engines:
    """Load what lies at `path`: a plan, a plan in several shapes, or several models by name. The options are those of `Engine.load`.

    Raises:
        BundleError: it is damaged or unsafe, or not signed as required.
        Unsupported: one of its plans does not run here, nor a fallback of it.
    """
    if not is_family(path):
        return Engine.load(path, on_mismatch=on_mismatch, require_signature=require_signature)
    check_policy(on_mismatch)
    opened = open_family(path, signed_by=require_signature, read_later=True)
    try:
        if opened.family.kind == "shapes":
            return ShapedEngine(opened.family.models[0], opened, on_mismatch=on_mismatch)
        return Engines(opened, on_mismatch=on_mismatch)
    except BaseException:  # not handled, only cleaned up: nobody else could close it
        opened.close()
        raise


def plain(engine: Engine | ShapedEngine | Engines) -> Iterator[Engine]:
    """Yield the engines of single plans that `engine` is made of."""
    if isinstance(engine, Engine):
        yield engine
        return
    for each in engine.values() if isinstance(engine, Engines) else engine._all().values():
        yield from plain(each)


def load_one(
    path: str | Path, name: str | None = None, *, require_signature: Key | Sequence[Key] | None = None, cache: bool = True
) -> Engine | ShapedEngine:
    """Load the only model at `path`, or the one of a `name`. Signature and cache are those of `Engine.load`.

    Raises:
        BundleError, Unsupported: as `load`.
        UsageError: there are several and none is named, or none of that name.
    """
    if not is_family(path):
        engine = Engine.load(path, require_signature=require_signature, cache=cache)
        if name in (None, engine.plan.model.name):
            return engine
        engine.close()
        raise UsageError(f"there is no model {name!r} in {path}", advice=f"it holds {engine.plan.model.name!r}")
    opened = open_family(path, signed_by=require_signature, read_later=True)
    try:
        known = {each.name: each for each in opened.family.models}
        if name is None and len(known) > 1:
            raise UsageError(f"{path} holds several models", advice=f"name one of {', '.join(map(repr, known))}")
        if name is not None and name not in known:
            raise UsageError(f"there is no model {name!r} in {path}", advice=f"it holds {', '.join(map(repr, known))}")
        return ShapedEngine(known[name or next(iter(known))], opened, cache=cache)
    except BaseException:  # not handled, only cleaned up: nobody else could close it
        opened.close()
        raise

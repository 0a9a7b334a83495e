"""Which nodes of a model still run as kernels of their own inside the whole compiled model, and which went into another's.

An operator's time alone says little about one that is fused away. The runtimes tell in their own ways: OpenVINO's runtime model lists the
original layers of each kernel, ONNX Runtime writes down the graph that it made of the model. Helpers here read both; a backend needs no
method for it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aivmm.errors import Unsupported
from aivmm.probes import wire
from aivmm.runtime.ort_options import PROVIDERS
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Target

if TYPE_CHECKING:
    import onnx

    from aivmm.probes.runners import State

_NO_WORK = frozenset(("Input", "Output", "Const", "Parameter", "Result"))  # layer types of OpenVINO that compute nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One thing that the compiled model runs, under the runtime's own name and type, and the nodes of the model that it does, in order.

    Reorders and copies that the runtime puts in do no node. `main` is the first of the nodes that computes something, or else the first.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    main: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """What became of a model's nodes on one target."""

    kernels: tuple[Kernel, ...]
    vanished: tuple[str, ...]  # nodes that no kernel does: folded into constants, removed, or lost by name

    @property
    def fused_into(self) -> Mapping[str, str]:
        """Each node that is fused away -> the main node of the kernel that does it."""
        return {node: kernel.main for kernel in self.kernels for node in kernel.nodes if node != kernel.main}

    @property
    def own(self) -> tuple[str, ...]:
        """The nodes that have a kernel: it does their work, and that of what was fused into them."""
        return tuple(kernel.main for kernel in self.kernels if kernel.nodes)


def explain(model: Path, target: Target, config: dict[str, Any]) -> Fusion:
    """Compile the whole model and say what became of its nodes.

    Raises:
        Unsupported: the runtime refuses the model, or does not tell.
    """
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    if target.runtime == "openvino":
        return _openvino(model, target, config, graph)
    if target.runtime == "onnxruntime":
        return _onnxruntime(model, target, config, graph)
    raise Unsupported(f"{target} does not tell what it makes of a model's nodes")


def fusion(state: State, *, model: str, target: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Do what `explain` does, in a worker; `fusion_in` reads the answer."""
    where = wire.target_in(target)
    assert isinstance(where, Target)
    return asdict(explain(Path(model), where, config))


def fusion_in(raw: Mapping[str, Any]) -> Fusion:
    """Return the record that `fusion` answered with."""
    kernels = tuple(Kernel(**{**each, "nodes": tuple(each["nodes"])}) for each in raw["kernels"])
    return Fusion(kernels=kernels, vanished=tuple(raw["vanished"]))


def _made(kernels: Sequence[tuple[str, str]], does: Mapping[str, int], graph: onnx.GraphProto) -> Fusion:
    """Make the record of `kernels` (name, type), given which of them `does` a node. Other nodes went into the kernel behind them.

    Not those that can be computed beforehand: they vanished.
    """
    does = dict(does)
    folded = _foldable(graph)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in reversed(graph.node):
        if node.name in does or node.name in folded:
            continue
        behind = [does[reader.name] for name in node.output for reader in readers.get(name, ()) if reader.name in does]
        if behind:
            does[node.name] = behind[0]
    nodes: list[list[str]] = [[] for _ in kernels]
    for node in graph.node:
        if node.name in does:
            nodes[does[node.name]].append(node.name)
    from aivmm.models.flops import MOVES  # here: it loads sympy, and every worker loads this module

    works = {node.name for node in graph.node if node.op_type not in MOVES}

    def main(mine: Sequence[str]) -> str:
        return next((each for each in mine if each in works), mine[0] if mine else "")

    return Fusion(
        kernels=tuple(
            Kernel(name=name, kind=kind, nodes=tuple(mine), main=main(mine)) for (name, kind), mine in zip(kernels, nodes, strict=True)
        ),
        vanished=tuple(node.name for node in graph.node if node.name not in does),
    )


def _foldable(graph: onnx.GraphProto) -> set[str]:
    """Return the nodes whose outputs are known before the model runs: shapes of what has a fixed shape, and what follows from constants."""
    static = {
        each.name for each in (*graph.input, *graph.value_info) if each.type.tensor_type.HasField("shape")
        if all(extent.HasField("dim_value") for extent in each.type.tensor_type.shape.dim)
    }  # fmt: skip
    known = {each.name for each in graph.initializer} | {""}
    found = set()
    for node in graph.node:
        if all(name in known for name in node.input) or (node.op_type in ("Shape", "Size") and node.input[0] in static):
            known.update(node.output)
            found.add(node.name)
    return found


def _openvino(model: Path, target: Target, config: dict[str, Any], graph: onnx.GraphProto) -> Fusion:
    executable: Any = load_backend(target.runtime).compile(model, target, wire.config_in(config))
    try:
        layers = [
            (
                str(each.get_friendly_name()),
                {name: str(each.get_rt_info()[name].astype(str)) for name in ("layerType", "originalLayersNames")},
            )
            for each in executable._compiled.get_runtime_model().get_ordered_ops()  # not in the protocol: only a report wants it
            if each.get_type_name() not in _NO_WORK
        ]
    except (AttributeError, RuntimeError, KeyError) as error:
        raise Unsupported(f"{target} does not tell what it makes of a model's nodes ({error})") from error
    finally:
        executable.close()
    # A layer is called after its node or after the node's output.
    known = {name: node.name for node in graph.node for name in (*node.output, node.name) if name}
    kernels: list[tuple[str, str]] = []
    does: dict[str, int] = {}
    for name, info in layers:
        if info["layerType"] not in _NO_WORK:
            for each in _names(info["originalLayersNames"], known):
                does.setdefault(known[each], len(kernels))
            kernels.append((name, info["layerType"]))
    return _made(kernels, does, graph)


def _names(listed: str, known: Mapping[str, str]) -> Iterator[str]:
    """Yield the known names in a list that is joined by commas, which names may contain too."""
    parts = listed.split(",")
    start = 0
    while start < len(parts):
        for end in range(len(parts), start, -1):
            if (name := ",".join(parts[start:end])) in known:
                yield name
                start = end
                break
        else:
            start += 1


def _onnxruntime(model: Path, target: Target, config: dict[str, Any], graph: onnx.GraphProto) -> Fusion:
    import onnx
    import onnxruntime

    backend: Any = load_backend(target.runtime)
    with tempfile.TemporaryDirectory(prefix="aivmm-fusion-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "optimized.onnx"
        options, provider_options = backend._options(target, wire.config_in(config))  # not in the protocol: only a report wants it
        options.optimized_model_filepath = str(path)
        # Weights go beside it, and are never read: a file with all of them would be limited to 2 GiB.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        provider = PROVIDERS[target.name.partition(":")[0]].name
        try:
            onnxruntime.InferenceSession(str(model), options, providers=[(provider, provider_options)], enable_fallback=0)
            optimized = onnx.load(str(path), load_external_data=False).graph
        except Exception as error:  # ONNX Runtime's errors have no common class, and the file is not there when it cannot write it
            raise Unsupported(f"{target} does not tell what it makes of a model's nodes ({' '.join(str(error).split())[:300]})") from error
    kernels = [(node.name, node.op_type) for node in optimized.node]
    return _made(kernels, _done_by(graph, optimized.node), graph)


def _done_by(graph: onnx.GraphProto, kernels: Sequence[onnx.NodeProto]) -> dict[str, int]:
    """Return which kernel of the optimized graph makes the output of which node, as far as names tell.

    A kernel makes the output of the last node that it does. Those of the blocked layout make tensors of other names, but are called after
    the tensor that they stood for when they were made, with `_nchwc` behind it; a sum and an activation may have joined them afterwards.
    """
    names = {(node.name, node.op_type) for node in graph.node}
    makers = {output: index for index, node in enumerate(kernels) for output in node.output if output}
    for index, kernel in enumerate(kernels):
        stem, mark, _ = kernel.name.rpartition("_nchwc")
        if mark:
            makers[stem] = index
        # A product of matrices may have been put between two views.
        inserted = (kernel.name, kernel.op_type) not in names and kernel.op_type in ("Reshape", "ReorderOutput")
        before = makers.get(kernel.input[0]) if inserted else None
        if before is not None and (kernels[before].name, kernels[before].op_type) not in names:
            makers.update(dict.fromkeys(kernel.output, before))
    by_name = {(kernel.name, kernel.op_type): index for index, kernel in enumerate(kernels)}
    does: dict[str, int] = {}
    for node in graph.node:
        maker = next((makers[name] for name in node.output if name in makers), None)
        if maker is None:
            maker = by_name.get((node.name, node.op_type), _joined(node, makers, kernels))
        if maker is not None:
            does[node.name] = maker
            makers.update(dict.fromkeys(filter(None, node.output), maker))
    return does


def _joined(node: onnx.NodeProto, makers: Mapping[str, int], kernels: Sequence[onnx.NodeProto]) -> int | None:
    """Return the convolution in blocked layout that took up `node` behind it: a sum is its fourth input, an activation an attribute."""
    for name in node.input:
        index = makers.get(name)
        if index is None or kernels[index].domain != "com.microsoft.nchwc":
            continue
        if node.op_type in ("Add", "Sum"):
            if len(kernels[index].input) > 3:
                return index
        elif any(each.name == "activation" and each.s.decode() == node.op_type for each in kernels[index].attribute):
            return index
    return None


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {"fusion": fusion}

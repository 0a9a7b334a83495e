"""Models that no target takes whole: what each refuses is found, and the reference outputs come from the chain of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aivmm.errors import AivmmError, ModelError
from aivmm.models.records import Block
from aivmm.probes.accuracy import judge
from aivmm.probes.arrays import load_arrays, save_arrays
from aivmm.probes.client import WorkerDied
from aivmm.runtime.backend import Buffer
from aivmm.runtime.config import Config
from aivmm.runtime.target import Target
from aivmm.tuner.anatomy import evaluator, trusted_for
from aivmm.tuner.layout import cut_around_refused
from aivmm.tuner.work import Work

Values = dict[str, Buffer]


def refer_in_pieces(work: Work, *, laid_out: bool) -> None:
    """Make the reference outputs of a model that no target takes whole: each block on the most trusted target that takes it.

    Unless the blocks are `laid_out` already, they are first cut around what each target refuses.

    Raises:
        ModelError: a block is taken by no target, with each one's reason; or there is one target only that may be used.
    """
    subject = work.subject
    if len(work.targets) < 2:
        target = work.targets[0]
        raise ModelError(
            f"{target} does not take {subject.facts.name}: {subject.refusals.get(target, 'it was not tried')}",
            advice="allow another target beside it, so that the model can be shared out",
        )
    for target, reason in subject.refusals.items():
        if not laid_out and target in work.targets:
            cut_around_refused(work, target, reason, work.asked)
    work.progress.phase("making reference outputs block by block")
    prepared = subject.at(subject.base_batch)
    samples = [dict(load_arrays(str(each))) for each in (*prepared.samples, prepared.samples[0])]  # the first one twice
    used = [_run_block(work, block, samples) for block in subject.structure.blocks]
    outputs = [{each.name: values[each.name] for each in subject.facts.outputs} for values in samples]
    again = judge(outputs.pop(), outputs[0])
    if again.problem or again.relative_l2 > 1e-3:
        subject.deterministic = False
        subject.notes.append("the model gives other outputs each time it runs, so accuracy cannot be judged")
    references = [sample.with_name(f"{sample.stem}-reference-{index}.npz") for index, sample in enumerate(prepared.samples)]
    for path, arrays in zip(references, outputs, strict=True):
        save_arrays(path, arrays)
    names = ["ONNX's own evaluator" if each == evaluator() else str(each) for each in dict.fromkeys(used)]
    subject.keep_references(references, f"{' and '.join(names)} fp32, block by block")


def _run_block(work: Work, block: Block, samples: Sequence[Values]) -> Target:
    """Add the outputs of a block to the values of each sample; return the target that it ran on."""
    segment = work.emitter(work.subject.base_batch).segment(block.index, block.index)
    inputs, outputs = work.folder / "reference-inputs.npz", work.folder / "reference-outputs.npz"
    names, reasons = [each.name for each in segment.inputs], []
    for target in trusted_for(block, work.subject.reference_order()):
        try:
            _feed(inputs, names, samples[0])
            loaded = work.lab.load(segment.path, target, Config(precision="fp32"), inputs=inputs)
            for values in samples:
                _feed(inputs, names, values)
                work.lab.outputs(loaded.contestant, inputs, outputs)
                values |= load_arrays(str(outputs))
            work.lab.unload(loaded.contestant)
        except (AivmmError, WorkerDied) as error:
            if target != evaluator():
                reasons.append(f"{target}: {error.message if isinstance(error, AivmmError) else error.reason}")
            continue
        return target
    where = f"node {block.first}" if block.first == block.last else f"nodes {block.first} to {block.last}"
    what = f"{', '.join(block.op_types)} ({where})"
    raise ModelError(f"no target here takes {what} of {work.subject.facts.name}: {'; '.join(reasons)}")


def _feed(path: Path, names: Sequence[str], values: Values) -> None:
    save_arrays(path, {name: values[name] for name in names})

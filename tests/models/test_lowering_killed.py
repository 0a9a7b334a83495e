"""Lowering, taking apart and mixing are safe under kill -9 and in several processes at once: nothing is made twice, nothing half."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from aivmm.models import lowering_model
from aivmm.probes.arrays import save_arrays
from tests.models.hostile import hostile
from tests.models.test_lowering import by_onnxruntime, feeds
from tests.models.test_lowering_parts import prepared, references

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")]

# What a tuning's worker does for a mixture: the whole, the noise of its parts, and the model with the worst part as it was.
CHILD = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from aivmm.models.graph import analyse
from aivmm.models.lowering_recipes import named, part_of
from aivmm.probes.lowering import lower, sensitivity

model, folder, samples, expected = json.loads({given!r})
blocks = [[block.first, block.last] for block in analyse(Path(model)).blocks]
print("ready", flush=True)
sys.stdin.readline()
whole = lower(None, model=model, folder=folder, recipe="nncf-mixed-7bit", options={{}}, samples=samples, content="c")
told = sensitivity(None, model=model, lowered=whole["path"], recipe="nncf-mixed-7bit", options={{}}, blocks=blocks, samples=samples,
                   references=expected, most=12, within_s=120.0)
worst = max(told["parts"], key=lambda part: part["noise"])
mixture = part_of(named("nncf-mixed-7bit", {{}}), worst["nodes"])
made = lower(None, model=model, folder=folder, recipe=mixture.name, options=dict(mixture.options), samples=samples, content="c")
print(json.dumps([whole, told, made]), flush=True)
"""


class Made:
    """A model with samples, and a folder that processes lower it into."""

    def __init__(self, place: Path) -> None:
        place.mkdir()
        self.place, self.folder = place, place / "cache"
        self.model = prepared(hostile(place / "hostile.onnx"))
        self.samples = feeds(self.model, 4)
        files = [place / f"sample-{index}.npz" for index in range(4)]
        expected = [place / f"expected-{index}.npz" for index in range(4)]
        for path, arrays in zip([*files, *expected], [*self.samples, *references(self.model, self.samples)], strict=True):
            save_arrays(path, arrays)
        given = json.dumps([str(self.model), str(self.folder), list(map(str, files)), list(map(str, expected))])
        self._code = CHILD.format(root=str(Path(__file__).parents[2]), given=given)

    def start(self) -> subprocess.Popen[str]:
        """Start a process, and let it begin."""
        process = subprocess.Popen([sys.executable, "-c", self._code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdin is not None and process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        return process

    def stamps(self) -> dict[str, int]:
        """When each file of the cache but the locks was written."""
        return {path.name: path.stat().st_mtime_ns for path in self.folder.iterdir() if path.suffix != ".lock"}

    def require_whole(self) -> None:
        """The cache holds two models with their records and one account of the parts, no drafts and no folders, and the models run."""
        found = sorted(path for path in self.folder.iterdir() if path.suffix != ".lock")
        assert not [path for path in found if path.is_dir() or path.suffix == ".part"], found
        models = [path for path in found if path.suffix == ".onnx"]
        assert len(models) == 2 and len(found) == 5, found
        for path in models:
            assert lowering_model.must_load(path)
            assert np.isfinite(by_onnxruntime(path, self.samples[0])).all()
            record = json.loads(path.with_name(f"{path.name}.json").read_text())
            assert record["files"]["model"][0] == path.stat().st_size


@pytest.mark.timeout(1200)
def test_whatever_is_killed_when_the_next_process_makes_the_same_of_it(tmp_path: Path) -> None:
    undisturbed, made = Made(tmp_path / "undisturbed"), Made(tmp_path / "killed")
    began = time.monotonic()
    expected = json.loads(undisturbed.start().communicate(timeout=300)[0])
    took = time.monotonic() - began
    chance, killed = random.Random(7), 0
    while killed < 8:
        process = made.start()
        try:
            process.wait(timeout=chance.uniform(0.0, took))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:  # there is nothing left to do, so nothing to kill: another part has to be made again
            chance.choice([path for path in made.folder.iterdir() if path.suffix in (".onnx", ".json")]).unlink()
        else:
            killed += 1
    found = json.loads(made.start().communicate(timeout=300)[0])
    made.require_whole()
    for mine, theirs in zip(found, expected, strict=True):
        assert {name: mine[name] for name in mine.keys() & {"nodes", "weight_bytes", "complete"}} == {
            name: theirs[name] for name in theirs.keys() & {"nodes", "weight_bytes", "complete"}
        }
    assert [part["nodes"] for part in found[1]["parts"]] == [part["nodes"] for part in expected[1]["parts"]]
    assert [part["noise"] for part in found[1]["parts"]] == pytest.approx([part["noise"] for part in expected[1]["parts"]], rel=0.05)

    before = made.stamps()
    assert json.loads(made.start().communicate(timeout=300)[0]) == found
    assert made.stamps() == before, "nothing is made twice"


@pytest.mark.timeout(1200)
def test_several_processes_at_once_make_each_thing_once(tmp_path: Path) -> None:
    made = Made(tmp_path / "shared")
    processes = [made.start() for _ in range(4)]
    processes[0].send_signal(signal.SIGKILL)  # and one of them dies of it
    processes[0].communicate()
    told = [json.loads(process.communicate(timeout=600)[0]) for process in processes[1:]]
    made.require_whole()
    assert told[0] == told[1] == told[2], "with the seconds that it took, to the last digit: one of them made it"

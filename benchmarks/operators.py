"""How many operators are measured, how fast, and what refuses the rest.

    python benchmarks/operators.py [--out benchmarks/results/operators.md] [MODEL ...]

Profiles each model (default: those in `../shared/models`, all demo models, and onnx's `backend/test/data/light`) into one fresh database,
operators only, and writes per model and target how many nodes were measured, with each refusal in the runtime's own words. Speed is
measured apart: `demo:resnet50` and `demo:densenet121`, each into an empty database, on the CPU targets.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import onnx
import psutil

from aivmm.errors import AivmmError
from aivmm.models.demo import demo_names
from aivmm.probes.records import Measured
from aivmm.runtime.cpu import cpu_device
from aivmm.tuner.options import TuneOptions
from aivmm.tuner.profile import Profile, profile_model
from aivmm.tuner.progress import Silent

ROOT = Path(__file__).parent.parent
TIMED = {"demo:resnet50": 15.0, "demo:densenet121": 40.0}  # seconds that they may take on two cores
WANTED = 0.95
_ORT = "onnxruntime-gpu" if platform.machine() in ("x86_64", "AMD64") else "onnxruntime"


@dataclass(frozen=True)
class Phases(Silent):
    """Notes when the operators begin and end."""

    at: dict[str, float]

    def phase(self, text: str) -> None:
        """Remember when a phase began."""
        self.at[text] = time.perf_counter()

    def operators_s(self) -> float:
        """Seconds from the first operator to the last, ceilings included."""
        return self.at["measuring transfers between targets"] - self.at["measuring operators"]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "operators.md")
    parser.add_argument("--no-speed", action="store_true", help="leave the timed runs away")
    arguments = parser.parse_args()
    models = arguments.models or all_models()
    lines = [*environment(), "", "## Coverage", "", *coverage(models)]
    if not arguments.no_speed:
        lines += ["", "## Speed", "", *speed()]
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def all_models() -> list[str]:
    """Return what the issue names."""
    shared = sorted((ROOT.parent / "shared" / "models").glob("*.onnx"))
    light = sorted((Path(onnx.__file__).parent / "backend" / "test" / "data" / "light").glob("*.onnx"))
    return [*map(str, shared), *(f"demo:{name}" for name in demo_names()), *map(str, light)]


def profiled(model: str, database: Path, targets: tuple[str, ...] = ()) -> tuple[Profile, float]:
    """Profile the operators of one model; return what was found and the seconds that the operators took."""
    phases = Phases({})
    found = profile_model(TuneOptions(model=model, db=str(database), targets=targets, budget_s=3600), phases, with_blocks=False)
    return found, phases.operators_s()


def coverage(models: list[str]) -> list[str]:
    """Return the table, and the refusals below it."""
    lines = ["| model | nodes | unique | measured somewhere | on each target |", "|---|---|---|---|---|"]
    refusals: list[str] = []
    measured = nodes = unique = unique_measured = 0
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            name = model if model.startswith("demo:") else Path(model).name
            print(f"{name} ...", flush=True)
            try:
                found, _ = profiled(model, Path(folder) / "all.db")
            except AivmmError as error:
                lines.append(f"| {name} | not profiled: {error.message} | | | |")
                continue
            operators = found.subject.structure.operators
            mine, total = found.coverage()
            fine = {signature for (signature, _, _), each in found.operators.items() if isinstance(each, Measured)}
            measured, nodes = measured + mine, nodes + total
            unique, unique_measured = unique + len(operators), unique_measured + len(fine)
            places = ", ".join(
                f"{place[0]} {place[1]} {sum(each.count for each in operators if found.seconds(each, place) is not None)}"
                for place in found.places
            )
            lines.append(f"| {name} | {total} | {len(operators)} | {mine} ({mine / total:.1%}) | {places} |")
            by_signature = {each.signature: each for each in operators}
            refusals += [
                f"- {name}, {by_signature[signature].description}, {target} {precision}: {each.reason}"
                for (signature, target, precision), each in found.operators.items()
                if not isinstance(each, Measured)
            ]
    share = measured / nodes if nodes else 0.0
    verdict = "met" if share >= WANTED else "missed"
    total_line = (
        f"In sum {measured} of {nodes} nodes ({share:.2%}) and {unique_measured} of {unique} operators (unique within each model) "
        f"were measured on at least one target; at least {WANTED:.0%} of the nodes: {verdict}."
    )
    return [*lines, "", total_line, "", "Refused or failed:", "", *(refusals or ["- nothing"])]


def speed() -> list[str]:
    """Return the table of the timed models."""
    lines = ["| model | operators | probes | seconds | probes a second | limit | |", "|---|---|---|---|---|---|---|"]
    for model, limit_s in TIMED.items():
        with tempfile.TemporaryDirectory() as folder:
            found, seconds = profiled(model, Path(folder) / "one.db", targets=("*:CPU",))
        probes = found.counts.measured + found.counts.refused + found.counts.failed
        verdict = "met" if seconds <= limit_s else "missed"
        count = len(found.subject.structure.operators)
        lines.append(f"| {model} | {count} | {probes} | {seconds:.1f} | {probes / seconds:.1f} | {limit_s:.0f} s | {verdict} |")
    return [*lines, "", "Seconds from the first probe to the last; ceilings, building and storing included, preparing the model not."]


def environment() -> list[str]:
    """Return where and when this ran."""
    device = cpu_device()
    packages = ", ".join(f"{each} {version(each)}" for each in ("aivmm", "openvino", _ORT, "onnx"))
    load = ", ".join(f"{each:.1f}" for each in psutil.getloadavg())
    return [
        "# Operators",
        "",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {device.model}, {device.cores} cores; {platform.platform()}; Python "
        f"{platform.python_version()}; {packages}; load average at the start {load}.",
    ]


if __name__ == "__main__":
    main()

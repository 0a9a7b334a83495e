"""`python -m aivmm.planner solve FILE`: solve a placement problem that is in a file.

Standard output is the result, standard error everything else. Exit status 0: a plan; 2: the user can fix it; 3: there is no plan.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from aivmm.errors import AivmmError, Infeasible, UsageError
from aivmm.planner.problem_files import read_problem
from aivmm.planner.solve import TIME_LIMIT_S, Solution, solve


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, advice=f"see `{self.prog} --help`")


def main(given: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status; a bug keeps its traceback."""
    words = sys.argv[1:] if given is None else list(given)
    try:
        options = _parser().parse_args(words)
        problem = read_problem(options.file)
        found = solve(problem, options.objective, contiguous=options.contiguous, time_limit_s=options.time_limit)
    except AivmmError as error:
        print(f"aivmm.planner: {error}", file=sys.stderr)
        if "--json" in words:
            print(json.dumps({"schema": 1, "error": {"message": error.message, "advice": error.advice}}))
        return 3 if isinstance(error, Infeasible) else 2
    except KeyboardInterrupt:
        print("aivmm.planner: interrupted", file=sys.stderr)
        return 130
    print(json.dumps(as_json(found)) if options.json else as_text(found, problem.unit))
    return 0


def as_json(found: Solution) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    return {
        "objective": found.objective,
        "bound": found.bound,
        "gap": found.gap,
        "seconds": found.seconds,
        "contiguous": found.contiguous,
        "assignment": {id: str(place) for id, place in found.assignment.items()},
    }


def as_text(found: Solution, unit: str) -> str:
    """Return what is printed for people."""
    lines = [
        f"objective   {found.objective:.6g} {unit}",
        f"bound       {found.bound:.6g} {unit} (no plan is below)",
        f"gap         {found.gap:.3%}",
        f"seconds     {found.seconds:.2f}",
        f"contiguous  {'yes' if found.contiguous else 'no'}",
        "loads       " + ", ".join(f"{name}:{index} {load:.6g}" for (name, index), load in sorted(found.evaluation.slowed.items())),
        "assignment",
        *(f"  {id}  {place}" for id, place in found.assignment.items()),
    ]
    return "\n".join(line if line.isprintable() else ascii(line)[1:-1] for line in lines)  # names may hold anything that JSON can spell


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m aivmm.planner", description="Placement problems: solved, with a proven bound.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    command = commands.add_parser("solve", help="solve the problem in a file", description="Solve the placement problem in a file.")
    command.add_argument("file", type=Path, metavar="FILE", help="a problem in JSON: our schema, or a published instance")
    command.add_argument("--objective", choices=["throughput", "latency"], required=True, help="the largest load, or the sum of the loads")
    command.add_argument("--contiguous", action="store_true", help="at most one segment on each device")
    command.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, metavar="S", help="seconds (default: %(default)g)")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())

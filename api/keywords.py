"""Errors of the public functions, in words of Python: what the command line calls an option is an argument there."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from aivmm.errors import AivmmError

P = ParamSpec("P")
R = TypeVar("R")

# What options are called as arguments, where that is not their name with underscores.
_KEYWORDS = {"batch": "batches", "budget": "budget_s", "constraint": "constraints", "dim": "dims", "shape": "shapes"}
_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*[a-z])(?![\w-])")


def as_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Let errors that leave `function` call options by the names of its arguments: `--other-shapes` is `other_shapes`.

    What is none of its arguments is left as it is: it belongs to a command that the advice names.
    """

    @wraps(function)
    def called(*given: P.args, **named: P.kwargs) -> R:
        try:
            return function(*given, **named)
        except AivmmError as error:
            from inspect import signature  # here: importing aivmm imports nothing that a call may not need

            known = signature(function).parameters

            def keyword(option: re.Match[str]) -> str:
                name = _KEYWORDS.get(option[1], option[1].replace("-", "_"))
                return name if name in known else option[0]

            error.message, error.advice = (_OPTION.sub(keyword, each) for each in (error.message, error.advice))
            error.args = (error.message,)
            raise

    return called

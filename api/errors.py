"""Errors. `AivmmError` and its children are what a user can fix; anything else that escapes is a bug and keeps its traceback.

This module and `aivmm.tensors` are leaves: every folder may import them, and they import nothing of ours.
"""

from __future__ import annotations


class AivmmError(Exception):
    """Something a user can fix: one line that says what is wrong and where, with advice on what to do."""

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.message.removesuffix('.')}; {self.advice}" if self.advice else self.message


class UsageError(AivmmError):
    """A command, option, argument or file that cannot be used as given."""


class ModelError(AivmmError):
    """A model file that cannot be read, or that no target can take."""


class BundleError(AivmmError):
    """A plan bundle that is damaged, unsafe, too new, or not a bundle."""


class DatabaseError(AivmmError):
    """A performance database that cannot be opened or written; the file is left as it is."""


class Infeasible(AivmmError):
    """No plan meets the constraints. Not a mistake in the request, so the command line exits with 3 and not with 2."""


class Unsupported(AivmmError):
    """A target refuses a model, a configuration or an ability, in the runtime's own words. Knowledge, not a failure."""

"""Which hot path is used: `_hot`, written in C, where it was built and fits this interpreter and its NumPy; else its reference in Python.

All who have a part in it ask here. `AIVMM_HOT_PATH=python` leaves `_hot` alone altogether, which tells whether it has a part in a problem;
with `AIVMM_HOT_PATH=native` no engine is made without it. `engine.stats()` says which one requests take.
"""

from __future__ import annotations

import os
import sys
import weakref
from types import ModuleType

import numpy as np

from aivmm.errors import UsageError

VARIABLE = "AIVMM_HOT_PATH"
VERSION = 8  # of what `_hot` and the Python around it expect of each other; whoever changes that raises it on both sides


def _load() -> ModuleType:
    """Return `_hot`.

    Raises:
        ImportError: it cannot be used here, and why.
    """
    if os.environ.get(VARIABLE) == "python":
        raise ImportError(f"{VARIABLE}=python asks for it")
    if sys.implementation.name != "cpython" or _without_lock():
        raise ImportError("it is for CPython with its global lock")  # before importing it, which would bring the lock back
    try:
        from aivmm.runtime import _hot
    except ImportError as error:
        raise ImportError(f"it was not built: {error}") from error
    if getattr(_hot, "VERSION", None) != VERSION:  # a checkout that was updated: nobody builds it but whoever installs
        raise ImportError("it was built from another version of its source: install again")
    if not _reads_arrays(_hot):
        raise ImportError(f"NumPy {np.__version__} lays out arrays in another way")
    return _hot


def _without_lock() -> bool:
    """Say whether this interpreter was built without its global lock. Not by its configuration, which takes milliseconds to load."""
    if hasattr(sys, "abiflags"):
        return "t" in sys.abiflags
    import sysconfig  # here: for Windows alone

    return bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def _reads_arrays(module: ModuleType) -> bool:
    """Say whether `_hot`, which is built without NumPy's headers, finds in arrays what NumPy says is there."""
    plain = np.zeros((3, 8), np.float32)
    locked = np.asfortranarray(np.zeros((2, 5)))
    locked.flags.writeable = False
    referred = np.zeros((4, 4), np.int16)
    reference = weakref.ref(referred)
    for array in (plain, plain[::2, 1:5], locked, referred):
        address = array.__array_interface__["data"][0]
        says = (address, *array.shape, *array.strides, array.base, array.dtype, array.flags.num, array is reference())
        try:
            found = module.array_fields(array)
        except TypeError:  # too small, or of other dimensions where it looks for them
            return False
        if found[5] is not array.base or found[6] is not array.dtype or found[:5] + found[7:] != says[:5] + says[7:]:
            return False
    return True


def check() -> None:
    """Refuse to go on where another hot path was asked for than there is. Not at import, where nobody could turn it into a line.

    Raises:
        UsageError: `AIVMM_HOT_PATH` is unknown, or asks for what is not here, and why; or it was set too late.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "python", "native"):
        raise UsageError(f"{VARIABLE} is {asked!r}", advice="set it to python or native, or not at all")
    if asked == "native" and native is None:
        raise UsageError(f"there is no native hot path: {why_not}", advice=f"build it, or unset {VARIABLE}")
    if asked == "python" and native is not None:
        raise UsageError(f"{VARIABLE}=python came too late: the native hot path is loaded", advice="set it before aivmm is imported")


native: ModuleType | None = None
why_not = ""  # it is not used
try:
    native = _load()
except ImportError as error:
    why_not = str(error)

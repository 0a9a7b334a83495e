"""Which hot path is used: `_hot`, written in C, where it was built and fits this interpreter and its NumPy; else its reference in Python.

All who have a part in it ask here. `AIVMM_HOT_PATH=python` leaves `_hot` alone altogether, which tells whether it has a part in a problem;
with `AIVMM_HOT_PATH=native` no engine is made without it. `engine.stats()` says which one requests take.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import weakref
from types import ModuleType

import numpy as np

from aivmm.errors import UsageError

VARIABLE = "AIVMM_HOT_PATH"


def _load() -> ModuleType:
    """Return `_hot`.

    Raises:
        ImportError: it cannot be used here, and why.
    """
    if os.environ.get(VARIABLE) == "python":
        raise ImportError(f"{VARIABLE}=python asks for it")
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise ImportError("it is for CPython with its global lock")  # before importing it, which would bring the lock back
    try:
        from aivmm.runtime import _hot
    except ImportError as error:
        raise ImportError(f"it was not built: {error}") from error
    if not _reads_arrays(_hot):
        raise ImportError(f"NumPy {np.__version__} lays out arrays in another way")
    return _hot


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
        found = module.array_fields(array)
        if found[5] is not array.base or found[6] is not array.dtype or found[:5] + found[7:] != says[:5] + says[7:]:
            return False
    return True


def check() -> None:
    """Refuse to go on where another hot path was asked for than there is. Not at import, where nobody could turn it into a line.

    Raises:
        UsageError: `AIVMM_HOT_PATH` is unknown, or asks for what is not here, and why.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "python", "native"):
        raise UsageError(f"{VARIABLE} is {asked!r}", advice="set it to python or native, or not at all")
    if asked == "native" and native is None:
        raise UsageError(f"there is no native hot path: {why_not}", advice=f"build it, or unset {VARIABLE}")


native: ModuleType | None = None
why_not = ""  # it is not used
try:
    native = _load()
except ImportError as error:
    why_not = str(error)

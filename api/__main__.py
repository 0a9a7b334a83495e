"""`python -m aivmm` is `aivmm`."""

import os
import sys

# `-m` puts the current folder first, where an onnx.py of the user's would be imported instead of the library.
if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
    del sys.path[0]

from aivmm.tuner.main import main

main()

"""`python -m aivmm` is `aivmm`."""

import sys
from pathlib import Path

# `-m` puts the current folder first, where an onnx.py of the user's would be imported instead of the library.
if not sys.flags.safe_path and sys.path[:1] == [str(Path.cwd())]:
    del sys.path[0]

from aivmm.tuner.main import main

if __name__ == "__main__":
    main()

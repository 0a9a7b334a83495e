"""`python -m aivmm` is `aivmm`."""

from aivmm.tuner.main import main

main()

"""The one part of the build that `pyproject.toml` cannot say in a settled form: the hot path in C (docs/decisions/0066)."""

from setuptools import Extension, setup

# Optional: without a compiler everything works, by `_hot`'s reference in Python, and `engine.stats()["hot_path"]` says so.
setup(
    ext_modules=[
        Extension("aivmm.runtime._hot", ["runtime/_hot.c"], depends=["runtime/_hot_answer.h", "runtime/_hot_clock.h"], optional=True)
    ]
)

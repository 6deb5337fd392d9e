"""The compiled part of the package; everything else is said in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "nbdbm._speed",
            ["nbdbm/_speed.c"],
            py_limited_api=True,
            # Without a compiler or Python's headers, Python does the same.
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

"""Builds the library with nvcc into the wheel compress-model-cuda: `pip wheel ./cuda_ext`. Needs no GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

# by its path: a front end of that name may be on sys.path
_spec = importlib.util.spec_from_file_location("build_kernels", Path(__file__).parent / "build.py")
assert _spec is not None and _spec.loader is not None
build_kernels = importlib.util.module_from_spec(_spec)
sys.modules["build_kernels"] = build_kernels
_spec.loader.exec_module(build_kernels)


class BuildLibrary(build_py):
    """The package, and in it the library and the record of its kernels."""

    def run(self) -> None:
        super().run()
        build_kernels.build_cuda(Path(self.build_lib) / "compressor_cuda")


class Binary(Distribution):
    """Not pure Python, though it has no extension module."""

    def has_ext_modules(self) -> bool:
        return True


class PlatformWheel(bdist_wheel):
    """One wheel for every Python of this platform: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(distclass=Binary, cmdclass={"build_py": BuildLibrary, "bdist_wheel": PlatformWheel})

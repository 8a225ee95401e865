"""Compiles the CPU kernels on installation; everything else stands in setup.cfg."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


def load_build():
    """hf_stompp/ops/build.py by its path: importing the package would need torch."""
    path = Path(__file__).parent / "hf_stompp" / "ops" / "build.py"
    spec = importlib.util.spec_from_file_location("hf_stompp_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()


class BuildKernels(build_ext):
    """Not a Python extension but a plain library, and one that may be missing: it is then compiled on first use."""

    def get_ext_filename(self, fullname: str) -> str:
        *packages, _ = fullname.split(".")
        return os.path.join(*packages, build.LIBRARY_NAME)

    def build_extension(self, ext: Extension) -> None:
        try:
            build.build(Path(self.get_ext_fullpath(ext.name)))
        except build.BuildError as error:
            self.warn(f"the CPU kernels were not compiled, it will be tried again on first use: {error}")


class PlatformWheel(bdist_wheel):
    """The library does not depend on the version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("hf_stompp.ops.libhf_stompp_cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)

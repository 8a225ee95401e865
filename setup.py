"""Compiles the native kernels on installation; everything else stands in setup.cfg."""

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


BUILD_CUDA = "HF_STOMPP_BUILD_CUDA"


class BuildKernels(build_ext):
    """Plain libraries, not Python extensions. The CPU kernels may be missing: they are compiled on first use then."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        if target.name == build.CUDA_LIBRARY_NAME:
            # Asked for: an installation without it must not look like one with it.
            build.build_cuda(target, build.RELEASE_ARCHITECTURES)
            return
        try:
            build.build(target)
        except build.BuildError as error:
            self.warn(f"the CPU kernels were not compiled, it will be tried again on first use: {error}")


class PlatformWheel(bdist_wheel):
    """The library does not depend on the version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


extensions = [Extension("hf_stompp.ops.libhf_stompp_cpu", sources=[], optional=True)]
wanted = os.environ.get(BUILD_CUDA, "0")
if wanted not in ("0", "1"):
    raise SystemExit(f"{BUILD_CUDA} must be 0 or 1, got {wanted!r}")
if wanted == "1":
    extensions.append(Extension("hf_stompp.ops.libhf_stompp_cuda", sources=[]))

setup(ext_modules=extensions, cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel})

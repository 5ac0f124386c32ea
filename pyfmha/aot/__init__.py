"""Ahead-of-time compilation: from Triton kernels to C files and a shared library. Needs Triton and a C compiler."""

from pyfmha.aot.build import BuildResult, Preview, build, compile_configs, compile_kernel, preview
from pyfmha.aot.cubin import Compiler
from pyfmha.aot.link_so import link
from pyfmha.aot.specs import make_spec, make_specs

__all__ = [
    "BuildResult",
    "Compiler",
    "Preview",
    "build",
    "compile_configs",
    "compile_kernel",
    "link",
    "make_spec",
    "make_specs",
    "preview",
]

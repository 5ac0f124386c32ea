"""Ahead-of-time compilation: from Triton kernels to C files and a shared library. Needs Triton and a C compiler."""

from pyfmha.aot.build import BuildResult, build, compile_configs, compile_kernel
from pyfmha.aot.cubin import Compiler
from pyfmha.aot.link_so import link
from pyfmha.aot.specs import make_spec, make_specs

__all__ = ["BuildResult", "Compiler", "build", "compile_configs", "compile_kernel", "link", "make_spec", "make_specs"]

"""Running what was built: the library through ctypes, and device memory, streams and events through cuda-python."""

from pyfmha.runtime.library import Function, Library, describe

__all__ = ["Function", "Library", "describe"]

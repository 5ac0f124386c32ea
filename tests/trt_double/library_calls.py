"""TensorRT's calls on the plugins that a library itself exports."""

from pyfmha.trt.tables import LibraryTables as LibraryCalls
from pyfmha.trt.tables import TablePlugin as LibraryPlugin

__all__ = ["LibraryCalls", "LibraryPlugin"]

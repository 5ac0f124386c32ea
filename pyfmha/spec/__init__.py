"""What to compile, as data, without doing it: a kernel's arguments, grid, conditions and tensors, and the manifest.

Needs the standard library only.
"""

from pyfmha.spec.constants import Constant
from pyfmha.spec.kernel import Argument, KernelSpec, Tuning
from pyfmha.spec.manifest import Manifest, read_manifest

__all__ = ["Argument", "Constant", "KernelSpec", "Manifest", "Tuning", "read_manifest"]

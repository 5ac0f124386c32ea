"""What a plugin object is made of."""

from dataclasses import dataclass
from typing import Any

from pyfmha.operators.instance import Instance
from pyfmha.runtime.library import Library
from pyfmha.trt.fields import Stored


@dataclass(frozen=True)
class Origin:
    """What a plugin object is made of, and its clones after it.

    Attributes:
        instance: what it serves: the operator with its attributes.
        library: with which code.
        stored: what its engine stores: of this library where it was built, of an earlier one where it was loaded.
        layer: the name that TensorRT gave it.
        namespace: that of its creator.
    """

    instance: Instance
    library: Library
    stored: Stored
    layer: str
    namespace: str

    def timing_cache_id(self) -> str:
        """What TensorRT tells plugins apart by in its timing cache: attributes, without loss, and the code's build."""
        operator, stored = self.instance.program.operator, dict(self.stored.options)
        listed = "".join(f" {name}={_exact(value)}" for name, value in self.instance.stored_attributes().items())
        options = "".join(f" {name}={stored[name]}" for name, has in self.instance.options.items() if has)
        build = self.library.manifest.build_id
        return f"{operator.name} {operator.version}{listed} build={build}{options}"


def _exact(value: Any) -> str:
    """An attribute's value without loss."""
    if isinstance(value, tuple):
        return ",".join(map(_exact, value))
    return value.hex() if isinstance(value, float) else str(value)

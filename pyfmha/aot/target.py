"""A stand-in for Triton's driver in the compiler process: kernel files that ask for the GPU get the target instead.

Imported by :mod:`pyfmha.aot.sources` only; it needs Triton.
"""

from typing import Any, NoReturn

from triton.backends.compiler import GPUTarget

from pyfmha.spec.arch import ARCHS


class NotKnown(Exception):
    """What was asked for does not follow from the architecture."""


class _Properties(dict[str, int]):
    def __missing__(self, key: str) -> NoReturn:
        raise NotKnown(f"asks for the GPU's {key}, which its architecture does not say")


class _Utils:
    def __init__(self, driver: "TargetDriver") -> None:
        self._driver = driver

    def get_device_properties(self, device: int = 0) -> dict[str, int]:
        return _Properties({"max_shared_mem": self._driver.arch.shared_limit, "warpSize": 32})

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return self._driver.get_device_capability(device)

    def get_current_device(self) -> int:
        return 0

    def __getattr__(self, name: str) -> NoReturn:
        raise NotKnown(f"asks Triton's driver for utils.{name}, for which there is no GPU here")


class TargetDriver:
    """Answers for one GPU, device 0, of the architecture that is compiled for.

    Attributes:
        arch: that architecture.
        asked: whether anything was asked since that was last set to False.
    """

    def __init__(self) -> None:
        self.arch = ARCHS["sm_80"]
        self.asked = False

    @property
    def utils(self) -> _Utils:
        """As the real driver's, as far as the architecture says."""
        self.asked = True
        return _Utils(self)

    def get_current_target(self) -> GPUTarget:
        """The target."""
        self.asked = True
        return GPUTarget("cuda", self.arch.capability, 32)

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        """Its compute capability, major and minor."""
        self.asked = True
        major, minor = divmod(self.arch.capability, 10)
        return major, minor

    def get_current_device(self) -> int:
        """The only device's number."""
        return 0

    def set_current_device(self, device: int) -> None:
        """Nothing to do: there is one."""

    def get_current_stream(self, device: int = 0) -> int:
        """The default stream, on which nothing ever runs."""
        return 0

    def get_benchmarker(self) -> Any:
        """What an autotuner keeps, and here never calls."""
        from triton.testing import do_bench

        return do_bench

    @classmethod
    def is_active(cls) -> bool:
        """As a real driver says it."""
        return True

    def __getattr__(self, name: str) -> NoReturn:
        raise NotKnown(f"asks Triton's driver for {name}, for which there is no GPU here")

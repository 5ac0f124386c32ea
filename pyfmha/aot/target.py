"""Stand-ins for the GPU in the compiler process: kernel files that ask Triton's driver or torch get the target instead.

Imported by :mod:`pyfmha.aot.sources` only; it needs Triton.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
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


class _DeviceProperties:
    """What torch.cuda.get_device_properties says, as far as it follows from the architecture."""

    def __init__(self, driver: TargetDriver) -> None:
        self.name = f"NVIDIA {driver.arch.name}"
        self.major, self.minor = driver.get_device_capability()
        self.warp_size = 32
        self.shared_memory_per_block_optin = driver.arch.shared_limit

    def __getattr__(self, name: str) -> NoReturn:
        raise NotKnown(f"asks for the GPU's {name}, which its architecture does not say")


def stand_in_for(cuda: ModuleType, driver: TargetDriver) -> None:
    """Have ``torch.cuda`` answer for the target where it would ask the GPU of this machine."""
    answers: dict[str, Any] = {
        "get_device_capability": lambda device=None: driver.get_device_capability(),
        "get_device_name": lambda device=None: _DeviceProperties(driver).name,
        "get_device_properties": lambda device=None: _DeviceProperties(driver),
        "current_device": lambda: 0,
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)


class TorchWatcher(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds ``torch.cuda`` as others would, and has it answer for the target once it is imported."""

    def __init__(self, driver: TargetDriver) -> None:
        self._driver = driver
        self._real: Any = None

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """What importlib asks of a finder."""
        if name != "torch.cuda":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = next((spec for finder in others if (spec := finder.find_spec(name, path, target)) is not None), None)
        if found is None or found.loader is None:
            return found
        self._real, found.loader = found.loader, self
        return found

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the real loader."""
        made: ModuleType | None = self._real.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        """As the real loader, and then the answers."""
        self._real.exec_module(module)
        stand_in_for(module, self._driver)

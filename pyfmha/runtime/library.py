"""A built library in Python: loaded with ctypes, called through prototypes made from the manifest it carries.

Needs nothing but ctypes; CUDA is the library's own business, from the first :meth:`Function.load` on.
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyfmha.abi import ctype
from pyfmha.errors import DriverError, LaunchError, LibraryError
from pyfmha.manifest import Function as FunctionManifest
from pyfmha.manifest import Manifest, parse_manifest, read_manifest

DEFAULT_LIBRARY = Path("aot_out") / "libpyfmha.so"


class Function:
    """One C function of a library.

    A call ``function(stream, *arguments)`` launches it: the stream is the integer value of a ``CUstream`` of the
    current CUDA context, pointers are integers, the others Python numbers. It returns once the launch is queued.

    Attributes:
        name: the C function's name.
        manifest: its arguments, algorithms and variants.
    """

    def __init__(self, cdll: ctypes.CDLL, manifest: FunctionManifest) -> None:
        self.name = manifest.name
        self.manifest = manifest
        types = [ctype(kind) for _, kind in manifest.arguments]
        values = [entry.ctypes for entry in types]
        self._launch = _bind(cdll, manifest.name, [ctypes.c_size_t, *values, ctypes.c_int])
        self._load = _bind(cdll, f"load_{manifest.name}", [])
        self._unload = _bind(cdll, f"unload_{manifest.name}", [])
        self._variant = _bind(
            cdll, f"{manifest.name}_variant", [*values, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
        )
        self._last_error = _bind(cdll, "pyfmha_last_error", [], ctypes.c_char_p)
        self._count = len(values)
        # ctypes wraps integers that do not fit their C type without a word, so they are compared first.
        self._bounds = [(i, *entry.bounds) for i, entry in enumerate(types) if entry.bounds is not None]
        self._bounds += [(i, 0, (1 << 64) - 1) for i, entry in enumerate(types) if entry.kind == "pointer"]

    def __repr__(self) -> str:
        arguments = ", ".join(f"{kind} {name}" for name, kind in self.manifest.arguments)
        return f"<{self.name}(stream, {arguments})>"

    @property
    def address(self) -> int:
        """The C entry point, for callers that bind it themselves."""
        return ctypes.cast(self._launch, ctypes.c_void_p).value or 0

    def load(self) -> None:
        """Load the machine code into the current CUDA context; counted, each load asks for one :meth:`unload`.

        Raises:
            DriverError: there is no driver, no context, no code for the device, or the driver refused it.
        """
        self._check(self._load(), DriverError)

    def unload(self) -> None:
        """Undo one :meth:`load` in the current CUDA context.

        Raises:
            DriverError: it is not loaded there.
        """
        self._check(self._unload(), DriverError)

    def __call__(self, stream: int, *arguments: Any, algo_id: int = 0) -> None:
        """Launch.

        Args:
            stream: a ``CUstream`` of the current context, as an integer; 0 is the legacy default stream.
            arguments: as in the manifest.
            algo_id: which algorithm, from 0.

        Raises:
            LaunchError: the launch was refused or failed; ``code`` is the ``CUresult``.
            TypeError: an argument is of the wrong kind, or their number is wrong.
            OverflowError: an integer does not fit its C type.
        """
        self._check_arguments(arguments, algo_id)
        try:
            status = self._launch(stream, *arguments, algo_id)
        except ctypes.ArgumentError as error:
            raise TypeError(f"{self!r}: {error}") from None
        if status:
            self._check(status, LaunchError)

    def variant(self, *arguments: Any, algo_id: int = 0) -> str:
        """The name of the variant that would serve a launch with these arguments.

        Raises:
            LaunchError, TypeError, OverflowError: as a call.
        """
        self._check_arguments(arguments, algo_id)
        name = ctypes.c_char_p()
        try:
            status = self._variant(*arguments, algo_id, ctypes.byref(name))
        except ctypes.ArgumentError as error:
            raise TypeError(f"{self!r}: {error}") from None
        self._check(status, LaunchError)
        return (name.value or b"").decode()

    def _check_arguments(self, arguments: tuple[Any, ...], algo_id: int) -> None:
        if len(arguments) != self._count:
            names = ", ".join(name for name, _ in self.manifest.arguments)
            raise TypeError(
                f"{self.name} takes {self._count} arguments after the stream ({names}), got {len(arguments)}"
            )
        if algo_id and not -(1 << 31) <= algo_id < 1 << 31:
            raise OverflowError(f"{self.name}: algo_id is {algo_id}, which is no C int")
        for index, low, high in self._bounds:
            if not low <= arguments[index] <= high:
                name, kind = self.manifest.arguments[index]
                raise OverflowError(f"{self.name}: {name} is {arguments[index]}, {kind} holds {low} to {high}")

    def _check(self, status: int, error: type[DriverError]) -> None:
        if status:
            text = self._last_error() or b""
            raise error(text.decode(errors="replace") or f"{self.name}: CUDA error {status}", status)


class Library:
    """A shared library that pyfmha built: like a mapping from name to :class:`Function`.

    Args:
        path: the ``.so``.

    Attributes:
        path: its absolute path.
        manifest: what it holds, as the library itself says.

    Raises:
        LibraryError: the file is missing, cannot be loaded, was not built by pyfmha, or is not what the manifest
            beside it describes.
        ManifestError: it was built by another schema version.
    """

    def __init__(self, path: Path | str = DEFAULT_LIBRARY) -> None:
        self.path = Path(path).resolve()
        if not self.path.is_file():
            raise LibraryError(f"no library at {path}; build it: pyfmha build")
        try:
            self._cdll = ctypes.CDLL(str(self.path))
        except OSError as error:
            raise LibraryError(
                f"{self.path} cannot be loaded: {error}; build it on this machine: pyfmha build"
            ) from None
        self.manifest = self._read_manifest()
        self._functions = {function.name: Function(self._cdll, function) for function in self.manifest.functions}

    def _read_manifest(self) -> Manifest:
        try:
            text = _bind(self._cdll, "pyfmha_manifest", [], ctypes.c_char_p)()
        except LibraryError:
            raise LibraryError(
                f"{self.path} was not built by pyfmha: it has no pyfmha_manifest; build one: pyfmha build"
            ) from None
        manifest = parse_manifest((text or b"").decode(errors="replace"), f"the manifest in {self.path}")
        beside = (
            self.path.with_name("manifest.json") if self.path.name == "libpyfmha.so" else self.path.with_suffix(".json")
        )
        if beside.is_file():
            written = read_manifest(beside)
            if written.build_id != manifest.build_id:
                raise LibraryError(
                    f"{self.path} is build {manifest.build_id}, {beside.name} beside it describes {written.build_id};"
                    " restart the process if the library was rebuilt since it was first loaded here, else run:"
                    " pyfmha build"
                )
        return manifest

    def __getitem__(self, name: str) -> Function:
        try:
            return self._functions[name]
        except KeyError:
            raise LibraryError(
                f"{self.path.name} has no function {name!r}; it has: {', '.join(self._functions)}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._functions

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)

    def __repr__(self) -> str:
        return f"<Library {self.path}: {len(self)} functions for {', '.join(self.manifest.archs())}>"


def _bind(cdll: ctypes.CDLL, name: str, argtypes: list[Any], restype: Any = ctypes.c_int) -> Any:
    try:
        function = cdll[name]  # a new object at each lookup, unlike an attribute: two users never share argtypes
    except AttributeError:
        raise LibraryError(
            f"the library has no symbol {name}, which its manifest promises; build it again: pyfmha build"
        ) from None
    function.argtypes = argtypes
    function.restype = restype
    return function


def describe(path: Path) -> Manifest:
    """The manifest of a library (``.so``) or of a manifest file (``.json``), without CUDA.

    Raises:
        LibraryError, ManifestError: it is neither, or cannot be used.
    """
    return Library(path).manifest if path.suffix == ".so" else read_manifest(path)

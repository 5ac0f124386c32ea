"""A built library in Python: loaded with ctypes, called through prototypes made from the manifest it carries.

Needs nothing but ctypes; CUDA is the library's own business, from the first :meth:`Function.load` on.
"""

import ctypes
import functools
import math
import operator
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyfmha.errors import DriverError, LaunchError, LibraryError
from pyfmha.operators.description import Operator
from pyfmha.operators.tactics import Tactic, tactics_of
from pyfmha.runtime.arguments import in_order, with_addresses
from pyfmha.runtime.elf import check_whole
from pyfmha.runtime.find import library_path, naming_the_variable
from pyfmha.runtime.packing import Head, aligned, leading_pointers, pointers_among
from pyfmha.runtime.prepared import Prepared
from pyfmha.spec.abi import ctype
from pyfmha.spec.advice import LIBRARY_NAME, MANIFEST_NAME, build_command
from pyfmha.spec.manifest import Function as FunctionManifest
from pyfmha.spec.manifest import Manifest, parse_manifest, read_manifest

_INTEGERS = {int}
FLOAT_MAX = 3.4028235677973362e38  # the largest that rounds to a finite float32


class Function:
    """One C function of a library.

    A call ``function(stream, *arguments)`` launches it: the stream is the integer value of a ``CUstream`` of the
    current CUDA context, pointers are integers, the others Python numbers. It returns once the launch is queued. The
    last arguments may come by name, ``function(stream, x, y, n=n)``, in any order.

    For a pointer a tensor may be given that has DLPack or ``__cuda_array_interface__`` (PyTorch's, CuPy's): its memory
    is used where it is, on that stream, which is ordered after the tensor's producer as the protocol says. It must
    live until the launch has run.

    Attributes:
        name: the C function's name.
        manifest: its arguments, algorithms and variants.
        names: of the arguments, in order.
        pack: turns ``(stream, *arguments, algo_id)`` into the bytes of the C struct; raises struct.error or
            OverflowError for what does not fit, floats that would become infinite included.
        launch_packed: launches from those bytes and returns the ``CUresult``: a call without the error handling.
        start: the same, unchecked: 40 ns less.
    """

    def __init__(self, cdll: ctypes.CDLL, manifest: FunctionManifest) -> None:
        self.name = manifest.name
        self.manifest = manifest
        self.names = tuple(name for name, _ in manifest.arguments)
        types = [ctype(kind) for _, kind in manifest.arguments]
        # One struct instead of dozens of ctypes conversions: twice as fast, and struct refuses what does not fit, where
        # ctypes wraps integers without a word.
        formats = ["Q", *(entry.format for entry in types)]
        self.pack = struct.Struct(aligned([*formats, "i"])).pack
        self._pack_first = struct.Struct(aligned([*formats, "4x"])).pack  # with algo_id 0
        self.launch_packed = _bind(cdll, f"{manifest.name}_packed", [ctypes.c_char_p])
        self.start: Callable[..., int] = _bind(cdll, f"{manifest.name}_packed")
        self._entry = _bind(cdll, manifest.name, [])
        self._load = _bind(cdll, f"load_{manifest.name}", [])
        self._unload = _bind(cdll, f"unload_{manifest.name}", [])
        values = [entry.ctypes for entry in types]
        self._variant = _bind(
            cdll, f"{manifest.name}_variant", [*values, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
        )
        needed = any(i.workspace for algorithm in manifest.algorithms for v in algorithm for i in v.images)
        self._workspace = needed and _bind(
            cdll, f"{manifest.name}_workspace", [*values, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64)]
        )
        self._last_error = _bind(cdll, "pyfmha_last_error", [], ctypes.c_char_p)
        self._types = types
        self._flags = [i for i, entry in enumerate(types, start=1) if entry.bounds == (0, 1)]
        pointers = [i for i, entry in enumerate(types, start=1) if entry.kind == "pointer"]
        # The last twice, so that one alone is a pair, too; without any, an integer.
        self._pointers = operator.itemgetter(*pointers, pointers[-1]) if pointers else lambda arguments: (0,)
        self._behind = tuple(i for i, entry in enumerate(types) if entry.kind == "pointer")
        self._leading = next((i for i, entry in enumerate(types) if entry.kind != "pointer"), len(types))
        self._leading_head = leading_pointers(self._leading)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{kind} {name}" for name, kind in self.manifest.arguments)
        return f"<{self.name}(stream, {arguments})>"

    @functools.cached_property
    def tactics(self) -> tuple[Tactic, ...]:
        """Its algorithms as TensorRT's tactics; raises PluginError where two have one id."""
        return tactics_of(self.manifest)

    @functools.cached_property
    def archs(self) -> tuple[str, ...]:
        """The architectures for which it holds all code that it needs."""
        return self.manifest.archs()

    @property
    def address(self) -> int:
        """The C entry point ``X(stream, ..., algo_id)``, for callers that bind it themselves."""
        return ctypes.cast(self._entry, ctypes.c_void_p).value or 0

    def load(self) -> None:
        """Load the machine code into the current CUDA context; counted, each load asks for one :meth:`unload`.

        Raises:
            DriverError: there is no driver, no context, no code for the device, or the driver refused it.
        """
        self.check(self._load(), DriverError)

    def unload(self) -> None:
        """Undo one :meth:`load` in the current CUDA context.

        Raises:
            DriverError: it is not loaded there.
        """
        self.check(self._unload(), DriverError)

    def __call__(self, /, *arguments: Any, algo_id: int = 0, **named: Any) -> None:
        """Launch.

        Args:
            arguments: the stream, a ``CUstream`` of the current context as an integer (0 is the legacy default stream);
                then as in the manifest.
            algo_id: which algorithm, from 0.
            named: arguments by name, ``stream`` too; that takes a microsecond or two.

        Raises:
            LaunchError: the launch was refused or failed; ``code`` is the ``CUresult``.
            TypeError: an argument is of the wrong kind, missing, unknown or given twice.
            OverflowError: an integer does not fit its C type.
            TensorError: a tensor is not on the current context's GPU, of another type than the pointer, or not
                contiguous where the function takes no strides.
        """
        # Written for speed: taking the stream apart from the rest would copy the arguments twice.
        if named:
            arguments = in_order(self.manifest, arguments, named)
        try:
            # An integer tensor of one element would pass for the number in it.
            if set(map(type, self._pointers(arguments))) != _INTEGERS:
                arguments, _held = with_addresses(self.manifest, arguments, arguments[0])
            packed = self._pack_first(*arguments) if algo_id == 0 else self.pack(*arguments, algo_id)
        except (struct.error, OverflowError, TypeError, IndexError) as error:
            raise self._refusal(arguments, algo_id) from error
        if self._flags:
            self._check_flags(arguments, algo_id)
        status = self.start(packed)
        if status:
            self.check(status, LaunchError)

    def prepare(self, /, *arguments: Any, algo_id: int = 0, all_pointers: bool = False, **named: Any) -> Prepared:
        """Settle everything about a launch but its stream and leading pointers, for the cheapest way to repeat it.

        Args:
            arguments: as for a call; the leading pointers are placeholders, to be given at each launch, as integers.
            algo_id: which algorithm, from 0.
            all_pointers: whether pointers behind other arguments are placeholders, too.

        Raises:
            TypeError, OverflowError: as a call. Whether the arguments are served is found out at the launch.
        """
        if named:
            arguments = in_order(self.manifest, arguments, named, stream=False)
        packed = self._packed((0, *arguments), algo_id)
        return Prepared(self, packed, self._head(arguments) if all_pointers else self._leading_head)

    def settle(self, *arguments: Any, algo_id: int = 0) -> tuple[Callable[..., bytes], bytes]:
        """As :meth:`prepare` with all pointers as placeholders, for callers that put the bytes together themselves.

        Returns:
            What packs the stream and the pointers, and the bytes behind those, for :attr:`start`.

        Raises:
            TypeError, OverflowError: as a call.
        """
        packed, head = self._packed((0, *arguments), algo_id), self._head(arguments)
        return head.pack, packed[head.size :]

    def _head(self, arguments: Sequence[Any]) -> Head:
        """What packs the stream and all pointers, with what stands between."""
        if len(self._behind) == self._leading:
            return self._leading_head
        formats = [entry.format for entry in self._types[: self._behind[-1] + 1]]
        return pointers_among(tuple(formats), arguments, self._behind)

    def holds(self, arguments: Sequence[Any]) -> bool:
        """Whether arguments without a stream, with integers for pointers, all fit their C types; which does not, says a
        call."""
        try:
            self._pack_first(0, *arguments)
        except (struct.error, OverflowError, TypeError):
            return False
        return all(0 <= arguments[index - 1] <= 1 for index in self._flags)

    def _addresses(
        self, arguments: tuple[Any, ...], named: Mapping[str, Any], algo_id: int
    ) -> tuple[tuple[Any, ...], object]:
        """Arguments without a stream, checked, and with addresses for tensors; and what keeps those."""
        if named:
            arguments = in_order(self.manifest, arguments, named, stream=False)
        (_, *given), held = with_addresses(self.manifest, (0, *arguments), None)
        self._packed((0, *given), algo_id)
        return tuple(given), held

    def _packed(self, arguments: tuple[Any, ...], algo_id: int) -> bytes:
        try:
            packed = self.pack(*arguments, algo_id)
        except (struct.error, OverflowError, TypeError) as error:
            raise self._refusal(arguments, algo_id) from error
        self._check_flags(arguments, algo_id)
        return packed

    def _check_flags(self, arguments: tuple[Any, ...], algo_id: int) -> None:
        """Refuse 1-bit integers above 1: struct takes any of 8 bits."""
        if any(not 0 <= arguments[index] <= 1 for index in self._flags):
            raise self._refusal(arguments, algo_id)

    def variant(self, /, *arguments: Any, algo_id: int = 0, **named: Any) -> str:
        """The name of the variant that would serve a launch with these arguments.

        Raises:
            LaunchError, TypeError, OverflowError, TensorError: as a call.
        """
        arguments, _held = self._addresses(arguments, named, algo_id)
        name = ctypes.c_char_p()
        self.check(self._variant(*arguments, algo_id, ctypes.byref(name)), LaunchError)
        return (name.value or b"").decode()

    def workspace_size(self, /, *arguments: Any, algo_id: int = 0, **named: Any) -> int:
        """Bytes of device memory that a launch with these arguments needs at its last one, the workspace; often 0.

        Args:
            arguments: as for :meth:`variant`; the workspace itself may be 0.
            algo_id: which algorithm, from 0.

        Raises:
            LaunchError: as a call would; the function must be loaded in the current CUDA context.
            TypeError, OverflowError, TensorError: as a call.
        """
        arguments, _held = self._addresses(arguments, named, algo_id)
        size = ctypes.c_uint64()
        if self._workspace:
            self.check(self._workspace(*arguments, algo_id, ctypes.byref(size)), LaunchError)
        return size.value

    def _refusal(self, arguments: tuple[object, ...], algo_id: object) -> Exception:
        """The error for a stream and arguments that could not be packed: the first that is at fault, by name."""
        names = self.names
        if len(arguments) != len(names) + 1:
            listed = ", ".join(names)
            got = f"got {len(arguments) - 1}" if arguments else "got no stream either"
            return TypeError(f"{self.name} takes {len(names)} arguments after the stream ({listed}), {got}")
        int32 = ctype("i32")
        kinds = ["CUstream", *(kind for _, kind in self.manifest.arguments), "int"]
        entries = [ctype("*i8"), *self._types, int32]
        for name, kind, entry, value in zip(
            ["stream", *names, "algo_id"], kinds, entries, [*arguments, algo_id], strict=True
        ):
            wanted = "a number" if entry.kind == "float" else "an integer"
            low, high = entry.bounds or ((-FLOAT_MAX, FLOAT_MAX) if entry.kind == "float" else (0, (1 << 64) - 1))
            try:
                struct.pack(entry.format, value)
                number: float = value  # type: ignore[assignment]  # it was packed
                if entry.c == "double" or low <= number <= high or not math.isfinite(number):
                    continue
            except (struct.error, OverflowError, TypeError):
                if not isinstance(value, int) and not (entry.kind == "float" and isinstance(value, float)):
                    return TypeError(f"{self.name}: {name} is {value!r}, {kind} is {wanted}")
            held = f"{low} to {high}" if entry.kind != "float" else "up to 3.4e38 in size"
            return OverflowError(f"{self.name}: {name} is {value}, {kind} holds {held}")
        return TypeError(f"{self!r}: the arguments cannot be passed")

    def check(self, status: int, error: type[DriverError]) -> None:
        """Raise ``error`` with the library's text if a status is not success."""
        if status:
            text = self._last_error() or b""
            raise error(text.decode(errors="replace") or f"{self.name}: CUDA error {status}", status)


class Library(Mapping[str, Function]):
    """A shared library that pyfmha built: a mapping from name to :class:`Function`.

    Args:
        path: the ``.so``; by default that of ``PYFMHA_LIBRARY``, else ``aot_out/libpyfmha.so``, else the wheel's.

    Attributes:
        path: its absolute path.
        manifest: what it holds, as the library itself says.

    Raises:
        LibraryError: the file is missing, cannot be loaded, was not built by pyfmha, or is not what the manifest
            beside it describes.
        ManifestError: it was built by another schema version.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        found = library_path() if path is None else path
        with naming_the_variable(path is None):
            self._open(found)
        self._functions = {made.name: Function(self._cdll, made) for made in self.manifest.functions}

    def _open(self, path: Path | str) -> None:
        self.path = Path(path).resolve()
        if not self.path.is_file():
            raise LibraryError(f"no library at {path}; build it: {build_command(Path(path))}")
        check_whole(self.path)
        try:
            self._cdll = ctypes.CDLL(str(self.path))
        except OSError as error:
            raise LibraryError(
                f"{self.path} cannot be loaded: {error}; build it on this machine: {build_command(self.path)}"
            ) from None
        self.manifest = self._read_manifest()

    @functools.cached_property
    def operators(self) -> tuple[Operator, ...]:
        """The descriptions of the plugins that it holds.

        Raises:
            SpecError: a later version of this package described one.
        """
        return tuple(Operator.from_json(data) for data in self.manifest.operators)

    def _read_manifest(self) -> Manifest:
        try:
            text = _bind(self._cdll, "pyfmha_manifest", [], ctypes.c_char_p)()
        except LibraryError:
            raise LibraryError(
                f"{self.path} was not built by pyfmha: it has no pyfmha_manifest; build one: {build_command(self.path)}"
            ) from None
        origin = f"the manifest in {self.path}"
        manifest = parse_manifest((text or b"").decode(errors="replace"), origin, build_command(self.path))
        built = self.path.name == LIBRARY_NAME
        beside = self.path.with_name(MANIFEST_NAME) if built else self.path.with_suffix(".json")
        if beside.is_file():
            written = read_manifest(beside)
            if written.build_id != manifest.build_id:
                raise LibraryError(
                    f"{self.path} is build {manifest.build_id}, {beside.name} beside it describes {written.build_id};"
                    " restart the process if the library was rebuilt since it was first loaded here, else run:"
                    f" {build_command(self.path)}"
                )
        return manifest

    # Not by what it holds: one library is not another.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def get(self, name: str, default: Any = None) -> Any:
        """The function of that name, or the default."""
        return self._functions.get(name, default)

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
        return f"<Library {self.path}: {len(self)} functions for {self.manifest.archs_in_words()}>"


def _bind(cdll: ctypes.CDLL, name: str, argtypes: list[Any] | None = None, restype: Any = ctypes.c_int) -> Any:
    try:
        function = cdll[name]  # a new object at each lookup, unlike an attribute: two users never share argtypes
    except AttributeError:
        raise LibraryError(
            f"the library has no symbol {name}, which its manifest promises; build it again: pyfmha build"
        ) from None
    if argtypes is not None:
        function.argtypes = argtypes
    function.restype = restype
    return function


def describe(path: Path | None = None) -> Manifest:
    """The manifest of a library (``.so``; the one of :class:`Library`'s default) or a manifest file (``.json``).

    Raises:
        LibraryError, ManifestError: it is neither, or cannot be used.
    """
    return Library(path).manifest if path is None or path.suffix == ".so" else read_manifest(path)

"""Importing kernel files in the compiler process, wherever they lie and whatever they are called.

Imported by :mod:`pyfmha.aot.worker` only; it needs Triton.
"""

import hashlib
import importlib
import importlib.machinery
import importlib.util
import linecache
import sys
import sysconfig
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pyfmha.aot.target import NotKnown, TargetDriver, TorchWatcher
from pyfmha.errors import SpecError
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.packages import package_folders


class Refused(Exception):
    """A request that fails for a reason to report; ``kind`` names the exception the parent raises."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Source:
    """An imported kernel file.

    Attributes:
        module: the module.
        made_of: SHA-256 of the file and of the files that it imports, those installed left out, by path.
        arch: the architecture that it was imported for; None where it did not ask.
    """

    module: ModuleType
    made_of: dict[str, str]
    arch: str | None


_INSTALLED = {str(Path(path).resolve()) for path in sysconfig.get_paths().values() if path} | set(
    sysconfig.get_paths().values()
)
# What a kernel file means by these names is never a file beside it, be it called so by chance.
_KEPT = sys.stdlib_module_names | {"triton", "numpy", "torch"}
_sources: dict[str, Source] = {}  # by path
_imported: set[str] = set()  # names of the modules that the latest kernel file imported, those installed left out
_driver = TargetDriver()
_watcher = TorchWatcher(_driver)


def load_source(path: Path, arch: str) -> Source:
    """Import a kernel file for an architecture, which a file that asks for the GPU gets to see."""
    known = _sources.get(str(path))
    if known and known.arch in (None, arch) and _digests(known.made_of) == known.made_of:
        return known
    # Before the kernel file does: where Triton lies outside the usual folders, its modules would count as the user's.
    import triton.experimental.gluon
    import triton.language
    import triton.testing

    _driver.arch, _driver.asked = ARCHS[arch], False
    triton.runtime.driver.set_active(_driver)
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)
    linecache.checkcache()  # Triton reads a kernel's source through it, and the file may have changed since
    for name in _imported:  # imported anew: each file depends on it, and the name may mean another file here
        sys.modules.pop(name, None)
    _imported.clear()
    before = dict(sys.modules)
    try:
        module = _import(path)
    except Refused:
        raise
    except SpecError as error:  # a function declared wrongly: it says itself what is wrong
        raise Refused("SpecError", f"{path}: {error}") from error
    except BaseException as error:  # a kernel file may raise anything, SystemExit included
        raise Refused("KernelSourceError", _explained(error, path, arch)) from error
    finally:
        _imported.update(name for name, found in list(sys.modules.items()) if _is_new(name, found, before))
    files = {str(path), *(str(folder / "__init__.py") for folder in package_folders(path))}
    files |= {str(getattr(sys.modules[name], "__file__", None) or path) for name in _imported}
    made_of = _digests(file for file in files if Path(file).is_file())
    _sources[str(path)] = Source(module, made_of, arch if _driver.asked else None)
    return _sources[str(path)]


def _is_new(name: str, module: ModuleType, before: dict[str, ModuleType]) -> bool:
    return before.get(name) is not module and _is_users(module)


def _import(path: Path) -> ModuleType:
    """Import a file: alone, or as a module of the packages that it lies in or imports from relatively."""
    if importlib.util.spec_from_file_location(path.stem, path) is None:
        raise Refused("KernelSourceError", f"{path} is not a Python file")
    folders = package_folders(path)
    root = folders[0].parent if folders else path.parent
    names = [folder.name for folder in folders]
    if path.name != "__init__.py":
        names.append(path.stem)
    if names[0] in _KEPT or (names[0] in sys.modules and not _is_users(sys.modules[names[0]])):
        names[0] = f"pyfmha_user_{names[0]}"  # a name of its own: others mean something else by that one
    finder = _Beside(root)
    sys.meta_path.insert(0, finder)
    try:
        return _import_package(path, folders, names)
    finally:
        sys.meta_path.remove(finder)


def _import_package(path: Path, folders: list[Path], names: list[str]) -> ModuleType:
    """Import a file below its packages; one that fails, as most that hold kernels do without what they are for, counts
    as far as its ``__init__.py`` came."""
    failures: list[BaseException] = []
    for depth, folder in enumerate(folders, 1):
        try:
            _enter(".".join(names[:depth]), folder)
        except BaseException as error:
            failures.append(error)
    try:
        return _execute(".".join(names), path)
    except BaseException as error:
        if failures:  # most likely what is at the root of this one
            raise _InPackage(failures[0]) from error
        raise


class _InPackage(Exception):
    """A package of the kernel's file failed before the file did, which is the cause of this."""


def _enter(name: str, folder: Path) -> None:
    if name in sys.modules:
        return
    file = folder / "__init__.py"
    if file.is_file():
        _execute(name, file)
        return
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    _bind(name, importlib.util.module_from_spec(spec))


def _execute(name: str, path: Path) -> ModuleType:
    if name in sys.modules:  # a package imported it
        return sys.modules[name]
    search = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=search)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _bind(name, module)
    spec.loader.exec_module(module)
    return module


def _bind(name: str, module: ModuleType) -> None:
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)


class _Beside:
    """Finds the modules in a folder before others of their names, as for a script there; but for :data:`_KEPT`."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """What importlib asks of a finder."""
        if path is not None or name in _KEPT:
            return None
        return importlib.machinery.PathFinder.find_spec(name, [self.folder], target)


def _is_users(module: ModuleType) -> bool:
    """Whether a module is the user's own: a file, and not of Python's, Triton's or another installed package."""
    places = [getattr(module, "__file__", None), *_search_path(module)]
    where = next((str(place) for place in places if place), None)
    own = str(Path(__file__).resolve().parents[1])
    return bool(where) and not any(Path(str(where)).is_relative_to(folder) for folder in (*_INSTALLED, own))


def _search_path(module: ModuleType) -> list[str]:
    try:
        return list(module.__path__)
    except Exception:
        return []


def _digests(files: Iterable[str]) -> dict[str, str]:
    return {f: hashlib.sha256(Path(f).read_bytes()).hexdigest() if Path(f).is_file() else "" for f in sorted(files)}


def _explained(error: BaseException, path: Path, arch: str) -> str:
    """Why a file cannot be imported, where, and what to do where it asked for a GPU."""
    errors = [error]
    if isinstance(error, _InPackage):
        errors = [error.__cause__ or error, error.args[0]]
    what = f"{path} cannot be imported: " + "; and its package fails: ".join(_told(one, path) for one in errors)
    if any(map(_asks_for_gpu, errors)):
        what += (
            f"; that asks for the GPU at import, and there may be none: do it inside a function, or guard it, as in"
            f" `try: ... except Exception: ...`; what follows from the architecture is answered here, for the target"
            f" {arch}: triton.runtime.driver.active.get_current_target(), torch.cuda.get_device_capability()"
        )
    return what


def _told(error: BaseException, path: Path) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]
    own = [frame.lineno for frame in frames if frame.filename == str(path)]
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else own[-1] if own else None
    where = f" (line {line})" if line else ""
    if not line and frames:
        where = f" (line {frames[-1].lineno} of {frames[-1].filename})"
    return f"{type(error).__name__}: {error}{where}"


def _asks_for_gpu(error: BaseException) -> bool:
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return isinstance(error, NotKnown) or any("/torch/" in file and "cuda" in file for file in files)


def _is_own(filename: str) -> bool:
    own = str(Path(__file__).resolve().parents[1])
    installed = any(Path(filename).is_relative_to(folder) for folder in (*_INSTALLED, own))
    return filename.endswith(".py") and not installed

"""Imports the file of a kernel or of functions, wherever it lies: with what lies beside it, and of its packages."""

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyfmha.errors import KernelSourceError
from pyfmha.spec.packages import package_folders

_Files = dict[str, tuple[int, int]]
# By path: what the file and those beside it that it imports were like, and the module. One is made only where they
# changed, since Triton keeps every kernel it has ever rewritten.
_modules: dict[Path, tuple[_Files, Any]] = {}


def load_module(path: Path) -> Any:
    """The module of a file; the same as before where neither it nor what it imports has changed.

    Raises:
        KernelSourceError: it cannot be imported.
    """
    if path in _modules and all(_state(file) == state for file, state in _modules[path][0].items()):
        return _modules[path][1]
    files = {str(path): _state(str(path))}
    try:
        module = import_file(path, "_interpreted_", files)
    except (KeyboardInterrupt, KernelSourceError):
        raise
    except BaseException as error:  # whatever a kernel file raises, SystemExit included
        raise KernelSourceError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    _modules[path] = files, module
    return module


def import_file(path: Path, prefix: str, files: _Files | None = None) -> Any:
    """Import a file anew: as a script, or as a module of the packages that it lies in or imports from relatively.

    Args:
        path: the file.
        prefix: of the module's name, which is then that of no other.
        files: gets what the file imports of its own, and its state.

    Raises:
        KernelSourceError: it is no Python file.
        BaseException: what the file raises.
    """
    folders = package_folders(path)
    names = [folder.name for folder in folders]
    if folders and not _may_be(names[0], folders[0]):
        names[0] = prefix + names[0]
    name = ".".join([*names, prefix + path.stem])
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise KernelSourceError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    with _importing_beside([path.parent, *(folder.parent for folder in folders[:1])], {} if files is None else files):
        made = [one for depth, folder in enumerate(folders, 1) for one in _entered(".".join(names[:depth]), folder)]
        sys.modules[name] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            for one in made:
                sys.modules.pop(one, None)
    return module


def _may_be(name: str, folder: Path) -> bool:
    """Whether a package can be imported by its name, or another has it."""
    known = sys.modules.get(name)
    return known is None or str(folder) in list(getattr(known, "__path__", ()))


def _entered(name: str, folder: Path) -> Iterator[str]:
    """Import a package; of one that fails, as many do without what they are for, there is its folder, which is told."""
    if name in sys.modules:
        return
    try:
        importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException:  # whatever a package raises
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        sys.modules[name] = importlib.util.module_from_spec(spec)
        yield name


@contextmanager
def _importing_beside(folders: Sequence[Path], files: _Files) -> Iterator[None]:
    """Let a file import what lies in some folders, as a script may, and note that in ``files``.

    What it finds there is its own: the same name may mean another file to the next one.
    """
    before = set(sys.modules)
    places = [str(folder) for folder in folders]
    sys.path[:0] = places
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for place in places:
            with suppress(ValueError):  # the file took it off
                sys.path.remove(place)
        for name in set(sys.modules) - before:
            file, top = getattr(sys.modules[name], "__file__", None), name.partition(".")[0]
            if file and top not in before and any(_is_in(Path(file), folder, top) for folder in folders):
                files[file] = _state(file)
                del sys.modules[name]


def _is_in(file: Path, folder: Path, name: str) -> bool:
    """Whether a file is a module of a folder, or in a package there, of a name."""
    return file == folder / f"{name}.py" or folder / name in file.parents


def _state(file: str) -> tuple[int, int]:
    try:
        stat = os.stat(file)
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size

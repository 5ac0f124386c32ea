"""The packages that a Python file is a module of, told by where it lies and how it imports."""

import ast
from pathlib import Path


def package_folders(path: Path) -> list[Path]:
    """The folders whose packages a file is a module of, outermost first: those with an ``__init__.py``, and as many as
    its relative imports go up."""
    folders: list[Path] = []
    try:
        tree = ast.parse(path.read_bytes())
        levels = max((node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)), default=0)
    except (SyntaxError, ValueError):
        levels = 0
    folder = path.parent
    while folder.name.isidentifier() and ((folder / "__init__.py").is_file() or len(folders) < levels):
        folders.insert(0, folder)
        folder = folder.parent
    return folders

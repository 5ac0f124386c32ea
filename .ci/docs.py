"""The reference of the public API, by pdoc, each room's page with its guide, README.md. `make docs` runs it.

    .venv/bin/python .ci/docs.py build/docs

A docstring that pdoc warns of, or a link that leads nowhere, is an error.
"""

import importlib
import importlib.util
import os
import re
import shutil
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import pdoc
import pdoc.render

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "aot", "attention", "bench", "errors", "functions", "interpreter", "onnx", "operators", "runtime", "spec", "torch",
    "trt", "trtllm",
)  # fmt: skip
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#]*)(?P<anchor>#[^)]*)?\)")


class Absent(type):
    """A name of a package that is not installed: any attribute of it is another, and it can be called and annotate."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") and name != "__get__":  # that of a property
            raise AttributeError(name)
        made = Absent(name, (), {"__module__": f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")})
        setattr(cls, name, made)
        return made

    def __call__(cls, *given: Any, **named: Any) -> Any:
        return cls


class AbsentModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(Absent(self.__name__, (), {"__module__": "builtins"}), name)


def page_of(module: str) -> Path:
    """A module's page, below the folder of the pages."""
    return Path(*module.split(".")).with_suffix(".html")


def guide(readme: Path, out: Path) -> str:
    """A README.md whose links lead from its room's page in ``out``, and whose pictures from its room, for pdoc."""
    module = ".".join(["pyfmha", *readme.parent.relative_to(ROOT).parts[1:]])
    folder = (out / page_of(module)).parent

    def led(link: re.Match[str]) -> str:
        target, anchor = link["target"], link["anchor"] or ""
        if not target or target.startswith("http"):
            return link[0]
        file = (readme.parent / target).resolve()
        if link["picture"]:
            here = os.path.relpath(file, ROOT.joinpath(*module.split(".")))
            return f"![{link['text']}]({here})"
        if file == ROOT / "README.md":
            file = out / page_of("pyfmha")
        elif file.is_relative_to(ROOT / "pyfmha"):
            room = file.parent if file.suffix else file
            if file.name in ("README.md", room.name) and room.name in ROOMS:
                file = out / page_of(f"pyfmha.{room.name}")
        if file.suffix != ".html":
            anchor = ""  # a text, which a browser shows as it is
        return f"[{link['text']}]({os.path.relpath(file, folder)}{anchor})"

    return LINK.sub(led, readme.read_text())


def prepare(out: Path) -> None:
    """Give the modules their guides, and the names that come at first use."""
    if importlib.util.find_spec("torch") is None:
        sys.modules["torch"] = AbsentModule("torch")
    package = importlib.import_module("pyfmha")
    for name in package.__all__:
        setattr(package, name, getattr(package, name))
    package.__all__ = [*package.__all__, *ROOMS]
    for name in ("pyfmha", *(f"pyfmha.{room}" for room in ROOMS)):
        module = importlib.import_module(name)
        if hasattr(module, "__path__") and not hasattr(module, "__all__"):
            module.__all__ = []  # type: ignore[attr-defined]
        readme = (ROOT if name == "pyfmha" else Path(str(module.__file__)).parent) / "README.md"
        if readme.is_file() and hasattr(module, "__path__"):
            module.__doc__ = f"{module.__doc__}\n\n{guide(readme, out)}"


class Links(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value and not value.startswith(("http", "data:")):
                self.links.add(value)


def broken(out: Path) -> list[str]:
    """Every link of the pages that leads nowhere, as "page: link"."""
    pages = {page: Links(page) for page in sorted(out.rglob("*.html"))}
    found = []
    for page, content in pages.items():
        for link in sorted(content.links):
            path, _, anchor = unquote(link).partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and file in pages and anchor not in pages[file].anchors):
                found.append(f"{page.relative_to(out)}: {link}")
    return found


def main(out: Path) -> None:
    """Write the pages into an empty ``out``."""
    shutil.rmtree(out, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(out)
        pdoc.render.configure(docformat="google", show_source=False)
        pdoc.pdoc("pyfmha", output_directory=out)
    if found := broken(out):
        sys.exit("links that lead nowhere:\n" + "\n".join(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

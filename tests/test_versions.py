"""The README's table of versions, and pyproject.toml."""

import re

import pytest
from helpers import TESTS

ROOT = TESTS.parent
UNLISTED = {"bindings", "wheel", "dev", "notebook"}
"""Extras of those who work on the project, and of the notebook."""


def requirement(text: str) -> tuple[str, str]:
    name, versions = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?(.*)", text).groups()
    return name, versions


def test_the_readme_has_the_versions_of_pyproject() -> None:
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {("python", "", project["requires-python"])}
    for extra, lines in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        if extra not in UNLISTED:
            wanted |= {(name, extra, versions) for name, versions in map(requirement, lines) if name != "pyfmha"}

    table = (ROOT / "README.md").read_text().partition("| package | extra | versions |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([\w-]+) \| ([\w-]*) ?\| `(.+?)` \|", table, re.MULTILINE)
    assert set(rows) == wanted
    assert len(rows) == len(wanted)


def test_no_extra_joins_triton_with_what_pins_another() -> None:
    extras = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, lines in extras["optional-dependencies"].items():
        found = {requirement(line.partition("[")[0])[0] for line in lines} | {line for line in lines if "[aot]" in line}
        assert not ({"torch", "tensorrt-llm", "onnx"} & found and {"triton", "pyfmha[aot]"} & found), name


INSTALL = re.compile(r"pip install (?:-q |--quiet |-e |--editable )*['\"]?pyfmha\b")


def test_no_text_names_an_install_that_cannot_work() -> None:
    """No index has pyfmha."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]
    for folder, pattern in (("pyfmha", "*.py"), ("examples", "*.py"), ("examples", "*.md"), ("examples", "*.ipynb")):
        files += (ROOT / folder).rglob(pattern)
    assert [str(file) for file in files if INSTALL.search(file.read_text())] == []

"""The layering that DESIGN promises, read from the source and seen in fresh processes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyfmha

PACKAGE = Path(pyfmha.__file__).parent
ROOT = PACKAGE.parent
HEAVY = {"triton", "torch", "tensorrt", "tensorrt_lean", "tensorrt_dispatch", "tensorrt_rtx", "tensorrt_llm"}


def imports_of(path: Path) -> set[str]:
    """Every module a file imports, at whatever depth of the code, by full name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def files(folder: str) -> list[Path]:
    found = sorted((PACKAGE / folder).glob("**/*.py"))
    assert found, f"no Python files in {folder}"
    return found


FOUNDATIONS = ["spec", "abi", "errors", "grid", "arch", "manifest", "conditions", "descriptors", "signature", "c_names"]
ATTENTION = ["attention", "tiles", "forward", "decode", "hopper", "families"]


@pytest.mark.parametrize("name", FOUNDATIONS + ATTENTION)
def test_foundations_import_the_standard_library_only(name: str) -> None:
    allowed = sys.stdlib_module_names | {"pyfmha"}

    assert top(imports_of(PACKAGE / f"{name}.py")) <= allowed


@pytest.mark.parametrize("name", FOUNDATIONS)
def test_foundations_know_nothing_of_the_layers_above(name: str) -> None:
    used = {module for module in imports_of(PACKAGE / f"{name}.py") if module.startswith("pyfmha.")}

    above = {f"pyfmha.{layer}" for layer in ("aot", "runtime", "trt", *ATTENTION, "cli", "demo", "run")}
    assert not {module for module in used if any(module.startswith(layer) for layer in above)}


@pytest.mark.parametrize("path", files("runtime"), ids=lambda path: path.name)
def test_runtime_needs_neither_compiler_nor_framework(path: Path) -> None:
    used = imports_of(path)

    assert not top(used) & HEAVY
    above = {f"pyfmha.{layer}" for layer in ("aot", "trt", *ATTENTION)}
    assert not {module for module in used if any(module.startswith(layer) for layer in above)}


@pytest.mark.parametrize("path", files("aot"), ids=lambda path: path.name)
def test_aot_knows_neither_attention_nor_tensorrt(path: Path) -> None:
    used = imports_of(path)

    assert not top(used) & (HEAVY - {"triton"})
    above = {f"pyfmha.{layer}" for layer in ("trt", "runtime", *ATTENTION)}
    assert not {module for module in used if any(module.startswith(layer) for layer in above)}


def test_trt_never_imports_aot() -> None:
    for path in sorted((PACKAGE / "trt").glob("**/*.py")):
        used = imports_of(path)
        assert not {module for module in used if module.startswith("pyfmha.aot")}, path
        assert not top(used) & {"triton", "torch"}, path


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_kernels_import_only_triton_and_each_other(path: Path) -> None:
    kernels = {other.stem for other in path.parent.glob("*.py")}

    assert "triton" in top(imports_of(path))
    assert top(imports_of(path)) <= {"triton"} | kernels


def test_importing_pyfmha_has_no_side_effects(tmp_path: Path) -> None:
    code = (
        "import os, sys, logging\n"
        "before = dict(os.environ), list(sys.path), list(logging.getLogger().handlers)\n"
        "import pyfmha, pyfmha.runtime\n"
        "assert (dict(os.environ), list(sys.path), list(logging.getLogger().handlers)) == before\n"
        f"heavy = {sorted(HEAVY | {'cuda', 'rich', 'typer', 'jinja2'})!r}\n"
        "assert not [name for name in heavy if name in sys.modules], sys.modules.keys()\n"
        "print('clean')\n"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.stdout == "clean\n", done.stderr
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_every_public_name_exists() -> None:
    import pyfmha.aot
    import pyfmha.runtime

    for module in (pyfmha, pyfmha.aot, pyfmha.runtime):
        missing = [name for name in module.__all__ if not hasattr(module, name)]
        assert not missing, module.__name__
        assert list(module.__all__) == sorted(module.__all__), module.__name__


def test_modules_stay_small() -> None:
    """About 300 lines; twice that would be a module that wants splitting."""
    long = {str(path): count for path in PACKAGE.glob("**/*.py") if (count := len(path.read_text().splitlines())) > 400}

    assert long == {}


def test_the_top_level_is_the_one_the_user_fixed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    if listed == [""]:
        pytest.skip("not a git checkout")
    names = {name.partition("/")[0] for name in listed if name and not name.startswith(".")}

    fixed = {"pyproject.toml", "pyfmha", "kernels", "aot_out", "examples", "tests"}
    assert names == fixed | {"README.md", "LICENSE", "CHANGELOG.md", "Makefile"}

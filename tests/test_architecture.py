"""The layering that DESIGN promises, read from the source and seen in fresh processes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyfmha

PACKAGE = Path(pyfmha.__file__).parent
ROOT = PACKAGE.parent
TENSORRT = {"tensorrt", "tensorrt_lean", "tensorrt_dispatch", "tensorrt_rtx", "tensorrt_llm"}
HEAVY = {"triton", "torch", *TENSORRT}


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


# The rooms, each above those it may import from, with what of outside the standard library it may import at any depth.
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "bfloat16": (set(), {"numpy"}),
    "e4m3": (set(), {"numpy"}),
    "spec": ({"errors"}, set()),
    "operators": ({"errors", "spec"}, set()),
    "interpreter": ({"bfloat16", "errors", "operators", "spec"}, {"numpy", "triton"}),
    "runtime": ({"errors", "operators", "spec"}, {"numpy", "cuda"}),
    "attention": ({"bfloat16", "e4m3", "errors", "interpreter", "operators", "runtime", "spec"}, {"numpy"}),
    "functions": ({"attention", "bfloat16", "errors", "interpreter", "operators", "spec"}, {"numpy", "triton"}),
    "aot": ({"errors", "operators", "spec"}, {"jinja2", "triton"}),
    "report": ({"spec"}, {"rich"}),
    "trt": (
        {"attention", "bfloat16", "errors", "functions", "interpreter", "operators", "runtime", "spec"},
        {"numpy", "cuda", "typing_extensions", *TENSORRT},
    ),  # typing_extensions for type checkers only
    "trtllm": ({"trt"}, set()),
    "onnx": (
        {"attention", "bfloat16", "errors", "operators", "runtime", "spec", "trt"},
        {"google", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript"},
    ),
    "torch": (
        {"attention", "errors", "functions", "operators", "runtime", "trt"},
        {"torch", "torch_tensorrt", "transformers", "typing_extensions"},
    ),
    "verify": (
        {"attention", "bfloat16", "errors", "functions", "interpreter", "operators"}
        | {"report", "runtime", "spec", "trt"},
        {"numpy", "cuda", "rich"},
    ),
    "bench": (
        {"attention", "bfloat16", "errors", "report", "runtime", "spec", "trt"},
        {"numpy", "cuda", "rich", "torch", "triton", "matplotlib"},
    ),
    "cli": (
        {
            "aot",
            "attention",
            "bench",
            "errors",
            "functions",
            "onnx",
            "operators",
            "report",
            "runtime",
            "spec",
            "trt",
            "verify",
        },
        {"click", "numpy", "rich", "typer", "triton"},
    ),
    "__init__": ({"attention", "errors", "functions", "interpreter", "operators", "runtime", "spec", "trt"}, set()),
    "__main__": ({"cli"}, set()),
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_file_is_in_a_room_and_no_room_is_empty() -> None:
    assert {room_of(path) for path in PACKAGE.glob("**/*.py")} == set(ROOMS)


def test_rooms_lie_above_each_other() -> None:
    """Each room's line names rooms of earlier lines only, so that no arrow runs up and there is no circle."""
    below: set[str] = set()
    for room, (rooms, _) in ROOMS.items():
        assert rooms <= below, room
        below.add(room)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("**/*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_from_below_only(path: Path) -> None:
    room = room_of(path)
    rooms, packages = ROOMS[room]
    used = imports_of(path)

    inside = {name.split(".")[1] for name in used if name.startswith("pyfmha.")}
    # `from pyfmha import Library` names no room: what the package offers by its own name.
    inside -= set(pyfmha.__all__) | {"__version__"}
    assert inside <= rooms | {room}
    assert top(used) <= sys.stdlib_module_names | {"pyfmha"} | packages


def test_the_families_of_attention_need_the_standard_library_only() -> None:
    for name in ("first", "tiles", "forward", "decode", "hopper", "hopper_settings", "biased", "families", "operator"):
        assert top(imports_of(PACKAGE / "attention" / f"{name}.py")) <= sys.stdlib_module_names | {"pyfmha"}, name


WORDS_OF_ATTENTION = {
    *("attention", "flash", "fmha", "softmax", "softcap", "causal", "lse", "qkv", "kv", "bhsd", "bshd"),
    *("head", "heads", "query", "queries", "keys", "seq", "seqlen", "seqlens", "tokens"),
    *("decode", "decoded", "decoding", "decodes"),
}
# The default operator of `register`, a bytes object's method, and what is no head of attention: bytes of a launch.
NO_WORDS_OF_ATTENTION = (
    *(
        "from pyfmha.attention.operator import OPERATOR",
        "attention by default",
        '.decode(errors="replace")',
        ".decode()",
    ),
    "made.head for _, made",
)


TEMPLATES = PACKAGE / "aot" / "templates"
OF_ANY_OPERATOR = (
    *(
        path
        for path in sorted((PACKAGE / "trt").rglob("*"))
        if "attention" not in path.relative_to(PACKAGE / "trt").parts
    ),
    *sorted((PACKAGE / "operators").rglob("*")),
    *(TEMPLATES / name for name in ("pyfmha_plugin.c", "pyfmha_operator.c", "pyfmha_operator.h", "pyfmha_tensorrt.h")),
    *(
        TEMPLATES / "operators.c.j2",
        *sorted((PACKAGE / "aot").glob("*operator*.py")),
        PACKAGE / "aot" / "c_expressions.py",
    ),
)
"""What serves attention as it serves any operator. But guides may speak of it, and ``trt`` hands its names on."""
SPEAKING = {"README.md", "__init__.py"}


def words_of_attention(text: str) -> set[str]:
    for allowed in NO_WORDS_OF_ATTENTION:
        text = text.replace(allowed, "")
    # Names fall into words at underscores and at capitals in their midst.
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)} & WORDS_OF_ATTENTION


@pytest.mark.parametrize(
    "path",
    [path for path in OF_ANY_OPERATOR if path.is_file() and path.suffix != ".pyc" and path.name not in SPEAKING],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_plugins_know_nothing_of_attention(path: Path) -> None:
    """What attention is stands in its description and in the folder ``trt/attention``; all else serves any operator."""
    assert words_of_attention(path.read_text()) == set()


def test_every_file_of_the_plugins_is_looked_at() -> None:
    """Those left out hand names on, or are guides; and a folder that is added is looked at, too."""
    looked = {path.relative_to(PACKAGE) for path in OF_ANY_OPERATOR if path.name not in SPEAKING}
    for room in ("trt", "operators"):
        there = {path.relative_to(PACKAGE) for path in (PACKAGE / room).rglob("*.py") if path.name not in SPEAKING}
        assert {path for path in there - looked if path.parts[:2] != ("trt", "attention")} == set()
    for room in ("trt", "operators"):
        tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
        doc, *statements = tree.body
        assert isinstance(doc, ast.Expr)
        assert all(isinstance(one, ast.ImportFrom | ast.Assign) for one in statements), room


@pytest.mark.parametrize(
    "planted",
    [
        "num_heads = 4",
        "# causal",
        "SoftmaxScale",
        "int32_t kv_length;",
        "layer.head",
        'f"{Sq} queries"',
        "fmha_fwd_d64",
    ],
)
def test_a_word_of_attention_would_be_found(planted: str) -> None:
    text = (PACKAGE / "trt" / "plugin.py").read_text()
    assert words_of_attention(f"{text}\n{planted}\n") != set()


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_kernels_import_only_triton_and_each_other(path: Path) -> None:
    kernels = {other.stem for other in path.parent.glob("*.py")}

    assert "triton" in top(imports_of(path))
    assert top(imports_of(path)) <= {"triton", "typing"} | kernels


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
    assert names == fixed | {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile"}

"""What a type checker makes of calls from outside: mypy in strict mode, as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pyfmha

ROOT = Path(pyfmha.__file__).parents[1]

SNIPPET = """
from typing import Any

import pyfmha

network: Any
q: Any

out = pyfmha.add_attention(network, q, q, q, causal="bottom-right", align="bottom-right", layout="bshd")
out, lse = pyfmha.add_attention(network, q, q, q, causal=True, return_lse=True)
packed, lse = pyfmha.add_attention_packed(network, q, 8, causal=False, window=(3, -1), return_lse=True)
config = pyfmha.EngineConfig(8, 64, 1, 512, "float16", causal=False, layout="packed")
session = pyfmha.DirectSession(num_heads=8, head_size=64, causal=True, dtype="bf16")
reveal_type(pyfmha.add_attention(network, q, q, q, causal=True, return_lse=True))
pyfmha.add_attention(network, q, q, q, causal="botom-right")  # wrong
pyfmha.add_attention(network, q, q, q)  # wrong
pyfmha.add_attention(network, q, q, q, causal=True, align="left")  # wrong
pyfmha.add_attention(network, q, q, q, causal=True, layout="packed")  # wrong
pyfmha.add_attention(network, q, q, q, causal=True, window=3)  # wrong
pyfmha.add_attention_packed(network, q, 8, causal=True, layout="bshd")  # wrong
pyfmha.EngineConfig(8, 64, 1, 512, "fp8", causal=True)  # wrong
pyfmha.EngineConfig(8, 64, 1, 512, causal="botom-right")  # wrong
pyfmha.DirectSession(num_heads=8, head_size=64, causal=True, dtype="half")  # wrong
"""


def test_mypy_refuses_wrong_words(tmp_path: Path) -> None:
    file = tmp_path / "snippet.py"
    file.write_text(SNIPPET)
    settings = ["--strict", "--no-error-summary", "--cache-dir", str(ROOT / ".mypy_cache")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *settings, "--config-file", str(ROOT / "pyproject.toml"), str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    errors = {int(number) for number in re.findall(rf"{file.name}:(\d+): error: ", done.stdout)}
    wrong = {number for number, line in enumerate(SNIPPET.splitlines(), start=1) if line.endswith("# wrong")}
    assert errors == wrong, done.stdout + done.stderr
    assert 'Revealed type is "tuple[Any, Any]"' in done.stdout

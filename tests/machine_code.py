"""Machine code of sm_90 for the audits: compiled when it is looked at, as text, and its instructions."""

import re
import subprocess
from collections import Counter
from pathlib import Path

from shared import Shared

from pyfmha.aot.cubin import Compiler, Cubin
from pyfmha.spec.arch import parse_arch
from pyfmha.spec.kernel import KernelSpec

REGISTERS_OF_SM = 65536
SHARED_OF_SM = 233472  # 228 KiB, of which each block's runtime takes 1 KiB more


class Compiled(dict[str, Cubin]):
    """Kernels by name, compiled when they are looked at."""

    def __init__(self, specs: dict[str, KernelSpec], compiler: Compiler, shared: Shared) -> None:
        self._specs, self._compiler, self._shared = specs, compiler, shared

    def __missing__(self, name: str) -> Cubin:
        self[name] = self._shared.compile(self._compiler, self._specs[name], parse_arch("sm_90"))
        return self[name]


def disassembled(cubin: Cubin, folder: Path) -> str:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
    path = folder / "code.cubin"
    path.write_bytes(cubin.code)
    return subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout


def opcodes(listing: str) -> Counter[str]:
    return Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", listing, re.MULTILINE))


def fits(cubin: Cubin, blocks: int) -> bool:
    """Whether so many blocks have room on a multiprocessor."""
    registers = -(-cubin.registers // 8) * 8 * cubin.threads  # handed out in eights a thread
    return blocks * registers <= REGISTERS_OF_SM and blocks * (cubin.shared + 1024) <= SHARED_OF_SM


def steps_of(listing: str) -> list[str]:
    """The instructions, one a line, of each loop over keys: from a jump's target to the jump, which depends on a
    predicate, with products and no other such loop in it."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    loops = []
    for text in listing.splitlines():
        if found := re.match(r"(\.L_\w+):", text.strip()):
            labels[found[1]] = len(lines)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?) *;", text):
            lines.append(found[1])
            jump = re.match(r"@!?U?P\w+ BRA\b.*`\((\.L_\w+)\)", found[1])
            if jump and jump[1] in labels and any("QGMMA" in line for line in lines[labels[jump[1]] :]):
                loops.append((labels[jump[1]], len(lines)))
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    bare = [re.sub(r"^@!?U?P\w+\s+", "", line) for line in lines]
    return ["\n".join(bare[a:b]) for a, b in inner]

"""Draws the flow of the project: ``python examples/maintainers/draw_flow.py``, which writes ``examples/flow.svg``."""

from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

PICTURE = Path(__file__).parents[1] / "flow.svg"
WIDTH, HEIGHT = 960, 330
BOX = 64
BUILD, RUN, INK = "#eaf2fb", "#eef7ea", "#24292f"

Box = tuple[int, int, int, str, str]
"""Left, top and width; a title and what stands below it."""

BUILDING: list[Box] = [
    (20, 50, 190, "kernels/*.py", "Triton and Gluon"),
    (260, 50, 190, "machine code", "of each sm_XX; checked"),
    (500, 50, 190, "readable C", "carries it; no exit()"),
    (740, 50, 200, "libpyfmha.so", "one file, many sm_XX"),
]
RUNNING: list[Box] = [
    (20, 240, 190, "your program", "Python (ctypes) or C"),
    (260, 240, 190, "plugin in Python", "a TensorRT network"),
    (500, 240, 190, "plugin in C", "engine, trtexec, ONNX"),
    (740, 240, 200, "torch.ops.pyfmha", "PyTorch, export to ONNX"),
]


def text(x: float, y: float, words: str, size: int, weight: str = "normal", anchor: str = "middle") -> str:
    font = 'font-family="Helvetica, Arial, DejaVu Sans, sans-serif"'
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{INK}"'
    return f'<text x="{x:g}" y="{y:g}" {font} {style}>{escape(words)}</text>'


def box(left: int, top: int, width: int, title: str, below: str) -> list[str]:
    middle = left + width / 2
    shape = f'x="{left}" y="{top}" width="{width}" height="{BOX}" rx="8"'
    return [
        f'<rect {shape} fill="white" stroke="{INK}"/>',
        text(middle, top + 28, title, 16, "bold"),
        text(middle, top + 49, below, 13),
    ]


def arrow(*points: tuple[float, float]) -> str:
    line = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{line}" fill="none" stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>'


def band(top: int, height: int, colour: str, words: str) -> list[str]:
    return [
        f'<rect x="0" y="{top}" width="{WIDTH}" height="{height}" fill="{colour}"/>',
        text(20, top + 24, words, 14, anchor="start"),
    ]


def picture() -> str:
    """The SVG."""
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        f'<defs>{head}<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>',
        *band(0, 135, BUILD, "Ahead of time, on any Linux machine, without a GPU: Triton and a C compiler"),
        *band(135, HEIGHT - 135, RUN, "At run time: the library and the NVIDIA driver; no Triton, no compiler"),
    ]
    for one in (*BUILDING, *RUNNING):
        parts += box(*one)
    for (left, top, width, *_), (following, *_) in pairwise(BUILDING):
        parts.append(arrow((left + width, top + BOX / 2), (following, top + BOX / 2)))
    left, top, width, *_ = BUILDING[-1]
    start, turn = left + width / 2, 205
    parts += [arrow((start, top + BOX), (start, turn), (x + w / 2, turn), (x + w / 2, y)) for x, y, w, *_ in RUNNING]
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture())
    print(PICTURE)

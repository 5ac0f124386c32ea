"""Tensor descriptors in the compiler process: a kernel's descriptor types, and what Triton made of them.

Imported by :mod:`pyfmha.aot.worker` only; it needs Triton.
"""

import re
from typing import Any

# CUtensorMapDataType of cuda.h, by the number that Triton has on the device; as TMA_DTYPE_DEVICE_TO_HOST
# in triton/backends/nvidia/driver.py of 3.9.
_HOST_TYPES = {**{number: number for number in range(8)}, 8: 10, 9: 8, 10: 9}

_GLUON_TYPES = {
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "fp8e5": "float8e5",
    "fp8e4nv": "float8e4nv",
    **{f"{sign}{bits}": f"{word}{bits}" for sign, word in (("i", "int"), ("u", "uint")) for bits in (8, 16, 32)},
}


class UnsupportedDescriptor(Exception):
    """What Triton made of a descriptor cannot be launched."""


def descriptor_type(element: str, block: list[int], gluon: bool) -> str:
    """A descriptor's type in a signature: plain, or for Gluon with the layout of its boxes in shared memory."""
    text = f"{element}[{', '.join(map(str, block))}]"
    if not gluon:
        return f"tensordesc<{text}>"
    from triton.experimental.gluon import language as gl

    layout = gl.NVMMASharedLayout.get_default_for(block, getattr(gl, _GLUON_TYPES[element]))
    return f"tensordesc<{text},{layout!r}>"


def described_tensors(metadata: Any, wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the launcher must know of each descriptor to make it: swizzle, data type, and box.

    Raises:
        UnsupportedDescriptor: Triton made something else of them.
    """
    found = getattr(metadata, "tensordesc_meta", None) or []
    if len(found) != len(wanted):
        raise UnsupportedDescriptor(f"Triton describes {len(found)} tensor descriptors, the spec has {len(wanted)}")
    tensors = []
    for meta, asked in zip(found, wanted, strict=True):
        name, box = asked["name"], list(meta["block_size"])
        if meta.get("fp4_padded") or meta.get("is_im2col"):
            raise UnsupportedDescriptor(f"descriptor {name} is of a kind (im2col, fp4) that is not served")
        if meta["elem_size"] != asked["item_size"] or len(box) != len(asked["block"]):
            raise UnsupportedDescriptor(f"descriptor {name} was compiled as {meta}, not as {asked}")
        if any(not 1 <= size <= 256 for size in box):
            raise UnsupportedDescriptor(f"descriptor {name} has the box {box}; TMA moves 1 to 256 a dimension")
        if asked["parts"] != 1:  # in memory these lie as copies of one each do
            box[-2] *= asked["parts"]
        tensors.append({"swizzle": meta["swizzle"], "data_type": _HOST_TYPES[meta["elem_type"]], "box": box})
    return tensors


def parameter_count(ptx: str, wanted: list[dict[str, Any]]) -> int:
    """How many parameters the kernel takes, of which the first are those of its descriptors.

    Of each: the map, by value in 128 bytes; a 32-bit size and then a 64-bit stride for each dimension.

    Raises:
        UnsupportedDescriptor: they are others.
    """
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    found = [line for line in (entry.group(1).split(",") if entry else []) if ".param" in line]
    forms = [form for one in wanted for form in (r"\[128\]", *[r"\.u32 "] * one["rank"], *[r"\.u64 "] * one["rank"])]
    if any(not re.search(form, line) for form, line in zip(forms, found, strict=False)) or len(forms) > len(found):
        raise UnsupportedDescriptor("the kernel takes its tensor descriptors in a way that is not known")
    return len(found)

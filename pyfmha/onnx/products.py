"""Matrix products, whatever operator they are written in."""

from dataclasses import dataclass

import onnx_ir as ir

from pyfmha.onnx.facts import Facts
from pyfmha.onnx.tensors import STANDARD, attribute

PRODUCTS = ("MatMul", "Einsum", "FusedMatMul")


@dataclass(frozen=True)
class Product:
    """A matrix product.

    Attributes:
        left, right: its operands.
        left_axes, right_axes: their axes by letters; those of one letter in both are the same.
        out_axes: of the result.
        factor, result: of the result, and the result.
    """

    left: ir.Value
    right: ir.Value
    left_axes: str
    right_axes: str
    out_axes: str
    factor: float = 1.0
    result: ir.Value | None = None


def product_of(node: ir.Node | None, facts: Facts) -> Product | None:
    """A product of two tensors of three or four axes; their first axes are the same."""
    if node is None or node.op_type not in PRODUCTS or len(node.inputs) != 2:
        return None
    if node.domain not in (*STANDARD, "com.microsoft"):
        return None
    left, right = node.inputs
    if left is None or right is None:
        return None
    if node.op_type == "Einsum":
        inputs, _, out = attribute(node, "equation", "").replace(" ", "").partition("->")
        a, _, b = inputs.partition(",")
        fits = all(part.isalpha() and len(set(part)) == len(part) for part in (a, b, out))
        return Product(left, right, a, b, out, result=node.outputs[0]) if fits else None
    shapes = facts.shape(left), facts.shape(right)
    if shapes[0] is None or shapes[1] is None or len(shapes[0]) != len(shapes[1]) or len(shapes[0]) not in (3, 4):
        return None
    outer = "bh"[: len(shapes[0]) - 2]
    swapped = [attribute(node, name, 0) for name in ("transA", "transB")]
    if any(attribute(node, name, 0) for name in ("transBatchA", "transBatchB")):
        return None
    a, b = (pair[::-1] if swap else pair for pair, swap in zip(("mk", "kn"), swapped, strict=True))
    return Product(left, right, outer + a, outer + b, f"{outer}mn", attribute(node, "alpha", 1.0), node.outputs[0])

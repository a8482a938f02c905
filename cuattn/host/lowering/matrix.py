"""Tensor-core instructions and the matrix moves that feed them."""

from __future__ import annotations

from ..ptx_types import Instruction, Operand, Row, Source, Vector
from .context import Context
from .memory import SPACES, address
from .rules import destination, rule, source

TRANSPOSED = 4096

# (shape, types of D, A, B, C) → handler
_MMA = {
    ("m16n8k16", "f32", "f16", "f16", "f32"): "mma_k16_f16",
    ("m16n8k8", "f32", "f16", "f16", "f32"): "mma_k8_f16",
    ("m16n8k16", "f32", "bf16", "bf16", "f32"): "mma_k16_bf16",
    ("m16n8k8", "f32", "bf16", "bf16", "f32"): "mma_k8_bf16",
    ("m16n8k16", "f16", "f16", "f16", "f16"): "mma_k16_f16_f16",
    ("m16n8k8", "f16", "f16", "f16", "f16"): "mma_k8_f16_f16",
    ("m16n8k8", "f32", "tf32", "tf32", "f32"): "mma_k8_tf32",
    ("m16n8k4", "f32", "tf32", "tf32", "f32"): "mma_k4_tf32",
    ("m8n8k4", "f64", "f64", "f64", "f64"): "mma_f64",
}


def _items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


@rule("mma")
def lower_mma(ins: Instruction, context: Context) -> Row | None:
    parts = ins.parts
    if len(parts) != 10:
        return None
    if parts[1:3] != ("sync", "aligned") or parts[4:6] != ("row", "col"):
        return None
    handler = _MMA.get((parts[3], *parts[6:10]))  # type: ignore[arg-type]
    if handler is None:
        return None
    d, a, b, c = (_items(x) for x in ins.operands)
    type_name = "f64" if handler == "mma_f64" else "b32"
    srcs: list[Source] = [source(x, type_name) for x in (*a, *b, *c)]
    return Row(handler, [destination(x) for x in d], srcs)


@rule("ldmatrix")
def lower_ldmatrix(ins: Instruction, context: Context) -> Row | None:
    shape = _matrix_shape(ins)
    if shape is None:
        return None
    count, flags, space = shape
    dsts = [destination(x) for x in _items(ins.operands[0])]
    slot, offset, wide = address(ins.operands[1], context, space)
    return Row("ldmatrix", dsts, [slot, offset], flags=flags | wide) if len(dsts) == count else None


@rule("stmatrix")
def lower_stmatrix(ins: Instruction, context: Context) -> Row | None:
    shape = _matrix_shape(ins)
    if shape is None:
        return None
    count, flags, space = shape
    srcs = [source(x, "b32") for x in _items(ins.operands[1])]
    slot, offset, wide = address(ins.operands[0], context, space)
    return Row("stmatrix", srcs=[slot, offset, *srcs], flags=flags | wide) if len(srcs) == count else None


def _matrix_shape(ins: Instruction) -> tuple[int, int, int] | None:
    parts = [p for p in ins.parts[1:] if p not in ("sync", "aligned")]
    if len(parts) < 3 or parts[0] != "m8n8" or parts[1] not in ("x1", "x2", "x4") or parts[-1] != "b16":
        return None
    count, space, flags = int(parts[1][1:]), 0, 0
    for part in parts[2:-1]:
        if part == "trans":
            flags |= TRANSPOSED
        elif part in ("shared", "shared::cta"):
            space = SPACES["shared"]
        else:
            return None
    return count, flags | count << 8 | space, space

"""What instructions compute that touch nothing but their own lane's registers."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from tests.kernels.ptx.memory import KernelError
from tests.kernels.ptx.parse import Instruction, Operand

__all__ = ["ARITHMETIC", "DTYPES", "Read", "from_bytes", "round_to_tf32", "to_bytes"]

DTYPES: dict[str, Any] = {
    **{
        f"{kind}{bits}": np.dtype(f"{code}{bits // 8}") for kind, code in ("bu", "uu", "si") for bits in (8, 16, 32, 64)
    },
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "pred": np.dtype(bool),
}
"""How the lanes of a register are held, by what an instruction takes it for."""

Read: TypeAlias = Callable[[Operand, str], np.ndarray]
"""An operand's lanes as a type; a number has no lanes."""


def to_bytes(lanes: np.ndarray) -> np.ndarray:
    """Values [lanes] as bytes [lanes, n]."""
    return np.ascontiguousarray(lanes)[:, None].view(np.uint8)


def from_bytes(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Bytes [lanes, n] as values [lanes, n / size], any of which may be a column."""
    return np.ascontiguousarray(values).view(dtype)


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """FP32 with 10 bits of mantissa, ties away from zero."""
    bits = np.asarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(values), bits, rounded).view(np.float32)


def _packed(name: str) -> tuple[Any, str]:
    """The dtype of either half of `f16x2`, and the register that holds both."""
    part = DTYPES[name.removesuffix("x2")]
    return part, f"b{16 * part.itemsize}"


def _floats(instruction: Instruction, read: Read, formula: Callable[..., Any]) -> np.ndarray:
    """A formula of floats of any kind, rounded once."""
    kind = instruction.modifiers[-1]
    sources = instruction.operands[1:]
    if kind.endswith("x2"):
        part, register = _packed(kind)
        whole = [np.atleast_1d(read(one, register)) for one in sources]
        halves = [np.ascontiguousarray(one)[:, None].view(part).astype(np.float64) for one in whole]
        return formula(*halves).astype(np.float32).astype(part).view(DTYPES[register])[:, 0]
    if instruction.opcode == "fma":
        # In FP64 the product of two of FP32 is exact.
        return formula(*(read(one, kind).astype(np.float64) for one in sources)).astype(DTYPES[kind])
    return formula(*(read(one, kind) for one in sources))


def _is_float(instruction: Instruction) -> bool:
    return instruction.modifiers[-1].removesuffix("x2") in ("f16", "f32", "bf16")


def _two(on_integers: Callable[..., Any], on_floats: Callable[..., Any]) -> Callable[[Instruction, Read], np.ndarray]:
    def compute(instruction: Instruction, read: Read) -> np.ndarray:
        if _is_float(instruction):
            return _floats(instruction, read, on_floats)
        kind = instruction.modifiers[-1]
        return on_integers(*(read(one, kind) for one in instruction.operands[1:]))

    return compute


def _wide(kind: str) -> str:
    return f"{kind[0]}{2 * int(kind[1:])}"


def _multiply(instruction: Instruction, read: Read) -> np.ndarray:
    """`mul`, and what `mad` adds to."""
    if _is_float(instruction):
        return _floats(instruction, read, lambda a, b: a * b)
    mode, kind = instruction.modifiers
    a, b = (read(one, kind) for one in instruction.operands[1:3])
    if mode == "lo":
        return a * b
    product = a.astype(DTYPES[_wide(kind)]) * b.astype(DTYPES[_wide(kind)])
    return product if mode == "wide" else (product >> DTYPES[kind].itemsize * 8).astype(DTYPES[kind])


def _multiply_add(instruction: Instruction, read: Read) -> np.ndarray:
    mode, kind = instruction.modifiers
    return _multiply(instruction, read) + read(instruction.operands[3], _wide(kind) if mode == "wide" else kind)


def _divide(instruction: Instruction, read: Read) -> np.ndarray:
    if _is_float(instruction):
        return _floats(instruction, read, lambda a, b: a / b)
    a, b = (read(one, instruction.modifiers[-1]).astype(np.int64) for one in instruction.operands[1:])
    # What lanes that are switched off hold may be zero.
    quotient = np.abs(a) // np.maximum(np.abs(b), 1)
    return (np.sign(a) * np.sign(b) * quotient).astype(DTYPES[instruction.modifiers[-1]])


def _shift(instruction: Instruction, read: Read) -> np.ndarray:
    kind = instruction.modifiers[-1]
    bits = DTYPES[kind].itemsize * 8
    value, by = read(instruction.operands[1], kind), read(instruction.operands[2], "u32")
    inside = np.minimum(by, bits - 1).astype(value.dtype)
    if instruction.opcode == "shl":
        return np.where(by < bits, value << inside, 0).astype(value.dtype)
    return np.where(by < bits, value >> inside, value >> inside if kind[0] == "s" else 0).astype(value.dtype)


def _extract_bits(instruction: Instruction, read: Read) -> np.ndarray:
    kind = instruction.modifiers[-1]
    value, start, length = (read(one, "u32").astype(np.int64) for one in instruction.operands[1:])
    field = (value >> start) & ((1 << length) - 1)
    if kind[0] == "s":
        field = np.where((field >> (length - 1)) & 1, field - (1 << length), field)
    return field.astype(DTYPES[kind])


_COMPARISONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _compare(instruction: Instruction, read: Read) -> np.ndarray:
    how, kind = instruction.modifiers
    a, b = (read(one, kind) for one in instruction.operands[1:])
    if kind[0] != "f":
        return _COMPARISONS[how](a, b)
    either_nan = np.isnan(a) | np.isnan(b)
    if how in ("num", "nan"):
        return either_nan if how == "nan" else ~either_nan
    if how.endswith("u"):
        return _COMPARISONS[how[:-1]](a, b) | either_nan
    return _COMPARISONS[how](a, b) & ~either_nan


def _select(instruction: Instruction, read: Read) -> np.ndarray:
    kind = instruction.modifiers[-1]
    a, b, condition = instruction.operands[1:]
    return np.where(read(condition, "pred"), read(a, kind), read(b, kind))


def _convert(instruction: Instruction, read: Read) -> np.ndarray:
    *_, target, source = instruction.modifiers
    value = read(instruction.operands[1], source)
    if target == "tf32":
        assert "rna" in instruction.modifiers, instruction.text
        return round_to_tf32(value)
    if _is_float(instruction) == (target in ("f16", "f32", "bf16")):
        return value.astype(DTYPES[target])
    if "rn" in instruction.modifiers and not _is_float(instruction):
        # To the nearest, as numpy does.
        return value.astype(DTYPES[target])
    raise KernelError(f"unknown: {instruction.text}")


def _move(instruction: Instruction, read: Read) -> np.ndarray:
    (kind,) = instruction.modifiers
    source = instruction.operands[1]
    if isinstance(source, tuple):
        part = f"b{int(kind[1:]) // len(source)}"
        lanes = np.broadcast_arrays(*(np.atleast_1d(read(one, part)) for one in source))
        return from_bytes(np.concatenate([to_bytes(one) for one in lanes], axis=1), DTYPES[kind])[:, 0]
    return read(source, kind)


def _count_bits(instruction: Instruction, read: Read) -> np.ndarray:
    return np.unpackbits(to_bytes(read(instruction.operands[1], "b32")), axis=1).sum(1, dtype=np.uint32)


def _unary(formula: Callable[[Any], Any]) -> Callable[[Instruction, Read], np.ndarray]:
    return lambda instruction, read: formula(read(instruction.operands[1], instruction.modifiers[-1]))


ARITHMETIC: Mapping[str, Callable[[Instruction, Read], np.ndarray]] = {
    "add": _two(np.add, np.add),
    "sub": _two(np.subtract, np.subtract),
    # A float's maximum is the number where the other is none.
    "max": _two(np.maximum, np.fmax),
    "min": _two(np.minimum, np.fmin),
    "and": _two(np.bitwise_and, np.bitwise_and),
    "or": _two(np.bitwise_or, np.bitwise_or),
    "xor": _two(np.bitwise_xor, np.bitwise_xor),
    "fma": lambda instruction, read: _floats(instruction, read, lambda a, b, c: a * b + c),
    "mul": _multiply,
    "mad": _multiply_add,
    "div": _divide,
    "shl": _shift,
    "shr": _shift,
    "bfe": _extract_bits,
    "setp": _compare,
    "selp": _select,
    "cvt": _convert,
    "mov": _move,
    "not": _unary(np.invert),
    "neg": _unary(np.negative),
    "abs": _unary(np.abs),
    "popc": _count_bits,
    "ex2": _unary(np.exp2),
    "sqrt": _unary(np.sqrt),
}

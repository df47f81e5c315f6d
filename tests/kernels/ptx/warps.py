"""What the 32 threads of a warp do together: exchange, reduce, move and multiply matrices."""

from collections.abc import Callable

import numpy as np

from tests.kernels.ptx.arithmetic import DTYPES, to_bytes
from tests.kernels.ptx.machine import WARP, Machine, Operation
from tests.kernels.ptx.memory import KernelError
from tests.kernels.ptx.parse import Address, Instruction, Operand

__all__ = ["WARPS"]

_LANE = np.arange(WARP)
_ROW, _PAIR = _LANE // 4, 2 * (_LANE % 4)
"""Of an 8 x 8 matrix of 16 bits, a thread holds two columns of one row."""


def _registers(operand: Operand) -> tuple[str, ...]:
    assert isinstance(operand, tuple)
    return operand


def _write(machine: Machine, register: str, warps: np.ndarray, values: np.ndarray) -> None:
    """Put values [warps, 32] into a register of these lanes."""
    lanes = np.zeros(machine.num_lanes, bool)
    lanes[warps] = True
    value = np.zeros(machine.num_lanes, values.dtype)
    value[warps] = values
    machine.write(register, value, None if lanes.all() else lanes)


def _shuffle(machine: Machine, instruction: Instruction, warps: np.ndarray) -> None:
    _, how, kind = instruction.modifiers
    target, source, by, clamp, members = instruction.operands
    if (by, clamp, members) != (by, "0" if how == "up" else "31", "-1"):
        raise KernelError("unknown")
    offset = machine.read(by, "s32")
    if offset.ndim:
        offset = offset[warps]
    match how:
        case "bfly":
            lane = _LANE ^ offset
        case "up":
            lane = np.where(offset <= _LANE, _LANE - offset, _LANE)
        case "idx":
            lane = _LANE * 0 + offset
        case _:
            raise KernelError("unknown")
    values = machine.read_lanes(source, kind)[warps]
    assert isinstance(target, str)
    _write(machine, target, warps, np.take_along_axis(values, np.broadcast_to(lane, values.shape), axis=1))


def _reduce(machine: Machine, instruction: Instruction, warps: np.ndarray) -> None:
    _, how, kind = instruction.modifiers
    target, source, members = instruction.operands
    # Of the lanes that are here: those of other blocks may not have come to it yet.
    if (machine.read_lanes(members, "s32")[warps] != -1).any():
        raise KernelError("unknown")
    formula = {"add": np.add, "max": np.maximum, "min": np.minimum}[how]
    values = machine.read_lanes(source, kind)[warps]
    reduced = formula.reduce(values, axis=1, dtype=values.dtype)
    assert isinstance(target, str)
    _write(machine, target, warps, np.repeat(reduced[:, None], WARP, axis=1))


def _matrix_rows(machine: Machine, operand: Operand, number: int, warps: np.ndarray) -> np.ndarray:
    """Where each thread's four bytes of a matrix lie, [warps, 32]: threads 8n to 8n + 7 say where the rows of n do."""
    assert isinstance(operand, Address)
    addresses = machine.read_lanes(operand.base, "u32")[warps] + np.uint32(operand.offset)
    rows = addresses[:, 8 * number : 8 * number + 8]
    if (rows % 16).any():
        raise KernelError("misaligned: a matrix's row")
    return rows[:, _ROW] + (2 * _PAIR).astype(np.uint32)


def _load_matrices(machine: Machine, instruction: Instruction, warps: np.ndarray) -> None:
    target, source = instruction.operands
    if not {"m8n8", "shared", "b16"} <= set(instruction.modifiers) or "trans" in instruction.modifiers:
        raise KernelError("unknown")
    for number, register in enumerate(_registers(target)):
        at = _matrix_rows(machine, source, number, warps).reshape(-1)
        lanes = warps.reshape(-1)
        values = machine.shared.load(at, 4, machine.block[lanes], machine.thread[lanes])
        _write(machine, register, warps, values.view(np.uint32).reshape(warps.shape))


def _store_matrices(machine: Machine, instruction: Instruction, warps: np.ndarray) -> None:
    target, source = instruction.operands
    if not {"m8n8", "shared", "b16"} <= set(instruction.modifiers) or "trans" in instruction.modifiers:
        raise KernelError("unknown")
    lanes = warps.reshape(-1)
    for number, register in enumerate(_registers(source)):
        at = _matrix_rows(machine, target, number, warps).reshape(-1)
        values = to_bytes(machine.read_lanes(register, "b32")[lanes])
        machine.shared.store(at, values, machine.block[lanes], machine.thread[lanes])


def _multiply(machine: Machine, instruction: Instruction, warps: np.ndarray) -> None:
    """D = A @ B + C of 16 x 8: a register holds two neighbours of a row of A or a column of B, of TF32 one."""
    shape, kind = instruction.modifiers[2], instruction.modifiers[-2]
    depth = {"m16n8k16": 16, "m16n8k8": 8}[shape]
    target, a, b, c = map(_registers, instruction.operands)

    def elements(register: str) -> np.ndarray:
        """[warps, 32, elements of a register]."""
        bits = np.ascontiguousarray(machine.read_lanes(register, "b32")[warps])
        if kind == "tf32":
            # The unit reads no more of it.
            return (bits & np.uint32(0xFFFFE000)).view(np.float32)[..., None].astype(np.float64)
        return bits[..., None].view(DTYPES[kind]).astype(np.float64)

    # Of a column block of A: two elements a register are 8 columns wide, one is 4.
    width = 4 if kind == "tf32" else 8
    column = _LANE % 4 if kind == "tf32" else _PAIR
    A = np.zeros((len(warps), 16, depth))
    B = np.zeros((len(warps), depth, 8))
    for number, register in enumerate(a):
        values = elements(register)
        for index in range(values.shape[2]):
            A[:, _ROW + 8 * (number % 2), column + index + width * (number // 2)] = values[..., index]
    for number, register in enumerate(b):
        values = elements(register)
        for index in range(values.shape[2]):
            B[:, column + index + width * number, _ROW] = values[..., index]
    product = A @ B
    for number, (register, added) in enumerate(zip(target, c, strict=True)):
        own = product[:, _ROW + 8 * (number // 2), _PAIR + number % 2]
        _write(machine, register, warps, (own + machine.read_lanes(added, "f32")[warps]).astype(np.float32))


def _together(do: Callable[[Machine, Instruction, np.ndarray], None]) -> Operation:
    return lambda machine, instruction, lanes: do(machine, instruction, machine.whole_warps(lanes))


WARPS: dict[str, Operation] = {
    "shfl": _together(_shuffle),
    "redux": _together(_reduce),
    "ldmatrix": _together(_load_matrices),
    "stmatrix": _together(_store_matrices),
    "mma": _together(_multiply),
}

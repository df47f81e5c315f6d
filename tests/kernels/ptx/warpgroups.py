"""What four warps do together on compute capability 9.0: multiply matrices that lie in shared memory (`wgmma`)."""

import re

import numpy as np

from tests.kernels.ptx.arithmetic import DTYPES
from tests.kernels.ptx.machine import WARP, Lanes, Machine, Operation
from tests.kernels.ptx.memory import MANY, KernelError
from tests.kernels.ptx.parse import Instruction, Operand

__all__ = ["WARPGROUPS"]

_THREADS = 4 * WARP
_ROWS = 64
_STEP_BYTES = 32
"""Of a row, that one instruction takes."""
_THREAD = np.arange(_THREADS)
_ROW, _PAIR = 16 * (_THREAD // WARP) + _THREAD % WARP // 4, 2 * (_THREAD % 4)


def _numbers(raw: np.ndarray, kind: str) -> np.ndarray:
    if kind == "tf32":
        return (raw.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return raw.view(DTYPES[kind]).astype(np.float64)


def _matrix(machine: Machine, operand: Operand, threads: np.ndarray, num_rows: int, kind: str) -> np.ndarray:
    """A matrix [rows, depth] that a descriptor names: rows of 8 lie `stride` apart, swizzled within `width` bytes."""
    descriptors = machine.read_lanes(operand, "u64")[threads]
    if (descriptors != descriptors[0]).any():
        raise KernelError("the threads of a warpgroup name different matrices")
    descriptor = int(descriptors[0])
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    width = {1: 128, 2: 64, 3: 32}[descriptor >> 62]
    row, byte = np.arange(num_rows)[:, None], np.arange(0, _STEP_BYTES, 4)
    linear = start + row // 8 * stride + row % 8 * width + byte
    at = (linear ^ ((linear >> 7 & (width // 16 - 1)) << 4)).reshape(-1).astype(np.uint32)
    # No thread of the group has written it: the unit reads what a barrier has made visible.
    blocks = np.full(at.size, machine.block[threads[0]])
    raw = machine.shared.load(at, 4, blocks, np.full(at.size, MANY))
    return _numbers(np.ascontiguousarray(raw).reshape(num_rows, _STEP_BYTES), kind)


def _left(machine: Machine, operand: Operand, threads: np.ndarray, kind: str) -> np.ndarray:
    """The left matrix [64, depth]: in shared memory, or in TF32 an element to a register."""
    if not isinstance(operand, tuple):
        return _matrix(machine, operand, threads, _ROWS, kind)
    if kind != "tf32":
        raise KernelError("unknown")
    values = np.zeros((_ROWS, _STEP_BYTES // 4))
    for number, register in enumerate(operand):
        own = _numbers(np.ascontiguousarray(machine.read_lanes(register, "b32")[threads]), kind)
        values[_ROW + 8 * (number % 2), _THREAD % 4 + 4 * (number // 2)] = own
    return values


def _multiply(machine: Machine, instruction: Instruction, lanes: Lanes) -> None:
    """D = A @ B.T, or D + A @ B.T; the instructions that wait for it change nothing here, where it is done at once."""
    groups = machine.whole_warps(lanes).reshape(-1, _THREADS)
    if instruction.modifiers[0] != "mma_async":
        return
    target, left, right, keep, *signs = instruction.operands
    assert isinstance(target, tuple)
    kind, columns = instruction.modifiers[-1], re.search(r"n(\d+)k", instruction.text)
    if columns is None or signs not in (["1", "1"], ["1", "1", "0", "0"]):
        raise KernelError("unknown")
    is_added = np.broadcast_to(machine.read(keep, "pred"), (machine.num_lanes,))
    results = {register: np.zeros(machine.num_lanes, np.float32) for register in target}
    for threads in groups:
        product = _left(machine, left, threads, kind) @ _matrix(machine, right, threads, int(columns[1]), kind).T
        for number, register in enumerate(target):
            own = product[_ROW + 8 * (number // 2 % 2), 8 * (number // 4) + _PAIR + number % 2]
            if is_added[threads[0]]:
                own = own + machine.read_lanes(register, "f32")[threads]
            results[register][threads] = own
    for register, value in results.items():
        machine.write(register, value, lanes)


WARPGROUPS: dict[str, Operation] = {"wgmma": _multiply}

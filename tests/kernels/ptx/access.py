"""Loads, stores and asynchronous copies of a machine's lanes."""

from typing import Any

import numpy as np

from tests.kernels.ptx.arithmetic import DTYPES, from_bytes, to_bytes
from tests.kernels.ptx.machine import Lanes, Machine, Operation
from tests.kernels.ptx.memory import KernelError
from tests.kernels.ptx.parse import Address, Instruction, Operand

__all__ = ["ACCESS"]


def _addresses(machine: Machine, operand: Operand, kind: str, at: np.ndarray) -> np.ndarray:
    assert isinstance(operand, Address)
    base = machine.read_lanes(operand.base, kind)[at]
    return base + np.array(operand.offset).astype(base.dtype)


def _registers(operand: Operand) -> tuple[str, ...]:
    assert not isinstance(operand, Address)
    return (operand,) if isinstance(operand, str) else operand


def _indices(machine: Machine, lanes: Lanes) -> np.ndarray:
    return np.arange(machine.num_lanes) if lanes is None else np.flatnonzero(lanes)


def _load(machine: Machine, instruction: Instruction, lanes: Lanes) -> None:
    space, kind = instruction.modifiers[0], instruction.modifiers[-1]
    target, source = instruction.operands
    if space == "param":
        assert isinstance(source, Address) and source.offset == 0
        value = np.frombuffer(machine.parameters[source.base], DTYPES[kind])
        machine.write(target, value[0], lanes)
        return
    registers = _registers(target)
    size = DTYPES[kind].itemsize
    at = _indices(machine, lanes)
    if space == "global":
        values = machine.memory.load(
            _addresses(machine, source, "u64", at), size * len(registers), machine.launch_block[at]
        )
    else:
        addresses = _addresses(machine, source, "u32", at)
        values = machine.shared.load(addresses, size * len(registers), machine.block[at], machine.thread[at])
    for index, register in enumerate(registers):
        value = np.zeros(machine.num_lanes, DTYPES[kind])
        value[at] = from_bytes(values[:, size * index : size * (index + 1)], DTYPES[kind])[:, 0]
        machine.write(register, value, lanes)


def _store(machine: Machine, instruction: Instruction, lanes: Lanes) -> None:
    space, kind = instruction.modifiers[0], instruction.modifiers[-1]
    target, source = instruction.operands
    at = _indices(machine, lanes)
    values = np.concatenate([to_bytes(machine.read_lanes(one, kind)[at]) for one in _registers(source)], axis=1)
    if space == "global":
        machine.memory.store(_addresses(machine, target, "u64", at), values, machine.launch_block[at])
    else:
        machine.shared.store(_addresses(machine, target, "u32", at), values, machine.block[at], machine.thread[at])


def _copy(machine: Machine, instruction: Instruction, lanes: Lanes) -> None:
    """`cp.async`: a copy, the end of a group of them, or the wait for all groups but the last few."""
    match instruction.modifiers[1]:
        case "commit_group":
            for block in _whole_blocks(machine, lanes):
                machine.copies[block].append([])
        case "wait_group":
            (keep,) = instruction.operands
            assert isinstance(keep, str)
            for block in _whole_blocks(machine, lanes):
                closed = len(machine.copies[block]) - 1
                for _ in range(closed - int(keep)):
                    for copy in machine.copies[block].pop(0):
                        machine.shared.finish_copy(*copy)
        case "cg" | "ca":
            _start_copy(machine, instruction, _indices(machine, lanes))
        case _:
            raise KernelError("unknown")


def _whole_blocks(machine: Machine, lanes: Lanes) -> Any:
    on = np.ones(machine.num_lanes, bool) if lanes is None else lanes
    of_block = on.reshape(-1, machine.kernel.threads)
    if (of_block.any(axis=1) != of_block.all(axis=1)).any():
        raise KernelError("a thread of a block is missing")
    return np.flatnonzero(of_block.all(axis=1))


def _start_copy(machine: Machine, instruction: Instruction, at: np.ndarray) -> None:
    target, source, size, *taken = instruction.operands
    assert isinstance(size, str)
    num_bytes = int(size, 0)
    present = machine.read_lanes(taken[0], "u32")[at] if taken else np.full(at.size, num_bytes)
    if not np.isin(present, (0, num_bytes)).all():
        raise KernelError("a copy of a part")
    values = np.zeros((at.size, num_bytes), np.uint8)
    some = present > 0
    addresses = _addresses(machine, source, "u64", at)
    values[some] = machine.memory.load(addresses[some], num_bytes, machine.launch_block[at[some]])
    targets = _addresses(machine, target, "u32", at)
    block, thread = machine.block[at], machine.thread[at]
    written = machine.shared.store(targets, values, block, thread)
    machine.shared.start_copy(written)
    for one in np.unique(block):
        own = block == one
        machine.copies[one][-1].append((written[own], block[own], thread[own]))


ACCESS: dict[str, Operation] = {"ld": _load, "st": _store, "cp": _copy}

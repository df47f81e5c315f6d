"""The threads of a kernel on the CPU: all those of several blocks in step, one instruction after the other.

A lane is a thread of one of the blocks. Where lanes part, those that are furthest behind go first, and lanes that meet
go on together.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from tests.kernels.ptx.arithmetic import ARITHMETIC, DTYPES
from tests.kernels.ptx.memory import GlobalMemory, KernelError, SharedMemory
from tests.kernels.ptx.parse import Instruction, Kernel, Operand

__all__ = ["WARP", "Lanes", "Machine", "Operation"]

WARP = 32
_MAX_STEPS = 1_000_000
_POISON = 0x7FC0DEAD7FC0DEAD
"""What a register holds in lanes that did not write it; as a float it is no number."""

Lanes: TypeAlias = np.ndarray | None
"""Which lanes are meant, [lanes] of bool; None is all of them."""

Operation: TypeAlias = "Callable[[Machine, Instruction, Lanes], None]"


class Machine:
    """Some blocks of a launch."""

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        parameters: Mapping[str, bytes],
        grid: Sequence[int],
        blocks: np.ndarray,
        shared_bytes: int,
        operations: "Mapping[str, Operation]",
    ) -> None:
        """Lay out the lanes.

        Args:
            kernel: what they run.
            memory: what pointers lead to.
            parameters: by name.
            grid: blocks of the launch, in x, y and z.
            blocks: which of them, the first in x first.
            shared_bytes: of each block.
            operations: what is done beside arithmetic and jumps, by opcode.
        """
        self.kernel, self.memory, self.parameters = kernel, memory, parameters
        self._operations = operations
        self.num_lanes = blocks.size * kernel.threads
        self.block = np.repeat(np.arange(blocks.size), kernel.threads)
        """Of each lane, counted among those of this machine."""
        self.launch_block = blocks[self.block]
        """Of each lane, counted in the launch."""
        self.thread = np.tile(np.arange(kernel.threads), blocks.size)
        self.shared = SharedMemory(blocks.size, shared_bytes)
        self.copies: list[list[list[Any]]] = [[[]] for _ in range(blocks.size)]
        """Asynchronous copies of each block by group, the one that is still open last."""
        self._waiting: dict[int, np.ndarray] = {}
        """Lanes that stand at a barrier, by its index."""
        x, y, z = np.unravel_index(self.launch_block, tuple(grid), order="F")
        special = {
            "%tid.x": self.thread,
            "%ntid.x": kernel.threads,
            "%laneid": self.thread % WARP,
            "%ctaid.x": x,
            "%ctaid.y": y,
            "%ctaid.z": z,
            "%nctaid.x": grid[0],
            "%nctaid.y": grid[1],
            "%nctaid.z": grid[2],
        }
        self._registers = {
            name: np.broadcast_to(np.asarray(value, np.uint32), (self.num_lanes,)) for name, value in special.items()
        }
        self._numbers: dict[tuple[str, str], np.ndarray] = {}

    def run(self) -> None:
        """Run to the end.

        Raises:
            KernelError: a lane does what it may not.
        """
        fragments = {0: np.ones(self.num_lanes, bool)}
        with np.errstate(all="ignore"):
            for _ in range(_MAX_STEPS):
                if not fragments:
                    break
                index = min(fragments)
                lanes = fragments.pop(index)
                for after, those in self._step(index, lanes):
                    if those.any():
                        fragments[after] = fragments[after] | those if after in fragments else those
            else:
                raise KernelError(f"{self.kernel.name} does not end")
        for index in self._waiting:
            raise KernelError(f"a thread is missing at the barrier {index} of {self.kernel.name}")

    def _step(self, index: int, lanes: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Do one instruction; where which lanes go on."""
        instruction = self.kernel.instructions[index]
        on = lanes
        if instruction.guard:
            guard = self.read(instruction.guard, "pred")
            on = lanes & (~guard if instruction.negated else guard)
        match instruction.opcode:
            case "bra":
                (label,) = instruction.operands
                assert isinstance(label, str)
                return [(self.kernel.labels[label], on), (index + 1, lanes & ~on)]
            case "ret" | "exit":
                return [(index + 1, lanes & ~on)]
            case "bar" | "barrier":
                if instruction.operands != ("0",):
                    raise KernelError(f"unknown: {instruction.text}")
                return [(index + 1, self._barrier(index, on) | (lanes & ~on))]
        if on.any():
            try:
                self._do(instruction, None if on.all() else on)
            except KernelError as error:
                raise KernelError(f"{error} ({self.kernel.name}: {instruction.text})") from None
        return [(index + 1, lanes)]

    def _barrier(self, index: int, lanes: np.ndarray) -> np.ndarray:
        """Lanes that pass: those of blocks of which every thread has come."""
        here = lanes | self._waiting.pop(index, np.zeros_like(lanes))
        complete = here.reshape(-1, self.kernel.threads).all(axis=1)
        self.shared.epoch[complete] += 1
        passing = here & complete[self.block]
        if (here != passing).any():
            self._waiting[index] = here & ~passing
        return passing

    def _do(self, instruction: Instruction, lanes: Lanes) -> None:
        opcode = instruction.opcode
        if opcode == "mov" and isinstance(instruction.operands[1], tuple):
            self._poison_unwritten(instruction.operands[1])
        if opcode in ARITHMETIC:
            self.write(instruction.operands[0], ARITHMETIC[opcode](instruction, self.read), lanes)
        elif opcode in self._operations:
            self._operations[opcode](self, instruction, lanes)
        elif opcode not in ("nop", "fence"):
            raise KernelError("unknown")

    def _poison_unwritten(self, registers: tuple[str, ...]) -> None:
        """Make unwritten registers no numbers: of a pair, the compiler may leave one half open that nobody reads."""
        for register in registers:
            if register.startswith("%") and register not in self._registers:
                poison = np.array(_POISON, np.uint64).astype(self._width(register))
                self._registers[register] = np.broadcast_to(poison, (self.num_lanes,))

    def whole_warps(self, lanes: Lanes) -> np.ndarray:
        """The lanes' indices [warps, 32].

        Raises:
            KernelError: some lanes of a warp are missing.
        """
        on = np.ones(self.num_lanes, bool) if lanes is None else lanes
        of_warp = on.reshape(-1, WARP)
        if (of_warp.any(axis=1) != of_warp.all(axis=1)).any():
            raise KernelError("a thread of a warp is missing")
        return np.flatnonzero(on).reshape(-1, WARP)

    def read(self, operand: Operand, kind: str) -> np.ndarray:
        """An operand's lanes as a type; a number has none."""
        assert isinstance(operand, str)
        dtype = DTYPES[kind]
        lanes = self._registers.get(operand)
        if lanes is None:
            if operand.startswith("%"):
                raise KernelError(f"register {operand} is read before it is written")
            key = operand, kind
            if key not in self._numbers:
                self._numbers[key] = _number(operand, dtype)
            return self._numbers[key]
        if lanes.dtype.itemsize > dtype.itemsize:
            lanes = lanes.astype(f"u{dtype.itemsize}")
        if lanes.dtype.itemsize < dtype.itemsize:
            raise KernelError(f"register {operand} is too small for {kind}")
        return lanes.view(dtype)

    def read_lanes(self, operand: Operand, kind: str) -> np.ndarray:
        """As `read`, with lanes in any case."""
        return np.broadcast_to(self.read(operand, kind), (self.num_lanes,))

    def write(self, operand: Operand, value: np.ndarray, lanes: Lanes = None) -> None:
        """Put lanes into a register, widened as their type says, or into several that share their bits."""
        if isinstance(operand, tuple):
            value = np.broadcast_to(value, (self.num_lanes,))
            parts = np.ascontiguousarray(value)[:, None].view(f"u{value.dtype.itemsize // len(operand)}")
            for register, part in zip(operand, parts.T, strict=True):
                self.write(register, part, lanes)
            return
        assert isinstance(operand, str)
        if operand == "_":
            return
        dtype = self._width(operand)
        if value.dtype.itemsize < dtype.itemsize:
            value = value.astype(dtype)
        assert value.dtype.itemsize == dtype.itemsize, operand
        value = np.broadcast_to(value.view(dtype), (self.num_lanes,))
        if lanes is not None:
            poison = np.array(_POISON, np.uint64).astype(dtype)
            value = np.where(lanes, value, self._registers.get(operand, poison))
        self._registers[operand] = value

    def _width(self, register: str) -> Any:
        kind = self.kernel.registers[register.rstrip("0123456789")]
        return DTYPES[kind]


def _number(text: str, dtype: Any) -> np.ndarray:
    if text == "global_smem":
        return np.zeros((), dtype)
    if bits_of_float := re.fullmatch("0f([0-9A-Fa-f]{8})", text):
        return np.array(int(bits_of_float[1], 16), np.uint32).view(dtype)
    if dtype.kind == "b":
        return np.array(int(text, 0) != 0)
    bits = int(text, 0) & ((1 << (8 * dtype.itemsize)) - 1)
    return np.array(bits, f"u{dtype.itemsize}").view(dtype)

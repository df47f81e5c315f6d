"""Reads the PTX that Triton writes: one kernel a text, no functions, no shared memory but the launch's."""

import re
from dataclasses import dataclass, replace
from typing import TypeAlias

__all__ = ["Address", "Instruction", "Kernel", "Operand", "parse"]


@dataclass(frozen=True, slots=True)
class Address:
    """What stands between brackets: a register or a name, and an offset in bytes."""

    base: str
    offset: int


Operand: TypeAlias = str | Address | tuple[str, ...]
"""A register, number or label; an address; or what stands between braces."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a kernel."""

    text: str
    opcode: str
    """As `ld`."""
    modifiers: tuple[str, ...]
    """As `global`, `v4`, `b32`."""
    operands: tuple[Operand, ...]
    guard: str = ""
    """The predicate that it stands under, if any."""
    negated: bool = False
    """Whether it is done where the guard is false."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a launch runs."""

    name: str
    parameters: dict[str, str]
    """Type by name, in order."""
    registers: dict[str, str]
    """Type by prefix: `%rd` -> `b64`."""
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    threads: int

    def without(self, index: int) -> "Kernel":
        """The same kernel with an instruction that does nothing in place of one."""
        nothing = Instruction("nop", "nop", (), ())
        return self.with_instruction(index, nothing)

    def with_instruction(self, index: int, instruction: Instruction) -> "Kernel":
        """The same kernel with another instruction at this place."""
        before, after = self.instructions[:index], self.instructions[index + 1 :]
        return replace(self, instructions=(*before, instruction, *after))

    def indices(self, opcode: str, *modifiers: str) -> list[int]:
        """Where the instructions of an opcode stand that have all of the modifiers."""
        return [
            index
            for index, one in enumerate(self.instructions)
            if one.opcode == opcode and set(modifiers) <= set(one.modifiers)
        ]


_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)\s*\.reqntid (\d+)\s*(?:\.\w+ \d+\s*)*\{(.*?)\n\}", re.DOTALL)
_PARAMETER = re.compile(r"\.param \.(\w+) (?:\.ptr [^,]*? )?(\w+)\s*(?:,|$)")
_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*);")
_OPERAND = re.compile(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+)\s*(?:,|$)")
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]")


def parse(text: str) -> Kernel:
    """The kernel of a PTX text.

    Raises:
        SyntaxError: a line is none of those that are known.
    """
    text = re.sub(r"//.*", "", text)
    found = _ENTRY.search(text)
    if not found:
        raise SyntaxError("no kernel with a number of threads")
    name, parameters, threads, body = found.groups()
    registers: dict[str, str] = {}
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    for line in map(str.strip, body.splitlines()):
        if not line or line.startswith((".loc", ".pragma")):
            continue
        if register := re.fullmatch(r"\.reg \.(\w+)\s+(%\w+)<\d+>;", line):
            registers[register[2]] = register[1]
        elif label := re.fullmatch(r"([$\w]+):", line):
            labels[label[1]] = len(instructions)
        else:
            instructions.append(_instruction(line))
    return Kernel(
        name=name,
        parameters={one[2]: one[1] for one in _PARAMETER.finditer(parameters.strip())},
        registers=registers,
        instructions=tuple(instructions),
        labels=labels,
        threads=int(threads),
    )


def _instruction(line: str) -> Instruction:
    found = _INSTRUCTION.fullmatch(line)
    if not found:
        raise SyntaxError(f"not an instruction: {line}")
    negated, guard, opcode, modifiers, operands = found.groups()
    return Instruction(
        text=line,
        opcode=opcode,
        modifiers=tuple(modifiers.split(".")[1:]),
        operands=tuple(_operand(one[1].strip(), line) for one in _OPERAND.finditer(operands) if one[1].strip()),
        guard=guard or "",
        negated=bool(negated),
    )


def _operand(text: str, line: str) -> Operand:
    if text.startswith("{"):
        return tuple(one.strip() for one in text[1:-1].split(","))
    if not text.startswith("["):
        return text
    found = _ADDRESS.fullmatch(text)
    if not found:
        raise SyntaxError(f"not an address: {line}")
    return Address(found[1], int(found[2] or "0", 0))

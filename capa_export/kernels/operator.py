"""What an operator's kernels are, and the launches that compute it: said once, for Triton, for a plugin and for C++.

The functions that list launches do arithmetic on sizes only. With numbers they say what to launch; with `Symbol`s
they are written into the C++ plugin, and say which sizes a kernel has to be compiled for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

__all__ = ["Cost", "Count", "Dtype", "Launch", "Operator", "Scratch", "Symbol", "Tensor", "ceil_div"]

Dtype = Literal["real", "fp32", "int32", "int64"]
"""`real` stands for fp16, bf16 or fp32, the same throughout a call."""


@dataclass(frozen=True, slots=True)
class Symbol:
    """A count that is not known yet, as an expression of C."""

    text: str

    def __add__(self, other: "Count") -> "Symbol":
        return Symbol(f"({self} + {other})")

    def __sub__(self, other: "Count") -> "Symbol":
        return Symbol(f"({self} - {other})")

    def __mul__(self, other: "Count") -> "Symbol":
        return Symbol(f"({self} * {other})")

    def __floordiv__(self, other: "Count") -> "Symbol":
        return Symbol(f"({self} / {other})")

    def __str__(self) -> str:
        return self.text


Count: TypeAlias = int | Symbol
"""A size, or what follows from sizes; never negative."""


def ceil_div(count: Count, block: int) -> Count:
    """How many blocks hold `count`."""
    return (count + (block - 1)) // block


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output. Its first axis is the batch; a graph that runs one prompt may leave that axis out."""

    dtype: Dtype
    shape: tuple[str | int, ...]
    """A name stands for a size that is the same wherever the name stands."""
    has_batch: bool = False
    """Whether the graph's tensor has the batch axis too."""

    @property
    def graph_shape(self) -> tuple[str | int, ...]:
        """The shape as the graph has it."""
        return self.shape if self.has_batch or self.shape[0] != "batch" else self.shape[1:]


@dataclass(frozen=True, slots=True)
class Scratch:
    """Memory that a call needs while it runs; kernels rely on its address being a multiple of 16."""

    dtype: Dtype
    count: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One kernel over one grid."""

    kernel: Any
    """A function of `triton.jit`."""
    grid: tuple[Count, Count, Count]
    args: Sequence[str | Count]
    """In the kernel's order: names of tensors, scratch or attributes, and counts."""
    constants: Mapping[str, Count]
    """What the kernel is compiled for: its `tl.constexpr` parameters, which follow `args`.

    One of the operator's compiled sizes is among them under its name in capitals, if at all.
    """
    warps: int = 4


@dataclass(frozen=True, slots=True)
class Cost:
    """What bounds a kernel from below, whatever it does."""

    bytes: int
    """Every input read once and every output written once."""
    flops: int
    """A multiplication and an addition are two."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A CAPA node as kernels compute it."""

    name: str
    """Of the node and of the plugin."""
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    attributes: Mapping[str, type[int] | type[float]]
    launches: Callable[[Any], list[Launch]]
    """Sizes by name, as attributes -> the launches, in order."""
    cost: Callable[[Any], "Cost"]
    """Sizes by name -> the least that any kernel has to move and compute."""
    scratch: Callable[[Any], dict[str, Scratch]] = lambda _: {}
    """Sizes by name -> what the launches share beyond inputs and outputs."""
    value_inputs: Mapping[str, str] = field(default_factory=dict[str, str])
    """Inputs [1] on the host whose value is a size: name of the input -> name of the size."""
    compiled_sizes: tuple[str, ...] = ()
    """Sizes that kernels are compiled for."""
    aligned_sizes: tuple[str, ...] = ()
    """Sizes that are multiples of 16 in every model, which kernels rely on."""

    def sizes(self, shapes: Mapping[str, Sequence[int]], values: Mapping[str, int]) -> Any:
        """Every size by name, from the shapes of the inputs (with batch axis) and the values of `value_inputs`.

        Raises:
            ValueError: the shapes contradict each other or the operator.
        """
        found: dict[str, int] = {size: values[name] for name, size in self.value_inputs.items()}
        for name, tensor in self.inputs.items():
            shape = tuple(shapes[name])
            if len(shape) != len(tensor.shape):
                raise ValueError(f"{self.name}: {name} has shape {shape}, not {tensor.shape}")
            for size, expected in zip(shape, tensor.shape, strict=True):
                known = found.setdefault(expected, size) if isinstance(expected, str) else expected
                if known != size:
                    raise ValueError(f"{self.name}: {name} has shape {shape}; {expected} is {known}")
        for name in self.aligned_sizes:
            if found[name] % 16:
                raise ValueError(f"{self.name}: {name} is {found[name]}, not a multiple of 16")
        return SimpleNamespace(**found)

    def symbols(self, known: Mapping[str, int]) -> Any:
        """Every size by name, a symbol unless it is known."""
        names = {size for tensor in (*self.inputs.values(), *self.outputs.values()) for size in tensor.shape}
        names |= set(self.value_inputs.values())
        return SimpleNamespace(**{name: known.get(name, Symbol(name)) for name in names if isinstance(name, str)})
